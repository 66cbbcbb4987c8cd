"""The lazy neuron phenomenon: the vectors, top-k after ReLU, counts, and the sign lemma."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import sparsejax as sj
from sparsejax.activations import topk_mlp

mlp = jax.jit(topk_mlp.relu_mlp, static_argnames=("k", "selector"))
top_k = jax.jit(topk_mlp.top_k_activation, static_argnames=("k", "selector", "recall"))
stats_of = jax.jit(topk_mlp.activation_stats, static_argnames="threshold")


@functools.cache
def layer(d=12, f=32, *, biases=True):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"K": (d, f), "V": (f, d)} | ({"bK": (f,), "bV": (d,)} if biases else {})
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items())}


X = jax.random.normal(jax.random.key(1), (3, 5, 12))
A = jax.nn.relu(jax.random.normal(jax.random.key(2), (4, 6, 40)))


# the vectors; those of the calibration error are in tests/experiments/harness/test_metrics.py


@pytest.mark.vectors
def test_every_family_has_a_test(reference):
    assert reference("lazy_neuron").families() == {"mlp", "ece", "lemma"}


@pytest.mark.vectors
def test_mlps_and_their_gradients(reference):
    for case in reference("lazy_neuron").cases("mlp"):
        params = {name: jnp.asarray(case[name]) for name in ("K", "V")}
        x, k = jnp.asarray(case["x"]), case["k"]
        y, pull, inside = jax.vjp(
            lambda params, x, k=k: topk_mlp.relu_mlp(params, x, k=k), params, x, has_aux=True
        )
        grads, grad_x = pull(jnp.asarray(case["cotangent"]))
        plain = topk_mlp.relu_mlp(params, x)[1]
        of_relu = topk_mlp.activation_stats(plain["activation"])
        of_topk = topk_mlp.activation_stats(inside["activation"])
        for got, name in (
            (inside["pre_activation"], "pre_activation"),
            (inside["activation"], "topk_activation"),
            (y, "y"),
            (grad_x, "grad_x"),
            (grads["K"], "grad_K"),
            (grads["V"], "grad_V"),
            (100 * of_relu["nonzero_fraction"], "percent_nonzero_relu"),
            (100 * of_topk["nonzero_fraction"], "percent_nonzero_topk"),
            (of_relu["neuron_rate"], "neuron_activation_rate"),
        ):
            assert got.dtype == jnp.float64
            np.testing.assert_allclose(got, case[name], rtol=1e-9, atol=1e-9, err_msg=name)
        assert (inside["activation"] > 0).sum(-1).max() <= k
        singles = [v.astype(jnp.float32) for v in (params["K"], params["V"], x)]
        narrow, _ = topk_mlp.relu_mlp({"K": singles[0], "V": singles[1]}, singles[2], k=k)
        np.testing.assert_allclose(narrow, case["y"], rtol=1e-4, atol=1e-4)


def pre_activation_gradient(p, v, label):
    """Gradient of the cross-entropy of logits `relu(p) v^T` in p: v is `[classes, f]`."""

    def loss(p):
        logits, _ = topk_mlp.relu_mlp({"K": jnp.eye(p.size, dtype=p.dtype), "V": v.T}, p)
        return -jax.nn.log_softmax(logits)[label]

    return jax.grad(loss)(p)


@pytest.mark.vectors
def test_active_neurons_are_pushed_down_from_the_first_step(reference):
    for case in reference("lazy_neuron").cases("lemma"):
        p, label = jnp.asarray(case["pre_activation"]), case["label"]
        classes, on = case["num_classes"], np.asarray(case["pre_activation"]) > 0
        exact = pre_activation_gradient(p, jnp.asarray(case["V0"]), label)
        np.testing.assert_allclose(exact, case["grad0"], rtol=1e-9, atol=1e-9)
        draws = jax.random.uniform(
            jax.random.key(0), (case["num_draws"], classes, p.size), minval=-1.0
        )
        grads = jax.jit(jax.vmap(pre_activation_gradient, (None, 0, None)))(p, draws, label)
        mean, error = grads.mean(0), grads.std(0) / np.sqrt(len(draws))
        for found, spread in ((mean, error), (case["mean_grad"], case["std_err"])):
            assert (found[on] >= 3 * spread[on]).all()
            assert (found[~on] == 0).all()


# top-k


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-3, 3), min_size=7, max_size=7), st.sampled_from([1, 3, 6, 7]))
def test_the_kept_are_the_largest_of_the_activated(values, k):
    a = np.maximum(np.asarray(values, np.float32), 0)
    y = np.asarray(top_k(jnp.asarray(a), k))
    kept = np.argsort(-a, kind="stable")[:k]
    wanted = np.zeros_like(a)
    wanted[kept] = a[kept]
    np.testing.assert_array_equal(y, wanted)
    # a k beyond the positives turns no zero into an active neuron
    assert (y > 0).sum() == min(k, (a > 0).sum())


def test_top_k_of_large_negatives_is_not_that_of_magnitudes():
    params = {"K": jnp.eye(4), "V": jnp.eye(4)}
    y, inside = mlp(params, jnp.asarray([-9.0, 1.0, 2.0, -3.0]), k=1)
    np.testing.assert_array_equal(y, [0, 0, 2, 0])
    np.testing.assert_array_equal(inside["pre_activation"], [-9, 1, 2, -3])


def test_selectors_keep_about_k_and_pass_gradients_where_they_keep():
    for selector, low, high in (("exact", 5, 5), ("approx", 4, 5), ("statistical", 2, 9)):
        y, pull = jax.vjp(lambda a, s=selector: top_k(a, 5, selector=s), A)
        kept = np.asarray(y) > 0
        assert low <= kept.sum(-1).mean() <= high
        np.testing.assert_array_equal(np.asarray(y)[kept], np.asarray(A)[kept])
        up = jnp.cos(jnp.arange(A.size, dtype=jnp.float32)).reshape(A.shape)
        (grad,) = pull(up)
        np.testing.assert_array_equal(np.asarray(grad)[kept], np.asarray(up)[kept])
        assert not np.asarray(grad)[~kept & (np.asarray(A) > 0)].any()
        np.testing.assert_array_equal(top_k(A, 40, selector=selector), A)
    _, idx = jax.lax.approx_max_k(A, 5, recall_target=0.95)
    found = np.take_along_axis(np.asarray(top_k(A, 5, selector="approx")), np.asarray(idx), -1)
    np.testing.assert_array_equal(found, np.take_along_axis(np.asarray(A), np.asarray(idx), -1))
    on = sj.statistical_topk(A, 5, mode="mask")
    np.testing.assert_array_equal(top_k(A, 5, selector="statistical"), jnp.where(on, A, 0.0))


def test_values_without_bounds_do_not_become_nan():
    a = jnp.asarray([1.0, jnp.inf, 2.0, jnp.inf])
    np.testing.assert_array_equal(top_k(a, 1), [0, jnp.inf, 0, 0])
    np.testing.assert_array_equal(top_k(jnp.asarray([1.0, jnp.nan, 2.0]), 1), [0, 0, 2])


def test_biases_and_the_plain_network():
    params = layer()
    y, inside = mlp(params, X)
    hidden = jnp.maximum(X @ params["K"] + params["bK"], 0)
    np.testing.assert_allclose(inside["activation"], hidden, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(y, hidden @ params["V"] + params["bV"], rtol=1e-4, atol=1e-4)
    for k in (None, 32):
        np.testing.assert_array_equal(mlp(params, X, k=k)[0], y)
    assert np.abs(mlp(params, X, k=4)[0] - y).max() > 0.1


# counts


def test_statistics_are_those_of_the_definition():
    valid = jnp.arange(24).reshape(4, 6) % 5 != 0
    stats = stats_of(A, where=valid)
    rows = np.asarray(A)[np.asarray(valid)]
    np.testing.assert_array_equal(stats["fired"], (rows > 0).sum(0))
    assert stats["tokens"] == len(rows)
    np.testing.assert_allclose(stats["neuron_rate"], (rows > 0).mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats["nonzero_fraction"], (rows > 0).mean(), rtol=1e-6)
    np.testing.assert_allclose(stats["count"], (rows > 0).sum(1).mean(), rtol=1e-6)
    assert stats["fired"].dtype == stats["tokens"].dtype == jnp.int32
    nothing = stats_of(A, where=jnp.zeros((4, 6), bool))
    assert not any(np.asarray(value).any() for value in nothing.values())
    # about half of a network without training
    fresh = mlp(layer(biases=False), X)[1]["activation"]
    assert 0.4 < stats_of(fresh)["nonzero_fraction"] < 0.6


def test_a_threshold_counts_both_signs_and_narrow_values_stay_positive():
    a = jnp.asarray([[-3.0, 0.2, 1.0], [0.5, -0.1, 0.0]])
    np.testing.assert_array_equal(stats_of(a)["fired"], [1, 1, 1])
    np.testing.assert_array_equal(stats_of(a, threshold=0.15)["fired"], [2, 1, 1])
    np.testing.assert_array_equal(stats_of(a, threshold=0.0)["fired"], [2, 2, 1])
    tiny = jnp.asarray([1e-30, 0.0, 3.0], jnp.bfloat16)
    stats = stats_of(tiny)
    np.testing.assert_array_equal(stats["fired"], [1, 0, 1])
    assert (stats["tokens"], stats["neuron_rate"].dtype) == (1, jnp.float32)


def test_merged_statistics_are_those_of_all_tokens():
    parts = [stats_of(A[i : i + 1], where=jnp.arange(6)[None] <= i) for i in range(4)]
    valid = jnp.arange(6) <= jnp.arange(4)[:, None]
    merged = topk_mlp.merge_activation_stats(*parts)
    for name, value in stats_of(A, where=valid).items():
        np.testing.assert_array_equal(merged[name], value, err_msg=name)
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *parts)
    twice = topk_mlp.merge_activation_stats(stacked, stacked)
    np.testing.assert_array_equal(twice["fired"], 2 * stacked["fired"])
    np.testing.assert_array_equal(twice["neuron_rate"], stacked["neuron_rate"])


# composition


def test_batches_narrow_floats_and_one_trace():
    params = layer()
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    y, inside = mlp(narrow, X.astype(jnp.bfloat16), k=4)
    assert y.dtype == inside["activation"].dtype == jnp.bfloat16
    assert (inside["activation"] > 0).sum(-1).max() == 4
    rows = jax.jit(jax.vmap(lambda x: topk_mlp.relu_mlp(params, x, k=4)[0]))(X.reshape(15, 12))
    np.testing.assert_allclose(rows.reshape(X.shape), mlp(params, X, k=4)[0], rtol=1e-4, atol=1e-4)
    traces = []

    @jax.jit
    def step(params, x):
        traces.append(0)
        return jax.grad(lambda p: topk_mlp.relu_mlp(p, x, k=4)[0].sum())(params)

    step(params, X)
    step(params, X + 1)
    assert len(traces) == 1


def test_sharded_layers_give_the_same(mesh):
    params = layer(d=16)
    x = jax.random.normal(jax.random.key(3), (8, 16))
    specs = {"K": (None, "model"), "V": ("model", None), "bK": ("model",), "bV": (None,)}
    spread = {
        n: jax.device_put(w, NamedSharding(mesh, PartitionSpec(*specs[n])))
        for n, w in params.items()
    }
    tokens = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    wanted, inside = mlp(params, x, k=5)
    found, there = mlp(spread, tokens, k=5)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    stats = stats_of(there["activation"])
    np.testing.assert_array_equal(stats["fired"], stats_of(inside["activation"])["fired"])


def test_bad_input_is_named(unchecked):
    params = layer()
    stats = stats_of(A)
    for call, message in (
        (lambda: topk_mlp.top_k_activation(A, 0), r"k is 0; it must be in \[1, 40\]"),
        (lambda: topk_mlp.relu_mlp(params, X, k=33), r"k is 33; it must be in \[1, 32\]"),
        (lambda: topk_mlp.top_k_activation(A, 2, selector="sorted"),
         "selector is 'sorted'; allowed are exact, approx, statistical"),
        (lambda: topk_mlp.top_k_activation(A, 2, selector="approx", recall=0.0),
         r"recall is 0.0; it must be in \(0, 1\]"),
        (lambda: topk_mlp.relu_mlp({"K": X, "W": X}, X), r"params has \['K', 'W'\]; it must have"),
        (lambda: topk_mlp.relu_mlp(params | {"b": X}, X), "and may have bK, bV"),
        (lambda: topk_mlp.activation_stats(A, threshold=-1.0), "threshold is -1.0; it must not be"),
        (topk_mlp.merge_activation_stats, "stats is empty: there is nothing to merge"),
        (lambda: topk_mlp.merge_activation_stats(stats, stats_of(A[..., :3])),
         r"stats are of layers of shapes \[\(3,\), \(40,\)\]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
