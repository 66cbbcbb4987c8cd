"""The entries of somebody's config.json, looked at one by one."""

from collections.abc import Iterable, Mapping
from typing import Any

from sparsejax.core.untrusted import is_size, shown
from sparsejax.models.loading import CheckpointError

MOST_POSITIONS = 2**31 - 1
"""What a position of 32 bits can count."""


class Fields:
    """The entries of a config.json, each with the type it must have; collects what is wrong.

    A field that is wrong reads as its stand-in, so that the others are looked at too.
    """

    def __init__(self, config: Mapping[str, Any], problems: list[str]):
        self._config, self.problems = config, problems

    def get(self, name: str) -> Any:
        """The entry, or None."""
        return self._config.get(name)

    def has(self, name: str) -> bool:
        """Whether the entry is there, be it null."""
        return name in self._config

    def _bad(self, name: str, allowed: str) -> None:
        self.problems.append(f"{name} is {shown(self.get(name))}; it must be {allowed}")

    def size(self, name: str, default: int | None = None, most: int = 2**63 - 1) -> int:
        """A positive integer; required if there is no default."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if not is_size(value) or value > most:
            self._bad(name, f"an integer from 1 to {most}")
            return 1
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive finite number; required if there is no default."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if (is_size(value, 0) or isinstance(value, float)) and 0 < value < 1e12:
            return float(value)
        self._bad(name, "a number above 0 and below 1e12")
        return 1.0

    def flag(self, name: str) -> bool:
        """A boolean, false unless it is there."""
        value = self.get(name)
        if value not in (None, False, True) or is_size(value, 0) or isinstance(value, float):
            self._bad(name, "true or false")
        return value is True

    def refuse(self, name: str, why: str = "it is not supported") -> None:
        """Notes that a feature is there."""
        self.problems.append(f"{name} is {shown(self.get(name))}; {why}")


def architecture(config: Mapping[str, Any], known: Iterable[str]) -> str:
    """The one name in `config["architectures"]`. Raises CheckpointError unless it is `known`."""
    names = config.get("architectures")
    if isinstance(names, list) and len(names) == 1 and names[0] in list(known):
        return names[0]
    problem = f"architectures is {shown(names)}; allowed is one of {', '.join(known)}"
    raise CheckpointError("config.json", [problem])
