"""Widening: statistics and scores are computed in float32 at least."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def widen(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """`x` in float32, or as it is when its float is that wide already."""
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
