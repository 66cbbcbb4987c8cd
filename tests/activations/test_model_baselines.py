"""CATS and R-Sparse in whole models: masked, decoded, without effect, and bad settings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax import activations as act
from sparsejax.models import Llama, LlamaConfig, init_cache, unroll

CONFIG = LlamaConfig(40, 32, 2, 4, 48, 16, n_kv_heads=2)
TOKENS = jax.random.randint(jax.random.key(0), (2, 10), 0, 40)
UP, DOWN = "blocks/ffn/up_proj/kernel", "blocks/ffn/down_proj/kernel"
LIMITS = np.asarray([0.05, 0.2])


@functools.cache
def model():
    return Llama(CONFIG, rngs=nnx.Rngs(0))


@functools.cache
def factors(rank):
    """Of every projection, for stacked layers."""
    kernels = act.input_sparsity.chosen_kernels(model(), None)
    pick = jax.vmap(functools.partial(act.low_rank_factors, rank=rank))
    return {path: pick(w) for path, w in kernels.items()}


def apart(values):
    """What stacked layers have, for separate blocks."""
    return {
        f"blocks/{i}/{path.removeprefix('blocks/')}": jax.tree.map(lambda a, i=i: a[i], value)
        for path, value in values.items()
        for i in range(2)
    }


@nnx.jit
def call(model, tokens):
    return model(tokens)


@nnx.jit
def decode(model, token, cache):
    return model.decode(token, cache)


def one_by_one(model):
    cache, found = init_cache(CONFIG, 1, 12), []
    for token in TOKENS[0]:
        logits, cache = decode(model, token[None, None], cache)
        found.append(logits[0, 0])
    return jnp.stack(found)


def test_cats_is_its_definition_and_decodes_from_fewer_rows():
    masked = call(act.cats_model(model(), {"blocks/ffn": LIMITS}), TOKENS)
    by_hand = nnx.clone(unroll(model()))
    for block, limit in zip(by_hand.blocks, LIMITS, strict=True):
        block.ffn = act.CatsFeedForward(block.ffn, jnp.float32(limit), decoding=False)
    np.testing.assert_allclose(call(by_hand, TOKENS), masked, atol=1e-5)
    assert float(jnp.abs(masked - call(model(), TOKENS)).max()) > 0.01
    reading = act.cats_model(unroll(model()), apart({"blocks/ffn": LIMITS}), decoding=True)
    np.testing.assert_allclose(one_by_one(reading), masked[0], atol=1e-4)
    stacked = act.cats_model(model(), LIMITS, decoding=True)
    np.testing.assert_allclose(one_by_one(stacked), masked[0], atol=1e-4)


def test_r_sparse_is_its_definition_and_decodes_from_fewer_rows():
    limits = dict.fromkeys(factors(4), LIMITS)
    masked = call(act.r_sparse_model(model(), limits, factors(4)), TOKENS)
    assert float(jnp.abs(masked - call(model(), TOKENS)).max()) > 0.01
    reading = act.r_sparse_model(unroll(model()), apart(limits), apart(factors(4)))
    np.testing.assert_allclose(one_by_one(reading), masked[0], atol=1e-4)
    layer = nnx.Linear(32, 8, use_bias=False, rngs=nnx.Rngs(1))
    low = act.low_rank_factors(layer.kernel[...], 3)
    x = jax.random.normal(jax.random.key(1), (2, 5, 32))
    expected = act.r_sparse_linear(
        x, layer.kernel[...], factors=low, threshold=0.2, prefill_ratio=1.0
    )
    got = act.r_sparse_model(layer, 0.2, {"kernel": low})(x)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_thresholds_that_drop_nothing_leave_the_model():
    wanted = call(model(), TOKENS)
    np.testing.assert_allclose(call(act.cats_model(model(), 0.0), TOKENS), wanted, atol=1e-5)
    # what is dropped goes through a product of full rank: nothing is lost at any threshold
    kernels = act.input_sparsity.chosen_kernels(model(), None)
    full = {p: jax.vmap(lambda w: act.low_rank_factors(w, min(w.shape)))(w)
            for p, w in kernels.items()}  # fmt: skip
    whole = act.r_sparse_model(model(), 0.5, full)
    np.testing.assert_allclose(call(whole, TOKENS), wanted, atol=1e-4)


def test_the_model_is_not_changed_and_paths_stay():
    before = nnx.state(model(), nnx.Param)
    sparse = act.cats_model(model(), LIMITS)
    assert jax.tree.structure(nnx.state(sparse, nnx.Param)) == jax.tree.structure(before)
    assert not isinstance(model().blocks.ffn, act.CatsFeedForward)


def test_bfloat16():
    layer = nnx.Linear(32, 8, use_bias=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(1))
    low = act.low_rank_factors(layer.kernel[...], 3)
    y = act.r_sparse_model(layer, 0.2, {"kernel": low})(jnp.ones((2, 32), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16


@pytest.mark.usefixtures("unchecked")
def test_errors():
    with pytest.raises(ValueError, match="model has no layer with gate_proj, up_proj, down_proj"):
        act.cats_model(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), 0.1)
    biased = nnx.clone(model())
    biased.blocks.ffn.up_proj.bias = nnx.Param(jnp.zeros((2, 48)))
    with pytest.raises(ValueError, match="model has biases in up_proj of 'blocks/ffn'"):
        act.cats_model(biased, 0.1)
    with pytest.raises(ValueError, match=r"thresholds has -1.0 for 'blocks/ffn'; at least 0"):
        act.cats_model(model(), -1.0)
    with pytest.raises(ValueError, match=r"thresholds has shape \(3,\) for 'blocks/ffn'"):
        act.cats_model(model(), np.zeros(3))
    with pytest.raises(ValueError, match="thresholds has attention, which is no chosen layer"):
        act.cats_model(model(), {"ffn": 0.1, "attention": 0.1})
    with pytest.raises(ValueError, match=r"thresholds has -0.5 for 'blocks/attention"):
        act.r_sparse_model(model(), -0.5, factors(4))
    some = {path: pair for path, pair in factors(4).items() if path != UP}
    with pytest.raises(ValueError, match=f"factors has nothing for layer '{UP}'"):
        act.r_sparse_model(model(), 0.1, some)
    with pytest.raises(ValueError, match=r"they must be \[\*stack, in, rank\] and"):
        act.r_sparse_model(model(), 0.1, {**some, UP: factors(4)[DOWN]})
