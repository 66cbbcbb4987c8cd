"""Encoders: sizes, attention, the vision transformer and the classifier of texts."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from sparsejax.core.selection import named_leaves, selected_paths
from sparsejax.models import (
    TEXT_CLASSIFIER_SIZES,
    VIT_SIZES,
    EncoderBlock,
    TextClassifier,
    TextClassifierConfig,
    ViT,
    ViTConfig,
    encoder_param_specs,
    full_attention,
    text_classifier_config,
    vit_config,
)

PUBLISHED = {"tiny": 5_717_416, "small": 22_050_664, "base": 86_567_656, "large": 304_326_632}
SIZES = {"d_model": 16, "n_layers": 2, "n_heads": 4, "d_ff": 24, "num_classes": 5}
IMAGE = ViTConfig(image_size=12, patch_size=4, in_channels=2, **SIZES)
MEAN = dataclasses.replace(IMAGE, pool="mean", norm_eps=0.1)
TEXT = TextClassifierConfig(vocab_size=40, max_seq_len=10, pad_id=3, **SIZES)
MODELS = {"class": (ViT, IMAGE), "mean": (ViT, MEAN), "text": (TextClassifier, TEXT)}


def abstract(model, config):
    return nnx.split(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0))))


def count(model, config):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(model, config)[1]))


@functools.cache
def build(name, seed=0, **changes):
    """A model's graph and random values for all its parameters, norms and biases included."""
    model, config = MODELS[name]
    graphdef, params = abstract(model, dataclasses.replace(config, **changes))
    rng = np.random.default_rng(seed)
    return graphdef, jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype), params
    )


@functools.cache
def inputs(name):
    if name != "text":
        return jax.random.normal(jax.random.key(1), (4, 12, 12, 2))
    tokens = jax.random.randint(jax.random.key(1), (4, 8), 4, 40)
    return jnp.where(jnp.arange(8) < jnp.array([[8], [5], [1], [7]]), tokens, 3)


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, params, x):
    return nnx.merge(graphdef, params)(x)


def loss(graphdef, params, x):
    logits = nnx.merge(graphdef, params)(x)
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(4), jnp.arange(4)])


loss_and_gradient = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)


def erf(x):
    return np.vectorize(math.erf)(x)


def numpy_forward(config, params, x):
    """The whole model in float64 NumPy."""
    p = {path: np.asarray(leaf, np.float64) for path, leaf in named_leaves(params)}
    x, heads = np.asarray(x), config.n_heads

    def linear(x, w, name):
        return x @ w[f"{name}/kernel"] + w[f"{name}/bias"]

    def norm(x, w, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.norm_eps)
        return w[f"{name}/scale"] * x + w[f"{name}/bias"]

    if isinstance(config, ViTConfig):
        size = config.patch_size
        rows = [
            x[:, i : i + size, j : j + size].reshape(len(x), -1)
            for i in range(0, config.image_size, size)
            for j in range(0, config.image_size, size)
        ]
        real = np.ones((len(x), len(rows) + (config.pool == "class")), bool)
        x = linear(np.stack(rows, 1), p, "patch_embed")
        if config.pool == "class":
            token = np.broadcast_to(p["class_token/embedding"], (len(x), 1, config.d_model))
            x = np.concatenate([token, x], 1)
    else:
        real, x = x != config.pad_id, p["embed/embedding"][x]
    x = x + p["positions/embedding"][: x.shape[1]]
    for i in range(config.n_layers):
        w = {k.removeprefix("blocks/"): v[i] for k, v in p.items() if k.startswith("blocks/")}
        h = norm(x, w, "attention_norm")
        q, k, v = (
            linear(h, w, f"attention/{n}_proj").reshape(*h.shape[:2], heads, -1) for n in "qkv"
        )
        score = np.einsum("bthd,bshd->bhts", q, k) / math.sqrt(config.head_width)
        score = np.where(real[:, None, None], score, -np.inf)
        weight = np.exp(score - score.max(-1, keepdims=True))
        out = np.einsum("bhts,bshd->bthd", weight / weight.sum(-1, keepdims=True), v)
        x = x + linear(out.reshape(h.shape), w, "attention/o_proj")
        h = linear(norm(x, w, "ffn_norm"), w, "ffn/up_proj")
        x = x + linear(h / 2 * (1 + erf(h / math.sqrt(2))), w, "ffn/down_proj")
    x = norm(x, p, "norm")
    if getattr(config, "pool", "mean") == "class":
        return linear(x[:, 0], p, "head")
    mean = (x * real[..., None]).sum(1) / real.sum(1, keepdims=True)
    return linear(mean, p, "head")


# Sizes


def test_parameter_counts():
    assert {name: count(ViT, vit_config(name)) for name in VIT_SIZES} == PUBLISHED
    mean = vit_config("tiny", pool="mean")
    assert count(ViT, mean) == PUBLISHED["tiny"] - 2 * mean.d_model
    assert set(TEXT_CLASSIFIER_SIZES) == {"tiny", "small", "base"}
    for name in TEXT_CLASSIFIER_SIZES:
        config = text_classifier_config(name, num_classes=3)
        d, f = config.d_model, config.ff_width
        block = 4 * d * d + 2 * d * f + 9 * d + f
        expected = d * (30522 + 512) + config.n_layers * block + 2 * d + (d + 1) * 3
        assert count(TextClassifier, config) == expected


def test_paths():
    shapes = {path: leaf.shape for path, leaf in named_leaves(build("class")[1])}
    assert shapes["patch_embed/kernel"] == (32, 16)
    assert shapes["blocks/attention/k_proj/kernel"] == (2, 16, 16)
    assert shapes["blocks/ffn/down_proj/kernel"] == (2, 24, 16)
    assert shapes["blocks/ffn_norm/scale"] == (2, 16)
    assert shapes["positions/embedding"] == (10, 16)
    assert shapes["head/kernel"] == (16, 5)
    assert len(selected_paths(build("class")[1], r"_proj/kernel$")) == 6
    assert "class_token/embedding" not in dict(named_leaves(build("mean")[1]))


def test_initial_values():
    config = dataclasses.replace(IMAGE, d_model=64, d_ff=None)
    p = dict(named_leaves(jax.jit(lambda: nnx.split(ViT(config, rngs=nnx.Rngs(0)))[1])()))
    assert np.std(p["blocks/ffn/up_proj/kernel"]) == pytest.approx(0.02, rel=0.02)
    assert np.std(p["patch_embed/kernel"]) == pytest.approx(32**-0.5, rel=0.05)
    assert not np.any(p["blocks/attention/q_proj/bias"])
    assert np.all(p["norm/scale"] == 1)
    kernels = p["blocks/attention/q_proj/kernel"]
    assert not np.array_equal(kernels[0], kernels[1])


# Forward pass


def test_attention_equals_that_of_jax():
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 5, 3, 4)) for i in range(3))
    visible = jnp.array([[True] * 5, [True, False, True, False, False]])

    def mine(q, k, v):
        return full_attention(q, k, v, visible)

    def theirs(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None, None])

    results = []
    for attention in (mine, theirs):
        out, back = jax.vjp(jax.jit(attention), q, k, v)
        results.append((out, *back(jnp.cos(out))))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert not np.any(results[0][2][1, 1])
    blind = full_attention(q, k, v, jnp.zeros((2, 5), bool))
    np.testing.assert_allclose(blind, jnp.broadcast_to(v.mean(1, keepdims=True), v.shape), 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_forward_equals_numpy(name):
    graphdef, params = build(name)
    expected = numpy_forward(MODELS[name][1], params, inputs(name))
    logits = forward(graphdef, params, inputs(name))
    np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=5e-5)


def test_padding_changes_nothing():
    graphdef, params = build("text")
    tokens = inputs("text")
    logits = forward(graphdef, params, tokens)
    longer = jnp.pad(tokens, ((0, 0), (0, 2)), constant_values=3)
    np.testing.assert_allclose(forward(graphdef, params, longer), logits, rtol=1e-4, atol=1e-5)
    blank = forward(graphdef, params, jnp.full_like(tokens, 3))
    bias = dict(named_leaves(params))["head/bias"]
    np.testing.assert_allclose(blank, np.broadcast_to(bias, blank.shape), rtol=1e-6)
    assert np.isnan(forward(graphdef, params, tokens.at[0, 0].set(40))[0]).all()
    gradient = loss_and_gradient(graphdef, params, tokens)[1]
    rows = np.any(dict(named_leaves(gradient))["embed/embedding"], axis=1)
    assert set(np.flatnonzero(rows)) == set(np.unique(tokens)) - {3}


def test_regression():
    graphdef, params = build("text", num_classes=1)
    assert forward(graphdef, params, inputs("text")).shape == (4, 1)


@pytest.mark.parametrize(("name", "param_dtype"), [("class", "bfloat16"), ("text", "float32")])
def test_bfloat16(name, param_dtype):
    exact = forward(*build(name), inputs(name))
    graphdef, params = build(name, dtype="bfloat16", param_dtype=param_dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(param_dtype)}
    model = nnx.merge(graphdef, params)
    assert jax.eval_shape(lambda x: model.embedded(x), inputs(name)).dtype == jnp.bfloat16
    logits = forward(graphdef, params, inputs(name))
    assert logits.dtype == jnp.float32
    assert float(jnp.abs(logits - exact).max()) < 0.2 * float(jnp.std(exact))
    shapes = jax.eval_shape(functools.partial(loss_and_gradient, graphdef), params, inputs(name))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes[1])} == {jnp.dtype(param_dtype)}


# Gradients, seeds, blocks, devices


@pytest.mark.parametrize("name", ["class", "text"])
def test_gradients(name):
    """Along the gradient the loss rises as it says."""
    graphdef, params = build(name)
    x = inputs(name)
    gradient = loss_and_gradient(graphdef, params, x)[1]
    size = math.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(gradient)))
    ends = []
    for step in (3e-3, -3e-3):
        moved = jax.tree.map(lambda p, g, s=step: p + s / size * g, params, gradient)
        ends.append(float(loss_and_gradient(graphdef, moved, x)[0]))
    assert (ends[0] - ends[1]) / 6e-3 == pytest.approx(size, rel=1e-2)


def test_recomputing_blocks_changes_no_gradient():
    graphdef, params = build("text")
    gradient = loss_and_gradient(graphdef, params, inputs("text"))[1]
    again = loss_and_gradient(build("text", remat=True)[0], params, inputs("text"))[1]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, again
    )


@pytest.mark.parametrize("name", ["mean", "text"])
def test_seeds_are_a_batch_axis(name):
    graphdef, first = build(name)
    second = build(name, seed=1)[1]
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), first, second)
    both = jax.jit(jax.vmap(functools.partial(forward, graphdef), in_axes=(0, None)))
    result = both(stacked, inputs(name))
    for got, params in zip(result, (first, second), strict=True):
        expected = forward(graphdef, params, inputs(name))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_compilation_is_flat_in_depth():
    name = "text"
    model, config = MODELS[name]

    def lines(depth):
        graphdef, params = abstract(model, dataclasses.replace(config, n_layers=depth))
        return len(str(loss_and_gradient.trace(graphdef, params, inputs(name)).jaxpr).splitlines())

    assert lines(2) == lines(8)


def test_block_and_set_block():
    model = nnx.merge(*build("mean"), copy=True)
    before = forward(*nnx.split(model), inputs("mean"))

    @jax.jit
    def by_blocks(model, blocks, x):
        x = model.embedded(x)
        for block in blocks:
            x = block(x)
        return model.head(jnp.mean(model.norm(x), axis=1))

    blocks = [model.block(i) for i in range(2)]
    assert isinstance(blocks[0], EncoderBlock)
    logits = by_blocks(model, blocks, inputs("mean"))
    np.testing.assert_allclose(logits, before, rtol=1e-4, atol=1e-5)
    block = model.block(1)
    block.ffn.down_proj.kernel[...] = jnp.zeros((24, 16))
    model.set_block(1, block)
    kernels = model.blocks.ffn.down_proj.kernel[...]
    assert [bool(np.any(kernel)) for kernel in kernels] == [True, False]


@pytest.mark.parametrize("name", ["class", "text"])
def test_eight_devices_equal_one(name, mesh):
    graphdef, params = build(name)
    one, gradient = loss_and_gradient(graphdef, params, inputs(name))
    specs = encoder_param_specs(params)
    assert dict(named_leaves(specs))["blocks/ffn/up_proj/bias"] == PartitionSpec(None, "model")
    sharded = jax.device_put(params, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
    shards = {path: leaf.sharding.shard_shape(leaf.shape) for path, leaf in named_leaves(sharded)}
    assert shards["blocks/attention/v_proj/kernel"] == (2, 16, 8)
    assert shards["blocks/attention/o_proj/kernel"] == (2, 8, 16)
    assert shards["head/kernel"] == (16, 5)
    x = jax.device_put(inputs(name), NamedSharding(mesh, PartitionSpec("data")))
    eight, gradient8 = loss_and_gradient(graphdef, sharded, x)
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gradient8, gradient
    )


def test_specs_by_rules():
    specs = dict(named_leaves(encoder_param_specs(build("class")[1], {"layers": "data"})))
    assert specs["blocks/attention_norm/scale"] == PartitionSpec("data", None)
    assert specs["class_token/embedding"] == PartitionSpec(None, None)
    with pytest.raises(ValueError, match=r"rules names \['kv'\]; logical axes are classes, embed"):
        encoder_param_specs({}, {"kv": "model"})
    for bad in (
        {"gate_proj": {"kernel": jnp.ones((2, 2))}},
        {"norm": {"scale": jnp.ones((2,) * 3)}},
    ):
        with pytest.raises(ValueError, match="the parameters of encoders end in embed/embedding"):
            encoder_param_specs(bad)


# Errors


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (IMAGE, {"image_size": 14}, "image_size is 14; it must be divisible by patch_size"),
        (IMAGE, {"n_heads": 3}, "n_heads is 3; it must divide d_model, which is 16"),
        (IMAGE, {"d_model": 0}, "d_model is 0; it must be a positive integer"),
        (IMAGE, {"d_ff": -1}, "d_ff is -1; it must be a positive integer"),
        (IMAGE, {"patch_size": 0}, "patch_size is 0; it must be a positive integer"),
        (IMAGE, {"pool": "max"}, "pool is 'max'; allowed are class, mean"),
        (IMAGE, {"init_std": 0.0}, "init_std is 0.0; it must be positive"),
        (TEXT, {"dtype": "float16"}, "dtype is 'float16'; allowed are float32, bfloat16"),
        (TEXT, {"vocab_size": 0}, "vocab_size is 0; it must be a positive integer"),
        (TEXT, {"pad_id": 40}, "pad_id is 40; it must be a token, from 0 to 39"),
        (TEXT, {"num_classes": 0}, "num_classes is 0; it must be a positive integer"),
    ],
)
def test_config_errors(config, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


@pytest.mark.usefixtures("unchecked")
def test_other_errors():
    with pytest.raises(ValueError, match="name is 'huge'; known are tiny, small, base, large"):
        vit_config("huge")
    with pytest.raises(ValueError, match="name is 'large'; known are tiny, small, base"):
        text_classifier_config("large")
    image, text = nnx.merge(*build("class")), nnx.merge(*build("text"))
    for shape in ((4, 12, 8, 2), (4, 12, 12, 3), (12, 12, 2)):
        with pytest.raises(ValueError, match=r"images has the shape .*\[batch, 12, 12, 2\]"):
            image(jnp.ones(shape))
    for shape in ((2, 11), (8,)):
        with pytest.raises(ValueError, match=r"tokens has the shape .* at most max_seq_len = 10"):
            text(jnp.ones(shape, jnp.int32))
    with pytest.raises(ValueError, match="i is 2; this model has blocks 0 to 1"):
        text.block(2)
