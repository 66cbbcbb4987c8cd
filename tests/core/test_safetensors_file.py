"""The safetensors container: what comes back, every refusal, and writes that fail."""

import json
import os

import numpy as np
import pytest

from sparsejax.core.safetensors_file import (
    DTYPES,
    Entry,
    read_header,
    read_tensor,
    same_bytes,
    write_safetensors,
)

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4, dtype=np.int16),
    "c": np.asarray([True, False, True]),
}


def write(path, arrays, fetch=None, **metadata):
    forms = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    write_safetensors(path, forms, fetch or arrays.__getitem__, metadata=metadata)
    return path


def joined(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def same(array, wanted):
    return (array.dtype, array.shape, array.tobytes()) == (
        wanted.dtype,
        wanted.shape,
        wanted.tobytes(),
    )


def test_every_dtype_and_form_comes_back(tmp_path):
    """Odd sizes of narrow tensors between wide ones too: all are aligned."""
    bits = np.random.default_rng(0).integers(0, 2, 240).astype(np.uint8)
    arrays = {
        code: bits[: 3 * dtype.itemsize].view(dtype).reshape(3, 1) for code, dtype in DTYPES.items()
    }
    arrays |= {
        "scalar": np.asarray(1.5),
        "empty": np.zeros((0, 4), np.float32),
        "fortran": np.asfortranarray(TENSORS["a"]),
        "\ud800 \u2192 \"'\n": TENSORS["b"][::2],
    }
    header = read_header(write(tmp_path / "m", arrays, format="ours", note="\u00fc"))
    assert header.problems == []
    assert header.metadata == {"format": "ours", "note": "\u00fc"}
    assert header.tensors.keys() == arrays.keys()
    for name, entry in header.tensors.items():
        assert same(read_tensor(entry), arrays[name]), name
        assert entry.start % DTYPES[entry.dtype].itemsize == 0, name


def test_the_library_of_the_format_agrees(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    ours = library.load_file(write(tmp_path / "ours", TENSORS))
    assert all(same(ours[name], array) for name, array in TENSORS.items())
    library.save_file(TENSORS, tmp_path / "theirs")
    header = read_header(tmp_path / "theirs")
    assert (header.problems, header.metadata) == ([], {})
    assert all(same(read_tensor(header.tensors[name]), array) for name, array in TENSORS.items())


# Files that somebody else wrote

NESTED = b'{"a":' * 100_000 + b"1" + b"}" * 100_000


def refused(path, data, message):
    path.write_bytes(data)
    header = read_header(path)
    assert any(message in problem for problem in header.problems), header.problems


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has 0 bytes, too few for a header"),
        (b"\xff" * 64, "has a header of 18446744073709551615 bytes; 56 are possible"),
        (bytes(64), "has a header of 0 bytes"),
        (joined(b"[ ]"), "does not start with '{'"),
        (joined(b"{\xff\xfe}"), "has a header that is no valid JSON"),
        (joined(b'{"a": NaN}'), "has a header that holds NaN"),
        (joined(b'{"a": 1, "a": 2}'), "has a name twice in one object ('a')"),
        (joined(NESTED), "has a header that is nested too deeply"),
        (joined({"__metadata__": {"a": 1}}), "a __metadata__ that is no object of strings"),
        (joined({"__metadata__": [1]}), "a __metadata__ that is no object of strings"),
    ],
)
def test_files_of_another_kind(data, message, tmp_path):
    refused(tmp_path / "m", data, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "F31"}, "'a' of the unknown dtype 'F31'"),
        ({"dtype": ["F32"]}, "'a' of the unknown dtype ['F32']"),
        ({"dtype": "F16"}, "'a' of F16 [2, 3] in 24 bytes, which needs 12"),
        ({"shape": [7]}, "'a' of F32 [7] in 24 bytes, which needs 28"),
        ({"shape": [2**62] * 3}, "bytes, which needs 3923"),
        ({"shape": 6}, "of the impossible shape 6"),
        ({"shape": [-6]}, "of the impossible shape [-6]"),
        ({"shape": [6.0]}, "of the impossible shape [6.0]"),
        ({"shape": [2**63]}, "of the impossible shape [9223372036854775808]"),
        ({"shape": [True, 6]}, "of the impossible shape [True, 6]"),
        ({"shape": [1] * 64 + [6]}, "of the impossible shape [1, 1, "),
        ({"data_offsets": [0]}, "with the impossible data_offsets [0]"),
        ({"data_offsets": [-24, 0]}, "with the impossible data_offsets [-24, 0]"),
        ({"data_offsets": [24, 0]}, "at bytes [24, 0] of 35 that are there"),
        ({"data_offsets": [0, 2**40]}, "at bytes [0, 1099511627776] of 35"),
        ({"data_offsets": [4, 28]}, "'a' that leaves a gap before it"),
        ({"data_offsets": [4, 28]}, "'b' that overlaps the one before"),
        ({"more": 3}, "instead of dtype, shape and data_offsets"),
    ],
)
def test_headers_that_contradict_their_file(changes, message, tmp_path):
    path = write(tmp_path / "m", TENSORS)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["a"] |= changes
    refused(path, joined(header, data[8 + length :]), message)


def test_every_cut_is_noticed_and_every_problem_told(tmp_path):
    path = write(tmp_path / "m", TENSORS)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert read_header(path).problems, length
    refused(path, data + b"\0", "has 1 bytes after its last tensor")
    path.write_bytes(joined({"x": 3, "y": {}, "z": []}))
    assert len(read_header(path).problems) == 3
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "none")


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = write(tmp_path / "m", TENSORS)
    entry = read_header(path).tensors["c"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="m ended while it was read"):
        read_tensor(entry)


def test_same_bytes(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(bytes([*range(8), *range(7), 0]))
    first, second = Entry(path, "U8", (8,), 0, 8), Entry(path, "U8", (8,), 8, 8)
    assert same_bytes(first, first, chunk=3)
    assert not same_bytes(first, second, chunk=3)
    assert not same_bytes(first, Entry(path, "I8", (8,), 0, 8))
    assert not same_bytes(first, Entry(path, "U8", (2, 4), 0, 8))


# Writing


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write(tmp_path / "m", TENSORS)
    before = path.read_bytes()

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(path, TENSORS, fail)
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, fail)
            with pytest.raises(KeyboardInterrupt):
                write(path, TENSORS)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "stored", "given", "message"),
    [
        ("a", np.zeros(2, np.complex128), None, "a is complex128; allowed are 'BOOL', 'I8', .*C64"),
        ("a", np.zeros(2, ">f4"), None, "a is >f4; allowed are"),
        ("__metadata__", np.zeros(2), None, "a tensor is called __metadata__, which the format"),
        ("a", np.zeros(2), np.zeros(3), r"a is float64\(3,\), not float64\(2,\)"),
        ("a", np.zeros(2), np.zeros(2, np.int8), r"a is int8\(2,\), not float64\(2,\)"),
    ],
)
def test_tensors_that_cannot_be_written(name, stored, given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "m", {name: stored}, lambda _: stored if given is None else given)
    assert list(tmp_path.iterdir()) == []
