"""Statistical top-k with its options, the threshold alone, and lists of what is on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import sparsejax as sj

X = jnp.asarray(np.random.default_rng(0).normal(0.2, 1.5, (4, 6, 48)), jnp.float32)


@pytest.mark.vectors
def test_published_code_gives_the_same(reference, x64):
    file = reference("spark_transformer")
    for case in file.cases("topk"):
        dtype = jnp.dtype(case["dtype"])
        x, up = (jnp.asarray(case[name]).astype(dtype) for name in ("x", "cotangent"))
        rounding = jnp.bfloat16 if dtype == jnp.bfloat16 else None
        share = case["target_sparsity"]
        y, pull = jax.vjp(
            lambda x, s=share, r=rounding: sj.statistical_topk(x, target_sparsity=s, accum_dtype=r),
            x,
        )
        assert y.dtype == dtype
        # the published quantile is rounded to float32 on the way
        tolerance = {"float64": 5e-7, "float32": 2e-6, "bfloat16": 2**-8}[dtype.name]
        exact = 0 if dtype == jnp.bfloat16 else tolerance
        np.testing.assert_allclose(np.float64(y), case["y"], rtol=exact, atol=exact)
        np.testing.assert_allclose(
            np.float64(pull(up)[0]), case["grad_x"], rtol=tolerance, atol=tolerance
        )
    for case in file.cases("huber"):
        x, k = jnp.asarray(case["x"]), case["k"]
        np.testing.assert_allclose(
            sj.statistical_topk(x, k), case["statistical_topk"], rtol=1e-9, atol=1e-9
        )
        smooth = sj.statistical_topk(x, k, huber_delta=case["delta"])
        np.testing.assert_allclose(smooth, case["y"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["soft", "hard", "neg_inf", "mask"])
def test_any_axis(mode):
    where = X > -1
    found = sj.statistical_topk(X, 2, axis=1, mode=mode, where=where)
    expected = sj.statistical_topk(X.swapaxes(1, 2), 2, mode=mode, where=where.swapaxes(1, 2))
    np.testing.assert_array_equal(found, expected.swapaxes(1, 2))
    limit = sj.gaussian_threshold(X, 2, axis=1, where=where)
    assert limit.shape == (4, 1, 48)
    if mode == "mask":
        np.testing.assert_array_equal(found, (where & (limit < X)))


def test_the_smooth_form_is_once_differentiable_and_tends_to_the_sharp_one():
    def slope(entry, delta):
        row = X[0, 0].at[0].set(entry)
        smooth = lambda row: jnp.sum(  # noqa: E731
            sj.statistical_topk(row, 5, huber_delta=delta, stop_gradient_threshold=True)[0]
        )
        return float(jax.grad(smooth)(row)[0])

    # where the entry comes on: no step in the slope, which then rises to 1
    entries = jnp.linspace(0, 6, 61)
    slopes = np.asarray([slope(entry, 1.0) for entry in entries])
    assert slopes[0] == 0
    assert slopes[-1] == 1
    assert (np.diff(slopes) >= 0).all()
    assert np.diff(slopes).max() < 0.15
    sharp = sj.statistical_topk(X, 5)
    near = sj.statistical_topk(X, 5, huber_delta=1e-4)
    np.testing.assert_allclose(near, sharp, atol=1e-4)


def test_statistics_over_a_mesh_axis_are_those_of_the_whole(mesh):
    x = X.reshape(24, 48)
    up = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    def split(x):
        return sj.statistical_topk(x, 7, axis_name="model")

    spread = jax.shard_map(
        split, mesh=mesh, in_specs=P("data", "model"), out_specs=P("data", "model")
    )
    (y, pull), (expected, pull_whole) = (
        jax.vjp(jax.jit(f), x) for f in (spread, lambda x: sj.statistical_topk(x, 7))
    )
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pull(up)[0], pull_whole(up)[0], rtol=1e-5, atol=1e-6)


def test_a_constant_threshold_and_rows_without_deviation():
    flat = jnp.ones((2, 8))
    for options in ({}, {"accum_dtype": jnp.bfloat16}):
        y, pull = jax.vjp(lambda x, o=options: sj.statistical_topk(x, 2, **o), flat)
        assert not y.any()
        assert np.isfinite(pull(jnp.ones_like(y))[0]).all()
    _, pull = jax.vjp(lambda x: sj.statistical_topk(x, 5, stop_gradient_threshold=True), X)
    on = sj.statistical_topk(X, 5, mode="mask")
    np.testing.assert_array_equal(pull(jnp.ones_like(X))[0], on.astype(jnp.float32))


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 45))
def test_lists_hold_the_lowest_indices_and_say_what_is_left_out(mask, capacity):
    idx, count, overflow = sj.compact_indices(jnp.asarray(mask), capacity)
    expected = np.flatnonzero(mask)
    assert idx.shape == (capacity,)
    assert count == min(len(expected), capacity)
    assert overflow == max(0, len(expected) - capacity)
    np.testing.assert_array_equal(idx[: int(count)], expected[:capacity])
    assert not idx[int(count) :].any()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, "k is None and target_sparsity is None; exactly one must be given"),
        ({"k": 0}, "k is 0"),
        ({"k": float("nan")}, "k is nan"),
        ({"target_sparsity": 1.0}, "target_sparsity is 1.0"),
        ({"k": 2, "huber_delta": 0.0}, "huber_delta is 0.0 with mode 'soft'; it must be positive"),
        ({"k": 2, "huber_delta": 1.0, "mode": "hard"}, "with mode 'hard'; .* and mode 'soft'"),
        ({"k": 2, "accum_dtype": jnp.float16}, "accum_dtype is .*float16.*; allowed are bfloat16"),
        ({"k": 2, "accum_dtype": jnp.bfloat16, "where": X > 0}, "where does not go with"),
        ({"k": 2, "axis": 3}, r"axis 3 is not an axis of shape \(4, 6, 48\)"),
    ],
)
def test_bad_input_is_named(unchecked, options, error):
    with pytest.raises(ValueError, match=error):
        sj.statistical_topk(X, **options)


def test_integers_and_bad_capacities_are_refused(unchecked):
    with pytest.raises(TypeError, match="floating"):
        sj.statistical_topk(jnp.arange(4), 2)
    with pytest.raises(ValueError, match="capacity is 0; it must be at least 1"):
        sj.compact_indices(jnp.ones(3, bool), 0)
    with pytest.raises(ValueError, match="axis 1 is not an axis"):
        sj.gaussian_threshold(jnp.ones(3), 2, axis=1)
