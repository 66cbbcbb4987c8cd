"""Pruning a trained layer at once: magnitude and Wanda, and the statistics that pruning needs.

Kernels are `[in, out]`. "Sparsity" is the share of pruned weights, a mask is True where a weight
stays. Wanda ranks the inputs of every output by themselves, magnitude ranks a whole matrix.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsejax.core.dtypes import widen
from sparsejax.core.patterns import NM, nm_mask
from sparsejax.core.scores import magnitude, wanda_score
from sparsejax.core.topk import exact_topk_mask, exact_topk_threshold


class ActivationStats(NamedTuple):
    """Statistics of a layer's inputs over calibration sequences, all float32."""

    sum_sq: Float[Array, "i"]  # sum of squares per sequence
    sum: Float[Array, "i"]  # sum per sequence
    var: Float[Array, "i"]  # biased variance within a sequence
    n_seq: int
    n_tok: int


def activation_stats(x: Float[Array, "s t i"]) -> ActivationStats:
    """Statistics of calibration inputs.

    Args:
      x: s sequences of t tokens of i inputs.

    Raises:
      ValueError: no sequences or no tokens.

    Source: DSnoT (2024), code: sums are per sequence, not per token.
    """
    _check_samples(x)
    sequences, tokens, _ = x.shape
    wide = widen(x)
    return ActivationStats(
        sum_sq=jnp.sum(wide * wide, axis=(0, 1)) / sequences,
        sum=jnp.sum(wide, axis=(0, 1)) / sequences,
        var=jnp.mean(jnp.var(wide, axis=1), axis=0),
        n_seq=sequences,
        n_tok=sequences * tokens,
    )


def merge_stats(a: ActivationStats, b: ActivationStats) -> ActivationStats:
    """Statistics of two sets of sequences together; variances are weighted by tokens.

    Raises:
      ValueError: statistics of layers of different width.
    """
    if a.sum.shape != b.sum.shape:
        raise ValueError(f"a has {a.sum.shape[0]} inputs, b has {b.sum.shape[0]}")
    sequences, tokens = a.n_seq + b.n_seq, a.n_tok + b.n_tok
    return ActivationStats(
        sum_sq=(a.sum_sq * a.n_seq + b.sum_sq * b.n_seq) / sequences,
        sum=(a.sum * a.n_seq + b.sum * b.n_seq) / sequences,
        var=(a.var * a.n_tok + b.var * b.n_tok) / tokens,
        n_seq=sequences,
        n_tok=tokens,
    )


class Hessian(NamedTuple):
    """Second moments of a layer's inputs, the Hessian of its squared error, in float32."""

    value: Float[Array, "i i"]  # 2 X^T X, per sequence
    n_seq: int


def hessian(x: Float[Array, "s t i"]) -> Hessian:
    """`2/s` times the sum of the outer products of all inputs with themselves.

    Args:
      x: s sequences of t tokens of i inputs.

    Raises:
      ValueError: no sequences or no tokens.

    Source: Frantar & Alistarh, SparseGPT (2023), code; no damping yet.
    """
    _check_samples(x)
    rows = widen(x).reshape(-1, x.shape[-1])
    return Hessian(2 * (rows.T @ rows) / x.shape[0], x.shape[0])


def merge_hessian(a: Hessian, b: Hessian) -> Hessian:
    """The Hessian of two sets of sequences together.

    Raises:
      ValueError: Hessians of layers of different width.
    """
    if a.value.shape != b.value.shape:
        raise ValueError(f"a has {a.value.shape[0]} inputs, b has {b.value.shape[0]}")
    sequences = a.n_seq + b.n_seq
    return Hessian((a.value * a.n_seq + b.value * b.n_seq) / sequences, sequences)


def magnitude_mask(
    w: Float[Array, "i o"],
    *,
    sparsity: float | None = None,
    pattern: NM | None = None,
    inclusive: bool = False,
) -> Bool[Array, "i o"]:
    """Keeps the largest magnitudes.

    Args:
      w: kernel.
      sparsity: prunes exactly `int(size * sparsity)` weights of the matrix, among equals those
        that come first in PyTorch's `[out, in]` order.
      pattern: or N of every M inputs stay.
      inclusive: the rule of the published code instead: everything at or below the
        `int(size * sparsity)`-th smallest magnitude goes, one weight more and all ties.

    Raises:
      ValueError: not exactly one of sparsity and pattern, or a sparsity outside [0, 1).
    """
    check_choice(sparsity, pattern)
    # float32 at least, so that bfloat16 magnitudes do not tie
    score = magnitude(w)
    if pattern is not None:
        return pattern.mask(score)
    count = int(w.size * sparsity)  # type: ignore[operator]
    flat = -score.T.reshape(-1)
    if inclusive:
        return score > -exact_topk_threshold(flat, count + 1)[0]
    return ~exact_topk_mask(flat, count).reshape(w.shape[::-1]).T


def wanda_mask(
    w: Float[Array, "i o"],
    stats: ActivationStats,
    *,
    sparsity: float | None = None,
    pattern: NM | None = None,
) -> Bool[Array, "i o"]:
    """Keeps, for every output, the inputs with the largest weight times input norm.

    Args:
      w: kernel.
      stats: of the layer's inputs.
      sparsity: prunes exactly `int(in * sparsity)` inputs of every output, among equals the lowest
        index first.
      pattern: or N of every M inputs stay; among equals the lowest index goes first, whatever the
        pattern's own tie rule.

    Raises:
      ValueError: not exactly one of sparsity and pattern, a sparsity outside [0, 1), or statistics
        of another width.

    Source: Sun et al., A simple and effective pruning approach for large language models (2024).

    >>> stats = activation_stats(jnp.asarray([[[1.0, 10.0]]]))
    >>> wanda_mask(jnp.asarray([[3.0], [1.0]]), stats, sparsity=0.5)[:, 0]
    Array([False,  True], dtype=bool)
    """
    check_choice(sparsity, pattern)
    check_width(w, stats)
    return rank_inputs(wanda_score(w, jnp.sqrt(stats.sum_sq)), sparsity, pattern)


def rank_inputs(
    score: Float[Array, "i o"], sparsity: float | None, pattern: NM | None
) -> Bool[Array, "i o"]:
    """Prunes, for every output by itself, the inputs with the smallest score.

    Args:
      score: of each weight. sparsity, pattern: one of them, as in `wanda_mask`.
    """
    if pattern is not None:
        return nm_mask(
            score, pattern.n, pattern.m, axis=pattern.axis, stride=pattern.stride, ties="last"
        )
    return ~exact_topk_mask(-score, int(score.shape[0] * sparsity), axis=0)  # type: ignore[operator]


def check_width(w: Array, stats: ActivationStats) -> None:
    """Refuses statistics of a layer with another number of inputs."""
    if stats.sum_sq.shape != w.shape[:1]:
        raise ValueError(f"stats are of {stats.sum_sq.shape[0]} inputs, w has {w.shape[0]}")


def check_choice(sparsity: float | None, pattern: NM | None) -> None:
    """Refuses anything but one of the two, and a share outside [0, 1)."""
    if (sparsity is None) == (pattern is None):
        given = "neither" if sparsity is None else "both"
        raise ValueError(f"exactly one of sparsity and pattern is needed, {given} given")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; it must be in [0, 1)")


def check_groups(w: Array, pattern: NM | None) -> None:
    """Refuses a pattern whose groups are not consecutive inputs of one output.

    SparseGPT prunes a group when its elimination comes to it, DSnoT swaps inside one.
    """
    if pattern is None:
        return
    if pattern.axis not in (-2, 0) or pattern.stride != 1:
        raise ValueError(
            f"pattern has axis {pattern.axis} and stride {pattern.stride}; its groups must be "
            "consecutive inputs (axis -2, stride 1)"
        )
    if w.shape[0] % pattern.m:
        raise ValueError(f"w has {w.shape[0]} inputs, not a multiple of m = {pattern.m}")


def _check_samples(x: Array) -> None:
    if not x.shape[0] or not x.shape[1]:
        raise ValueError(f"x has shape {x.shape}: there are no calibration samples")
