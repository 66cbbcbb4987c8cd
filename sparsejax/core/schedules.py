"""When: sparsity and drop fractions as functions of a traced step."""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Step = int | Int[Array, ""]
Convention = Literal["zhu_gupta", "jaxpruner"]


def polynomial_sparsity(
    step: Step,
    *,
    initial: float = 0.0,
    final: float | Float[Array, ""],
    begin: int,
    end: int,
    power: float = 3.0,
    convention: Convention = "zhu_gupta",
) -> Float[Array, ""]:
    """Sparsity that rises fast first and flattens out towards the end.

    `final + (initial - final) * (1 - p)**power` with `p = clip((step - begin) / (end - begin), 0,
    1)`. When `end == begin` it jumps to `final` at that step. The "jaxpruner" convention is one
    step ahead, starts at 0, and is `final` at every step when `end == begin`.

    Args:
      step: number of the step, from 0; may be traced.
      initial, final: sparsities at `begin` and `end`, shares in [0, 1].
      begin, end: first and last step of the rise.
      power: 3 is the cubic of the source.
      convention: "zhu_gupta" or "jaxpruner".

    Raises:
      ValueError: `end < begin`, a negative `begin`, an unknown convention, a sparsity outside
        [0, 1], or "jaxpruner" with another initial sparsity than 0.

    Source: Zhu & Gupta, To prune, or not to prune (2017), equation 1.
    """
    _check_range(begin, end)
    for name, value in (("initial", initial), ("final", final)):
        if isinstance(value, int | float) and not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; a sparsity must be in [0, 1]")
    step = jnp.asarray(step, jnp.int32)
    if convention == "zhu_gupta":
        if end == begin:
            progress = (step >= end).astype(jnp.float32)
        else:
            progress = (step - begin).astype(jnp.float32) / (end - begin)
    elif convention == "jaxpruner":
        if initial != 0:
            raise ValueError(f"initial is {initial}; the jaxpruner convention starts at 0")
        length = end - begin
        progress = (step + 1 - begin).astype(jnp.float32) / length if length else jnp.float32(1)
    else:
        raise ValueError(f"convention is {convention!r}; allowed are 'zhu_gupta' and 'jaxpruner'")
    remaining = (1.0 - jnp.clip(progress, 0.0, 1.0)) ** power
    return jnp.asarray(final, jnp.float32) * (1.0 - remaining) + initial * remaining


def is_update_step(
    step: Step, *, begin: int, end: int, freq: int, phase: Literal["begin", "absolute"] = "begin"
) -> Bool[Array, ""]:
    """True at the steps in [begin, end] that are a multiple of `freq`.

    Args:
      step: number of the step, from 0; may be traced.
      begin, end: first and last step that can be one.
      freq: distance between two of them.
      phase: multiples counted from "begin", or "absolute" (from step 0).

    Raises:
      ValueError: `freq < 1`, `end < begin`, a negative `begin`, or an unknown phase.
    """
    _check_range(begin, end)
    if freq < 1:
        raise ValueError(f"freq is {freq}; it must be at least 1")
    if phase not in ("begin", "absolute"):
        raise ValueError(f"phase is {phase!r}; allowed are 'begin' and 'absolute'")
    step = jnp.asarray(step, jnp.int32)
    offset = step - begin if phase == "begin" else step
    return (step >= begin) & (step <= end) & (offset % freq == 0)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When masks change and how sparse they then are; made by `cubic` and `one_shot`.

    Attributes:
      begin, end, freq: first and last update, and the steps between two.
      initial: sparsity at `begin`. power: of the polynomial.
      convention: see `polynomial_sparsity`; "jaxpruner" counts its updates from step 0.
      force_final: a last update at `end` even where `freq` does not hit it.
    """

    begin: int
    end: int
    freq: int = 100
    initial: float = 0.0
    power: float = 3.0
    convention: Convention = "zhu_gupta"
    force_final: bool = False

    def __post_init__(self) -> None:
        _check_range(self.begin, self.end)
        if self.freq < 1:
            raise ValueError(f"freq is {self.freq}; it must be at least 1")
        if self.convention not in ("zhu_gupta", "jaxpruner"):
            raise ValueError(
                f"convention is {self.convention!r}; allowed are 'zhu_gupta' and 'jaxpruner'"
            )
        misses_end = (self.end - self.begin) % self.freq != 0
        if misses_end and self.convention == "zhu_gupta" and not self.force_final:
            raise ValueError(
                f"freq is {self.freq}; it must divide end - begin = {self.end - self.begin}, or "
                "the final sparsity is never reached (or set force_final)"
            )

    def __call__(self, step: Step, final: float | Float[Array, ""]) -> Float[Array, ""]:
        """Sparsity at `step` on the way to `final`."""
        return polynomial_sparsity(
            step,
            initial=self.initial,
            final=final,
            begin=self.begin,
            end=self.end,
            power=self.power,
            convention=self.convention,
        )

    def is_update(self, step: Step) -> Bool[Array, ""]:
        """True where the masks are made anew."""
        phase = "absolute" if self.convention == "jaxpruner" else "begin"
        due = is_update_step(step, begin=self.begin, end=self.end, freq=self.freq, phase=phase)
        return due | (jnp.asarray(step) == self.end) if self.force_final else due


def cubic(
    *,
    begin: int,
    end: int,
    freq: int = 100,
    initial: float = 0.0,
    power: float = 3.0,
    convention: Convention = "zhu_gupta",
    force_final: bool = False,
) -> Schedule:
    """Gradual pruning from step `begin` to `end`, an update every `freq` steps.

    Raises:
      ValueError: `end < begin`, a negative `begin`, `freq < 1`, or a `freq` that misses `end`
        (unless `force_final`, or in the jaxpruner convention).

    Source: Zhu & Gupta, To prune, or not to prune (2017).

    >>> schedule = cubic(begin=0, end=100, freq=10)
    >>> [round(float(schedule(step, 0.8)), 2) for step in (0, 50, 100)]
    [0.0, 0.7, 0.8]
    """
    return Schedule(begin, end, freq, initial, power, convention, force_final)


def one_shot(step: int) -> Schedule:
    """Nothing before `step`, the final sparsity at once there."""
    return Schedule(begin=step, end=step, freq=1)


@dataclasses.dataclass(frozen=True)
class Periodic:
    """The final sparsity from `begin` on, with masks made anew every `freq` steps until `end`.

    Attributes:
      begin, end, freq: first and last update, and the steps between two.

    Raises:
      ValueError: `end < begin`, a negative `begin` or `freq < 1`.
    """

    begin: int
    end: int
    freq: int = 100

    def __post_init__(self) -> None:
        _check_range(self.begin, self.end)
        if self.freq < 1:
            raise ValueError(f"freq is {self.freq}; it must be at least 1")

    def __call__(self, step: Step, final: float | Float[Array, ""]) -> Float[Array, ""]:
        """`final` from `begin` on, 0 before."""
        reached = jnp.asarray(step) >= self.begin
        return jnp.where(reached, jnp.asarray(final, jnp.float32), jnp.float32(0))

    def is_update(self, step: Step) -> Bool[Array, ""]:
        """True where the masks are made anew."""
        return is_update_step(step, begin=self.begin, end=self.end, freq=self.freq)


def linear_mask_decay(*, coef: float, start: int = 0) -> Callable[[Step], Float[Array, ""]]:
    """Share of the pruned entries that a decaying mask lets through: `max(1 - coef * t, 0)`.

    Args:
      coef: per step, at least 0. start: t counts from here; 1 before.

    Raises:
      ValueError: a negative coef or start.

    Source: Bambhaniya et al., Progressive gradient flow for robust N:M sparsity training (2024).
    """
    _check_decay(coef, start)
    return lambda step: jnp.clip(1 - coef * _since(step, start), 0.0, 1.0)


def exponential_mask_decay(*, coef: float, start: int = 0) -> Callable[[Step], Float[Array, ""]]:
    """`exp(-coef * t)`; arguments, errors and source as `linear_mask_decay`."""
    _check_decay(coef, start)
    return lambda step: jnp.exp(-coef * _since(step, start))


def stepwise_nm(
    n: int,
    m: int,
    *,
    kind: Literal["stepwise", "geometric", "densify"] = "stepwise",
    epochs: int,
    dense_epochs: int,
    fine_tune_epochs: int,
    frames: int = 4,
) -> tuple[tuple[int, int, int], ...]:
    """N:M patterns that tighten over training, as rows `(start epoch, n, m)`.

    "stepwise": (m-1):m, then m/2 : m, m/4 : m, ... down to n : m. "geometric": n*j : m*j with j
    halving from `2**(frames-1)`, density constant. "densify": n : m*j.

    Args:
      n, m: the final pattern. kind: how it is reached.
      epochs: in all. dense_epochs: before the first row. fine_tune_epochs: with the last row only.
      frames: how many rows, except for "stepwise".

    Raises:
      ValueError: an unknown kind, frames < 1, no epochs left to decay in, n > m, or for "stepwise"
        an m / n that is no power of two.

    Source: Bambhaniya et al. (2024), structure decay.

    >>> stepwise_nm(1, 8, epochs=10, dense_epochs=2, fine_tune_epochs=0)
    ((2, 7, 8), (4, 4, 8), (6, 2, 8), (8, 1, 8))
    """
    if kind not in ("stepwise", "geometric", "densify"):
        raise ValueError(f"kind is {kind!r}; allowed are 'stepwise', 'geometric' and 'densify'")
    if not 1 <= n <= m:
        raise ValueError(f"n is {n} and m is {m}; allowed is 1 <= n <= m")
    if frames < 1:
        raise ValueError(f"frames is {frames}; it must be at least 1")
    decay = epochs - dense_epochs - fine_tune_epochs
    if min(dense_epochs, fine_tune_epochs) < 0 or decay < 1:
        raise ValueError(
            f"epochs is {epochs}: {dense_epochs} dense and {fine_tune_epochs} fine-tuning leave "
            f"{decay} to decay in"
        )
    if kind == "stepwise":
        ratio = m // n
        if ratio * n != m or ratio & (ratio - 1):
            raise ValueError(f"m / n is {m}/{n}; the stepwise kind needs a power of two")
        patterns = [(m - 1, m), *((m >> k, m) for k in range(1, ratio.bit_length()))]
        patterns = patterns if ratio > 1 else [(n, m)]
    else:
        factors = [2 ** (frames - 1 - k) for k in range(frames)]
        patterns = [(n * j if kind == "geometric" else n, m * j) for j in factors]
    length = decay / len(patterns)
    return tuple((dense_epochs + int(k * length), *row) for k, row in enumerate(patterns))


def cosine_drop(step: Step, *, end: int, alpha: float = 0.3) -> Float[Array, ""]:
    """Share of the active weights to exchange, falling from `alpha` to 0 at `end`.

    Args:
      step: number of the step, from 0; may be traced. end: the step from which it is 0.
      alpha: share at step 0, in [0, 1].

    Raises:
      ValueError: `end < 1` or alpha outside [0, 1].

    Source: Evci et al., Rigging the lottery (2020), section 3.
    """
    if end < 1:
        raise ValueError(f"end is {end}; it must be at least 1")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it must be in [0, 1]")
    step = jnp.asarray(step, jnp.int32)
    share = alpha / 2 * (1 + jnp.cos(math.pi * step.astype(jnp.float32) / end))
    return jnp.where(step < end, share, jnp.float32(0))


def _since(step: Step, start: int) -> Float[Array, ""]:
    return jnp.maximum(jnp.asarray(step, jnp.int32) - start, 0).astype(jnp.float32)


def _check_decay(coef: float, start: int) -> None:
    if coef < 0 or start < 0:
        raise ValueError(f"coef is {coef} and start {start}; neither may be negative")


def _check_range(begin: int, end: int) -> None:
    if begin < 0:
        raise ValueError(f"begin is {begin}; it must not be negative")
    if end < begin:
        raise ValueError(f"end is {end}; it must not come before begin = {begin}")
