"""Which blocks of a weight are stored: index lists, their transpose, their checks and conversions.

A weight `[o, k]` is cut into r block rows of bo outputs and c block columns of bk inputs. Block row
i stores `counts[i]` of its blocks, those at the block columns `indices[i, :counts[i]]`, in any
order; `[r, s]` lists have room for s blocks a row, and what lies beyond a count is ignored.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Int32


class Lists(NamedTuple):
    """The lists of a weight; without counts every entry counts."""

    indices: Int32[Array, "r s"]
    counts: Int32[Array, "r"] | None

    @property
    def lengths(self) -> Int32[Array, "r"]:
        """The count of every row."""
        if self.counts is not None:
            return self.counts
        return jnp.full(self.indices.shape[:1], self.indices.shape[1], jnp.int32)

    def keep(self, entries: Array, other: int = 0) -> Array:
        """Entries `[r, s, ...]` where they count, elsewhere another number."""
        if self.counts is None:
            return entries
        used = jnp.arange(self.indices.shape[1], dtype=jnp.int32) < self.counts[:, None]
        used = used.reshape(used.shape + (1,) * (entries.ndim - 2))
        return jnp.where(used, entries, jnp.asarray(other, entries.dtype))


class Entries(NamedTuple):
    """The stored blocks by what they add to: what a kernel goes through.

    Block i of a result is the sum over `starts[i] <= e < starts[i] + counts[i]` of a stored block,
    or its transpose, times block `sources[e]` of the operand.

    Attributes:
      slots: which stored block, an index into the flattened `[r * s]`.
      sources: which block of the operand.
      owners: which block of the result; ascending, also where an entry is not used.
      starts, counts: of every block of the result.
    """

    slots: Int32[Array, "e"]
    sources: Int32[Array, "e"]
    owners: Int32[Array, "e"]
    starts: Int32[Array, "n"]
    counts: Int32[Array, "n"]


class Packed(NamedTuple):
    """A weight as stored blocks.

    Attributes:
      values: the blocks. indices, counts: their lists; indices ascend within a row.
      overflow: blocks that found no room and are lost.
    """

    values: Float[Array, "r s bo bk"]
    indices: Int32[Array, "r s"]
    counts: Int32[Array, "r"]
    overflow: Int32[Array, ""]


def by_rows(lists: Lists) -> Entries:
    """The entries of a product with the weight: results are block rows."""
    r, s = lists.indices.shape
    first = jnp.arange(r, dtype=jnp.int32)
    return Entries(
        slots=jnp.arange(r * s, dtype=jnp.int32),
        sources=lists.keep(lists.indices).reshape(-1),
        owners=jnp.repeat(first, s),
        starts=first * s,
        counts=lists.lengths,
    )


def transpose_lists(
    indices: Int[Array, "r s"], counts: Int[Array, "r"] | None = None, *, num_columns: int
) -> Entries:
    """The same blocks by block column, for products with the transposed weight.

    Sizes do not depend on the data: there are as many entries as in the lists, and nothing can
    overflow. The entries of a column are in the order of their rows; padding comes last.

    Args:
      indices: block columns. counts: blocks in use a row; None uses all.
      num_columns: block columns of the weight, c.

    Returns:
      Entries with block rows as `sources` and a start and a count for each of c columns.

    >>> entries = transpose_lists(jnp.asarray([[2, 0], [2, 1]]), num_columns=3)
    >>> entries.sources.tolist(), entries.starts.tolist(), entries.counts.tolist()
    ([0, 1, 0, 1], [0, 1, 2], [1, 1, 2])
    """
    lists = as_lists(indices, counts)
    keys = lists.keep(lists.indices, num_columns).reshape(-1)
    slots = jnp.argsort(keys, stable=True).astype(jnp.int32)
    columns = keys[slots]
    bounds = jnp.arange(num_columns + 1, dtype=jnp.int32)
    starts = jnp.searchsorted(columns, bounds).astype(jnp.int32)
    return Entries(
        slots=slots,
        sources=slots // indices.shape[1],
        owners=jnp.minimum(columns, num_columns - 1),
        starts=starts[:-1],
        counts=starts[1:] - starts[:-1],
    )


def as_lists(indices: Int[Array, "r s"], counts: Int[Array, "r"] | None) -> Lists:
    """Lists of 32 bits."""
    return Lists(indices.astype(jnp.int32), None if counts is None else counts.astype(jnp.int32))


def check_lists(
    indices: Int[Array, "r s"], counts: Int[Array, "r"] | None = None, *, num_columns: int
) -> None:
    """Refuses lists that name a block twice, or one that does not exist.

    It reads the lists, so it is for concrete arrays, outside of `jit`; the op itself checks shapes
    alone.

    Args:
      indices: block columns. counts: blocks in use a row; None uses all.
      num_columns: block columns of the weight.

    Raises:
      TypeError: traced lists.
      ValueError: a count outside [0, s], an index outside [0, num_columns) or one that comes twice
        in its row, with the first row where that is so.

    >>> check_lists(jnp.asarray([[0, 2], [1, 1]]), jnp.asarray([2, 1]), num_columns=3)
    """
    if any(isinstance(v, Tracer) for v in (indices, counts)):
        raise TypeError("indices and counts are traced; check_lists reads them outside of jit")
    table, room = np.asarray(indices), indices.shape[1]
    limits = np.full(len(table), room) if counts is None else np.asarray(counts)
    for row, (entries, count) in enumerate(zip(table, limits)):
        if not 0 <= count <= room:
            raise ValueError(f"counts[{row}] is {count}; it must be in [0, {room}]")
        named = entries[:count]
        outside = named[(named < 0) | (named >= num_columns)]
        if outside.size:
            raise ValueError(
                f"indices[{row}] names block {outside[0]}; it must be in [0, {num_columns})"
            )
        blocks, times = np.unique(named, return_counts=True)
        if np.any(times > 1):
            raise ValueError(f"indices[{row}] names block {blocks[times > 1][0]} twice")


def from_dense(
    w: Float[Array, "o k"],
    mask: Bool[Array, "a b"],
    *,
    block: tuple[int, int],
    capacity: int,
) -> Packed:
    """The blocks of a weight that a mask keeps; sizes depend on `capacity` alone.

    Args:
      w: outputs by inputs.
      mask: of entries `[o, k]`: a block is stored where any entry stays, with zeros for the others;
        or of blocks `[o/bo, k/bk]`.
      block: (bo, bk), which divide o and k. Static.
      capacity: blocks that a row has room for. Static.

    Returns:
      `Packed`; rows with more blocks than room lose those at the end, and `overflow` counts them.
      w is differentiated.

    Raises:
      ValueError: a block that does not divide w, a mask of neither shape, or a capacity outside
        [1, k/bk].

    >>> packed = from_dense(jnp.eye(4), jnp.eye(4) > 0, block=(2, 1), capacity=2)
    >>> packed.indices.tolist(), packed.counts.tolist(), int(packed.overflow)
    ([[0, 1], [2, 3]], [2, 2], 0)
    """
    (o, k), (bo, bk) = w.shape, block
    if bo < 1 or bk < 1 or o % bo or k % bk:
        raise ValueError(f"block is {block}; it must divide w of shape {w.shape}")
    r, c = o // bo, k // bk
    if mask.shape not in ((o, k), (r, c)):
        raise ValueError(f"mask has shape {mask.shape}; it must be {(o, k)} or {(r, c)}")
    if not 1 <= capacity <= c:
        raise ValueError(f"capacity is {capacity}; it must be in [1, {c}]")
    if mask.shape == w.shape:
        w = jnp.where(mask, w, jnp.zeros_like(w))
        mask = jnp.any(mask.reshape(r, bo, c, bk), axis=(1, 3))
    wanted = jnp.sum(mask, axis=1, dtype=jnp.int32)
    counts = jnp.minimum(wanted, capacity)
    place = jnp.where(mask, jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, capacity)
    rows = jnp.arange(r, dtype=jnp.int32)[:, None]
    columns = jnp.broadcast_to(jnp.arange(c, dtype=jnp.int32), (r, c))
    indices = jnp.zeros((r, capacity), jnp.int32).at[rows, place].set(columns, mode="drop")
    lists = Lists(indices, counts)
    values = lists.keep(w.reshape(r, bo, c, bk).swapaxes(1, 2)[rows, indices])
    return Packed(values, indices, counts, jnp.sum(wanted - counts, dtype=jnp.int32))


def to_dense(
    values: Float[Array, "r s bo bk"],
    indices: Int[Array, "r s"],
    counts: Int[Array, "r"] | None = None,
    *,
    num_columns: int,
) -> Float[Array, "o k"]:
    """The weight `[r * bo, num_columns * bk]` that stored blocks stand for.

    Args:
      values, indices, counts: see `pallas_kernels.block_sparse_matmul`; values are differentiated.
      num_columns: block columns of the weight.

    >>> to_dense(jnp.ones((2, 1, 1, 2)), jnp.asarray([[1], [0]]), num_columns=2).tolist()
    [[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]]
    """
    r, _, bo, bk = values.shape
    lists = as_lists(indices, counts)
    rows = jnp.arange(r, dtype=jnp.int32)[:, None]
    at = lists.keep(lists.indices, num_columns)
    blocks = jnp.zeros((r, num_columns, bo, bk), values.dtype).at[rows, at].add(values, mode="drop")
    return blocks.swapaxes(1, 2).reshape(r * bo, num_columns * bk)
