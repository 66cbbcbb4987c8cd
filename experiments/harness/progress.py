"""What is seen while an experiment runs: progress bars and tables."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table


def _bar(console: Console, *columns: ProgressColumn) -> Progress:
    """A bar with the given columns between its counts and the `status` of its task."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        *columns,
        TextColumn("{task.fields[status]}"),
        console=console,
        transient=True,
        refresh_per_second=4,
        disable=not console.is_terminal,
    )


@contextlib.contextmanager
def training_bar(
    console: Console, name: str, *, total: int, completed: int = 0
) -> Iterator[Callable[[int, float, Mapping[str, float]], None]]:
    """A progress bar with speed, time left, loss and, where it is known, density.

    Yields:
      A function of the steps done, the steps a second and the latest metrics.
    """
    speed = TextColumn("{task.fields[speed]}")
    bar = _bar(console, speed, TimeRemainingColumn())
    with bar:
        task = bar.add_task(name, total=total, completed=completed, speed="", status="")

        def update(done: int, rate: float, metrics: Mapping[str, float]) -> None:
            shown = [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
            if "density" in metrics:
                shown.append(f"density {metrics['density']:.3f}")
            bar.update(task, completed=done, speed=f"{rate:.1f}/s", status="  ".join(shown))

        yield update


@contextlib.contextmanager
def layer_bar(
    console: Console, name: str, *, total: int
) -> Iterator[Callable[[int, str, float], None]]:
    """A progress bar over the layers of a model, with the latest one's reconstruction error.

    Yields:
      A function of block, path and relative error, as `prune_model` calls it.
    """
    bar = _bar(console, TimeRemainingColumn())
    with bar:
        task = bar.add_task(name, total=total, status="")

        def update(block: int, path: str, error: float) -> None:
            layer = path.removesuffix("/kernel")
            bar.update(task, advance=1, status=f"block {block} {layer}: error {error:.2e}")

        yield update


def make_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table: the first column is text, the others are numbers; brackets are shown as they are."""
    table = Table(title=escape(title), title_justify="left")
    for i, name in enumerate(header):
        table.add_column(escape(name), justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def mean_and_deviation(values: Sequence[float], digits: int = 3) -> str:
    """`mean ± standard deviation` of several runs, or the one value."""
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return f"{mean:.{digits}f}"
    deviation = (sum((v - mean) ** 2 for v in values) / (count - 1)) ** 0.5
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"
