"""Exact top-k: the laws of a top-k, on every kind of float."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding, PartitionSpec

import sparsejax as sj

SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-42, -1e-42, 2.0, 3.0, np.inf, -np.inf, np.nan]
values = hnp.arrays(np.float32, (3, 17), elements=st.sampled_from(SPECIAL) | st.floats(width=32))
topk = jax.jit(sj.exact_topk_mask)


def by_sorting(x, k):
    """The definition: NaN lowest, equal values by index."""
    key = np.where(np.isnan(x), -np.inf, x.astype(np.float64))
    tie = np.where(np.isnan(x), 1, 0)  # NaN below -inf
    order = np.lexsort((np.arange(x.shape[-1])[None].repeat(len(x), 0), tie, -key), axis=-1)
    mask = np.zeros(x.shape, bool)
    np.put_along_axis(mask, order[:, :k], True, axis=-1)
    return mask


@settings(max_examples=150, deadline=None)
@given(values, st.integers(0, 17))
def test_equals_the_sort(x, k):
    np.testing.assert_array_equal(topk(jnp.asarray(x), jnp.int32(k)), by_sorting(x, k))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_every_float_dtype_and_one_k_per_row(dtype, x64):
    x = jax.random.normal(jax.random.key(0), (3, 17)).astype(dtype)
    k = jnp.asarray([0, 5, 17])
    mask = sj.exact_topk_mask(x, k)
    for row, count in zip(range(3), k):
        wide = np.asarray(x[row : row + 1].astype(jnp.float64))
        np.testing.assert_array_equal(mask[row : row + 1], by_sorting(wide, int(count)))


def test_axes_compete_separately():
    x = jax.random.normal(jax.random.key(1), (4, 6, 5))
    per_layer = sj.exact_topk_mask(x, 7, axis=(-2, -1))
    np.testing.assert_array_equal(per_layer.sum((1, 2)), [7] * 4)
    np.testing.assert_array_equal(per_layer[2], sj.exact_topk_mask(x[2], 7, axis=None))
    np.testing.assert_array_equal(sj.exact_topk_mask(x, 2, axis=1).sum(1), np.full((4, 5), 2))
    assert sj.exact_topk_mask(jnp.zeros((0, 3)), 2).shape == (0, 3)
    assert sj.exact_topk_mask(jnp.zeros((2, 0)), 0).shape == (2, 0)


@settings(max_examples=50, deadline=None)
@given(values, st.integers(1, 17))
def test_threshold_is_the_kth_largest(x, k):
    threshold = np.asarray(jax.jit(sj.exact_topk_threshold)(jnp.asarray(x), jnp.int32(k)))[:, 0]
    last = np.sort(np.where(np.isnan(x), -np.inf, x), axis=-1)[:, -k]
    is_nan = np.isnan(x).sum(-1) > 17 - k
    np.testing.assert_array_equal(threshold[~is_nan], last[~is_nan])
    assert np.isnan(threshold[is_nan]).all()


def test_vmap_and_a_traced_k_agree():
    x = jnp.round(jax.random.normal(jax.random.key(0), (3, 17)))
    batched = jax.vmap(lambda row, k: sj.exact_topk_mask(row, k))(x, jnp.arange(3) + 4)
    np.testing.assert_array_equal(batched, sj.exact_topk_mask(x, jnp.arange(3) + 4))


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
def test_topk_mask_rounds_half_to_even_in_float32(sparsity):
    scores = jax.random.uniform(jax.random.key(0), (5, 7))
    wanted = max(1, round(float(np.float32(35) * (np.float32(1) - np.float32(sparsity)))))
    assert sj.topk_mask(scores, sparsity).sum() == wanted
    assert jax.jit(sj.topk_mask)(scores, jnp.float32(sparsity)).sum() == wanted


def test_keep_count_is_exact_for_large_leaves():
    assert sj.keep_count(2**31 + 1000, 0.1) == round((2**31 + 1000) * 0.1)
    assert sj.keep_count(0, 0.5) == 0
    assert int(jax.jit(functools.partial(sj.keep_count, 1000))(jnp.float32(0.1))) == 100


def test_a_sharded_mask_equals_one_device_without_gathering(mesh):
    x = jnp.round(8 * jax.random.normal(jax.random.key(0), (64, 128)))
    sharding = NamedSharding(mesh, PartitionSpec("data", "model"))
    function = jax.jit(lambda s: sj.topk_mask(s, 0.7), out_shardings=sharding)
    sharded = jax.device_put(x, sharding)
    np.testing.assert_array_equal(function(sharded), sj.topk_mask(x, 0.7))
    text = function.lower(sharded).compile().as_text()
    assert "all-gather" not in text
    assert "all-reduce" in text


def test_errors_name_argument_and_range(unchecked):
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"k is 4; it must be in \[0, 3\]"):
        sj.exact_topk_mask(x, 4)
    with pytest.raises(ValueError, match=r"k is 0; it must be in \[1, 3\]"):
        sj.exact_topk_threshold(x, 0)
    with pytest.raises(ValueError, match=r"axis 2 is not an axis of shape \(2, 3\)"):
        sj.exact_topk_mask(x, 1, axis=2)
    for sparsity in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"sparsity is {sparsity}; it must be in \[0, 1\]"):
            sj.topk_mask(x, sparsity)
    with pytest.raises(ValueError, match=r"density is 2.0; it must be in \[0, 1\]"):
        sj.keep_count(3, 2.0)
