"""The order in which a kernel goes over the pairs of a query tile and a key tile.

A kernel takes one pair a step. Ordered by query tile it can finish outputs, ordered by key tile it
can finish gradients of keys; neither has data-dependent sizes.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.block_sparse_attention.sources import KVSource

LIVE, FIRST, LAST = 1, 2, 4
"""Flags of a step: its pair counts; it is the first, or the last, for its tile."""


class Walk(NamedTuple):
    """Steps, int32 `[H, E]`, or `[1, E]` where all heads share the lists.

    Attributes:
      queries, keys: the tiles; where a pair does not count, tiles that cost nothing to name.
      flags: sums of LIVE, FIRST and LAST. masks: which mask cuts the pair, or None.
    """

    queries: Array
    keys: Array
    flags: Array
    masks: Array | None


def key_tiles(source: KVSource) -> int:
    """Tiles of `width` tokens, the last of which may be short."""
    return -(-source.k.shape[1] // source.width)


def by_query(source: KVSource) -> Walk:
    """The lists of an aligned source as they are."""
    rows, nq, slots = source.starts.shape
    used, ids = _used(source)
    # beyond its count a list stays at the tile where it was, so that nothing is fetched
    last = jnp.minimum(
        jnp.arange(slots, dtype=jnp.int32), jnp.maximum(source.counts - 1, 0)[..., None]
    )
    # an empty list may hold anything
    keys = jnp.clip(jnp.take_along_axis(ids, last, axis=2), 0, key_tiles(source) - 1)
    slot = jnp.arange(slots, dtype=jnp.int32)
    flags = _flags(used, slot == 0, slot == slots - 1)
    queries = jnp.broadcast_to(jnp.arange(nq, dtype=jnp.int32)[:, None], used.shape)
    masks = source.tile_mask
    queries, keys, flags = (x.reshape(rows, -1) for x in (queries, keys, flags))
    return Walk(queries, keys, flags, None if masks is None else masks.reshape(rows, -1))


def by_key(source: KVSource) -> Walk:
    """The same pairs by key tile; those that do not count come last, at the tile after the last."""
    rows, _, slots = source.starts.shape
    used, ids = _used(source)
    ids = jnp.where(used, ids, key_tiles(source)).reshape(rows, -1)
    order = jnp.argsort(ids, axis=1, stable=True).astype(jnp.int32)
    keys = jnp.take_along_axis(ids, order, axis=1)
    changes = keys[:, 1:] != keys[:, :-1]
    end = jnp.ones((rows, 1), bool)
    first, last = (jnp.concatenate(x, axis=1) for x in ((end, changes), (changes, end)))
    flags = _flags(keys < key_tiles(source), first, last)
    masks = source.tile_mask
    if masks is not None:
        masks = jnp.take_along_axis(masks.reshape(rows, -1), order, axis=1)
    return Walk(order // slots, keys, flags, masks)


def segments(walk: Walk, tiles: int) -> Array:
    """Where each key tile's steps begin in a walk by key, int32 `[H, tiles + 1]`."""
    edges = jnp.arange(tiles + 1, dtype=jnp.int32)
    below = walk.keys[:, None, :] < edges[:, None]
    return jnp.sum(below, axis=-1, dtype=jnp.int32)


def _used(source: KVSource) -> tuple[Array, Array]:
    """Which slots count, and their key tiles, both `[H, Nq, S]`."""
    used = jnp.arange(source.starts.shape[2], dtype=jnp.int32) < source.counts[..., None]
    ids = source.starts // source.width
    return used & (ids < key_tiles(source)), ids


def _flags(live: Array, first: Array, last: Array) -> Array:
    return jnp.where(live, LIVE, 0) | jnp.where(first, FIRST, 0) | jnp.where(last, LAST, 0)
