"""Reading small files that nobody vouches for: JSON with limits, names that stay in the folder."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeGuard

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


def shown(value: object) -> str:
    """`value` for an error message: printable and short, whatever was in the file."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def listed(values: Iterable[object], most: int = 4) -> str:
    """The first few of `values`, and how many more there are."""
    every = list(values)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(shown(value) for value in every[:most]) + more


def plural(count: int, noun: str) -> str:
    """`1 tensor`, `2 tensors`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def is_size(value: object, least: int = 1) -> TypeGuard[int]:
    """True for an integer of at least `least` in 63 bits; JSON's true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 63


def parse_object(data: bytes | str) -> dict[str, Any]:
    """The JSON object that `data` is.

    Raises ValueError, ready to follow a file's name, for anything else: damaged or too deeply
    nested text, a name that comes twice in an object, NaN, a value that is no object.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except _RefusedError:
        raise
    except ValueError as error:
        raise ValueError(f"is no valid JSON ({shown(str(error))})") from None
    if not isinstance(value, dict):
        raise ValueError(f"holds {shown(value)}; it must be a JSON object")
    return value


class _RefusedError(ValueError):
    """Valid for Python's parser, not for us."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = (
            sorted({name for name in names if names.count(name) > 1}) if len(names) < 999 else []
        )
        raise _RefusedError(f"has a name twice in one object ({listed(twice)})")
    return found


def _no_constant(constant: str) -> None:
    raise _RefusedError(f"holds {constant}, which is no JSON")


def inside(folder: Path, name: object) -> Path:
    """The regular file `name` directly inside `folder`, which is already resolved.

    Raises ValueError, ready to follow the file's name, if it has a path in its name, is missing, is
    no regular file, or is a symbolic link to somewhere outside.
    """
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
        raise ValueError("is no plain file name; files must lie in the folder itself")
    path = folder / name
    try:
        target = path.resolve()
        if not path.exists():
            raise ValueError("is missing")
        if not target.is_relative_to(folder):
            raise ValueError("is a symbolic link that leaves the folder; copy the file there")
        if not target.is_file():
            raise ValueError("is no regular file")
    except (OSError, RuntimeError) as error:
        raise ValueError(f"cannot be read ({shown(str(error))})") from None
    return target


def read_object(folder: Path, name: str, limit: int) -> dict[str, Any]:
    """The JSON object in the file `name` of `folder`, of at most `limit` bytes.

    Raises ValueError with a message that starts with `name`.
    """
    try:
        path = inside(folder, name)
        with path.open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise ValueError(f"has more than {limit} bytes")
        return parse_object(data)
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({shown(str(error))})") from None
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None
