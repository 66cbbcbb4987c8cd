"""A file for whole sparse models: safetensors, every leaf in its smallest form.

The layout is that of safetensors (a length, a JSON header, raw arrays), which any reader of that
format opens: a dense leaf lies under its own name, a sparse one as `<name>.values` beside
`<name>.positions` (N:M) or `<name>.mask` (one bit an entry). How they fit together is JSON in the
header's metadata; it is as untrusted as the header itself.
"""

import json
import math
import os
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree, Shaped

from sparsejax.core.masks import check_masks
from sparsejax.core.patterns import NM
from sparsejax.core.safetensors_file import (
    DTYPES,
    Entry,
    Header,
    raw_bytes,
    read_header,
    read_tensor,
    write_safetensors,
)
from sparsejax.core.selection import is_array, is_dense, named_leaves
from sparsejax.core.untrusted import is_size, parse_object, shown
from sparsejax.weights.compact import (
    LARGEST_GROUP,
    NMCompact,
    compress_nm,
    decompress_nm,
    index_bits,
)

FORMAT = {"format": "sparsejax.compact", "version": "1"}
LARGEST_LEAF = 2**44  # bytes
_NAMES = {str(dtype) for dtype in DTYPES.values()}
# what a damaged or hostile file can lead to: OverflowError is a product of sizes beyond 64 bits
_BROKEN = (ValueError, KeyError, TypeError, OverflowError)


def save_compact(
    path: str | os.PathLike[str], params: PyTree, masks: PyTree, *, pattern: NM | None = None
) -> dict[str, int]:
    """Writes a sparse model to one safetensors file, each leaf in its smallest form.

    A sparse leaf is stored as the kept values and either N:M positions or a bit mask, whichever is
    smaller; a dense leaf as it is. What is kept comes back bit for bit. The file appears at once,
    whole.

    Args:
      path: of the file. params: any PyTree of arrays. masks: with the same paths.
      pattern: used for every sparse leaf that obeys it; by default the smallest N:M with
        m = 2, 4, ... 32 along the last two axes is found for each leaf.

    Returns:
      `{"dense": bytes stored dense, "file": bytes of the file}`.

    Raises:
      ValueError: masks of another structure, a pruned entry that is not zero (names the leaf), or
        two arrays of one name.
      TypeError: a leaf that is no array, or of a dtype that safetensors does not know.
    """
    masks = check_masks(masks, params)
    arrays: dict[str, np.ndarray] = {}
    leaves: dict[str, dict[str, Any]] = {}
    dense_bytes = 0
    for (name, leaf), mask in zip(named_leaves(params), jax.tree.leaves(masks)):
        if not is_array(leaf):
            raise TypeError(f"leaf {name!r} is no array but {type(leaf).__name__}")
        if str(leaf.dtype) not in _NAMES:
            raise TypeError(f"leaf {name!r} is {leaf.dtype}, which safetensors does not know")
        w = np.asarray(jnp.asarray(leaf))  # in JAX's dtype, which is what loading gives back
        dense_bytes += w.nbytes
        form, parts = _parts(name, w, None if is_dense(mask) else np.asarray(mask), pattern)
        taken = [part for part in parts if part in arrays]
        if name in leaves or taken:
            raise ValueError(f"two leaves are called {name!r}: the file could hold only one")
        checks = {part: zlib.crc32(raw_bytes(a)) for part, a in parts.items()}
        arrays |= parts
        leaves[name] = {"shape": list(w.shape), "dtype": str(w.dtype), **form, "crc32": checks}
    file = pathlib.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    described = json.dumps(leaves)
    metadata = FORMAT | {"leaves": described, "crc32": str(zlib.crc32(described.encode()))}
    tensors = {part: (array.dtype, array.shape) for part, array in arrays.items()}
    write_safetensors(file, tensors, arrays.__getitem__, metadata=metadata)
    return {"dense": dense_bytes, "file": file.stat().st_size}


def load_compact(path: str | os.PathLike[str]) -> dict[str, Shaped[Array, "..."]]:
    """Reads a file of `save_compact` back into dense arrays, `{path: array}`.

    Nothing in the file is trusted: every size, offset, shape and dtype is checked against the
    others and against what the file holds before an array is made, and checksums show damage.

    Raises:
      ValueError: not such a file, one whose parts do not fit together (names the leaf), or a leaf
        that needs double precision where JAX has it off.
    """
    try:
        header = read_header(pathlib.Path(path))
        leaves = _described(header)
        extra = set(header.tensors)
        params = {}
        for name, entry in leaves.items():
            shape, dtype = _checked_leaf(name, entry)
            parts = {part: _read(part, header.tensors, entry) for part in _part_names(name, entry)}
            extra -= set(parts)
            params[name] = _restore(name, entry, shape, dtype, list(parts.values()))
        if extra:
            raise ValueError(f"arrays that belong to no leaf: {sorted(extra)[:3]}")
        return params
    except _BROKEN as e:
        raise ValueError(f"{path} is not a compact model file: {e}") from e


def smallest_form(kept: Bool[np.ndarray, "..."], *, value_bits: int) -> NM | None:
    """The N:M pattern in which a mask takes the fewest bits, or None where a bit mask does.

    Patterns are N:M with m = 2, 4, ... 32 along either of the last two axes, -2 first.

    Args:
      kept: True where an entry stays. value_bits: of one value.
    """
    best, bits = None, kept.sum() * value_bits + kept.size
    for axis in (-2, -1):
        for m in (2, 4, 8, 16, 32):
            if kept.ndim < -axis or kept.shape[axis] % m or not kept.size:
                continue
            n = max(1, int(_kept_in_groups(kept, NM(1, m, axis=axis)).max()))
            size = kept.size // m * n * (value_bits + index_bits(m))
            # a tie goes to N:M, which a kernel can read in place
            if size < bits or (size == bits and best is None):
                best, bits = NM(n, m, axis=axis), size
    return best


def _parts(
    name: str, w: np.ndarray, kept: np.ndarray | None, pattern: NM | None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """How a leaf is stored: its description and its arrays by name."""
    if kept is None:
        return {"form": "dense"}, {name: w}
    if np.any(w[~kept] != 0):
        raise ValueError(f"leaf {name!r} has non-zeros outside its mask")
    found = pattern
    if pattern is None or not _obeys(kept, pattern):
        found = smallest_form(kept, value_bits=8 * w.dtype.itemsize)
    if found is None or not jnp.issubdtype(w.dtype, jnp.floating):
        return {"form": "bitmask"}, {f"{name}.values": w[kept], f"{name}.mask": np.packbits(kept)}
    packed = compress_nm(jnp.asarray(w), found, mask=jnp.asarray(kept))
    form = {"form": str(found), "axis": packed.axis, "stride": found.stride}
    arrays = (np.asarray(packed.values), np.asarray(packed.packed))
    return form, dict(zip((f"{name}.values", f"{name}.positions"), arrays))


def _obeys(kept: np.ndarray, pattern: NM) -> bool:
    shape, axis = (kept.shape, pattern.axis) if pattern.axis is not None else ((kept.size,), 0)
    if not -len(shape) <= axis < len(shape) or shape[axis] % (pattern.m * pattern.stride):
        return False
    return bool(_kept_in_groups(kept, pattern).max(initial=0) <= pattern.n)


def _kept_in_groups(kept: np.ndarray, pattern: NM) -> np.ndarray:
    flat = kept.reshape(-1) if pattern.axis is None else np.moveaxis(kept, pattern.axis, -1)
    return flat.reshape(*flat.shape[:-1], -1, pattern.m, pattern.stride).sum(axis=-2)


def _described(header: Header) -> dict[str, Any]:
    """The description of a file's leaves, by name."""
    if header.problems:
        raise ValueError("; ".join(f"it {problem}" for problem in header.problems[:3]))
    if FORMAT.items() - header.metadata.items():
        raise ValueError("its header names another format")
    text = header.metadata["leaves"]
    if header.metadata["crc32"] != str(zlib.crc32(text.encode())):
        raise ValueError("the description of its leaves is damaged")
    try:
        return parse_object(text)
    except ValueError as error:
        raise ValueError(f"the description of its leaves {error}") from None


def _checked_leaf(name: str, entry: Any) -> tuple[tuple[int, ...], np.dtype]:
    if not isinstance(entry, dict) or not isinstance(entry.get("form"), str):
        raise ValueError(f"leaf {name!r} is not described")
    shape = tuple(_size(n, f"leaf {name!r}: size") for n in entry["shape"])
    if entry["dtype"] not in _NAMES:
        raise ValueError(f"leaf {name!r}: unknown dtype {entry['dtype']!r}")
    dtype = jnp.dtype(entry["dtype"])
    if math.prod(max(n, 1) for n in shape) * dtype.itemsize > LARGEST_LEAF:
        raise ValueError(f"leaf {name!r}: impossible shape {shape}")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"leaf {name!r} is {dtype}: JAX has double precision (jax_enable_x64) off")
    return shape, dtype


def _part_names(name: str, entry: Mapping[str, Any]) -> list[str]:
    if entry["form"] == "dense":
        return [name]
    return [f"{name}.values", f"{name}.{'mask' if entry['form'] == 'bitmask' else 'positions'}"]


def _read(name: str, tensors: Mapping[str, Entry], entry: Mapping[str, Any]) -> np.ndarray:
    if name not in tensors:
        raise ValueError(f"there is no array {name!r}")
    array = read_tensor(tensors[name])
    if zlib.crc32(raw_bytes(array)) != entry["crc32"][name]:
        raise ValueError(f"array {name!r} is damaged: its checksum is another")
    return array


def _restore(
    name: str,
    entry: Mapping[str, Any],
    shape: tuple[int, ...],
    dtype: np.dtype,
    parts: list[np.ndarray],
) -> Array:
    """A dense leaf from its arrays, all of whose shapes follow from its own."""
    form, stored = entry["form"], parts[0]
    if stored.dtype != dtype:
        raise ValueError(f"leaf {name!r}: values of {stored.dtype} for {dtype}")
    if form == "dense":
        if stored.shape != shape:
            raise ValueError(f"leaf {name!r}: values of shape {stored.shape} for shape {shape}")
        return jnp.asarray(stored)
    places = parts[1]
    if places.dtype != np.uint8:
        raise ValueError(f"leaf {name!r}: positions of {places.dtype}")
    if form == "bitmask":
        size = math.prod(shape)
        if places.shape != (-(-size // 8),):
            raise ValueError(f"leaf {name!r}: the mask does not fit shape {shape}")
        mask = np.unpackbits(places, count=size).astype(bool)
        if stored.shape != (mask.sum(),):
            raise ValueError(f"leaf {name!r}: {stored.size} values, {mask.sum()} in the mask")
        dense = np.zeros(size, dtype)
        dense[mask] = stored
        return jnp.asarray(dense.reshape(shape))
    axis = None if entry["axis"] is None else _size(entry["axis"], f"leaf {name!r}: axis")
    stride = _size(entry["stride"], f"leaf {name!r}: stride")
    pattern = NM.parse(form, axis=axis, stride=stride)
    runs = (math.prod(shape),) if axis is None else shape
    along = axis or 0
    if (
        pattern.m > LARGEST_GROUP
        or along >= len(runs)
        or runs[along] % (pattern.m * stride)
        or not jnp.issubdtype(dtype, jnp.floating)
    ):
        raise ValueError(f"leaf {name!r}: {dtype} of shape {shape} cannot be {form}")
    count = runs[along] // pattern.m * pattern.n
    lengths = (count, -(-count * index_bits(pattern.m) // 8))
    for array, length in zip(parts, lengths):
        if array.shape != (*runs[:along], length, *runs[along + 1 :]):
            raise ValueError(f"leaf {name!r}: values and positions do not fit shape {shape}")
    packed = NMCompact(
        jnp.asarray(stored), jnp.asarray(places), shape, axis, pattern.n, pattern.m, stride
    )
    return decompress_nm(packed)


def _size(value: Any, what: str) -> int:
    if not is_size(value, 0):
        raise ValueError(f"{what} is {shown(value)}")
    return value
