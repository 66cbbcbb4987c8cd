"""GPT-2: sizes, attention, cache, generation, sharding, and directories of Hugging Face."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from sparsejax.core.selection import named_leaves, selected_paths
from sparsejax.models import (
    GPT_SIZES,
    CheckpointError,
    Gpt,
    GptBlock,
    GptConfig,
    generate,
    gpt_config,
    hf_config,
    init_cache,
    load_hf,
    load_hf_gpt,
    param_specs,
    save_hf,
    to_hf_config,
)

PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}
SMALL = GptConfig(vocab_size=40, d_model=32, n_layers=3, n_heads=4, max_seq_len=24, d_ff=48)


@functools.cache
def arrays(config, seed):
    """A model's graph and random values for all its parameters, norms and biases included."""
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Gpt(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)
    leaves = [
        (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32).astype(leaf.dtype)
        for leaf in jax.tree.leaves(abstract)
    ]
    return graph, jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def build(seed=0, **overrides):
    graph, params = arrays(dataclasses.replace(SMALL, **overrides), seed)
    return nnx.merge(graph, jax.tree.map(jnp.asarray, params))


def leaves(model):
    return {path: np.asarray(leaf) for path, leaf in named_leaves(nnx.split(model)[1])}


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef, params, ids, positions):
    return nnx.merge(graphdef, params)(ids, positions=positions)


def forward(model, ids, positions=None):
    return _forward(*nnx.split(model), ids, positions)


@functools.partial(jax.jit, static_argnums=0)
def _decode(graphdef, params, ids, cache):
    return nnx.merge(graphdef, params).decode(ids, cache)


def decode(model, ids, cache):
    return _decode(*nnx.split(model), ids, cache)


def tokens(b=2, t=12, seed=1):
    return jax.random.randint(jax.random.key(seed), (b, t), 0, 40)


def next_token_loss(graphdef, params, ids):
    logits = nnx.merge(graphdef, params)(ids)[:, :-1]
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], axis=-1)
    return -jnp.mean(picked)


loss_and_gradient = jax.jit(jax.value_and_grad(next_token_loss, argnums=1), static_argnums=0)


def numpy_forward(model, ids):
    """The whole model in float64 NumPy."""
    config = model.config
    p = {path: leaf.astype(np.float64) for path, leaf in leaves(model).items()}
    heads, width, t = config.n_heads, config.head_width, ids.shape[1]

    def norm(x, w, name):
        x = x - x.mean(-1, keepdims=True)
        return (
            w[f"{name}/scale"] * x / np.sqrt(x.var(-1, keepdims=True) + config.norm_eps)
            + w[f"{name}/bias"]
        )

    x = p["embed/embedding"][np.asarray(ids)] + p["positions/embedding"][:t]
    for i in range(config.n_layers):
        w = {k.removeprefix("blocks/"): v[i] for k, v in p.items() if k.startswith("blocks/")}

        def linear(h, name, w=w):
            return h @ w[f"{name}/kernel"] + w[f"{name}/bias"]

        h = norm(x, w, "attention_norm")
        q, k, v = (linear(h, f"attention/{n}_proj").reshape(*h.shape[:2], -1, width) for n in "qkv")
        score = np.einsum("bthd,bshd->bhts", q, k) / math.sqrt(width)
        score = np.where(np.tri(t, dtype=bool), score, -np.inf)
        weight = np.exp(score - score.max(-1, keepdims=True))
        out = np.einsum("bhts,bshd->bthd", weight / weight.sum(-1, keepdims=True), v)
        x = x + linear(out.reshape(*h.shape[:2], heads * width), "attention/o_proj")
        h = linear(norm(x, w, "ffn_norm"), "ffn/up_proj")
        h = h / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, "ffn/down_proj")
    return norm(x, p, "norm") @ p["embed/embedding"].T


# Sizes


@pytest.mark.parametrize("name", GPT_SIZES)
def test_parameter_counts(name):
    config = gpt_config(name)
    params = nnx.split(nnx.eval_shape(lambda: Gpt(config, rngs=nnx.Rngs(0))))[1]
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert total == PUBLISHED.get(name, 242_304)
    assert set(GPT_SIZES) == {"laptop", *PUBLISHED}


def test_initial_values():
    config = gpt_config("laptop", n_layers=8)
    p = leaves(Gpt(config, rngs=nnx.Rngs(3)))
    assert p["embed/embedding"].std() == pytest.approx(0.02, rel=0.05)
    assert p["blocks/attention/q_proj/kernel"].std() == pytest.approx(0.02, rel=0.02)
    for name in ("attention/o_proj", "ffn/down_proj"):
        assert p[f"blocks/{name}/kernel"].std() == pytest.approx(0.02 / 4, rel=0.02)
    assert not np.any(p["blocks/ffn/up_proj/bias"])
    assert np.all(p["norm/scale"] == 1)
    kernels = p["blocks/ffn/up_proj/kernel"]
    assert not np.array_equal(kernels[0], kernels[1])


def test_one_expression_finds_the_projections():
    params = nnx.split(build())[1]
    assert selected_paths(params, r"_proj/kernel$") == selected_paths(params)
    assert len(selected_paths(params)) == 6
    assert leaves(build())["blocks/attention/v_proj/kernel"].shape == (3, 32, 32)
    assert leaves(build())["blocks/ffn/down_proj/kernel"].shape == (3, 48, 32)


# Forward pass


@pytest.mark.parametrize("overrides", [{}, {"d_ff": None, "n_heads": 2, "norm_eps": 0.1}])
def test_forward_equals_numpy(overrides):
    model, ids = build(**overrides), tokens()
    np.testing.assert_allclose(forward(model, ids), numpy_forward(model, ids), rtol=2e-4, atol=5e-5)


def test_positions():
    model, ids = build(), tokens()
    positions = jnp.stack([jnp.arange(12), 2 * jnp.arange(12)])
    both = forward(model, ids, positions)
    np.testing.assert_allclose(both[0], forward(model, ids)[0], rtol=1e-4, atol=1e-5)
    alone = forward(model, ids[1:], positions[1:])
    np.testing.assert_allclose(both[1], alone[0], rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(both[1] - forward(model, ids)[1])).max() > 0.1
    assert np.isnan(forward(model, ids[:, :1], jnp.array([[24]]))).all()


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16(param_dtype):
    exact, ids = build(), tokens()
    model = build(dtype="bfloat16", param_dtype=param_dtype)
    graphdef, params = nnx.split(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(param_dtype)}
    assert model.hidden(ids).dtype == jnp.bfloat16
    logits = forward(model, ids)
    assert logits.dtype == jnp.float32
    scale = float(jnp.std(forward(exact, ids)))
    assert float(jnp.abs(logits - forward(exact, ids)).max()) < 0.2 * scale
    _, gradients = jax.eval_shape(functools.partial(loss_and_gradient, graphdef), params, ids)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(param_dtype)}


def test_gradients():
    """Along the gradient the loss rises as it says, and recomputing blocks changes nothing."""
    graphdef, params = nnx.split(build())
    ids = tokens()
    _, gradient = loss_and_gradient(graphdef, params, ids)
    size = math.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(gradient)))
    ends = []
    for step in (1e-3, -1e-3):
        moved = jax.tree.map(lambda p, g, s=step: p + s / size * g, params, gradient)
        ends.append(float(loss_and_gradient(graphdef, moved, ids)[0]))
    assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(size, rel=1e-2)
    again = loss_and_gradient(nnx.split(build(remat=True))[0], params, ids)[1]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, again
    )


# Cache, generation, blocks


def test_cache_equals_full_forward():
    model, ids = build(), tokens()
    cache = init_cache(model.config, 2, 20)
    pieces = []
    for start, end in ((0, 5), (5, 8), *((i, i + 1) for i in range(8, 12))):
        logits, cache = decode(model, ids[:, start:end], cache)
        pieces.append(logits)
    assert int(cache.length) == 12
    full = forward(model, ids)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), full, rtol=1e-4, atol=5e-5)
    last, _ = model.decode(ids, init_cache(model.config, 2), last_only=True)
    np.testing.assert_allclose(last, full[:, -1:], rtol=1e-4, atol=5e-5)
    with pytest.raises(ValueError, match="max_len = 20 places; tokens would fill 24"):
        model.decode(ids, cache)
    assert np.isnan(_decode(*nnx.split(model), ids, cache)[0]).all()


def test_greedy_equals_full_forwards():
    model, prompt = build(), tokens(t=4)
    out = generate(model, prompt, max_new_tokens=10)
    chosen = jnp.argmax(forward(model, out), -1)
    np.testing.assert_array_equal(out[:, 4:], chosen[:, 3:-1])
    np.testing.assert_array_equal(out[:, :4], prompt)


def test_block_and_set_block():
    model, ids = build(), tokens()
    before = forward(model, ids)
    x = model.embedded(ids)
    for i in range(3):
        block = model.block(i)
        assert isinstance(block, GptBlock)
        x = block(x)
    np.testing.assert_allclose(model.logits(model.norm(x)), before, rtol=1e-4, atol=5e-5)
    block = model.block(1)
    kernel = block.ffn.up_proj.kernel
    kernel[...] = jnp.zeros_like(kernel[...])
    np.testing.assert_array_equal(forward(model, ids), before)
    model.set_block(1, block)
    stacked = model.blocks.ffn.up_proj.kernel[...]
    assert [bool(np.any(layer)) for layer in stacked] == [True, False, True]
    model.set_block(1, build().block(1))
    np.testing.assert_array_equal(forward(model, ids), before)


def test_compilation_is_flat_in_depth():
    def lines(depth):
        config = dataclasses.replace(SMALL, n_layers=depth)
        graphdef, params = nnx.split(nnx.eval_shape(lambda: Gpt(config, rngs=nnx.Rngs(0))))
        return len(str(loss_and_gradient.trace(graphdef, params, tokens()).jaxpr).splitlines())

    assert lines(2) == lines(8)


def test_sharded_equals_unsharded(mesh):
    model, ids = build(), tokens(b=4)
    graphdef, params = nnx.split(model)
    rules = {"vocab": "model", "heads": "model", "kv": "model", "mlp": "model"}
    specs = param_specs(params, rules)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    sharded = jax.device_put(params, shardings)
    for path, shape in (("q_proj", (3, 32, 16)), ("k_proj", (3, 32, 16)), ("o_proj", (3, 16, 32))):
        kernel = sharded["blocks"]["attention"][path]["kernel"][...]
        assert kernel.sharding.shard_shape(kernel.shape) == shape
    bias = sharded["blocks"]["ffn"]["up_proj"]["bias"][...]
    assert bias.sharding.shard_shape(bias.shape) == (3, 24)
    placed = jax.device_put(ids, NamedSharding(mesh, PartitionSpec("data")))
    loss, gradient = loss_and_gradient(graphdef, sharded, placed)
    loss1, gradient1 = loss_and_gradient(graphdef, params, ids)
    np.testing.assert_allclose(loss, loss1, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gradient, gradient1
    )


# Directories of Hugging Face


def check_equal(model, expected):
    assert model.config == expected.config
    got, want = leaves(model), leaves(expected)
    assert set(got) == set(want)
    for path, leaf in want.items():
        assert got[path].dtype == leaf.dtype
        np.testing.assert_array_equal(got[path], leaf, err_msg=path)


def test_round_trip(tmp_path, mesh):
    save_hf(tmp_path / "one", build(), stop_token=3)
    check_equal(load_hf_gpt(tmp_path / "one"), build())
    check_equal(load_hf_gpt(tmp_path / "one", mesh=mesh), build())
    low = build(d_ff=None, param_dtype="bfloat16")
    save_hf(tmp_path / "low", low, shard_bytes=9000)
    assert (tmp_path / "low" / "model.safetensors.index.json").is_file()
    check_equal(load_hf_gpt(tmp_path / "low", param_dtype="bfloat16"), low)


def test_the_names_of_the_published_files(tmp_path):
    """Without `transformer.`, with the causal mask of every layer and with the tied head."""
    save_hf(tmp_path, build())
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, values = json.loads(data[8 : 8 + length]), data[8 + length :]
    header = {name.removeprefix("transformer."): entry for name, entry in header.items()}
    embedding = header["wte.weight"]
    table = values[slice(*embedding["data_offsets"])]
    for name, shape, dtype, more in (
        ("h.0.attn.bias", [1, 1, 4, 4], "BOOL", bytes(16)),
        ("h.0.attn.masked_bias", [], "F32", bytes(4)),
        ("lm_head.weight", embedding["shape"], "F32", table),
    ):
        offsets = [len(values), len(values) + len(more)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        values += more
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + values)
    check_equal(load_hf_gpt(tmp_path), build())


def test_configurations():
    config = dataclasses.replace(SMALL, norm_eps=1e-4)
    assert hf_config(to_hf_config(config)) == config
    published = {"n_ctx": 1024, "n_positions": 1024, "resid_pdrop": 0.1, "n_inner": None}
    published |= {"architectures": ["GPT2LMHeadModel"], "vocab_size": 50257}
    published |= {"n_embd": 768, "n_layer": 12, "n_head": 12, "activation_function": "gelu_new"}
    assert hf_config(published, dtype="bfloat16") == gpt_config("gpt2", dtype="bfloat16")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"n_embd": None}, "n_embd is None; it must be an integer"),
        ({"n_head": 5}, "n_head is 5; it must divide n_embd = 32"),
        ({"model_type": "llama"}, "model_type is 'llama'; GPT2LMHeadModel has 'gpt2'"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu'; only 'gelu_new'"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False; it is not supported"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False; it is not supported"),
        ({"add_cross_attention": True}, "add_cross_attention is True; it is not supported"),
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx is True; it is not supported",
        ),
    ],
)
def test_refused_configurations(entries, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        hf_config(to_hf_config(SMALL) | entries)
    assert len(caught.value.problems) == 1


def test_a_checkpoint_that_does_not_fit(tmp_path):
    save_hf(tmp_path, build())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": 2, "n_positions": 25}))
    with pytest.raises(CheckpointError, match="asks for 2 layers; the files have 3") as caught:
        load_hf_gpt(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"architectures is .'GPT2LMHeadModel'.; allowed is one"
    ):
        load_hf(tmp_path)
    assert "wpe.weight has the shape (24, 32); config.json makes it (25, 32)" in str(caught.value)


# Errors


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"d_ff": 0}, "d_ff is 0; it must be a positive integer"),
        ({"max_seq_len": -1}, "max_seq_len is -1; it must be a positive integer"),
        ({"n_heads": 5}, "n_heads is 5; it must divide d_model, which is 32"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0; it must be positive"),
    ],
)
def test_config_errors(overrides, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **overrides)


@pytest.mark.usefixtures("unchecked")
def test_other_errors():
    model = build()
    with pytest.raises(ValueError, match="dtype is 'float16'; allowed are float32, bfloat16"):
        dataclasses.replace(SMALL, dtype="float16")
    with pytest.raises(ValueError, match="name is 'gpt3'; known are laptop, gpt2,"):
        gpt_config("gpt3")
    with pytest.raises(ValueError, match="tokens has 25 positions; max_seq_len allows 24"):
        model(tokens(t=25))
    with pytest.raises(ValueError, match="i is 3; this model has blocks 0 to 2"):
        model.block(3)
    with pytest.raises(ValueError, match="i is -1; this model has blocks 0 to 2"):
        model.set_block(-1, model.block(0))
    with pytest.raises(ValueError, match="this model and batch need"):
        model.decode(tokens(), init_cache(SMALL, 1))
