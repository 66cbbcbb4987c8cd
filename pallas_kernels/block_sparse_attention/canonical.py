"""The form in which all implementations get a call: heads that share a list share a tile of rows.

With H rows of lists (Hk, or Hq where a source lists for each query head) the queries become
`[H, Nq, R, D]`: a tile holds the `block_q` rows of each of the `Hq / H` heads, so that grouped
queries read a key once. Results come back in the same form.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PyTree

from pallas_kernels.block_sparse_attention.sources import KVSource, MaskMod


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is static besides the widths of the sources.

    Attributes:
      scale: of the products of queries and keys. mask_mod: by positions, or None.
    """

    scale: float
    mask_mod: MaskMod | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """A call.

    Attributes:
      q: `[H, Nq, R, D]`.
      positions: int32 `[Nq, R]`.
      sources: their lists `[H, Nq, S]`, or `[1, Nq, S]` where all heads share them; their masks
        int8 `[P, R, width]`; `kv_pos` always there where `mask_mod` is.
    """

    q: PyTree  # not typed as arrays: see `KVSource`
    positions: PyTree
    sources: tuple[KVSource, ...]


class Gradients(NamedTuple):
    """Of the queries `[H, Nq, R, D]`, and of `k`, `v` and `log_weight` of every source."""

    q: Array
    sources: tuple[tuple[Array, Array, Array | None], ...]


def to_tiles(
    q: Array,
    sources: Sequence[KVSource],
    *,
    block_q: int,
    mask_mod: MaskMod | None,
    q_pos: Array | None,
) -> Tiles:
    """The canonical form of a call whose shapes have been checked."""
    heads, queries, _ = q.shape
    own, narrow = list_heads(heads, sources), sources[0].k.shape[0]
    positions = jnp.arange(queries, dtype=jnp.int32) if q_pos is None else q_pos
    positions = jnp.pad(positions.astype(jnp.int32), (0, -queries % block_q))
    positions = jnp.tile(positions.reshape(-1, block_q), (1, heads // own))
    found = []
    for source in sources:
        hs = source.starts.shape[0]

        def spread(x: Array | None, hs: int = hs) -> Array | None:
            if x is None:
                return None
            x = x.astype(jnp.int32)
            return x if hs in (1, own) else jnp.repeat(x, own // hs, axis=0)

        kv_pos = source.kv_pos
        if mask_mod is None:
            kv_pos = None
        elif kv_pos is None:
            length = source.k.shape[1]
            kv_pos = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (narrow, length))
        masks = source.masks
        if masks is not None:
            masks = jnp.tile(masks.astype(jnp.int8), (1, heads // own, 1))
        found.append(
            dataclasses.replace(
                source,
                starts=spread(source.starts),
                counts=spread(source.counts),
                tile_mask=spread(source.tile_mask),
                kv_pos=None if kv_pos is None else kv_pos.astype(jnp.int32),
                masks=masks,
            )
        )
    return Tiles(fold(q, own, block_q), positions, tuple(found))


def list_heads(heads: int, sources: Sequence[KVSource]) -> int:
    """H: the query heads where a source lists for each of them, else the key heads."""
    rows = max(source.starts.shape[0] for source in sources)
    return heads if rows == heads else sources[0].k.shape[0]


def fold(x: Array, own: int, block_q: int) -> Array:
    """`[Hq, Lq, D]` to `[own, Nq, R, D]`, missing rows 0."""
    heads, queries, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, -queries % block_q), (0, 0)))
    x = x.reshape(own, heads // own, -1, block_q, width).swapaxes(1, 2)
    return x.reshape(own, x.shape[1], -1, width)


def unfold(x: Array, heads: int, queries: int, block_q: int) -> Array:
    """`[own, Nq, R, D]` to `[Hq, Lq, D]`."""
    own, tiles, _, width = x.shape
    x = x.reshape(own, tiles, heads // own, block_q, width).swapaxes(1, 2)
    return x.reshape(heads, tiles * block_q, width)[:, :queries]
