"""Arms of a comparison: each method at each learning rate with each seed, kept as they finish."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.harness.config import RunConfig, Table
from experiments.harness.digits import kept_arm
from experiments.harness.progress import make_table, mean_and_deviation, training_bar
from experiments.harness.run import Run

Metrics = dict[str, list[Any]]  # by name, one value a seed
Found = dict[str, dict[float, Metrics]]  # by arm and learning rate


def run_arms(
    run: Run,
    slug: str,
    config: RunConfig,
    train: Callable[[str, float, int], Mapping[str, Any]],
    arms: Sequence[str],
    rates: Sequence[float],
) -> Found:
    """Trains what is not kept from an earlier part of the run.

    Args:
      train: arm, learning rate, seed -> JSON values, among them `test_loss`.
    """
    found: Found = {}
    with training_bar(run.console, "arms", total=len(arms) * len(rates)) as bar:
        for arm in arms:
            found[arm] = {}
            for rate in rates:

                def compute(arm: str = arm, rate: float = rate) -> Metrics:
                    each = [dict(train(arm, rate, seed)) for seed in config.seed_list()]
                    return {name: [values[name] for values in each] for name in each[0]}

                kept = kept_arm(run, slug, f"{arm}-lr{rate:g}", compute)
                found[arm][rate] = kept
                bar(sum(map(len, found.values())), 0.0, {"loss": mean(kept["test_loss"])})
    return found


def best_rate(found: Mapping[float, Metrics]) -> tuple[float, Metrics]:
    """The learning rate with the lowest mean test loss, and what it gave."""
    rate = min(found, key=lambda r: mean(found[r]["test_loss"]))
    return rate, found[rate]


def mean(values: Sequence[float]) -> float:
    """Mean over the seeds."""
    return float(np.mean(values))


def arms_table(
    title: str,
    found: Found,
    labels: Mapping[str, str],
    columns: Mapping[str, tuple[str, Callable[[float], str] | int]],
) -> Table:
    """Every arm at its best learning rate.

    Args:
      labels: of the arms. columns: metric -> heading, and digits or a format of the mean alone; an
        arm without the metric shows a dash.
    """

    def cell(metrics: Metrics, name: str, form: Callable[[float], str] | int) -> str:
        if name not in metrics:
            return "-"
        if callable(form):
            return form(mean(metrics[name]))
        return mean_and_deviation(metrics[name], form)

    rows = []
    for arm, by_rate in found.items():
        rate, metrics = best_rate(by_rate)
        cells = (cell(metrics, name, form) for name, (_, form) in columns.items())
        rows.append((labels.get(arm, arm), f"{rate:g}", *cells))
    heading = ("method", "best rate", *(name for name, _ in columns.values()))
    return Table(title, heading, tuple(rows))


def print_table(run: Run, table: Table) -> None:
    """Shows a table of results."""
    run.console.print(make_table(table.title, table.header, table.rows))


def as_metrics(found: Found, *, curves: Sequence[str] = ()) -> dict[str, Any]:
    """What `summary.json` keeps; `curves` stay in the files of the arms."""
    return {
        arm: {
            f"{rate:g}": {name: v for name, v in metrics.items() if name not in curves}
            for rate, metrics in by_rate.items()
        }
        for arm, by_rate in found.items()
    }


def curves_of(
    found: Found, metric: str, labels: Mapping[str, str]
) -> dict[str, list[tuple[Any, Any]]]:
    """A curve of every arm that has it, at its best learning rate, by label."""
    drawn = {}
    for arm, by_rate in found.items():
        values = best_rate(by_rate)[1].get(metric)
        if values:
            drawn[labels.get(arm, arm)] = [(np.arange(1, len(v) + 1), v) for v in values]
    return drawn
