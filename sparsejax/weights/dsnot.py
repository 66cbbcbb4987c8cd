"""DSnoT: swapping pruned and kept weights until a layer's mean output is that of the dense one.

No gradients, and no weight changes: for every output, the inputs whose return brings the expected
output nearest to the dense layer's come back, and as many others go. Kernels are `[in, out]`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from sparsejax.core.dtypes import widen
from sparsejax.core.patterns import NM
from sparsejax.core.scores import wanda_score
from sparsejax.weights.one_shot import (
    ActivationStats,
    check_choice,
    check_groups,
    check_width,
    rank_inputs,
)


class _Queue(NamedTuple):
    """Candidates of every output, to be taken from either end.

    Both ends list candidates from that end on; `length` counts all of an output's candidates.
    """

    front: Array
    back: Array
    length: Array


class _Swaps(NamedTuple):
    """Where all outputs are after some cycles; one row an output."""

    kept: Array
    error: Array
    taken: Array  # of the candidates to revive: from the front, from the back
    dropped: Array  # of the candidates to prune, likewise; unused under a pattern
    unused: Array  # pattern: scores of the entries that may still go, +inf for the others
    active: Array
    cycle: Array


def dsnot_mask(
    w: Float[Array, "i o"],
    stats: ActivationStats,
    init_score: Float[Array, "i o"],
    *,
    sparsity: float | None = None,
    pattern: NM | None = None,
    max_cycles: int = 50,
    threshold: float = 0.1,
    var_power: float = 1.0,
    require_same_sign: bool = True,
) -> Bool[Array, "i o"]:
    """Prunes by a score, then swaps weights of each output while its mean error shrinks.

    Args:
      w: kernel.
      stats: of the layer's inputs. Sums are per sequence, so `threshold` scales with the number of
        tokens. Where an input may be constant, pass `var` with 1e-6 added: a variance of 0 puts
        its weights first in the queue of those that come back.
      init_score: of each weight; `abs(w)`, Wanda's or `sparsegpt_score`.
      sparsity: prunes exactly `int(in * sparsity)` inputs of every output, and no swap changes
        that; among equal scores the lowest index goes first.
      pattern: or N of every M consecutive inputs stay, and swaps stay inside a group.
      max_cycles: swaps an output may have; an absolute number, small for wide layers.
      threshold: an output whose expected error is no larger is left alone.
      var_power: power of the input variance by which candidates to come back are divided.
      require_same_sign: refuses a swap that carries the error across 0, and stops that output.
        Without it outputs swing about 0 until `max_cycles`. Always on with a pattern.

    Returns:
      True where a weight stays. Nothing here is differentiated.

    Raises:
      ValueError: not exactly one of sparsity and pattern, a sparsity outside [0, 1), statistics or
        scores of another shape, inputs that M does not divide, groups that are not consecutive
        inputs, or a negative max_cycles or threshold.

    Source: Zhang et al., Dynamic sparse no training (2024), algorithm 1 and code. An output also
    stops when its candidates run out or are not what they were; the code has no such guard.

    >>> stats = ActivationStats(jnp.ones(4), jnp.asarray([4.0, 1.0, 1.0, 1.0]), jnp.ones(4), 1, 4)
    >>> w = jnp.asarray([[0.5], [0.6], [0.7], [0.8]])
    >>> dsnot_mask(w, stats, jnp.abs(w), sparsity=0.5, max_cycles=1)[:, 0]
    Array([ True, False,  True, False], dtype=bool)
    """
    check_choice(sparsity, pattern)
    check_width(w, stats)
    check_groups(w, pattern)
    if init_score.shape != w.shape:
        raise ValueError(f"init_score has shape {init_score.shape}, w has {w.shape}")
    if max_cycles < 0:
        raise ValueError(f"max_cycles is {max_cycles}; it must not be negative")
    if not threshold >= 0:
        raise ValueError(f"threshold is {threshold}; it must not be negative")
    score = widen(init_score)
    kept = rank_inputs(score, sparsity, pattern)
    if not max_cycles:
        return kept
    group = None if pattern is None else pattern.m
    same_sign = require_same_sign or pattern is not None
    return _swap(w, stats, score, kept, threshold, group, max_cycles, var_power, same_sign)


@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8))
def _swap(
    w: Array,
    stats: ActivationStats,
    score: Array,
    kept: Array,
    threshold: float | Array,
    group: int | None,
    max_cycles: int,
    var_power: float,
    same_sign: bool,
) -> Array:
    kept, wide = kept.T, widen(w).T  # one row an output
    mean, var = (a.astype(wide.dtype) for a in (stats.sum, stats.var))
    part = wide * mean  # of the expected output, by input
    error = jnp.sum(jnp.where(kept, jnp.zeros_like(part), part), axis=1)
    sign = jnp.sign(error)
    count = min(max_cycles, w.shape[0])
    revive = _revival_queue(part, var, kept, count, var_power)
    if group is None:
        norm = jnp.sqrt(stats.sum_sq).astype(wide.dtype)
        drop = _removal_queue(part, wanda_score(w, norm).T, kept, count)
    rows = jnp.arange(kept.shape[0])

    def cycle(state: _Swaps) -> _Swaps:
        back = state.error > 0
        i, taken, some = _take(revive, state.taken, back)
        if group is None:
            j, dropped, others = _take(drop, state.dropped, state.error < 0)
        else:
            j, others = _least_of_group(state.unused, i, group)
            dropped = state.dropped
        after = state.error + part[rows, j] - part[rows, i]
        swap = state.active & some & others & ~state.kept[rows, i] & state.kept[rows, j]
        swap &= jnp.abs(state.error) > jnp.asarray(threshold).astype(after.dtype)
        if same_sign:
            swap &= jnp.sign(after) == sign
        kept = state.kept.at[rows, j].set(state.kept[rows, j] & ~swap)
        kept = kept.at[rows, i].set(kept[rows, i] | swap)
        unused = state.unused
        if group is not None:
            unused = unused.at[rows, j].set(jnp.inf)
        error = jnp.where(swap, after, state.error)
        return _Swaps(kept, error, taken, dropped, unused, swap, state.cycle + 1)

    nothing = jnp.zeros((2, kept.shape[0]), jnp.int32)
    unused = jnp.where(kept, score.T, jnp.inf) if group is not None else jnp.zeros((), score.dtype)
    state = _Swaps(kept, error, nothing, nothing, unused, jnp.ones(rows.shape, bool), jnp.int32(0))
    state = lax.while_loop(lambda s: jnp.any(s.active) & (s.cycle < max_cycles), cycle, state)
    return state.kept.T


def _revival_queue(part: Array, var: Array, kept: Array, count: int, var_power: float) -> _Queue:
    """All inputs in ascending order of gain; those that are kept gain 0, so they are amid it."""
    gain = part / var**var_power if var_power else part
    # 0 / 0 is no gain, and a negative zero is not before a positive one
    gain = jnp.where(kept | (part == 0), jnp.zeros_like(gain), gain)
    everything = jnp.ones_like(kept)
    front = _extreme(gain, everything, count, largest=False)
    back = _extreme(gain, everything, count, largest=True)
    return _Queue(front, back, jnp.full(kept.shape[:1], kept.shape[1], jnp.int32))


def _removal_queue(part: Array, wanda: Array, kept: Array, count: int) -> _Queue:
    """Kept inputs: negative parts by ascending score, then positive ones by descending score.

    A part of 0 changes nothing and is nowhere in it.
    """
    minus, plus = kept & (part < 0), kept & (part > 0)
    lengths = [jnp.sum(chosen, axis=1, dtype=jnp.int32) for chosen in (minus, plus)]
    step = jnp.arange(count, dtype=jnp.int32)

    def chain(near: Array, far: Array, length: Array) -> Array:
        beyond = jnp.clip(step - length[:, None], 0, count - 1)
        return jnp.where(step < length[:, None], near, jnp.take_along_axis(far, beyond, axis=1))

    small_minus, large_minus = (_extreme(wanda, minus, count, largest=e) for e in (False, True))
    small_plus, large_plus = (_extreme(wanda, plus, count, largest=e) for e in (False, True))
    return _Queue(
        chain(small_minus, large_plus, lengths[0]),
        chain(small_plus, large_minus, lengths[1]),
        lengths[0] + lengths[1],
    )


def _extreme(score: Array, among: Array, count: int, *, largest: bool) -> Array:
    """Indices of the first `count` of every row from one end of its stable ascending order.

    Beyond the number of those in `among` they mean nothing.
    """
    last = score.shape[1] - 1
    if largest:  # of equals the last comes first
        value = jnp.where(among, score, -jnp.inf)[:, ::-1]
        return last - lax.top_k(value, count)[1]
    return lax.top_k(jnp.where(among, -score, -jnp.inf), count)[1]


def _take(queue: _Queue, taken: Array, back: Array) -> tuple[Array, Array, Array]:
    """The next candidate of every row from one of its ends, and whether there is one."""
    some = taken[0] + taken[1] < queue.length
    front, rear = (
        jnp.take_along_axis(side, jnp.minimum(n, side.shape[1] - 1)[:, None], axis=1)[:, 0]
        for side, n in zip((queue.front, queue.back), taken)
    )
    ends = jnp.stack([~back, back]).astype(jnp.int32)
    return jnp.where(back, rear, front), taken + ends, some


def _least_of_group(unused: Array, i: Array, group: int) -> tuple[Array, Array]:
    """The entry with the smallest score of i's group in every row, and whether there is one."""
    start = i - i % group
    inside = jnp.take_along_axis(unused, start[:, None] + jnp.arange(group, dtype=i.dtype), axis=1)
    return start + jnp.argmin(inside, axis=1).astype(i.dtype), jnp.min(inside, axis=1) < jnp.inf
