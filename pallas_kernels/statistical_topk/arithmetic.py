"""What every implementation computes on the rows it holds, and the numbers that rows have.

A block is `[rows, d]`, or one row `[d]` (or a piece of it) in the Triton-style kernel; numbers of
rows are `[rows, 1]` or scalars. All of it is float32 or wider.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
from jax import Array

Mode = Literal["soft", "hard", "neg_inf", "mask"]
MODES: tuple[str, ...] = get_args(Mode)


class Rows(NamedTuple):
    """What is known of every row before it is read.

    Attributes:
      quantile: of the normal distribution; -inf for a row that is returned as it is.
      count: valid entries.
    """

    quantile: Array
    count: Array


class Moments(NamedTuple):
    """Mean, and mean square deviation from it, of the valid entries of every row."""

    mean: Array
    variance: Array


class Forward(NamedTuple):
    """What a forward pass gives: the output (None for "mask") and numbers of every row."""

    y: Array | None
    threshold: Array
    mean: Array
    std: Array


class Saved(NamedTuple):
    """Numbers of every row that the backward pass needs.

    Attributes:
      threshold: of the forward pass. mean: of the valid entries.
      slope: quantile / standard deviation, 0 where nothing deviates.
      weight: 1 / valid entries; 0 for a row whose threshold depends on nothing.
    """

    threshold: Array
    mean: Array
    slope: Array
    weight: Array


def wide(x: Array) -> Array:
    """The block in the precision of its statistics."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def keep(valid: Array | None, x: Array) -> Array:
    """Zero at invalid entries."""
    return x if valid is None else jnp.where(valid, x, jnp.zeros_like(x))


def row_sum(x: Array) -> Array:
    """Sum over the entries of each row."""
    return jnp.sum(x, axis=-1, keepdims=x.ndim > 1)


def sums(x: Array) -> tuple[Array, Array]:
    """Sums of the entries of each row, and of their squares."""
    return row_sum(x), row_sum(x * x)


def moments(
    x: Array,
    valid: Array | None,
    count: Array,
    *,
    pilot: Array | None = None,
    sums: Callable[[Array], tuple[Array, Array]] = sums,
) -> Moments:
    """Mean and variance by the deviations from a first guess of the mean.

    The correction by the mean deviation makes a row of equal entries exactly constant, whatever
    the rounding of its first mean, and the variance cannot cancel while the guess is good.

    Args:
      x: wide. valid: or None for all.
      count: valid entries, at least 1.
      pilot: the guess; None takes the mean.
      sums: gives the sums of a block and of its squares.
    """
    if pilot is None:
        pilot = row_sum(keep(valid, x)) / count
    total, squares = sums(keep(valid, x - pilot))
    correction = total / count
    variance = squares / count - correction * correction
    return Moments(pilot + correction, jnp.maximum(variance, jnp.zeros_like(variance)))


def threshold(mean: Array, std: Array, quantile: Array) -> Array:
    """Above which entries are on; -inf where the row is returned as it is."""
    return jnp.where(quantile == -jnp.inf, quantile, mean + std * quantile)


def selected(x: Array, valid: Array | None, limit: Array) -> Array:
    """The entries that are on: none of a row with a NaN threshold, all of one with -inf."""
    on = (x > limit) | (limit == -jnp.inf)
    return on if valid is None else on & valid


def output(x: Array, valid: Array | None, limit: Array, mode: Mode) -> Array:
    """The output of every mode but "mask"; NaN in a row whose threshold is NaN.

    The special rows are settled by numbers of rows, so that an entry takes two operations.
    """
    filler = jnp.full_like(limit, -jnp.inf if mode == "neg_inf" else 0)
    whole, unknown = limit == -jnp.inf, jnp.isnan(limit)
    off = jnp.where(unknown | whole, limit, filler)
    if mode == "soft":
        y = jnp.maximum(x - jnp.where(whole, jnp.zeros_like(limit), limit), off)
    else:
        y = jnp.where(x <= jnp.where(unknown, jnp.full_like(limit, jnp.inf), limit), off, x)
    return y if valid is None else jnp.where(valid, y, filler)


def on_gradient(x: Array, valid: Array | None, dy: Array, limit: Array) -> Array:
    """The gradient with a threshold that does not depend on x."""
    return jnp.where(selected(x, valid, limit), dy, jnp.zeros_like(dy))


def threshold_gradient(x: Array, valid: Array | None, rows: Saved, dlimit: Array) -> Array:
    """The gradient through the threshold, whose cotangent is `dlimit`."""
    direct = 1 + rows.slope * (x - rows.mean)
    return keep(valid, dlimit * rows.weight * direct)
