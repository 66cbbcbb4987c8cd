"""What every reader of somebody else's file needs: strict JSON, sizes, and quotes for messages."""

import json
from collections.abc import Iterable
from typing import Any, TypeGuard


def shown(value: object) -> str:
    """`value` for an error message: printable and short, whatever was in the file."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def listed(values: Iterable[object], most: int = 4) -> str:
    """The first few of `values`, and how many more there are."""
    every = list(values)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(shown(value) for value in every[:most]) + more


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
