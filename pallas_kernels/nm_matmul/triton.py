"""Products with a compressed N:M weight as a Triton-style kernel: tiles become dense in registers.

Every stored value is loaded once, slot by slot of its group, and laid out over the m entries of
the group by comparisons. Few rows of x leave too few tiles for a GPU: the reduction is then split,
and the parts are summed afterwards.
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
from pallas_kernels.nm_matmul.layout import Pattern

DTYPES = ("float32", "bfloat16", "float16")
LARGEST = 2**31 - 1
"""Entries that 32-bit offsets reach."""
LARGEST_GROUP = 32
MOST_KEPT = 8
"""Entries of a group: the kernel is written out over them."""
PROGRAMS = 1024
"""Programs that fill a GPU, about eight for each of its multiprocessors."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut up; all are powers of two but `splits`.

    Attributes:
      rows: of x, at least 16.
      dense_rows: of W, at least 16 and m. columns: of W, at least 16.
      splits: of the reduction.
      warps: threads / 32 of a program.
    """

    rows: int
    dense_rows: int
    columns: int
    splits: int
    warps: int


def default_blocks(
    x: Array, values: Array, pattern: Pattern, *, transpose: bool, dtype: Any
) -> Blocks:
    """Tiles of W of 64 x 64, and as many splits as it takes to fill a GPU.

    Of float32 the tiles are 32 x 32: their exact products are not those of tensor cores, and take
    registers.
    """
    side = 32 if dtype == jnp.float32 else 64
    rows = max(16, min(side, pl.next_power_of_2(x.shape[0])))
    dense_rows, columns = pattern.dense_rows(values), values.shape[1]
    inner, outer = (columns, dense_rows) if transpose else (dense_rows, columns)
    tiles = pl.cdiv(x.shape[0], rows) * pl.cdiv(outer, side)
    splits = max(1, min(PROGRAMS // tiles, pl.cdiv(inner, 4 * side)))
    return Blocks(rows, side, side, splits, 4 if pattern.n <= 2 else 8)


def reasons(
    x: Array, values: Array, packed: Array, pattern: Pattern, *, interpret: Any = False
) -> list[str]:
    """Why the kernel cannot run."""
    found = not_on("gpu", interpret=interpret)
    found += not_of_dtype(x.dtype, DTYPES) + not_of_dtype(values.dtype, DTYPES, of="values")
    if x.shape[0] == 0 or values.size == 0:
        found.append(f"x has shape {x.shape} and values {values.shape}, none may be empty")
    m = pattern.m
    if m & (m - 1) or not 1 < m <= LARGEST_GROUP:
        found.append(f"m is {m}, it takes powers of two from 2 to {LARGEST_GROUP}")
    if pattern.n > MOST_KEPT:
        found.append(f"n is {pattern.n}, it takes at most {MOST_KEPT}")
    outputs = x.shape[0] * max(pattern.dense_rows(values), values.shape[1])
    largest = max(values.size, outputs)
    if largest > LARGEST:
        found.append(f"an array has {largest} entries, offsets reach {LARGEST}")
    return found


def product(
    x: Array,
    values: Array,
    packed: Array,
    pattern: Pattern,
    *,
    transpose: bool,
    dtype: Any,
    blocks: Blocks | None,
    interpret: Any,
) -> Array:
    """`[b, r]` times W, or `[b, c]` times its transpose, in `dtype`."""
    blocks = blocks or default_blocks(x, values, pattern, transpose=transpose, dtype=dtype)
    rows, (dense_rows, columns) = x.shape[0], (pattern.dense_rows(values), values.shape[1])
    width, tile = (dense_rows, blocks.dense_rows) if transpose else (columns, blocks.columns)
    split = blocks.splits > 1
    found = pl.pallas_call(
        functools.partial(
            _kernel, pattern=pattern, transpose=transpose, blocks=blocks, dtype=dtype
        ),
        name="nm_matmul_transposed" if transpose else "nm_matmul",
        out_shape=jax.ShapeDtypeStruct(
            (blocks.splits, rows, width), jnp.float32 if split else dtype
        ),
        grid=(pl.cdiv(width, tile), pl.cdiv(rows, blocks.rows), blocks.splits),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=1),
        interpret=interpret,
    )(x, values, packed)
    return jnp.sum(found, axis=0).astype(dtype) if split else found[0]


def _kernel(
    x_ref: Any,
    values_ref: Any,
    packed_ref: Any,
    y_ref: Any,
    *,
    pattern: Pattern,
    transpose: bool,
    blocks: Blocks,
    dtype: Any,
) -> None:
    out, i, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    rows, length = x_ref.shape
    width = y_ref.shape[2]
    inner, outer = blocks.dense_rows, blocks.columns
    if transpose:
        inner, outer = outer, inner
    steps = pl.cdiv(pl.cdiv(length, inner), blocks.splits)
    at, here = _span(i, blocks.rows, rows)

    def add(step: Any, total: Array) -> Array:
        along, inside = _span(step, inner, length)
        x = plgpu.load(
            x_ref.at[at[:, None], along[None]], mask=here[:, None] & inside[None], other=0
        )
        tile = (out, step) if transpose else (step, out)
        w = _dense(values_ref, packed_ref, *tile, pattern, blocks)
        return total + lax.dot_general(
            x.astype(dtype),
            w.astype(dtype),
            (((1,), (1 if transpose else 0,)), ((), ())),
            precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )

    start = jnp.zeros((blocks.rows, outer), jnp.float32)
    total = lax.fori_loop(part * steps, (part + 1) * steps, add, start)
    to, valid = _span(out, outer, width)
    value = total.astype(y_ref.dtype)
    plgpu.store(y_ref.at[part, at[:, None], to[None]], value, mask=here[:, None] & valid[None])


def _dense(
    values_ref: Any, packed_ref: Any, row: Any, column: Any, pattern: Pattern, blocks: Blocks
) -> Array:
    """A tile of W in float32; zero beyond the ends."""
    n, m, bits = pattern.n, pattern.m, pattern.bits
    groups = blocks.dense_rows // m
    columns, inside = _span(column, blocks.columns, values_ref.shape[1])
    first = (row * groups + jnp.arange(groups, dtype=jnp.int32)) * n
    place = jnp.arange(m, dtype=jnp.int32)[None, :, None]
    dense = jnp.zeros((groups, m, blocks.columns), jnp.float32)

    def load(ref: Any, rows: Array, *where: Array) -> Array:
        mask = functools.reduce(jnp.logical_and, where, rows < ref.shape[0])
        at = ref.at[rows[:, None], columns[None]]
        return plgpu.load(at, mask=mask[:, None] & inside[None], other=0)

    for slot in range(n):
        stored = first + slot
        byte, shift = stored * bits // 8, stored * bits % 8
        position = load(packed_ref, byte).astype(jnp.int32) >> shift[:, None]
        if pattern.straddles:
            after = load(packed_ref, byte + 1, shift + bits > 8).astype(jnp.int32)
            position |= after << (8 - shift)[:, None]
        position &= 2**bits - 1
        value = load(values_ref, stored).astype(jnp.float32)
        dense = jnp.where(position[:, None] == place, value[:, None], dense)
    return dense.reshape(blocks.dense_rows, blocks.columns)


def _span(index: Any, size: int, length: int) -> tuple[Array, Array]:
    """The entries of a block, and which of them exist."""
    at = index * size + jnp.arange(size, dtype=jnp.int32)
    return at, at < length
