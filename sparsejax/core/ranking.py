"""Masks from scores over a whole model: global or per leaf, and at random."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from sparsejax.core.dtypes import widen
from sparsejax.core.masks import make_masks
from sparsejax.core.scores import random
from sparsejax.core.selection import Where, is_concrete, named_leaves, selected_paths
from sparsejax.core.topk import exact_topk_mask, global_topk_masks, keep_count

Count = Literal["nearest", "keep_floor", "prune_floor"]


def masks_from_scores(
    scores: PyTree,
    density: float,
    *,
    scope: Literal["global", "local"] = "global",
    largest: bool = True,
    normalize: bool = False,
    count: Count = "nearest",
    where: Where = None,
) -> PyTree:
    """Keeps the best entries of all chosen leaves together, or of each by itself.

    Ranking is by bisection: nothing is concatenated, sorted or gathered.

    Args:
      scores: tree of score arrays; NaN ranks lowest, ties go to the earlier leaf in tree order and
        then to the lowest row-major index.
      density: share that stays, in (0, 1].
      scope: "global": a leaf may become empty. "local": every leaf gets the density.
      largest: keep the largest scores; False keeps the smallest (GraSP).
      normalize: divide the scores of a leaf by their L2 norm plus 1e-8 first.
      count: how many of N stay. "nearest": `max(1, round(N * density))`; "keep_floor":
        `int(density * N)`; "prune_floor": `N - int((1 - density) * N)`.
      where: which leaves, see `selected_paths`.

    Returns:
      The mask tree, in the structure of `scores`.

    Raises:
      ValueError: a density outside (0, 1], an unknown scope or count, NaN scores (outside `jit`,
        naming the leaf), or `where` that matches nothing.

    >>> scores = {"a": jnp.asarray([4.0, 1.0]), "b": jnp.asarray([3.0, 2.0])}
    >>> masks_from_scores(scores, 0.5, where=".")["b"]
    Array([ True, False], dtype=bool)
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}; it must be in (0, 1]")
    if scope not in ("global", "local"):
        raise ValueError(f"scope is {scope!r}; allowed are 'global' and 'local'")
    if count not in ("nearest", "keep_floor", "prune_floor"):
        raise ValueError(
            f"count is {count!r}; allowed are 'nearest', 'keep_floor' and 'prune_floor'"
        )
    chosen = set(selected_paths(scores, where))
    leaves = [leaf for path, leaf in named_leaves(scores) if path in chosen]
    for path, leaf in named_leaves(scores):
        if path in chosen and is_concrete(leaf) and bool(jnp.isnan(leaf).any()):
            raise ValueError(f"leaf {path!r}: its scores hold NaN")
    ranked = [_ranked(leaf, largest, normalize) for leaf in leaves]
    if scope == "global":
        kept = global_topk_masks(ranked, _keep(sum(x.size for x in ranked), density, count))
    else:
        kept = [exact_topk_mask(x, _keep(x.size, density, count), axis=None) for x in ranked]
    masks = iter(kept)
    out = [next(masks) if path in chosen else jnp.asarray(True) for path, _ in named_leaves(scores)]
    return jax.tree.unflatten(jax.tree.structure(scores), out)


def random_masks(
    key: PRNGKeyArray,
    params: PyTree,
    densities: PyTree,
    *,
    exact: bool = True,
    where: Where = None,
) -> PyTree:
    """Masks with uniformly random positions.

    Args:
      key: PRNG key.
      params: gives the shapes.
      densities: one number for the leaves that `where` chooses, or a tree, see `make_masks`.
      exact: exactly `max(1, round(N * density))` entries a leaf; False draws every entry by itself.

    Raises:
      ValueError: a density outside [0, 1], or as `make_masks`.
    """
    noise = random(key, params)
    if exact:
        return make_masks(noise, densities, where=where)
    return make_masks(noise, densities, where=where, pattern=_Bernoulli())


class _Bernoulli:
    """Keeps every entry with probability `density`, given uniform scores."""

    def mask(self, scores: Array, density: Any = None) -> Array:
        if density is None or (is_concrete(density) and not 0 <= density <= 1):
            raise ValueError(f"density is {density}; it must be in [0, 1]")
        return scores < density


def _ranked(scores: Array, largest: bool, normalize: bool) -> Array:
    wide = widen(scores)
    if normalize:
        wide = wide / (jnp.linalg.norm(wide.reshape(-1)) + 1e-8)
    return wide if largest else -wide


def _keep(size: int, density: float, count: Count) -> Any:
    if count == "nearest":
        return keep_count(size, density)
    return int(density * size) if count == "keep_floor" else size - int((1 - density) * size)
