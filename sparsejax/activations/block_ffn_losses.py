"""BlockFFN's training losses and what they are judged by.

Two losses make a chunk of tokens share experts: one lets neighbours agree, one keeps the number of
experts of a chunk small, with a factor that follows it. The metrics say how sparse a token, and a
chunk, is. All of one sequence and one layer: average over layers, `vmap` over sequences.

Source: BlockFFN (2025, arXiv 2507.08771), section on training objectives, and its code.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from sparsejax.activations.block_ffn import SUM_EPS, rms_pattern
from sparsejax.core.dtypes import widen
from sparsejax.core.selection import is_concrete

_LOG_EPS = 1e-5  # inside the logarithm of the chunk loss


def activation_locality_loss(
    logits: Float[Array, "t e"],
    shift: Int[Array, "t"],
    *,
    alpha: float | Float[Array, ""] = 100.0,
) -> Float[Array, ""]:
    """Cross-entropy of a token's soft activation pattern under that of its predecessor.

    `l = alpha * logits[shift]` predicts `sigmoid(alpha * logits)`: the mean of
    `softplus(l) - l * sigmoid(alpha * logits)` over experts and tokens that have a predecessor, 0
    where none has. Both tokens are differentiated, and the loss is not symmetric in them. It wants
    small router weights: with large logits it is flat, and falls fastest by switching all on.

    Args:
      logits: of the router, before the ReLU.
      shift: index of each token's predecessor, -1 for starts of segments and padding.
      alpha: sharpness, above 0; may be traced.

    Raises:
      ValueError: a known alpha that is not positive, a known shift outside [-1, t), or a shift of
        another length. A traced shift beyond t takes the last token.

    Source: BlockFFN, activation locality loss; alpha = 100, factor 2e-3 (1e-3 for 0.8B).

    >>> logits = jnp.asarray([[1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])
    >>> loss = activation_locality_loss(logits, jnp.asarray([-1, 0, 1]), alpha=2.0)
    >>> round(float(loss), 3)
    1.127
    """
    if is_concrete(alpha) and not float(alpha) > 0:
        raise ValueError(f"alpha is {alpha}; it must be positive")
    _check_length("shift", shift, logits)
    if is_concrete(shift):
        _check_range(np.asarray(shift))  # NumPy's, for under jit a jnp operation would be traced
    logits = widen(logits)
    known = (shift >= 0)[:, None]
    previous = jnp.take(logits, jnp.clip(shift, 0, shift.size - 1), axis=0)
    # zeros before the logarithms, so that nothing of padding reaches a gradient
    zero = jnp.zeros((), logits.dtype)
    sharpness = jnp.asarray(alpha).astype(logits.dtype)
    predicted = sharpness * jnp.where(known, previous, zero)
    target = jax.nn.sigmoid(sharpness * jnp.where(known, logits, zero))
    terms = jnp.where(known, jax.nn.softplus(predicted) - predicted * target, zero)
    count = jnp.maximum(jnp.sum(known, dtype=jnp.int32), 1).astype(logits.dtype)
    return jnp.sum(terms) / (count * logits.shape[1])


def expert_probabilities(logits: Float[Array, "t e"], *, eps: float = 1e-6) -> Float[Array, "t e"]:
    """Share of every expert in its token's normalised pattern, without the learned gate scale.

    Rows sum to just below 1, those of tokens without an active expert to 0. Differentiated.

    Args:
      logits: of the router, before the ReLU. eps: see `rms_pattern`.

    Raises:
      ValueError: eps is not positive.

    >>> expert_probabilities(jnp.asarray([[2.0, 2.0, -1.0]])).round(2)
    Array([[0.5, 0.5, 0. ]], dtype=float32)
    """
    pattern = rms_pattern(logits, eps=eps)
    return pattern / (jnp.sum(pattern, axis=1, keepdims=True) + SUM_EPS)


def chunk_sparsification_loss(
    logits: Float[Array, "t e"],
    token_mask: Bool[Array, "t"] | None = None,
    *,
    chunk: int = 64,
    eps: float = 1e-6,
) -> Float[Array, ""]:
    """How likely an expert is to be touched by a chunk, the mean over chunks and experts.

    With p of `expert_probabilities`, 0 for tokens that do not count:
    `1 - exp(sum over the chunk's tokens of log(1 - p + 1e-5))`, which for p = 0 is slightly
    negative. Differentiated in logits.

    Args:
      logits: of the router, before the ReLU.
      token_mask: which tokens count; all by default.
      chunk: consecutive tokens of a chunk; must divide t.
      eps: see `rms_pattern`.

    Raises:
      ValueError: a chunk below 1 or that does not divide t, a token_mask of another length, or eps
        that is not positive.

    Source: BlockFFN, chunk sparsification loss; chunk = 64, factor 5e-2 (1e-1 for 2.8B).

    >>> same, other = jnp.asarray([[1.0, -1.0]] * 2), jnp.asarray([[1.0, -1.0], [-1.0, 1.0]])
    >>> [round(float(chunk_sparsification_loss(v, chunk=2)), 2) for v in (same, other)]
    [0.5, 1.0]
    """
    t = logits.shape[0]
    _check_chunk(chunk)
    if t % chunk:
        raise ValueError(f"chunk is {chunk}; it must divide the {t} tokens of logits")
    p = expert_probabilities(logits, eps=eps)
    if token_mask is not None:
        _check_length("token_mask", token_mask, logits)
        p = jnp.where(token_mask[:, None], p, jnp.zeros((), p.dtype))
    untouched = jnp.sum(jnp.log1p(_LOG_EPS - p).reshape(-1, chunk, p.shape[1]), axis=1)
    return jnp.mean(-jnp.expm1(untouched))


class AdaptiveFactorState(NamedTuple):
    """State of `adaptive_factor_step`; the factor is on its way from `origin` to `goal`."""

    step: Int[Array, ""]  # steps done
    total: Float[Array, ""]  # sum of the losses of the current window
    previous: Float[Array, ""]  # mean of the window before
    origin: Float[Array, ""]  # factor at the last adjustment
    goal: Float[Array, ""]  # factor that is reached one window after it
    adjusted: Int[Array, ""]  # step of the last adjustment
    start: Float[Array, ""]  # the first factor


def adaptive_factor_init(start: float | Float[Array, ""]) -> AdaptiveFactorState:
    """The state before the first step of a factor that begins as `start`.

    Args:
      start: above 0; 5e-2 for most of the paper's models.

    Raises:
      ValueError: a known start that is not positive.

    >>> float(adaptive_factor_init(0.5).goal)
    0.5
    """
    if is_concrete(start) and not float(start) > 0:
        raise ValueError(f"start is {start}; it must be positive")
    # no buffer twice: a donated state must not hold one
    first, goal, origin, total, previous = (
        jnp.array(value, dtype=float) for value in (start, start, start, 0, 0)
    )
    step, adjusted = (jnp.array(0, jnp.int32) for _ in range(2))
    return AdaptiveFactorState(step, total, previous, origin, goal, adjusted, first)


def adaptive_factor_step(
    state: AdaptiveFactorState,
    loss: Float[Array, ""],
    *,
    stable_steps: int = 1000,
    adjust_every: int = 100,
    max_factor: float = 4.0,
    min_ratio: float = 1.025,
) -> tuple[AdaptiveFactorState, Float[Array, ""]]:
    """One step of the factor of the chunk loss: it falls with the loss, and rises a little faster.

    The factor of step t = 1, 2, ... depends on the losses before t alone. After step t, where t is
    a multiple of `adjust_every` from `stable_steps` on, the ratio of the means of the last two
    windows of `adjust_every` losses, at least `min_ratio` if above 1, multiplies the factor, up to
    `max_factor` times the first one, over the next `adjust_every` steps and linearly.
    Windows whose mean loss is not above 0, or not finite, leave the factor as it is.

    Args:
      state: of `adaptive_factor_init` or the step before.
      loss: the chunk loss of this step, before it is multiplied; not differentiated.
      stable_steps: during these the factor stays; at least twice `adjust_every`.
      adjust_every: steps of a window. With accumulated gradients all three count micro-steps.
      max_factor: at least 1. min_ratio: at least 1.

    Returns:
      The next state and the factor of this step.

    Raises:
      ValueError: adjust_every, max_factor or min_ratio below 1, or too few stable_steps.

    Source: BlockFFN, code of the adaptive factor (the paper's formula jumps, the code ramps). It
    divides by whatever the window before was; leaving the factor as it is is ours.

    >>> state, factors = adaptive_factor_init(1.0), []
    >>> for loss in [1.0, 1.0, 2.0, 2.0, 2.0, 2.0]:
    ...     state, factor = adaptive_factor_step(
    ...         state, jnp.asarray(loss), stable_steps=4, adjust_every=2
    ...     )
    ...     factors.append(float(factor))
    >>> factors
    [1.0, 1.0, 1.0, 1.0, 1.5, 2.0]
    """
    for name, value in (
        ("adjust_every", adjust_every), ("max_factor", max_factor), ("min_ratio", min_ratio)
    ):  # fmt: skip
        if not value >= 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if stable_steps < 2 * adjust_every:
        raise ValueError(
            f"stable_steps is {stable_steps}; it must be at least 2 * adjust_every = "
            f"{2 * adjust_every}, the two windows that are compared first"
        )
    dtype = state.start.dtype
    step = state.step + 1
    way = (step - state.adjusted).astype(dtype) / adjust_every
    factor = state.origin + (state.goal - state.origin) * jnp.minimum(way, 1)
    total = state.total + lax.stop_gradient(loss).astype(dtype)
    mean = total / adjust_every
    comparable = _is_size(mean) & _is_size(state.previous)
    gamma = jnp.where(comparable, mean / jnp.where(comparable, state.previous, 1), 1)
    ratio = jnp.where(gamma > 1, jnp.maximum(gamma, min_ratio), gamma)
    ratio = jnp.minimum(ratio, state.start * max_factor / factor)
    ends = step % adjust_every == 0
    adjusts = ends & (step >= stable_steps)
    following = AdaptiveFactorState(
        step,
        jnp.where(ends, jnp.zeros((), dtype), total),
        jnp.where(ends, mean, state.previous),
        jnp.where(adjusts, factor, state.origin),
        jnp.where(adjusts, ratio * factor, state.goal),
        jnp.where(adjusts, step, state.adjusted),
        state.start,
    )
    return following, factor


def token_level_sparsity(
    active: Bool[Array, "t e"], *, valid: Bool[Array, "t"] | None = None
) -> Float[Array, ""]:
    """TLS: the share of experts that a token leaves off; nan without a token.

    Args:
      active: `logits > 0` of the router. valid: tokens that count, all by default.

    Raises:
      ValueError: valid of another length.

    >>> token_level_sparsity(jnp.asarray([[True, False], [False, False]]))
    Array(0.75, dtype=float32)
    """
    counts = _counts(active, valid)
    on = jnp.sum(active & counts[:, None], dtype=jnp.int32)
    return 1 - _share(on, jnp.sum(counts, dtype=jnp.int32) * active.shape[1])


def chunk_level_sparsity(
    active: Bool[Array, "t e"], *, chunk: int, valid: Bool[Array, "t"] | None = None
) -> Float[Array, ""]:
    """CLS: the share of experts that no token of a chunk switches on; nan without a full chunk.

    Chunks are consecutive valid tokens, from the first one on; what fills no chunk is left out.

    Args:
      active: `logits > 0` of the router. chunk: tokens of a chunk; the paper reports 8.
      valid: tokens that count, all by default.

    Raises:
      ValueError: a chunk below 1, or valid of another length.

    >>> active = jnp.asarray([[True, False], [False, True], [True, False], [True, False]])
    >>> chunk_level_sparsity(active, chunk=2)
    Array(0.25, dtype=float32)
    """
    _check_chunk(chunk)
    counts = _counts(active, valid)
    most = max(active.shape[0] // chunk, 1)
    number = jnp.cumsum(counts, dtype=jnp.int32) - 1
    member = jnp.where(counts, number // chunk, most)  # a number past the end is dropped
    on = jax.ops.segment_max(active.astype(jnp.int32), member, num_segments=most) > 0
    full = jnp.sum(counts, dtype=jnp.int32) // chunk
    touched = jnp.sum(on & (jnp.arange(most, dtype=jnp.int32) < full)[:, None], dtype=jnp.int32)
    return 1 - _share(touched, full * active.shape[1])


def reuse_ratio(
    active: Bool[Array, "t e"], *, valid: Bool[Array, "t"] | None = None
) -> Float[Array, ""]:
    """The share of a token's experts that the next token has on too, the mean over tokens.

    Tokens without an active expert, and neighbours of which one is not valid, are left out; nan
    where nothing remains.

    Args:
      active: `logits > 0` of the router. valid: tokens that count, all by default.

    Raises:
      ValueError: valid of another length.

    >>> reuse_ratio(jnp.asarray([[True, True], [True, False], [True, False]]))
    Array(0.75, dtype=float32)
    """
    counts = _counts(active, valid)
    own = jnp.sum(active[:-1], axis=1, dtype=jnp.int32)
    shared = jnp.sum(active[:-1] & active[1:], axis=1, dtype=jnp.int32)
    pairs = counts[:-1] & counts[1:] & (own > 0)
    kept = jnp.where(pairs, _share(shared, jnp.maximum(own, 1)), 0)
    return jnp.sum(kept) / jnp.sum(pairs, dtype=jnp.int32).astype(kept.dtype)


def _is_size(mean: Array) -> Array:
    return (mean > 0) & jnp.isfinite(mean)


def _counts(active: Array, valid: Array | None) -> Array:
    if valid is None:
        return jnp.ones(active.shape[:1], bool)
    _check_length("valid", valid, active)
    return valid


def _share(part: Array, whole: Array) -> Array:
    return part.astype(float) / whole.astype(float)


def _check_chunk(chunk: int) -> None:
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")


def _check_range(shift: np.ndarray) -> None:
    if shift.size and not -1 <= shift.min() <= shift.max() < shift.size:
        raise ValueError(
            f"shift has entries from {shift.min()} to {shift.max()}; they must be in "
            f"[-1, {shift.size})"
        )


def _check_length(name: str, given: Array, of: Array) -> None:
    if given.shape != of.shape[:1]:
        raise ValueError(f"{name} has shape {given.shape}; it must be {of.shape[:1]}, by tokens")
