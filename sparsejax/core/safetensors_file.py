"""The safetensors format: a reader that believes nothing, and a writer.

A file is the length of its header (8 bytes, little endian), the header (a JSON object from a
tensor's name to its dtype, shape and byte range), and the data. It is simple enough to be read
here, where a file's problems can all be found without touching its data, and any of NumPy's float
types, bfloat16 among them, comes without a detour.

Source: Hugging Face, "Safetensors", format specification.
"""

import dataclasses
import json
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from sparsejax.core.untrusted import is_size, listed, parse_object, shown

DTYPES = {
    "BOOL": np.dtype(bool),
    **{f"{kind[0].upper()}{bits}": np.dtype(f"{kind}{bits}") for kind in ("int", "uint")
       for bits in (8, 16, 32, 64)},
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "C64": np.dtype(np.complex64),
}  # fmt: skip
"""What tensors are read as, by the format's name; all little endian."""

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # as in the safetensors package
_MOST_AXES = 64  # of a NumPy array


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file: `size` bytes from byte `start` of `path`."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says it holds.

    tensors: by name, only those that are sound: a known dtype, a shape, and a range of the file
        that is just as long as both say.
    metadata: the writer's own strings.
    problems: all that is wrong, ready to follow the file's name. If empty, the tensors are
        sound and fill the file without gap or overlap.
    """

    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]
    problems: Sequence[str]


def read_header(path: Path) -> Header:
    """Header and problems of a file, of which no tensor is read. Raises OSError if it cannot be."""
    try:
        header, start, end = _read_json(path)
    except ValueError as error:
        return Header({}, {}, [str(error)])
    problems, entries = [], {}
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        problems.append("has a __metadata__ that is no object of strings")
        metadata = {}
    for name, value in header.items():
        try:
            entries[name] = _entry(path, value, start, end)
        except ValueError as error:
            problems.append(f"has a tensor {shown(name)} {error}")
    return Header(entries, metadata, problems or _tiling_problems(entries, start, end))


def _read_json(path: Path) -> tuple[dict[str, Any], int, int]:
    with path.open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        if total < 10:
            raise ValueError(f"has {total} bytes, too few for a header")
        length = int.from_bytes(file.read(8), "little")
        allowed = min(total - 8, _HEADER_LIMIT)
        if not 2 <= length <= allowed:
            raise ValueError(f"has a header of {length} bytes; {allowed} are possible")
        data = file.read(length)
    if len(data) != length or data[:1] != b"{":
        raise ValueError("has a header that does not start with '{'")
    try:
        return parse_object(data), 8 + length, total
    except ValueError as error:
        raise ValueError(f"has a header that {error}") from None


def _entry(path: Path, value: object, start: int, end: int) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"described by {shown(value)} instead of dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"of the unknown dtype {shown(dtype)}")
    axes = [axis for axis in shape if is_size(axis, 0)] if isinstance(shape, list) else None
    if axes is None or len(axes) != len(shape) or len(axes) > _MOST_AXES:
        raise ValueError(f"of the impossible shape {shown(shape)}")
    bounds = offsets if isinstance(offsets, list) else []
    if len(bounds) != 2 or not all(is_size(bound, 0) for bound in bounds):
        raise ValueError(f"with the impossible data_offsets {shown(offsets)}")
    first, last = bounds
    if not first <= last <= end - start:
        raise ValueError(f"at bytes {shown(offsets)} of {end - start} that are there")
    size = math.prod(axes) * DTYPES[dtype].itemsize
    if size != last - first:
        raise ValueError(
            f"of {dtype} {shown(shape)} in {last - first} bytes, which needs {shown(size)}"
        )
    return Entry(path, dtype, tuple(axes), start + first, size)


def _tiling_problems(entries: Mapping[str, Entry], start: int, end: int) -> list[str]:
    position, problems = start, []
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != position:
            what = "overlaps the one before" if entry.start < position else "leaves a gap before it"
            problems.append(f"has a tensor {shown(name)} that {what}")
        position = max(position, entry.start + entry.size)
    if position != end:
        problems.append(f"has {end - position} bytes after its last tensor")
    return problems


def read_tensor(entry: Entry) -> Shaped[np.ndarray, "..."]:
    """The tensor of `entry`. Raises ValueError if the file has become shorter in the meantime."""
    data = np.empty(entry.size, np.uint8)
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.start)
        view, done = data.data, 0
        while done < entry.size:
            count = file.readinto(view[done:])
            if not count:
                raise ValueError(f"{entry.path.name} ended while it was read")
            done += count
    return data.view(DTYPES[entry.dtype]).reshape(entry.shape)


def raw_bytes(array: Shaped[np.ndarray, "..."]) -> memoryview:
    """The bytes of an array as a file holds them: row by row."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def same_bytes(a: Entry, b: Entry, chunk: int = 1 << 24) -> bool:
    """Whether two tensors are equal in dtype, shape and every bit, a chunk at a time."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with a.path.open("rb") as first, b.path.open("rb") as second:
        first.seek(a.start)
        second.seek(b.start)
        left = a.size
        while left:
            count = min(left, chunk)
            if first.read(count) != second.read(count):
                return False
            left -= count
    return True


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    fetch: Callable[[str], np.ndarray],
    *,
    metadata: Mapping[str, str],
) -> None:
    """Writes `tensors`, asking `fetch` for one at a time; whole and on the disk, or not there.

    A file that was there is replaced, and stays as it is if this fails.

    tensors: from the name to dtype and shape, which `fetch(name)` must give.

    Raises ValueError for a dtype that is not among `DTYPES`, and for a tensor of another form.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    # the widest first, so that every tensor is aligned
    order = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)
    for name in order:
        dtype, shape = tensors[name]
        if name == "__metadata__":
            raise ValueError("a tensor is called __metadata__, which the format keeps for itself.")
        if dtype not in _CODES:
            raise ValueError(f"{name} is {dtype}; allowed are {listed(_CODES.values(), 16)}.")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                values, (dtype, shape) = np.asarray(fetch(name)), tensors[name]
                if (values.dtype, values.shape) != (dtype, shape):
                    raise ValueError(f"{name} is {values.dtype}{values.shape}, not {dtype}{shape}.")
                file.write(raw_bytes(values))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
