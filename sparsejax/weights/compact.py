"""N:M sparse weights in memory: the kept values, and where in its group each one stands.

A 2:4 weight is stored as its two values per group of four and two 2-bit positions: in bfloat16
1.125 bytes an entry instead of 2. Vendor tensor-core layouts are a further reordering.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree, Shaped, UInt8

from sparsejax.core.patterns import NM, nm_mask
from sparsejax.core.selection import is_array, is_concrete

LARGEST_GROUP = 256  # a position takes a byte at most
UNROLLED = 16  # groups up to this size compile to straight code, larger ones to a loop


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NMCompact:
    """An N:M weight: n values for every m entries, and ceil(log2 m) bits of position for each.

    It stays good as leaves of a larger tree do: `vmap` may add leading axes to its arrays and
    `scan` may take them away.

    Attributes:
      values: shape of the weight with n values for every m entries along `axis`, in ascending
        order of position in each group; or a `Quantized` of such an array.
      packed: uint8, the positions along `axis` one after the other as a stream of bits, the first
        in the low bits of the first byte: for 2:4 four a byte.
      shape: static shape of the weight. axis: static, counted from the front; None for groups of
        the row-major flattening, whose values and positions are flat too.
      n, m, stride: static, see `NM`.
    """

    values: PyTree  # not typed as arrays: JAX puts tangents, specs and shapes in their place
    packed: PyTree
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    axis: int | None = dataclasses.field(metadata={"static": True})
    n: int = dataclasses.field(default=2, metadata={"static": True})
    m: int = dataclasses.field(default=4, metadata={"static": True})
    stride: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def pattern(self) -> NM:
        """The pattern that the weight obeys."""
        return NM(self.n, self.m, axis=self.axis, stride=self.stride)

    @property
    def nbytes(self) -> int:
        """Bytes of values and positions."""
        return self.values.nbytes + self.packed.nbytes


Compressed24 = NMCompact
"""The 2:4 case, which the default n and m are."""


def compress_nm(
    w: Float[Array, "*s"], pattern: NM, *, mask: Bool[Array, "*s"] | None = None
) -> NMCompact:
    """Stores a weight with at most n non-zeros in every group of `pattern`.

    Groups that keep fewer are padded with the entries at the lowest free positions. What is kept
    comes back bit for bit, a negative zero included. Works under `jit`, where entries beyond the
    first n of a group go unseen.

    Args:
      w: any float dtype. pattern: with its axis and stride; `ties` plays no role.
      mask: the entries to keep; None keeps the non-zeros.

    Raises:
      TypeError: `w` is not floating point.
      ValueError: m above 256, an axis that the groups do not divide, or, outside `jit`, a group
        that keeps more than n or a non-zero outside the mask (with how many).

    >>> packed = compress_nm(jnp.asarray([[0.0], [5.0], [0.0], [7.0]]), NM(2, 4))
    >>> packed.values[:, 0], unpack_indices(packed.packed, 2)[:, 0]
    (Array([5., 7.], dtype=float32), Array([1, 3], dtype=uint8))
    """
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"w must be floating point, not {w.dtype}")
    n, m, stride = pattern.n, pattern.m, pattern.stride
    if m > LARGEST_GROUP:
        raise ValueError(f"pattern is {pattern}; m must be at most {LARGEST_GROUP}")
    if mask is not None and mask.shape != w.shape:
        raise ValueError(f"mask has shape {mask.shape}, w {w.shape}")
    shape, flat = tuple(w.shape), pattern.axis is None
    axis = None if flat else _checked_axis(w.ndim, pattern.axis)
    along = axis or 0
    kept = w != 0 if mask is None else mask
    outside = None if mask is None else (w != 0) & ~mask
    if flat:
        w, kept = w.reshape(-1), kept.reshape(-1)
    if w.shape[along] % (m * stride):
        unit = f"{m}" if stride == 1 else f"m * stride = {m * stride}"
        raise ValueError(
            f"axis {pattern.axis if flat else along} of shape {shape} is {w.shape[along]} long; "
            f"{unit} must divide it"
        )
    if is_concrete(kept) and is_concrete(w):
        crowded = int(jnp.sum(_groups(kept, along, m, stride).sum(axis=along + 1) > n))
        if crowded:
            what = "non-zeros" if mask is None else "kept entries"
            raise ValueError(
                f"{crowded} groups of {m} hold more than {n} {what}: w is not {pattern}"
            )
        lost = 0 if outside is None else int(jnp.sum(outside))
        if lost:
            raise ValueError(f"w has {lost} non-zeros outside its mask")
    values, packed = _compress(w, kept, n, m, stride, along)
    return NMCompact(values, packed, shape, axis, n, m, stride)


def decompress_nm(c: NMCompact) -> Float[Array, "..."]:
    """The dense weight of an `NMCompact`; differentiable in the values.

    Raises:
      TypeError: the values are quantised.
    """
    if not is_array(c.values):
        raise TypeError(f"values are {type(c.values).__name__}: call dequantize first")
    if c.axis is None:
        dense = _decompress(c.values, c.packed, c.n, c.m, c.stride, c.values.ndim - 1)
        return dense.reshape(*dense.shape[:-1], *c.shape)
    # counted from the back: leading axes may have come or gone
    axis = c.values.ndim + c.axis - len(c.shape)
    return _decompress(c.values, c.packed, c.n, c.m, c.stride, axis)


def compress_2to4(w: Float[Array, "*s"], *, axis: int = -2) -> NMCompact:
    """`compress_nm` with two of every four along `axis`."""
    return compress_nm(w, NM(2, 4, axis=axis))


def decompress_2to4(c: NMCompact) -> Float[Array, "..."]:
    """The dense weight of a `Compressed24`."""
    return decompress_nm(c)


def index_bits(m: int) -> int:
    """Bits of a position in a group of m."""
    return (m - 1).bit_length()


def pack_indices(indices: UInt8[Array, "..."], *, bits: int, axis: int = -2) -> UInt8[Array, "..."]:
    """Packs small numbers as a stream of bits along `axis`, the first in the low bits.

    Args:
      indices: each below 2^bits. bits: of each, 0 to 8.

    Returns:
      `ceil(count * bits / 8)` bytes along `axis`, the last one filled up with zeros.
    """
    axis = _checked_axis(indices.ndim, axis)
    _check_bits(bits)
    places = _upright(jnp.arange(bits, dtype=jnp.uint8), indices.ndim - axis - 1)
    stream = (jnp.expand_dims(indices, axis + 1) >> places) & jnp.uint8(1)
    shape = (*indices.shape[:axis], indices.shape[axis] * bits, *indices.shape[axis + 1 :])
    return jnp.packbits(stream.reshape(shape), axis=axis, bitorder="little")


def unpack_indices(
    packed: UInt8[Array, "..."], count: int, *, axis: int = -2, bits: int = 2
) -> UInt8[Array, "..."]:
    """The small numbers in a packed array, by default the positions 0 to 3 of 2:4.

    Args:
      packed: a stream of bits along `axis`, the first number in the low bits.
      count: how many there are along `axis`; the rest of the last byte is padding.
      bits: of each, 0 to 8.

    Raises:
      ValueError: more than `packed` can hold, or impossible bits.
    """
    axis = _checked_axis(packed.ndim, axis)
    _check_bits(bits)
    room = 8 * packed.shape[axis] // bits if bits else count
    if not 0 <= count <= room:
        raise ValueError(f"count is {count}; packed holds {room} along {axis}")
    stream = jnp.unpackbits(packed, axis=axis, count=count * bits, bitorder="little")
    shape = (*packed.shape[:axis], count, bits, *packed.shape[axis + 1 :])
    places = _upright(jnp.arange(bits, dtype=jnp.uint8), packed.ndim - axis - 1)
    return jnp.sum(stream.reshape(shape) << places, axis=axis + 1, dtype=jnp.uint8)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _compress(w: Array, kept: Array, n: int, m: int, stride: int, axis: int) -> tuple[Array, Array]:
    # the n places of a group: what is kept, then the lowest free positions
    places = nm_mask(kept.astype(jnp.float32), n, m, axis=axis, ties="lowest", stride=stride)
    rank = _running_sum(_groups(places, axis, m, stride), axis + 1)
    # the position of slot j is how many positions have met at most j places
    slots = _upright(jnp.arange(n, dtype=jnp.int32), w.ndim - axis + 1)
    indices = jnp.sum(jnp.expand_dims(rank, axis + 1) <= slots, axis=axis + 2, dtype=jnp.int32)
    values = jnp.take_along_axis(_groups(w, axis, m, stride), indices, axis=axis + 1)
    shape = (*w.shape[:axis], w.shape[axis] // m * n, *w.shape[axis + 1 :])
    indices = indices.reshape(shape).astype(jnp.uint8)
    return values.reshape(shape), pack_indices(indices, bits=index_bits(m), axis=axis)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _decompress(values: Array, packed: Array, n: int, m: int, stride: int, axis: int) -> Array:
    count = values.shape[axis]
    indices = unpack_indices(packed, count, axis=axis, bits=index_bits(m))
    indices, values = (_groups(x, axis, n, stride) for x in (indices, values))
    position = _upright(jnp.arange(m, dtype=jnp.uint8), values.ndim - axis - 2)
    group = (*values.shape[: axis + 1], m, *values.shape[axis + 2 :])

    def place(j: int | Array, dense: Array) -> Array:
        # selects, not sums: a sum would lose the sign of a zero
        index, value = (
            jax.lax.dynamic_slice_in_dim(x, j, 1, axis=axis + 1) for x in (indices, values)
        )
        return jnp.where(index == position, value, dense)

    dense = jax.lax.fori_loop(0, n, place, jnp.zeros(group, values.dtype), unroll=n <= UNROLLED)
    before, after = values.shape[:axis], values.shape[axis + 3 :]
    return dense.reshape(*before, count // n * m, *after)


def _groups(w: Shaped[Array, "..."], axis: int, size: int, stride: int) -> Shaped[Array, "..."]:
    """`axis` as [groups, size, stride]."""
    runs = w.shape[axis] // (size * stride)
    return w.reshape(*w.shape[:axis], runs, size, stride, *w.shape[axis + 1 :])


def _running_sum(flags: Array, axis: int) -> Array:
    if flags.shape[axis] > UNROLLED:
        return jnp.cumsum(flags, axis=axis, dtype=jnp.int32)
    # unrolled: one fused pass, ten times faster than cumsum on a CPU
    members = jnp.moveaxis(flags, axis, 0).astype(jnp.int32)
    return jnp.stack(list(itertools.accumulate(members)), axis=axis)


def _upright(numbers: Array, after: int) -> Array:
    """Numbers along an axis with `after` more behind it."""
    return numbers.reshape(numbers.shape + (1,) * after)


def _check_bits(bits: int) -> None:
    if not 0 <= bits <= 8:
        raise ValueError(f"bits is {bits}; it must be from 0 to 8")


def _checked_axis(ndim: int, axis: int | None) -> int:
    if axis is None or not -ndim <= axis < ndim:
        raise ValueError(f"axis is {axis}; an array of {ndim} axes has none such")
    return axis % ndim
