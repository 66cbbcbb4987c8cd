"""Statistical top-k as a Triton-style kernel: one program a row, a piece of it in registers.

A row that is one piece is read once. A longer one is read twice: moments of its pieces are merged
on the way, the output follows in a second sweep.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dispatch import not_of_dtype, not_on, on_large_gpu
from pallas_kernels.statistical_topk import arithmetic as a

DTYPES = ("float32", "bfloat16", "float16")
LARGEST = 2**31 - 1
"""Entries that 32-bit offsets reach."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut up.

    Attributes:
      columns: entries of a row that are held at a time, a power of two.
      warps: threads / 32 of a program, a power of two.
    """

    columns: int
    warps: int


def default_blocks(x: Array) -> Blocks:
    """Whole rows up to 16384 entries on data-centre GPUs, up to 4096 on others; 32 a thread."""
    large = on_large_gpu()
    columns = min(pl.next_power_of_2(x.shape[1]), 16384 if large else 4096)
    columns = max(columns, 128)
    return Blocks(columns, max(1, min(16, columns // 1024)))


def reasons(x: Array, where: Array | None, *, interpret: Any = False) -> list[str]:
    """Why the kernel cannot run on `[r, d]` rows."""
    found = not_on("gpu", interpret=interpret) + not_of_dtype(x.dtype, DTYPES)
    if x.shape[0] == 0:
        found.append("x has no rows")
    if x.size > LARGEST:
        found.append(f"x has {x.size} entries, offsets reach {LARGEST}")
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
    blocks = blocks or default_blocks(x)
    kernel = functools.partial(
        _forward_kernel, width=x.shape[1], block=blocks.columns, masked=where is not None, mode=mode
    )
    outs = [jax.ShapeDtypeStruct((x.shape[0], 1), jnp.float32)] * 3
    writes = mode != "mask"
    if writes:
        outs = [jax.ShapeDtypeStruct(x.shape, x.dtype), *outs]
    found = _call(kernel, [x, *_as_bytes(where), *rows], outs, blocks, interpret)
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
    blocks = blocks or default_blocks(x)
    kernel = functools.partial(
        _backward_kernel,
        width=x.shape[1],
        block=blocks.columns,
        masked=where is not None,
        soft=soft,
    )
    inputs = [x, *_as_bytes(where), dy, dlimit, *rows]
    outs = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
    return _call(kernel, inputs, outs, blocks, interpret)[0]


class _Sums(NamedTuple):
    """Moments of the pieces of a row so far, mergeable."""

    count: Array
    mean: Array
    square: Array


def _forward_kernel(*refs: Any, width: int, block: int, masked: bool, mode: a.Mode) -> None:
    (x_ref, *mask_ref, quantile_ref, _), outs = refs[: 3 + masked], refs[3 + masked :]
    *y_ref, limit_ref, mean_ref, std_ref = outs
    row, pieces = pl.program_id(0), pl.cdiv(width, block)

    def load(i: Any) -> tuple[Array, Array]:
        return _piece(x_ref, mask_ref, row, i, block, width)

    first = load(0)
    sums = _reduce(lambda found, i: _merge(found, _sums(*load(i))), _sums(*first), pieces)
    std = jnp.sqrt(sums.square / jnp.maximum(sums.count, 1))
    limit = a.threshold(sums.mean, std, quantile_ref[row, 0])
    if y_ref:

        def write(i: Any, piece: tuple[Array, Array]) -> None:
            _store(y_ref[0], row, i, block, width, a.output(*piece, limit, mode))

        write(0, first)
        _reduce(lambda _, i: write(i, load(i)), None, pieces)
    limit_ref[row, 0], mean_ref[row, 0], std_ref[row, 0] = limit, sums.mean, std


def _backward_kernel(*refs: Any, width: int, block: int, masked: bool, soft: bool) -> None:
    x_ref, *mask_ref = refs[: 1 + masked]
    dy_ref, dlimit_ref, *row_refs, dx_ref = refs[1 + masked :]
    row, pieces = pl.program_id(0), pl.cdiv(width, block)
    rows = a.Saved(*(ref[row, 0] for ref in row_refs))

    def load(i: Any) -> tuple[Array, Array, Array]:
        x, valid = _piece(x_ref, mask_ref, row, i, block, width)
        dy, _ = _piece(dy_ref, [], row, i, block, width)
        return x, valid, a.on_gradient(x, valid, dy, rows.threshold)

    def write(i: Any, piece: tuple[Array, Array, Array]) -> None:
        x, valid, on = piece
        dx = on + a.threshold_gradient(x, valid, rows, dlimit)
        _store(dx_ref, row, i, block, width, dx)

    first = load(0)
    dlimit = dlimit_ref[row, 0]
    if soft:
        dlimit -= _reduce(lambda s, i: s + a.row_sum(load(i)[2]), a.row_sum(first[2]), pieces)
    write(0, first)
    _reduce(lambda _, i: write(i, load(i)), None, pieces)


def _reduce(step: Callable[[Any, Any], Any], first: Any, pieces: int) -> Any:
    """Goes over the pieces after the first."""
    if pieces == 1:
        return first
    return lax.fori_loop(1, pieces, lambda i, found: step(found, i), first)


def _sums(x: Array, valid: Array) -> _Sums:
    count = a.row_sum(valid.astype(jnp.float32))
    mean, variance = a.moments(x, valid, jnp.maximum(count, 1))
    return _Sums(count, mean, variance * count)


def _merge(left: _Sums, right: _Sums) -> _Sums:
    """The moments of both together (Chan, Golub and LeVeque 1979)."""
    count = left.count + right.count
    share = right.count / jnp.maximum(count, 1)
    apart = right.mean - left.mean
    square = left.square + right.square + apart * apart * left.count * share
    return _Sums(count, left.mean + apart * share, square)


def _columns(i: Any, block: int, width: int) -> tuple[Any, Array]:
    at = pl.ds(i * block, block)
    return at, i * block + jnp.arange(block, dtype=jnp.int32) < width


def _piece(
    x_ref: Any, mask_ref: list[Any], row: Any, i: Any, block: int, width: int
) -> tuple[Array, Array]:
    """A piece of a row and which of its entries count."""
    at, inside = _columns(i, block, width)
    x = a.wide(plgpu.load(x_ref.at[row, at], mask=inside, other=0))
    if not mask_ref:
        return x, inside
    return x, plgpu.load(mask_ref[0].at[row, at], mask=inside, other=0) != 0


def _store(ref: Any, row: Any, i: Any, block: int, width: int, value: Array) -> None:
    at, inside = _columns(i, block, width)
    plgpu.store(ref.at[row, at], value.astype(ref.dtype), mask=inside)


def _call(
    kernel: functools.partial[None],
    inputs: list[Array],
    outs: list[Any],
    blocks: Blocks,
    interpret: Any,
) -> Sequence[Array]:
    return pl.pallas_call(
        kernel,
        name=f"statistical_topk{kernel.func.__name__.removesuffix('_kernel')}",
        out_shape=outs,
        grid=(inputs[0].shape[0],),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=1),
        interpret=interpret,
    )(*inputs)


def _as_bytes(where: Array | None) -> list[Array]:
    return [] if where is None else [where.astype(jnp.int8)]
