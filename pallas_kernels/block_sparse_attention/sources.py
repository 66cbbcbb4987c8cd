"""What an attention call reads: keys, values, and for every query tile a list of key tiles."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jaxtyping import Float, Int, PyTree

MaskMod = Callable[[Array, Array], Array]
"""Positions of queries and keys, int32 and broadcasting, to True where the key may be seen."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVSource:
    """Keys and values, and which tiles of them each tile of queries reads.

    Head h of the queries reads head `h * Hk // Hq` of `k` and `v` and row `h * Hs // Hq` of the
    lists. What lies at a slot beyond the count is ignored, whatever it is.

    Attributes:
      k, v: `[Hk, Lk, D]` and `[Hk, Lk, Dv]`.
      starts: int32 `[Hs, Nq, S]`, first token of each tile, at least 0; a tile may run past the
        keys. Hs is 1, Hk or Hq.
      counts: int32 `[Hs, Nq]`, how many of the S slots are used.
      log_weight: `[Hk, Lk]`, added to the logits; differentiated. None adds nothing.
      kv_pos: int32 `[Hk, Lk]`, what `mask_mod` sees; None is `0 .. Lk - 1`.
      tile_mask: int32 `[Hs, Nq, S]`, which of `masks` cuts a tile; -1 leaves it whole.
      masks: bool `[P, block_q, width]`, True where a key may be seen.
      width: static, tokens of a tile.
      aligned: static, whether every start is a multiple of `width`.
    """

    k: PyTree  # not typed as arrays: JAX puts tangents, specs and shapes in their place
    v: PyTree
    starts: PyTree
    counts: PyTree
    log_weight: PyTree = None
    kv_pos: PyTree = None
    tile_mask: PyTree = None
    masks: PyTree = None
    width: int = dataclasses.field(default=64, metadata={"static": True})
    aligned: bool = dataclasses.field(default=True, metadata={"static": True})


def check_shapes(q: Array, sources: Sequence[KVSource], block_q: int, q_pos: Array | None) -> None:
    """Shapes and dtypes, at trace time.

    Raises:
      TypeError: arrays of the wrong kind. ValueError: shapes that do not fit, no source.
    """
    if q.ndim != 3:
        raise ValueError(f"q has shape {q.shape}; it must be [heads, queries, width]")
    _floating("q", q)
    if block_q < 1:
        raise ValueError(f"block_q is {block_q}; it must be at least 1")
    if not sources:
        raise ValueError("sources is empty; attention needs at least one")
    heads, queries, width = q.shape
    if q_pos is not None and q_pos.shape != (queries,):
        raise ValueError(f"q_pos has shape {q_pos.shape}; it must be ({queries},)")
    tiles = -(-queries // block_q)
    for i, source in enumerate(sources):
        name = f"sources[{i}]"
        k, v = source.k, source.v
        for part in ("k", "v"):
            if getattr(source, part).dtype != q.dtype:
                raise TypeError(
                    f"{name}.{part} is {getattr(source, part).dtype}; it must be {q.dtype} as q is"
                )
        if k.ndim != 3 or k.shape[2] != width or heads % k.shape[0]:
            raise ValueError(
                f"{name}.k has shape {k.shape}; with q {q.shape} it must be [Hk, Lk, {width}] with "
                f"Hk a divisor of {heads}"
            )
        if v.ndim != 3 or v.shape[:2] != k.shape[:2] or v.shape[2] != sources[0].v.shape[2]:
            raise ValueError(
                f"{name}.v has shape {v.shape}; it must be [{k.shape[0]}, {k.shape[1]}, "
                f"{sources[0].v.shape[2]}]"
            )
        if k.shape[0] != sources[0].k.shape[0]:
            raise ValueError(
                f"{name}.k has {k.shape[0]} heads, sources[0].k {sources[0].k.shape[0]}"
            )
        if source.width < 1:
            raise ValueError(f"{name}.width is {source.width}; it must be at least 1")
        rows = sorted({1, k.shape[0], heads})
        starts = source.starts
        if starts.ndim != 3 or starts.shape[0] not in rows or starts.shape[1] != tiles:
            raise ValueError(
                f"{name}.starts has shape {starts.shape}; it must be [Hs, {tiles}, S] with Hs one "
                f"of {rows}"
            )
        if starts.shape[2] < 1:
            raise ValueError(f"{name}.starts has no slot; give one and a count of 0")
        expected = {
            "counts": starts.shape[:2],
            "log_weight": k.shape[:2],
            "kv_pos": k.shape[:2],
            "tile_mask": starts.shape,
        }
        for part, shape in expected.items():
            found = getattr(source, part)
            if found is not None and found.shape != shape:
                raise ValueError(f"{name}.{part} has shape {found.shape}; it must be {shape}")
        if source.log_weight is not None:
            _floating(f"{name}.log_weight", source.log_weight)
        for part in ("starts", "counts", "kv_pos", "tile_mask"):
            found = getattr(source, part)
            if found is not None and not jnp.issubdtype(found.dtype, jnp.integer):
                raise TypeError(f"{name}.{part} must be integers, not {found.dtype}")
        if (source.tile_mask is None) != (source.masks is None):
            raise ValueError(f"{name} has one of tile_mask and masks; give both or none")
        if source.masks is not None:
            tile = (block_q, source.width)
            if source.masks.ndim != 3 or source.masks.shape[1:] != tile:
                raise ValueError(
                    f"{name}.masks has shape {source.masks.shape}; it must be [P, {tile[0]}, "
                    f"{tile[1]}]"
                )
            if source.masks.dtype != jnp.bool_:
                raise TypeError(f"{name}.masks must be bool, not {source.masks.dtype}")


def _floating(name: str, x: Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point, not {x.dtype}")


def validate_sources(
    q: Float[Array, "hq lq d"], sources: Sequence[KVSource], *, block_q: int
) -> None:
    """Checks what the lists hold, which a traced call cannot: for tests and while writing a rule.

    Two sources may list the same token, which then counts twice; one source may not.

    Raises:
      ValueError: shapes that do not fit, a negative start, a count outside 0 to S, a start that
        `aligned` rules out, a tile mask that is not there, a token that a source lists twice.
      TypeError: traced arrays.
    """
    check_shapes(q, sources, block_q, None)
    for i, source in enumerate(sources):
        name = f"sources[{i}]"
        if any(isinstance(x, Tracer) for x in jax.tree.leaves(source)):
            raise TypeError(f"{name} is traced; validate_sources reads what the arrays hold")
        starts, counts = np.asarray(source.starts, np.int64), np.asarray(source.counts)
        slots, length = starts.shape[2], source.k.shape[1]
        if counts.min(initial=0) < 0 or counts.max(initial=0) > slots:
            raise ValueError(
                f"{name}.counts are {counts.min()} to {counts.max()}; they must be 0 to {slots}"
            )
        used = np.arange(slots) < counts[..., None]
        listed = starts[used]
        if listed.size and listed.min() < 0:
            raise ValueError(f"{name}.starts has {listed.min()}; a start is at least 0")
        if source.aligned and (listed % source.width).any():
            off = listed[listed % source.width != 0][0]
            raise ValueError(
                f"{name}.starts has {off}, which its width {source.width} does not divide; set "
                "aligned=False"
            )
        if source.tile_mask is not None:
            chosen = np.asarray(source.tile_mask)[used]
            most = source.masks.shape[0] - 1
            if chosen.size and (chosen.min() < -1 or chosen.max() > most):
                raise ValueError(
                    f"{name}.tile_mask is {chosen.min()} to {chosen.max()}; it must be -1 to {most}"
                )
        # tiles of one width overlap where two sorted starts are closer than that
        order = np.sort(np.where(used & (starts < length), starts, -1), axis=-1)
        twice = (order[..., 1:] - order[..., :-1] < source.width) & (order[..., :-1] >= 0)
        if twice.any():
            h, t, s = (int(x[0]) for x in np.nonzero(twice))
            raise ValueError(
                f"{name} lists token {order[h, t, s + 1]} twice, in row {h} for query tile {t}"
            )


def merge_lse(
    parts: Sequence[tuple[Float[Array, "*b d"], Float[Array, "*b"]]],
) -> tuple[Float[Array, "*b d"], Float[Array, "*b"]]:
    """The attention over all keys from that over parts of them: `(out, lse)` of each.

    `lse = logsumexp(lse_p)` and `out = sum_p out_p exp(lse_p - lse)`; where no part saw anything,
    0 and -inf. Differentiable, and the gradient of a part that saw nothing is 0.

    Raises:
      ValueError: no parts.
    """
    if not parts:
        raise ValueError("parts is empty; there is nothing to merge")
    lses = [lse for _, lse in parts]
    top = lses[0]
    for lse in lses[1:]:
        top = jnp.maximum(top, lse)
    top = lax.stop_gradient(jnp.where(top > -jnp.inf, top, 0))
    weights = [jnp.exp(lse - top) for lse in lses]
    total = sum(weights[1:], weights[0])
    some = total > 0
    divisor = jnp.where(some, total, 1)
    shares = [(w / divisor)[..., None] for w in weights]
    out = jnp.zeros_like(shares[0])
    for (part, _), share in zip(parts, shares):
        out = out + part.astype(share.dtype) * share
    lse = jnp.where(some, top + jnp.log(divisor), -jnp.inf)
    return out.astype(parts[0][0].dtype), lse


def transpose_lists(
    source: KVSource, n_tiles: int, capacity: int
) -> tuple[Int[Array, "hs n capacity"], Int[Array, "hs n"]]:
    """For every key tile the query tiles that list it.

    Args:
      source: aligned; or unaligned, where a tile is listed under both key tiles that it touches.
      n_tiles: key tiles of `width` tokens. capacity: places for query tiles; Nq always suffices.

    Returns:
      `q_idx`, int32, ascending, padded with 0; `q_count`, the true number, so that
      `q_count > capacity` shows what did not fit.
    """
    starts, width = source.starts, source.width
    hs, nq, slots = starts.shape
    used = jnp.arange(slots, dtype=jnp.int32) < source.counts[..., None]
    ids = [starts // width] if source.aligned else [starts // width, -(-starts // width)]
    if not source.aligned:
        ids[1] = jnp.where(ids[1] == ids[0], n_tiles, ids[1])
    touched = jnp.zeros((hs, nq, n_tiles), bool)
    head, tile = (
        jnp.arange(hs, dtype=jnp.int32)[:, None, None],
        jnp.arange(nq, dtype=jnp.int32)[None, :, None],
    )
    for i in ids:
        i = jnp.where(used, i, n_tiles)
        touched = touched.at[head, tile, i].max(True, mode="drop")
    touched = touched.swapaxes(1, 2)
    rank = jnp.cumsum(touched, axis=-1, dtype=jnp.int32) - 1
    place = jnp.where(touched, rank, capacity)
    q_idx = jnp.zeros((hs, n_tiles, capacity), jnp.int32)
    head, key = (
        jnp.arange(hs, dtype=jnp.int32)[:, None, None],
        jnp.arange(n_tiles, dtype=jnp.int32)[None, :, None],
    )
    q_idx = q_idx.at[head, key, place].set(jnp.arange(nq, dtype=jnp.int32), mode="drop")
    return q_idx, jnp.sum(touched, axis=-1, dtype=jnp.int32)
