"""Runs experiments, keeps what they found in `results/`, and writes RESULTS.md and README tables.

`python -m experiments.reproduce [slug ...]`: all experiments without names; `--collect` only reads
the summaries of earlier runs. What is in `results/` and was not run again stays.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.harness.config import is_of
from experiments.harness.registry import last_summaries, list_experiments
from experiments.harness.run import write_atomic, write_json

KEPT = ("slug", "paper", "preset", "claims", "card", "metrics", "tables", "seconds", "device",
        "cores", "versions", "commit")  # fmt: skip
LOADED = ("pretrained", "retrained")
"""Presets that take a pretrained model; README shows the tables of those that it has marks for."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs, collects, writes."""
    entries = {entry.slug: entry for entry in list_experiments()}
    parser = argparse.ArgumentParser(prog="python -m experiments.reproduce", description=__doc__)
    parser.add_argument("slug", nargs="*", help="experiments to run; all of them by default")
    parser.add_argument("--preset", default="laptop", help="preset to run")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs"))
    parser.add_argument("--kept", type=pathlib.Path, default=pathlib.Path("results"))
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
    options.kept.mkdir(parents=True, exist_ok=True)
    for slug in entries:
        for preset, summary in last_summaries(options.out, slug).items():
            if not is_of(preset, "test") or options.preset == "test":
                kept = {name: summary[name] for name in KEPT if name in summary}
                write_json(options.kept / f"{slug}.{preset}.json", kept)
    files = sorted(options.kept.glob("*.json"))
    summaries = [json.loads(path.read_text()) for path in files]
    claims = claims_table(summaries)
    tables = [table for summary in summaries for table in summary.get("tables", [])]
    text = "\n".join([f"# Results\n\n{claims}", *map(markdown_table, tables)])
    write_atomic(options.results, text)
    if options.readme.is_file():
        loaded = [summary for summary in summaries if summary["preset"] in LOADED]
        sections = {"results": claims}
        for s in loaded:
            name = f"{s['slug']} {s['preset']}"
            sections[name] = "\n".join(markdown_table(table) for table in s["tables"])
        write_atomic(options.readme, fill_sections(options.readme.read_text(), sections))
    print(f"wrote {options.results}")
    if failed:
        print(f"error: {', '.join(failed)} failed", file=sys.stderr)
        sys.exit(1)


def fill_sections(text: str, sections: Mapping[str, str]) -> str:
    """Puts each text between its marks, `<!-- name -->` and `<!-- end of name -->`, if both are."""
    for name, content in sections.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if begin in text and end in text:
            pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
            filled = f"{begin}\n\n{content}\n{end}"
            text = pattern.sub(lambda _, filled=filled: filled, text)
    return text


def markdown_table(table: Mapping[str, Any]) -> str:
    """A `Table` of a summary in Markdown, its title above it."""
    rows = [table["header"], ["---", *["---:"] * (len(table["header"]) - 1)], *table["rows"]]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([f"{table['title']}:", "", *lines, ""])


def claims_table(summaries: Sequence[dict[str, Any]]) -> str:
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
