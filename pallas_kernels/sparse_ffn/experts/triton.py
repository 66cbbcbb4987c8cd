"""A chunk of tokens through the listed experts as two Triton-style kernels.

The first makes the gated hidden units of every listed expert, the second multiplies them with the
second weights, each program for some columns of the output and every so many-th expert: sums of
such shares are added afterwards in a fixed order, so that results repeat.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dispatch import not_of_dtype, not_on

DTYPES = ("float32", "bfloat16", "uint16")
LARGEST = 2**31 - 1
"""Entries that 32-bit offsets reach."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut up; all are powers of two, the first three at least 16.

    Attributes:
      tokens, neurons, columns: of the pieces that are multiplied at a time.
      shares: into which the list is cut by the second kernel.
      warps: threads / 32 of a program.
    """

    tokens: int
    neurons: int
    columns: int
    shares: int
    warps: int


def default_blocks(x: Array) -> Blocks:
    """Up to 32 tokens a program; a hundred programs or more for the usual widths."""
    tokens = min(32, max(16, pl.next_power_of_2(x.shape[0])))
    return Blocks(tokens=tokens, neurons=32, columns=64, shares=4, warps=4)


def reasons(x: Array, up: Array, idx: Array, *, interpret: Any = False) -> list[str]:
    """Why the kernels cannot run on wide `x [n, d]` and `up [e, k, d]`."""
    found = not_on("gpu", interpret=interpret) + not_of_dtype(up.dtype, DTYPES, of="up")
    found += not_of_dtype(x.dtype, ("float32",), of="wide x")
    if up.size == 0 or idx.size == 0 or x.size == 0:
        found.append("there is nothing to compute")
    hidden = idx.shape[0] * x.shape[0] * up.shape[1]
    if max(up.size, hidden) > LARGEST:
        found.append(
            f"up has {up.size} entries and the hidden units {hidden}, offsets reach {LARGEST}"
        )
    return found


def forward(
    x: Array,
    gates: Array,
    up: Array,
    down: Array,
    idx: Array,
    count: Array,
    activation: Callable[[Array], Array],
    *,
    blocks: Blocks | None,
    interpret: Any,
) -> Array:
    """`[n, d]` tokens and `[n, e]` gates to `[n, d]`."""
    blocks = blocks or default_blocks(x)
    (n, d), k, capacity = x.shape, up.shape[1], idx.shape[0]
    token_blocks = pl.cdiv(n, blocks.tokens)
    kernel = functools.partial(_hidden_kernel, n=n, d=d, k=k, blocks=blocks, activation=activation)
    grid = (capacity, pl.cdiv(k, blocks.neurons), token_blocks)
    shape = (capacity, n, k)
    hidden = _call(kernel, (idx, count[None], x, gates, up), shape, grid, blocks, interpret)
    kernel = functools.partial(_output_kernel, n=n, d=d, k=k, blocks=blocks)
    grid = (pl.cdiv(d, blocks.columns), blocks.shares, token_blocks)
    shape = (blocks.shares, n, d)
    shares = _call(kernel, (idx, count[None], hidden, down), shape, grid, blocks, interpret)
    return jnp.sum(shares, axis=0)


def _hidden_kernel(
    idx_ref: Any,
    count_ref: Any,
    x_ref: Any,
    gates_ref: Any,
    up_ref: Any,
    hidden_ref: Any,
    *,
    n: int,
    d: int,
    k: int,
    blocks: Blocks,
    activation: Callable[[Array], Array],
) -> None:
    """`gates[:, e] * activation(x @ up[e].T)`; nothing is written for what does not count."""
    entry = pl.program_id(0)
    neurons, real = _block(pl.program_id(1), blocks.neurons, k)
    tokens, there = _block(pl.program_id(2), blocks.tokens, n)

    @pl.when(entry < count_ref[0])
    def _() -> None:
        expert = idx_ref[entry]

        def step(i: Any, sums: Array) -> Array:
            at, inside = _block(i, blocks.columns, d)
            x = _load(x_ref.at[tokens, at], there, inside)
            return sums + _dot(x, _load(up_ref.at[expert, neurons, at], real, inside).T)

        zeros = jnp.zeros((blocks.tokens, blocks.neurons), jnp.float32)
        sums = lax.fori_loop(0, pl.cdiv(d, blocks.columns), step, zeros)
        gate = plgpu.load(gates_ref.at[tokens, expert], mask=there, other=0)
        plgpu.store(
            hidden_ref.at[entry, tokens, neurons],
            gate[:, None] * activation(sums),
            mask=there[:, None] & real[None, :],
        )


def _output_kernel(
    idx_ref: Any,
    count_ref: Any,
    hidden_ref: Any,
    down_ref: Any,
    y_ref: Any,
    *,
    n: int,
    d: int,
    k: int,
    blocks: Blocks,
) -> None:
    """The sum of `hidden[j] @ down[e]` over every so many-th entry j of the list."""
    at, inside = _block(pl.program_id(0), blocks.columns, d)
    tokens, there = _block(pl.program_id(2), blocks.tokens, n)
    share = pl.program_id(1)

    def step(i: Any, sums: Array) -> Array:
        entry = i * blocks.shares + share
        expert = idx_ref[entry]

        def piece(m: Any, sums: Array) -> Array:
            neurons, real = _block(m, blocks.neurons, k)
            hidden = _load(hidden_ref.at[entry, tokens, neurons], there, real)
            return sums + _dot(hidden, _load(down_ref.at[expert, neurons, at], real, inside))

        return lax.fori_loop(0, pl.cdiv(k, blocks.neurons), piece, sums)

    zeros = jnp.zeros((blocks.tokens, blocks.columns), jnp.float32)
    entries = pl.cdiv(jnp.maximum(count_ref[0] - share, 0), blocks.shares)
    sums = lax.fori_loop(0, entries, step, zeros)
    plgpu.store(y_ref.at[share, tokens, at], sums, mask=there[:, None] & inside[None, :])


def _block(i: Any, block: int, size: int) -> tuple[Any, Array]:
    """A piece of an axis, and which of it is there."""
    return pl.ds(i * block, block), i * block + jnp.arange(block, dtype=jnp.int32) < size


def _load(ref: Any, rows: Array, columns: Array) -> Array:
    """A piece of a matrix, 0 outside of it; bit patterns become the bfloat16 that they are."""
    found = plgpu.load(ref, mask=rows[:, None] & columns[None, :], other=0)
    return lax.bitcast_convert_type(found, jnp.bfloat16) if found.dtype == jnp.uint16 else found


def _dot(a: Array, w: Array) -> Array:
    """A product with weights in float32.

    For bfloat16 weights a is taken in two parts of 8 bits each, so that matrix units can be used.
    """
    if w.dtype == jnp.float32:
        return jnp.dot(a, w, precision=lax.Precision.HIGHEST)
    high = a.astype(w.dtype)
    low = (a - high.astype(a.dtype)).astype(w.dtype)
    exact = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    return exact(high, w) + exact(low, w)


def _call(
    kernel: functools.partial[None],
    inputs: tuple[Array, ...],
    shape: tuple[int, ...],
    grid: tuple[int, ...],
    blocks: Blocks,
    interpret: Any,
) -> Array:
    return pl.pallas_call(
        kernel,
        name=f"sparse_ffn_experts{kernel.func.__name__.removesuffix('_kernel')}",
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        grid=grid,
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=3),
        interpret=interpret,
    )(*inputs)
