"""The vision-language decoder: against NumPy, masked and dropped tokens, core neurons, errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from sparsejax.activations import core_neurons
from sparsejax.core.selection import named_leaves
from sparsejax.models.vision_language import VisionLanguage, vision_language_param_specs
from sparsejax.models.vision_language_config import CoreMatching, VisionLanguageConfig

SIZES = {"vision_tokens": 9, "patch_inputs": 6, "vocab_size": 11, "d_model": 16, "n_layers": 3,
         "n_heads": 4, "d_ff": 24, "max_seq_len": 24}  # fmt: skip
# LLaVA's order: a system prompt, the image, the question; all of it causal
CHAT = VisionLanguageConfig(prefix=2, n_kv_heads=2, **SIZES)
# one question about 9 marked cells, which it does not see in the first layer
CELLS = VisionLanguageConfig(
    markers=12, outputs=5, rotary=False, image_attention="full", blind_layers=1, **SIZES
)
CONFIGS = {"chat": CHAT, "cells": CELLS}
TEXT, LATER, BATCH = 5, 2, 2
PROMPT = SIZES["vision_tokens"] + TEXT


@functools.cache
def build(name, **changes):
    """Graph and random values of a model, norms included."""
    config = dataclasses.replace(CONFIGS[name], **changes)
    graph, params = nnx.split(nnx.eval_shape(lambda: VisionLanguage(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(1)
    return graph, jax.tree.map(
        lambda leaf: jnp.asarray(0.35 * rng.standard_normal(leaf.shape), leaf.dtype), params
    )


def model_of(name, **changes):
    return nnx.merge(*build(name, **changes))


@functools.cache
def inputs(name):
    """Patches, the text of a prompt, its markers, and text and markers behind it."""
    keys = jax.random.split(jax.random.key(3), 4)
    patches = jax.random.normal(keys[0], (BATCH, SIZES["vision_tokens"], SIZES["patch_inputs"]))
    tokens = jax.random.randint(keys[1], (BATCH, TEXT + LATER), 0, SIZES["vocab_size"])
    if name == "chat":
        return patches, tokens[:, :TEXT], None, tokens[:, TEXT:], None
    markers = jax.random.randint(keys[2], (BATCH, PROMPT + LATER), -1, 12)
    return patches, tokens[:, :TEXT], markers[:, :PROMPT], tokens[:, TEXT:], markers[:, PROMPT:]


@functools.partial(jax.jit, static_argnames="graph")
def text_logits(graph, params, given, keep=None, after=None):
    """Logits of the text alone, with a mask behind a layer."""
    options = {} if keep is None else {"keep": keep, "after": after}
    return nnx.merge(graph, params)(*given, **options)


@functools.partial(jax.jit, static_argnames=("graph", "select"))
def read_prompt(graph, params, given, select):
    return nnx.merge(graph, params).prefill(*given, select=select)


def in_numpy(name, select=None, keep=None, sample=0):
    """A whole sequence at once in float64, prompt and what follows, with masks for what is pruned.

    keep: of every layer, which tokens of the prompt its cache holds. Returns logits of the text.
    """
    config = CONFIGS[name]
    p = {path: np.asarray(leaf, np.float64) for path, leaf in named_leaves(build(name)[1])}
    patches, text, markers, later, later_markers = (
        None if x is None else np.asarray(x[sample]) for x in inputs(name)
    )
    embedded = p["embed/embedding"][np.concatenate([text, later])]
    image = patches.astype(np.float64) @ p["patch_embed/kernel"]
    cut = config.prefix
    x = np.concatenate([embedded[:cut], image, embedded[cut:]])
    if markers is not None:
        given = np.concatenate([markers, later_markers])
        x = x + np.where(given[:, None] >= 0, p["markers/embedding"][given], 0)
    places, prompt = np.arange(len(x)), np.arange(len(x)) < PROMPT
    pictured = (places >= cut) & (places < cut + config.vision_tokens)
    width = config.d_model // config.n_heads

    def norm(x, path):
        scale = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps)
        return x * scale * p[f"{path}/scale"]

    def turn(x):  # [tokens, heads, width]
        if not config.rotary:
            return x
        angle = places[:, None] * config.rope_theta ** -(np.arange(0, width, 2) / width)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        one, two = np.split(x, 2, axis=-1)
        return np.concatenate([one * cos - two * sin, two * cos + one * sin], -1)

    for i in range(config.n_layers):
        block = f"blocks/{i}"
        h = norm(x, f"{block}/attention_norm")
        q, k, v = (
            (h @ p[f"{block}/attention/{n}_proj/kernel"]).reshape(len(x), -1, width) for n in "qkv"
        )
        q, k = turn(q), turn(k)
        seen = places[None] <= places[:, None]
        if config.image_attention == "full":
            seen = seen | (pictured[None] & pictured[:, None])
        if i < config.blind_layers:
            seen = seen & (pictured[:, None] | ~pictured[None])
        if keep is not None:
            held = np.concatenate([keep[i], np.ones(LATER, bool)])
            dropped_before = select.mode == "drop_after" and i > select.select_layer
            seen = seen & (held[None] | (prompt[:, None] & (not dropped_before)))
        out = np.zeros_like(q)
        for head in range(config.n_heads):
            group = head // (config.n_heads // k.shape[1])
            scores = q[:, head] @ k[:, group].T / np.sqrt(width)
            weights = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
            out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, group]
        x = x + out.reshape(len(x), -1) @ p[f"{block}/attention/o_proj/kernel"]
        h = norm(x, f"{block}/ffn_norm")
        gate = h @ p[f"{block}/ffn/gate"].T
        a = gate / (1 + np.exp(-gate)) * (h @ p[f"{block}/ffn/up"].T)
        if select is not None and i in select.places(config.n_layers)[0]:
            valid = keep[i] if dropped_before else np.ones(PROMPT, bool)
            prompt_a = jnp.asarray(a[:PROMPT], jnp.float32)
            core = core_neurons(
                prompt_a, rho=select.rho, beta=select.beta, where=jnp.asarray(valid)
            )[0]
            chosen = np.isin(np.arange(config.d_ff), core)
            a = np.where(prompt[:, None] | chosen, a, 0)
        x = x + a @ p[f"{block}/ffn/down"]
    return (norm(x, "norm") @ p["head/kernel"])[~pictured]


@functools.partial(jax.jit, static_argnames=("graph", "select"))
def prompt_and_later(graph, params, given, select):
    """Logits at the end of a prompt and of each later token, one at a time, by sample."""
    model = nnx.merge(graph, params)
    patches, text, markers, later, later_markers = given
    prompt = model.prefill(patches, text, markers, select=select, room=LATER)

    def follow(cache, neurons, later, markers):
        core = {i: model.compact({i: idx[None]})[i] for i, idx in neurons.items()}
        found = []
        for t in range(LATER):
            one = None if markers is None else markers[None, t : t + 1]
            logits, cache = model.decode(later[None, t : t + 1], cache, one, core=core)
            found.append(logits[0, 0])
        return jnp.stack(found)

    # every sample has neurons of its own
    caches = jax.tree.map(lambda x: x[:, None] if x.ndim else jnp.stack([x] * BATCH), prompt.cache)
    return prompt, jax.vmap(follow)(caches, prompt.neurons, later, later_markers)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_whole_model_is_that_of_the_definition(name):
    patches, text, markers, later, later_markers = inputs(name)
    whole = jnp.concatenate([text, later], axis=1)
    given = None if markers is None else jnp.concatenate([markers, later_markers], axis=1)
    logits = model_of(name)(patches, whole, given)
    for sample in range(BATCH):
        wanted = in_numpy(name, sample=sample)
        np.testing.assert_allclose(logits[sample], wanted, rtol=1e-4, atol=1e-4)
    # and so is a prompt with what follows it, nothing pruned
    prompt, found = prompt_and_later(*build(name), inputs(name), None)
    np.testing.assert_allclose(prompt.logits, logits[:, TEXT - 1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found, logits[:, TEXT:], rtol=1e-4, atol=1e-4)
    assert not prompt.neurons
    assert prompt.keep.all()


SELECTIONS = {
    "masked": CoreMatching(select_layer=1, token=-1, rho=0.5, beta=0.5),
    "dropped": CoreMatching(select_layer=1, token=-1, rho=0.5, beta=0.5, capacity=10),
    "first": CoreMatching(select_layer=0, reference="core_neurons", capacity=8, layers=(1, 3)),
    "last": CoreMatching(select_layer=2, token=-2, beta=0.25, capacity=7, layers=(0, 2)),
    "cache": CoreMatching(mode="mask_cache", token=-1, layers=(1, 3)),
    "cache with places": CoreMatching(mode="mask_cache", token=-1, layers=(1, 2), capacity=9),
}


@pytest.mark.parametrize(
    ("name", "which"),
    [
        ("cells", "masked"),
        ("cells", "dropped"),
        ("cells", "cache"),
        ("chat", "first"),
        ("chat", "last"),
        ("chat", "cache with places"),
    ],
)
def test_both_kinds_of_pruning_together_are_the_masked_path(name, which):
    select = SELECTIONS[which]
    prompt, found = prompt_and_later(*build(name), inputs(name), select)
    keep = np.asarray(prompt.keep)
    pruned, choosing = select.places(SIZES["n_layers"])
    assert list(prompt.neurons) == list(pruned)
    text = ~np.asarray(CONFIGS[name].is_image(jnp.arange(PROMPT)))
    assert keep[..., text].all()
    assert (keep.sum(-1) < PROMPT).any()
    for i, layer in enumerate(prompt.cache):
        short = select.capacity is not None and (i in choosing or select.mode == "drop_after")
        assert layer.k.shape[1] == (select.capacity if short else PROMPT) + LATER
        np.testing.assert_array_equal(layer.valid.sum(1), keep[i].sum(-1) + LATER)
        for sample in range(BATCH):
            np.testing.assert_array_equal(
                layer.positions[sample][layer.valid[sample]],
                [*np.flatnonzero(keep[i, sample]), PROMPT, PROMPT + 1],
            )
    for sample in range(BATCH):
        wanted = in_numpy(name, select, keep[:, sample], sample)[TEXT - 1 :]
        ours = np.concatenate([prompt.logits[sample][None], found[sample]])
        np.testing.assert_allclose(ours, wanted, rtol=2e-4, atol=2e-4)


def test_a_mask_given_from_outside_acts_behind_its_layer_alone():
    given = inputs("cells")[:3]
    prompt = read_prompt(*build("cells"), given, SELECTIONS["dropped"])
    masked = text_logits(*build("cells"), given, prompt.keep[0], jnp.int32(1))
    np.testing.assert_allclose(masked[:, -1], prompt.logits, rtol=1e-4, atol=1e-4)
    whole = text_logits(*build("cells"), given)
    behind_all = text_logits(*build("cells"), given, prompt.keep[0], jnp.int32(2))
    np.testing.assert_allclose(behind_all, whole, rtol=1e-5, atol=1e-6)
    assert jnp.abs(masked - whole).max() > 1e-3


def test_text_is_blind_in_the_first_layers_and_image_tokens_see_each_other():
    patches, text, markers, *_ = inputs("cells")
    shifted = patches.at[:, -1].add(1.0)

    @jax.jit
    def activations(params, patches):
        model = nnx.merge(build("cells")[0], params)
        return model.watched(patches, text, markers, watch=lambda layer: layer.a)[1]

    before, after = (activations(build("cells")[1], each) for each in (patches, shifted))
    assert [a.shape for a in before] == [(BATCH, PROMPT, SIZES["d_ff"])] * 3
    np.testing.assert_array_equal(before[0][:, -TEXT:], after[0][:, -TEXT:])
    assert jnp.abs(before[1][:, -TEXT:] - after[1][:, -TEXT:]).max() > 1e-4
    assert (jnp.abs(before[0] - after[0]).max(-1) > 0)[:, : SIZES["vision_tokens"]].all()


def test_it_is_differentiated_and_half_precision_stays_what_it_is():
    patches, text, markers, *_ = inputs("cells")

    def loss(params, graph):
        return jnp.mean(nnx.merge(graph, params)(patches, text, markers) ** 2)

    whole = graph, params = build("cells")
    gradients = jax.jit(jax.grad(loss), static_argnums=1)(params, graph)
    for path, leaf in named_leaves(gradients):
        assert jnp.isfinite(leaf).all(), path
        assert jnp.abs(leaf).max() > 0, path
    for changes in ({"dtype": "bfloat16"}, {"dtype": "bfloat16", "param_dtype": "bfloat16"}):
        half = build("cells", **changes)
        prompt, found = prompt_and_later(*half, inputs("cells"), SELECTIONS["dropped"])
        assert found.dtype == jnp.float32
        assert prompt.cache[0].k.dtype == jnp.bfloat16
        assert jnp.isfinite(found).all()
        full, rounded = (text_logits(*each, (patches, text, markers)) for each in (whole, half))
        np.testing.assert_allclose(rounded, full, atol=0.1 * jnp.abs(full).max())


def test_sharded_parameters_give_the_same(mesh):
    graph, params = build("chat")
    specs = vision_language_param_specs(params)
    assert specs["blocks"][0]["ffn"]["down"] == jax.sharding.PartitionSpec("model", None)
    sharded = jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), params, specs
    )
    wanted = prompt_and_later(graph, params, inputs("chat"), SELECTIONS["dropped"])
    found = prompt_and_later(graph, sharded, inputs("chat"), SELECTIONS["dropped"])
    np.testing.assert_array_equal(found[0].keep, wanted[0].keep)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="the parameters of VisionLanguage end in"):
        vision_language_param_specs({"conv": {"kernel": jnp.ones((2, 2))}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_tokens": 0}, "vision_tokens is 0; it must be a positive integer"),
        ({"prefix": -1}, "prefix is -1; it must not be negative"),
        ({"image_attention": "none"}, "image_attention is 'none'; allowed are causal, full"),
        ({"max_seq_len": 11}, "max_seq_len is 11; prefix and image take 11, and text follows"),
        ({"n_heads": 6}, "n_heads is 6; it must divide d_model, which is 16"),
    ],
)
def test_sizes_that_cannot_be(changes, message, unchecked):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CHAT, **changes)


def test_errors_of_calls(unchecked):
    patches, text, *_ = inputs("chat")
    model = model_of("chat")

    def prefill(**options):
        room = options.pop("room", 0)
        model.prefill(patches, text, select=CoreMatching(**options), room=room)

    for options, message in (
        ({"select_layer": 3}, "select_layer is 3; this model has layers 0 to 2"),
        ({"layers": (1, 4)}, r"layers is \(1, 4\); it must be a part of 0 to 3"),
        ({"capacity": 5}, "capacity is 5; the prompt has 5 text tokens, and they stay"),
        ({"room": 11}, "room is 11 behind 14 tokens; max_seq_len allows 24 in all"),
        ({"mode": "zero"}, "mode is 'zero'; allowed are drop_after, mask_cache"),
    ):
        with pytest.raises(ValueError, match=message):
            prefill(**options)
    with pytest.raises(ValueError, match=r"patches has the shape \(2, 8, 6\)"):
        model(patches[:, 1:], text)
    with pytest.raises(ValueError, match=r"must be \[2, length\], with a length from 3 to 15"):
        model(patches, text[:, :2])
    with pytest.raises(ValueError, match="markers is given; the model has none"):
        model(patches, text, jnp.zeros((BATCH, PROMPT), jnp.int32))
    cache = model.prefill(patches, text, room=1).cache
    with pytest.raises(ValueError, match="cache has 15 places; tokens would fill 16"):
        model.decode(text[:, :2], cache)
    with pytest.raises(ValueError, match="cache has 2 layers of 2 samples; needed are 3 of 2"):
        model.decode(text[:, :1], cache[:2])
    # an end that is traced cannot be compared
    logits, _ = jax.jit(lambda cache: model.decode(text[:, :2], cache))(cache)
    assert jnp.isnan(logits).all()
