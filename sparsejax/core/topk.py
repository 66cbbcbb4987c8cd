"""Exact top-k masks and thresholds without a sort.

The k-th largest value is found by bisection on the bits of the float: as many counts as the dtype
has bits, each one pass over the data and, on sharded data, one scalar over the network. Equal
values at the threshold are settled by a second bisection, on their index along each axis.
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

Axes = int | tuple[int, ...] | None

_INTEGERS = {2: (jnp.int16, jnp.uint16), 4: (jnp.int32, jnp.uint32), 8: (jnp.int64, jnp.uint64)}


def exact_topk_mask(
    x: Float[Array, "..."], k: int | Int[Array, "..."], *, axis: Axes = -1
) -> Bool[Array, "..."]:
    """Marks exactly k entries, the largest, in every slice along `axis`.

    Args:
      x: scores; NaN ranks lowest, -0 equals +0.
      k: how many, one number or one per slice (the shape of `x` without `axis`); may be traced.
        A traced k outside [0, length] counts as the nearer end.
      axis: the axis or axes along which entries compete; None for all.

    Returns:
      Booleans of the shape of `x`. Among equals the lowest (row-major) index wins.

    Raises:
      TypeError: `x` is not floating point.
      ValueError: a concrete k outside [0, length], or 2^32 entries or more compete.

    >>> exact_topk_mask(jnp.asarray([[3.0, 1.0, 3.0, 2.0]]), 2)
    Array([[ True, False,  True, False]], dtype=bool)
    """
    axes = _axes(x, axis)
    size = math.prod(x.shape[a] for a in axes)
    k = _checked_k(x, k, axes, size)
    if x.size == 0:
        return jnp.zeros(x.shape, bool)
    return _topk_mask(x, k, axes, size)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _topk_mask(x: Array, k: Array, axes: tuple[int, ...], size: int) -> Array:
    keys = ordered_bits(x, nan="lowest")
    threshold = _kth_largest(keys, k, axes)
    above = keys > threshold
    equal = keys == threshold
    wanted = k - _count(above, axes, size)
    ambiguous = jnp.any(_count(equal, axes, size) != wanted)
    return lax.cond(
        ambiguous,
        lambda: above | (equal & _first(equal, wanted, axes, size)),
        lambda: above | equal,
    )


def exact_topk_threshold(
    x: Float[Array, "*b d"], k: int | Int[Array, ""] | Int[Array, "*b"]
) -> Float[Array, "*b 1"]:
    """The k-th largest value of every row, found by bisection.

    Args:
      x: rows of values; NaN ranks lowest.
      k: from 1 to d, one number or one a row; may be traced.

    Raises:
      TypeError: `x` is not floating point.
      ValueError: a concrete k outside [1, d], or an empty row.

    >>> exact_topk_threshold(jnp.asarray([[3.0, 1.0, 4.0, 2.0]]), 2)
    Array([[3.]], dtype=float32)
    """
    if x.shape[-1] == 0:
        raise ValueError("x has empty rows: there is no k-th largest value")
    if isinstance(k, int) and k < 1:
        raise ValueError(f"k is {k}; it must be in [1, {x.shape[-1]}]")
    axes = _axes(x, -1)
    return _threshold(x, _checked_k(x, k, axes, x.shape[-1]), axes)


@functools.partial(jax.jit, static_argnums=2)
def _threshold(x: Array, k: Array, axes: tuple[int, ...]) -> Array:
    return _from_ordered_bits(_kth_largest(ordered_bits(x, nan="lowest"), k, axes), x.dtype)


def topk_mask(
    scores: Float[Array, "*s"], sparsity: int | float | Float[Array, ""]
) -> Bool[Array, "*s"]:
    """Keeps the largest `max(1, round(size * (1 - sparsity)))` entries of a whole array.

    Args:
      scores: any shape; NaN ranks lowest, among equals the lowest row-major index wins.
      sparsity: share that is zero, in [0, 1]; may be traced.

    Raises:
      ValueError: a concrete sparsity outside [0, 1].

    Source: Zhu & Gupta, To prune, or not to prune (2017); the rounding is jaxpruner's, in float32.

    >>> topk_mask(jnp.arange(10.0), 0.7)[6:]
    Array([False,  True,  True,  True], dtype=bool)
    """
    if isinstance(sparsity, int | float):
        if not 0 <= sparsity <= 1:
            raise ValueError(f"sparsity is {sparsity}; it must be in [0, 1]")
        density = 1.0 - sparsity
        if scores.size <= 2**24:
            density = float(np.float32(1) - np.float32(sparsity))
    else:
        density = 1 - sparsity.astype(jnp.float32)
    return exact_topk_mask(scores, keep_count(scores.size, density), axis=None)


def global_topk_masks(
    scores: Sequence[Float[Array, "..."]], k: int | Int[Array, ""]
) -> list[Bool[Array, "..."]]:
    """Marks exactly k entries over several arrays, the largest of all of them together.

    One threshold for all: as many passes over the data as the dtype has bits, nothing concatenated,
    gathered or sorted, so that it works on sharded arrays of any size.

    Args:
      scores: arrays of one dtype; NaN ranks lowest, among equals the earlier array and then the
        lowest row-major index wins.
      k: how many, in [0, total]. A Python int is exact at every size; a traced one is int32.

    Raises:
      ValueError: no arrays, arrays of several dtypes, or a Python k outside [0, total].
      TypeError: an array that is not floating point.

    >>> global_topk_masks([jnp.asarray([5.0, 1.0]), jnp.asarray([4.0, 6.0])], 2)
    [Array([ True, False], dtype=bool), Array([False,  True], dtype=bool)]
    """
    if not scores:
        raise ValueError("scores is empty: there is nothing to rank")
    dtypes = sorted({str(x.dtype) for x in scores})
    if len(dtypes) > 1:
        raise ValueError(f"scores have dtypes {', '.join(dtypes)}; they must be equal to be ranked")
    total = sum(x.size for x in scores)
    if isinstance(k, int):
        if not 0 <= k <= total:
            raise ValueError(f"k is {k}; it must be in [0, {total}]")
        wanted = (jnp.int32(k >> 16), jnp.int32(k & 0xFFFF))
    else:
        wanted = (k >> 16, k & 0xFFFF)
    for x in scores:
        _axes(x, None)
        _count_dtype(x.size)
    return _global_topk(list(scores), wanted)


@jax.jit
def _global_topk(scores: list[Array], wanted: tuple[Array, Array]) -> list[Array]:
    signed, unsigned = _INTEGERS[scores[0].dtype.itemsize]
    bits = 8 * scores[0].dtype.itemsize
    top = jnp.asarray(1 << (bits - 1), unsigned)

    def keys_of(x: Array) -> Array:
        return ordered_bits(x, nan="lowest")

    def as_key(offset: Array) -> Array:
        return lax.bitcast_convert_type(offset ^ top, signed)

    def at_or_above(key: Array) -> Array:
        # The barrier ties the scores to this pass: a loop would keep a copy of all their keys.
        fixed, key = lax.optimization_barrier((scores, key))
        return jnp.stack([jnp.sum(keys_of(x) >= key, dtype=_WIDE) for x in fixed])

    def settle_bit(i: Array, offset: Array) -> Array:
        candidate = offset | (top >> i.astype(unsigned))
        enough = _at_least(_total(at_or_above(as_key(candidate))), wanted)
        return jnp.where(enough, candidate, offset)

    threshold = as_key(lax.fori_loop(0, bits, settle_bit, jnp.zeros((), unsigned)))
    # no float has the highest integer as its key, so the next one exists
    reached, above = lax.map(at_or_above, jnp.stack([threshold, threshold + 1]))
    equal = reached - above
    left = _minus(wanted, _total(above))
    masks = []
    for x, ties in zip(scores, equal):
        take = _smaller(ties, left)
        left = _minus(left, _total(take))
        masks.append(_take_ties(x, threshold, ties, take))
    return masks


def _take_ties(x: Array, threshold: Array, ties: Array, take: Array) -> Array:
    """The keys above the threshold and the first `take` of those at it."""
    if x.size == 0:
        return jnp.zeros(x.shape, bool)
    axes = tuple(range(x.ndim))
    wanted = jnp.reshape(take.astype(_count_dtype(x.size)), (1,) * x.ndim)

    def some(x: Array) -> Array:
        keys = ordered_bits(x, nan="lowest")
        equal = keys == threshold
        return (keys > threshold) | (equal & _first(equal, wanted, axes, x.size))

    # the branches make the keys anew: nothing of the size of the scores is kept between them
    return lax.cond(ties == take, lambda x: ordered_bits(x, nan="lowest") >= threshold, some, x)


# Totals beyond 2^32 as two int32 numbers, hi * 2^16 + lo: without x64 JAX has no wider integer.
_WIDE = jnp.uint32


def _total(counts: Array) -> tuple[Array, Array]:
    hi = jnp.sum((counts >> 16).astype(jnp.int32))
    lo = jnp.sum((counts & jnp.uint32(0xFFFF)).astype(jnp.int32))
    return hi + (lo >> 16), lo & 0xFFFF


def _at_least(a: tuple[Array, Array], b: tuple[Array, Array]) -> Array:
    return (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] >= b[1]))


def _minus(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    borrow = (a[1] < b[1]).astype(jnp.int32)
    return a[0] - b[0] - borrow, a[1] - b[1] + (borrow << 16)


def _smaller(count: Array, left: tuple[Array, Array]) -> Array:
    fits = _at_least(left, _total(count))
    narrow = (left[0].astype(_WIDE) << 16) | left[1].astype(_WIDE)
    return jnp.where(fits, count, narrow)


def keep_count(size: int, density: int | float | Float[Array, ""]) -> int | Int[Array, ""]:
    """How many of `size` entries stay at a density: `max(1, round(size * density))`, half to even.

    Args:
      size: number of entries, known at trace time.
      density: share that stays, in [0, 1]. A traced one is multiplied in float32, which above
        2^24 entries is good to `size * 2**-24`; a Python number is exact at every size.

    Raises:
      ValueError: a Python density outside [0, 1].
    """
    if isinstance(density, int | float):
        if not 0 <= density <= 1:
            raise ValueError(f"density is {density}; it must be in [0, 1]")
        if size <= 2**24:
            product = float(np.float32(size) * np.float32(density))
        else:
            product = size * float(density)
        return min(max(1, round(product)), size)
    count = jnp.round(jnp.float32(size) * density.astype(jnp.float32))
    return jnp.clip(count.astype(_count_dtype(size)), min(1, size), size)


def _axes(x: Array, axis: Axes) -> tuple[int, ...]:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating point, not {x.dtype}")
    chosen = range(x.ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
    for a in chosen:
        if not -x.ndim <= a < x.ndim:
            raise ValueError(f"axis {a} is not an axis of shape {x.shape}")
    return tuple(sorted({a % x.ndim for a in chosen}))


def _count_dtype(size: int) -> jnp.dtype:
    if size >= 2**32:
        raise ValueError(f"{size} entries compete; counts are exact below 2**32: give `axis`")
    return jnp.dtype(jnp.int32 if size < 2**31 else jnp.uint32)


def _checked_k(x: Array, k: int | Array, axes: tuple[int, ...], size: int) -> Array:
    dtype = _count_dtype(size)
    if isinstance(k, int):
        if not 0 <= k <= size:
            raise ValueError(f"k is {k}; it must be in [0, {size}]")
        return jnp.asarray(k, dtype)
    k = jnp.clip(k, 0, size).astype(dtype)
    return k if k.ndim == 0 else jnp.expand_dims(k, axes)


def ordered_bits(x: Float[Array, "*s"], *, nan: Literal["lowest", "highest"]) -> Int[Array, "*s"]:
    """Signed integers in the order of the floats, denormals included; both zeros are equal.

    Args:
      x: any float dtype of 2, 4 or 8 bytes.
      nan: where NaN goes: to the lowest integer, or to the highest that a number can have, +inf's.
    """
    signed, _ = _INTEGERS[x.dtype.itemsize]
    info = jnp.iinfo(signed)
    bits = lax.bitcast_convert_type(x, signed)
    # on bits, because processors compare denormals as zeros
    bits = jnp.where(bits == info.min, jnp.zeros_like(bits), bits)
    keys = bits ^ ((bits >> (info.bits - 1)) & info.max)
    if nan == "lowest":
        substitute = jnp.asarray(info.min, signed)
    else:
        substitute = lax.bitcast_convert_type(jnp.asarray(jnp.inf, x.dtype), signed)
    return jnp.where(jnp.isnan(x), substitute, keys)


def _from_ordered_bits(keys: Array, dtype: jnp.dtype) -> Array:
    info = jnp.iinfo(keys.dtype)
    bits = keys ^ ((keys >> (info.bits - 1)) & info.max)
    value = lax.bitcast_convert_type(bits, dtype)
    return jnp.where(keys == info.min, jnp.asarray(jnp.nan, dtype), value)


def _count(mask: Array, axes: tuple[int, ...], size: int) -> Array:
    return jnp.sum(mask, axis=axes, keepdims=True, dtype=_count_dtype(size))


def _kth_largest(keys: Array, k: Array, axes: tuple[int, ...]) -> Array:
    """The largest key with at least k keys at or above it; the lowest integer if there is none."""
    signed, unsigned = _INTEGERS[keys.dtype.itemsize]
    bits = 8 * keys.dtype.itemsize
    size = math.prod(keys.shape[a] for a in axes)
    top = jnp.asarray(1 << (bits - 1), unsigned)

    def as_key(offset: Array) -> Array:
        return lax.bitcast_convert_type(offset ^ top, signed)

    def settle_bit(i: Array, offset: Array) -> Array:
        candidate = offset | (top >> i.astype(unsigned))
        enough = _count(keys >= as_key(candidate), axes, size) >= k
        return jnp.where(enough, candidate, offset)

    shape = tuple(1 if a in axes else n for a, n in enumerate(keys.shape))
    return as_key(lax.fori_loop(0, bits, settle_bit, jnp.zeros(shape, unsigned)))


def _first(mask: Array, wanted: Array, axes: tuple[int, ...], size: int) -> Array:
    """Marks everything up to the `wanted`-th True entry of `mask` in row-major order.

    Axis by axis: which index holds that entry, then within that index, so that the bisections run
    over counts along one axis and not over the whole data.
    """
    some = wanted > 0
    before, inside = jnp.zeros((), bool), jnp.ones((), bool)
    for a in axes:
        counts = _count(mask & inside, tuple(b for b in axes if b != a), size)
        index = lax.broadcasted_iota(counts.dtype, counts.shape, a)
        cut, ahead = _index_of(wanted, counts, index, a)
        wanted = wanted - ahead
        before = before | (inside & (index < cut))
        inside = inside & (index == cut)
    return some & (before | inside)


def _index_of(wanted: Array, counts: Array, index: Array, axis: int) -> tuple[Array, Array]:
    """The index along `axis` that holds the `wanted`-th of the counted, and how many precede it."""
    bits = max(1, (counts.shape[axis] - 1).bit_length())
    top = jnp.asarray(1 << (bits - 1), counts.dtype)

    def ahead_of(cut: Array) -> Array:
        below = jnp.where(index < cut, counts, jnp.zeros_like(counts))
        return jnp.sum(below, axis=axis, keepdims=True, dtype=counts.dtype)

    def settle_bit(i: Array, cut: Array) -> Array:
        candidate = cut | (top >> i.astype(top.dtype))
        return jnp.where(ahead_of(candidate) < wanted, candidate, cut)

    start = jnp.zeros_like(wanted + ahead_of(jnp.zeros_like(top)))
    cut = lax.fori_loop(0, bits, settle_bit, start)
    return cut, ahead_of(cut)
