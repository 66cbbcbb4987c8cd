"""The GGUF container, read without trust: metadata and tensors of a file that came from anywhere.

Every count, length, type and offset is compared with the size of the file before it is used, so a
damaged or hostile file costs at most a pass over its bytes. Types and dequantisation are those of
the `gguf` library, whose own reader believes what a file says of itself.
"""

import dataclasses
import itertools
import math
import mmap
import os
import struct
from typing import Any

import numpy as np

from sparsejax.models.loading import CheckpointError

MAX_AXES = 4
# struct's letters for the number types 0 to 12 of the format; 7, 8 and 9 are no numbers
_SCALARS = {i: f"<{letter}" for i, letter in enumerate("BbHhIif...Qqd") if letter != "."}
_BOOL, _STRING, _ARRAY = 7, 8, 9
# the least bytes that a metadata entry (empty key, one-byte value) and a tensor's entry can take
_LEAST_ENTRY, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies; `shape` is in numpy's order, `[out, in]` for a matrix."""

    shape: tuple[int, ...]
    kind: int
    start: int
    nbytes: int


class GgufFile:
    """A GGUF file whose layout has been checked.

    Attributes:
      path: of the file. metadata: by key, as Python values and lists.
      tensors: by name.

    Raises:
      CheckpointError: not such a file, or any part that does not fit it.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if not size:
                    raise _BadFileError("it is empty")
                with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
                    self.metadata, self.tensors = _parse(data)
        except (OSError, ValueError) as error:
            raise CheckpointError(self.path, [f"it cannot be read: {error}"]) from error
        except _BadFileError as error:
            raise CheckpointError(self.path, [str(error)]) from error

    def read(self, name: str) -> np.ndarray:
        """A tensor as float32, dequantised.

        Raises:
          CheckpointError: a value that is not finite.
        """
        import gguf

        tensor = self.tensors[name]
        raw = np.fromfile(self.path, np.uint8, tensor.nbytes, offset=tensor.start)
        if raw.size != tensor.nbytes:
            raise CheckpointError(self.path, [f"it was cut off inside tensor {name!r}"])
        raw = raw.reshape(*tensor.shape[:-1], -1)
        try:
            with np.errstate(all="ignore"):  # what a damaged block gives is seen below
                kind = gguf.GGMLQuantizationType(tensor.kind)
                values = np.asarray(gguf.dequantize(raw, kind), np.float32)
        except NotImplementedError as error:
            raise CheckpointError(self.path, [f"tensor {name!r} is of no float type"]) from error
        values = values.reshape(tensor.shape)
        if not np.isfinite(values).all():
            raise CheckpointError(self.path, [f"tensor {name!r} has values that are not finite"])
        return values


class _BadFileError(Exception):
    pass


class _Cursor:
    """Reads forwards and never beyond the end."""

    def __init__(self, data: Any):
        self.data, self.at = data, 0

    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, count: int, what: str) -> bytes:
        if count > self.left():
            raise _BadFileError(f"it ends inside {what} ({count} bytes wanted, {self.left()} left)")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def text(self, what: str) -> str:
        raw = self.take(self.number("<Q", what), what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise _BadFileError(f"{what} is not UTF-8 text") from error

    def value(self, kind: int, what: str) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind == _BOOL:
            flag = self.number("<B", what)
            if flag > 1:
                raise _BadFileError(f"{what} is {flag}; a boolean is 0 or 1")
            return bool(flag)
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY:
            raise _BadFileError(f"{what} has the unknown type {kind}")
        inner, count = self.number("<I", what), self.number("<Q", what)
        if inner == _ARRAY:
            raise _BadFileError(f"{what} is an array of arrays, which no model needs")
        if inner in _SCALARS:
            width = struct.calcsize(_SCALARS[inner])
            raw = self.take(count * width, what)
            return np.frombuffer(raw, np.dtype(_SCALARS[inner])).tolist()
        least = {_BOOL: 1, _STRING: 8}.get(inner, 1)
        if count * least > self.left():
            raise _BadFileError(f"{what} claims {count} entries, more than the file can hold")
        return [self.value(inner, what) for _ in range(count)]


def _parse(data: Any) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    cursor = _Cursor(data)
    if cursor.take(min(4, len(data)), "its mark") != b"GGUF":
        raise _BadFileError("it does not begin with the mark GGUF")
    version = cursor.number("<I", "its version")
    if version not in (2, 3):
        raise _BadFileError(f"its version is {version}; 2 and 3 (little-endian) are known")
    tensor_count, entry_count = cursor.number("<Q", "its counts"), cursor.number("<Q", "its counts")
    if tensor_count * _LEAST_TENSOR + entry_count * _LEAST_ENTRY > cursor.left():
        raise _BadFileError(
            f"it claims {tensor_count} tensors and {entry_count} entries, more than it can hold"
        )
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        key = cursor.text("a key")
        if key in metadata:
            raise _BadFileError(f"the key {key!r} stands in it twice")
        metadata[key] = cursor.value(cursor.number("<I", key), f"the value of {key!r}")
    infos = [_tensor_info(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 8 <= alignment <= 2**20 or alignment % 8:
        raise _BadFileError(f"general.alignment is {alignment!r}; it must be a multiple of 8")
    start = -(-cursor.at // alignment) * alignment
    return metadata, _place(infos, start, alignment, len(data))


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.text("a tensor's name")
    axes = cursor.number("<I", name)
    if not 1 <= axes <= MAX_AXES:
        raise _BadFileError(f"tensor {name!r} has {axes} axes; 1 to {MAX_AXES} are allowed")
    # the file has the fastest axis first
    shape = tuple(cursor.number("<Q", name) for _ in range(axes))[::-1]
    return name, shape, cursor.number("<I", name), cursor.number("<Q", name)


def _place(
    infos: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int, size: int
) -> dict[str, GgufTensor]:
    import gguf

    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in infos:
        if name in tensors:
            raise _BadFileError(f"the tensor {name!r} stands in it twice")
        try:
            block, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (ValueError, KeyError) as error:
            raise _BadFileError(f"tensor {name!r} has the unknown type {kind}") from error
        if 0 in shape or shape[-1] % block:
            raise _BadFileError(f"tensor {name!r} has shape {shape}; {block} must divide its rows")
        nbytes = math.prod(shape) // block * width
        if offset % alignment or start + offset + nbytes > size:
            raise _BadFileError(
                f"tensor {name!r} would lie at bytes {start + offset} to {start + offset + nbytes} "
                f"of a file of {size} (alignment {alignment})"
            )
        tensors[name] = GgufTensor(shape, kind, start + offset, nbytes)
    placed = sorted((t.start, t.start + t.nbytes, name) for name, t in tensors.items())
    for (_, end, first), (begin, _, second) in itertools.pairwise(placed):
        if begin < end:
            raise _BadFileError(f"tensors {first!r} and {second!r} overlap")
    return tensors
