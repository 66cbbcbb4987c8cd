"""Block-sparse times dense in plain jnp: the definition that implementations are tested against."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse_matmul.layout import Features, accumulator
from pallas_kernels.block_sparse_matmul.lists import to_dense


def block_sparse_matmul(
    values: Float[Array, "r s bo bk"],
    indices: Int[Array, "r s"],
    counts: Int[Array, "r"] | None,
    x: Float[Array, "..."],
    *,
    features: Features = "last",
) -> Float[Array, "..."]:
    """The stored blocks put where they belong in a dense weight W, differentiated by JAX itself.

        last:  y[*b, o] = sum_k W[o, k] x[*b, k]
        first: y[*b, o, n] = sum_k W[o, k] x[*b, k, n]

    Sums are float32 at least. The gradient of what lies beyond a count is 0.

    Args:
      values, indices, counts, x, features: see `pallas_kernels.block_sparse_matmul`.
    """
    k = x.shape[-1 if features == "last" else -2]
    w = to_dense(values, indices, counts, num_columns=k // values.shape[3])
    equation = "ok,...k->...o" if features == "last" else "ok,...kn->...on"
    y = jnp.einsum(equation, w, x, preferred_element_type=accumulator(x.dtype))
    return y.astype(x.dtype)
