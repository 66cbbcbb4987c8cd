"""Where the features of an activation lie, and the three products of its tiles with a block.

Activations are `[b, k, n]` with features "first" (channels by positions) and `[1, n, k]` with
features "last" (tokens by features); a tile of them is `[features, n]` or `[n, features]`.
"""

from typing import Any, Literal, get_args

import jax.numpy as jnp
from jax import Array, lax

Features = Literal["first", "last"]
FEATURES: tuple[str, ...] = get_args(Features)


def accumulator(dtype: jnp.dtype) -> Any:
    """What products of a dtype are summed in."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def sizes(x: Array, features: Features) -> tuple[int, int, int]:
    """Batches, features and positions of an activation."""
    b, *rest = x.shape
    k, n = rest if features == "first" else rest[::-1]
    return b, k, n


def arrange(b: Any, k: Any, n: Any, features: Features) -> tuple[Any, Any, Any]:
    """Sizes, indices or slices of batch, features and positions in the order of the axes."""
    return (b, k, n) if features == "first" else (b, n, k)


def apply(w: Array, x: Array, features: Features, *, transposed: bool) -> Array:
    """A block `[bo, bk]`, or its transpose, times a tile of activations."""
    inner = 0 if transposed else 1
    if features == "first":
        return _dot(w, x, inner, 0)
    return _dot(x, w, 1, inner)


def outer(dy: Array, x: Array, features: Features) -> Array:
    """What a tile adds to the gradient `[bo, bk]` of a block."""
    over = 1 if features == "first" else 0
    return _dot(dy, x, over, over)


def _dot(a: Array, b: Array, over_a: int, over_b: int) -> Array:
    return lax.dot_general(
        a, b, (((over_a,), (over_b,)), ((), ())), preferred_element_type=accumulator(a.dtype)
    )
