"""A rotated decoder: the same logits, its cache, orthogonal rows, sparsified inputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.activations import sparse_inputs
from sparsejax.models import Llama, LlamaConfig, generate, init_cache
from sparsejax.models.blocks import unroll
from sparsejax.models.transformed import TransformedLlama, transform_llama

GQA = LlamaConfig(
    vocab_size=40,
    d_model=32,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    d_ff=48,
    max_seq_len=24,
    qkv_bias=True,
    tie_embeddings=True,
    embed_std=0.3,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 12)))
call = nnx.jit(lambda model, tokens: model(tokens))


def made(**changes):
    """A model whose norms and biases are not those of the start."""
    model = Llama(dataclasses.replace(GQA, **changes), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)

    def changed(path, variable):
        if path[-1] in ("scale", "bias"):
            value = variable[...]
            noise = jnp.asarray(rng.uniform(0.5, 2, value.shape), value.dtype)
            return variable.replace(noise)
        return variable

    state = [(path, changed(path, v)) for path, v in nnx.to_flat_state(nnx.state(model))]
    nnx.update(model, nnx.from_flat_state(state))
    return model


@pytest.fixture(scope="module")
def pair():
    model = made()
    return model, transform_llama(model)


def test_logits_are_those_of_the_model(pair):
    model, turned = pair
    wanted = call(model, TOKENS)
    np.testing.assert_allclose(call(turned, TOKENS), wanted, atol=1e-4)
    assert float(jnp.abs(wanted).max()) > 1
    # the weights did change, and the norms are folded
    assert float(jnp.abs(turned.embed.embedding[...] - model.embed.embedding[...]).max()) > 0.01
    np.testing.assert_array_equal(turned.blocks.ffn_norm.scale[...], 1)
    assert not turned.config.tie_embeddings


def test_the_model_stays_as_it_was(pair):
    model, _ = pair
    for (_, a), (_, b) in zip(
        nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(made()))
    ):
        np.testing.assert_array_equal(a[...], b[...])


def test_rows_of_k_and_gate_are_orthogonal(pair):
    model, turned = pair

    def correlations(kernel):
        gram = kernel @ kernel.swapaxes(1, 2)
        own = jnp.einsum("lii->li", gram)
        return float(jnp.abs(gram - own[:, None] * jnp.eye(gram.shape[-1])).max())

    for layer in ("attention/k_proj", "ffn/gate_proj"):
        part, name = layer.split("/")
        before, after = (
            getattr(getattr(m.blocks, part), name).kernel[...] for m in (model, turned)
        )
        assert correlations(after) < 1e-4 < 1e-1 < correlations(before)
    # a k of 16 outputs has as many inputs that matter
    norms = jnp.linalg.norm(turned.blocks.attention.k_proj.kernel[...], axis=-1)
    assert float(norms[:, 16:].max()) < 1e-5 < float(norms[:, :16].min())


@pytest.mark.parametrize("separate", [False, True])
def test_decoding_continues_a_cache(pair, separate):
    model, turned = pair
    turned = unroll(turned) if separate else turned
    wanted = call(model, TOKENS)
    decode = nnx.jit(lambda model, tokens, cache: model.decode(tokens, cache))
    first, cache = decode(turned, TOKENS[:, :8], init_cache(turned.config, 2, 12))
    then, cache = decode(turned, TOKENS[:, 8:], cache)
    np.testing.assert_allclose(jnp.concatenate([first, then], 1), wanted, atol=1e-4)
    assert int(cache.length) == 12
    ours, theirs = (generate(m, TOKENS[:, :4], max_new_tokens=4) for m in (turned, model))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("separate", [False, True])
def test_inputs_are_sparsified_and_shortcuts_are_not(pair, separate):
    turned = unroll(pair[1]) if separate else pair[1]
    whole = sparse_inputs(turned, 0.0)
    np.testing.assert_allclose(call(whole, TOKENS), call(turned, TOKENS), atol=1e-5)
    # half of what k sees has no weight: dropping it loses nothing
    half = sparse_inputs(turned, 0.5, where="k_proj/kernel")
    np.testing.assert_allclose(call(half, TOKENS), call(turned, TOKENS), atol=1e-4)
    less = sparse_inputs(turned, 0.5)
    assert float(jnp.abs(call(less, TOKENS) - call(turned, TOKENS)).max()) > 0.1
    if separate:
        masked = sparse_inputs(turned, 0.5, gather=False)
        read, zeroed = (generate(m, TOKENS[:1, :1], max_new_tokens=6) for m in (less, masked))
        np.testing.assert_array_equal(read, zeroed)


def test_an_own_head_and_bfloat16():
    model = made(tie_embeddings=False, qkv_bias=False, param_dtype="bfloat16", dtype="bfloat16")
    turned = transform_llama(model)
    assert turned.blocks.ffn_shortcut.dtype == jnp.bfloat16
    wanted, given = call(model, TOKENS), call(turned, TOKENS)
    assert float(jnp.abs(given - wanted).mean()) < 0.05 * float(jnp.abs(wanted).mean())


def test_gradients_pass(pair):
    graph, params = nnx.split(pair[1])
    loss = jax.jit(jax.grad(lambda p: jnp.square(nnx.merge(graph, p)(TOKENS)).mean()))
    leaves = jax.tree.leaves(loss(params))
    assert all(bool(jnp.isfinite(leaf).all()) and float(jnp.abs(leaf).max()) > 0 for leaf in leaves)


def test_what_it_is_not_for(pair):
    with pytest.raises(ValueError, match="tie_embeddings is True; a transformed model has a head"):
        TransformedLlama(GQA, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="model has separate blocks; transform it before"):
        transform_llama(unroll(pair[0]))
    relu = Llama(dataclasses.replace(GQA, ffn="relu"), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="ffn is 'relu'; a model is transformed with 'gated' only"):
        transform_llama(relu)
