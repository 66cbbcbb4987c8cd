"""A chunk of tokens through the experts that any of them chose, reading those and nothing else."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt16

from pallas_kernels import dispatch
from pallas_kernels.sparse_ffn.checks import (
    check_floating,
    check_shape,
    check_weights,
    checked_list,
)
from pallas_kernels.sparse_ffn.experts import tpu, triton, xla
from pallas_kernels.sparse_ffn.weights import wide_dtype

__all__ = ["ExpertBlocks", "expert_union_ffn"]

ExpertBlocks = tpu.Blocks | triton.Blocks
_IMPLEMENTATIONS: dict[str, Any] = {"tpu": tpu, "triton": triton, "xla": xla}


def expert_union_ffn(
    x: Float[Array, "n d"],
    gates: Float[Array, "n e"],
    up: Float[Array, "e k d"] | UInt16[Array, "e k d"],
    down: Float[Array, "e k d"] | UInt16[Array, "e k d"],
    idx: Int[Array, "c"],
    count: int | Int[Array, ""] | None = None,
    *,
    activation: Callable[[Array], Array] = jax.nn.silu,
    implementation: dispatch.Implementation | None = None,
    blocks: ExpertBlocks | None = None,
    interpret: Any = False,
) -> Float[Array, "n d"]:
    """The sum over the listed experts e of `gates[:, e] * activation(x @ up[e].T) @ down[e]`.

    Every token goes through every listed expert; gates of 0 remove the pairs that nobody wants. An
    expert that is not listed contributes nothing, whatever its gates; one that is listed twice
    contributes twice. Entries of idx beyond the first `count` are ignored. The list is not looked
    at while tracing: see `check_rows`.

    Differentiated by x, gates, up and down (dense arrays, zero for what is not listed; none for bit
    patterns), by a loop of XLA's in every implementation. Only reverse mode is defined.
    Under `vmap` the CPU goes through the batch one by one, each as long as its own list.

    Args:
      x: tokens of a chunk. gates: of every token and expert.
      up, down: k neurons an expert, neuron-major both, of any float dtype or `bit_patterns`;
        products are summed in float32, in float64 where x or a weight is.
      idx: numbers of experts, in [0, e). count: entries of idx that count, by default all.
      activation: of the hidden units, entry by entry. Static: pass the same function again.
      implementation: "xla", "tpu" or "triton"; None takes the best that can run.
      blocks: of the named kernel; None chooses by shape.
      interpret: for tests: runs the named kernel on any device, as `pallas_call` takes it.

    Returns:
      Of the dtype of x.

    Raises:
      TypeError: x, gates or weights are not floating point, idx or count not of integers.
      ValueError: shapes that do not fit, a known count outside [0, c], blocks of another
        implementation, or an implementation that cannot run here (with the reasons).

    Source: BlockFFN (2025, arXiv 2507.08771), section on acceleration kernels.

    >>> up = down = jnp.stack([jnp.eye(2), 2 * jnp.eye(2)])
    >>> x, gates = jnp.ones((1, 2)), jnp.asarray([[5.0, 3.0]])
    >>> expert_union_ffn(x, gates, up, down, jnp.asarray([1, 0]), 1, activation=jax.nn.relu)
    Array([[12., 12.]], dtype=float32)
    """
    idx, count = checked_list(idx, count)
    check_floating("x", x)
    check_floating("gates", gates)
    check_weights("up", up, "e k d")
    check_weights("down", down, "e k d")
    if x.ndim != 2:
        raise ValueError(f"x has shape {x.shape}; it must be [n, d]")
    check_shape("up", up, (*up.shape[:2], x.shape[1]), "x")
    check_shape("down", down, up.shape, "up")
    check_shape("gates", gates, (x.shape[0], up.shape[0]), "x and up")
    dtype = wide_dtype(x, up, down)
    against = {
        name: module.reasons(x.astype(dtype), up, idx, interpret=interpret)
        for name, module in _IMPLEMENTATIONS.items()
    }
    chosen = dispatch.choose(implementation, against, interpret=interpret)
    dispatch.check_blocks(blocks, chosen, _IMPLEMENTATIONS[chosen].Blocks)
    rule = _Rule(activation, chosen, blocks, interpret)
    found: Array = _apply(rule, x.astype(dtype), gates.astype(dtype), up, down, idx, count)
    return found.astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What is static; `implementation` is the one that runs."""

    activation: Callable[[Array], Array]
    implementation: str
    blocks: ExpertBlocks | None
    interpret: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(rule: _Rule, *arrays: Array) -> Array:
    run = _IMPLEMENTATIONS[rule.implementation].forward
    return run(*arrays, rule.activation, blocks=rule.blocks, interpret=rule.interpret)


def _backward(rule: _Rule, residuals: Any, dy: Array) -> tuple[Any, ...]:
    x, gates, up, down, idx, count = residuals
    found = xla.backward(x, gates, up, down, idx, count, rule.activation, dy)
    return found.x, found.gates, _gradient(up, found.up), _gradient(down, found.down), None, None


def _gradient(w: Array, dw: Array) -> Array | None:
    return None if w.dtype == jnp.uint16 else dw.astype(w.dtype)


_apply.defvjp(lambda rule, *arrays: (_apply(rule, *arrays), arrays), _backward)
