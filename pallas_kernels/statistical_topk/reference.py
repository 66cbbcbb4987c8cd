"""Statistical top-k in plain jnp: the definition that every implementation is tested against."""

import jax.numpy as jnp
from jax.scipy.special import ndtri
from jaxtyping import Array, Bool, Float

from pallas_kernels.statistical_topk.arithmetic import Mode


def statistical_topk(
    x: Float[Array, "*b d"],
    k: int | float | None = None,
    *,
    target_sparsity: int | float | None = None,
    mode: Mode = "soft",
    where: Bool[Array, "*b d"] | None = None,
) -> tuple[Float[Array, "*b d"] | Bool[Array, "*b d"], Float[Array, "*b 1"]]:
    """Output and threshold, differentiated by JAX itself.

    With n valid entries a row, mean and std over them (population, float32 at least):

        threshold = mean + std * Q(1 - k/n)        Q: quantile of the normal distribution
        on        = x > threshold                  a row with n <= k: threshold -inf, all on
        soft      = on * (x - threshold)           a row with n <= k: x
        hard      = on * x;   neg_inf = x where on, else -inf;   mask = on

    Invalid entries give 0, -inf or False; a row that holds a NaN or an infinity gives NaN (mask:
    False). The gradient of a row without deviation is that of a standard deviation of 0.

    Args:
      x: rows. k: expected number of entries that are on. target_sparsity: 1 - k/n instead.
      mode, where: see `pallas_kernels.statistical_topk`.

    Source: Spark Transformer (2025, arXiv 2506.06644), section on statistical top-k.
    """
    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    valid = jnp.ones(x.shape, bool) if where is None else where
    wide = jnp.where(valid, x.astype(dtype), 0)
    n = jnp.sum(valid, axis=-1, keepdims=True).astype(dtype)
    if k is None:
        share = jnp.full_like(n, 1 - (target_sparsity or 0))
    else:
        share = k / jnp.maximum(n, 1)
    whole = (n == 0) | (share >= 1)
    quantile = -ndtri(jnp.where(whole, 0.5, share))  # Q(1 - p) = -Q(p), exact for small p
    count = jnp.maximum(n, 1)
    mean = jnp.sum(wide, axis=-1, keepdims=True) / count
    variance = jnp.sum(jnp.where(valid, wide - mean, 0) ** 2, axis=-1, keepdims=True) / count
    flat = variance == 0
    std = jnp.where(flat, 0, jnp.sqrt(jnp.where(flat, 1, variance)))
    threshold = jnp.where(whole, -jnp.inf, mean + std * quantile)
    on = valid & ((wide > threshold) | whole)
    if mode == "mask":
        return on, threshold
    value = jnp.where(whole, wide, wide - threshold) if mode == "soft" else wide
    off = -jnp.inf if mode == "neg_inf" else 0.0
    y = jnp.where(on, value, jnp.where(jnp.isnan(threshold), jnp.nan, off))
    return jnp.where(valid, y, off).astype(x.dtype), threshold
