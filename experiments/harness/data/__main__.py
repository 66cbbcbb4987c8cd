"""`python -m experiments.harness.data list` and `... prepare NAME...`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.harness.data.builders import PROJECT_DATASETS
from experiments.harness.data.errors import DatasetError
from experiments.harness.data.load import data_dir, is_prepared, open_builder, prepare


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.harness.data", description="The datasets of the experiments."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names, splits and sizes")
    names = commands.add_parser("prepare", help="build datasets, so that later runs only read")
    names.add_argument("names", nargs="+", metavar="NAME", help="small_digits, python_text/source")
    options = parser.parse_args(arguments)
    try:
        if options.command == "list":
            _list()
        else:
            _prepare(options.names)
    except DatasetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _list() -> None:
    print(f"datasets in {data_dir()}")
    for name, dataset in PROJECT_DATASETS.items():
        print(f"{name}: {dataset.summary}")
        for config in dataset.configs:
            print(f"  {name}/{config:<8} {_state(name, config)}")


def _prepare(names: Sequence[str]) -> None:
    """Prepare each name; one of ours without a configuration stands for all it has."""
    for given in names:
        configs = PROJECT_DATASETS[given].configs if given in PROJECT_DATASETS else ()
        for name in [f"{given}/{config}" for config in configs] or [given]:
            print(f"{name}: {prepare(name)}")


def _state(name: str, config: str) -> str:
    dataset = PROJECT_DATASETS[name]
    folder = data_dir() / name / config / str(dataset.builder_class().VERSION)
    if not is_prepared(folder):
        return f"{', '.join(dataset.splits)} (built at the first use)"
    splits = open_builder(f"{name}/{config}").info.splits
    sizes = ", ".join(f"{split} {info.num_examples:,}" for split, info in splits.items())
    return f"{sizes} ({_megabytes(folder):.1f} MB)"


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e6


if __name__ == "__main__":
    sys.exit(main())
