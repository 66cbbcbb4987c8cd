"""Block-sparse attention as XLA compiles it well: the path on CPU, and wherever no kernel runs.

One tile of queries after the other gathers its keys, so that memory grows with the keys alone. What
keeps it from the density limit is that copy, which tiles of few rows feel most.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.block_sparse_attention import arithmetic as a
from pallas_kernels.block_sparse_attention.canonical import Gradients, Rule, Tiles
from pallas_kernels.block_sparse_attention.sources import KVSource

Blocks = None
"""XLA chooses its own."""


def reasons(tiles: Tiles, *, interpret: object = False) -> list[str]:
    """It runs everywhere."""
    return []


def forward(tiles: Tiles, rule: Rule, *, blocks: None, interpret: object) -> tuple[Array, Array]:
    """Output `[H, Nq, R, Dv]` and log-sum-exp `[H, Nq, R]`."""
    own, nq, rows, _ = tiles.q.shape

    def one(at: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        h, t, q = at
        parts = [_part(source, rule, tiles, h, t, q) for source in tiles.sources]
        top = parts[0].logits.max(-1, keepdims=True)
        for part in parts[1:]:
            top = jnp.maximum(top, part.logits.max(-1, keepdims=True))
        total = jnp.zeros_like(top)
        out = jnp.zeros((rows, tiles.sources[0].v.shape[2]), top.dtype)
        for part in parts:
            p = jnp.exp(part.logits - a.finite(top))
            total = total + jnp.sum(p, axis=-1, keepdims=True)
            out = out + _dot(p.astype(part.v.dtype), part.v, 1, 0)
        out, lse = a.normalised(a.Softmax(top, total, out))
        return out.astype(tiles.sources[0].v.dtype), lse[:, 0]

    out, lse = lax.map(one, (*_places(own, nq), tiles.q.reshape(own * nq, rows, -1)))
    return out.reshape(own, nq, rows, -1), lse.reshape(own, nq, rows)


def backward(
    tiles: Tiles,
    rule: Rule,
    lse: Array,
    dout: Array,
    delta: Array,
    *,
    blocks: None,
    interpret: object,
) -> Gradients:
    """Gradients; `delta` is `sum(out * dout) - dlse`, `[H, Nq, R]` like `lse`."""
    own, nq, rows, width = tiles.q.shape
    group = own // tiles.sources[0].k.shape[0]

    def one(sums: Any, at: Any) -> tuple[Any, Array]:
        h, t, q, lse, dout, delta = at
        dq, found = jnp.zeros(q.shape, a.wide(q.dtype)), []
        for source, (dk, dv, dw) in zip(tiles.sources, sums):
            part = _part(source, rule, tiles, h, t, q)
            dp = _dot(dout, part.v, 1, 1)
            p, ds = a.logit_gradient(part.logits, lse[:, None], dp, delta[:, None])
            head, starts = h // group, part.starts
            if dw is not None:
                dw = _add(dw[..., None], head, starts, source, jnp.sum(ds, axis=0)[:, None])[..., 0]
            ds = ds.astype(part.k.dtype)
            dq = dq + _dot(ds, part.k, 1, 0)
            dk = _add(dk, head, starts, source, _dot(ds, q, 0, 0))
            dv = _add(dv, head, starts, source, _dot(p.astype(dout.dtype), dout, 0, 0))
            found.append((dk, dv, dw))
        return tuple(found), (dq * rule.scale).astype(q.dtype)

    zero = tuple(
        tuple(
            None if x is None else jnp.zeros(x.shape, a.wide(x.dtype))
            for x in (source.k, source.v, source.log_weight)
        )
        for source in tiles.sources
    )
    flat = [x.reshape(own * nq, *x.shape[2:]) for x in (tiles.q, lse, dout, delta)]
    sums, dq = lax.scan(one, zero, (*_places(own, nq), *flat))
    found = []
    for source, (dk, dv, dw) in zip(tiles.sources, sums):
        dk = (dk * rule.scale).astype(source.k.dtype)
        dw = None if dw is None else dw.astype(source.log_weight.dtype)
        found.append((dk, dv.astype(source.v.dtype), dw))
    return Gradients(dq.reshape(own, nq, rows, width), tuple(found))


class _Part(NamedTuple):
    """What a tile of queries sees of a source: logits, keys, values, where its windows begin."""

    logits: Array
    k: Array
    v: Array
    starts: Array


def _part(source: KVSource, rule: Rule, tiles: Tiles, h: Array, t: Array, q: Array) -> _Part:
    row = h if source.starts.shape[0] > 1 else 0
    head = h // (tiles.q.shape[0] // source.k.shape[0])
    starts, slots = source.starts[row, t], source.starts.shape[2]
    # a window that would run past the keys lies before their end, and is cut at its start
    width = min(source.width, source.k.shape[1])
    begins = jnp.clip(starts, 0, source.k.shape[1] - width)  # unused slots hold anything
    tokens = begins[:, None] + jnp.arange(width, dtype=jnp.int32)
    allowed = (jnp.arange(slots, dtype=jnp.int32) < source.counts[row, t])[:, None] & (
        tokens >= starts[:, None]
    )
    allowed = allowed.reshape(1, -1)
    k, v = (_windows(x, head, begins, width) for x in (source.k, source.v))
    log_weight = positions = None
    if source.log_weight is not None:
        weight = _windows(source.log_weight[..., None], head, begins, width)[:, 0]
        log_weight = weight[None].astype(a.wide(weight.dtype))
    if rule.mask_mod is not None:
        kv_pos = _windows(source.kv_pos[..., None], head, begins, width)[:, 0]
        positions = tiles.positions[t][:, None], kv_pos[None]
    if source.masks is not None:
        allowed = allowed & _tile_masks(source, row, t, starts, tokens)
    s = a.logits(
        _dot(q, k, 1, 1), rule, allowed=allowed, log_weight=log_weight, positions=positions
    )
    return _Part(s, k, v, begins)


def _tile_masks(source: KVSource, row: Any, t: Array, starts: Array, tokens: Array) -> Array:
    """What the masks allow, `[R, S * width]`; a window that was moved takes its mask along."""
    ids = source.tile_mask[row, t]
    cut = source.masks[jnp.maximum(ids, 0)]
    inside = jnp.clip(tokens - starts[:, None], 0, source.width - 1)
    cut = jnp.take_along_axis(cut, inside[:, None], axis=2) != 0
    cut = cut | (ids < 0)[:, None, None]
    return cut.transpose(1, 0, 2).reshape(cut.shape[1], -1)


def _windows(x: Array, head: Array, begins: Array, width: int) -> Array:
    """`[S * width, D]`: rows `begins .. begins + width` of `x[head]`, which lie inside."""
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(1, 2), collapsed_slice_dims=(0,), start_index_map=(0, 1)
    )
    at = jnp.stack([jnp.broadcast_to(head, begins.shape), begins], axis=1)
    found = lax.gather(
        x, at, numbers, (1, width, x.shape[2]), mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS
    )
    return found.reshape(-1, x.shape[2])


def _add(x: Array, head: Array, begins: Array, source: KVSource, rows: Array) -> Array:
    """Adds rows `[S * width, D]` where `_windows` read them."""
    width = min(source.width, source.k.shape[1])
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 1)
    )
    at = jnp.stack([jnp.broadcast_to(head, begins.shape), begins], axis=1)
    return lax.scatter_add(
        x,
        at,
        rows.reshape(-1, width, x.shape[2]),
        numbers,
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )


def _dot(x: Array, y: Array, left: int, right: int) -> Array:
    """A product over one axis of each, summed in float32 or wider."""
    return lax.dot_general(
        x, y, (((left,), (right,)), ((), ())), preferred_element_type=a.wide(x.dtype)
    )


def _places(own: int, nq: int) -> Sequence[Array]:
    at = jnp.arange(own * nq, dtype=jnp.int32)
    return at // nq, at % nq
