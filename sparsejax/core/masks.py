"""Mask trees: build, apply, count, compare, pack.

A mask tree has exactly the structure of the parameters. A sparse leaf holds a bool array of the
parameter's shape (True = stays), a dense leaf the scalar True, so that
`jax.tree.map(jnp.multiply, params, masks)` is always right.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, UInt8

from sparsejax.core.patterns import Density, Pattern, Unstructured
from sparsejax.core.scores import magnitude
from sparsejax.core.selection import (
    Where,
    align,
    is_array,
    is_concrete,
    is_dense,
    map_selected,
    named_leaves,
)


def make_masks(
    scores: PyTree,
    densities: PyTree = None,
    *,
    pattern: Pattern = Unstructured(),  # noqa: B008 (frozen)
    where: Where = None,
) -> PyTree:
    """Turns scores into masks, every chosen leaf by itself.

    Args:
      scores: tree of score arrays, for example `magnitude(params)`.
      densities: share that stays: one number for the leaves that `where` chooses, or a tree with
        the paths of `scores`, whose leaves that are the Python number 1 stay dense. May be traced.
        None for patterns that fix the density themselves (N:M).
      pattern: which zeros are allowed.
      where: which leaves are sparse, see `selected_paths`; not together with a tree of densities.

    Returns:
      The mask tree, in the structure of `scores`.

    Raises:
      ValueError: naming the leaf, for NaN scores (seen outside `jit` only; inside it they never
        give a wrong-sized mask), an axis that does not fit the pattern or a density outside
        [0, 1]; or when `where` matches nothing.

    >>> params = {"fc": {"kernel": jnp.arange(8.0).reshape(4, 2), "bias": jnp.ones(2)}}
    >>> masks = make_masks(params, 0.25)
    >>> masks["fc"]["kernel"].sum(), masks["fc"]["bias"].shape
    (Array(2, dtype=int32), ())
    """
    if densities is None or not _is_container(densities):
        return map_selected(
            lambda path, leaf: _leaf_mask(path, leaf, densities, pattern),
            scores,
            where=where,
            otherwise=lambda leaf: _dense(),
        )
    if where is not None:
        raise ValueError("where is given, and a tree of densities already says what is sparse")
    shares = jax.tree.leaves(align(densities, scores, name="densities"))
    masks = [
        _dense() if isinstance(share, int | float) and share == 1
        else _leaf_mask(path, leaf, share, pattern)
        for (path, leaf), share in zip(named_leaves(scores), shares)
    ]  # fmt: skip
    return jax.tree.unflatten(jax.tree.structure(scores), masks)


def prune(
    params: PyTree,
    density: Any = None,
    *,
    pattern: Pattern = Unstructured(),  # noqa: B008 (frozen)
    where: Where = None,
) -> tuple[PyTree, PyTree]:
    """Prunes parameters by magnitude, once.

    Args:
      params: any PyTree. density, pattern, where: see `make_masks`.

    Returns:
      The sparse parameters and their masks.

    >>> sparse, masks = prune({"kernel": jnp.asarray([[1.0], [-3.0], [2.0], [0.5]])}, 0.5)
    >>> sparse["kernel"][:, 0]
    Array([ 0., -3.,  2.,  0.], dtype=float32)
    """
    masks = make_masks(magnitude(params), density, pattern=pattern, where=where)
    return apply_masks(params, masks), masks


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    """Sets the pruned entries to zero (also where they are infinite or NaN).

    Args:
      params: any PyTree; leaves that are no arrays pass through.
      masks: a mask tree with the same paths, however it is wrapped.

    Raises:
      ValueError: naming the paths or shapes that differ.
    """

    def apply(leaf: Any, mask: Any) -> Any:
        return leaf if is_dense(mask) else jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))

    return jax.tree.map(apply, params, check_masks(masks, params))


def check_masks(masks: PyTree, params: PyTree) -> PyTree:
    """Brings masks into the structure of the parameters and checks every leaf.

    Leaves that are no arrays need no mask: masks of a filtered Equinox module fit the whole module,
    and the other way round.

    Returns:
      The masks in the containers of `params`.

    Raises:
      ValueError: naming paths that are missing or too many, or a leaf whose shape is neither the
        parameter's nor a scalar's.
      TypeError: naming a leaf that is not bool.
    """
    if jax.tree.structure(masks) != jax.tree.structure(params):
        wanted = dict(named_leaves(params))
        given = {p: m for p, m in named_leaves(masks) if p in wanted or not is_dense(m)}
        masks = align({p: True for p in wanted if not is_array(wanted[p])} | given, params)
    for (path, leaf), mask in zip(named_leaves(params), jax.tree.leaves(masks)):
        if not isinstance(mask, bool) and mask.dtype != jnp.bool_:
            raise TypeError(f"the mask of {path!r} must be bool, not {mask.dtype}")
        if not is_dense(mask) and np.shape(mask) != np.shape(leaf):
            raise ValueError(
                f"the mask of {path!r} has shape {np.shape(mask)}, its parameter {np.shape(leaf)}"
            )
    return masks


def dense_masks(params: PyTree) -> PyTree:
    """The mask tree that prunes nothing: scalar True everywhere."""
    return jax.tree.map(lambda leaf: _dense(), params)


@dataclasses.dataclass(frozen=True)
class MaskCount:
    """Kept and total entries of the sparse leaves.

    Attributes:
      kept: entries that stay. size: entries in all. per_leaf: `{path: (kept, size)}`.
    """

    kept: int
    size: int
    per_leaf: dict[str, tuple[int, int]]

    @property
    def density(self) -> float:
        """Share that stays; 1 when no leaf is sparse."""
        return self.kept / self.size if self.size else 1.0

    def __str__(self) -> str:
        return f"{self.kept:,} of {self.size:,} kept ({self.density:.2%})"


def count_masks(masks: PyTree) -> MaskCount:
    """Counts the sparse leaves of a mask tree, on the host (exact at any size)."""
    sparse = {path: mask for path, mask in named_leaves(masks) if not is_dense(mask)}
    per_leaf = {path: (_count_true(mask), mask.size) for path, mask in sparse.items()}
    kept, size = (sum(column) for column in zip((0, 0), *per_leaf.values()))
    return MaskCount(kept, size, per_leaf)


@dataclasses.dataclass(frozen=True)
class MaskComparison:
    """Two mask trees side by side.

    Attributes:
      changed: bits that differ. both: kept in both. either: kept in at least one.
    """

    changed: int
    both: int
    either: int

    @property
    def overlap(self) -> float:
        """Intersection over union of what is kept (Jaccard index); 1 for equal masks."""
        return self.both / self.either if self.either else 1.0


def compare_masks(first: PyTree, second: PyTree) -> MaskComparison:
    """Compares two mask trees with the same paths, on the host; a dense leaf counts nothing.

    Raises:
      ValueError: other paths, or a leaf that is sparse in one tree only or has another shape.
    """
    both = either = 0
    second_leaves = jax.tree.leaves(align(second, first))
    for (path, a), b in zip(named_leaves(first), second_leaves):
        if np.shape(a) != np.shape(b):
            raise ValueError(f"the masks of {path!r} have shapes {np.shape(a)} and {np.shape(b)}")
        if not is_dense(a):
            both += _count_true(a & b)
            either += _count_true(a | b)
    return MaskComparison(either - both, both, either)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedMask:
    """A mask at one bit an entry.

    Attributes:
      bits: eight entries of the last axis a byte, the first in the highest bit.
      length: static length of the last axis.
    """

    bits: UInt8[Array, "..."]
    length: int = dataclasses.field(metadata={"static": True})


def pack_masks(masks: PyTree) -> PyTree:
    """Packs the sparse leaves to bits, eight times smaller; dense leaves stay the scalar True.

    Works under `jit`; sharding of all axes but the last is kept.

    >>> packed = pack_masks({"w": jnp.ones((3, 16), bool)})
    >>> packed["w"].bits.nbytes, bool(unpack_masks(packed)["w"].all())
    (6, True)
    """

    def pack(mask: Any) -> Any:
        if is_dense(mask):
            return mask
        return PackedMask(jnp.packbits(mask, axis=-1), mask.shape[-1])

    return jax.tree.map(pack, masks)


def unpack_masks(packed: PyTree) -> PyTree:
    """The inverse of `pack_masks`."""

    def unpack(leaf: Any) -> Any:
        if not isinstance(leaf, PackedMask):
            return leaf
        return jnp.unpackbits(leaf.bits, axis=-1, count=leaf.length).astype(bool)

    return jax.tree.map(unpack, packed, is_leaf=lambda leaf: isinstance(leaf, PackedMask))


def leaf_mask(path: str, scores: Array, density: Density, pattern: Pattern) -> Array:
    """`pattern.mask` with the leaf's name in front of any complaint."""
    try:
        return pattern.mask(scores, density)
    except (ValueError, TypeError) as error:
        raise type(error)(f"leaf {path!r}: {error}") from error


def _leaf_mask(path: str, scores: Any, density: Density, pattern: Pattern) -> Array:
    if is_array(scores) and is_concrete(scores):
        missing = int(jnp.isnan(scores).sum())
        if missing:
            raise ValueError(f"leaf {path!r}: {missing} of its {scores.size} scores are NaN")
    return leaf_mask(path, scores, density, pattern)


def _is_container(tree: PyTree) -> bool:
    return jax.tree.structure(tree) != jax.tree.structure(0)


def _count_true(mask: Array) -> int:
    # per row first: a sum over the whole leaf would overflow int32 above 2^31 entries
    rows = jnp.sum(mask, axis=-1, dtype=jnp.int32)
    return int(np.sum(np.asarray(rows), dtype=np.int64))


def _dense() -> Array:
    return jnp.asarray(True)
