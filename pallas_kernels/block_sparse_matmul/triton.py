"""Block-sparse times dense as Triton-style kernels: a program a block of the result.

A program goes over the rows of activations that its list names, in chunks: the inputs of a block
follow those of the one before, so that blocks of any size, down to single inputs, fill the tiles of
a dot. What is gathered is read by explicit offsets into flat arrays, the rest by slices.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.block_sparse_matmul.layout import Features, apply, arrange, outer, sizes
from pallas_kernels.block_sparse_matmul.lists import Entries, Lists, by_rows, transpose_lists
from pallas_kernels.dispatch import not_of_dtype, not_on

DTYPES = ("float32", "bfloat16", "float16")
LARGEST = 2**31 - 1
"""Entries that 32-bit offsets reach."""
PROGRAMS = 65535
"""Along the axes of a grid after the first."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut up; powers of two, at least 16.

    Attributes:
      features: of a block of the result that a program holds at most; it is split where larger.
      positions: of a tile of activations.
      inner: listed inputs of a step.
      warps: threads / 32 of a program.
      stages: steps whose loads are under way.
    """

    features: int
    positions: int
    inner: int
    warps: int
    stages: int


def default_blocks(values: Array) -> Blocks:
    """At most 128 by 64 sums a program, 32 to 64 a thread."""
    large = max(values.shape[2:]) > 64
    return Blocks(features=128, positions=64, inner=32, warps=8 if large else 4, stages=2)


def reasons(values: Array, x: Array, features: Features, *, interpret: Any = False) -> list[str]:
    """Why the kernels cannot run on stored blocks `[r, s, bo, bk]` and activations."""
    found = not_on("gpu", interpret=interpret) + not_of_dtype(x.dtype, DTYPES)
    b, _, n = sizes(x, features)
    if x.size == 0:
        found.append("x is empty")
    y = b * values.shape[0] * values.shape[2] * n
    for name, size in (("values", values.size), ("x", x.size), ("y", y)):
        if size > LARGEST:
            found.append(f"{name} has {size} entries, offsets reach {LARGEST}")
    if b > PROGRAMS or pl.cdiv(n, 16) > PROGRAMS:
        found.append(f"x has shape {x.shape}, a grid has {PROGRAMS} programs along an axis")
    return found


def forward(
    values: Array,
    lists: Lists,
    x: Array,
    features: Features,
    *,
    blocks: Blocks | None,
    interpret: Any,
) -> Array:
    """Stored blocks times activations."""
    blocks = blocks or default_blocks(values)
    return _apply(values, by_rows(lists), x, features, False, blocks, interpret)


def backward(
    values: Array,
    lists: Lists,
    x: Array,
    dy: Array,
    features: Features,
    *,
    blocks: Blocks | None,
    interpret: Any,
) -> tuple[Array, Array]:
    """The gradients of stored blocks and activations."""
    blocks = blocks or default_blocks(values)
    columns = sizes(x, features)[1] // values.shape[3]
    entries = transpose_lists(*lists, num_columns=columns)
    dx = _apply(values, entries, dy, features, True, blocks, interpret)
    return _outer(values, by_rows(lists), x, dy, features, blocks, interpret), dx


def _apply(
    values: Array,
    entries: Entries,
    x: Array,
    features: Features,
    transposed: bool,
    blocks: Blocks,
    interpret: Any,
) -> Array:
    """A product with the weight, or with its transpose."""
    bo, bk = values.shape[2:]
    b, k, n = sizes(x, features)
    block = _Block(bk, bo, 1, bk) if transposed else _Block(bo, bk, bk, 1)
    results = len(entries.starts)
    width, positions = _tile(block.outer, blocks.features), _tile(n, blocks.positions)
    kernel = functools.partial(
        _apply_kernel,
        block=block,
        x=_Activations(features, k, n),
        tile=(width, positions),
        inner=blocks.inner,
    )
    y = arrange(b, results * block.outer, n, features)
    return pl.pallas_call(
        kernel,
        name=f"block_sparse_matmul_{'dx' if transposed else 'forward'}",
        out_shape=jax.ShapeDtypeStruct(y, x.dtype),
        grid=(results * pl.cdiv(block.outer, width), pl.cdiv(n, positions), b),
        compiler_params=_params(blocks),
        interpret=interpret,
    )(
        values.reshape(-1),
        x.reshape(-1),
        entries.slots,
        entries.sources,
        entries.starts,
        entries.counts,
    )


def _outer(
    values: Array,
    entries: Entries,
    x: Array,
    dy: Array,
    features: Features,
    blocks: Blocks,
    interpret: Any,
) -> Array:
    """The gradient of the stored blocks."""
    r, s, bo, bk = values.shape
    b, k, n = sizes(x, features)
    width, inner = _tile(bo, blocks.features), _tile(s * bk, 2 * blocks.inner)
    kernel = functools.partial(
        _outer_kernel,
        stored=(s, bo, bk),
        batches=b,
        x=_Activations(features, k, n),
        tile=(inner, width, _tile(n, blocks.positions)),
    )
    found = pl.pallas_call(
        kernel,
        name="block_sparse_matmul_dvalues",
        # the transpose of every block: a slice of it is a run of listed inputs
        out_shape=jax.ShapeDtypeStruct((r, s * bk, bo), values.dtype),
        grid=(r * pl.cdiv(bo, width), pl.cdiv(s * bk, inner)),
        compiler_params=_params(blocks),
        interpret=interpret,
    )(x.reshape(-1), dy, entries.sources, entries.counts)
    return found.reshape(r, s, bk, bo).swapaxes(2, 3)


@dataclasses.dataclass(frozen=True)
class _Block:
    """A stored block or its transpose: features of the result, those summed over, strides."""

    outer: int
    inner: int
    outer_stride: int
    inner_stride: int

    def offsets(self, slot: Array, row: Array, column: Array) -> Array:
        """Of entries `[rows, columns]` of stored blocks, one slot a column."""
        across = slot * (self.outer * self.inner) + column * self.inner_stride
        return row[:, None] * self.outer_stride + across[None, :]


@dataclasses.dataclass(frozen=True)
class _Activations:
    """Flat activations `[b, width, n]` or `[1, n, width]`, of which any features are read."""

    features: Features
    width: int
    n: int

    def load(self, ref: Any, b: Any, row: Array, listed: Array, position: Array) -> Array:
        """A tile: features `row` at some positions, 0 where nothing is listed or beyond the end."""
        inside = position < self.n
        if self.features == "first":
            at = ((b * self.width + row) * self.n)[:, None] + position[None, :]
        else:
            at = (position * self.width)[:, None] + row[None, :]
        return plgpu.load(ref.at[at], mask=_mask(self.features, listed, inside), other=0)


def _apply_kernel(
    values_ref: Any,
    x_ref: Any,
    slots_ref: Any,
    sources_ref: Any,
    starts_ref: Any,
    counts_ref: Any,
    y_ref: Any,
    *,
    block: _Block,
    x: _Activations,
    tile: tuple[int, int],
    inner: int,
) -> None:
    width, positions = tile
    result, first = _piece(block.outer, width)
    b, begin = pl.program_id(2), pl.program_id(1) * positions
    row, position = first + _range(width), begin + _range(positions)
    inside = row < block.outer
    start, length = starts_ref[result], counts_ref[result] * block.inner

    def step(i: Any, total: Array) -> Array:
        at = i * inner + _range(inner)
        entry, column = _split(at, block.inner)
        listed = at < length
        slot = plgpu.load(slots_ref.at[start + entry], mask=listed, other=0)
        source = plgpu.load(sources_ref.at[start + entry], mask=listed, other=0)
        w = plgpu.load(
            values_ref.at[block.offsets(slot, row, column)],
            mask=inside[:, None] & listed[None, :],
            other=0,
        )
        read = source * block.inner + column
        picked = x.load(x_ref, b, read, listed, position)
        return total + apply(w, picked, x.features, transposed=False)

    _, *held = arrange(1, width, positions, x.features)
    total = jnp.zeros(held, jnp.float32)
    total = lax.fori_loop(0, (length + (inner - 1)) // inner, step, total)
    rows = pl.ds(result * block.outer + first, width)
    plgpu.store(
        y_ref.at[arrange(b, rows, pl.ds(begin, positions), x.features)],
        total.astype(y_ref.dtype),
        mask=_mask(x.features, inside, position < x.n),
    )


def _outer_kernel(
    x_ref: Any,
    dy_ref: Any,
    sources_ref: Any,
    counts_ref: Any,
    dvalues_ref: Any,
    *,
    stored: tuple[int, int, int],
    batches: int,
    x: _Activations,
    tile: tuple[int, int, int],
) -> None:
    listed, outputs, inputs = stored
    inner, width, positions = tile
    result, first = _piece(outputs, width)
    inside = first + _range(width) < outputs
    at = pl.program_id(1) * inner + _range(inner)
    entry, column = _split(at, inputs)
    used = at < counts_ref[result] * inputs
    read = plgpu.load(sources_ref.at[result * listed + entry], mask=used, other=0) * inputs + column
    tiles = pl.cdiv(x.n, positions)

    def step(i: Any, total: Array) -> Array:
        b = lax.div(i, jnp.int32(tiles))
        start = (i - b * tiles) * positions
        position = start + _range(positions)
        rows = pl.ds(result * outputs + first, width)
        dy = plgpu.load(
            dy_ref.at[arrange(b, rows, pl.ds(start, positions), x.features)],
            mask=_mask(x.features, inside, position < x.n),
            other=0,
        )
        return total + outer(x.load(x_ref, b, read, used, position), dy, x.features)

    total = jnp.zeros((inner, width), jnp.float32)
    total = lax.fori_loop(0, jnp.int32(batches * tiles), step, total)
    plgpu.store(
        dvalues_ref.at[result, pl.ds(pl.program_id(1) * inner, inner), pl.ds(first, width)],
        total.astype(dvalues_ref.dtype),
        mask=(at < listed * inputs)[:, None] & inside[None, :],
    )


def _mask(features: Features, row: Array, position: Array) -> Array:
    """Of a tile, from which features and positions count."""
    if features == "first":
        return row[:, None] & position[None, :]
    return position[:, None] & row[None, :]


def _piece(size: int, width: int) -> tuple[Array, Array]:
    """The block of the result that a program works on, and from which of its features on."""
    pieces = pl.cdiv(size, width)
    result = lax.div(pl.program_id(0), jnp.int32(pieces))
    return result, (pl.program_id(0) - result * pieces) * width


def _range(size: int) -> Array:
    return jnp.arange(size, dtype=jnp.int32)


def _split(at: Array, size: int) -> tuple[Array, Array]:
    """The block and the place in it of inputs that are laid end to end; none is negative."""
    block = lax.div(at, jnp.full_like(at, size))
    return block, at - block * size


def _tile(size: int, most: int) -> int:
    """A power of two that a dot takes."""
    return max(16, min(pl.next_power_of_2(size), most))


def _params(blocks: Blocks) -> plgpu.CompilerParams:
    return plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages)
