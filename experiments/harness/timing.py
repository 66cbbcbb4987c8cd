"""Alternatives timed against each other, on a machine that may do other things meanwhile.

The alternatives take turns, so that a slow minute meets all of them, and what is reported is the
ratio of their medians. CPU time stands beside wall time: it does not count waiting for a core.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
from rich.table import Table

from experiments.harness.progress import make_table

Clock = Callable[[], float]
HEADER = ("", "ms", "quartiles", "ratio", "CPU ratio", "goal", "met")


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long one alternative takes.

    Attributes:
      name, baseline: the alternative, and the one that it is compared with.
      wall, cpu: seconds a call, one figure a round; CPU time is that of the whole process.
      calls: calls inside one measurement.
      ratio, cpu_ratio: median over the median of the baseline, so below 1 is faster.
    """

    name: str
    baseline: str
    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    calls: int
    ratio: float
    cpu_ratio: float

    @property
    def median(self) -> float:
        """Median wall time of a call, in seconds."""
        return statistics.median(self.wall)

    @property
    def cpu_median(self) -> float:
        """Median CPU time of a call, in seconds."""
        return statistics.median(self.cpu)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the wall time, in seconds."""
        if len(self.wall) == 1:
            return self.wall[0], self.wall[0]
        first, _, third = statistics.quantiles(self.wall, n=4, method="inclusive")
        return first, third


@dataclasses.dataclass(frozen=True)
class Goal:
    """What the ratio of an alternative should be at most; 1 / 100 is a hundred times faster.

    Attributes:
      limit: of the wall time. cpu_limit: of the CPU time, by default anything.
    """

    limit: float
    cpu_limit: float = math.inf

    def __str__(self) -> str:
        cpu = "" if math.isinf(self.cpu_limit) else f", CPU <= {_factor(self.cpu_limit)}"
        return f"<= {_factor(self.limit)}{cpu}"

    def met(self, timing: Timing) -> bool:
        """Whether the medians of a run meet it."""
        return timing.ratio <= self.limit and timing.cpu_ratio <= self.cpu_limit


def compare(
    functions: Mapping[str, Callable[[], Any]],
    *,
    baseline: str,
    rounds: int = 15,
    min_seconds: float = 0.005,
    clock: Clock = time.perf_counter,
    cpu_clock: Clock = time.process_time,
) -> dict[str, Timing]:
    """Times functions in turns, after warming each of them up.

    Args:
      functions: name to a call without arguments; what it returns is waited for.
      baseline: the name that the others are divided by.
      rounds: measurements of each.
      min_seconds: shorter calls are repeated within a measurement until it lasts about this long.
      clock, cpu_clock: give seconds.

    Returns:
      A timing for every name, in the order given.

    Raises:
      ValueError: an unknown baseline, or fewer than one round.
    """
    if baseline not in functions:
        raise ValueError(f"baseline is {baseline!r}; it must be one of {', '.join(functions)}")
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; it must be at least 1")
    calls = {}
    for name, function in functions.items():
        _time(function, 1, clock, cpu_clock)  # compiles
        took = min(_time(function, 1, clock, cpu_clock)[0] for _ in range(2))
        calls[name] = max(1, math.ceil(min_seconds / max(took, 1e-7)))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    order = list(functions)
    for _ in range(rounds):
        for name in order:
            times[name].append(_time(functions[name], calls[name], clock, cpu_clock))
        order = order[1:] + order[:1]  # nobody always follows the same one
    wall = {name: tuple(w for w, _ in pairs) for name, pairs in times.items()}
    cpu = {name: tuple(c for _, c in pairs) for name, pairs in times.items()}
    return {
        name: Timing(
            name,
            baseline,
            wall[name],
            cpu[name],
            calls[name],
            ratio=_ratio(wall[name], wall[baseline]),
            cpu_ratio=_ratio(cpu[name], cpu[baseline]),
        )
        for name in functions
    }


def timing_table(
    title: str,
    timings: Sequence[Timing],
    goals: Mapping[str, Goal],
    more: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> tuple[Table, list[dict[str, Any]]]:
    """Shows timings beside their goals.

    Args:
      title: above the table.
      timings: a row each; a baseline comes before what is compared with it, which is indented.
      goals: by the name of the timing; the others have none.
      more: further columns, by the name of the timing and the heading.

    Returns:
      The table, and the same rows for JSON with times in milliseconds.
    """
    headings = list(dict.fromkeys(name for cells in more.values() for name in cells))
    rows, lines = [], []
    for timing in timings:
        cells, goal = more.get(timing.name, {}), goals.get(timing.name)
        rows.append(_as_row(timing, goal) | dict(cells))
        lines.append(_as_text(timing, goal) + [cells.get(name, "") for name in headings])
    table = make_table(title, (*HEADER, *headings), lines)
    table.caption = "ratio: of the medians, to the row above that is not indented"
    table.caption_justify = "left"
    for column in table.columns[1:]:
        column.no_wrap = True
    return table, rows


def _time(
    function: Callable[[], Any], calls: int, clock: Clock, cpu_clock: Clock
) -> tuple[float, float]:
    """Wall and CPU seconds of a call; each is waited for, or CPU devices would overlap them."""
    cpu, wall = cpu_clock(), clock()
    for _ in range(calls):
        jax.block_until_ready(function())
    return (clock() - wall) / calls, (cpu_clock() - cpu) / calls


def _ratio(times: Sequence[float], baseline: Sequence[float]) -> float:
    below = statistics.median(baseline)
    return statistics.median(times) / below if below else math.nan


def _as_row(timing: Timing, goal: Goal | None) -> dict[str, Any]:
    return {
        "name": timing.name,
        "baseline": timing.baseline,
        "ratio": timing.ratio,
        "cpu_ratio": timing.cpu_ratio,
        "median_ms": 1e3 * timing.median,
        "quartiles_ms": [1e3 * q for q in timing.quartiles],
        "cpu_ms": 1e3 * timing.cpu_median,
        "rounds": len(timing.wall),
        "calls": timing.calls,
        "goal": None if goal is None else str(goal),
        "met": None if goal is None else goal.met(timing),
    }


def _as_text(timing: Timing, goal: Goal | None) -> list[str]:
    first, third = timing.quartiles
    times = [f"{1e3 * timing.median:.3g}", f"{1e3 * first:.3g}-{1e3 * third:.3g}"]
    if timing.name == timing.baseline:
        return [timing.name, *times, "", "", "", ""]
    verdict = ["", ""] if goal is None else [str(goal), "yes" if goal.met(timing) else "no"]
    return [f"  {timing.name}", *times, _factor(timing.ratio), _factor(timing.cpu_ratio), *verdict]


def _factor(ratio: float) -> str:
    """`1.25`, or `1/100` for what is much faster."""
    return f"1/{1 / ratio:.3g}" if 0 < ratio < 0.5 else f"{ratio:.3g}"
