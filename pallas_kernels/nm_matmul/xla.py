"""Products with a compressed N:M weight as XLA compiles them well: the path on CPU.

A few rows of x are multiplied with the compact form itself. More of them pay for a dense weight,
written once; its product is then XLA's own, so that this path cannot be faster than a dense one.
"""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.dispatch import target
from pallas_kernels.nm_matmul.layout import Pattern, as_bits, choose, positions, precise, wide

Blocks = None
"""XLA chooses its own."""
FEW_ROWS = 8
"""Rows of x that are multiplied with the compact form, for twice as many both ways take as long."""
AT_ONCE = 4
"""Rows of x in one pass: the sums of pieces of more of them leave the cache."""
LARGEST_CHOICE = 16
"""m up to which an entry of x is chosen by comparisons."""
SLICES = 15
"""XLA fuses a conversion into as many slices of it, and beyond writes it to memory."""


def reasons(
    x: Array, values: Array, packed: Array, pattern: Pattern, *, interpret: object = False
) -> list[str]:
    """It runs everywhere."""
    return []


def product(
    x: Array,
    values: Array,
    packed: Array,
    pattern: Pattern,
    *,
    transpose: bool,
    dtype: jnp.dtype,
    blocks: None,
    interpret: object,
) -> Array:
    """`[b, r]` times W, or `[b, c]` times its transpose, in `dtype`."""
    few = 0 < x.shape[0] <= FEW_ROWS and 1 < pattern.m <= LARGEST_CHOICE and values.size > 0
    if few and not transpose and target().platform == "cpu":
        rows, stored = x.astype(precise(dtype)), as_bits(values)
        found = [
            _compact_product(rows[i : i + AT_ONCE], stored, packed, pattern)
            for i in range(0, x.shape[0], AT_ONCE)
        ]
        return jnp.concatenate(found).astype(dtype)
    w = decompress(values, packed, pattern).astype(dtype)
    contracted = ((1,), (1 if transpose else 0,))
    y = lax.dot_general(
        x.astype(dtype), w, (contracted, ((), ())), preferred_element_type=precise(dtype)
    )
    return y.astype(dtype)


def values_gradient(
    left: Array, right: Array, values: Array, packed: Array, pattern: Pattern
) -> Array:
    """The entries of left^T right, `[b, r]` and `[b, c]`, at the stored positions.

    All implementations use it, through a dense gradient: batches of training have thousands of
    rows, and the dense product takes several times what writing and reading its result does.
    """
    dtype = precise(left.dtype)
    dense = lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=dtype)
    index = positions(packed, values.shape[0], pattern)
    groups = values.shape[0] // pattern.n
    index = index.reshape(groups, pattern.n, values.shape[1])
    dense = dense.reshape(groups, pattern.m, values.shape[1])

    def take(q: int | Array, found: Array) -> Array:
        entry = lax.dynamic_slice_in_dim(dense, q, 1, axis=1)
        return jnp.where(index == jnp.asarray(q, jnp.uint8), entry, found)

    start = jnp.zeros(index.shape, dtype)
    unroll = pattern.m <= LARGEST_CHOICE
    found = lax.fori_loop(0, pattern.m, take, start, unroll=unroll)
    return found.reshape(values.shape).astype(values.dtype)


def decompress(values: Array, packed: Array, pattern: Pattern) -> Array:
    """The dense weight `[r, c]` in the dtype of the values."""
    stored, columns = values.shape
    groups = (stored // pattern.n, pattern.n, 1, columns)
    index = positions(packed, stored, pattern).reshape(groups)
    entries = as_bits(values).reshape(groups)
    place = jnp.arange(pattern.m, dtype=jnp.uint8)[:, None]

    def put(slot: int | Array, dense: Array) -> Array:
        at, entry = (lax.dynamic_index_in_dim(a, slot, 1, keepdims=False) for a in (index, entries))
        return jnp.where(at == place, entry, dense)

    dense = jnp.zeros((groups[0], pattern.m, columns), entries.dtype)
    dense = lax.fori_loop(0, pattern.n, put, dense, unroll=pattern.n <= LARGEST_CHOICE)
    dense = dense.reshape(groups[0] * pattern.m, columns)
    if values.dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(dense, jnp.bfloat16)
    return dense


def _compact_product(x: Array, stored: Array, packed: Array, pattern: Pattern) -> Array:
    """`[b, r]` times W, in the precision of x: sums of pieces of r, then the sum of those."""
    (rows, columns), groups = (x.shape[0], stored.shape[1]), stored.shape[0] // pattern.n
    size = pattern.unit * max(1, SLICES // (pattern.unit * pattern.n))
    pieces = groups // size
    cut = pieces * size
    total = jnp.zeros((rows, columns), x.dtype)
    if pieces:
        parts = _pieces(
            x[:, : cut * pattern.m].reshape(rows, pieces, -1),
            stored[: cut * pattern.n].reshape(pieces, -1, columns),
            packed[: pattern.packed_rows(cut * pattern.n)].reshape(pieces, -1, columns),
            pattern,
        )
        # a loop, because XLA on CPU makes one library call of a sum and the products before it
        total = lax.fori_loop(0, pieces, lambda i, found: found + parts[i], total)
    if cut < groups:
        rest = _pieces(
            x[:, None, cut * pattern.m :],
            stored[None, cut * pattern.n :],
            packed[None, pattern.packed_rows(cut * pattern.n) :],
            pattern,
        )
        total = total + rest[0]
    return total


def _pieces(x: Array, stored: Array, packed: Array, pattern: Pattern) -> Array:
    """The products of pieces, summed in each: `[b, p, g*m]`, `[p, g*n, c]` to `[p, b, c]`.

    Written out, as one elementwise pass along c: x is constant there, and every stored value meets
    the entry of x that the bits of its position choose.
    """
    sums = jnp.zeros((), x.dtype)
    for slot in range(stored.shape[1]):
        first = slot // pattern.n * pattern.m
        leaves = [x[:, :, first + q].T[..., None] for q in range(pattern.m)]
        at = range(slot * pattern.bits, (slot + 1) * pattern.bits)
        bits = [(packed[:, None, b // 8].astype(jnp.uint32) & (1 << b % 8)) != 0 for b in at]
        sums = sums + choose(leaves, bits) * wide(stored[:, None, slot]).astype(x.dtype)
    return sums
