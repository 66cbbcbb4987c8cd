"""The row products as Mosaic kernels: listed rows come from HBM by one copy each.

While the rows of one step are used, those of the next are on their way. Memory on a TPU is tiled
and two rows of 16-bit weights share 32-bit words, so these are copied in pairs: as many bytes as
for float32.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import not_of_dtype, not_on

DTYPES = ("float32", "bfloat16", "uint16")
BUFFERS = 6 * 2**20
"""Bytes of on-chip memory for the rows of two steps."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut up.

    Attributes:
      rows: of a step, a multiple of 8.
    """

    rows: int


def default_blocks(w: Array) -> Blocks:
    """As many rows as fit twice, 128 at most."""
    return Blocks(min(128, BUFFERS // (2 * _row_bytes(w)) // 8 * 8))


def reasons(w: Array, idx: Array, v: Array, *, interpret: Any = False) -> list[str]:
    """Why the kernels cannot run on `w [f, d]`, `idx [c]` and a wide vector."""
    found = not_on("tpu", interpret=interpret) + not_of_dtype(w.dtype, DTYPES, of="w")
    found += not_of_dtype(v.dtype, ("float32",), of="the wide vector")
    if w.size == 0 or idx.size == 0:
        found.append("there is nothing to read")
    elif w.dtype.itemsize == 2 and w.shape[0] % 2:
        found.append(f"w has {w.shape[0]} rows of 16-bit weights, which are read in pairs")
    longest = BUFFERS // (2 * 8 * 4 * 128) * 128
    if w.shape[1] > longest:
        found.append(f"rows have {w.shape[1]} entries, {longest} fit")
    return found


def matvec(
    w: Array, idx: Array, count: Array, x: Array, *, blocks: Blocks | None, interpret: Any
) -> Array:
    """`[f, d]` rows times `[d]` to `[c]`."""
    rows = (blocks or default_blocks(w)).rows
    spec = pl.BlockSpec((1, w.shape[1]), lambda i, *_: (0, 0))
    out = pl.BlockSpec((rows, 1), lambda i, *_: (i, 0))
    shape = (idx.shape[0], 1)
    return _call(_matvec_kernel, w, idx, count, x[None], spec, out, shape, rows, interpret)[:, 0]


def vecmat(
    w: Array, idx: Array, count: Array, a: Array, *, blocks: Blocks | None, interpret: Any
) -> Array:
    """`[c]` times `[f, d]` rows to `[d]`."""
    rows = (blocks or default_blocks(w)).rows
    spec = pl.BlockSpec((rows, 1), lambda i, *_: (i, 0))
    shape = (1, w.shape[1])
    out = pl.BlockSpec(shape, lambda i, *_: (0, 0))
    return _call(_vecmat_kernel, w, idx, count, a[:, None], spec, out, shape, rows, interpret)[0]


def _matvec_kernel(read: Callable[[], tuple[Array, Array]], x_ref: Any, y_ref: Any) -> None:
    block, inside = read()
    products = jnp.sum(block * x_ref[...], axis=1, keepdims=True)
    y_ref[...] = jnp.where(inside, products, jnp.zeros_like(products))


def _vecmat_kernel(read: Callable[[], tuple[Array, Array]], a_ref: Any, y_ref: Any) -> None:
    @pl.when(pl.program_id(0) == 0)
    def _() -> None:
        y_ref[...] = jnp.zeros_like(y_ref)

    block, inside = read()
    products = jnp.where(inside, a_ref[...] * block, jnp.zeros_like(block))
    y_ref[...] += jnp.sum(products, axis=0, keepdims=True)


def _call(
    kernel: Callable[..., None],
    w: Array,
    idx: Array,
    count: Array,
    v: Array,
    spec: pl.BlockSpec,
    out: pl.BlockSpec,
    shape: tuple[int, int],
    rows: int,
    interpret: Any,
) -> Array:
    """Steps over the list; the rows of a step are in VMEM when the kernel reads them."""
    narrow = w.dtype.itemsize == 2
    column = pl.BlockSpec((rows, 1), lambda i, *_: (i, 0))
    in_specs = [pl.BlockSpec(memory_space=pl.ANY), *([column] if narrow else []), spec]
    buffer = pltpu.VMEM((2, rows, w.shape[1]), jnp.uint32 if narrow else w.dtype)

    def body(idx_ref: Any, count_ref: Any, w_ref: Any, *refs: Any) -> None:
        *parity_ref, v_ref, y_ref, buffers, arrived = refs
        read = functools.partial(
            _read, idx_ref, count_ref, w_ref, parity_ref, buffers, arrived, rows
        )
        kernel(read, v_ref, y_ref)

    return pl.pallas_call(
        body,
        name=f"sparse_ffn{kernel.__name__.removesuffix('_kernel')}",
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(idx.shape[0], rows),),
            in_specs=in_specs,
            out_specs=out,
            scratch_shapes=[buffer, pltpu.SemaphoreType.DMA((2,))],
        ),
        interpret=interpret,
    )(idx, count[None], w, *([idx[:, None] % 2] if narrow else []), v)


def _read(
    idx_ref: Any,
    count_ref: Any,
    w_ref: Any,
    parity_ref: list[Any],
    buffers: Any,
    arrived: Any,
    rows: int,
) -> tuple[Array, Array]:
    """The rows of this step `[rows, d]` in float32, and which of them count `[rows, 1]`.

    What does not count is not copied and holds anything.
    """
    step, count = pl.program_id(0), count_ref[0]
    source = w_ref.bitcast(jnp.uint32) if parity_ref else w_ref

    def copy(step: Array, row: Array) -> Any:
        index = idx_ref[step * rows + row]
        at = index // 2 if parity_ref else index
        slot = step % 2
        to = buffers.at[slot, pl.ds(row, 1)]
        return pltpu.make_async_copy(source.at[pl.ds(at, 1)], to, arrived.at[slot])

    def each(step: Array, act: Callable[[Any], None]) -> None:
        listed = jnp.clip(count - step * rows, 0, rows)
        lax.fori_loop(0, listed, lambda row, _: act(copy(step, row)), None)

    @pl.when(step == 0)
    def _() -> None:
        each(step, lambda c: c.start())

    each(step + 1, lambda c: c.start())
    each(step, lambda c: c.wait())
    block = buffers[step % 2]
    if parity_ref:
        odd = parity_ref[0][...] != 0
        block = jnp.where(odd, block & jnp.uint32(0xFFFF0000), block << 16)
        block = lax.bitcast_convert_type(block, jnp.float32)
    position = lax.broadcasted_iota(jnp.int32, (rows, 1), 0) + step * rows
    return block, position < count


def _row_bytes(w: Array) -> int:
    """Of a row on chip, where lanes come in 128."""
    return 4 * pl.cdiv(w.shape[1], 128) * 128
