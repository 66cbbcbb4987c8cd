"""Figures: one style, saved as PNG."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("agg")
import matplotlib.pyplot as plt

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222")
DASHES = ("-", (0, (6, 2)), (0, (2, 2)), "-.")  # curves that coincide stay visible


def new_figure(title: str, x: str, y: str, *, size: tuple[float, float] = (7.0, 4.2)) -> Any:
    """A figure with one pair of axes, labelled.

    Returns:
      `(figure, axes)`.
    """
    figure, axes = plt.subplots(figsize=size, dpi=130, layout="constrained")
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_curves(
    axes: Any,
    curves: Mapping[str, Sequence[tuple[Any, Any]]],
    *,
    order: Sequence[str] | None = None,
) -> None:
    """Mean curves over seeds, with a band from the lowest to the highest.

    Args:
      curves: name -> one `(x, y)` a seed, all of the same length.
      order: all names that a family of figures knows, so that a name has one colour in all of
        them; the names of `curves` by default.
    """
    known = list(order or curves)
    for name, runs in curves.items():
        place = known.index(name)
        color, dash = COLORS[place % len(COLORS)], DASHES[place % len(DASHES)]
        x = np.asarray(runs[0][0])
        y = np.stack([np.asarray(values) for _, values in runs])
        axes.plot(x, y.mean(0), label=name, color=color, linestyle=dash, linewidth=1.6)
        if len(runs) > 1:
            axes.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.18, linewidth=0)


def save(figure: Any, path: pathlib.Path) -> None:
    """Writes a figure and closes it."""
    figure.savefig(path)
    plt.close(figure)
