"""Block-sparse matrix times dense activations: a weight stored as a list of blocks.

What belongs here: the product, its gradients to stored blocks and activations, and the lists:
their transpose, checks and conversions. Which blocks stay is for others to say.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.block_sparse_matmul import tpu, triton, xla
from pallas_kernels.block_sparse_matmul.layout import FEATURES, Features
from pallas_kernels.block_sparse_matmul.lists import (
    Entries,
    Lists,
    Packed,
    as_lists,
    check_lists,
    from_dense,
    to_dense,
    transpose_lists,
)

__all__ = [
    "FEATURES",
    "Blocks",
    "Entries",
    "Features",
    "Packed",
    "block_sparse_matmul",
    "check_lists",
    "from_dense",
    "to_dense",
    "transpose_lists",
]

Blocks = tpu.Blocks | triton.Blocks
_IMPLEMENTATIONS: dict[str, Any] = {"tpu": tpu, "triton": triton, "xla": xla}


def block_sparse_matmul(
    values: Float[Array, "r s bo bk"],
    indices: Int[Array, "r s"],
    counts: Int[Array, "r"] | None,
    x: Float[Array, "..."],
    *,
    features: Features = "last",
    implementation: dispatch.Implementation | None = None,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> Float[Array, "..."]:
    """Multiplies a weight of which only some blocks are stored with dense activations.

    The weight W `[o, k]` has r block rows of bo outputs, o = r * bo, and k / bk block columns of bk
    inputs; block row i is `sum_j values[i, j]` put at the block columns `indices[i, j]`, over
    j < counts[i]. With it

        features "last"   x [*b, k]    -> [*b, o]       y[.., o] = sum_k W[o, k] x[.., k]
        features "first"  x [*b, k, n] -> [*b, o, n]    y[.., o, n] = sum_k W[o, k] x[.., k, n]

    for tokens by features, as in a transformer, and channels by positions, as in a convolution of
    size 1. Sums are float32, or float64 for float64; products of float32 have the device's default
    precision (`jax.default_matmul_precision`).

    Gradients go to values and x: dx = W^T dy, and dvalues is `dy x^T` at the stored blocks alone,
    0 beyond the counts. Only reverse mode is defined.

    Args:
      values: stored blocks, of the dtype of x.
      indices: the block column of every stored block, distinct within a row, in any order. They
        are not checked here (`check_lists` does); what one outside [0, k / bk) gives is undefined.
      counts: stored blocks of every row, in [0, s]; None: all s. What lies beyond is ignored.
      x: activations.
      features: where their features lie.
      implementation: "xla", "tpu" or "triton"; None takes the best that can run.
      blocks: of the named kernel; None chooses by device and shape.
      interpret: for tests: runs the named kernel on any device, as `pallas_call` takes it.

    Raises:
      TypeError: values or x not floating point or of different dtypes, lists that are no integers.
      ValueError: shapes that do not fit, a bk that does not divide k, unknown features or
        implementation, blocks of another implementation, or an implementation that cannot run here
        (with the reasons).

    Source: Elsen et al., Fast sparse ConvNets (2020, arXiv 1911.09723), for blocks of outputs; Gray
    et al., GPU kernels for block-sparse weights (2017), for blocks of both.

    >>> values, indices = jnp.ones((2, 1, 1, 2)), jnp.asarray([[1], [0]])
    >>> block_sparse_matmul(values, indices, None, jnp.asarray([[1.0, 2.0, 3.0, 4.0]]))
    Array([[7., 3.]], dtype=float32)
    """
    _check(values, indices, counts, x, features)
    axes = 1 if features == "last" else 2
    lead, tail = x.shape[:-axes], x.shape[-axes:]
    rows = math.prod(lead)
    activations = x.reshape((1, rows, *tail) if features == "last" else (rows, *tail))
    against = {
        name: module.reasons(values, activations, features, interpret=interpret)
        for name, module in _IMPLEMENTATIONS.items()
    }
    chosen = dispatch.choose(implementation, against, interpret=interpret)
    dispatch.check_blocks(blocks, chosen, _IMPLEMENTATIONS[chosen].Blocks)
    rule = _Rule(features, chosen, blocks, interpret)
    y: Array = _apply(rule, values, as_lists(indices, counts), activations)
    return y.reshape(*lead, values.shape[0] * values.shape[2], *tail[1:])


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What is static; `implementation` is the one that runs."""

    features: Features
    implementation: str
    blocks: Blocks | None
    interpret: Any

    @property
    def options(self) -> dict[str, Any]:
        return {"blocks": self.blocks, "interpret": self.interpret}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(rule: _Rule, values: Array, lists: Lists, x: Array) -> Array:
    return _forward(rule, values, lists, x)[0]


def _forward(rule: _Rule, values: Array, lists: Lists, x: Array) -> tuple[Any, Any]:
    run = _IMPLEMENTATIONS[rule.implementation].forward
    return run(values, lists, x, rule.features, **rule.options), (values, lists, x)


def _backward(rule: _Rule, residuals: Any, dy: Array) -> tuple[Array, None, Array]:
    values, lists, x = residuals
    run = _IMPLEMENTATIONS[rule.implementation].backward
    dvalues, dx = run(values, lists, x, dy, rule.features, **rule.options)
    return dvalues, None, dx


_apply.defvjp(_forward, _backward)


def _check(values: Array, indices: Array, counts: Array | None, x: Array, features: str) -> None:
    if features not in FEATURES:
        raise ValueError(f"features is {features!r}; allowed are {', '.join(FEATURES)}")
    if not jnp.issubdtype(x.dtype, jnp.floating) or values.dtype != x.dtype:
        raise TypeError(
            f"values is {values.dtype} and x is {x.dtype}; they must be of one floating dtype"
        )
    if values.ndim != 4 or 0 in values.shape:
        raise ValueError(f"values has shape {values.shape}; it must be [r, s, bo, bk], none empty")
    r, s, _, bk = values.shape
    for name, list_, expected in (("indices", indices, (r, s)), ("counts", counts, (r,))):
        if list_ is None:
            continue
        if not jnp.issubdtype(list_.dtype, jnp.integer):
            raise TypeError(f"{name} must be integers, not {list_.dtype}")
        if list_.shape != expected:
            raise ValueError(f"{name} has shape {list_.shape}; values ask for {expected}")
    axis = -1 if features == "last" else -2
    if x.ndim < -axis or x.shape[axis] == 0 or x.shape[axis] % bk:
        raise ValueError(
            f"x has shape {x.shape}; with features {features!r} its axis {axis} must be a multiple "
            f"of bk = {bk}"
        )
