"""Activations times a compressed N:M weight: n of every m entries, and where they stand.

What belongs here: the product with either orientation of the weight, and its gradients. What
needs more of the library is for its callers: choosing the entries, quantised values, strides.

Which shapes can win. With b rows of x and s = n/m, an entry of the weight takes 2 bytes dense in
bfloat16 and s (2 + bits/8) compact: 1.125 for 2:4, 0.594 for 2:8, 0.156 for 1:16. Tiles become
dense before they are multiplied, so the arithmetic is that of the dense product, 2b operations an
entry, and about 2n + 1 comparisons and selections to lay an entry out. For 4096 x 4096 and 2:4:

    CPU     one core reads 40 GB/s: dense float32 takes 1.7 ms at b = 1, and 3.7 at b = 2 to 4.
            Choosing x takes 1/8 ns a row and stored value, 1.1 ms a row: b = 1 and 2 win, more
            rows lose. XLA's dense bfloat16 product of one row takes 26 ms. From 9 rows on the
            dense weight is written first, 15 to 25 ms, which nothing wins back.
    H200    4.8 TB/s read 18.9 MB in 3.9 us (dense 33.6 MB: 7.0); 33 T selections/s lay out in 2.5
            us beside it: up to b = 64, the rows of a tile, at most 1.8 times faster. From b = 200
            on the dense product is bound by arithmetic, and no gain is possible. H100: 3.35 TB/s,
            and the same ratio.
    TPU     v5e: 0.82 TB/s, 23 us (dense 41), and about 14 to lay out: up to 1.8 times for b below
            240. v6e: 1.6 TB/s, 11.5 us (dense 20), and about 12 to lay out: less.

Fewer bytes gain more: 2:8 at most 3.4 times, 1:16 at most 13. Float32 gains up to 1.9 times at 2:4.
Only the CPU's numbers are measured, by `python -m experiments.benchmarks.kernels --only nm_decode`;
the others are data sheets'.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels import dispatch
from pallas_kernels.nm_matmul import tpu, triton, xla
from pallas_kernels.nm_matmul.layout import Pattern

__all__ = ["Blocks", "nm_matmul"]

Blocks = tpu.Blocks | triton.Blocks
_IMPLEMENTATIONS: dict[str, Any] = {"tpu": tpu, "triton": triton, "xla": xla}


def nm_matmul(
    x: Float[Array, "*b i"],
    values: Float[Array, "r c"],
    packed: UInt8[Array, "p q"],
    *,
    n: int,
    m: int,
    axis: int = -2,
    transpose: bool = False,
    implementation: dispatch.Implementation | None = None,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> Float[Array, "*b o"]:
    """`x @ W`, or `x @ W.T` with `transpose`, of a weight of which n of every m entries are stored.

    Gradients go to x and values: with dy the upstream gradient, x gets the product of dy with the
    other orientation, by the same implementation, and values the entries of `x.T @ dy` (transposed
    for the other orientation) at their positions. Only reverse mode is defined. Sums are float32,
    or float64 for float64.

    Args:
      x: any number of rows, of any float dtype; the result has the common dtype of x and values.
      values: along `axis`, the n stored entries of each group of m, one group after the other.
      packed: their positions in the group, which differ, as a stream of bits along `axis`:
        `ceil(log2 m)` each, the first in the low bits of the first byte.
      n, m: static, 1 <= n <= m <= 256.
      axis: of W, along which its groups lie: -2, or -1, for which the compact arrays are first
        transposed in memory.
      transpose: static. A few rows of x on a CPU read the compact form alone only where groups
        lie along the reduction, as in both weights of a BDWP pair.
      implementation: "xla", "tpu" or "triton"; None takes the best that can run.
      blocks: of the named kernel, for both passes; None chooses by device and shape.
      interpret: for tests: runs the named kernel on any device, as `pallas_call` takes it.

    Raises:
      TypeError: x or values is not floating point, or packed is not uint8.
      ValueError: n, m, axis or shapes that do not fit each other, an unknown implementation, blocks
        of another one, or one that cannot run here (with the reasons).

    Source: the compact form of BDWP (2023, arXiv 2309.13015), its positions packed to bits.

    >>> values, packed = jnp.asarray([[5.0], [7.0]]), jnp.asarray([[0b1101]], jnp.uint8)
    >>> nm_matmul(jnp.asarray([[1.0, 2.0, 3.0, 4.0]]), values, packed, n=2, m=4)  # [0, 5, 0, 7]
    Array([[38.]], dtype=float32)
    """
    pattern = Pattern(n, m)
    _check(x, values, packed, pattern, axis, transpose)
    if axis % 2:
        values, packed, transpose = values.T, packed.T, not transpose
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    against = {
        name: module.reasons(flat, values, packed, pattern, interpret=interpret)
        for name, module in _IMPLEMENTATIONS.items()
    }
    chosen = dispatch.choose(implementation, against, interpret=interpret)
    dispatch.check_blocks(blocks, chosen, _IMPLEMENTATIONS[chosen].Blocks)
    rule = _Rule(pattern, transpose, chosen, blocks, interpret)
    y: Array = _apply(rule, flat, values, packed)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What is static; `implementation` is the one that runs, groups lie along the first axis."""

    pattern: Pattern
    transpose: bool
    implementation: str
    blocks: Blocks | None
    interpret: Any

    def product(self, x: Array, values: Array, packed: Array, *, transpose: bool) -> Array:
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.promote_types(x.dtype, values.dtype)
        return _IMPLEMENTATIONS[self.implementation].product(
            x,
            values,
            packed,
            self.pattern,
            transpose=transpose,
            dtype=dtype,
            blocks=self.blocks,
            interpret=self.interpret,
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(rule: _Rule, x: Array, values: Array, packed: Array) -> Array:
    return rule.product(x, values, packed, transpose=rule.transpose)


def _forward(rule: _Rule, x: Array, values: Array, packed: Array) -> tuple[Array, Any]:
    return rule.product(x, values, packed, transpose=rule.transpose), (x, values, packed)


def _backward(rule: _Rule, residuals: Any, dy: Array) -> tuple[Array, Array, None]:
    x, values, packed = residuals
    dx = rule.product(dy, values, packed, transpose=not rule.transpose).astype(x.dtype)
    left, right = (dy, x.astype(dy.dtype)) if rule.transpose else (x.astype(dy.dtype), dy)
    return dx, xla.values_gradient(left, right, values, packed, rule.pattern), None


_apply.defvjp(_forward, _backward)


def _check(
    x: Array, values: Array, packed: Array, pattern: Pattern, axis: int, transpose: bool
) -> None:
    n, m = pattern.n, pattern.m
    for name, array in (("x", x), ("values", values)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point, not {array.dtype}")
    if packed.dtype != jnp.uint8:
        raise TypeError(f"packed must be uint8, not {packed.dtype}")
    if not 1 <= n <= m <= 256:
        raise ValueError(f"n is {n} and m is {m}; allowed is 1 <= n <= m <= 256")
    if axis not in (-2, -1):
        raise ValueError(f"axis is {axis}; allowed are -2 and -1")
    if values.ndim != 2 or values.shape[axis] % n:
        raise ValueError(
            f"values has shape {values.shape}; it must have two axes, and n = {n} must divide "
            f"axis {axis}"
        )
    wanted = list(values.shape)
    wanted[axis] = pattern.packed_rows(values.shape[axis])
    if packed.shape != tuple(wanted):
        raise ValueError(
            f"packed has shape {packed.shape}; the positions of values of shape {values.shape} "
            f"take {tuple(wanted)}"
        )
    weight = list(values.shape)
    weight[axis] = values.shape[axis] // n * m
    reduced = weight[1 if transpose else 0]
    if x.ndim == 0 or x.shape[-1] != reduced:
        raise ValueError(
            f"x has shape {x.shape}; its last axis must be {reduced} long for a weight of shape "
            f"{tuple(weight)}{', transposed' if transpose else ''}"
        )
