"""Runs experiments and collects what they found in RESULTS.md and the README's table.

`python -m experiments.reproduce [slug ...]`: all experiments without names; `--collect` only reads
the summaries of earlier runs.
"""

import argparse
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from experiments.harness.registry import last_summary, list_experiments
from experiments.harness.run import write_atomic

BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs, collects, writes."""
    entries = {entry.slug: entry for entry in list_experiments()}
    parser = argparse.ArgumentParser(prog="python -m experiments.reproduce", description=__doc__)
    parser.add_argument("slug", nargs="*", help="experiments to run; all of them by default")
    parser.add_argument("--preset", default="laptop", help="preset to run")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs"))
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("RESULTS.md"))
    parser.add_argument("--readme", type=pathlib.Path, default=pathlib.Path("README.md"))
    parser.add_argument("--collect", action="store_true", help="only collect earlier runs")
    options = parser.parse_args(arguments)
    unknown = [slug for slug in options.slug if slug not in entries]
    if unknown:
        print(
            f"error: no experiment {unknown[0]!r}; there are {', '.join(entries)}", file=sys.stderr
        )
        sys.exit(2)
    failed = []
    if not options.collect:
        for slug in options.slug or list(entries):
            command = [sys.executable, "-m", f"experiments.{slug}", "--preset", options.preset]
            if subprocess.run([*command, "--out", str(options.out)], check=False).returncode:
                failed.append(slug)
    found = {slug: last_summary(options.out, slug) for slug in entries}
    table = results_table([summary for summary in found.values() if summary])
    write_atomic(options.results, f"# Results\n\n{table}")
    if options.readme.is_file():
        text = options.readme.read_text()
        if BEGIN in text and END in text:
            pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
            write_atomic(options.readme, pattern.sub(lambda _: f"{BEGIN}\n\n{table}\n{END}", text))
    print(f"wrote {options.results}")
    if failed:
        print(f"error: {', '.join(failed)} failed", file=sys.stderr)
        sys.exit(1)


def results_table(summaries: Sequence[dict[str, Any]]) -> str:
    """The claims of several runs as a Markdown table."""
    lines = [
        "| experiment | claim | verdict | ours | baseline | seeds | minutes | on |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for summary in summaries:
        device = f"{summary['device']}, {summary['cores']} cores"
        for i, claim in enumerate(summary["claims"]):
            cells = [
                f"`{summary['slug']}` ({summary['preset']})" if i == 0 else "",
                claim["sentence"],
                "holds" if claim["holds"] else "**does not hold**",
                claim["ours"],
                claim["baseline"],
                str(claim["seeds"]),
                f"{summary['seconds'] / 60:.1f}" if i == 0 else "",
                device if i == 0 else "",
            ]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
