"""A chunk of tokens through the listed experts in plain jnp: the definition of the op."""

from collections.abc import Callable

import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float, Int, UInt16

from pallas_kernels.sparse_ffn.weights import active, wide_dtype, widen


def expert_union_ffn(
    x: Float[Array, "n d"],
    gates: Float[Array, "n e"],
    up: Float[Array, "e k d"] | UInt16[Array, "e k d"],
    down: Float[Array, "e k d"] | UInt16[Array, "e k d"],
    idx: Int[Array, "c"],
    count: Int[Array, ""],
    activation: Callable[[Array], Array],
) -> Float[Array, "n d"]:
    """See `pallas_kernels.sparse_ffn.expert_union_ffn`; differentiated by JAX itself."""
    dtype = wide_dtype(x, up, down)
    listed = active(idx, count)

    def take(w: Array, axis: int) -> Array:
        mask = jnp.expand_dims(listed, [a for a in range(w.ndim) if a != axis])
        return jnp.where(mask, widen(jnp.take(w, idx, axis=axis), dtype), 0)

    hidden = jnp.einsum("nd,ckd->nck", x.astype(dtype), take(up, 0), precision=Precision.HIGHEST)
    hidden = activation(hidden) * take(gates, 1)[:, :, None]
    y = jnp.einsum("nck,ckd->nd", hidden, take(down, 0), precision=Precision.HIGHEST)
    return y.astype(x.dtype)
