"""The row products in plain jnp: the definition that every implementation is tested against."""

import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float, Int, UInt16

from pallas_kernels.sparse_ffn.weights import active, wide_dtype, widen


def gather_rows_matvec(
    w: Float[Array, "f d"] | UInt16[Array, "f d"],
    idx: Int[Array, "c"],
    x: Float[Array, "d"],
    count: Int[Array, ""],
) -> Float[Array, "c"]:
    """`w[idx] @ x`, and 0 for what lies beyond the first `count` entries of the list.

    See `pallas_kernels.sparse_ffn.gather_rows_matvec`; differentiated by JAX itself.
    """
    dtype = wide_dtype(w, x)
    rows = _rows(w, idx, count, dtype)
    return jnp.dot(rows, x.astype(dtype), precision=Precision.HIGHEST).astype(x.dtype)


def scatter_rows_vecmat(
    w: Float[Array, "f d"] | UInt16[Array, "f d"],
    idx: Int[Array, "c"],
    a: Float[Array, "c"],
    count: Int[Array, ""],
) -> Float[Array, "d"]:
    """`a @ w[idx]` over the first `count` entries of the list.

    See `pallas_kernels.sparse_ffn.scatter_rows_vecmat`; differentiated by JAX itself.
    """
    dtype = wide_dtype(w, a)
    rows = _rows(w, idx, count, dtype)
    a_active = jnp.where(active(idx, count), a.astype(dtype), 0)
    return jnp.dot(a_active, rows, precision=Precision.HIGHEST).astype(a.dtype)


def _rows(w: Array, idx: Array, count: Array, dtype: jnp.dtype) -> Array:
    return jnp.where(active(idx, count)[:, None], widen(jnp.take(w, idx, axis=0), dtype), 0)
