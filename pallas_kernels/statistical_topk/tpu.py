"""Statistical top-k as a Mosaic kernel: whole rows in VMEM, read once and written once."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import not_of_dtype, not_on, vmem_budget
from pallas_kernels.statistical_topk import arithmetic as a

DTYPES = ("float32", "bfloat16")
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut up.

    Attributes:
      rows: of a block, a multiple of the tiles of all operands.
      vmem_bytes: what the kernel may use on chip.
    """

    rows: int
    vmem_bytes: int


def default_blocks(x: Array, where: Array | None) -> Blocks:
    """As many rows as leave the pipeline two blocks of everything, 256 at most."""
    budget = vmem_budget()
    tile = _tile(x, where)
    fitting = budget // (_bytes_an_entry(x, where) * max(x.shape[1], 128))
    return Blocks(max(tile, min(256, fitting // tile * tile)), budget)


def reasons(x: Array, where: Array | None, *, interpret: Any = False) -> list[str]:
    """Why the kernel cannot run on `[r, d]` rows."""
    found = not_on("tpu", interpret=interpret) + not_of_dtype(x.dtype, DTYPES)
    if x.shape[0] == 0:
        found.append("x has no rows")
    budget = vmem_budget()
    longest = budget // (_bytes_an_entry(x, where) * _tile(x, where))
    if x.shape[1] > longest:
        found.append(f"rows have {x.shape[1]} entries, {longest} fit into {budget // MIB} MiB")
    return found


def forward(
    x: Array,
    where: Array | None,
    rows: a.Rows,
    mode: a.Mode,
    *,
    blocks: Blocks | None,
    interpret: Any,
) -> a.Forward:
    """`[r, d]` rows to output and statistics."""
    writes = mode != "mask"
    outs = [jax.ShapeDtypeStruct((x.shape[0], 1), jnp.float32)] * 3
    kernel = functools.partial(_forward_kernel, masked=where is not None, mode=mode)
    inputs = [x, *_as_bytes(where), *rows]
    if writes:
        outs = [jax.ShapeDtypeStruct(x.shape, x.dtype), *outs]
    found = _call(kernel, inputs, outs, blocks or default_blocks(x, where), interpret)
    return a.Forward(*found) if writes else a.Forward(None, *found)


def backward(
    x: Array,
    where: Array | None,
    dy: Array,
    dlimit: Array,
    rows: a.Saved,
    *,
    soft: bool,
    blocks: Blocks | None,
    interpret: Any,
) -> Array:
    """The gradient of x; in soft mode the output also depends on the threshold."""
    kernel = functools.partial(_backward_kernel, masked=where is not None, soft=soft)
    inputs = [x, *_as_bytes(where), dy, dlimit, *rows]
    outs = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
    return _call(kernel, inputs, outs, blocks or default_blocks(x, where), interpret)[0]


def _forward_kernel(*refs: Any, masked: bool, mode: a.Mode) -> None:
    (x_ref, *mask_ref, quantile_ref, count_ref), outs = refs[: 3 + masked], refs[3 + masked :]
    x, valid = _block(x_ref, mask_ref)
    mean, variance = a.moments(x, valid, jnp.maximum(count_ref[...], 1))
    std = jnp.sqrt(variance)
    limit = a.threshold(mean, std, quantile_ref[...])
    *y_ref, limit_ref, mean_ref, std_ref = outs
    if y_ref:
        y_ref[0][...] = a.output(x, valid, limit, mode).astype(y_ref[0].dtype)
    limit_ref[...], mean_ref[...], std_ref[...] = limit, mean, std


def _backward_kernel(*refs: Any, masked: bool, soft: bool) -> None:
    x_ref, *mask_ref = refs[: 1 + masked]
    dy_ref, dlimit_ref, *row_refs, dx_ref = refs[1 + masked :]
    x, valid = _block(x_ref, mask_ref)
    rows = a.Saved(*(ref[...] for ref in row_refs))
    on = a.on_gradient(x, valid, a.wide(dy_ref[...]), rows.threshold)
    dlimit = dlimit_ref[...]
    if soft:
        dlimit = dlimit - a.row_sum(on)
    dx_ref[...] = (on + a.threshold_gradient(x, valid, rows, dlimit)).astype(dx_ref.dtype)


def _block(x_ref: Any, mask_ref: list[Any]) -> tuple[Array, Array | None]:
    valid = mask_ref[0][...].astype(jnp.int32) != 0 if mask_ref else None
    return a.wide(x_ref[...]), valid


def _call(
    kernel: functools.partial[None],
    inputs: list[Array],
    outs: list[Any],
    blocks: Blocks,
    interpret: Any,
) -> Sequence[Array]:
    """Blocks of rows, one after the other; the last may hang over the end."""
    specs = [pl.BlockSpec((blocks.rows, v.shape[1]), lambda i: (i, 0)) for v in (*inputs, *outs)]
    return pl.pallas_call(
        kernel,
        name=f"statistical_topk{kernel.func.__name__.removesuffix('_kernel')}",
        out_shape=outs,
        grid=(pl.cdiv(inputs[0].shape[0], blocks.rows),),
        in_specs=specs[: len(inputs)],
        out_specs=specs[len(inputs) :],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=blocks.vmem_bytes
        ),
        interpret=interpret,
    )(*inputs)


def _as_bytes(where: Array | None) -> list[Array]:
    # a bool in memory takes four bytes an entry
    return [] if where is None else [where.astype(jnp.int8)]


def _tile(x: Array, where: Array | None) -> int:
    """Rows of the largest tile among the operands: tiles are 4 KiB of 128 lanes."""
    return 32 if where is not None else 32 // x.dtype.itemsize


def _bytes_an_entry(x: Array, where: Array | None) -> int:
    """Three arrays of x and the mask, two blocks each, and what the kernel holds in float32."""
    return 2 * (3 * x.dtype.itemsize + (where is not None)) + 4 * 4
