"""The row products as Triton-style kernels: rows are gathered piece by piece, by their numbers.

A program of the matrix-vector product owns a few entries of the list. One of the transposed
product owns a few columns and every so many-th rows of the list: sums of such shares are added
afterwards in a fixed order, so that results repeat.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dispatch import not_of_dtype, not_on
from pallas_kernels.sparse_ffn.weights import widen

DTYPES = ("float32", "bfloat16", "float16", "uint16")
LARGEST = 2**31 - 1
"""Entries that 32-bit offsets reach."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut up; all are powers of two.

    Attributes:
      rows, columns: of the piece that is read at a time.
      shares: into which the list is cut by the transposed product.
      warps: threads / 32 of a program.
    """

    rows: int
    columns: int
    shares: int
    warps: int


def default_blocks() -> Blocks:
    """16 entries a thread, and some hundreds of programs for the usual lists of a thousand."""
    return Blocks(rows=4, columns=512, shares=16, warps=4)


def reasons(w: Array, idx: Array, v: Array, *, interpret: Any = False) -> list[str]:
    """Why the kernels cannot run on `w [f, d]`, `idx [c]` and a wide vector."""
    found = not_on("gpu", interpret=interpret) + not_of_dtype(w.dtype, DTYPES, of="w")
    found += not_of_dtype(v.dtype, ("float32",), of="the wide vector")
    if w.size == 0 or idx.size == 0:
        found.append("there is nothing to read")
    if w.size > LARGEST:
        found.append(f"w has {w.size} entries, offsets reach {LARGEST}")
    return found


def matvec(
    w: Array, idx: Array, count: Array, x: Array, *, blocks: Blocks | None, interpret: Any
) -> Array:
    """`[f, d]` rows times `[d]` to `[c]`."""
    blocks = blocks or default_blocks()
    kernel = functools.partial(
        _matvec_kernel, capacity=idx.shape[0], width=w.shape[1], blocks=blocks
    )
    grid = (pl.cdiv(idx.shape[0], blocks.rows),)
    return _call(kernel, (w, idx, count[None], x), idx.shape, grid, blocks, interpret)


def vecmat(
    w: Array, idx: Array, count: Array, a: Array, *, blocks: Blocks | None, interpret: Any
) -> Array:
    """`[c]` times `[f, d]` rows to `[d]`."""
    blocks = blocks or default_blocks()
    # columns are shared out over programs here: fewer of them and more rows each
    blocks = dataclasses.replace(blocks, rows=4 * blocks.rows, columns=blocks.columns // 4)
    kernel = functools.partial(_vecmat_kernel, width=w.shape[1], blocks=blocks)
    grid = (pl.cdiv(w.shape[1], blocks.columns), blocks.shares)
    shape = (blocks.shares, w.shape[1])
    found = _call(kernel, (w, idx, count[None], a), shape, grid, blocks, interpret)
    return jnp.sum(found, axis=0)


def _matvec_kernel(
    w_ref: Any,
    idx_ref: Any,
    count_ref: Any,
    x_ref: Any,
    y_ref: Any,
    *,
    capacity: int,
    width: int,
    blocks: Blocks,
) -> None:
    first, count = pl.program_id(0) * blocks.rows, count_ref[0]
    rows, listed = _listed(idx_ref, first, count, blocks.rows)

    def step(i: Any, sums: Array) -> Array:
        at, inside = _columns(i, width, blocks.columns)
        x = plgpu.load(x_ref.at[at], mask=inside, other=0)
        return sums + _piece(w_ref, rows, listed, at, inside) * x[None, :]

    zeros = jnp.zeros((blocks.rows, blocks.columns), jnp.float32)
    pieces = pl.cdiv(width, blocks.columns) * (first < count).astype(jnp.int32)
    sums = lax.fori_loop(0, pieces, step, zeros)
    entries = first + jnp.arange(blocks.rows, dtype=jnp.int32)
    at = pl.ds(first, blocks.rows)
    plgpu.store(y_ref.at[at], jnp.sum(sums, axis=1), mask=entries < capacity)


def _vecmat_kernel(
    w_ref: Any,
    idx_ref: Any,
    count_ref: Any,
    a_ref: Any,
    y_ref: Any,
    *,
    width: int,
    blocks: Blocks,
) -> None:
    share, count = pl.program_id(1), count_ref[0]
    at, inside = _columns(pl.program_id(0), width, blocks.columns)

    def step(i: Any, sums: Array) -> Array:
        first = (i * blocks.shares + share) * blocks.rows
        rows, listed = _listed(idx_ref, first, count, blocks.rows)
        a = plgpu.load(a_ref.at[pl.ds(first, blocks.rows)], mask=listed, other=0)
        return sums + _piece(w_ref, rows, listed, at, inside) * a[:, None]

    zeros = jnp.zeros((blocks.rows, blocks.columns), jnp.float32)
    sums = lax.fori_loop(0, pl.cdiv(count, blocks.rows * blocks.shares), step, zeros)
    plgpu.store(y_ref.at[share, at], jnp.sum(sums, axis=0), mask=inside)


def _listed(idx_ref: Any, first: Any, count: Any, rows: int) -> tuple[Array, Array]:
    """Some entries of the list, and which of them count."""
    listed = first + jnp.arange(rows, dtype=jnp.int32) < count
    return plgpu.load(idx_ref.at[pl.ds(first, rows)], mask=listed, other=0), listed


def _columns(i: Any, width: int, block: int) -> tuple[Array, Array]:
    at = i * block + jnp.arange(block, dtype=jnp.int32)
    return at, at < width


def _piece(w_ref: Any, rows: Array, listed: Array, at: Array, inside: Array) -> Array:
    """Some columns of some rows, 0 where a row or a column does not count."""
    mask = listed[:, None] & inside[None, :]
    return widen(plgpu.load(w_ref.at[rows[:, None], at[None, :]], mask=mask, other=0), jnp.float32)


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
        name=f"sparse_ffn{kernel.func.__name__.removesuffix('_kernel')}",
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        grid=grid,
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=2),
        interpret=interpret,
    )(*inputs)
