"""The compressed N:M form: exact, in the stated layout, through every transformation of JAX."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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


# 2:4


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


# any n:m

NMS = [
    (sj.NM(2, 4), (16, 8)),
    (sj.NM(1, 4, axis=-1), (4, 8)),
    (sj.NM(3, 5, axis=1), (2, 10, 3)),
    (sj.NM(2, 4, axis=-1, stride=3), (2, 24)),
    (sj.NM(1, 1), (3, 2)),
    (sj.NM(4, 4), (8, 3)),
    (sj.NM(2, 4, axis=None), (2, 6)),
    (sj.NM(7, 16), (2, 32, 3)),
    (sj.NM(20, 40), (40, 3)),
    (sj.NM(3, 256, axis=0), (512, 2)),
]
BITS = {"float32": "i4", "bfloat16": "i2", "float16": "i2", "float8_e4m3fn": "i1", "float64": "i8"}


def bits(x):
    return np.asarray(x).view(BITS[str(x.dtype)])


@pytest.mark.parametrize(("pattern", "shape"), NMS, ids=lambda v: str(v))
def test_every_pattern_comes_back_bit_for_bit(pattern, shape):
    rng = np.random.default_rng(0)
    for dtype in ("float32", "bfloat16"):
        w = jnp.asarray(rng.normal(size=shape), dtype)
        mask = pattern.mask(jnp.abs(w))
        # zeros of both signs among what is kept, and groups that keep fewer than n
        w = jnp.where(jnp.asarray(rng.random(shape) < 0.2), jnp.asarray(-0.0, dtype), w)
        mask &= jnp.asarray(rng.random(shape) < 0.9)
        w = jnp.where(mask, w, jnp.zeros((), dtype))
        packed = weights.compress_nm(w, pattern, mask=mask)
        assert packed.values.dtype == w.dtype
        assert packed.values.size == w.size // pattern.m * pattern.n
        assert (packed.n, packed.m, packed.stride) == (pattern.n, pattern.m, pattern.stride)
        assert packed.pattern.mask(jnp.abs(w)).shape == w.shape
        back = weights.decompress_nm(packed)
        np.testing.assert_array_equal(bits(back), bits(w))


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", "float64"])
def test_every_float_comes_back_bit_for_bit(dtype, x64):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), dtype)
    w = w.at[0, 0].set(jnp.nan).at[1, 0].set(-0.0)
    mask = sj.nm_mask(jnp.abs(w).astype(jnp.float32), 2, 4).at[:4, 0].set(jnp.arange(4) < 2)
    w = jnp.where(mask, w, jnp.zeros((), dtype))
    packed = weights.compress_nm(w, sj.NM(2, 4), mask=mask)
    assert packed.values.dtype == dtype
    np.testing.assert_array_equal(bits(weights.decompress_nm(packed)), bits(w))


def test_a_negative_zero_beside_what_is_kept_is_a_zero():
    w = jnp.asarray([[-0.0, 1.0, -0.0, 2.0]])  # what a product with a mask leaves
    packed = weights.compress_nm(w, sj.NM(2, 4, axis=-1))
    np.testing.assert_array_equal(packed.values, [[1.0, 2.0]])
    np.testing.assert_array_equal(weights.decompress_nm(packed), w)


@pytest.mark.parametrize("width", range(9))
def test_positions_are_a_stream_of_bits_with_the_first_in_the_low_ones(width):
    numbers = np.random.default_rng(width).integers(0, 2**width, (13, 3)).astype(np.uint8)
    packed = weights.pack_indices(jnp.asarray(numbers), bits=width, axis=0)
    assert packed.shape == (-(-13 * width // 8), 3)
    for column in range(3):
        whole = int.from_bytes(np.asarray(packed[:, column]).tobytes(), "little")
        wanted = sum(int(number) << (width * i) for i, number in enumerate(numbers[:, column]))
        assert whole == wanted
    unpacked = weights.unpack_indices(packed, 13, axis=0, bits=width)
    np.testing.assert_array_equal(unpacked, numbers)


def test_bytes_of_a_pattern():
    for (n, m), share in {(1, 4): 0.25 * 2 + 2 / 32, (4, 8): 0.5 * 2 + 12 / 64}.items():
        pattern = sj.NM(n, m)
        w = jnp.where(pattern.mask(jax.random.normal(jax.random.key(0), (64, 8))), 1.0, 0.0)
        packed = weights.compress_nm(w.astype(jnp.bfloat16), pattern)
        assert packed.nbytes == share * w.size


def test_stacked_layers_pass_through_scan_and_vmap():
    pattern = sj.NM(1, 4)
    w = jax.random.normal(jax.random.key(0), (3, 16, 8))
    w = jnp.where(pattern.mask(jnp.abs(w)), w, 0)
    stack = weights.compress_nm(w, pattern)
    single = weights.compress_nm(w[1], pattern)
    np.testing.assert_array_equal(stack.packed[1], single.packed)
    np.testing.assert_array_equal(weights.decompress_nm(stack), w)
    mapped = jax.vmap(lambda layer: weights.compress_nm(layer, pattern))(w)
    np.testing.assert_array_equal(weights.decompress_nm(mapped), w)  # also without a vmap around

    def layer(x, compact):
        return x @ weights.decompress_nm(compact) @ jnp.ones((8, 16)), None

    @jax.jit
    def through(x, stack):
        return jax.lax.scan(layer, x, stack)[0]

    x = jnp.ones((2, 16))
    wanted = x
    for i in range(3):
        wanted = wanted @ w[i] @ jnp.ones((8, 16))
    np.testing.assert_allclose(through(x, stack), wanted, rtol=1e-5)
    # the gradient reaches each kept value from its own place, and no other
    grad = jax.grad(lambda c: jnp.sum(w * weights.decompress_nm(c)), allow_int=True)(stack)
    np.testing.assert_array_equal(grad.values, stack.values)


def test_compressing_a_sharded_weight_moves_nothing(mesh):
    w = two_of_four((32, 8))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "model"))
    placed = jax.device_put(w, place)
    packed = compress(placed)
    np.testing.assert_array_equal(decompress(packed), w)
    text = compress.lower(placed).compile().as_text()
    assert not [op for op in ("all-gather", "all-to-all", "collective-permute") if op in text]


def test_what_does_not_obey_the_pattern_is_refused(unchecked):
    w = two_of_four()
    for pattern, mask, message in (
        (sj.NM(1, 4), None, "groups of 4 hold more than 1 non-zeros: w is not 1:4"),
        (sj.NM(2, 5), None, r"axis 0 of shape \(16, 8\) is 16 long; 5 must divide it"),
        (sj.NM(2, 4, stride=3), None, r"is 16 long; m \* stride = 12 must divide it"),
        (sj.NM(2, 512), None, "pattern is 2:512; m must be at most 256"),
        (sj.NM(2, 4, axis=2), None, "axis is 2; an array of 2 axes has none such"),
        (sj.NM(2, 5, axis=None), None, r"axis None of shape \(16, 8\) is 128 long; 5 must"),
        (sj.NM(2, 4), jnp.ones((16, 8), bool), "groups of 4 hold more than 2 kept entries"),
        (sj.NM(2, 4), jnp.zeros((16, 8), bool), "w has 64 non-zeros outside its mask"),
        (sj.NM(2, 4), jnp.zeros((8, 16), bool), r"mask has shape \(8, 16\), w \(16, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.compress_nm(w, pattern, mask=mask)
    with pytest.raises(TypeError, match="w must be floating point, not int32"):
        weights.compress_nm(jnp.zeros((4, 4), jnp.int32), sj.NM(2, 4))
    for bits in (-1, 9):
        with pytest.raises(ValueError, match=f"bits is {bits}; it must be from 0 to 8"):
            weights.pack_indices(jnp.zeros((4, 4), jnp.uint8), bits=bits)
