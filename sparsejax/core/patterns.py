"""Which zeros are allowed: unstructured, N:M, blocks, channels.

A pattern is a frozen dataclass whose `mask(scores, density)` marks the entries that stay, always
exactly as many as the pattern and the density say. Patterns are static under `jit`; scores and
density may be traced.
"""

import dataclasses
import functools
import itertools
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from sparsejax.core.dtypes import widen
from sparsejax.core.topk import exact_topk_mask, keep_count, ordered_bits

Density = int | float | Float[Array, ""] | None
Ties = Literal["last", "lowest"]


@runtime_checkable
class Pattern(Protocol):
    """Anything that turns scores and a density into a mask of the same shape."""

    def mask(self, scores: Float[Array, "*s"], density: Density = None) -> Bool[Array, "*s"]:
        """Marks the entries that stay."""
        ...


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Any entry may be zero; the largest scores stay.

    Attributes:
      axis: the axes along which entries compete. None: the whole leaf. `-2`: every output of an
        `[in, out]` kernel keeps the same number of inputs (Wanda's rule). `(-2, -1)`: every layer
        of a stacked `[layers, in, out]` leaf by itself.
    """

    axis: int | tuple[int, ...] | None = None

    def mask(self, scores: Float[Array, "*s"], density: Density = None) -> Bool[Array, "*s"]:
        """Keeps `max(1, round(size * density))` of the competing entries, ties to the lowest index.

        Args:
          scores: NaN ranks lowest.
          density: share that stays, in [0, 1]; may be traced.

        Raises:
          ValueError: no density, or one outside [0, 1].
        """
        size = scores.size
        if self.axis is not None:
            axes = (self.axis,) if isinstance(self.axis, int) else self.axis
            size = 1
            for a in axes:
                if not -scores.ndim <= a < scores.ndim:
                    raise ValueError(f"axis {a} is not an axis of shape {scores.shape}")
                size *= scores.shape[a]
        return exact_topk_mask(scores, keep_count(size, _needed(density)), axis=self.axis)


@dataclasses.dataclass(frozen=True)
class NM:
    """Exactly n of every m consecutive entries along `axis` stay.

    Attributes:
      n: entries kept in a group.
      m: group size.
      axis: the axis of the groups; -2 is the input axis of a Flax kernel, dense or convolutional.
        None groups the row-major flattening.
      ties: which of equal scores stays, the one with the "last" or the "lowest" index.
      stride: distance between the members of a group along `axis`. 1: consecutive entries.
        s: a group is entries i, i+s, ..., i+(m-1)s of a run of m*s (the lane layout of TPUs).

    Raises:
      ValueError: n < 1, n > m, stride < 1 or unknown ties.
    """

    n: int
    m: int
    axis: int | None = -2
    ties: Ties = "last"
    stride: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise ValueError(f"NM: n is {self.n} and m is {self.m}; allowed is 1 <= n <= m")
        if self.stride < 1:
            raise ValueError(f"NM: stride is {self.stride}; it must be at least 1")
        if self.ties not in ("last", "lowest"):
            raise ValueError(f"NM: ties is {self.ties!r}; allowed are 'last' and 'lowest'")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @classmethod
    def parse(cls, text: str, **options: int | str | None) -> "NM":
        """Reads `"2:4"`.

        Raises:
          ValueError: when `text` is not two positive integers n:m with n <= m.
        """
        n, colon, m = text.partition(":")
        if not (colon and n.isdecimal() and m.isdecimal()):
            raise ValueError(f"pattern is {text!r}; it must look like 2:4 (kept : group size)")
        return cls(int(n), int(m), **options)  # type: ignore[arg-type]

    def mask(self, scores: Float[Array, "*s"], density: Density = None) -> Bool[Array, "*s"]:
        """`nm_mask` of the scores; a density is ignored unless it is the number 1 (all True)."""
        if isinstance(density, int | float) and density == 1:
            return jnp.ones(scores.shape, bool)
        return nm_mask(scores, self.n, self.m, axis=self.axis, ties=self.ties, stride=self.stride)


def nm_mask(
    scores: Float[Array, "*s"],
    n: int,
    m: int,
    *,
    axis: int | None = -2,
    ties: Ties = "last",
    stride: int = 1,
) -> Bool[Array, "*s"]:
    """Marks the n largest of every group of m along `axis`, without a sort.

    An entry stays when fewer than n entries of its group beat it; every pair of a group is compared
    once. Nothing crosses a group, so on sharded scores whose shards hold whole groups there is no
    communication.

    Args:
      scores: as given (pass `abs(w)` for magnitudes). NaN counts as +inf, so it is kept.
      n: kept in a group. m: group size. axis, ties, stride: see `NM`.

    Returns:
      Booleans with exactly n True a group.

    Raises:
      TypeError: `scores` is not floating point.
      ValueError: impossible n, m, stride or ties, or an axis that `m * stride` does not divide.

    Source: Zhou et al., Learning N:M fine-grained structured sparse neural networks (2021), code:
    ties="last" is their stable ascending sort, ties="lowest" is a top-k.

    >>> nm_mask(jnp.asarray([[1.0, 4.0, 2.0, 3.0]]), 2, 4, axis=-1)
    Array([[False,  True, False,  True]], dtype=bool)
    """
    NM(n, m, axis, ties, stride)  # its checks
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise TypeError(f"scores must be floating point, not {scores.dtype}")
    shape = scores.shape
    if axis is None:
        scores, axis = scores.reshape(-1), 0
    if not -scores.ndim <= axis < scores.ndim:
        raise ValueError(f"axis {axis} is not an axis of shape {shape}")
    axis %= scores.ndim
    length = scores.shape[axis]
    if length % (m * stride):
        raise ValueError(
            f"axis {axis} of shape {shape} has length {length}, not a multiple of "
            + (f"m = {m}" if stride == 1 else f"m * stride = {m * stride}")
        )
    return _nm_mask(scores, n, m, axis, stride, ties).reshape(shape)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _nm_mask(scores: Array, n: int, m: int, axis: int, stride: int, ties: Ties) -> Array:
    keys = ordered_bits(scores, nan="highest")
    groups = keys.shape[axis] // (m * stride)
    grouped = keys.reshape(*keys.shape[:axis], groups, m, stride, *keys.shape[axis + 1 :])
    member = axis + 1
    if m <= 8:  # unrolled: every pair is compared once, and nothing but the mask is stored
        members = [lax.index_in_dim(grouped, i, member, keepdims=False) for i in range(m)]
        ranks = [jnp.zeros(members[0].shape, jnp.uint8)] * m
        for i, j in itertools.combinations(range(m), 2):
            # of equals the later wins under "last", the earlier under "lowest"
            beats = members[i] > members[j] if ties == "last" else members[i] >= members[j]
            ranks[j] += beats.astype(jnp.uint8)
            ranks[i] += (~beats).astype(jnp.uint8)
        kept = jnp.stack([rank < n for rank in ranks], axis=member)
        return kept.reshape(scores.shape)
    index = jnp.arange(m).reshape((m,) + (1,) * (grouped.ndim - member - 1))

    def lose_to(j: int | Array, rank: Array) -> Array:
        rival = lax.dynamic_slice_in_dim(grouped, j, 1, axis=member)
        wins_ties = index < j if ties == "last" else index > j
        beats = (rival > grouped) | ((rival == grouped) & wins_ties)
        return rank + beats.astype(rank.dtype)

    rank = jnp.zeros(grouped.shape, jnp.uint8 if m < 256 else jnp.int32)
    if m <= 16:  # unrolled: one fused pass
        for j in range(m):
            rank = lose_to(j, rank)
    else:
        rank = lax.fori_loop(0, m, lose_to, rank)
    return (rank < n).reshape(scores.shape)


@dataclasses.dataclass(frozen=True)
class Block:
    """Whole blocks stay or go.

    Attributes:
      shape: block size along the leading axes; the axes beyond it are pooled whole. A border block
        may be smaller.
      pool: the score of a block is the "mean" or "max" of the scores in it.

    Raises:
      ValueError: an empty shape, a size below 1, or an unknown pool.

    Source: jaxpruner's block sparsity, with its border rule repaired.
    """

    shape: tuple[int, ...]
    pool: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        if not self.shape or any(size < 1 for size in self.shape):
            raise ValueError(f"Block: shape is {self.shape}; every size must be at least 1")
        if self.pool not in ("mean", "max"):
            raise ValueError(f"Block: pool is {self.pool!r}; allowed are 'mean' and 'max'")

    def mask(self, scores: Float[Array, "*s"], density: Density = None) -> Bool[Array, "*s"]:
        """Keeps `max(1, round(blocks * density))` blocks, ties to the lowest row-major index.

        Args:
          scores: an array with at least as many axes as the block.
          density: share of blocks that stays, in [0, 1]; may be traced.

        Raises:
          ValueError: fewer axes than the block, no density, or one outside [0, 1].
        """
        if scores.ndim < len(self.shape):
            raise ValueError(f"Block: shape {self.shape} has more axes than scores {scores.shape}")
        sizes = self.shape + scores.shape[len(self.shape) :]
        counts = tuple(-(-n // b) if b else 0 for n, b in zip(scores.shape, sizes))
        if scores.size == 0:
            return jnp.zeros(scores.shape, bool)
        padding = [(0, c * b - n) for c, b, n in zip(counts, sizes, scores.shape)]
        split = [part for c, b in zip(counts, sizes) for part in (c, b)]
        inside = tuple(range(1, 2 * scores.ndim, 2))
        if self.pool == "max":
            padded = jnp.pad(scores, padding, constant_values=-jnp.inf)
            pooled = jnp.max(padded.reshape(split), axis=inside)
        else:
            # float32 sums: in bfloat16 many blocks would tie
            wide = widen(scores)
            total = jnp.sum(jnp.pad(wide, padding).reshape(split), axis=inside)
            present = jnp.pad(jnp.ones_like(wide), padding).reshape(split)
            pooled = total / jnp.sum(present, axis=inside)
        kept = exact_topk_mask(pooled, keep_count(pooled.size, _needed(density)), axis=None)
        for a, b in enumerate(sizes):
            kept = jnp.repeat(kept, b, axis=a, total_repeat_length=counts[a] * b)
        return kept[tuple(slice(n) for n in scores.shape)]


@dataclasses.dataclass(frozen=True)
class Channel:
    """Whole channels along `axis` stay or go; a channel's score is the sum over its entries.

    Attributes:
      axis: -1 is the output axis of a Flax kernel.
    """

    axis: int = -1

    def mask(self, scores: Float[Array, "*s"], density: Density = None) -> Bool[Array, "*s"]:
        """Keeps `max(1, round(channels * density))` channels, ties to the lowest index.

        Raises:
          ValueError: no such axis, no density, or one outside [0, 1].
        """
        if not -scores.ndim <= self.axis < scores.ndim:
            raise ValueError(f"Channel: axis {self.axis} is not an axis of shape {scores.shape}")
        axis = self.axis % scores.ndim
        others = tuple(a for a in range(scores.ndim) if a != axis)
        wide = widen(scores)
        total = jnp.sum(wide, axis=others)
        kept = exact_topk_mask(total, keep_count(total.size, _needed(density)), axis=None)
        return jnp.broadcast_to(jnp.expand_dims(kept, others), scores.shape)


def _needed(density: Density) -> int | float | Float[Array, ""]:
    if density is None:
        raise ValueError("density is None; this pattern needs the share of entries that stays")
    return density
