"""Small files of a folder that nobody vouches for: JSON with limits, names that stay inside."""

import re
from pathlib import Path
from typing import Any

from sparsejax.core.untrusted import parse_object, shown

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


def plural(count: int, noun: str) -> str:
    """`1 tensor`, `2 tensors`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


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
