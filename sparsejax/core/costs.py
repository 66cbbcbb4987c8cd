"""What a sparse network costs: entries, operations of training, bytes; and its dense match.

All on the host, with exact integers.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from jaxtyping import PyTree

from sparsejax.core.masks import check_masks, count_masks
from sparsejax.core.selection import Where, is_array, is_dense, named_leaves, selected_paths

Shapes = PyTree


@dataclasses.dataclass(frozen=True)
class DensityReport:
    """Entries that stay.

    Attributes:
      layers: `{path: (kept, size, density)}` of the chosen leaves.
      density: over all parameters. prunable_density: over the chosen leaves.
    """

    layers: dict[str, tuple[int, int, float]]
    density: float
    prunable_density: float

    @property
    def sparsity(self) -> float:
        """Share of the chosen leaves' entries that is pruned."""
        return 1 - self.prunable_density


def density_report(params: PyTree, masks: PyTree, *, where: Where = None) -> DensityReport:
    """Densities from the masks, over all parameters and over the chosen leaves; sums, never means.

    Args:
      params: arrays or `jax.ShapeDtypeStruct`s. masks: with the same paths.
      where: the prunable leaves, see `selected_paths`.

    Raises:
      ValueError: masks of another structure, or `where` matches nothing.
    """
    kept = count_masks(check_masks(masks, params)).per_leaf
    sizes = {path: math.prod(leaf.shape) for path, leaf in named_leaves(params) if is_array(leaf)}
    counts = {path: kept.get(path, (size, size))[0] for path, size in sizes.items()}
    chosen = selected_paths(params, where)
    layers = {p: (counts[p], sizes[p], counts[p] / max(sizes[p], 1)) for p in chosen}
    return DensityReport(
        layers,
        sum(counts.values()) / max(sum(sizes.values()), 1),
        sum(counts[p] for p in chosen) / max(sum(sizes[p] for p in chosen), 1),
    )


@dataclasses.dataclass(frozen=True)
class FlopsReport:
    """Floating-point operations of the forward pass of one example, 2 per multiply-accumulate.

    Attributes:
      layers: `{path: (sparse, dense)}`. sparse, dense: in total.
    """

    layers: dict[str, tuple[int, int]]
    sparse: int
    dense: int


def flops_report(
    masks: PyTree, output_positions: Mapping[str, int], *, shapes: Shapes | None = None
) -> FlopsReport:
    """Counts operations from masks and the number of positions that each kernel produces.

    Args:
      masks: a mask tree.
      output_positions: `{path: height * width}` of every leaf that multiplies, 1 for linear.
      shapes: the parameters, or their shapes; needed for leaves whose mask is the scalar True.

    Raises:
      ValueError: a path that matches no leaf, a sparse leaf without positions, or a dense leaf
        without its shape.
    """
    sizes = leaf_sizes(masks, shapes)
    kept = count_masks(masks).per_leaf
    unknown = sorted(set(output_positions) - {path for path, _ in named_leaves(masks)})
    if unknown:
        raise ValueError(f"output_positions: {unknown[0]!r} matches no leaf")
    missing = sorted(set(kept) - set(output_positions))
    if missing:
        raise ValueError(f"output_positions has no entry for {missing[0]!r}")
    layers = {}
    for path, positions in output_positions.items():
        size = sizes.get(path)
        if size is None:
            raise ValueError(f"shapes is needed: the mask of {path!r} is the scalar True")
        nonzeros = kept.get(path, (size, size))[0]
        layers[path] = (2 * positions * nonzeros, 2 * positions * size)
    return FlopsReport(layers, *(sum(v[i] for v in layers.values()) for i in (0, 1)))


def training_flops(
    method: Literal["dense", "static", "rigl", "snfs", "gradual", "ste"],
    *,
    sparse: int | float,
    dense: int | float,
    interval: int | None = None,
    sparsities: Sequence[float] | None = None,
) -> int | float:
    """Operations of one training step for one example; a backward pass costs two forward passes.

    Args:
      method: how the network is trained.
      sparse, dense: operations of the forward pass with and without zeros.
      interval: steps between two mask updates, for "rigl".
      sparsities: sparsity at every step, for "gradual" with uniform ratios.

    Raises:
      ValueError: an unknown method, interval < 1, or the argument that the method needs missing.

    Source: Evci et al., Rigging the lottery (2020), appendix; Liu & Wang (2023).

    >>> round(training_flops("rigl", sparse=1.0, dense=10.0, interval=100), 4)
    3.0891
    """
    if method == "dense":
        return 3 * dense
    if method == "static":
        return 3 * sparse
    if method == "rigl":
        if interval is None or interval < 1:
            raise ValueError(f"interval is {interval}; rigl needs at least 1")
        return (3 * sparse * interval + 2 * sparse + dense) / (interval + 1)
    if method in ("snfs", "ste"):
        return 2 * sparse + dense
    if method == "gradual":
        if not sparsities:
            raise ValueError("sparsities is missing; gradual needs the sparsity of every step")
        return 3 * dense * sum(1 - s for s in sparsities) / len(sparsities)
    allowed = "dense, static, rigl, snfs, gradual, ste"
    raise ValueError(f"method is {method!r}; allowed are {allowed}")


def storage_bytes(
    masks: PyTree, format: Literal["dense", "bitmask", "csr"], *, shapes: Shapes | None = None
) -> int:
    """Bytes of float32 weights under a storage format, summed over the leaves.

    Args:
      masks: a mask tree; a leaf whose mask is the scalar True is stored dense in every format.
      format: "dense" 4N; "bitmask" 4 a kept entry and one bit an entry; "csr" 8 a kept entry and 4
        a row (rows are output features, the last axis) and one.
      shapes: the parameters, or their shapes; needed for leaves whose mask is the scalar True.

    Raises:
      ValueError: an unknown format, or a dense leaf without its shape.
    """
    if format not in ("dense", "bitmask", "csr"):
        raise ValueError(f"format is {format!r}; allowed are dense, bitmask, csr")
    sizes, kept = leaf_sizes(masks, shapes), count_masks(masks).per_leaf
    total = 0
    for path, mask in named_leaves(masks):
        if path not in sizes:
            raise ValueError(f"shapes is needed: the mask of {path!r} is the scalar True")
        size = sizes[path]
        if format == "dense" or is_dense(mask):
            total += 4 * size
        elif format == "bitmask":
            total += 4 * kept[path][0] + -(-size // 8)
        else:
            total += 8 * kept[path][0] + 4 * (mask.shape[-1] + 1)
    return total


def match_dense_width(
    count_fn: Callable[[int], int | float], target: int | float, *, low: int = 1, high: int = 65536
) -> int:
    """The width of a dense network whose count is nearest to a target; of two, the smaller.

    Args:
      count_fn: width -> non-zeros or operations; it must grow with the width.
      target: what is to be matched. low, high: the widths to choose from.

    Raises:
      ValueError: low > high or low < 1.

    >>> match_dense_width(lambda width: 10 * width, 52)
    5
    """
    if not 1 <= low <= high:
        raise ValueError(f"low is {low} and high {high}; allowed is 1 <= low <= high")
    left, right = low, high
    while left < right:  # the first width whose count reaches the target
        middle = (left + right) // 2
        if count_fn(middle) >= target:
            right = middle
        else:
            left = middle + 1
    if left > low and target - count_fn(left - 1) <= abs(count_fn(left) - target):
        return left - 1
    return left


def leaf_sizes(masks: PyTree, shapes: Shapes | None) -> dict[str, int]:
    """Entries of every leaf whose shape is known, from its mask or from `shapes`, by path."""
    found: dict[str, int] = {}
    if shapes is not None:
        check_masks(masks, shapes)
        found = {p: math.prod(leaf.shape) for p, leaf in named_leaves(shapes) if is_array(leaf)}
    sparse: dict[str, Any] = {p: m for p, m in named_leaves(masks) if not is_dense(m)}
    return found | {path: math.prod(mask.shape) for path, mask in sparse.items()}
