"""TEAL, CATS and R-Sparse: the vectors, thresholds that reach their sparsity, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.activations import wina, wina_baselines

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.mark.vectors
def test_baselines(reference):
    file = reference("wina")
    for case in file.cases("teal"):
        options = {"num_bins": case["num_bins"], "outlier": case["outlier_threshold"]}
        centers, counts = wina_baselines.teal_histogram(case["acts"], **options)
        np.testing.assert_allclose(centers, case["bin_centers"], rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(counts, case["counts"])
        for s, threshold in zip(case["sparsity"], case["threshold"]):
            found = wina_baselines.teal_threshold(case["acts"], float(s), **options)
            np.testing.assert_allclose(found, threshold, rtol=1e-6)
    for case in file.cases("cats"):
        y = wina_baselines.cats_activation(jnp.asarray(case["z"]), case["threshold"])
        np.testing.assert_allclose(y, case["y"], rtol=1e-9, atol=1e-9)
        for s, threshold in zip(case["sparsity"], case["hist_threshold"]):
            found = wina_baselines.cats_threshold(case["post_act"], float(s))
            np.testing.assert_allclose(found, threshold, rtol=1e-9)
    for case in file.cases("rsparse"):
        x, kernel = jnp.asarray(case["x"]), jnp.asarray(case["weight"].T)
        np.testing.assert_allclose(wina.column_norms(kernel, where="^$"), case["scale"], rtol=1e-9)
        settings = {"threshold": case["threshold"], "prefill_ratio": case["prefill_ratio"]}
        factors = wina_baselines.low_rank_factors(kernel, case["rank"])
        for rank in ({"rank": case["rank"]}, {"factors": factors}):
            y = wina_baselines.r_sparse_linear(x, kernel, **rank, **settings)
            np.testing.assert_allclose(y, case["y"], rtol=1e-9, atol=1e-9)


def test_thresholds_reach_their_sparsity():
    x = normal(4000)
    for s in (0.3, 0.8):
        exact = wina.empirical_icdf(jnp.abs(x), s)
        symmetric = wina_baselines.teal_threshold(x, s)
        for threshold, off in ((exact, 1e-3), (symmetric, 0.03)):
            dropped = 1 - float(
                wina.wina_mask(x, jnp.ones(()), by="threshold", threshold=threshold).mean()
            )
            assert abs(dropped - s) < off
        gate = jax.nn.silu(x)
        limit = wina_baselines.cats_threshold(gate, s)
        kept = wina_baselines.cats_activation(x, limit)
        assert abs(float(jnp.mean(kept == 0)) - s) < 0.01
        np.testing.assert_array_equal(kept, jnp.where(jnp.abs(gate) > limit, gate, 0))
    assert wina_baselines.cats_threshold(jnp.ones(4), 1) == np.inf
    # the outer edges of TEAL's histogram are the extremes
    centers, counts = wina_baselines.teal_histogram(x, num_bins=10, outlier=0)
    assert counts.sum() == 4000
    assert centers[0] == float(x.min())


def test_a_negative_threshold_of_cats_is_that_of_its_code():
    z = jnp.asarray([-0.001, 0.0005, 1.0])
    limit = wina_baselines.cats_threshold(jax.nn.silu(z), 0.1)
    assert limit < 0
    a = jax.nn.silu(z)
    np.testing.assert_allclose(
        wina_baselines.cats_activation(z, limit), a * jnp.asarray([2.0, 2.0, 1.0])
    )


def test_cats_and_r_sparse_compose():
    z, kernel = normal(4, 6, 8), normal(8, 5)
    slope = jax.jit(jax.grad(lambda z: wina_baselines.cats_activation(z, 0.3).sum()))(z)
    dense = jax.grad(lambda z: jax.nn.silu(z).sum())(z)
    on = jnp.abs(jax.nn.silu(z)) > 0.3
    np.testing.assert_allclose(slope, jnp.where(on, dense, 0), rtol=1e-5, atol=1e-6)

    run = functools.partial(wina_baselines.r_sparse_linear, threshold=1.0, prefill_ratio=0.5)
    whole, few = (jax.jit(functools.partial(run, rank=r))(z, kernel) for r in (5, 2))
    np.testing.assert_allclose(whole, z @ kernel, rtol=1e-4, atol=1e-4)  # nothing is lost
    assert float(jnp.abs(few - whole)[:, 3:].max()) > 0.1
    np.testing.assert_allclose(few[:, :3], whole[:, :3], rtol=1e-4, atol=1e-4)
    each = jax.vmap(lambda z: run(z, kernel, rank=2))(z)
    np.testing.assert_allclose(each, few, rtol=1e-4, atol=1e-4)
    narrow = run(z.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), rank=2)
    assert narrow.dtype == jnp.bfloat16
    channels, rank = wina_baselines.r_sparse_budget(64, 32, 0.5, 0.75)
    assert (channels, rank) == (24, 2)
    assert wina_baselines.r_sparse_budget(64, 32, 0.5, 1) == (32, 0)
    assert channels * 32 + rank * 96 <= 64 * 32 * 0.5


def test_errors_of_baselines(unchecked):
    x, kernel, run = normal(3, 4), normal(4, 2), wina_baselines.r_sparse_linear
    for function, arguments, options, message in (
        (wina_baselines.teal_histogram, (x,), {"num_bins": 2}, "num_bins is 2; it must be at lea"),
        (wina_baselines.teal_histogram, (x,), {"outlier": 0.5}, r"outlier is 0.5; .* \[0, 0.5\)"),
        (wina_baselines.teal_histogram, (x[:0],), {}, "values is empty"),
        (wina_baselines.teal_threshold, (x, 2), {}, "sparsity is 2"),
        (wina_baselines.cats_threshold, (x, -1), {}, "sparsity is -1"),
        (wina_baselines.cats_threshold, (x[:0], 0.5), {}, "values is empty"),
        (wina_baselines.r_sparse_budget, (4, 2, 0.5, 1.5), {}, "alpha is 1.5"),
        (wina_baselines.r_sparse_budget, (4, 2, 1.5, 0.5), {}, "sparsity is 1.5"),
        (wina_baselines.low_rank_factors, (kernel, 3), {}, r"rank is 3; it must be in \[0, 2\]"),
        (run, (x, kernel), {"threshold": 0.1, "prefill_ratio": 1}, "rank is None; exactly one of"),
        (run, (x, kernel), {"rank": 1, "threshold": 0.1, "prefill_ratio": 2}, "prefill_ratio is 2"),
    ):
        with pytest.raises(ValueError, match=message):
            function(*arguments, **options)
