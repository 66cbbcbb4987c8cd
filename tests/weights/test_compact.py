"""Storage: the compressed 2:4 form, and files that come back whole or are refused."""

import dataclasses
import io
import json
import os
import stat
import tracemalloc
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import sparsejax as sj
from sparsejax import weights

compress = jax.jit(weights.compress_2to4, static_argnames="axis")
decompress = jax.jit(weights.decompress_2to4)
unpack = jax.jit(weights.unpack_indices, static_argnames=("count", "axis"))


@pytest.mark.vectors
def test_compression_vectors(reference):
    for case in reference("cast").cases("compress"):
        weight = jnp.asarray(case["weight"])
        for axis, turn in ((-1, np.asarray), (-2, np.transpose)):
            packed = compress(jnp.asarray(turn(weight)), axis=axis)
            values, indices = case["values"], case["indices"]
            np.testing.assert_array_equal(packed.values, turn(values))
            np.testing.assert_array_equal(packed.packed, turn(case["packed_indices"]))
            count = indices.shape[-1]
            unpacked = unpack(packed.packed, count, axis=axis)
            np.testing.assert_array_equal(unpacked, turn(indices))
            assert unpacked.dtype == jnp.uint8
            np.testing.assert_array_equal(decompress(packed), turn(weight))


def two_of_four(shape=(16, 8), axis=-2, key=0):
    w = jax.random.normal(jax.random.key(key), shape)
    return jnp.where(sj.NM(2, 4, axis=axis).mask(jnp.abs(w)), w, 0)


# the compressed form


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    shape_axis=st.sampled_from(
        [((8, 3), -2), ((2, 12), 1), ((2, 4, 3), 1), ((4,), 0), ((0, 4), 0)]
    ),
)
def test_compression_loses_nothing(data, shape_axis):
    shape, axis = shape_axis
    dense = data.draw(hnp.arrays(np.float32, shape, elements=st.integers(-3, 3)))
    keep = np.moveaxis(dense, axis, -1).reshape(-1, 4)
    keep[np.cumsum(keep != 0, axis=1) > 2] = 0  # at most two, sometimes fewer
    moved = np.moveaxis(dense, axis, -1).shape
    w = np.moveaxis(keep.reshape(moved), -1, axis)
    packed = compress(w, axis=axis)
    np.testing.assert_array_equal(decompress(packed), w)
    axis %= w.ndim
    assert packed.values.shape[axis] == w.shape[axis] // 2
    assert packed.packed.shape[axis] == -(-w.shape[axis] // 8)
    assert (packed.shape, packed.axis) == (w.shape, axis)
    indices = unpack(packed.packed, w.shape[axis] // 2, axis=axis)
    pairs = np.moveaxis(np.asarray(indices), axis, -1).reshape(-1, 2)
    assert (pairs[:, 0] < pairs[:, 1]).all()  # ascending, so different


def test_every_axis_gives_the_same_bytes():
    w = two_of_four()
    first = compress(w, axis=-2)
    for axes, axis in (((1, 0), -1), ((1, 0), 1), ((0, 1), 0)):
        turned = compress(w.transpose(axes), axis=axis)
        np.testing.assert_array_equal(turned.values.transpose(axes), first.values)
        np.testing.assert_array_equal(turned.packed.transpose(axes), first.packed)
        np.testing.assert_array_equal(decompress(turned), w.transpose(axes))


def test_poor_groups_are_padded_at_the_lowest_free_places():
    groups = jnp.asarray(
        [[0, 0, 0, 0], [5, 0, 0, 0], [0, 5, 0, 0], [0, 0, 0, 5], [0, 6, 0, 7], [6, 0, 7, 0]],
        jnp.float32,
    )
    packed = compress(groups, axis=-1)
    indices = unpack(packed.packed, 2, axis=-1)
    np.testing.assert_array_equal(indices, [[0, 1], [0, 1], [0, 1], [0, 3], [1, 3], [0, 2]])
    np.testing.assert_array_equal(packed.values, [[0, 0], [5, 0], [0, 5], [0, 5], [6, 7], [6, 7]])
    # the first index lies in the low bits
    np.testing.assert_array_equal(packed.packed[:, 0], [4, 4, 4, 12, 13, 8])
    long = compress(groups[2:].reshape(1, 16), axis=-1)
    np.testing.assert_array_equal(
        long.packed[0], [0b11000100, 0b10001101]
    )  # (0 1)(0 3), then (1 3)(0 2)


def test_bfloat16_needs_nine_sixteenths_of_the_bytes():
    w = two_of_four().astype(jnp.bfloat16)
    packed = compress(w, axis=-2)
    assert packed.values.dtype == jnp.bfloat16
    assert packed.nbytes == 16 * 8 * 1.125
    np.testing.assert_array_equal(decompress(packed).astype(jnp.float32), w.astype(jnp.float32))


def test_it_is_a_tree_that_jit_vmap_and_grad_pass_through():
    w = jnp.stack([two_of_four(key=0), two_of_four(key=1)])
    packed = jax.vmap(compress)(w)
    np.testing.assert_array_equal(jax.vmap(decompress)(packed), w)
    alone = compress(w[1], axis=-2)
    np.testing.assert_array_equal(packed.packed[1], alone.packed)
    doubled = jax.tree.map(lambda v: v * 2 if v.dtype == jnp.float32 else v, alone)
    np.testing.assert_array_equal(decompress(doubled), 2 * w[1])
    x = jax.random.normal(jax.random.key(5), (16,))

    @jax.grad
    def grad(values):
        return jnp.sum(x @ decompress(dataclasses.replace(alone, values=values)))

    rows = np.asarray(unpack(alone.packed, 8, axis=0)) + 4 * (np.arange(8) // 2)[:, None]
    np.testing.assert_allclose(grad(alone.values), x[rows])
    tall = jnp.asarray([[1.0], [2.0], [3.0], [0.0]])
    np.testing.assert_array_equal(compress(tall).values[:, 0], [1.0, 2.0])  # the first two


def test_compression_refuses_what_is_not_2to4():
    with pytest.raises(ValueError, match=r"axis 0 of shape \(6, 4\) is 6 long; 4 must divide it"):
        weights.compress_2to4(jnp.zeros((6, 4)))
    with pytest.raises(ValueError, match="2 groups of 4 hold more than 2 non-zeros: w is not 2:4"):
        weights.compress_2to4(jnp.ones((16, 8)).at[2:].set(0).at[3, 2:4].set(1))
    with pytest.raises(ValueError, match="axis is 2; an array of 2 axes has none such"):
        weights.compress_2to4(jnp.zeros((4, 4)), axis=2)
    with pytest.raises(ValueError, match="axis is -2; an array of 1 axes has none such"):
        weights.compress_2to4(jnp.zeros(4))
    packed = weights.compress_2to4(two_of_four()).packed
    assert weights.unpack_indices(packed, 5).shape == (5, 8)
    for count in (-1, 9):
        with pytest.raises(ValueError, match=rf"count is {count}; packed holds 8 along 0"):
            weights.unpack_indices(packed, count)
    with pytest.raises(ValueError, match="axis is 5; an array of 2 axes"):
        weights.unpack_indices(packed, 1, axis=5)


# files


def model():
    w, v, u = jax.random.normal(jax.random.key(0), (3, 16, 8))
    params = {
        "two": {"kernel": w, "bias": w[0]},
        "four": {"kernel": v.astype(jnp.bfloat16)},
        "stack": {"kernel": jnp.stack([w, u])},
        "free": {"kernel": u, "norm": jnp.zeros((), jnp.bfloat16)},
        "steps": {"count": jnp.arange(3)},
    }
    scores = sj.magnitude(params)
    masks = sj.make_masks(scores, pattern=sj.NM(2, 4), where="(two|stack)/kernel")
    masks["four"] = sj.make_masks(scores["four"], pattern=sj.NM(4, 8))
    masks["free"] = sj.make_masks(scores["free"], 0.3)
    return sj.apply_masks(params, masks), masks


def flat(params):
    return dict(sj.named_leaves(params))


def same_arrays(got, wanted):
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(
            np.asarray(got[name], np.float64), np.asarray(array, np.float64)
        )


def forms(path):
    with np.load(path) as file:
        header = json.loads(file["header"].tobytes())
    return {name: entry["form"] for name, entry in header["leaves"].items()}


def test_a_file_gives_back_every_leaf(tmp_path):
    params, masks = model()
    path = tmp_path / "new" / "model.npz"
    sizes = weights.save_compact(path, params, masks)
    same_arrays(weights.load_compact(path), flat(params))
    assert sizes["dense"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert sizes["file"] == path.stat().st_size
    assert forms(path) == {
        "two/kernel": "2:4",
        "two/bias": "dense",
        "four/kernel": "bitmask",
        "stack/kernel": "2:4",
        "free/kernel": "bitmask",
        "free/norm": "dense",
        "steps/count": "dense",
    }
    assert [p.name for p in path.parent.iterdir()] == ["model.npz"]


def test_a_sparse_file_is_smaller_and_takes_a_string_for_a_path(tmp_path):
    w = two_of_four((256, 128)).astype(jnp.bfloat16)
    sizes = weights.save_compact(str(tmp_path / "m.npz"), {"kernel": w}, {"kernel": w != 0})
    assert sizes["dense"] == 2 * 256 * 128
    assert sizes["file"] < 0.6 * sizes["dense"]
    np.testing.assert_array_equal(weights.load_compact(str(tmp_path / "m.npz"))["kernel"], w)


def test_an_nnx_state_and_masks_wrapped_otherwise(tmp_path):
    state = nnx.state(nnx.Linear(16, 8, rngs=nnx.Rngs(0)))
    sparse, masks = weights.finish(state)
    pure = nnx.to_pure_dict(masks)
    weights.save_compact(tmp_path / "m.npz", sparse, pure)
    loaded = weights.load_compact(tmp_path / "m.npz")
    same_arrays(loaded, {"bias": sparse["bias"][...], "kernel": sparse["kernel"][...]})
    assert forms(tmp_path / "m.npz") == {"bias": "dense", "kernel": "2:4"}


def test_numpy_leaves_come_back_in_the_dtype_of_jax(tmp_path):
    w = np.asfortranarray(np.asarray(two_of_four(), np.float64))
    params = {"kernel": w, "other": np.asfortranarray(np.arange(6.0).reshape(2, 3))}
    weights.save_compact(tmp_path / "m.npz", params, {"kernel": w != 0, "other": True})
    loaded = weights.load_compact(tmp_path / "m.npz")
    assert loaded["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(loaded["kernel"], w)
    np.testing.assert_array_equal(loaded["other"], params["other"])


def test_double_precision_empty_and_all_pruned_leaves(tmp_path, x64):
    params = {
        "kernel": two_of_four().astype(jnp.float64) / 3,
        "empty": jnp.zeros((0, 4)),
        "pruned": jnp.zeros((3, 5)),
    }
    masks = {"kernel": params["kernel"] != 0, "empty": jnp.ones((0, 4), bool)}
    masks["pruned"] = jnp.zeros((3, 5), bool)
    weights.save_compact(tmp_path / "m.npz", params, masks)
    same_arrays(weights.load_compact(tmp_path / "m.npz"), params)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    params, masks = model()
    path = tmp_path / "model.npz"
    weights.save_compact(path, params, masks)
    before = path.read_bytes()

    def half_a_write(file, **arrays):
        file.write(b"PK half")
        raise OSError("disk full")

    def no_replace(source, target):
        raise KeyboardInterrupt

    for module, name, failure, error in (
        (np, "savez", half_a_write, OSError),
        (os, "replace", no_replace, KeyboardInterrupt),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, failure)
            with pytest.raises(error):
                weights.save_compact(path, params, masks)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["model.npz"]


def test_saving_refuses_what_it_could_not_give_back(tmp_path):
    params, masks = model()
    path = tmp_path / "model.npz"
    dense = {**params, "two": {**params["two"], "kernel": jnp.ones((16, 8))}}
    with pytest.raises(ValueError, match="leaf 'two/kernel' has non-zeros outside its mask"):
        weights.save_compact(path, dense, masks)
    with pytest.raises(ValueError, match="masks do not have the structure"):
        weights.save_compact(path, params, {"two": True})
    same_name = {"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(3)}
    with pytest.raises(ValueError, match="two leaves are called 'a/b'"):
        weights.save_compact(path, same_name, sj.dense_masks(same_name))
    with pytest.raises(TypeError, match="leaf 'f' is no array but builtin_function"):
        weights.save_compact(path, {"f": len}, {"f": True})
    assert not list(tmp_path.iterdir())


# files that somebody else wrote


def npy(array=None, **header):
    """An array file, with another header if one is given."""
    stream = io.BytesIO()
    if header:
        np.lib.format.write_array_header_1_0(stream, header)
        stream.write(b"\0" * 64)
    else:
        np.save(stream, array)
    return stream.getvalue()


def text(value):
    return npy(np.frombuffer(json.dumps(value).encode(), np.uint8))


@pytest.fixture
def doctored(tmp_path):
    """Writes a good file of one leaf of each form, with some members or entries changed."""
    w = two_of_four()
    params = {"a": jnp.arange(6.0), "b": w, "c": jnp.arange(5.0)}
    masks = {"a": jnp.asarray(True), "b": w != 0, "c": jnp.arange(5) > 0}
    path = tmp_path / "hostile.npz"
    weights.save_compact(path, params, masks)
    with zipfile.ZipFile(path) as file:
        good = {name: file.read(name) for name in file.namelist()}
    header = json.loads(np.load(io.BytesIO(good["header.npy"])).tobytes())

    def write(members=None, entries=None, compression=zipfile.ZIP_STORED, **fields):
        new = json.loads(json.dumps(header))
        for leaf, changes in (entries or {}).items():
            new["leaves"][leaf].update(changes)
        changed = {**good, "header.npy": text({**new, **fields}), **(members or {})}
        with zipfile.ZipFile(path, "w", compression) as file:
            for name, data in changed.items():
                if data is not None:
                    file.writestr(name, data)
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


def test_a_repacked_file_is_still_good(doctored):
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        loaded = weights.load_compact(doctored(compression=compression))
        np.testing.assert_array_equal(loaded["a"], np.arange(6.0))
        np.testing.assert_array_equal(loaded["c"], np.arange(5.0))


def test_files_of_another_kind_are_refused(tmp_path, doctored):
    path = doctored()
    whole = path.read_bytes()
    for content in (b"", b"PK\x03\x04", whole[: len(whole) // 2], whole[:-30], b"\x93NUMPY", b"{}"):
        path.write_bytes(content)
        refused(path, "is not a compact model file")
    np.save(tmp_path / "array.npy", np.ones(3))
    refused(tmp_path / "array.npy", "is not a compact model file: File is not a zip file")
    np.savez(tmp_path / "other.npz", weights=np.ones(3))
    refused(tmp_path / "other.npz", "is not a compact model file: .*header")
    with pytest.raises(FileNotFoundError):
        weights.load_compact(tmp_path / "none.npz")


def test_a_flipped_byte_is_noticed(doctored):
    path = doctored()
    data = bytearray(path.read_bytes())
    spot = data.index(np.arange(6, dtype=np.float32).tobytes())
    data[spot + 5] ^= 1
    path.write_bytes(data)
    refused(path, "Bad CRC-32")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "its header is not that of a model"),
        ({"leaves": []}, "its header is not that of a model"),
        ({"leaves": {}}, "its header names another format"),
        ({"format": "sparsejax.compact", "version": 2, "leaves": {}}, "names another format"),
        ({"format": "sparsejax.compact", "version": 1, "leaves": {"a": 3}}, "leaf 'a' is not des"),
        ({"format": "sparsejax.compact", "version": 1, "leaves": {"a": {}}}, "'shape'"),
    ],
)
def test_headers_are_checked(doctored, header, message):
    refused(doctored({"header.npy": text(header)}), message)


def test_headers_that_are_no_text_are_refused(doctored):
    for content in (b"\xff\xfe", b"{", b"[" * 100_000):
        member = npy(np.frombuffer(content, np.uint8))
        refused(doctored({"header.npy": member}), "is not a compact model file")
    refused(doctored({"header.npy": b"not an array"}), "is not a compact model file")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"a": {"shape": [2**50]}}, r"leaf 'a': impossible shape \(1125899906842624,\)"),
        ({"a": {"shape": [2**30]}}, r"leaf 'a': 6 values for shape \(1073741824,\)"),
        ({"a": {"shape": [-6]}}, r"leaf 'a': impossible shape \(-6,\)"),
        ({"a": {"shape": [7]}}, r"leaf 'a': 6 values for shape \(7,\)"),
        ({"a": {"shape": [float("inf")]}}, "cannot convert float infinity"),
        ({"a": {"shape": None}}, "'NoneType' object is not iterable"),
        ({"a": {"dtype": "float64"}}, r"leaf 'a': 3 values for shape \(6,\)"),
        ({"a": {"dtype": "object"}}, "is not a compact model file"),
        ({"a": {"dtype": "nonsense"}}, "is not a compact model file"),
        ({"b": {"shape": [2**30, 2]}}, "leaf 'b': values and positions do not fit shape"),
        ({"b": {"shape": [8, 16]}}, "leaf 'b': values and positions do not fit shape"),
        ({"b": {"shape": [128]}}, r"leaf 'b': shape \(128,\) cannot be 2:4"),
        ({"b": {"form": "3:4"}}, "leaf 'b': unknown form '3:4'"),
        ({"c": {"shape": [2**40]}}, "leaf 'c': the mask does not fit shape"),
        ({"c": {"shape": [9]}}, "leaf 'c': the mask does not fit shape"),
        ({"c": {"shape": [1]}}, "leaf 'c': 4 values, 0 in the mask"),
    ],
)
def test_entries_are_checked_against_the_arrays(doctored, entries, message):
    refused(doctored(entries=entries), message)


@pytest.mark.parametrize(
    ("name", "member", "message"),
    [
        ("0/values.npy", None, "There is no item named '0/values.npy'"),
        ("0/values.npy", npy(np.array([{}, 1], object)), "is not a compact model file"),
        ("0/values.npy", b"no array", "is not a compact model file"),
        ("0/values.npy", npy(np.zeros(5, np.float32)), "leaf 'a': 5 values"),
        (
            "0/values.npy",
            npy(descr="<f4", fortran_order=False, shape=(2**42,)),
            r"0/values holds 16 values and claims shape \(4398046511104,\)",
        ),
        (
            "header.npy",
            npy(descr="|u1", fortran_order=False, shape=(2**45,)),
            "header holds 64 values and claims shape",
        ),
        ("1/packed.npy", None, "There is no item named '1/packed.npy'"),
        ("1/packed.npy", npy(np.zeros((2, 8), np.int8)), "leaf 'b': values and positions"),
        ("1/packed.npy", npy(np.zeros((1, 8), np.uint8)), "leaf 'b': values and positions"),
        ("2/packed.npy", npy(np.zeros(1, np.int8)), "leaf 'c': the mask does not fit"),
        ("2/packed.npy", npy(np.full(1, 255, np.uint8)), "leaf 'c': 4 values, 5 in the mask"),
    ],
)
def test_arrays_are_checked_against_their_claims(doctored, name, member, message):
    refused(doctored({name: member}), message)


def test_a_bomb_is_not_unpacked(doctored):
    bomb = npy(np.zeros(2**24, np.float32))
    path = doctored({"0/values.npy": bomb}, compression=zipfile.ZIP_DEFLATED)
    del bomb
    assert path.stat().st_size < 2**20
    refused(path, "0/values claims more bytes than the file has")


def test_no_code_in_a_file_is_run(doctored, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    member = npy(np.array([Payload()], object))
    for name in ("header.npy", "0/values.npy"):
        refused(doctored({name: member}), "is not a compact model file")
    assert not (tmp_path / "owned").exists()


def test_others_may_read_the_file(tmp_path):
    old = os.umask(0o022)
    try:
        weights.save_compact(tmp_path / "m.npz", {"a": jnp.ones(2)}, {"a": True})
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "m.npz").stat().st_mode) == 0o644
