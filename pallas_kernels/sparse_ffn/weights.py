"""Weights as they lie in memory: floats, or bfloat16 kept as uint16 bit patterns."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, UInt16


def bit_patterns(w: Float[Array, "*s"]) -> UInt16[Array, "*s"]:
    """Weights rounded to bfloat16, as the bits of it: the fastest storage of 16 bits on CPU.

    The ops of `pallas_kernels.sparse_ffn` take it wherever they take weights; it has no gradient.

    >>> bit_patterns(jnp.asarray([1.0, -2.0]))
    Array([16256, 49152], dtype=uint16)
    """
    return lax.bitcast_convert_type(w.astype(jnp.bfloat16), jnp.uint16)


def wide_dtype(*arrays: Array) -> jnp.dtype:
    """What products are summed in: float32, or float64 where an array is."""
    double = any(v.dtype == jnp.float64 for v in arrays)
    return jnp.dtype(jnp.float64 if double else jnp.float32)


def widen(w: Array, dtype: Any) -> Array:
    """Weights as numbers of a dtype."""
    if w.dtype == jnp.uint16:
        w = lax.bitcast_convert_type(w.astype(jnp.uint32) << 16, jnp.float32)
    return w.astype(dtype)


def piece(w: Array, i: Array, dtype: Any) -> Array:
    """`w[i : i + 1]`, widened.

    XLA on CPU would widen a whole bfloat16 array before it slices it, and a whole array of bits
    where it may lift their making out of a loop: hence the barrier.
    """
    if w.dtype == jnp.bfloat16:
        w, i = lax.optimization_barrier((w, i))
        w = lax.bitcast_convert_type(w, jnp.uint16)
    return widen(lax.dynamic_index_in_dim(w, i, 0), dtype)


def active(idx: Array, count: ArrayLike) -> Array:
    """Which entries of a list count."""
    return jnp.arange(idx.shape[0], dtype=jnp.int32) < count
