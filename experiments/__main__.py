"""`python -m experiments`: the list of experiments, with the last result of each."""

import pathlib

from rich.console import Console

from experiments.harness.progress import make_table
from experiments.harness.registry import last_summaries, list_experiments


def main() -> None:
    """Prints the table."""
    rows = []
    for entry in list_experiments():
        found = last_summaries(pathlib.Path("runs"), entry.slug)
        result = "not run here"
        if found:
            result = "; ".join(
                f"{preset} {'holds' if summary['holds'] else 'does not hold'}: {summary['ours']}"
                for preset, summary in found.items()
            )
        times = ", ".join(
            f"{name} {time}" + (" min" if time[:1].isdigit() else "")
            for name, time in entry.minutes.items()
        )
        rows.append((entry.slug, entry.line, times, result))
    header = ("python -m experiments.", "what it shows", "presets", "last result in runs/")
    Console(highlight=False).print(make_table("Experiments", header, rows))


if __name__ == "__main__":
    main()
