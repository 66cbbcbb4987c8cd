"""Sparse layers of `Llama`: parameters, masked against decoded, patterns by layer, bad settings."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from sparsejax.core import named_leaves
from sparsejax.models import (
    Gpt,
    Llama,
    LlamaConfig,
    generate,
    gpt_config,
    init_cache,
    param_specs,
    parameter_count,
    unroll,
)
from sparsejax.models.llama_config import llama_config

BASE = LlamaConfig(
    vocab_size=40, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=24
)
SPARK_ATTENTION = {"attention": "spark", "attention_k": 4, "attention_r": 4}
KINDS = {
    "gated": {"activation": "gelu", "positions": "learned"},
    "pattern": {"activation": "gelu", "sparsity_pattern": (0.75, 0.75, 0.0)},
    "relu": {"ffn": "relu", "ffn_k": 6},
    "spark": {"ffn": "spark", "ffn_k": 8, "ffn_r": 16, **SPARK_ATTENTION},
    "window": {"ffn": "spark", "ffn_k": 8, "sliding_window": 5, "positions": "learned",
               **SPARK_ATTENTION},
    "block": {"ffn": "block", "n_experts": 8},
}  # fmt: skip


@functools.cache
def built(kind, **overrides):
    config = dataclasses.replace(BASE, **KINDS[kind], **overrides)
    return Llama(config, rngs=nnx.Rngs(0))


def ids(b=2, t=10):
    return jax.random.randint(jax.random.key(1), (b, t), 0, BASE.vocab_size)


@nnx.jit
def detailed(model, tokens):
    hidden, found = model.detailed(tokens)
    return model.logits(hidden), found


@nnx.jit
def decode(model, tokens, cache):
    return model.decode(tokens, cache)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_counted_and_laid_out(kind):
    model = built(kind)
    params = nnx.state(model)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameter_count(model.config)
    assert set(dict(named_leaves(nnx.state(model, nnx.Param)))) == set(dict(named_leaves(params)))
    specs = dict(named_leaves(param_specs(params)))
    assert len(specs) == len(jax.tree.leaves(params))


def test_a_spark_ffn_has_the_parameters_of_a_gated_one():
    gated = dataclasses.replace(BASE, d_ff=64)
    spark = dataclasses.replace(BASE, d_ff=96, ffn="spark", ffn_k=8)
    assert parameter_count(gated) == parameter_count(spark)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_equals_the_masked_model(kind):
    """Prefill, then one token after the other, stacked and unrolled, for two sequences and one."""
    model, tokens = built(kind), ids()
    expected, _ = detailed(model, tokens)
    for decoder in (model, unroll(model)):
        for rows in (2, 1):
            cache = init_cache(model.config, rows, 12)
            logits, cache = decode(decoder, tokens[:rows, :6], cache)
            got = [logits]
            for i in range(6, 10):
                logits, cache = decode(decoder, tokens[:rows, i : i + 1], cache)
                got.append(logits)
            np.testing.assert_allclose(
                jnp.concatenate(got, axis=1), expected[:rows], rtol=1e-4, atol=1e-4
            )
    np.testing.assert_allclose(detailed(unroll(model), tokens)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["spark", "block"])
def test_generation_is_that_of_the_masked_model(kind):
    model, prompt = built(kind), ids(2, 5)
    tokens = prompt
    for _ in range(4):
        logits, _ = detailed(model, jnp.pad(tokens, ((0, 0), (0, 10 - tokens.shape[1]))))
        best = jnp.argmax(logits[:, tokens.shape[1] - 1], axis=-1)[:, None]
        tokens = jnp.concatenate([tokens, best.astype(tokens.dtype)], axis=1)
    np.testing.assert_array_equal(generate(unroll(model), prompt, max_new_tokens=4), tokens)


def test_details():
    """What each kind tells, against what it must be."""
    tokens = ids()
    _, found = detailed(built("pattern"), tokens)
    assert found["num_active"].shape == (2, 2, 10)  # the two layers with a target
    assert 0 < float(found["num_active"].mean()) < 24
    _, found = detailed(built("relu"), tokens)
    assert found["num_active"].shape == (3, 2, 10)
    assert int(found["num_active"].max()) == 6
    _, found = detailed(built("spark"), tokens)
    assert abs(float(found["num_active"].mean()) - 8) < 3
    kept = np.asarray(found["keys_kept"])
    assert kept.shape == (3, 2, 4, 10)
    seen = np.broadcast_to(np.arange(1, 11), kept.shape)
    assert (kept[seen <= 4] == seen[seen <= 4]).all()
    assert (kept <= seen).all()
    assert (kept[seen > 6] < seen[seen > 6]).all()
    _, found = detailed(built("block"), tokens)
    assert found["gates"].shape == (3, 2, 10, 8)
    assert ((found["gates"] > 0) == (found["logits"] > 0)).all()


def test_a_pattern_of_zeros_is_the_plain_model():
    plain = built("gated")
    zeros = dataclasses.replace(plain.config, sparsity_pattern=(0.0,) * 3)
    other = nnx.merge(nnx.split(Llama(zeros, rngs=nnx.Rngs(1)))[0], nnx.state(plain))
    np.testing.assert_array_equal(detailed(other, ids())[0], detailed(plain, ids())[0])


def test_the_pattern_goes_with_a_block():
    model = built("pattern")
    assert [model.block(i).ffn.target_sparsity for i in range(3)] == [0.75, 0.75, 0.0]
    assert [block.ffn.target_sparsity for block in unroll(model).blocks] == [0.75, 0.75, 0.0]


@pytest.mark.parametrize("kind", ["pattern", "spark", "block"])
def test_gradients_reach_every_parameter(kind):
    """And remat gives the same."""

    @nnx.jit
    def gradient(model):
        return nnx.grad(lambda m: jnp.mean(jnp.square(m(ids()))))(model)

    plain = dict(named_leaves(gradient(built(kind))))
    again = dict(named_leaves(gradient(built(kind, remat=True))))
    for path, leaf in plain.items():
        assert float(jnp.abs(leaf).max()) > 0, path
        np.testing.assert_allclose(again[path], leaf, rtol=1e-4, atol=1e-6)


def test_bfloat16():
    """In the dtype of the activations, close to float32, whatever kind."""
    for kind in ("spark", "block"):
        expected = detailed(built(kind), ids())[0]
        model = nnx.merge(nnx.split(built(kind, dtype="bfloat16"))[0], nnx.state(built(kind)))
        got = detailed(model, ids())[0]
        assert float(jnp.median(jnp.abs(got - expected))) < 0.1
        cache = init_cache(model.config, 1, 12)
        logits, cache = decode(unroll(model), ids(1, 1), cache)
        assert cache.k.dtype == jnp.bfloat16
        assert bool(jnp.isfinite(logits).all())


def test_sharded_equals_unsharded(mesh):
    for kind in ("spark", "block"):
        graph, params = nnx.split(built(kind))
        specs = param_specs(params)
        placed = jax.tree.map(lambda p, s: jax.device_put(p, NamedSharding(mesh, s)), params, specs)
        got = detailed(nnx.merge(graph, placed), ids())[0]
        np.testing.assert_allclose(got, detailed(built(kind), ids())[0], rtol=1e-4, atol=1e-4)


def test_unroll_gpt():
    model = Gpt(gpt_config("laptop"), rngs=nnx.Rngs(0))
    run = nnx.jit(lambda m, tokens: m(tokens))
    np.testing.assert_allclose(run(unroll(model), ids()), run(model, ids()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"ffn": "moe"}, "ffn is 'moe'; allowed are gated, relu, spark, block"),
        ({"attention": "flash"}, "attention is 'flash'; allowed are dense, spark"),
        ({"positions": "alibi"}, "positions is 'alibi'; allowed are rope, learned"),
        ({"activation": "relu"}, "activation is 'relu'; allowed are silu, gelu"),
        ({"ffn": "spark"}, "ffn_k is None; 'spark' needs it"),
        ({"ffn_k": 8}, "ffn_k is 8; ffn is 'gated', and 'relu' or 'spark' uses it"),
        ({"ffn": "spark", "ffn_k": 8, "ffn_r": 32}, "ffn_r is 32; it must be below the width, 32"),
        ({"ffn": "block"}, "n_experts is None; 'block' needs it"),
        ({"ffn": "block", "n_experts": 7}, "n_experts is 7; it must divide d_ff, which is 48"),
        ({"attention_k": 4}, "attention_k is 4; attention is 'dense', and 'spark' uses it"),
        ({"attention": "spark"}, "attention_k is None; 'spark' needs it"),
        ({**SPARK_ATTENTION, "attention_r": 3}, "attention_r is 3 of 8; both parts must be even"),
        ({**SPARK_ATTENTION, "attention_r": 8}, "attention_r is 8; it must be below the width, 8"),
        ({"sparsity_pattern": (0.5,)}, "it must be 3 numbers in"),
        ({"sparsity_pattern": (0.5, 1.0, 0.0)}, "it must be 3 numbers in"),
        ({"ffn": "relu", "sparsity_pattern": (0.5,) * 3}, "ffn is 'relu', and 'gated' uses it"),
        ({"ffn_k": 0, "ffn": "relu"}, "ffn_k is 0; it must be a positive integer"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_config_errors(overrides, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **overrides)


def test_learned_positions_are_not_scaled():
    scaled = llama_config("llama-3.2-1b")
    with pytest.raises(ValueError, match=r"rope_scaling is .*; positions are learned"):
        dataclasses.replace(scaled, positions="learned")
