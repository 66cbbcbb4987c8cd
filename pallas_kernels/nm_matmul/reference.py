"""Products with a compressed N:M weight in plain jnp: the definition."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels.nm_matmul.layout import Pattern, precise


def nm_matmul(
    x: Float[Array, "*b i"],
    values: Float[Array, "r c"],
    packed: UInt8[Array, "p q"],
    *,
    n: int,
    m: int,
    axis: int = -2,
    transpose: bool = False,
) -> Float[Array, "*b o"]:
    """`x @ W`, or `x @ W.T` with `transpose`; differentiated by JAX itself.

    Args: see `pallas_kernels.nm_matmul`.
    """
    dense = decompress(values, packed, n=n, m=m, axis=axis)
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.promote_types(x.dtype, values.dtype)
    w = (dense.T if transpose else dense).astype(precise(dtype))
    return jnp.dot(x.astype(w.dtype), w, precision=jax.lax.Precision.HIGHEST).astype(dtype)


def decompress(
    values: Float[Array, "r c"], packed: UInt8[Array, "p q"], *, n: int, m: int, axis: int = -2
) -> Float[Array, "i o"]:
    """The dense weight: entry q of a group is the stored value whose position is q, or 0."""
    if axis % 2:
        return decompress(values.T, packed.T, n=n, m=m).T
    count, columns = values.shape
    bits = Pattern(n, m).bits
    place = jnp.arange(bits, dtype=jnp.uint32)
    at = jnp.arange(count, dtype=jnp.uint32)[:, None] * bits + place
    stream = (packed[at // 8] >> (at % 8).astype(jnp.uint8)[..., None]) & jnp.uint8(1)
    position = jnp.sum(stream.astype(jnp.uint32) << place[:, None], axis=1, dtype=jnp.uint32)
    grouped = (count // n, n, 1, columns)
    here = position.reshape(grouped) == jnp.arange(m, dtype=jnp.uint32)[:, None]
    kept = jnp.where(here, values.reshape(grouped), jnp.zeros((), values.dtype))
    return jnp.sum(kept, axis=1).reshape(count // n * m, columns)
