"""Statistical top-k: about the k largest entries of every row, without a sort.

A threshold `mean + std * quantile` stands in for the k-th largest value; it is exact in
expectation for rows of a normal distribution. Moments, threshold and output are one pass.

What belongs here: the statistics with and without a mask, the four outputs, the threshold, and
their gradients. What needs more of the library is for its core to build on top: other axes,
smoothed thresholds, bfloat16 statistics, calibration to rows of other distributions.
"""

import dataclasses
import functools
import math
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri
from jaxtyping import Array, Bool, Float

from pallas_kernels import dispatch
from pallas_kernels.statistical_topk import tpu, triton, xla
from pallas_kernels.statistical_topk.arithmetic import (
    MODES,
    Mode,
    Rows,
    Saved,
    on_gradient,
    selected,
    wide,
)

__all__ = ["MODES", "Blocks", "Mode", "statistical_topk"]

Blocks = tpu.Blocks | triton.Blocks
_IMPLEMENTATIONS: dict[str, Any] = {"tpu": tpu, "triton": triton, "xla": xla}


def statistical_topk(
    x: Float[Array, "*b d"],
    k: int | float | None = None,
    *,
    target_sparsity: int | float | None = None,
    mode: Mode = "soft",
    where: Bool[Array, "*b d"] | None = None,
    stop_gradient_threshold: bool = False,
    return_threshold: bool = False,
    implementation: dispatch.Implementation | None = None,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> Any:
    """Switches off what lies below `mean + std * Q(1 - k/d)` of its row.

    With on = x > threshold and Q the quantile function of the normal distribution:

        soft     on * (x - threshold)
        hard     on * x
        neg_inf  x where on, else -inf
        mask     on, as booleans

    A row of at most k (valid) entries, and every row at target_sparsity 0, is returned as it is
    with the threshold -inf. A row that holds NaN or an infinity gives NaN (mask: False). Ties do
    not matter: k is an expectation, and a row of equal entries has none on.

    The gradient goes to x, through mean and standard deviation too: with g the upstream gradient
    and S the sum of g * on over the row, soft gives

        dx = g * on - S/d * (1 + Q(1 - k/d) * (x - mean)/std)

    and hard and neg_inf give g * on; the threshold's own gradient is 1/d * (1 + ...). The last
    fraction is 0 in a row without deviation. Only reverse mode is defined.

    Args:
      x: rows, of any float dtype; statistics and thresholds are float32, or float64 for float64.
      k: expected number of entries that are on, above 0; need not be whole. Static.
      target_sparsity: 1 - k/d instead of k, in [0, 1). Static.
      where: the valid entries, by default all. Statistics, k and gradients are those of the valid
        entries alone; invalid ones give 0, -inf or False, whatever they hold.
      stop_gradient_threshold: treat the threshold as a constant: dx = g * on in every mode.
      return_threshold: return `(y, threshold)`; the threshold is `[*b 1]` in the precision of
        the statistics, and is differentiated.
      implementation: "xla", "tpu" or "triton"; None takes the best that can run.
      blocks: of the named kernel; None chooses by device and shape.
      interpret: for tests: runs the named kernel on any device, as `pallas_call` takes it.

    Raises:
      TypeError: x is not floating point.
      ValueError: not exactly one of k and target_sparsity, either out of range, an unknown mode or
        implementation, a where of another shape, empty rows, blocks of another implementation,
        or an implementation that cannot run here (with the reasons).

    Source: Spark Transformer (2025, arXiv 2506.06644), section on statistical top-k.

    >>> statistical_topk(jnp.asarray([[1.0, 2.0, 3.0, 6.0]]), 2, mode="hard")
    Array([[0., 0., 0., 6.]], dtype=float32)
    """
    _check(x, k, target_sparsity, mode, where)
    rows2d = (math.prod(x.shape[:-1]), x.shape[-1])
    flat = x.reshape(rows2d)
    valid = None if where is None else where.reshape(rows2d)
    against = {
        name: module.reasons(flat, valid, interpret=interpret)
        for name, module in _IMPLEMENTATIONS.items()
    }
    chosen = dispatch.choose(implementation, against, interpret=interpret)
    dispatch.check_blocks(blocks, chosen, _IMPLEMENTATIONS[chosen].Blocks)
    rule = _Rule(
        mode=mode,
        through_threshold=not stop_gradient_threshold,
        threshold_is_output=return_threshold,
        implementation=chosen,
        blocks=blocks,
        interpret=interpret,
    )
    found: tuple[Array, Array] = _apply(rule, flat, valid, _rows(flat, k, target_sparsity, valid))
    y, limit = found
    y = y.reshape(x.shape)
    return (y, limit.reshape(*x.shape[:-1], 1)) if return_threshold else y


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What is static; `implementation` is the one that runs."""

    mode: Mode
    through_threshold: bool
    threshold_is_output: bool
    implementation: str
    blocks: Blocks | None
    interpret: Any

    @property
    def options(self) -> dict[str, Any]:
        return {"blocks": self.blocks, "interpret": self.interpret}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(rule: _Rule, x: Array, where: Array | None, rows: Rows) -> tuple[Array, Array]:
    return _forward(rule, x, where, rows)[0]


def _forward(rule: _Rule, x: Array, where: Array | None, rows: Rows) -> tuple[Any, Any]:
    run = _IMPLEMENTATIONS[rule.implementation].forward
    found = run(x, where, rows, rule.mode, **rule.options)
    y = selected(wide(x), where, found.threshold) if found.y is None else found.y
    deviates = found.std > 0
    whole = rows.quantile == -jnp.inf
    slope = jnp.where(deviates & ~whole, rows.quantile / jnp.where(deviates, found.std, 1), 0)
    weight = jnp.where(whole, 0, 1 / jnp.maximum(rows.count, 1))
    saved = Saved(found.threshold, found.mean, slope, weight)
    return (y, found.threshold), (x, where, saved)


def _backward(rule: _Rule, residuals: Any, cotangents: Any) -> tuple[Any, None, None]:
    x, where, rows = residuals
    dy, dlimit = cotangents
    if rule.mode == "mask":
        dy = jnp.zeros_like(x)
    soft = rule.mode == "soft"
    if not (rule.through_threshold and (soft or rule.threshold_is_output)):
        return on_gradient(wide(x), where, dy, rows.threshold), None, None
    run = _IMPLEMENTATIONS[rule.implementation].backward
    return run(x, where, dy, dlimit, rows, soft=soft, **rule.options), None, None


_apply.defvjp(_forward, _backward)


def _rows(
    x: Array, k: int | float | None, target_sparsity: int | float | None, where: Array | None
) -> Rows:
    """The quantile and the number of valid entries of every row."""
    d = x.shape[1]
    dtype = wide(jnp.zeros((), x.dtype)).dtype
    shape = (x.shape[0], 1)
    if where is None:
        share = k / d if k is not None else 1 - (target_sparsity or 0)
        return Rows(jnp.full(shape, _quantile(share), dtype), jnp.full(shape, d, dtype))
    count = jnp.sum(where, axis=-1, keepdims=True, dtype=jnp.int32).astype(dtype)
    if k is None:
        quantile = jnp.full(shape, _quantile(1 - (target_sparsity or 0)), dtype)
    else:
        shares = k / jnp.maximum(count, 1)
        inside = shares < 1
        # Q(1 - p) = -Q(p), which loses nothing where p is small
        quantile = jnp.where(inside, -ndtri(jnp.where(inside, shares, 0.5)), -jnp.inf)
    return Rows(jnp.where(count > 0, quantile, -jnp.inf), count)


def _quantile(share: int | float) -> float:
    """Q(1 - share)."""
    return -statistics.NormalDist().inv_cdf(share) if share < 1 else -math.inf


def _check(
    x: Array,
    k: int | float | None,
    target_sparsity: int | float | None,
    mode: str,
    where: Array | None,
) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating point, not {x.dtype}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {x.shape}; its last axis must have entries")
    if (k is None) == (target_sparsity is None):
        raise ValueError(
            f"k is {k} and target_sparsity is {target_sparsity}; exactly one must be given"
        )
    if k is not None and not (math.isfinite(k) and k > 0):
        raise ValueError(f"k is {k}; it must be finite and above 0")
    if target_sparsity is not None and not 0 <= target_sparsity < 1:
        raise ValueError(f"target_sparsity is {target_sparsity}; it must be in [0, 1)")
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; allowed are {', '.join(MODES)}")
    if where is not None and (where.shape != x.shape or where.dtype != jnp.bool_):
        raise ValueError(
            f"where is {where.dtype} of shape {where.shape}; it must be bool of shape {x.shape}"
        )
