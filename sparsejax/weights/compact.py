"""Storing sparse weights: the compressed 2:4 form and a file for whole models.

A 2:4 weight is stored as its two values per group of four and two 2-bit indices: in bfloat16
1.125 bytes an entry instead of 2. Vendor tensor-core layouts are a further reordering.
"""

import dataclasses
import io
import json
import math
import os
import pathlib
import uuid
import zipfile
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Shaped, UInt8

from sparsejax.core.masks import check_masks
from sparsejax.core.patterns import nm_mask
from sparsejax.core.selection import is_array, is_concrete, is_dense, named_leaves

# what reading a damaged or hostile file can raise: OverflowError is a size beyond 64 bits,
# RuntimeError an encrypted member or a header nested too deep
_BROKEN = (
    ValueError,
    KeyError,
    TypeError,
    OverflowError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Compressed24:
    """A 2:4 weight, half as many values and two bits of position for each.

    Attributes:
      values: shape of the weight with C/2 along `axis`, in ascending order in each group.
      packed: uint8, ceil(C/8) along `axis`: four 2-bit positions a byte, the first in the low bits.
      shape: static shape of the weight. axis: static axis of the groups.
    """

    values: Float[Array, "..."]
    packed: UInt8[Array, "..."]
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes of values and positions."""
        return self.values.nbytes + self.packed.nbytes


def compress_2to4(w: Float[Array, "*s"], *, axis: int = -2) -> Compressed24:
    """Stores a weight with at most two non-zeros in every group of four along `axis`.

    Groups with fewer non-zeros are padded with zeros at the lowest free positions. Works under
    `jit`, where a third non-zero goes unseen (the first two are kept).

    Raises:
      ValueError: the axis is no multiple of 4 long, or, outside `jit`, a group has more than two
        non-zeros (with how many such groups).

    >>> packed = compress_2to4(jnp.asarray([[0.0], [5.0], [0.0], [7.0]]))
    >>> packed.values[:, 0], unpack_indices(packed.packed, 2)[:, 0]
    (Array([5., 7.], dtype=float32), Array([1, 3], dtype=uint8))
    """
    axis = _checked_axis(w.ndim, axis)
    if w.shape[axis] % 4:
        raise ValueError(
            f"axis {axis} of shape {w.shape} is {w.shape[axis]} long; 4 must divide it"
        )
    nonzero = w != 0
    if is_concrete(w):
        crowded = int(jnp.sum(_groups(nonzero, axis).sum(axis=axis + 1) > 2))
        if crowded:
            raise ValueError(f"{crowded} groups of 4 hold more than 2 non-zeros: w is not 2:4")
    keep = _groups(nm_mask(nonzero.astype(jnp.float32), 2, 4, axis=axis, ties="lowest"), axis)
    first = jnp.argmax(keep, axis=axis + 1)
    last = 3 - jnp.argmax(jnp.flip(keep, axis + 1), axis=axis + 1)
    indices = jnp.stack([first, last], axis + 1).astype(jnp.uint8)
    values = jnp.take_along_axis(_groups(w, axis), indices.astype(jnp.int32), axis=axis + 1)
    shape = (*w.shape[:axis], w.shape[axis] // 2, *w.shape[axis + 1 :])
    packed = _pack_pairs(indices.reshape(shape), axis)
    return Compressed24(values.reshape(shape), packed, tuple(w.shape), axis)


def decompress_2to4(c: Compressed24) -> Float[Array, "..."]:
    """The dense weight of a `Compressed24`."""
    count = c.shape[c.axis] // 2
    indices = unpack_indices(c.packed, count, axis=c.axis)
    pairs = (*c.shape[: c.axis], count // 2, 2, *c.shape[c.axis + 1 :])
    values, indices = c.values.reshape(pairs), indices.reshape(pairs)
    place = [
        jnp.sum(jnp.where(indices == j, values, jnp.zeros((), values.dtype)), axis=c.axis + 1)
        for j in range(4)
    ]
    return jnp.stack(place, axis=c.axis + 1).reshape(c.shape)


def unpack_indices(
    packed: UInt8[Array, "..."], count: int, *, axis: int = -2
) -> UInt8[Array, "..."]:
    """The positions, 0 to 3, in a packed array.

    Args:
      packed: four a byte along `axis`, the first in the low bits.
      count: how many there are along `axis`; the rest of the last byte is padding.

    Raises:
      ValueError: more than `packed` can hold.
    """
    axis = _checked_axis(packed.ndim, axis)
    if not 0 <= count <= 4 * packed.shape[axis]:
        raise ValueError(f"count is {count}; packed holds {4 * packed.shape[axis]} along {axis}")
    parts = [(packed >> jnp.uint8(2 * i)) & jnp.uint8(3) for i in range(4)]
    shape = (*packed.shape[:axis], 4 * packed.shape[axis], *packed.shape[axis + 1 :])
    return jax.lax.slice_in_dim(jnp.stack(parts, axis + 1).reshape(shape), 0, count, axis=axis)


def save_compact(path: str | os.PathLike[str], params: PyTree, masks: PyTree) -> dict[str, int]:
    """Writes a sparse model to one `.npz` file, each leaf in its smallest form.

    Leaves that obey 2:4 along axis -2 are stored as `Compressed24`, other sparse leaves as kept
    values and a bit mask, dense leaves as they are. The file appears at once, whole.

    Args:
      path: of the file. params: any PyTree of arrays. masks: with the same paths.

    Returns:
      `{"dense": bytes stored dense, "file": bytes of the file}`.

    Raises:
      ValueError: masks of another structure, a pruned entry that is not zero (names the leaf), or
        two leaves of one path.
      TypeError: a leaf that is no array.
    """
    path = pathlib.Path(path)
    masks = check_masks(masks, params)
    arrays: dict[str, np.ndarray] = {}
    index: dict[str, dict[str, Any]] = {}
    dense_bytes = 0
    for i, ((name, leaf), mask) in enumerate(zip(named_leaves(params), jax.tree.leaves(masks))):
        if name in index:
            raise ValueError(f"two leaves are called {name!r}: the file could hold only one")
        if not is_array(leaf):
            raise TypeError(f"leaf {name!r} is no array but {type(leaf).__name__}")
        w = np.asarray(jnp.asarray(leaf))  # in JAX's dtype, which is what loading gives back
        dense_bytes += w.nbytes
        entry: dict[str, Any] = {"shape": list(w.shape), "dtype": str(w.dtype), "form": "dense"}
        if is_dense(mask):
            arrays[f"{i}/values"] = _raw(w)
        else:
            kept = np.asarray(mask)
            if np.any(w[~kept] != 0):
                raise ValueError(f"leaf {name!r} has non-zeros outside its mask")
            # both forms spend one bit an entry on positions; 2:4 always stores half the values
            if _obeys_2to4(w) and 2 * kept.sum() >= w.size:
                packed = compress_2to4(jnp.asarray(w), axis=-2)
                entry["form"] = "2:4"
                arrays[f"{i}/values"] = _raw(np.asarray(packed.values))
                arrays[f"{i}/packed"] = np.asarray(packed.packed)
            else:
                entry["form"] = "bitmask"
                arrays[f"{i}/values"] = _raw(w[kept])
                arrays[f"{i}/packed"] = np.packbits(kept)
        index[name] = entry
    header = json.dumps({"format": "sparsejax.compact", "version": 1, "leaves": index})
    arrays["header"] = np.frombuffer(header.encode(), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return {"dense": dense_bytes, "file": path.stat().st_size}


def load_compact(path: str | os.PathLike[str]) -> dict[str, Shaped[Array, "..."]]:
    """Reads a file of `save_compact` back into dense arrays, `{path: array}`.

    Nothing in the file is trusted: no pickle, and every claimed size is checked against what the
    file holds before an array is made.

    Raises:
      ValueError: not such a file, or one whose parts do not fit together (names the leaf).
    """
    try:
        with zipfile.ZipFile(path) as file:
            header = json.loads(_read_array(file, "header").tobytes().decode())
            if not isinstance(header, dict) or not isinstance(header.get("leaves"), dict):
                raise ValueError("its header is not that of a model")
            if header.get("format") != "sparsejax.compact" or header.get("version") != 1:
                raise ValueError("its header names another format")
            return {
                name: _load_leaf(file, i, name, entry)
                for i, (name, entry) in enumerate(header["leaves"].items())
            }
    except _BROKEN as e:
        raise ValueError(f"{path} is not a compact model file: {e}") from e


def _read_array(file: zipfile.ZipFile, name: str) -> np.ndarray:
    # not np.load: it allocates what the array's own header claims before it looks at the data
    member = file.getinfo(f"{name}.npy")
    if member.file_size > os.path.getsize(str(file.filename)):
        raise ValueError(f"{name} claims more bytes than the file has")
    data = file.read(member)
    stream = io.BytesIO(data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError(f"{name} has an unknown array format")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    array = np.frombuffer(data, dtype, offset=stream.tell())
    if array.size != math.prod(shape):
        raise ValueError(f"{name} holds {array.size} values and claims shape {shape}")
    return array.reshape(shape, order="F" if fortran else "C")


def _load_leaf(file: zipfile.ZipFile, i: int, name: str, entry: Any) -> Array:
    if not isinstance(entry, dict):
        raise ValueError(f"leaf {name!r} is not described")
    shape = tuple(int(n) for n in entry["shape"])
    dtype = jnp.dtype(entry["dtype"])
    size = math.prod(shape)
    if min(shape, default=0) < 0 or size * dtype.itemsize > 2**44:
        raise ValueError(f"leaf {name!r}: impossible shape {shape}")
    stored = _read_array(file, f"{i}/values").reshape(-1).view(dtype)
    form = entry["form"]
    if form == "dense":
        if stored.size != size:
            raise ValueError(f"leaf {name!r}: {stored.size} values for shape {shape}")
        return jnp.asarray(stored.reshape(shape))
    packed = _read_array(file, f"{i}/packed")
    if form == "2:4":
        if len(shape) < 2 or shape[-2] % 4:
            raise ValueError(f"leaf {name!r}: shape {shape} cannot be 2:4")
        values_shape = (*shape[:-2], shape[-2] // 2, shape[-1])
        packed_shape = (*shape[:-2], -(-shape[-2] // 8), shape[-1])
        if stored.size * 2 != size or packed.shape != packed_shape or packed.dtype != np.uint8:
            raise ValueError(f"leaf {name!r}: values and positions do not fit shape {shape}")
        values = jnp.asarray(stored.reshape(values_shape))
        axis = len(shape) - 2
        return decompress_2to4(Compressed24(values, jnp.asarray(packed), shape, axis))
    if form != "bitmask":
        raise ValueError(f"leaf {name!r}: unknown form {form!r}")
    if packed.dtype != np.uint8 or packed.shape != (-(-size // 8),):
        raise ValueError(f"leaf {name!r}: the mask does not fit shape {shape}")
    mask = np.unpackbits(packed, count=size).astype(bool)
    if stored.size != mask.sum():
        raise ValueError(f"leaf {name!r}: {stored.size} values, {mask.sum()} in the mask")
    dense = np.zeros(size, dtype)
    dense[mask] = stored
    return jnp.asarray(dense.reshape(shape))


def _raw(w: np.ndarray) -> np.ndarray:
    # numpy's file format knows no bfloat16: store the bits, the header has the dtype
    return w if w.dtype.kind in "fiub" else w.view(f"u{w.dtype.itemsize}")


def _obeys_2to4(w: np.ndarray) -> bool:
    if w.ndim < 2 or w.shape[-2] % 4:
        return False
    groups = (w != 0).reshape(*w.shape[:-2], w.shape[-2] // 4, 4, w.shape[-1])
    return bool(groups.sum(axis=-2).max(initial=0) <= 2)


def _groups(w: Array, axis: int) -> Array:
    return w.reshape(*w.shape[:axis], w.shape[axis] // 4, 4, *w.shape[axis + 1 :])


def _pack_pairs(indices: Array, axis: int) -> Array:
    padding = [(0, 0)] * indices.ndim
    padding[axis] = (0, -indices.shape[axis] % 4)
    padded = jnp.pad(indices, padding)
    quads = _groups(padded, axis)
    shifts = jnp.asarray([0, 2, 4, 6], jnp.uint8).reshape((4,) + (1,) * (quads.ndim - axis - 2))
    return jnp.sum(quads << shifts, axis=axis + 1, dtype=jnp.uint8)


def _checked_axis(ndim: int, axis: int) -> int:
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis is {axis}; an array of {ndim} axes has none such")
    return axis % ndim
