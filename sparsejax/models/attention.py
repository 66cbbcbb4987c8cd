"""Causal attention over grouped heads, in tiles of queries."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

_TILE, _MOST_TILES = 128, 8  # queries of a tile at least, and tiles of a sequence at most


def visible_keys(
    queries: Int[Array, "t"], keys: Int[Array, "s"], window: int | None
) -> Bool[Array, "t s"]:
    """Whether the key at one place may be seen by the query at another."""
    distance = queries[:, None] - keys[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _heads_first(x: Float[Array, "b t heads width"], groups: int) -> Array:
    """`[b * groups, heads / groups, t, width]`: products on CPU want their batch in front."""
    b, t, heads, width = x.shape
    grouped = x.reshape(b, t, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    return grouped.reshape(b * groups, heads // groups, t, width)


def _attend(
    q: Float[Array, "n g t width"],
    k: Float[Array, "n s width"],
    v: Float[Array, "n s width"],
    visible: Bool[Array, "t s"],
) -> Float[Array, "n g t width"]:
    """Softmax attention of `g` query heads to the one key head that they share, float32."""
    n, g, t, width = q.shape
    q = q.reshape(n, g * t, width)
    scores = jnp.einsum("nqd,nsd->nqs", q, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(n, g, t, -1) * width**-0.5
    scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    # The sum divides the output, not the weights: s / width times fewer divisions.
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.reshape(n, g * t, -1).astype(v.dtype)
    out = jnp.einsum("nqs,nsd->nqd", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(n, g, t, width) / total


def causal_attention(
    q: Float[Array, "b t heads width"],
    k: Float[Array, "b s kv_heads width"],
    v: Float[Array, "b s kv_heads width"],
    queries: Int[Array, "t"],
    window: int | None,
    *,
    aligned: bool,
) -> Float[Array, "b t heads width"]:
    """Causal attention; query head h reads key head `h // (heads / kv_heads)`.

    queries: the places of the queries among the keys. aligned: they are `0 .. t - 1`, so that tiles
        of queries need not look at keys beyond their end: nearly half the work.
    """
    (b, t, heads, width), groups = q.shape, k.shape[2]
    q = _heads_first(q, groups)
    k, v = (_heads_first(x, groups)[:, 0] for x in (k, v))
    tile = max(_TILE, -(-t // _MOST_TILES)) if aligned else t
    parts = []
    for start in range(0, t, tile):
        end = min(start + tile, t)
        first = 0 if window is None or not aligned else max(0, start - window + 1)
        last = end if aligned else k.shape[1]
        visible = visible_keys(queries[start:end], jnp.arange(first, last), window)
        parts.append(_attend(q[:, :, start:end], k[:, first:last], v[:, first:last], visible))
    out = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)
    out = out.reshape(b, groups, heads // groups, t, width).transpose(0, 3, 1, 2, 4)
    return out.reshape(b, t, heads, width)
