"""Products with a compressed N:M weight as a Mosaic kernel: tiles become dense in VMEM.

The rows that one position in a unit has, over all units of a tile, are read and written with a
stride along sublanes, so that no entry moves within a register.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import not_of_dtype, not_on, vmem_budget
from pallas_kernels.nm_matmul.layout import Pattern

DTYPES = ("float32", "bfloat16")
MIB = 2**20
LANES = 128
LARGEST_UNIT = 64
"""Dense rows of a unit: the kernel is written out over them."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut up; the rows of W follow from the pattern.

    Attributes:
      rows: of x, a multiple of 16.
      columns: of W, a multiple of 128.
      vmem_bytes: what the kernel may use on chip.
    """

    rows: int
    columns: int
    vmem_bytes: int


def default_blocks(x: Array, values: Array) -> Blocks:
    """Up to 256 rows of x, so that a tile of W becomes dense as rarely as fits."""
    room = vmem_budget()
    rows = min(256 if room >= 32 * MIB else 128, pl.cdiv(x.shape[0], 16) * 16)
    columns = min(256, pl.cdiv(values.shape[1], 128) * 128)
    return Blocks(rows, columns, room)


def reasons(
    x: Array, values: Array, packed: Array, pattern: Pattern, *, interpret: Any = False
) -> list[str]:
    """Why the kernel cannot run."""
    found = not_on("tpu", interpret=interpret)
    found += not_of_dtype(x.dtype, DTYPES) + not_of_dtype(values.dtype, DTYPES, of="values")
    if x.shape[0] == 0 or values.size == 0:
        found.append(f"x has shape {x.shape} and values {values.shape}, none may be empty")
    unit = pattern.unit * pattern.m
    if pattern.m == 1 or unit > LARGEST_UNIT:
        found.append(
            f"positions of {pattern.n}:{pattern.m} fill bytes after {unit} entries, it takes "
            f"m > 1 and {LARGEST_UNIT} entries"
        )
    return found


def tile_rows(pattern: Pattern) -> int:
    """Dense rows of a tile: the fewest whose bytes and values are whole tiles of memory."""
    units = 32 // math.gcd(pattern.unit_bytes, 32)
    stored = pattern.unit * pattern.n
    return math.lcm(units, 16 // math.gcd(stored, 16), 8) * pattern.unit * pattern.m


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
    blocks = blocks or default_blocks(x, values)
    rows, (dense_rows, columns) = x.shape[0], (pattern.dense_rows(values), values.shape[1])
    tile, units = tile_rows(pattern), tile_rows(pattern) // (pattern.unit * pattern.m)
    stored, held = units * pattern.unit * pattern.n, units * pattern.unit_bytes
    tiles = {"r": pl.cdiv(dense_rows, tile), "c": pl.cdiv(columns, blocks.columns)}
    sizes = {"r": tile, "c": blocks.columns}
    inner, outer = ("c", "r") if transpose else ("r", "c")

    def of_weight(i: Any, out: Any, step: Any) -> tuple[Any, Any]:
        return (out, step) if transpose else (step, out)

    return pl.pallas_call(
        functools.partial(
            _kernel, pattern=pattern, transpose=transpose, length=x.shape[1], dtype=dtype
        ),
        name="nm_matmul_transposed" if transpose else "nm_matmul",
        out_shape=jax.ShapeDtypeStruct((rows, dense_rows if transpose else columns), dtype),
        grid=(pl.cdiv(rows, blocks.rows), tiles[outer], tiles[inner]),
        in_specs=[
            pl.BlockSpec((blocks.rows, sizes[inner]), lambda i, out, step: (i, step)),
            pl.BlockSpec((stored, blocks.columns), of_weight),
            pl.BlockSpec((held, blocks.columns), of_weight),
        ],
        out_specs=pl.BlockSpec((blocks.rows, sizes[outer]), lambda i, out, step: (i, out)),
        scratch_shapes=[
            pltpu.VMEM((stored, LANES), jnp.float32),
            pltpu.VMEM((held, LANES), jnp.int32),
            pltpu.VMEM((tile, LANES), jnp.float32),
            pltpu.VMEM((blocks.rows, sizes[outer]), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=blocks.vmem_bytes,
        ),
        interpret=interpret,
    )(x, values, packed)


def _kernel(
    x_ref: Any,
    values_ref: Any,
    packed_ref: Any,
    y_ref: Any,
    stored: Any,
    held: Any,
    dense: Any,
    total: Any,
    *,
    pattern: Pattern,
    transpose: bool,
    length: int,
    dtype: Any,
) -> None:
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    left = x_ref.shape[1] if length % x_ref.shape[1] == 0 else length - step * x_ref.shape[1]
    for first in range(0, values_ref.shape[1], LANES):
        lanes = pl.ds(first, LANES)
        # strides are for 32 bits and one register's lanes
        stored[...] = values_ref[:, lanes].astype(jnp.float32)
        held[...] = packed_ref[:, lanes].astype(jnp.int32)
        _expand(stored, held, dense, pattern)
        if transpose:
            total[...] += _dot(x_ref[:, lanes], dense[...], 1, left - first, dtype)
        else:
            total[:, lanes] += _dot(x_ref[...], dense[...], 0, left, dtype)

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        y_ref[...] = total[...].astype(y_ref.dtype)


def _expand(stored: Any, held: Any, dense: Any, pattern: Pattern) -> None:
    """Writes a dense tile, a row of all units at a time."""
    n, m, bits = pattern.n, pattern.m, pattern.bits
    units = dense.shape[0] // (pattern.unit * m)

    def rows(ref: Any, first: int, every: int) -> Any:
        return ref.at[pl.ds(first, units, stride=every), :]

    def position(slot: int) -> Array:
        byte, shift = divmod(slot * bits, 8)
        found = rows(held, byte, pattern.unit_bytes)[...] >> shift
        if shift + bits > 8:
            found |= rows(held, byte + 1, pattern.unit_bytes)[...] << (8 - shift)
        return found & (2**bits - 1)

    for group in range(pattern.unit):
        slots = range(group * n, (group + 1) * n)
        entries = [(position(s), rows(stored, s, pattern.unit * n)[...]) for s in slots]
        for q in range(m):
            row = jnp.zeros_like(entries[0][1])
            for at, entry in entries:
                row = jnp.where(at == q, entry, row)
            rows(dense, group * m + q, pattern.unit * m)[...] = row


def _dot(x: Array, w: Array, axis: int, left: Any, dtype: Any) -> Array:
    """The product of x along an axis of w, of which `left` entries are inside the arrays."""
    x = x.astype(jnp.float32)
    if not isinstance(left, int):
        # what lies beyond the end is arbitrary, and arbitrary times 0 may be NaN
        x, w = _within(x, 1, left), _within(w, axis, left)
    return lax.dot_general(
        x.astype(dtype),
        w.astype(dtype),
        (((1,), (axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _within(x: Array, axis: int, left: Any) -> Array:
    index = lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return jnp.where(index < left, x, jnp.zeros_like(x))
