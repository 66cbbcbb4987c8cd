"""The definition: every list expanded to how often each query sees each key, then a softmax."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.block_sparse_attention.sources import KVSource, MaskMod


def block_sparse_attention(
    q: Float[Array, "hq lq d"],
    sources: Sequence[KVSource],
    *,
    block_q: int,
    scale: float | None = None,
    mask_mod: MaskMod | None = None,
    q_pos: Int[Array, "lq"] | None = None,
) -> tuple[Float[Array, "hq lq dv"], Float[Array, "hq lq"]]:
    """As the op, with `Lq * Lk` entries a head in memory; differentiated by JAX."""
    heads, queries, width = q.shape
    factor = width**-0.5 if scale is None else scale
    positions = jnp.arange(queries, dtype=jnp.int32) if q_pos is None else q_pos
    wide = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    logits, values = [], []
    for source in sources:
        own = heads // source.k.shape[0]
        k, v = (jnp.repeat(x, own, axis=0).astype(wide) for x in (source.k, source.v))
        s = jnp.einsum("hqd,hkd->hqk", q.astype(wide), k) * factor
        if source.log_weight is not None:
            s = s + jnp.repeat(source.log_weight, own, axis=0)[:, None].astype(wide)
        times = multiplicity(source, heads, queries, block_q)
        if mask_mod is not None:
            length = source.k.shape[1]
            kv_pos = (
                jnp.arange(length, dtype=jnp.int32)[None]
                if source.kv_pos is None
                else source.kv_pos
            )
            kv_pos = jnp.broadcast_to(kv_pos, (source.k.shape[0], length))
            seen = mask_mod(positions[None, :, None], jnp.repeat(kv_pos, own, axis=0)[:, None])
            times = jnp.where(seen, times, 0)
        # a token that is listed twice counts twice
        often = jnp.log(jnp.maximum(times, 1).astype(wide))
        logits.append(jnp.where(times > 0, s + often, -jnp.inf))
        values.append(v)
    s, v = jnp.concatenate(logits, axis=-1), jnp.concatenate(values, axis=1)
    top = jnp.max(s, axis=-1, keepdims=True)
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(s - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    some = total > 0
    total = jnp.where(some, total, 1)
    out = jnp.einsum("hqk,hkd->hqd", weights / total, v)
    lse = jnp.where(some, top + jnp.log(total), -jnp.inf)[..., 0]
    return out.astype(sources[0].v.dtype), lse


def multiplicity(
    source: KVSource, heads: int, queries: int, block_q: int
) -> Int[Array, "hq lq lk"]:
    """How often each query's list names each key, positions left aside."""
    hs, tiles, slots = source.starts.shape
    length, width = source.k.shape[1], source.width
    tokens = source.starts[..., None] + jnp.arange(width, dtype=jnp.int32)
    used = jnp.arange(slots, dtype=jnp.int32) < source.counts[..., None]
    seen = jnp.broadcast_to(used[..., None, None], (hs, tiles, slots, block_q, width))
    if source.tile_mask is not None:
        whole = source.tile_mask < 0
        cut = source.masks[jnp.where(whole, 0, source.tile_mask)]
        seen = seen & (whole[..., None, None] | cut)
    tokens = jnp.broadcast_to(tokens[..., None, :], seen.shape)
    head, tile = (
        jnp.arange(hs, dtype=jnp.int32)[:, None, None, None, None],
        jnp.arange(tiles, dtype=jnp.int32)[:, None, None, None],
    )
    row = tile * block_q + jnp.arange(block_q, dtype=jnp.int32)[:, None]
    times = jnp.zeros((hs, tiles * block_q, length), jnp.int32)
    times = times.at[head, row, tokens].add(seen.astype(jnp.int32), mode="drop")
    return jnp.repeat(times[:, :queries], heads // hs, axis=0)
