"""Block-sparse times dense as Mosaic kernels: one stored block a step, found by prefetched lists.

The grid goes over the entries of all lists, sorted by the block of the result. The first entry of
a result clears the sum in VMEM, the last one writes it; entries that are not used keep the blocks
of the one before, so that nothing is copied for them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_matmul.layout import Features, apply, arrange, outer, sizes
from pallas_kernels.block_sparse_matmul.lists import Entries, Lists, by_rows, transpose_lists
from pallas_kernels.dispatch import not_of_dtype, not_on, vmem_budget

DTYPES = ("float32", "bfloat16")
MIB = 2**20
LANES = 128
ENTRIES = 2**14
"""That scalar memory holds the lists of."""
CLEARS, ADDS, WRITES = 1, 2, 4
"""What an entry does, as bits."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut up.

    Attributes:
      positions: of a tile of activations: all, or a multiple of 128 with features first and of the
        rows of a memory tile (8 of float32, 16 of bfloat16) with features last.
      vmem_bytes: what a kernel may use on chip.
    """

    positions: int
    vmem_bytes: int


def default_blocks(values: Array, x: Array, features: Features) -> Blocks:
    """The most positions, up to 512, that leave the pipeline two blocks of everything."""
    budget, n = vmem_budget(), sizes(x, features)[2]
    positions = 512
    while positions > LANES and _bytes(values, positions) > budget:
        positions //= 2
    return Blocks(min(n, positions), budget)


def reasons(values: Array, x: Array, features: Features, *, interpret: Any = False) -> list[str]:
    """Why the kernels cannot run on stored blocks `[r, s, bo, bk]` and activations."""
    found = not_on("tpu", interpret=interpret) + not_of_dtype(x.dtype, DTYPES)
    if x.size == 0:
        found.append("x is empty")
    r, s, bo, bk = values.shape
    unit = _rows_of_a_tile(x) if features == "first" else LANES
    if bo % unit or bk % unit:
        found.append(f"blocks are {bo} x {bk}, with features {features} multiples of {unit} fit")
    if r * s > ENTRIES:
        found.append(f"the lists have {r * s} entries, {ENTRIES} fit")
    budget = vmem_budget()
    if _bytes(values, LANES) > budget:
        found.append(f"blocks of {bo} x {bk} do not fit into {budget // MIB} MiB")
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
    blocks = blocks or default_blocks(values, x, features)
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
    blocks = blocks or default_blocks(values, x, features)
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
    size, inner = (bk, bo) if transposed else (bo, bk)
    b, _, n = sizes(x, features)
    held, used = _held(entries)
    prefetched = [*held, _actions(entries.owners, used)]

    def stored(b: Any, i: Any, e: Any, owners: Any, slots: Any, *_: Any) -> tuple[Any, ...]:
        return slots[e], 0, 0

    def read(b: Any, i: Any, e: Any, owners: Any, slots: Any, sources: Any, _: Any) -> Any:
        return arrange(b, sources[e], i, features)

    def written(b: Any, i: Any, e: Any, owners: Any, *_: Any) -> Any:
        return arrange(b, owners[e], i, features)

    found = pl.pallas_call(
        functools.partial(_apply_kernel, features=features, transposed=transposed),
        name=f"block_sparse_matmul_{'dx' if transposed else 'forward'}",
        out_shape=jax.ShapeDtypeStruct(
            arrange(b, len(entries.starts) * size, n, features), x.dtype
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(b, pl.cdiv(n, blocks.positions), len(entries.slots)),
            in_specs=[
                pl.BlockSpec((1, bo, bk), stored),
                pl.BlockSpec(arrange(1, inner, blocks.positions, features), read),
            ],
            out_specs=pl.BlockSpec(arrange(1, size, blocks.positions, features), written),
            scratch_shapes=[
                pltpu.VMEM(arrange(1, size, blocks.positions, features)[1:], jnp.float32)
            ],
        ),
        compiler_params=_params(blocks, "parallel", "parallel", "arbitrary"),
        interpret=interpret,
    )(*prefetched, values.reshape(-1, bo, bk), x)
    if not transposed:
        return found
    # a block column that no row names has no entry, so that nothing was written there
    named = jnp.repeat(entries.counts > 0, size, total_repeat_length=len(entries.starts) * size)
    return jnp.where(jnp.expand_dims(named, 1 if features == "first" else 0), found, 0)


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
    bo, bk = values.shape[2:]
    b, _, n = sizes(x, features)
    (owners, _, sources), used = _held(entries)

    def upstream(e: Any, b: Any, i: Any, owners: Any, *_: Any) -> Any:
        return arrange(b, owners[e], i, features)

    def read(e: Any, b: Any, i: Any, owners: Any, sources: Any, _: Any) -> Any:
        return arrange(b, sources[e], i, features)

    found = pl.pallas_call(
        functools.partial(_outer_kernel, features=features, n=n),
        name="block_sparse_matmul_dvalues",
        out_shape=jax.ShapeDtypeStruct((len(entries.slots), bo, bk), values.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(len(entries.slots), b, pl.cdiv(n, blocks.positions)),
            in_specs=[
                pl.BlockSpec(arrange(1, bo, blocks.positions, features), upstream),
                pl.BlockSpec(arrange(1, bk, blocks.positions, features), read),
            ],
            out_specs=pl.BlockSpec((1, bo, bk), lambda e, *_: (e, 0, 0)),
            scratch_shapes=[pltpu.VMEM((bo, bk), jnp.float32)],
        ),
        compiler_params=_params(blocks, "parallel", "arbitrary", "arbitrary"),
        interpret=interpret,
    )(owners, sources, used.astype(jnp.int32), dy, x)
    return found.reshape(values.shape)


def _apply_kernel(*refs: Any, features: Features, transposed: bool) -> None:
    actions_ref, values_ref, x_ref, y_ref, total_ref = refs[3:]
    action = actions_ref[pl.program_id(2)]

    @pl.when(action & CLEARS != 0)
    def _() -> None:
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(action & ADDS != 0)
    def _() -> None:
        total_ref[...] += apply(values_ref[0], x_ref[0], features, transposed=transposed)

    @pl.when(action & WRITES != 0)
    def _() -> None:
        y_ref[0] = total_ref[...].astype(y_ref.dtype)


def _outer_kernel(*refs: Any, features: Features, n: int) -> None:
    used_ref, dy_ref, x_ref, dvalues_ref, total_ref = refs[2:]
    b, i = pl.program_id(1), pl.program_id(2)

    @pl.when((b == 0) & (i == 0))
    def _() -> None:
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(used_ref[pl.program_id(0)] != 0)
    def _() -> None:
        dy, x = (_inside(ref[0], i, features, n) for ref in (dy_ref, x_ref))
        total_ref[...] += outer(dy, x, features)

    @pl.when((b == pl.num_programs(1) - 1) & (i == pl.num_programs(2) - 1))
    def _() -> None:
        dvalues_ref[0] = total_ref[...].astype(dvalues_ref.dtype)


def _inside(tile: Array, i: Any, features: Features, n: int) -> Array:
    """A tile with zeros at the positions beyond the end, where memory holds anything."""
    axis = 1 if features == "first" else 0
    if n % tile.shape[axis] == 0:
        return tile
    at = i * tile.shape[axis] + lax.broadcasted_iota(jnp.int32, tile.shape, axis)
    return jnp.where(at < n, tile, jnp.zeros_like(tile))


def _held(entries: Entries) -> tuple[list[Array], Array]:
    """Owners, and the slots and sources that an entry has in VMEM; and which entries are used."""
    place = jnp.arange(len(entries.slots), dtype=jnp.int32)
    used = place - entries.starts[entries.owners] < entries.counts[entries.owners]
    held = lax.cummax(jnp.where(used, place, 0))
    return [entries.owners, entries.slots[held], entries.sources[held]], used


def _actions(owners: Array, used: Array) -> Array:
    """What every entry does."""
    changes = owners[1:] != owners[:-1]
    edge = jnp.ones(1, bool)
    clears, writes = jnp.concatenate([edge, changes]), jnp.concatenate([changes, edge])
    return jnp.where(clears, CLEARS, 0) + jnp.where(used, ADDS, 0) + jnp.where(writes, WRITES, 0)


def _params(blocks: Blocks, *semantics: Any) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=blocks.vmem_bytes)


def _rows_of_a_tile(x: Array) -> int:
    """Tiles of memory are 4 KiB of 128 lanes."""
    return 32 // x.dtype.itemsize


def _bytes(values: Array, positions: int) -> int:
    """Two blocks of the weight and of both activations, a sum and a product in float32."""
    bo, bk = values.shape[2:]
    lanes = max(bk, LANES)
    held = 2 * values.dtype.itemsize * (bo * lanes + (bo + bk) * positions)
    return held + 2 * 4 * max(max(bo, bk) * positions, bo * lanes)
