"""A feed-forward layer that reads the rows of its active neurons."""

import functools
from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float, Int, UInt16

from pallas_kernels import dispatch
from pallas_kernels.sparse_ffn.checks import check_floating, check_shape
from pallas_kernels.sparse_ffn.rows import Blocks, gather_rows_matvec, scatter_rows_vecmat
from pallas_kernels.sparse_ffn.weights import wide_dtype


def sparse_ffn(
    x: Float[Array, "i"],
    up: Float[Array, "f i"] | UInt16[Array, "f i"],
    down: Float[Array, "f o"] | UInt16[Array, "f o"],
    idx: Int[Array, "c"],
    count: int | Int[Array, ""] | None = None,
    *,
    gate: Float[Array, "c"] | Float[Array, "f i"] | UInt16[Array, "f i"] | None = None,
    activation: Callable[[Array], Array] | None = None,
    implementation: dispatch.Implementation | None = None,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> Float[Array, "o"]:
    """One token through the listed neurons j of a feed-forward layer: `sum_j h_j down[j]`.

    What is known of the gate decides the hidden unit:

        gate [c], a number for every entry of idx     h_j = gate_j * (up[j] @ x)
        gate [f, i], weights                          h_j = activation(gate[j] @ x) * (up[j] @ x)
        gate None                                     h_j = activation(up[j] @ x)

    Spark FFN is the first, with `gelu` of the predictor's survivors and `x[r:]`; so is CATS, whose
    gate is computed densely; the second is a gated layer whose active neurons are known.

    It is `gather_rows_matvec` and `scatter_rows_vecmat` with hidden units in the precision of
    their sums: lists, dtypes, gradients (of x, weights and gate) and `vmap` are those of the two.

    Args:
      up, down, and gate where it is weights: neuron-major, one row a neuron.
      idx: active neurons, in [0, f). count: entries of idx that count, by default all.
      activation: entry by entry; wherever the gate is not known.
      implementation, blocks, interpret: see `gather_rows_matvec`.

    Returns:
      Of the dtype of x.

    Raises:
      TypeError, ValueError: as `gather_rows_matvec`.
      ValueError: up, down and gate of different numbers of neurons, a gate that is neither, or an
        activation that is missing or has nothing to act on.

    Source: Spark Transformer (2025, arXiv 2506.06644), section on sparse execution.

    >>> import jax.numpy as jnp
    >>> up, down = jnp.asarray([[1.0, 2.0], [3.0, 4.0]]), jnp.asarray([[1.0], [100.0]])
    >>> sparse_ffn(jnp.ones(2), up, down, jnp.asarray([1]), gate=jnp.asarray([0.5]))
    Array([350.], dtype=float32)
    """
    check_floating("x", x)
    check_shape("down", down, (*up.shape[:1], *down.shape[1:]), "up")
    dtype = wide_dtype(x, up, down)
    wide = x.astype(dtype)
    options = {"implementation": implementation, "blocks": blocks, "interpret": interpret}
    matvec = functools.partial(gather_rows_matvec, idx=idx, x=wide, count=count, **options)
    if gate is None:
        hidden = _needed(activation)(matvec(up))
    elif gate.ndim == 1:
        check_shape("gate", gate, idx.shape, "idx")
        if activation is not None:
            raise ValueError(f"activation is {activation}; with a gate of numbers there is none")
        hidden = gate.astype(dtype) * matvec(up)
    else:
        check_shape("gate", gate, up.shape, "up")
        hidden = _needed(activation)(matvec(gate)) * matvec(up)
    return scatter_rows_vecmat(down, idx, hidden, count, **options).astype(x.dtype)


def _needed(activation: Callable[[Array], Array] | None) -> Callable[[Array], Array]:
    if activation is None:
        raise ValueError("activation is None; without a gate of numbers there must be one")
    return activation
