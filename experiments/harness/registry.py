"""Which experiments there are, found without importing any of them."""

import ast
import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

EXPERIMENTS = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Entry:
    """An experiment in the list.

    Attributes:
      slug: `python -m experiments.<slug>`. line: what it is, in one line.
      minutes: how long each preset takes on two CPU cores.
    """

    slug: str
    line: str
    minutes: Mapping[str, str]


def list_experiments() -> list[Entry]:
    """All experiments: modules and packages of this folder that say how long they take."""
    entries = []
    for path in sorted([*EXPERIMENTS.glob("*.py"), *EXPERIMENTS.glob("*/__init__.py")]):
        tree = ast.parse(path.read_text())
        minutes = [
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id == "MINUTES"
        ]
        if minutes:
            slug = path.parent.name if path.name == "__init__.py" else path.stem
            line = (ast.get_docstring(tree) or "").splitlines()[0]
            entries.append(Entry(slug, line, minutes[0]))
    return entries


def last_summaries(out: pathlib.Path, slug: str) -> dict[str, dict[str, Any]]:
    """The summary of the newest finished run of an experiment, for each preset that was run."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((out / slug).glob("*/summary.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            summary = json.loads(path.read_text())
            found[summary["preset"]] = summary
    return found
