"""Statistical top-k as XLA compiles it well: the path on CPU, and wherever no kernel runs."""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.dispatch import target
from pallas_kernels.statistical_topk import arithmetic as a

Blocks = None
"""XLA chooses its own."""
PIECES = 16
"""Of a row, for one pass over it on CPU."""


def reasons(x: Array, where: Array | None, *, interpret: object = False) -> list[str]:
    """It runs everywhere."""
    return []


def forward(
    x: Array, where: Array | None, rows: a.Rows, mode: a.Mode, *, blocks: None, interpret: object
) -> a.Forward:
    """`[r, d]` rows to output and statistics; without `where`, x is read twice."""
    wide = a.wide(x)
    count = jnp.maximum(rows.count, 1)
    pilot = None if where is not None else _pilot(wide)
    mean, variance = a.moments(wide, where, count, pilot=pilot, sums=_sums)
    std = jnp.sqrt(variance)
    limit = a.threshold(mean, std, rows.quantile)
    y = None if mode == "mask" else a.output(wide, where, limit, mode).astype(x.dtype)
    return a.Forward(y, limit, mean, std)


def backward(
    x: Array,
    where: Array | None,
    dy: Array,
    dlimit: Array,
    rows: a.Saved,
    *,
    soft: bool,
    blocks: None,
    interpret: object,
) -> Array:
    """The gradient of x; in soft mode the output also depends on the threshold."""
    wide = a.wide(x)
    on = a.on_gradient(wide, where, a.wide(dy), rows.threshold)
    if soft:
        dlimit = dlimit - a.row_sum(on)
    return (on + a.threshold_gradient(wide, where, rows, dlimit)).astype(x.dtype)


def _pilot(x: Array) -> Array:
    """The mean of the first entries of every row, instead of one more pass over all.

    Of m among d entries: their mean is off by at most sqrt(d/m) standard deviations whatever the
    row holds, so that at most a factor of 1 + d/m of the variance's precision is lost, 65 here.
    """
    return jnp.mean(x[:, : max(128, x.shape[1] // 64)], axis=-1, keepdims=True)


def _sums(x: Array) -> tuple[Array, Array]:
    """Both sums in one pass, which XLA on CPU would otherwise make two, keeping `x` in between.

    A reduction of pairs is vectorised there only along a few whole pieces of a row, laid on top of
    each other; the op on [64, 9216] then takes two thirds of its time with `arithmetic.sums`.
    """
    rows, width = x.shape
    if width % PIECES or target().platform != "cpu":
        return a.sums(x)
    stacked = x.reshape(rows, PIECES, width // PIECES)
    zero = jnp.zeros((), x.dtype)
    total, squares = lax.reduce(
        (stacked, stacked * stacked), (zero, zero), lambda p, q: (p[0] + q[0], p[1] + q[1]), (1,)
    )
    return a.row_sum(total), a.row_sum(squares)
