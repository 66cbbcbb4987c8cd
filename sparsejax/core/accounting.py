"""What sparsity is worth: densities, operations, bytes, and how much a mask moves.

Reports are made on the host with exact integers, for any size.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from sparsejax.core.masks import check_masks, compare_masks, count_masks
from sparsejax.core.selection import align, is_array, is_dense, named_leaves


def sad(mask_a: PyTree, mask_b: PyTree) -> dict[str, Any]:
    """Sparse architecture divergence: how many mask bits differ.

    Args:
      mask_a, mask_b: mask trees with the same paths; dense leaves count 0.

    Returns:
      `total` (int), `fraction` (of the entries of the sparse leaves; 0 when there are none) and
      `per_leaf`, a tree of ints in the structure of `mask_a`.

    Raises:
      ValueError: other paths, or a leaf that is sparse in one tree only.

    Source: Zhou et al., Learning N:M fine-grained structured sparse neural networks (2021).

    >>> sad({"w": jnp.asarray([True, False])}, {"w": jnp.asarray([False, True])})["total"]
    2
    """
    mask_b = align(mask_b, mask_a)
    per_leaf = jax.tree.map(lambda a, b: compare_masks(a, b).changed, mask_a, mask_b)
    total, size = sum(jax.tree.leaves(per_leaf)), count_masks(mask_a).size
    return {"total": total, "fraction": total / size if size else 0.0, "per_leaf": per_leaf}


def flips(before: PyTree, after: PyTree) -> Int[Array, ""]:
    """Mask bits that differ, as a traced int32: `sad` for use under `jit`, below 2^31 bits.

    Args:
      before, after: mask trees of one structure.
    """
    changed = jax.tree.map(lambda a, b: jnp.sum(a != b, dtype=jnp.int32), before, after)
    return sum(jax.tree.leaves(changed), jnp.zeros((), jnp.int32))


def nonzero_report(
    params: PyTree, masks: PyTree | None = None
) -> tuple[dict[str, tuple[int, int, float]], tuple[int, int, float]]:
    """Non-zeros that are really in the parameters.

    Args:
      params: any PyTree.
      masks: restricts the report to their sparse leaves; None reports every array.

    Returns:
      `{path: (nonzeros, size, sparsity)}` and the same three numbers in total, host integers.
    """
    leaves = [(path, leaf) for path, leaf in named_leaves(params) if is_array(leaf)]
    if masks is not None:
        sparse = count_masks(check_masks(masks, params)).per_leaf
        leaves = [(path, leaf) for path, leaf in leaves if path in sparse]
    report = {path: (_nonzeros(leaf), leaf.size) for path, leaf in leaves}
    kept, size = (sum(column) for column in zip((0, 0), *report.values()))
    with_share = {path: (k, n, _sparsity(k, n)) for path, (k, n) in report.items()}
    return with_share, (kept, size, _sparsity(kept, size))


@dataclasses.dataclass(frozen=True)
class LeafSummary:
    """One leaf of a `SparsitySummary`.

    Attributes:
      path, shape, dtype: of the parameter.
      size: entries. kept: entries that the mask keeps (all, for a dense leaf).
      sparse: whether the leaf has a mask.
      macs: multiply-accumulates of the leaf for one position (token or pixel); 0 for vectors and
        embeddings, which multiply nothing.
      kept_macs: those whose weight stays.
      dense_bytes: stored dense. packed_bytes: kept values and one bit an entry.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    kept: int
    sparse: bool
    macs: int
    kept_macs: int
    dense_bytes: int
    packed_bytes: int


@dataclasses.dataclass(frozen=True)
class SparsitySummary:
    """What a mask tree does to a model, leaf by leaf; print it for a table.

    The operations are what the mask would save in a kernel that skips zeros. A masked dense
    product saves none of them: until the weights are stored compact and multiplied by a kernel
    that knows the pattern, the saving is simulated.
    """

    leaves: tuple[LeafSummary, ...]

    @property
    def size(self) -> int:
        """Entries of all leaves."""
        return sum(leaf.size for leaf in self.leaves)

    @property
    def density(self) -> float:
        """Share of the entries of the sparse leaves that stays; 1 without sparse leaves."""
        sparse = [leaf for leaf in self.leaves if leaf.sparse]
        size = sum(leaf.size for leaf in sparse)
        return sum(leaf.kept for leaf in sparse) / size if size else 1.0

    @property
    def flops(self) -> tuple[int, int]:
        """Floating-point operations for one position, (dense, with zeros skipped); 2 per MAC."""
        return (
            2 * sum(leaf.macs for leaf in self.leaves),
            2 * sum(leaf.kept_macs for leaf in self.leaves),
        )

    @property
    def bytes(self) -> tuple[int, int]:
        """Stored bytes, (dense, kept values with one bit an entry)."""
        return (
            sum(leaf.dense_bytes for leaf in self.leaves),
            sum(leaf.packed_bytes for leaf in self.leaves),
        )

    def __str__(self) -> str:
        head = ("leaf", "shape", "dtype", "kept", "density", "operations", "KiB", "packed KiB")
        rows: list[tuple[str, ...]] = [head]
        for leaf in self.leaves:
            rows.append(
                (
                    leaf.path,
                    "x".join(map(str, leaf.shape)) or "scalar",
                    leaf.dtype,
                    f"{leaf.kept:,}",
                    f"{leaf.kept / max(leaf.size, 1):.4f}" if leaf.sparse else "dense",
                    _short(2 * leaf.kept_macs),
                    f"{leaf.dense_bytes / 1024:,.1f}",
                    f"{leaf.packed_bytes / 1024:,.1f}",
                )
            )
        (dense_bytes, packed), (flops, kept_flops) = self.bytes, self.flops
        kept = sum(leaf.kept for leaf in self.leaves)
        rows.append(
            (
                "total",
                "",
                "",
                f"{kept:,}",
                f"{kept / max(self.size, 1):.4f}",
                _short(kept_flops),
                f"{dense_bytes / 1024:,.1f}",
                f"{packed / 1024:,.1f}",
            )
        )
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 3 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths))
            ).rstrip()
            for row in rows
        ]
        saved = 1 - kept_flops / flops if flops else 0.0
        lines.append(
            f"sparse leaves at density {self.density:.4f}; {_short(flops)} operations for one "
            f"position dense, {saved:.1%} fewer in a kernel that skips zeros (simulated until then)"
        )
        return "\n".join(lines)


def summarize(params: PyTree, masks: PyTree) -> SparsitySummary:
    """Makes the summary of a model: densities, operations and bytes of every leaf.

    Args:
      params: arrays or `jax.ShapeDtypeStruct`s.
      masks: a mask tree with the same paths.

    Raises:
      ValueError: masks of another structure or shape.
    """
    masks = check_masks(masks, params)
    counts = count_masks(masks).per_leaf
    leaves = []
    for (path, leaf), mask in zip(named_leaves(params), jax.tree.leaves(masks)):
        if not is_array(leaf):
            continue
        size = math.prod(leaf.shape)
        sparse = not is_dense(mask)
        kept = counts[path][0] if sparse else size
        macs = size if _multiplies(path, leaf) else 0
        itemsize = np.dtype(leaf.dtype).itemsize
        leaves.append(
            LeafSummary(
                path=path,
                shape=tuple(leaf.shape),
                dtype=str(leaf.dtype),
                size=size,
                kept=kept,
                sparse=sparse,
                macs=macs,
                kept_macs=kept if macs else 0,
                dense_bytes=size * itemsize,
                packed_bytes=kept * itemsize + (-(-size // 8) if sparse else 0),
            )
        )
    return SparsitySummary(tuple(leaves))


def _short(count: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _multiplies(path: str, leaf: Any) -> bool:
    return leaf.ndim >= 2 and "embed" not in path.lower() and "norm" not in path.lower()


def _nonzeros(leaf: Array) -> int:
    rows = jnp.sum(jnp.atleast_1d(leaf) != 0, axis=-1, dtype=jnp.int32)
    return int(np.sum(np.asarray(rows), dtype=np.int64))


def _sparsity(kept: int, size: int) -> float:
    return 1 - kept / size if size else 0.0
