"""Files of sparse models: they come back whole and bit for bit, or are refused."""

import json
import os
import stat
import struct
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

import sparsejax as sj
from sparsejax import weights
from sparsejax.weights import compact_file


def two_of_four(shape=(16, 8)):
    w = jax.random.normal(jax.random.key(0), shape)
    return jnp.where(sj.NM(2, 4).mask(jnp.abs(w)), w, 0)


def model():
    w, v, u = jax.random.normal(jax.random.key(0), (3, 16, 8))
    params = {
        "two": {"kernel": w, "bias": w[0]},
        "four": {"kernel": v.astype(jnp.bfloat16)},
        "one": {"kernel": u},
        "stack": {"kernel": jnp.stack([w, u])},
        "torch": {"weight": v},
        "free": {"kernel": u, "norm": jnp.zeros((), jnp.bfloat16)},
        "steps": {"count": jnp.arange(3)},
    }
    scores = sj.magnitude(params)
    masks = sj.make_masks(scores, pattern=sj.NM(2, 4), where="(two|stack)/kernel")
    masks["four"] = sj.make_masks(scores["four"], pattern=sj.NM(4, 8))
    masks["one"] = sj.make_masks(scores["one"], pattern=sj.NM(1, 8))
    masks["torch"] = sj.make_masks(scores["torch"], pattern=sj.NM(2, 4, axis=-1))
    masks["free"] = sj.make_masks(scores["free"], 0.3)
    return sj.apply_masks(params, masks), masks


def flat(params):
    return dict(sj.named_leaves(params))


def same_arrays(got, wanted):
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert got[name].dtype == array.dtype
        assert got[name].shape == np.shape(array)
        assert np.asarray(got[name]).tobytes() == np.asarray(array).tobytes()


def read_json(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["leaves"]), data[8 + length :]


def forms(path):
    return {name: entry["form"] for name, entry in read_json(path)[1].items()}


def test_a_file_gives_back_every_leaf(tmp_path):
    params, masks = model()
    path = tmp_path / "new" / "model.safetensors"
    sizes = weights.save_compact(path, params, masks)
    same_arrays(weights.load_compact(path), flat(params))
    assert sizes["dense"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert sizes["file"] == path.stat().st_size
    assert forms(path) == {
        "two/kernel": "2:4",
        "two/bias": "dense",
        "four/kernel": "bitmask",  # 1.5 bits of position an entry would be more
        "one/kernel": "1:8",
        "stack/kernel": "2:4",
        "torch/weight": "2:4",
        "free/kernel": "bitmask",
        "free/norm": "dense",
        "steps/count": "dense",
    }
    assert read_json(path)[1]["torch/weight"]["axis"] == 1
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


def test_every_safetensors_reader_opens_the_file(tmp_path):
    params, masks = model()
    path = tmp_path / "m.safetensors"
    weights.save_compact(path, params, masks)
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata()["format"] == "sparsejax.compact"
        names = set(file.keys())
        assert {"two/bias", "two/kernel.values", "two/kernel.positions", "free/kernel.mask"} < names
        np.testing.assert_array_equal(file.get_tensor("two/bias"), params["two"]["bias"])
        kept = np.asarray(params["four"]["kernel"])[np.asarray(masks["four"]["kernel"])]
        stored = file.get_tensor("four/kernel.values")
        assert stored.dtype == kept.dtype
        np.testing.assert_array_equal(stored, kept)
        packed = weights.compress_2to4(params["two"]["kernel"])
        np.testing.assert_array_equal(file.get_tensor("two/kernel.values"), packed.values)
        np.testing.assert_array_equal(file.get_tensor("two/kernel.positions"), packed.packed)


def test_a_given_pattern_is_used_where_it_is_obeyed(tmp_path):
    params, masks = model()
    path = tmp_path / "m.safetensors"
    weights.save_compact(path, params, masks, pattern=sj.NM(4, 8))
    same_arrays(weights.load_compact(path), flat(params))
    found = forms(path)
    assert {name for name, form in found.items() if form == "4:8"} == {
        "two/kernel", "four/kernel", "one/kernel", "stack/kernel",
    }  # fmt: skip
    assert found["torch/weight"] == "2:4"
    strided = sj.NM(2, 4, axis=None, stride=2)
    mask = strided.mask(jnp.abs(params["two"]["bias"]))
    w = jnp.where(mask, params["two"]["bias"], 0)
    weights.save_compact(path, {"w": w}, {"w": mask}, pattern=strided)
    assert read_json(path)[1]["w"] | {"crc32": 0} == {
        "shape": [8], "dtype": "float32", "form": "2:4", "axis": None, "stride": 2, "crc32": 0,
    }  # fmt: skip
    same_arrays(weights.load_compact(path), {"w": w})


def test_the_form_is_the_smallest():
    rng = np.random.default_rng(0)
    for pattern in (sj.NM(1, 2), sj.NM(1, 4), sj.NM(2, 4), sj.NM(2, 8), sj.NM(1, 16), sj.NM(1, 32)):
        mask = np.asarray(pattern.mask(jnp.asarray(rng.random((64, 6)))))
        found = compact_file.smallest_form(mask, value_bits=32)
        assert found is not None
        assert (found.n, found.m, found.axis) == (pattern.n, pattern.m, -2)
    assert compact_file.smallest_form(rng.random((64, 64)) < 0.5, value_bits=32) is None
    assert compact_file.smallest_form(np.zeros((64, 64), bool), value_bits=32) is None
    assert compact_file.smallest_form(np.zeros((0, 4), bool), value_bits=32) is None
    assert compact_file.smallest_form(np.zeros((), bool), value_bits=32) is None


def test_a_sparse_file_is_smaller_and_takes_a_string_for_a_path(tmp_path):
    w = two_of_four((256, 128)).astype(jnp.bfloat16)
    path = str(tmp_path / "m.safetensors")
    sizes = weights.save_compact(path, {"kernel": w}, {"kernel": w != 0})
    assert sizes["dense"] == 2 * 256 * 128
    assert sizes["file"] < 1.125 * 256 * 128 + 700
    np.testing.assert_array_equal(weights.load_compact(path)["kernel"], w)


def test_an_nnx_state_and_masks_wrapped_otherwise(tmp_path):
    state = nnx.state(nnx.Linear(16, 8, rngs=nnx.Rngs(0)))
    sparse, masks = weights.finish(state)
    path = tmp_path / "m.safetensors"
    weights.save_compact(path, sparse, nnx.to_pure_dict(masks))
    same_arrays(
        weights.load_compact(path), {"bias": sparse["bias"][...], "kernel": sparse["kernel"][...]}
    )
    assert forms(path) == {"bias": "dense", "kernel": "2:4"}


def test_numpy_leaves_come_back_in_the_dtype_of_jax(tmp_path):
    w = np.asfortranarray(np.asarray(two_of_four(), np.float64))
    params = {"kernel": w, "other": np.asfortranarray(np.arange(6.0).reshape(2, 3))}
    weights.save_compact(tmp_path / "m", params, {"kernel": w != 0, "other": True})
    loaded = weights.load_compact(tmp_path / "m")
    assert loaded["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(loaded["kernel"], w)
    np.testing.assert_array_equal(loaded["other"], params["other"])


def test_every_dtype_empty_and_all_pruned_leaves(tmp_path, x64):
    params = {str(d): jnp.arange(6).astype(d) for d in compact_file.DTYPES.values()}
    params |= {"empty": jnp.zeros((0, 4)), "pruned": jnp.zeros((3, 5)), "whole": jnp.arange(8)}
    params["kernel"] = two_of_four().astype(jnp.float64) / 3
    masks = sj.dense_masks(params) | {
        "kernel": params["kernel"] != 0,
        "empty": jnp.ones((0, 4), bool),
        "pruned": jnp.zeros((3, 5), bool),
        "whole": params["whole"] != 0,
    }
    path = tmp_path / "m"
    weights.save_compact(path, params, masks)
    same_arrays(weights.load_compact(path), params)
    with jax.enable_x64(False), pytest.raises(ValueError, match="is float64: JAX has double prec"):
        weights.load_compact(path)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    params, masks = model()
    path = tmp_path / "model.safetensors"
    weights.save_compact(path, params, masks)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError("disk full")

    def no_replace(source, target):
        raise KeyboardInterrupt

    for name, failure, error in (
        ("fsync", full, OSError),
        ("replace", no_replace, KeyboardInterrupt),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, failure)
            with pytest.raises(error):
                weights.save_compact(path, params, masks)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_saving_refuses_what_it_could_not_give_back(tmp_path):
    params, masks = model()
    path = tmp_path / "model.safetensors"
    dense = {**params, "two": {**params["two"], "kernel": jnp.ones((16, 8))}}
    with pytest.raises(ValueError, match="leaf 'two/kernel' has non-zeros outside its mask"):
        weights.save_compact(path, dense, masks)
    with pytest.raises(ValueError, match="masks do not have the structure"):
        weights.save_compact(path, params, {"two": True})
    w = two_of_four()
    for same in ({"a": {"b": w}, "a/b": w}, {"a": {"b": w}, "a/b.values": w}):
        with pytest.raises(ValueError, match="two leaves are called 'a/b"):
            weights.save_compact(path, same, {**sj.dense_masks(same), "a": {"b": w != 0}})
    with pytest.raises(TypeError, match="leaf 'f' is no array but builtin_function"):
        weights.save_compact(path, {"f": len}, {"f": True})
    with pytest.raises(TypeError, match="leaf 'k' is key<fry>, which safetensors does not know"):
        weights.save_compact(path, {"k": jax.random.key(0)}, {"k": True})
    assert not list(tmp_path.iterdir())


def test_others_may_read_the_file(tmp_path):
    old = os.umask(0o022)
    try:
        weights.save_compact(tmp_path / "m", {"a": jnp.ones(2)}, {"a": True})
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o644


# files that somebody else wrote


def checked(leaves):
    """Metadata around a description of the leaves, with a good checksum."""
    text = leaves if isinstance(leaves, str) else json.dumps(leaves)
    crc = compact_file.zlib.crc32(text.encode())
    return {"format": "sparsejax.compact", "version": "1", "leaves": text, "crc32": str(crc)}


def assemble(header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.fixture
def doctored(tmp_path):
    """Writes a good file of one leaf of each form, with some entries changed."""
    w = two_of_four()
    params = {"a": jnp.arange(6.0), "b": w, "c": jnp.arange(5.0)}
    masks = {"a": jnp.asarray(True), "b": w != 0, "c": jnp.arange(5) > 0}
    path = tmp_path / "hostile.safetensors"
    weights.save_compact(path, params, masks)
    good = path.read_bytes()
    header, leaves, data = read_json(path)

    def write(entries=None, arrays=None, content=None):
        new_leaves, new = json.loads(json.dumps([leaves, header]))
        for leaf, changes in (entries or {}).items():
            new_leaves[leaf].update(changes)
        for name, changes in (arrays or {}).items():
            new[name].update(changes)
        new["__metadata__"] = checked(new_leaves)
        path.write_bytes(assemble(new, data) if content is None else content(good))
        return path

    return write


def refused(path, message):
    """A `ValueError` that names the file, without much memory."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as caught:
            weights.load_compact(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert peak < 4 * 2**20


def test_a_file_put_together_anew_is_still_good(doctored):
    loaded = weights.load_compact(doctored())
    np.testing.assert_array_equal(loaded["a"], np.arange(6.0))
    np.testing.assert_array_equal(loaded["b"], two_of_four())
    np.testing.assert_array_equal(loaded["c"], np.arange(5.0))


def test_files_of_another_kind_are_refused(tmp_path, doctored):
    for change in (
        lambda good: b"",
        lambda good: b"PK\x03\x04",
        lambda good: good[:9],
        lambda good: good[: len(good) // 2],
        lambda good: good[:-1],
        lambda good: good + b"\0",
        lambda good: assemble(b"", b""),
        lambda good: assemble(b"{}", b"", length=2**63),
    ):
        refused(doctored(content=change), "is not a compact model file")
    other = tmp_path / "other.safetensors"
    safetensors.numpy.save_file({"a": np.ones(3)}, other)
    refused(other, "is not a compact model file: its header names another format")
    with pytest.raises(FileNotFoundError):
        weights.load_compact(tmp_path / "none")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[]", "it has a header that does not start with"),
        (b"\xff\xfe", "is not a compact model file"),
        (b"{", "is not a compact model file"),
        (b"[" * 100_000, "is not a compact model file"),
        (b'{"a": 1, "a": 2}', "a name twice in one object"),
        ({}, "its header names another format"),
        ({"__metadata__": checked({}) | {"version": "2"}}, "names another format"),
        ({"__metadata__": checked({}) | {"crc32": "1"}}, "the description of its leaves is dam"),
        ({"__metadata__": checked({}) | {"leaves": 3}}, "a __metadata__ that is no object of"),
        ({"__metadata__": checked([])}, "description of its leaves holds .*must be a JSON ob"),
        ({"__metadata__": checked({"a": 3})}, "leaf 'a' is not described"),
        ({"__metadata__": checked({"a": {"form": 3}})}, "leaf 'a' is not described"),
        ({"__metadata__": checked({"a": {"form": "dense"}})}, "'shape'"),
        ({"__metadata__": checked({}), "a": 3}, "is not a compact model file"),
        ({"__metadata__": checked({}), "a": {"data_offsets": []}}, "is not a compact model file"),
    ],
)
def test_headers_are_checked(doctored, header, message):
    refused(doctored(content=lambda good: assemble(header, b"")), message)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"a": {"shape": [2**50]}}, r"leaf 'a': impossible shape \(1125899906842624,\)"),
        ({"a": {"shape": [2**30]}}, r"leaf 'a': values of shape \(6,\) for shape \(1073741824,\)"),
        ({"a": {"shape": [-6]}}, "leaf 'a': size is -6"),
        ({"a": {"shape": [6.0]}}, "leaf 'a': size is 6.0"),
        ({"a": {"shape": [float("inf")]}}, "description of its leaves holds Infinity"),
        ({"a": {"shape": None}}, "'NoneType' object is not iterable"),
        ({"a": {"shape": [0, 2**60]}}, "leaf 'a': impossible shape"),
        ({"a": {"dtype": "float16"}}, "leaf 'a': values of float32 for float16"),
        ({"a": {"dtype": "float64"}}, "leaf 'a' is float64: JAX has double precision"),
        ({"a": {"dtype": "object"}}, "leaf 'a': unknown dtype 'object'"),
        ({"a": {"dtype": []}}, "is not a compact model file"),
        ({"a": {"form": "bitmask"}}, "there is no array 'a.values'"),
        ({"a": {"crc32": {}}}, "is not a compact model file: 'a'"),
        ({"a": {"crc32": {"a": 1}}}, "array 'a' is damaged"),
        ({"b": {"shape": [2**30, 2]}}, "leaf 'b': values and positions do not fit shape"),
        ({"b": {"shape": [8, 16]}}, "leaf 'b': values and positions do not fit shape"),
        ({"b": {"shape": [128], "axis": 0}}, "leaf 'b': values and positions do not fit shape"),
        ({"b": {"axis": 2}}, r"leaf 'b': float32 of shape \(16, 8\) cannot be 2:4"),
        ({"b": {"axis": -2}}, "leaf 'b': axis is -2"),
        ({"b": {"axis": None}}, "leaf 'b': values and positions do not fit shape"),
        ({"b": {"stride": 0}}, "stride is 0"),
        ({"b": {"stride": 8}}, "cannot be 2:4"),
        ({"b": {"form": "3:4"}}, "leaf 'b': values and positions do not fit shape"),
        ({"b": {"form": "2:1024"}}, "cannot be 2:1024"),
        ({"b": {"form": "sparse"}}, "pattern is 'sparse'"),
        ({"b": {"form": "dense"}}, "there is no array 'b'"),
        ({"c": {"shape": [2**40]}}, "leaf 'c': the mask does not fit shape"),
        ({"c": {"shape": [9]}}, "leaf 'c': the mask does not fit shape"),
        ({"c": {"shape": [1]}}, "leaf 'c': 4 values, 0 in the mask"),
    ],
)
def test_entries_are_checked_against_the_arrays(doctored, entries, message):
    refused(doctored(entries), message)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": {"shape": [7]}}, "'a' of F32 .7. in 24 bytes, which needs 28"),
        ({"a": {"shape": [2**62]}}, "'a' of F32 .* in 24 bytes, which needs 18446744073709551616"),
        ({"a": {"shape": [2, 3]}}, r"leaf 'a': values of shape \(2, 3\) for shape \(6,\)"),
        ({"a": {"shape": [True]}}, "'a' of the impossible shape .True."),
        ({"a": {"dtype": "I32"}}, "leaf 'a': values of int32 for float32"),
        ({"a": {"dtype": "F128"}}, "'a' of the unknown dtype 'F128'"),
        ({"a": {"data_offsets": [0, 2**40], "shape": [2**38]}}, "'a' at bytes .* that are there"),
        ({"a": {"data_offsets": [4, 28]}}, "gap before it; it has a tensor 'b.values' that over"),
        ({"a": {"data_offsets": [-24, 0]}}, "'a' with the impossible data_offsets"),
        ({"b.positions": {"dtype": "I8"}}, "leaf 'b': positions of int8"),
        ({"c.mask": {"dtype": "BOOL"}}, "leaf 'c': positions of bool"),
    ],
)
def test_arrays_are_checked_against_their_claims(doctored, arrays, message):
    refused(doctored(arrays=arrays), message)


def test_arrays_that_belong_to_no_leaf_are_refused(tmp_path):
    extra = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    path = tmp_path / "m"
    path.write_bytes(assemble({"__metadata__": checked({}), **extra}, b"x"))
    refused(path, r"arrays that belong to no leaf: \['a'\]")


def test_a_flipped_byte_is_noticed(doctored):
    spot = np.arange(6, dtype=np.float32).tobytes()

    def flip(good):
        data = bytearray(good)
        data[data.index(spot) + 5] ^= 1
        return bytes(data)

    refused(doctored(content=flip), "array 'a' is damaged: its checksum is another")


def test_hundreds_of_damaged_files(tmp_path):
    """Bytes flipped, cut or inserted anywhere: a plain error, or exactly the model."""
    params, masks = model()
    path = tmp_path / "m.safetensors"
    weights.save_compact(path, params, masks)
    good, wanted = path.read_bytes(), flat(params)
    header_end = 8 + struct.unpack("<Q", good[:8])[0]
    rng = np.random.default_rng(0)
    refusals = 0
    for i in range(400):
        data = bytearray(good)
        # two thirds of the damage where it is most interesting: in the header
        spot = int(rng.integers(0, header_end if i % 3 else len(data)))
        kind = i % 5
        if kind == 0:
            del data[spot:]
        elif kind == 1:
            del data[spot : spot + int(rng.integers(1, 9))]
        elif kind == 2:
            data[spot:spot] = bytes(rng.integers(0, 256, int(rng.integers(1, 9)), np.uint8))
        elif kind == 3:
            data[spot] ^= 1 << int(rng.integers(0, 8))
        else:
            data[spot] = ord(str(rng.choice(list('0123456789"[]{},:-. '))))
        path.write_bytes(data)
        try:
            loaded = weights.load_compact(path)
        except ValueError:
            refusals += 1
            continue
        same_arrays(loaded, wanted)
    assert refusals > 300
