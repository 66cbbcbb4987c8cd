"""The one rule by which documents are held out."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def hold_out(items: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """Split off the last tenth of two or more items, rounded, at least one."""
    count = max(1, round(len(items) / 10))
    return items[:-count], items[-count:]
