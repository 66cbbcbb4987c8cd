"""Block-sparse attention as Triton-style kernels: one program a piece of a query tile.

A program goes over the listed tokens `keys` at a time, whatever the width of a tile is, so that
pages, columns and tiles of 16 fill a whole product. The gradient of the keys goes over the query
tiles that list a key tile; for lists that are not aligned, or tiles below 16 keys, XLA's form of
the backward pass runs.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.block_sparse_attention import arithmetic as a
from pallas_kernels.block_sparse_attention import xla
from pallas_kernels.block_sparse_attention.canonical import Gradients, Rule, Tiles
from pallas_kernels.block_sparse_attention.sources import KVSource, merge_lse
from pallas_kernels.block_sparse_attention.walks import by_key, key_tiles, segments
from pallas_kernels.dispatch import not_of_dtype, not_on, on_large_gpu

DTYPES = ("float32", "bfloat16", "float16")
LEAST = 16  # rows and columns of a product at least
WIDEST = 256
LARGEST = 2**31 - 1
"""Entries that 32-bit offsets reach."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut up; powers of two.

    Attributes:
      rows: queries of a program. keys: listed tokens at a time. warps: threads / 32.
      stages: of the pipeline.
    """

    rows: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 2


def default_blocks(tiles: Tiles) -> Blocks:
    """64 x 64 on data-centre GPUs, fewer keys where shared memory is small.

    Of float32, whose exact products are not those of tensor cores, as much as does not spill.
    """
    rows, width = tiles.q.shape[2:]
    large = on_large_gpu()
    if tiles.q.dtype != jnp.float32:
        return Blocks(min(64, _padded(rows)), 64 if large else 32, 4, 2)
    wide = max(width, *(source.v.shape[2] for source in tiles.sources)) > 64
    return Blocks(min(32, _padded(rows)), 16 if wide else 32, 8 if wide else 4, 1)


def reasons(tiles: Tiles, *, interpret: Any = False) -> list[str]:
    """Why the kernels cannot run."""
    found = not_on("gpu", interpret=interpret) + not_of_dtype(tiles.q.dtype, DTYPES, of="q")
    if tiles.q.size > LARGEST:
        found.append(f"q has {tiles.q.size} entries, offsets reach {LARGEST}")
    for i, source in enumerate(tiles.sources):
        for part in ("k", "v"):
            x, name = getattr(source, part), f"sources[{i}].{part}"
            found += not_of_dtype(x.dtype, DTYPES, of=name)
            if x.shape[2] > WIDEST:
                found.append(f"{name} has heads of {x.shape[2]}, it takes {WIDEST}")
            if x.size > LARGEST:
                found.append(f"{name} has {x.size} entries, offsets reach {LARGEST}")
    return found


def forward(
    tiles: Tiles, rule: Rule, *, blocks: Blocks | None, interpret: Any
) -> tuple[Array, Array]:
    """Output `[H, Nq, R, Dv]` and log-sum-exp `[H, Nq, R]`."""
    blocks = blocks or default_blocks(tiles)
    own, nq, rows, _ = tiles.q.shape
    parts = []
    for source in tiles.sources:
        outs = [
            jax.ShapeDtypeStruct((own, nq, rows, source.v.shape[2]), jnp.float32),
            jax.ShapeDtypeStruct((own, nq, rows), jnp.float32),
        ]
        arrays = _by_query(tiles, source, rule)
        found = _call(_forward_kernel, tiles, source, rule, arrays, outs, blocks, interpret)
        parts.append((found[0], found[1]))
    out, lse = parts[0] if len(parts) == 1 else merge_lse(parts)
    return out.astype(tiles.sources[0].v.dtype), lse


def backward(
    tiles: Tiles,
    rule: Rule,
    lse: Array,
    dout: Array,
    delta: Array,
    *,
    blocks: Blocks | None,
    interpret: Any,
) -> Gradients:
    """Gradients; `delta` is `sum(out * dout) - dlse`, `[H, Nq, R]` like `lse`."""
    if not all(source.aligned and source.width >= LEAST for source in tiles.sources):
        return xla.backward(tiles, rule, lse, dout, delta, blocks=None, interpret=False)
    blocks = blocks or default_blocks(tiles)
    given = {"dout": dout, "lse": lse, "delta": delta}
    dq, found = jnp.zeros(tiles.q.shape, jnp.float32), []
    for source in tiles.sources:
        arrays = _by_query(tiles, source, rule) | given
        outs = [jax.ShapeDtypeStruct(dq.shape, jnp.float32)]
        dq += _call(_query_kernel, tiles, source, rule, arrays, outs, blocks, interpret)[0]
        arrays = _by_key(tiles, source, rule) | given
        found.append(_key_gradients(tiles, source, rule, arrays, blocks, interpret))
    return Gradients(dq.astype(tiles.q.dtype), tuple(found))


def _key_gradients(
    tiles: Tiles,
    source: KVSource,
    rule: Rule,
    arrays: Mapping[str, Array],
    blocks: Blocks,
    interpret: Any,
) -> tuple[Array, Array, Array | None]:
    own, (narrow, length, width) = tiles.q.shape[0], source.k.shape
    sizes: dict[str, tuple[int, ...]] = {"dk": (width,), "dv": (source.v.shape[2],)}
    if source.log_weight is not None:
        sizes["dw"] = ()
    outs = [jax.ShapeDtypeStruct((own, length, *size), jnp.float32) for size in sizes.values()]
    kernel = functools.partial(_key_kernel, weighted=source.log_weight is not None)
    sums = _call(kernel, tiles, source, rule, arrays, outs, blocks, interpret)
    dk, dv, *dw = (jnp.sum(x.reshape(narrow, -1, *x.shape[1:]), axis=1) for x in sums)
    weight = source.log_weight
    dw = None if weight is None else dw[0].astype(weight.dtype)
    return dk.astype(source.k.dtype), dv.astype(source.v.dtype), dw


def _keyed(tiles: Tiles, source: KVSource, rule: Rule) -> dict[str, Array]:
    """What every kernel reads, by name."""
    found = {"q": tiles.q, "k": source.k, "v": source.v}
    if source.log_weight is not None:
        found["log_weight"] = source.log_weight.astype(jnp.float32)
    if rule.mask_mod is not None:
        found |= {"kv_pos": source.kv_pos, "positions": tiles.positions}
    if source.masks is not None:
        found["masks"] = source.masks
    return found


def _by_query(tiles: Tiles, source: KVSource, rule: Rule) -> dict[str, Array]:
    lists = {"starts": source.starts, "counts": jnp.minimum(source.counts, source.starts.shape[2])}
    if source.masks is not None:
        lists["mask_ids"] = source.tile_mask
    return _keyed(tiles, source, rule) | lists


def _by_key(tiles: Tiles, source: KVSource, rule: Rule) -> dict[str, Array]:
    walk = by_key(source)
    lists = {"queries": walk.queries, "offsets": segments(walk, key_tiles(source))}
    if walk.masks is not None:
        lists["mask_ids"] = walk.masks
    return _keyed(tiles, source, rule) | lists


def _call(
    kernel: Callable[..., None],
    tiles: Tiles,
    source: KVSource,
    rule: Rule,
    arrays: Mapping[str, Array],
    outs: Sequence[Any],
    blocks: Blocks,
    interpret: Any,
) -> Sequence[Array]:
    own, nq, rows, _ = tiles.q.shape
    name = getattr(kernel, "func", kernel).__name__.removesuffix("_kernel")
    if name == "_key":
        grid = (own, key_tiles(source), pl.cdiv(source.width, _key_rows(source, blocks)))
    else:
        grid = (own, nq, pl.cdiv(rows, blocks.rows))
    names = list(arrays)

    def named(*refs: Any) -> None:
        r = dict(zip(names, refs[: len(names)], strict=True))
        kernel(r, refs[len(names) :], rule=rule, blocks=blocks, source=_Static.of(tiles, source))

    return pl.pallas_call(
        named,
        name=f"block_sparse_attention{name}",
        out_shape=outs,
        grid=grid,
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
    )(*arrays.values())


@dataclasses.dataclass(frozen=True)
class _Static:
    """Sizes that a kernel knows: rows of a tile, keys of a source and of a tile, heads to a key."""

    rows: int
    length: int
    width: int
    group: int

    @classmethod
    def of(cls, tiles: Tiles, source: KVSource) -> "_Static":
        group = tiles.q.shape[0] // source.k.shape[0]
        return cls(tiles.q.shape[2], source.k.shape[1], source.width, group)


def _forward_kernel(
    r: Mapping[str, Any], outs: Sequence[Any], *, rule: Rule, blocks: Blocks, source: _Static
) -> None:
    h, t, piece = (pl.program_id(i) for i in range(3))
    row, inside = _range(piece, blocks.rows, source.rows)
    q = _rows(r["q"], (h, t), row, inside)

    def step(i: Any, found: a.Softmax) -> a.Softmax:
        key = _listed(r, i, h, t, blocks.keys, source)
        k, v = (_rows(r[name], (_divide(h, source.group)[0],), *key[:2]) for name in ("k", "v"))
        s = _logits(r, q, k, h, (t, row, inside), key, rule, source)
        higher = jnp.maximum(found.top, jnp.max(s, axis=1))
        shrink = jnp.exp(found.top - a.finite(higher))
        p = jnp.exp(s - a.finite(higher)[:, None])
        out = found.out * shrink[:, None] + _dot(p.astype(v.dtype), v)
        return a.Softmax(higher, found.total * shrink + jnp.sum(p, axis=1), out)

    wide = _padded(r["v"].shape[-1])
    start = a.Softmax(
        jnp.full((blocks.rows,), -jnp.inf, jnp.float32),
        jnp.zeros((blocks.rows,), jnp.float32),
        jnp.zeros((blocks.rows, wide), jnp.float32),
    )
    found = lax.fori_loop(0, _steps(r, h, t, blocks.keys, source), step, start)
    top, total = found.top[:, None], found.total[:, None]
    out, lse = a.normalised(a.Softmax(top, total, found.out))
    _store(outs[0], (h, t), row, inside, out)
    plgpu.store(outs[1].at[h, t, row], jnp.sum(lse, axis=1), mask=inside)


def _query_kernel(
    r: Mapping[str, Any], outs: Sequence[Any], *, rule: Rule, blocks: Blocks, source: _Static
) -> None:
    h, t, piece = (pl.program_id(i) for i in range(3))
    row, inside = _range(piece, blocks.rows, source.rows)
    q = _rows(r["q"], (h, t), row, inside)
    rows = _given(r, h, t, row, inside)

    def step(i: Any, dq: Array) -> Array:
        key = _listed(r, i, h, t, blocks.keys, source)
        k, v = (_rows(r[name], (_divide(h, source.group)[0],), *key[:2]) for name in ("k", "v"))
        s = _logits(r, q, k, h, (t, row, inside), key, rule, source)
        _, ds = _gradient(s, v, *rows)
        return dq + _dot(ds.astype(k.dtype), k)

    start = jnp.zeros((blocks.rows, _padded(r["k"].shape[-1])), jnp.float32)
    dq = lax.fori_loop(0, _steps(r, h, t, blocks.keys, source), step, start)
    _store(outs[0], (h, t), row, inside, dq * rule.scale)


def _key_kernel(
    r: Mapping[str, Any],
    outs: Sequence[Any],
    *,
    rule: Rule,
    blocks: Blocks,
    source: _Static,
    weighted: bool,
) -> None:
    h, n, piece = (pl.program_id(i) for i in range(3))
    size = _key_rows(source, blocks)
    offset, inside = _range(piece, size, source.width)
    token = n * source.width + offset
    inside = inside & (token < source.length)
    k, v = (_rows(r[name], (_divide(h, source.group)[0],), token, inside) for name in ("k", "v"))
    at = _list_row(r["offsets"], h)
    begin, end = r["offsets"][at, n], r["offsets"][at, n + 1]
    pieces = pl.cdiv(source.rows, blocks.rows)

    def step(i: Any, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        e, part = _divide(i, pieces)
        e = begin + e
        t = r["queries"][_list_row(r["queries"], h), e]
        row, real = _range(part, blocks.rows, source.rows)
        q = _rows(r["q"], (h, t), row, real)
        mask = None
        if "masks" in r:
            mask = jnp.full((size,), 0, jnp.int32) + r["mask_ids"][_list_row(r["mask_ids"], h), e]
        key = (token, inside, offset, mask)
        s = _logits(r, q, k, h, (t, row, real), key, rule, source)
        dout, lse, delta = _given(r, h, t, row, real)
        p, ds = _gradient(s, v, dout, lse, delta)
        dk = sums[0] + _dot(ds.astype(q.dtype), q, trans_x=True)
        dv = sums[1] + _dot(p.astype(dout.dtype), dout, trans_x=True)
        return dk, dv, *(dw + jnp.sum(ds, axis=0) for dw in sums[2:])

    shapes = [(size, _padded(r[name].shape[-1])) for name in ("k", "v")]
    start = [jnp.zeros(s, jnp.float32) for s in (*shapes, *([(size,)] if weighted else []))]
    dk, dv, *dw = lax.fori_loop(0, (end - begin) * pieces, step, tuple(start))
    _store(outs[0], (h,), token, inside, dk * rule.scale)
    _store(outs[1], (h,), token, inside, dv)
    if weighted:
        plgpu.store(outs[2].at[h, token], dw[0], mask=inside)


_Keys = tuple[Array, Array, Array, Array | None]
"""Tokens, which of them count, their places in their tiles and the masks of these, each `[K]`."""


def _listed(r: Mapping[str, Any], i: Any, h: Any, t: Any, size: int, source: _Static) -> _Keys:
    """The i-th `size` tokens that the list of a query tile names."""
    at = _list_row(r["starts"], h)
    entry = i * size + jnp.arange(size, dtype=jnp.int32)
    slot, offset = _divide(entry, source.width)
    used = slot < r["counts"][at, t]
    token = plgpu.load(r["starts"].at[at, t, slot], mask=used, other=0) + offset
    mask = None
    if "masks" in r:
        mask = plgpu.load(r["mask_ids"].at[at, t, slot], mask=used, other=-1)
    return token, used & (token < source.length), offset, mask


def _steps(r: Mapping[str, Any], h: Any, t: Any, size: int, source: _Static) -> Any:
    tokens = r["counts"][_list_row(r["counts"], h), t] * source.width
    return _divide(tokens + size - 1, size)[0]


def _logits(
    r: Mapping[str, Any],
    q: Array,
    k: Array,
    h: Any,
    at: tuple[Any, Array, Array],
    key: _Keys,
    rule: Rule,
    source: _Static,
) -> Array:
    (t, row, real), (token, inside, offset, mask) = at, key
    head = _divide(h, source.group)[0]
    allowed = inside[None, :] & real[:, None]
    if mask is not None:
        where = allowed & (mask >= 0)[None, :]
        ref = r["masks"].at[jnp.maximum(mask, 0)[None, :], row[:, None], offset[None, :]]
        allowed = allowed & (plgpu.load(ref, mask=where, other=1) != 0)
    log_weight = positions = None
    if "log_weight" in r:
        ref = r["log_weight"].at[head, token]
        log_weight = plgpu.load(ref, mask=inside, other=0)[None, :]
    if rule.mask_mod is not None:
        kv_pos = plgpu.load(r["kv_pos"].at[head, token], mask=inside, other=0)
        q_pos = plgpu.load(r["positions"].at[t, row], mask=real, other=0)
        positions = q_pos[:, None], kv_pos[None, :]
    return a.logits(
        _dot(q, k, trans_y=True), rule, allowed=allowed, log_weight=log_weight, positions=positions
    )


def _given(
    r: Mapping[str, Any], h: Any, t: Any, row: Array, inside: Array
) -> tuple[Array, Array, Array]:
    dout = _rows(r["dout"], (h, t), row, inside)
    lse, delta = (
        plgpu.load(r[name].at[h, t, row], mask=inside, other=0) for name in ("lse", "delta")
    )
    return dout, lse[:, None], delta[:, None]


def _gradient(s: Array, v: Array, dout: Array, lse: Array, delta: Array) -> tuple[Array, Array]:
    return a.logit_gradient(s, lse, _dot(dout, v, trans_y=True), delta)


def _range(piece: Any, size: int, limit: int) -> tuple[Array, Array]:
    """The indices of a piece, and which of them are below the limit."""
    at = piece * size + jnp.arange(size, dtype=jnp.int32)
    return at, at < limit


def _block(ref: Any, at: tuple[Any, ...], row: Array, inside: Array) -> tuple[Any, Array]:
    """Whole rows by their numbers, padded to a power of two, and which entries are there."""
    columns = jnp.arange(_padded(ref.shape[-1]), dtype=jnp.int32)
    mask = inside[:, None] & (columns < ref.shape[-1])[None, :]
    return ref.at[(*at, row[:, None], columns[None, :])], mask


def _rows(ref: Any, at: tuple[Any, ...], row: Array, inside: Array) -> Array:
    """Rows by their numbers, 0 where they are not there."""
    block, mask = _block(ref, at, row, inside)
    return plgpu.load(block, mask=mask, other=0)


def _store(ref: Any, at: tuple[Any, ...], row: Array, inside: Array, value: Array) -> None:
    block, mask = _block(ref, at, row, inside)
    plgpu.store(block, value.astype(ref.dtype), mask=mask)


def _list_row(ref: Any, h: Any) -> Any:
    return h if ref.shape[0] > 1 else 0


def _key_rows(source: Any, blocks: Blocks) -> int:
    """Keys of a program of the backward pass."""
    return min(blocks.keys, _padded(source.width))


def _divide(x: Any, n: int) -> tuple[Any, Any]:
    """Quotient and remainder of what is not negative, without the steps that signs need."""
    return lax.div(x, n), lax.rem(x, n)


def _padded(size: int) -> int:
    return max(LEAST, pl.next_power_of_2(size))


def _dot(x: Array, y: Array, *, trans_x: bool = False, trans_y: bool = False) -> Array:
    # float32 products would otherwise be rounded to TF32
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return plgpu.dot(x, y, trans_x, trans_y, precision=exact)
