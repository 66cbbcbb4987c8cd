"""Top-k by statistics: a threshold from mean and deviation instead of a rank.

The fused op is in pallas_kernels. Here it gets other axes, a smoothed output, statistics over a
mesh axis and the rounding of a published implementation; and the list of what is on, with a fixed
capacity, for code that then touches nothing else.
"""

import math
import statistics
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

StatisticalMode = Literal["soft", "hard", "neg_inf", "mask"]
_ROUNDED = (None, jnp.bfloat16)


def statistical_topk(
    x: Float[Array, "..."],
    k: int | float | None = None,
    *,
    target_sparsity: int | float | None = None,
    mode: StatisticalMode = "soft",
    where: Bool[Array, "..."] | None = None,
    axis: int = -1,
    huber_delta: float | None = None,
    stop_gradient_threshold: bool = False,
    accum_dtype: Any = None,
    axis_name: str | None = None,
) -> Float[Array, "..."] | Bool[Array, "..."]:
    """Switches off all but about the k largest entries of every slice along `axis`, without a sort.

    `threshold = mean + std * Q(1 - k/d)`, where Q is the quantile function of the normal
    distribution, is exact in expectation for normal entries; the count varies by about
    `0.6 sqrt(k)`. Modes: "soft" gives `max(x - threshold, 0)`, "hard" x where it is above,
    "neg_inf" the same with -inf elsewhere, "mask" booleans. A slice of at most k valid entries is
    returned as it is. A NaN or an infinity makes its slice NaN (mask: False).

    Differentiated in x, through the threshold too; a slice without deviation has the gradient of
    its entries alone.

    Args:
      x: of any float dtype; statistics are float32, or float64 for float64.
      k: expected number of entries that are on, above 0; need not be whole.
      target_sparsity: 1 - k/d instead of k, in [0, 1).
      where: the valid entries; statistics, k and gradients are of these alone, the others are off.
      axis: along which entries compete.
      huber_delta: of mode "soft": smooths the output y to `y^2 / (2 delta)` up to delta and
        `y - delta/2` above, which has a continuous derivative. Above 0.
      stop_gradient_threshold: treats the threshold as a constant.
      accum_dtype: bfloat16 rounds mean, deviation, quantile and threshold to it, as the public code
        of Gemma 3n does for bfloat16 models; None rounds nothing.
      axis_name: under `shard_map`, the mesh axis over which `axis` is split; k and d are of the
        whole. Needs unmasked entries and shards of equal length.

    Raises:
      TypeError: x is not floating point.
      ValueError: not exactly one of k and target_sparsity, either out of range, an unknown mode, a
        where of another shape, huber_delta not positive or of another mode, an accum_dtype other
        than bfloat16 or None, or options that exclude each other.

    Source: Spark Transformer (2025, arXiv 2506.06644), sections on statistical top-k and its smooth
    form; Gemma 3n's public code for `accum_dtype`.

    >>> statistical_topk(jnp.asarray([1.0, 2.0, 3.0, 6.0]), 2, mode="hard")
    Array([0., 0., 0., 6.], dtype=float32)
    """
    if huber_delta is not None and not (huber_delta > 0 and mode == "soft"):
        raise ValueError(
            f"huber_delta is {huber_delta} with mode {mode!r}; it must be positive, and mode 'soft'"
        )
    if accum_dtype not in _ROUNDED:
        raise ValueError(f"accum_dtype is {accum_dtype}; allowed are bfloat16 and None")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis {axis} is not an axis of shape {x.shape}")
    plain = accum_dtype is None and axis_name is None
    if not plain and where is not None:
        raise ValueError("where does not go with accum_dtype or axis_name; give one of them")
    x = jnp.moveaxis(x, axis, -1)
    where = None if where is None else jnp.moveaxis(where, axis, -1)
    options = {"mode": mode, "stop_gradient_threshold": stop_gradient_threshold}
    if plain:
        y = _fused()(x, k, target_sparsity=target_sparsity, where=where, **options)
    else:
        y = _spread_or_rounded(
            x, k, target_sparsity, axis_name=axis_name, accum_dtype=accum_dtype, **options
        )
    if huber_delta is not None:
        y = jnp.where(y < huber_delta, y * y / (2 * huber_delta), y - huber_delta / 2)
    return jnp.moveaxis(y, -1, axis)


def gaussian_threshold(
    x: Float[Array, "..."],
    k: int | float,
    *,
    where: Bool[Array, "..."] | None = None,
    axis: int = -1,
) -> Float[Array, "..."]:
    """The threshold of `statistical_topk`, which keeps `axis` with length 1; differentiated.

    In the precision of the statistics; -inf for slices of at most k valid entries.

    Raises: as `statistical_topk`.

    >>> gaussian_threshold(jnp.asarray([1.0, 2.0, 3.0, 6.0]), 2)
    Array([3.], dtype=float32)
    """
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis {axis} is not an axis of shape {x.shape}")
    x = jnp.moveaxis(x, axis, -1)
    where = None if where is None else jnp.moveaxis(where, axis, -1)
    _, threshold = _fused()(x, k, where=where, return_threshold=True)
    return jnp.moveaxis(threshold, -1, axis)


def _fused() -> Any:
    """The op; imported late, because Pallas takes long to import and few programs need it."""
    from pallas_kernels import statistical_topk

    return statistical_topk


def _spread_or_rounded(
    x: Array,
    k: int | float | None,
    target_sparsity: int | float | None,
    *,
    mode: StatisticalMode,
    stop_gradient_threshold: bool,
    axis_name: str | None,
    accum_dtype: Any,
) -> Array:
    """The same along the last axis, in plain jnp: over a mesh axis, or with rounded statistics."""
    shards = 1 if axis_name is None else lax.axis_size(axis_name)
    # for what it refuses: the op on one row of the whole length
    row = jnp.zeros((x.shape[-1] * shards,), x.dtype)
    _fused()(row, k, target_sparsity=target_sparsity, mode=mode)
    share = k / row.size if k is not None else 1 - (target_sparsity or 0)
    if share >= 1:
        return jnp.isfinite(x) if mode == "mask" else x

    def mean(v: Array) -> Array:
        found = jnp.mean(v, axis=-1, keepdims=True)
        return found if axis_name is None else lax.pmean(found, axis_name)

    wide = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    center = mean(wide)
    variance = mean(jnp.square(wide - center))
    flat = variance == 0
    deviation = jnp.where(flat, 0, jnp.sqrt(jnp.where(flat, 1, variance)))
    quantile = -statistics.NormalDist().inv_cdf(share)
    if accum_dtype is None:
        threshold = center + deviation * quantile
    else:
        rounded = jnp.asarray(quantile, accum_dtype)
        center, deviation = center.astype(accum_dtype), deviation.astype(accum_dtype)
        threshold, wide = (center + deviation * rounded).astype(x.dtype), x
    if stop_gradient_threshold:
        threshold = lax.stop_gradient(threshold)
    on = wide > threshold
    if mode == "mask":
        return on
    value = wide - threshold if mode == "soft" else wide
    off = -math.inf if mode == "neg_inf" else 0.0
    y = jnp.where(on, value, jnp.where(jnp.isnan(threshold), math.nan, off))
    return y.astype(x.dtype)


def compact_indices(
    mask: Bool[Array, "f"], capacity: int
) -> tuple[Int[Array, "{capacity}"], Int[Array, ""], Int[Array, ""]]:
    """The True entries of a mask as a list of fixed length.

    Args:
      mask: which entries. capacity: length of the list, at least 1.

    Returns:
      `(indices, count, overflow)`, int32: the lowest `capacity` indices, ascending, and 0 in places
      that are not used; how many are used; how many True entries did not fit.

    Raises:
      ValueError: a capacity below 1.

    >>> compact_indices(jnp.asarray([True, False, True, True]), 2)
    (Array([0, 2], dtype=int32), Array(2, dtype=int32), Array(1, dtype=int32))
    """
    if capacity < 1:
        raise ValueError(f"capacity is {capacity}; it must be at least 1")
    reached = jnp.cumsum(mask, dtype=jnp.int32)
    total = reached[-1] if mask.size else jnp.int32(0)
    # the n-th True entry goes to place n; what is False, or too many, has none
    places = jnp.where(mask, reached - 1, capacity)
    numbers = jnp.arange(mask.size, dtype=jnp.int32)
    found = jnp.zeros(capacity, jnp.int32).at[places].set(numbers, mode="drop")
    count = jnp.minimum(total, capacity)
    return found, count, total - count
