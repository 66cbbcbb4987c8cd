"""Quantised weights: half a scale of error at most, zeros that stay zeros, bytes as counted."""

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

quantize = jax.jit(weights.quantize, static_argnames=("bits", "group", "axis"))
dequantize = jax.jit(weights.dequantize)
GROUPS = {None: 6, 2: 2, 6: 6}


def per_entry(q, w):
    """The scale of every entry."""
    return np.repeat(np.asarray(q.scales), w.shape[-2] // q.scales.shape[-2], axis=-2)


def sparse(shape=(256, 8), pattern=sj.NM(2, 4)):  # noqa: B008 (frozen)
    w = jax.random.normal(jax.random.key(0), shape)
    return jnp.where(pattern.mask(jnp.abs(w)), w, 0)


@settings(max_examples=100, deadline=None)
@given(
    w=hnp.arrays(
        np.float32,
        (6, 3),
        elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
    ),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([None, 2, 6]),
)
def test_no_entry_is_off_by_more_than_half_a_scale(w, bits, group):
    q = quantize(w, bits=bits, group=group)
    assert q.scales.shape == (6 // GROUPS[group], 3)
    back = np.asarray(dequantize(q), np.float64)
    error = np.abs(back - w.astype(np.float64))
    # beside half a step, the roundings of the division and of the product
    bound = per_entry(q, w).astype(np.float64) * (0.5 + 1e-4)
    assert (error <= bound).all()
    assert (back[w == 0] == 0).all()
    # scales come from the entries that are not zero, and are no larger than they must be
    groups = np.abs(w).reshape(-1, GROUPS[group], 3).max(1)
    wanted = np.where(groups > 0, np.maximum(groups / (2 ** (bits - 1) - 1), 2.0**-126), 0)
    np.testing.assert_allclose(q.scales, wanted, rtol=1e-6)


def test_codes_are_what_rounding_by_hand_gives():
    w = jnp.asarray([[7.0, 1.0], [-3.4, 0.0], [0.6, -1.0], [0.0, 0.5], [-7.0, 0.07]])
    q = weights.quantize(w, bits=4)
    np.testing.assert_array_equal(q.scales, np.asarray([[1.0, 1 / 7]], np.float32))
    assert (q.codes.shape, q.codes.dtype) == ((3, 2), jnp.uint8)
    np.testing.assert_array_equal(q.codes[:, 0], [0xD7, 0x01, 0x09])  # 7 -3, 1 0, -7 and padding
    np.testing.assert_allclose(dequantize(q)[:, 0], [7, -3, 1, 0, -7])
    wide = weights.quantize(w, bits=8)
    assert (wide.codes.dtype, wide.codes.shape) == (jnp.int8, (5, 2))
    np.testing.assert_array_equal(wide.codes[:, 0], [127, -62, 11, 0, -127])
    empty = weights.quantize(jnp.zeros((0, 3)))
    assert weights.dequantize(empty).shape == (0, 3)


@pytest.mark.parametrize("bits", [4, 8])
def test_bfloat16_stays_and_double_precision_stays(bits, x64):
    w = sparse((128, 4))
    half = weights.quantize(w.astype(jnp.bfloat16), bits=bits, group=64)
    assert (half.scales.dtype, weights.dequantize(half).dtype) == (jnp.float32, jnp.bfloat16)
    back = np.asarray(weights.dequantize(half).astype(jnp.float32))
    before = np.asarray(w.astype(jnp.bfloat16).astype(jnp.float32))
    assert (np.abs(back - before) <= 0.5001 * per_entry(half, w) + 2**-8 * np.abs(back)).all()
    double = weights.quantize(w.astype(jnp.float64) / 3, bits=bits)
    assert double.scales.dtype == weights.dequantize(double).dtype == jnp.float64


def test_stacks_and_other_axes_have_scales_of_their_own():
    w = jax.random.normal(jax.random.key(1), (3, 8, 6))
    whole = weights.quantize(w, bits=4, group=4)
    assert whole.scales.shape == (3, 2, 6)
    alone = weights.quantize(w[1], bits=4, group=4)
    np.testing.assert_array_equal(whole.codes[1], alone.codes)
    mapped = jax.vmap(lambda layer: weights.quantize(layer, bits=4, group=4))(w)
    np.testing.assert_array_equal(weights.dequantize(mapped), weights.dequantize(whole))
    layers = jax.lax.scan(lambda _, q: (None, weights.dequantize(q)), None, whole)[1]
    np.testing.assert_array_equal(layers, weights.dequantize(whole))
    turned = weights.quantize(w.swapaxes(-1, -2), bits=4, group=4, axis=-1)
    np.testing.assert_array_equal(weights.dequantize(turned).swapaxes(-1, -2), dequantize(whole))
    grad = jax.grad(lambda s: jnp.sum(dequantize(dataclasses.replace(alone, scales=s))))
    unit = dataclasses.replace(alone, scales=jnp.ones_like(alone.scales))
    wanted = dequantize(unit).reshape(2, 4, 6).sum(1)
    np.testing.assert_allclose(grad(alone.scales), wanted)


@pytest.mark.parametrize(("bits", "group"), [(4, 128), (8, None)])
def test_a_compact_weight_quantises_as_its_dense_form_does(bits, group):
    w = sparse().astype(jnp.bfloat16)
    compact = weights.compress_nm(w, sj.NM(2, 4))
    both = quantize(compact, bits=bits, group=group)
    back = weights.decompress_nm(weights.dequantize(both))
    np.testing.assert_array_equal(back, weights.dequantize(quantize(w, bits=bits, group=group)))
    scales = 2 if group else 1
    assert both.nbytes == 256 * 8 * (bits / 2 + 1) / 8 + 4 * scales * 8
    with pytest.raises(TypeError, match="values are Quantized: call dequantize first"):
        weights.decompress_nm(both)


def test_parameters_come_back_quantised_with_their_bytes():
    w = sparse((128, 8))
    free = jax.random.normal(jax.random.key(2), (128, 8))
    params = {
        "a": {"kernel": w, "bias": jnp.ones(8)},
        "b": {"kernel": free},
        "c": {"kernel": jnp.where(free > 0.5, free, 0)},
        "embed": {"kernel": free},
    }
    masks = sj.dense_masks(params)
    masks["a"]["kernel"], masks["c"]["kernel"] = w != 0, free > 0.5
    fake, size = weights.quantize_params(params, masks, bits=4, group=64)
    for name in ("a", "b", "c"):
        wanted = weights.dequantize(weights.quantize(params[name]["kernel"], bits=4, group=64))
        np.testing.assert_array_equal(fake[name]["kernel"], wanted)
        assert ((fake[name]["kernel"] == 0) | (params[name]["kernel"] != 0)).all()
    for name, leaf in (("a", "bias"), ("embed", "kernel")):
        np.testing.assert_array_equal(fake[name][leaf], params[name][leaf])
    assert size["dense"] == 4 * (4 * 128 * 8 + 8)
    scales = 3 * 2 * 8 * 4
    kept = int((free > 0.5).sum())
    unchosen = 4 * (8 + 128 * 8)
    # half of the codes and a bit of position; all codes; the kept codes and a bit mask
    codes = 128 * 8 * (4 / 2 + 1) / 8 + 128 * 8 * 4 / 8 + -(-kept * 4 // 8) + 128 * 8 / 8
    assert size["stored"] == scales + unchosen + codes
    eight, larger = weights.quantize_params(params, where="^b/")
    np.testing.assert_array_equal(eight["a"]["kernel"], w)
    assert larger["stored"] == 4 * (3 * 128 * 8 + 8) + 128 * 8 + 4 * 8


def test_what_cannot_be_quantised_is_refused(unchecked):
    w = sparse((16, 4))
    compact = weights.compress_2to4(w)
    flat = weights.compress_nm(jnp.zeros((4, 4)), sj.NM(2, 4, axis=None))
    for weight, options, message in (
        (w, {"bits": 3}, "bits is 3; allowed are 4 and 8"),
        (w, {"group": 5}, "group is 5; it must divide axis -2, which is 16 long"),
        (w, {"group": 0}, "group is 0; it must divide"),
        (w, {"axis": 2}, "axis is 2; an array of 2 axes has none such"),
        (w[0], {}, "axis is -2; an array of 1 axes has none such"),
        (w.at[0].set(jnp.nan), {}, "w has 4 entries that are not finite"),
        (compact, {"group": 6}, "group is 6; it must be a multiple of 4, for 2:4"),
        (compact, {"axis": -1}, "axis is -1; the weight is compact along 0"),
        (flat, {}, "axis is None; the weight is compact along None"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.quantize(weight, **options)
    with pytest.raises(TypeError, match="w must be floating point, not int32"):
        weights.quantize(jnp.zeros((4, 4), jnp.int32))
    params = {"x": {"kernel": w}}
    with pytest.raises(ValueError, match="leaf 'x/kernel': group is 128; it must divide"):
        weights.quantize_params(params, group=128)
    with pytest.raises(ValueError, match="leaf 'x/kernel' has non-zeros outside its mask"):
        weights.quantize_params(params, {"x": {"kernel": jnp.zeros((16, 4), bool)}})
    with pytest.raises(ValueError, match="where matches no leaf"):
        weights.quantize_params(params, where="nothing")
