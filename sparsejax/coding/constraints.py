"""Constraints on dictionaries: atoms of unit length."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.core.dtypes import widen


def normalise(x: Float[Array, "*s"], *, axis: int | tuple[int, ...] = -1) -> Float[Array, "*s"]:
    """Divides by the Euclidean norm over `axis`; zeros stay zeros. Differentiated.

    >>> normalise(jnp.asarray([3.0, 4.0]))
    Array([0.6, 0.8], dtype=float32)
    """
    wide = widen(x)
    square = jnp.sum(jnp.square(wide), axis=axis, keepdims=True)
    inverse = jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)
    return (wide * inverse).astype(x.dtype)
