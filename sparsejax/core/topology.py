"""Where the ones of a mask are: exploration over time, similarity, satisfied granularities."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from sparsejax.core.card import Granularity
from sparsejax.core.costs import Shapes, leaf_sizes
from sparsejax.core.masks import check_masks
from sparsejax.core.scores import random
from sparsejax.core.selection import align, is_concrete, is_dense, named_leaves
from sparsejax.core.topk import exact_topk_mask


def exploration_update(ever_active: PyTree, masks: PyTree) -> PyTree:
    """Adds the active weights of a mask tree to those that ever were; works under `jit`.

    Raises:
      ValueError: trees of another structure or shape.
    """
    return jax.tree.map(jnp.logical_or, ever_active, check_masks(masks, ever_active))


def exploration_rate(ever_active: PyTree, *, shapes: Shapes | None = None) -> Float[Array, ""]:
    """Share of the weights that were active at some time (in-time over-parameterisation rate).

    Args:
      ever_active: from `exploration_update`. Leaves that are the scalar True are skipped,
      shapes: unless the parameters' shapes are given; then they count as active.

    Raises:
      ValueError: nothing to count.

    Source: Liu et al., Do we actually need dense over-parameterization? (2021).
    """
    active = [jnp.sum(m, dtype=jnp.int32) for m in jax.tree.leaves(ever_active) if not is_dense(m)]
    dense = 0
    sizes = {p: m.size for p, m in named_leaves(ever_active) if not is_dense(m)}
    if shapes is not None:
        everything = leaf_sizes(ever_active, shapes)
        dense = sum(size for path, size in everything.items() if path not in sizes)
        sizes = everything
    total = sum(sizes.values())
    if not total:
        raise ValueError("ever_active has no sparse leaf: there is nothing to count")
    return (_sum(active) + dense) / total


def mask_jaccard(a: PyTree, b: PyTree) -> Float[Array, ""]:
    """Intersection over union of two mask trees, counted over all sparse leaves together.

    Raises:
      ValueError: trees of another structure, or (outside `jit`) two empty masks; NaN under `jit`.
    """
    pairs = _pairs(a, b)
    return _ratio(
        _sum([jnp.sum(x & y) for x, y in pairs]), _sum([jnp.sum(x | y) for x, y in pairs])
    )


def mask_hamming(a: PyTree, b: PyTree) -> Float[Array, ""]:
    """Share of the entries in which two mask trees differ; errors as `mask_jaccard`."""
    pairs = _pairs(a, b)
    size = jnp.asarray(float(sum(x.size for x, _ in pairs)))
    return _ratio(_sum([jnp.sum(x ^ y) for x, y in pairs]), size)


def mask_overlap(a: PyTree, b: PyTree) -> Float[Array, ""]:
    """Intersection over the smaller of two mask trees; errors as `mask_jaccard`."""
    pairs = _pairs(a, b)
    first, second = (_sum([jnp.sum(pair[i]) for pair in pairs]) for i in (0, 1))
    return _ratio(_sum([jnp.sum(x & y) for x, y in pairs]), jnp.minimum(first, second))


def fraction_groups_2_of_4(mask: Bool[Array, "*s"], *, axis: int = -1) -> Float[Array, ""]:
    """Share of the groups of 4 along an axis with at most two ones; an incomplete tail is left out.

    Args:
      mask: bool. axis: of the groups; hardware groups run along -2 of a Flax kernel.

    Raises:
      ValueError: no such axis, or an axis shorter than 4.
    """
    counts = _group_counts(mask, axis)
    return jnp.mean((counts <= 2).astype(_float()))


def block_occupancy(mask: Bool[Array, "*s"], block: tuple[int, int] = (4, 1)) -> Float[Array, ""]:
    """Share of the blocks that hold any one; all leading axes are rows, tails are left out.

    Args:
      mask: two axes or more. block: rows and columns.

    Raises:
      ValueError: a block below 1 or larger than the mask.
    """
    counts = _block_counts(mask, block)
    return jnp.mean((counts > 0).astype(_float()))


def satisfied_granularities(
    mask: Bool[Array, "*s"], *, axis: int = -2, block: tuple[int, int] = (4, 1)
) -> set[Granularity]:
    """All granularities that a mask could be stored in, on the host.

    Always unstructured; N:M if every group of 4 along `axis` has at most two ones; block if every
    block is all ones or all zeros; channel if every slice of the last axis is.

    Args:
      mask: two axes or more. axis: of the N:M groups. block: rows and columns.
    """
    found = {Granularity.UNSTRUCTURED}
    if mask.shape[axis] % 4 == 0 and bool((_group_counts(mask, axis) <= 2).all()):
        found.add(Granularity.N_M)
    rows = mask.reshape(-1, mask.shape[-1])
    if rows.shape[0] % block[0] == 0 and rows.shape[1] % block[1] == 0:
        counts = _block_counts(mask, block)
        if bool(((counts == 0) | (counts == block[0] * block[1])).all()):
            found.add(Granularity.BLOCK)
    columns = rows.sum(0)
    if bool(((columns == 0) | (columns == rows.shape[0])).all()):
        found.add(Granularity.CHANNEL)
    return found


def shuffle_within_layer(key: PRNGKeyArray, masks: PyTree) -> PyTree:
    """As many ones in every leaf, at uniformly random positions; works under `jit`.

    Args:
      key: PRNG key. masks: a mask tree; dense leaves stay.
    """
    floats = jax.tree.map(lambda m: m.astype(jnp.float32), masks)
    noise = random(key, floats)

    def one(mask: Array, scores: Array) -> Array:
        if is_dense(mask):
            return mask
        return exact_topk_mask(scores, jnp.sum(mask, dtype=jnp.int32), axis=None)

    return jax.tree.map(one, masks, noise)


def _pairs(a: PyTree, b: PyTree) -> list[tuple[Array, Array]]:
    b = align(b, a)
    pairs = []
    for (path, x), y in zip(named_leaves(a), jax.tree.leaves(b)):
        if jnp.shape(x) != jnp.shape(y):
            raise ValueError(f"the masks of {path!r} have shapes {jnp.shape(x)} and {jnp.shape(y)}")
        for mask in (x, y):
            if not isinstance(mask, bool) and mask.dtype != jnp.bool_:
                raise ValueError(f"the mask of {path!r} is {mask.dtype}; it must be bool")
        if not is_dense(x):
            pairs.append((x, y))
    if not pairs:
        raise ValueError("the masks have no sparse leaf: there is nothing to compare")
    return pairs


def _ratio(above: Any, below: Any) -> Array:
    if is_concrete(below) and not float(below):
        raise ValueError("the masks are empty: the ratio has no value")
    return above / below


def _sum(counts: list[Array]) -> Array:
    return sum((c.astype(_float()) for c in counts), jnp.zeros((), _float()))


def _float() -> Any:
    return jnp.zeros(()).dtype  # float64 under x64


def _group_counts(mask: Array, axis: int) -> Array:
    if not -mask.ndim <= axis < mask.ndim or mask.shape[axis] < 4:
        raise ValueError(f"axis {axis} of shape {mask.shape} holds no group of 4")
    rows = jnp.moveaxis(mask, axis, -1)
    whole = rows[..., : rows.shape[-1] // 4 * 4]
    return whole.reshape(*whole.shape[:-1], -1, 4).sum(-1)


def _block_counts(mask: Array, block: tuple[int, int]) -> Array:
    rows = mask.reshape(-1, mask.shape[-1])
    high, wide = (n // b if b > 0 else 0 for n, b in zip(rows.shape, block))
    if not high or not wide:
        raise ValueError(f"block is {block}; the mask is {rows.shape[0]} rows x {rows.shape[1]}")
    whole = rows[: high * block[0], : wide * block[1]]
    return whole.reshape(high, block[0], wide, block[1]).sum((1, 3))
