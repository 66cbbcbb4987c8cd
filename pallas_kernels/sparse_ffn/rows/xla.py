"""The row products as XLA compiles them well: the path on CPU, and wherever no kernel runs.

On CPU a loop over the list reads several rows a step, and one at a time what is left of them: its
length is dynamic, so that the capacity of the list costs nothing. What decides the time is to wait
for many rows at once. One row after the other, each waits for memory and for the table of its page:
copying 8 rows for a small dense product took 1.6 to 2 times as long. Elsewhere all entries of the
list are gathered.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.dispatch import target
from pallas_kernels.sparse_ffn.rows import reference
from pallas_kernels.sparse_ffn.weights import piece

Blocks = None
"""XLA chooses its own."""
MATVEC_ROWS, VECMAT_ROWS = 8, 16
"""Of a step on CPU, and below the pieces of each: measured with rows that no cache holds."""
PIECES = {4: 4, 2: 2}
"""By the bytes of a weight."""


def reasons(w: Array, idx: Array, v: Array, *, interpret: object = False) -> list[str]:
    """It runs everywhere."""
    return []


def matvec(
    w: Array, idx: Array, count: Array, x: Array, *, blocks: None, interpret: object
) -> Array:
    """`[f, d]` rows times `[d]` to `[c]`."""
    if target().platform != "cpu":
        return reference.gather_rows_matvec(w, idx, x, count)
    return _matvec(w, idx, count, x)


def vecmat(
    w: Array, idx: Array, count: Array, a: Array, *, blocks: None, interpret: object
) -> Array:
    """`[c]` times `[f, d]` rows to `[d]`."""
    if target().platform != "cpu":
        return reference.scatter_rows_vecmat(w, idx, a, count)
    return _vecmat(w, idx, count, a)


# one after the other under vmap: a batched loop would run as long as its longest list and gather
@jax.custom_batching.sequential_vmap
def _matvec(w: Array, idx: Array, count: Array, x: Array) -> Array:
    width = x.shape[0]
    pieces = math.gcd(width, PIECES.get(w.dtype.itemsize, 1)) or 1

    def step(at: Array, rows: list[Array], y: Array) -> Array:
        # one reduction of all rows, along whole pieces: it is vectorised and reads them together
        products = [(row * x).reshape(pieces, width // pieces) for row in rows]
        zero = jnp.zeros((), x.dtype)
        sums = lax.reduce(products, [zero] * len(rows), _add, (0,))
        return lax.dynamic_update_slice(y, jnp.sum(jnp.stack(sums), axis=1), (at,))

    return _over_list(w, idx, count, MATVEC_ROWS, step, jnp.zeros(idx.shape, x.dtype))


def _add(left: list[Array], right: list[Array]) -> list[Array]:
    return [a + b for a, b in zip(left, right)]


@jax.custom_batching.sequential_vmap
def _vecmat(w: Array, idx: Array, count: Array, a: Array) -> Array:
    def step(at: Array, rows: list[Array], y: Array) -> Array:
        values = lax.dynamic_slice(a, (at,), (len(rows),))
        for value, row in zip(values, rows):
            y = y + value * row
        return y

    return _over_list(w, idx, count, VECMAT_ROWS, step, jnp.zeros(w.shape[1:], a.dtype))


def _over_list(
    w: Array,
    idx: Array,
    count: Array,
    rows: int,
    step: Callable[[Array, list[Array], Array], Array],
    state: Array,
) -> Array:
    """Folds `step(position, rows [d], state)` over the first entries of a list."""

    def several(size: int, start: Array, steps: Array, state: Array) -> Array:
        def body(i: Array, state: Array) -> Array:
            at = start + i * size
            chosen = lax.dynamic_slice(idx, (at,), (size,))
            return step(at, [piece(w, chosen[r], state.dtype)[0] for r in range(size)], state)

        return lax.fori_loop(0, steps, body, state)

    size = min(rows, idx.shape[0])
    if size == 0:
        return state
    whole = count // size
    state = several(size, jnp.zeros_like(count), whole, state)
    return several(1, whole * size, count - whole * size, state)
