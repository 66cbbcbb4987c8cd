"""Block-sparse attention as Mosaic kernels: one pair of a query tile and a key tile a step.

The pairs are prefetched as scalars and name the blocks. A source is a call of its own; outputs are
merged by their log-sum-exp, and in the backward pass all sources share the joint one.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_attention import arithmetic as a
from pallas_kernels.block_sparse_attention.canonical import Gradients, Rule, Tiles
from pallas_kernels.block_sparse_attention.sources import KVSource, merge_lse
from pallas_kernels.block_sparse_attention.walks import (
    FIRST,
    LAST,
    LIVE,
    Walk,
    by_key,
    by_query,
    key_tiles,
)
from pallas_kernels.dispatch import not_of_dtype, not_on, vmem_budget

DTYPES = ("float32", "bfloat16")
KIB, MIB = 2**10, 2**20
SCALARS = 256 * KIB
"""Bytes of lists that a call may prefetch: scalar memory is 1 MiB on the smallest chips."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut up; the tiles are those of the lists.

    Attributes:
      vmem_bytes: on-chip memory that a kernel may use.
    """

    vmem_bytes: int


def default_blocks() -> Blocks:
    """By the generation of the TPU."""
    return Blocks(vmem_budget())


def reasons(tiles: Tiles, *, interpret: Any = False) -> list[str]:
    """Why the kernels cannot run."""
    found = not_on("tpu", interpret=interpret) + not_of_dtype(tiles.q.dtype, DTYPES, of="q")
    for i, source in enumerate(tiles.sources):
        name = f"sources[{i}]"
        if not source.aligned:
            found.append(f"{name} is not aligned")
        if source.width % 8:
            found.append(f"{name} has tiles of {source.width} keys, it takes multiples of 8")
        for part in ("k", "v"):
            found += not_of_dtype(getattr(source, part).dtype, DTYPES, of=f"{name}.{part}")
        scalars = 16 * source.starts[0].size
        if scalars > SCALARS:
            found.append(f"{name} has lists of {scalars} bytes a head, it takes {SCALARS}")
        needed, room = _vmem(tiles, source), default_blocks().vmem_bytes
        if needed > room:
            found.append(
                f"a tile of {tiles.q.shape[2]} rows and {source.width} keys takes {needed // MIB} "
                f"MiB, {room // MIB} fit"
            )
    return found


def forward(
    tiles: Tiles, rule: Rule, *, blocks: Blocks | None, interpret: Any
) -> tuple[Array, Array]:
    """Output `[H, Nq, R, Dv]` and log-sum-exp `[H, Nq, R]`."""
    options = {"blocks": blocks or default_blocks(), "interpret": interpret}
    parts = []
    for source in tiles.sources:
        own, nq, rows, _ = tiles.q.shape
        width = source.v.shape[2]
        outs = {
            name: (jax.ShapeDtypeStruct((own, nq, rows, n), jnp.float32), _at_query(rows, n))
            for name, n in (("out", width), ("lse", 1))
        }
        scratch = {"top": (rows, 1), "total": (rows, 1), "sum": (rows, width)}
        walk = by_query(source)
        out, lse = _call(_forward_kernel, tiles, source, rule, walk, {}, outs, scratch, **options)
        parts.append((out, lse[..., 0]))
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
    options = {"blocks": blocks or default_blocks(), "interpret": interpret}
    own, _, rows, width = tiles.q.shape
    given = {"dout": dout, "lse": lse[..., None], "delta": delta[..., None]}
    dq, found = jnp.zeros(tiles.q.shape, jnp.float32), []
    for source in tiles.sources:
        outs = {"dq": (jax.ShapeDtypeStruct(dq.shape, jnp.float32), _at_query(rows, width))}
        scratch = {"sum": (rows, width)}
        walk = by_query(source)
        dq += _call(_query_kernel, tiles, source, rule, walk, given, outs, scratch, **options)[0]
        n = key_tiles(source)
        sizes = {"dk": (source.width, width), "dv": (source.width, source.v.shape[2])}
        if source.log_weight is not None:
            sizes["dw"] = (1, source.width)
        # one tile more, for the steps that do not count
        outs = {
            name: (jax.ShapeDtypeStruct((own, n + 1, *size), jnp.float32), _at_key(*size))
            for name, size in sizes.items()
        }
        scratch = {f"{name}_sum": size for name, size in sizes.items()}
        walk = by_key(source)
        sums = _call(_key_kernel, tiles, source, rule, walk, given, outs, scratch, **options)
        # a tile that no step wrote holds anything
        written = jnp.any(walk.keys[:, None, :] == jnp.arange(n, dtype=jnp.int32)[:, None], axis=-1)
        written = jnp.broadcast_to(written, (own, n))[..., None, None]
        sums = [_of_keys(jnp.where(written, x[:, :n], 0), source) for x in sums]
        dk, dv, *dw = sums
        weight = source.log_weight
        dw = None if weight is None else dw[0][..., 0].astype(weight.dtype)
        found.append((dk.astype(source.k.dtype), dv.astype(source.v.dtype), dw))
    return Gradients(dq.astype(tiles.q.dtype), tuple(found))


def _of_keys(x: Array, source: KVSource) -> Array:
    """`[H, n, width, D]` or `[H, n, 1, width]` to `[Hk, Lk, D]`, summed over the heads of a key."""
    if x.shape[2] != source.width:
        x = x.swapaxes(2, 3)
    narrow, length = source.k.shape[:2]
    x = x.reshape(narrow, x.shape[0] // narrow, -1, x.shape[3])
    return jnp.sum(x, axis=1)[:, :length]


def _row(lists: Any, h: Any, e: Any) -> Any:
    return lists[h if lists.shape[0] > 1 else 0, e]


def _at_query(*size: int) -> pl.BlockSpec:
    def place(h: Any, e: Any, heads: Any, queries: Any, *_: Any) -> tuple[Any, ...]:
        return h, _row(queries, h, e), 0, 0

    return pl.BlockSpec((None, None, *size), place)


def _at_key(*size: int) -> pl.BlockSpec:
    def place(h: Any, e: Any, heads: Any, queries: Any, keys: Any, *_: Any) -> tuple[Any, ...]:
        return h, _row(keys, h, e), 0, 0

    return pl.BlockSpec((None, None, *size), place)


def _operands(
    tiles: Tiles, source: KVSource, rule: Rule, given: Mapping[str, Array]
) -> dict[str, tuple[Array, pl.BlockSpec]]:
    """Arrays and blocks by name; a key tile after the last is read as the last."""
    n = key_tiles(source)

    def of_head(h: Any, e: Any, heads: Any, queries: Any, keys: Any, *_: Any) -> tuple[Any, ...]:
        return heads[h], jnp.minimum(_row(keys, h, e), n - 1), 0, 0

    def keys_by_tile(x: Array) -> tuple[Array, pl.BlockSpec]:
        x = jnp.pad(x, ((0, 0), (0, n * source.width - x.shape[1])))
        x = x.reshape(x.shape[0], n, 1, source.width)
        return x, pl.BlockSpec((None, None, 1, source.width), of_head)

    def rows_by_tile(x: Array) -> tuple[Array, pl.BlockSpec]:
        x = jnp.pad(x, ((0, 0), (0, n * source.width - x.shape[1]), (0, 0)))
        x = x.reshape(x.shape[0], n, source.width, -1)
        return x, pl.BlockSpec((None, None, *x.shape[2:]), of_head)

    found = {"q": (tiles.q, _at_query(*tiles.q.shape[2:]))}
    found |= {name: (x, _at_query(*x.shape[2:])) for name, x in given.items()}
    found |= {"k": rows_by_tile(source.k), "v": rows_by_tile(source.v)}
    if source.log_weight is not None:
        found["log_weight"] = keys_by_tile(source.log_weight.astype(jnp.float32))
    if rule.mask_mod is not None:
        found["kv_pos"] = keys_by_tile(source.kv_pos)

        def of_tile(h: Any, e: Any, heads: Any, queries: Any, *_: Any) -> tuple[Any, ...]:
            return _row(queries, h, e), 0, 0

        positions = tiles.positions[..., None]
        found["positions"] = positions, pl.BlockSpec((None, *positions.shape[1:]), of_tile)
    if source.masks is not None:

        def of_mask(h: Any, e: Any, *lists: Any) -> tuple[Any, ...]:
            return jnp.maximum(_row(lists[-1], h, e), 0), 0, 0

        found["masks"] = source.masks, pl.BlockSpec((None, *source.masks.shape[1:]), of_mask)
    return found


def _call(
    kernel: Callable[..., None],
    tiles: Tiles,
    source: KVSource,
    rule: Rule,
    walk: Walk,
    given: Mapping[str, Array],
    outs: Mapping[str, tuple[Any, pl.BlockSpec]],
    scratch: Mapping[str, tuple[int, int]],
    *,
    blocks: Blocks,
    interpret: Any,
) -> Sequence[Array]:
    """Runs a kernel over a walk, as many heads at a time as scalar memory holds lists of."""
    own = tiles.q.shape[0]
    operands = _operands(tiles, source, rule, given)
    lists = [x for x in walk if x is not None]
    heads = jnp.arange(own, dtype=jnp.int32) // (own // source.k.shape[0])
    at_once = own
    if lists[0].shape[0] > 1:
        most = SCALARS // (4 * len(lists) * lists[0].shape[1])
        at_once = max(n for n in range(1, own + 1) if own % n == 0 and n <= max(most, 1))
    names = ("heads", "queries", "keys", "flags", *(["mask_ids"] if len(lists) > 3 else []))
    names = (*names, *operands, *outs, *scratch)
    by_head = {"q", *given}

    def some(heads: Array, lists: list[Array], arrays: dict[str, Array]) -> Sequence[Array]:
        return pl.pallas_call(
            functools.partial(
                _named, kernel, names, rule=rule, width=source.width, length=source.k.shape[1]
            ),
            name=f"block_sparse_attention{kernel.__name__.removesuffix('_kernel')}",
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1 + len(lists),
                grid=(at_once, lists[0].shape[1]),
                in_specs=[spec for _, spec in operands.values()],
                out_specs=[spec for _, spec in outs.values()],
                scratch_shapes=[pltpu.VMEM(size, jnp.float32) for size in scratch.values()],
            ),
            out_shape=[
                jax.ShapeDtypeStruct((at_once, *x.shape[1:]), x.dtype) for x, _ in outs.values()
            ],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=blocks.vmem_bytes
            ),
            interpret=interpret,
        )(heads, *lists, *arrays.values())

    arrays = {name: x for name, (x, _) in operands.items()}
    if at_once == own:
        return some(heads, lists, arrays)

    def part(at: Any) -> Sequence[Array]:
        heads, lists, own_arrays = at
        return some(heads, lists, {name: own_arrays.get(name, x) for name, x in arrays.items()})

    def cut(x: Array) -> Array:
        return x.reshape(-1, at_once, *x.shape[1:])

    mine = {name: cut(x) for name, x in arrays.items() if name in by_head}
    found = lax.map(part, (cut(heads), [cut(x) for x in lists], mine))
    return [x.reshape(own, *x.shape[2:]) for x in found]


def _named(
    kernel: Callable[..., None], names: Sequence[str], *refs: Any, length: int, **static: Any
) -> None:
    """Calls a kernel with its refs by name, and what the step's scalars say."""
    r = dict(zip(names, refs, strict=True))
    h, e = pl.program_id(0), pl.program_id(1)
    flags = _row(r["flags"], h, e)
    left = length - _row(r["keys"], h, e) * static["width"]
    whole = _row(r["mask_ids"], h, e) < 0 if "mask_ids" in r else None
    kernel(r, flags, left, whole, **static)


def _logits(r: Mapping[str, Any], left: Any, whole: Any, rule: Rule, width: int) -> Array:
    """Logits `[R, width]` of a step; `left` is how many keys there are from the tile's first on."""
    products = _dot(r["q"][...], r["k"][...], 1, 1)
    allowed = lax.broadcasted_iota(jnp.int32, (1, width), 1) < left
    if whole is not None:
        allowed = allowed & ((r["masks"][...].astype(jnp.int32) != 0) | whole)
    log_weight = r["log_weight"][...] if "log_weight" in r else None
    positions = (r["positions"][...], r["kv_pos"][...]) if rule.mask_mod is not None else None
    return a.logits(products, rule, allowed=allowed, log_weight=log_weight, positions=positions)


def _forward_kernel(
    r: Mapping[str, Any], flags: Any, left: Any, whole: Any, *, rule: Rule, width: int
) -> None:
    top, total, out = r["top"], r["total"], r["sum"]

    @pl.when(flags & FIRST != 0)
    def _() -> None:
        top[...] = jnp.full_like(top, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        out[...] = jnp.zeros_like(out)

    @pl.when(flags & LIVE != 0)
    def _() -> None:
        s = _logits(r, left, whole, rule, width)
        higher = jnp.maximum(top[...], jnp.max(s, axis=1, keepdims=True))
        shrink = jnp.exp(top[...] - a.finite(higher))
        p = jnp.exp(s - a.finite(higher))
        top[...] = higher
        total[...] = total[...] * shrink + jnp.sum(p, axis=1, keepdims=True)
        v = r["v"][...]
        out[...] = out[...] * shrink + _dot(p.astype(v.dtype), v, 1, 0)

    @pl.when(flags & LAST != 0)
    def _() -> None:
        found = a.Softmax(top[...], total[...], out[...])
        r["out"][...], r["lse"][...] = a.normalised(found)


def _query_kernel(
    r: Mapping[str, Any], flags: Any, left: Any, whole: Any, *, rule: Rule, width: int
) -> None:
    @pl.when(flags & FIRST != 0)
    def _() -> None:
        r["sum"][...] = jnp.zeros_like(r["sum"])

    @pl.when(flags & LIVE != 0)
    def _() -> None:
        _, ds = _gradient(r, left, whole, rule, width)
        k = r["k"][...]
        r["sum"][...] += _dot(ds.astype(k.dtype), k, 1, 0)

    @pl.when(flags & LAST != 0)
    def _() -> None:
        r["dq"][...] = r["sum"][...] * rule.scale


def _key_kernel(
    r: Mapping[str, Any], flags: Any, left: Any, whole: Any, *, rule: Rule, width: int
) -> None:
    sums = [name for name in ("dk", "dv", "dw") if name in r]

    @pl.when(flags & FIRST != 0)
    def _() -> None:
        for name in sums:
            r[f"{name}_sum"][...] = jnp.zeros_like(r[f"{name}_sum"])

    @pl.when(flags & LIVE != 0)
    def _() -> None:
        p, ds = _gradient(r, left, whole, rule, width)
        q, dout = r["q"][...], r["dout"][...]
        r["dv_sum"][...] += _dot(p.astype(dout.dtype), dout, 0, 0)
        r["dk_sum"][...] += _dot(ds.astype(q.dtype), q, 0, 0) * rule.scale
        if "dw" in r:
            r["dw_sum"][...] += jnp.sum(ds, axis=0, keepdims=True)

    @pl.when(flags & LAST != 0)
    def _() -> None:
        for name in sums:
            r[name][...] = r[f"{name}_sum"][...]


def _gradient(
    r: Mapping[str, Any], left: Any, whole: Any, rule: Rule, width: int
) -> tuple[Array, Array]:
    s = _logits(r, left, whole, rule, width)
    dp = _dot(r["dout"][...], r["v"][...], 1, 1)
    return a.logit_gradient(s, r["lse"][...], dp, r["delta"][...])


def _dot(x: Array, y: Array, left: int, right: int) -> Array:
    # float32 products would otherwise be rounded to bfloat16
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x,
        y,
        (((left,), (right,)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )


def _vmem(tiles: Tiles, source: KVSource) -> int:
    """Bytes of the backward pass over keys, which holds the most: two of each block, and logits."""
    _, _, rows, width = tiles.q.shape
    wide = width + source.v.shape[2]
    size, keys = tiles.q.dtype.itemsize, source.width
    return 2 * size * (rows + keys) * wide + 3 * 4 * keys * wide + 4 * 4 * rows * keys
