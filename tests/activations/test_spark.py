"""Spark FFN and attention: the reference vectors, sparse against masked, properties, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.activations.spark import (
    neuron_major,
    spark_attention,
    spark_ffn,
    statistical_ffn,
)


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def layer(d=12, r=5, f=40, dtype=jnp.float32):
    sizes = {"K1": (r, f), "K2": (d - r, f), "V": (f, d)}
    return {
        name: normal(*size, seed=i, dtype=dtype) for i, (name, size) in enumerate(sizes.items())
    }


def causal(n, m):
    return jnp.arange(m) <= jnp.arange(n)[:, None] + m - n


@pytest.mark.vectors
def test_the_layers_are_those_of_the_vectors(reference):
    file = reference("spark_transformer")
    close = {"rtol": 1e-9, "atol": 1e-9}
    for case in file.cases("ffn"):
        params = {name: jnp.asarray(case[name]) for name in ("K1", "K2", "V")}
        x, r, k, y = jnp.asarray(case["x"]), case["r"], case["k"], case["y"]
        masked, found = spark_ffn(params, x, r=r, k=k)
        np.testing.assert_allclose(masked, y, **close)
        np.testing.assert_allclose(found["threshold"], case["threshold"], **close)
        np.testing.assert_array_equal(found["num_active"], case["num_active"])
        f = params["V"].shape[0]
        sparse, _ = spark_ffn(neuron_major(params), x, r=r, k=k, sparse_capacity=f)
        np.testing.assert_allclose(sparse, y, **close)
    for case in file.cases("attn"):
        q, k, v = (jnp.asarray(case[name]) for name in ("q", "K", "V"))
        mask = causal(q.shape[1], k.shape[1]) if case["causal"] else None
        y, found = spark_attention(
            q, k, v, r=case["r"], top_k=case["k"], mask=mask, scale=case["scale"]
        )
        np.testing.assert_allclose(y, case["y"], **close)
        np.testing.assert_array_equal(found["keep"], case["keep_mask"])
        np.testing.assert_allclose(found["threshold"], case["threshold"], **close)
        np.testing.assert_allclose(found["probs"], case["probs"], **close)
    for case in file.cases("mlp"):
        names = ("gate_proj", "up_proj", "down_proj")
        arrays = [jnp.asarray(case[name]) for name in ("x", *names)]
        share = case["target_sparsity"]

        def run(x, gate, up, down, share=share):
            params = {"gate": gate.T, "up": up.T, "down": down.T}
            return statistical_ffn(params, x, target_sparsity=share)

        y, pull = jax.vjp(run, *arrays)
        # the published quantile is rounded to float32 on the way
        loose = {"rtol": 5e-7, "atol": 5e-7} if share else close
        np.testing.assert_allclose(y, case["y"], **loose)
        for name, gradient in zip(("x", *names), pull(jnp.asarray(case["cotangent"]))):
            np.testing.assert_allclose(gradient, case[f"grad_{name}"], **loose)


def test_reading_the_rows_that_are_on_gives_what_masking_gives():
    params, x = neuron_major(layer()), normal(3, 4, 12, seed=9)

    @jax.jit
    def both(params, x):
        def run(capacity):
            def f(params, x):
                return spark_ffn(params, x, r=5, k=6, sparse_capacity=capacity)[0]

            y, pull = jax.vjp(f, params, x)
            return y, pull(jnp.cos(y))

        return run(None), run(40)

    (y, (dparams, dx)), (sparse, (found, dx_sparse)) = both(params, x)
    np.testing.assert_allclose(sparse, y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx_sparse, dx, rtol=1e-4, atol=1e-4)
    for name in ("K1", "V"):
        np.testing.assert_allclose(found[name], dparams[name], rtol=1e-4, atol=1e-4)
    # the masked form reads K2, the sparse one its rows
    np.testing.assert_allclose(found["K2_rows"], dparams["K2"].T, rtol=1e-4, atol=1e-4)


def test_what_finds_no_room_is_counted_and_left_out():
    params, x = neuron_major(layer()), normal(5, 12, seed=3)
    full, found = spark_ffn(params, x, r=5, k=10)
    y, cut = spark_ffn(params, x, r=5, k=10, sparse_capacity=4)
    np.testing.assert_array_equal(cut["overflow"], np.maximum(found["num_active"] - 4, 0))
    np.testing.assert_array_equal(cut["num_active"], found["num_active"])
    fits = np.asarray(cut["overflow"]) == 0
    np.testing.assert_allclose(y[fits], full[fits], rtol=1e-5, atol=1e-5)
    assert not np.allclose(y[~fits], full[~fits])


def test_about_k_neurons_are_on_and_all_where_k_is_the_width():
    params = layer(d=64, r=32, f=1024)
    x = normal(64, 64, seed=5)
    _, found = spark_ffn(params, x, r=32, k=80)
    assert abs(float(found["num_active"].mean()) - 80) < 4
    y, found = spark_ffn(params, x, r=32, k=1024)
    assert (found["num_active"] == 1024).all()
    scores = x[:, :32] @ params["K1"]
    expected = jax.nn.gelu(scores) * (x[:, 32:] @ params["K2"]) @ params["V"]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("r", [1, 20, 63])
def test_as_many_parameters_as_a_gated_layer_of_two_thirds(r):
    d, width = 64, 96
    spark = layer(d=d, r=r, f=3 * width // 2)
    assert sum(p.size for p in spark.values()) == 3 * d * width


def test_rows_that_see_no_key_give_zero_and_finite_gradients():
    q, k, v = normal(2, 3, 8), normal(2, 5, 8, seed=1), normal(2, 5, 4, seed=2)
    mask = jnp.ones((3, 5), bool).at[1].set(False)

    def total(q, k, v):
        return jnp.sum(jnp.sin(spark_attention(q, k, v, r=3, top_k=2, mask=mask)[0]))

    y, found = spark_attention(q, k, v, r=3, top_k=2, mask=mask)
    assert not y[:, 1].any()
    assert not found["keep"][:, 1].any()
    gradients = jax.grad(total, argnums=(0, 1, 2))(q, k, v)
    assert all(np.isfinite(g).all() for g in gradients)
    assert not gradients[0][:, 1].any()


def test_few_keys_are_all_kept_and_hidden_ones_do_not_matter():
    q, k, v = normal(1, 4, 8), normal(1, 4, 8, seed=1), normal(1, 4, 8, seed=2)
    run = jax.jit(lambda k, v: spark_attention(q, k, v, r=4, top_k=2, mask=causal(4, 4)))
    y, found = run(k, v)
    assert (found["keep"][0, :2] == causal(4, 4)[:2]).all()
    moved, _ = run(k.at[:, 3].set(99.0), v.at[:, 3].set(99.0))
    np.testing.assert_array_equal(moved[:, :3], y[:, :3])


def test_bfloat16_and_vmap():
    params = layer(dtype=jnp.bfloat16)
    x = normal(4, 12, seed=1, dtype=jnp.bfloat16)
    y, found = spark_ffn(params, x, r=5, k=6)
    assert y.dtype == jnp.bfloat16
    assert found["threshold"].dtype == jnp.float32
    rows = neuron_major(params)
    sparse = jax.vmap(lambda x: spark_ffn(rows, x, r=5, k=6, sparse_capacity=40)[0])(x)
    np.testing.assert_allclose(np.float32(sparse), np.float32(y), rtol=0.1, atol=0.3)
    q = normal(2, 3, 8, dtype=jnp.bfloat16)
    assert spark_attention(q, q, q, r=4, top_k=2)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("changes", "options", "error"),
    [
        ({}, {"r": 0}, "r is 0; it must be between 1 and 11, for 12 features"),
        ({}, {"r": 12}, "r is 12; it must be between 1 and 11"),
        ({}, {"k": 0}, "k is 0"),
        ({}, {"sparse_capacity": 0}, "sparse_capacity is 0; it must be at least 1"),
        ({}, {"sparse_capacity": 4}, "params has no K2_rows"),
        ({"K1": jnp.ones((5, 3))}, {}, r"params\['K1'\] has shape \(5, 3\); it must be \(5, 40\)"),
    ],
)
def test_bad_layers_are_named(unchecked, changes, options, error):
    with pytest.raises(ValueError, match=error):
        spark_ffn(layer() | changes, normal(12), **({"r": 5, "k": 6} | options))


def test_bad_attention_is_named(unchecked):
    q, k = normal(2, 3, 8), normal(2, 5, 8)
    with pytest.raises(ValueError, match="r is 8; it must be between 1 and 7"):
        spark_attention(q, k, k, r=8, top_k=2)
    with pytest.raises(ValueError, match=r"q, k and v have shapes .* must be \[\*h, n, dh\]"):
        spark_attention(q, k[:1], k, r=4, top_k=2)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 2\); it must be \(3, 5\)"):
        spark_attention(q, k, k, r=4, top_k=2, mask=jnp.ones((2, 2), bool))
    with pytest.raises(ValueError, match="k is -1"):
        spark_attention(q, k, k, r=4, top_k=-1)
    params = {"gate": jnp.ones((8, 4)), "up": jnp.ones((8, 3)), "down": jnp.ones((4, 8))}
    with pytest.raises(ValueError, match=r"params\['up'\] has shape"):
        statistical_ffn(params, q, target_sparsity=0.5)
