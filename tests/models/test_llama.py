"""The LLaMA family: sizes, attention, RoPE, cache, generation, sharding and compilation."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from sparsejax.core import path_name
from sparsejax.models import (
    LLAMA_SIZES,
    DecoderBlock,
    KVCache,
    Llama,
    LlamaConfig,
    RopeScaling,
    generate,
    init_cache,
    llama_config,
    logical_axes,
    param_specs,
    parameter_count,
    rope_tables,
)

PUBLISHED = {
    "135m": 134_515_008,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
}
LADDER = {"laptop": 0.25e6, "1m": 1e6, "10m": 10e6, "60m": 60e6, "350m": 350e6}

GQA = LlamaConfig(
    vocab_size=40,
    d_model=32,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    d_ff=48,
    max_seq_len=24,
    qkv_bias=True,
)


@functools.cache
def built(seed, **overrides):
    model = Llama(dataclasses.replace(GQA, **overrides), rngs=nnx.Rngs(seed))
    graphdef, params = nnx.split(model)

    def moved(path, leaf):
        name = path_name(path)
        if not name.endswith(("scale", "bias")):
            return leaf
        return leaf + 0.3 * jax.random.normal(jax.random.key(len(name)), leaf.shape, leaf.dtype)

    return graphdef, jax.tree_util.tree_map_with_path(moved, params)


def build(seed=0, **overrides):
    """A small grouped-query model whose norms and biases are not what they start as."""
    graphdef, params = built(seed, **overrides)
    # A new State: merging does not copy, and a test may write into its model.
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, params))


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


def tokens(b=2, t=12, vocab=40, seed=1):
    return jax.random.randint(jax.random.key(seed), (b, t), 0, vocab)


def arrays(model):
    return {
        path_name(path): np.asarray(leaf, np.float64)
        for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.split(model)[1])
    }


def numpy_forward(model, ids):
    """The whole model in float64 NumPy, key and value heads repeated explicitly."""
    config, p = model.config, arrays(model)
    heads, kv, width = config.n_heads, config.kv_heads, config.head_width
    t = ids.shape[1]

    def norm(x, scale):
        return scale * x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps)

    angle = np.arange(t)[:, None] * config.rope_theta ** (-np.arange(width // 2) * 2 / width)
    turn = np.exp(1j * angle)[None, :, None]

    def rotate(x):
        z = (x[..., : width // 2] + 1j * x[..., width // 2 :]) * turn
        return np.concatenate([z.real, z.imag], -1)

    behind = np.arange(t)[:, None] - np.arange(t)[None]
    visible = (behind >= 0) & (behind < (config.sliding_window or t))
    x = p["embed/embedding"][np.asarray(ids)]
    for i in range(config.n_layers):
        w = {k.removeprefix("blocks/"): v[i] for k, v in p.items() if k.startswith("blocks/")}

        def linear(h, name, w=w):
            return h @ w[f"{name}/kernel"] + w.get(f"{name}/bias", 0)

        h = norm(x, w["attention_norm/scale"])
        q, k, v = (linear(h, f"attention/{n}_proj").reshape(*h.shape[:2], -1, width) for n in "qkv")
        q, k = rotate(q), np.repeat(rotate(k), heads // kv, 2)
        v = np.repeat(v, heads // kv, 2)
        score = np.where(visible, np.einsum("bthd,bshd->bhts", q, k) / math.sqrt(width), -np.inf)
        weight = np.exp(score - score.max(-1, keepdims=True))
        out = np.einsum("bhts,bshd->bthd", weight / weight.sum(-1, keepdims=True), v)
        x = x + linear(out.reshape(*h.shape[:2], -1), "attention/o_proj")
        h = norm(x, w["ffn_norm/scale"])
        gate = linear(h, "ffn/gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, "ffn/up_proj"), "ffn/down_proj")
    head = p["embed/embedding"].T if config.tie_embeddings else p["head/kernel"]
    return norm(x, p["norm/scale"]) @ head


def next_token_loss(graphdef, params, ids):
    logits = nnx.merge(graphdef, params)(ids)[:, :-1]
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], axis=-1)
    return -jnp.mean(picked)


loss_and_gradient = jax.jit(jax.value_and_grad(next_token_loss, argnums=1), static_argnums=0)


# Sizes


def abstract_params(config):
    return nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))[1]


@pytest.mark.parametrize("name", LLAMA_SIZES)
def test_parameter_counts(name):
    config = llama_config(name)
    shapes = abstract_params(config)
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert total == parameter_count(config)
    if name in PUBLISHED:
        assert total == PUBLISHED[name]
    else:
        assert total == pytest.approx(LADDER[name], rel=0.1)


def test_every_size_has_an_expected_count():
    assert set(LLAMA_SIZES) == {*PUBLISHED, *LADDER}


def test_split_gives_exactly_the_parameters():
    model = build()
    graphdef, params = nnx.split(model)
    variables = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Variable))
    assert all(isinstance(variable, nnx.Param) for variable in variables)
    shapes = {name: leaf.shape for name, leaf in arrays(model).items()}
    assert shapes["blocks/attention/q_proj/kernel"] == (3, 32, 32)
    assert shapes["blocks/attention/k_proj/kernel"] == (3, 32, 16)
    assert shapes["blocks/attention/k_proj/bias"] == (3, 16)
    assert shapes["blocks/ffn/down_proj/kernel"] == (3, 48, 32)
    assert shapes["blocks/ffn_norm/scale"] == (3, 32)
    assert shapes["embed/embedding"] == (40, 32)
    assert shapes["head/kernel"] == (32, 40)
    # Equal graphs, so that a second model of the same configuration does not compile again.
    other = nnx.split(Llama(GQA, rngs=nnx.Rngs(1)))[0]
    assert graphdef == other
    assert hash(graphdef) == hash(other)


def test_initial_values():
    model = Llama(llama_config("1m", embed_std=0.05), rngs=nnx.Rngs(3))
    p = arrays(model)
    assert p["embed/embedding"].std() == pytest.approx(0.05, rel=0.02)
    for name, size_in in (
        ("attention/q_proj", 128),
        ("ffn/gate_proj", 128),
        ("ffn/down_proj", 352),
    ):
        kernel = p[f"blocks/{name}/kernel"]
        assert kernel.std() == pytest.approx(size_in**-0.5, rel=0.02)
        assert abs(kernel.mean()) < 0.01 * size_in**-0.5 + 1e-3
        assert not np.array_equal(kernel[0], kernel[1])
    assert np.all(p["norm/scale"] == 1)
    assert np.all(p["blocks/attention_norm/scale"] == 1)


# Forward pass


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"n_kv_heads": 1, "tie_embeddings": True, "qkv_bias": False, "norm_eps": 0.1},
        {"n_kv_heads": None, "head_dim": 6, "rope_theta": 100.0},
        {"sliding_window": 2},
    ],
)
def test_forward_equals_numpy(overrides):
    model, ids = build(**overrides), tokens()
    np.testing.assert_allclose(forward(model, ids), numpy_forward(model, ids), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("window", [None, 2])
def test_who_sees_whom(window):
    model, ids = build(sliding_window=window), tokens()
    changed = ids.at[:, 6].set((ids[:, 6] + 1) % 40)
    difference = np.asarray(forward(model, ids) - forward(model, changed))
    moved = np.abs(difference).max((0, 2)) > 0
    # Each of the 3 layers carries news window - 1 tokens further.
    last = 12 if window is None else 6 + 3 * (window - 1) + 1
    np.testing.assert_array_equal(moved, (np.arange(12) >= 6) & (np.arange(12) < last))


def test_a_token_outside_the_vocabulary_is_loud():
    assert np.isnan(forward(build(), jnp.array([[40]]))).all()


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16(param_dtype):
    exact, ids = build(), tokens()
    graphdef, params = nnx.split(build(dtype="bfloat16", param_dtype=param_dtype))
    low = jax.tree.map(lambda p, q: p.astype(q.dtype), nnx.split(exact)[1], params)
    model = nnx.merge(graphdef, low)
    assert {leaf.dtype for leaf in jax.tree.leaves(low)} == {jnp.dtype(param_dtype)}
    assert model.hidden(ids).dtype == jnp.bfloat16
    logits = forward(model, ids)
    assert logits.dtype == jnp.float32
    # Not rounded to bfloat16 on the way.
    assert np.any(logits != logits.astype(jnp.bfloat16).astype(jnp.float32))
    scale = float(jnp.std(forward(exact, ids)))
    assert float(jnp.abs(logits - forward(exact, ids)).max()) < 0.15 * scale
    _, gradients = jax.eval_shape(functools.partial(loss_and_gradient, graphdef), low, ids)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(param_dtype)}


def test_gradient_against_finite_differences():
    graphdef, params = nnx.split(build())
    ids = tokens()
    loss = jax.jit(lambda p: next_token_loss(graphdef, p, ids))
    _, gradient = loss_and_gradient(graphdef, params, ids)
    along = jax.tree.map(lambda g: g / _norm(gradient), gradient)
    step = 1e-4
    up, down = (jax.tree.map(lambda p, d, s=s: p + s * d, params, along) for s in (step, -step))
    slope = (float(loss(up)) - float(loss(down))) / (2 * step)
    assert slope == pytest.approx(_norm(gradient), rel=1e-2)


def _norm(tree):
    return math.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(tree)))


def test_remat_gives_the_same_gradient():
    ids = tokens()
    results = []
    for remat in (False, True):
        graphdef, params = nnx.split(build(remat=remat))
        results.append(loss_and_gradient(graphdef, params, ids)[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *results)


# Rotary positions


def tables(scaling=None, length=64, **overrides):
    config = dataclasses.replace(GQA, head_dim=16, rope_scaling=scaling, **overrides)
    cos, sin = rope_tables(config, jnp.arange(length)[None])
    return np.asarray(cos[0]), np.asarray(sin[0])


def check_tables(got, frequencies, length=64):
    angle = np.arange(length)[:, None] * np.asarray(frequencies)[None]
    np.testing.assert_allclose(got[0], np.cos(angle), atol=2e-5)
    np.testing.assert_allclose(got[1], np.sin(angle), atol=2e-5)


def test_rope_plain_and_linear():
    plain = [10_000.0 ** (-2 * j / 16) for j in range(8)]
    check_tables(tables(), plain)
    check_tables(tables(RopeScaling("linear", 4.0)), [f / 4 for f in plain])


def test_rope_llama3():
    """The rule by wavelengths, frequency by frequency, as the LLaMA 3.1 release states it."""
    expected, regions = [], set()
    for j in range(8):
        frequency = 500.0 ** (-2 * j / 16)
        wavelength = 2 * math.pi / frequency
        if wavelength < 256 / 4.0:
            expected.append(frequency)
            regions.add("high")
        elif wavelength > 256 / 1.0:
            expected.append(frequency / 8)
            regions.add("low")
        else:
            smooth = (256 / wavelength - 1.0) / (4.0 - 1.0)
            expected.append((1 - smooth) * frequency / 8 + smooth * frequency)
            regions.add("middle")
    assert regions == {"high", "middle", "low"}
    scaling = RopeScaling("llama3", 8.0, original_max_seq_len=256)
    check_tables(tables(scaling, rope_theta=500.0), expected)


@pytest.mark.parametrize("length", [20, 32, 64])
def test_rope_dynamic(length):
    base = 10_000.0
    if length > 32:
        base *= (2.0 * length / 32 - 1.0) ** (16 / 14)
    expected = [base ** (-2 * j / 16) for j in range(8)]
    scaling = RopeScaling("dynamic", 2.0, original_max_seq_len=32)
    check_tables(tables(scaling, length), expected, length)


def test_rope_is_relative():
    model, ids = build(), tokens()
    shifted = forward(model, ids, jnp.arange(12)[None] + 7)
    np.testing.assert_allclose(forward(model, ids), shifted, rtol=1e-3, atol=1e-4)
    stretched = forward(model, ids, 2 * jnp.arange(12)[None])
    assert np.abs(np.asarray(forward(model, ids) - stretched)).max() > 1e-2


def test_positions_of_each_sequence():
    model, ids = build(), tokens()
    positions = jnp.stack([jnp.arange(12), 2 * jnp.arange(12)])
    both = forward(model, ids, positions)
    for row in range(2):
        alone = forward(model, ids[row : row + 1], positions[row : row + 1])
        np.testing.assert_allclose(both[row], alone[0], rtol=1e-4, atol=1e-5)


# Cache and generation


@pytest.mark.parametrize("window", [None, 2])
def test_cache_equals_full_forward(window):
    model, ids = build(sliding_window=window), tokens()
    cache = init_cache(model.config, 2, 20)
    pieces = []
    for start, end in ((0, 5), (5, 8), *((i, i + 1) for i in range(8, 12))):
        logits, cache = decode(model, ids[:, start:end], cache)
        pieces.append(logits)
    assert int(cache.length) == 12
    np.testing.assert_allclose(
        jnp.concatenate(pieces, 1), forward(model, ids), rtol=1e-4, atol=1e-5
    )
    last, _ = model.decode(ids, init_cache(model.config, 2), last_only=True)
    np.testing.assert_allclose(last, forward(model, ids)[:, -1:], rtol=1e-4, atol=1e-5)


def test_cache_dtype_and_abstract_cache():
    cache = jax.eval_shape(lambda: init_cache(GQA, 2, 8, "bfloat16"))
    assert cache.k.shape == cache.v.shape == (3, 2, 8, 2, 8)
    assert cache.k.dtype == jnp.bfloat16
    model, ids = build(), tokens(t=8)
    logits, _ = decode(model, ids, init_cache(GQA, 2, 8, "bfloat16"))
    np.testing.assert_allclose(logits, forward(model, ids), atol=0.15)


def test_cache_overflow():
    model, ids = build(), tokens(t=6)
    _, cache = decode(model, ids, init_cache(GQA, 2, 8))
    with pytest.raises(ValueError, match=r"max_len = 8 places; tokens would fill 12"):
        model.decode(ids, cache)
    assert np.isfinite(decode(model, ids[:, :2], cache)[0]).all()
    assert np.isnan(decode(model, ids[:, :3], cache)[0]).all()


def _argmax_at_end(model, ids):
    """The next token by a full forward pass, padded so that one compilation serves every length."""
    padded = jnp.pad(ids, ((0, 0), (0, 24 - ids.shape[1])))
    return jnp.argmax(forward(model, padded)[:, ids.shape[1] - 1, None], -1)


def test_greedy_equals_full_forwards():
    model, prompt = build(), tokens(t=4)
    out = generate(model, prompt, max_new_tokens=10)
    grown = prompt
    for _ in range(10):
        grown = jnp.concatenate([grown, _argmax_at_end(model, grown)], axis=1)
    np.testing.assert_array_equal(out, grown)
    assert out.dtype == prompt.dtype
    np.testing.assert_array_equal(generate(model, prompt, max_new_tokens=1), grown[:, :5])


def test_sampling():
    model, prompt = build(), tokens(t=4)
    key = jax.random.key(5)

    def sample(seed_key=key, **options):
        options = {"temperature": 1.0, "max_new_tokens": 10, **options}
        return generate(model, prompt, key=seed_key, **options)

    greedy = generate(model, prompt, max_new_tokens=10)
    np.testing.assert_array_equal(sample(), sample())
    assert not np.array_equal(sample(), sample(jax.random.key(6)))
    np.testing.assert_array_equal(sample(top_k=1), greedy)
    np.testing.assert_array_equal(sample(top_p=1e-6), greedy)
    np.testing.assert_array_equal(sample(temperature=1e-4), greedy)


def test_sampled_tokens_follow_the_distribution():
    model = build()
    prompt = jnp.tile(tokens(b=1, t=4), (2000, 1))
    logits = np.asarray(forward(model, prompt[:1])[0, -1], np.float64) / 1.5
    order = np.argsort(-logits)

    def frequencies(**options):
        out = generate(
            model, prompt, max_new_tokens=1, temperature=1.5, key=jax.random.key(0), **options
        )
        return np.bincount(np.asarray(out[:, -1]), minlength=40) / 2000

    def softmax(kept):
        weights = np.where(kept, np.exp(logits - logits.max()), 0)
        return weights / weights.sum()

    everything = np.ones(40, bool)
    np.testing.assert_allclose(frequencies(), softmax(everything), atol=0.04)
    best = np.isin(np.arange(40), order[:3])
    np.testing.assert_allclose(frequencies(top_k=3), softmax(best), atol=0.04)
    cumulative = np.cumsum(softmax(everything)[order])
    nucleus = np.isin(np.arange(40), order[: 1 + np.sum(cumulative < 0.5)])
    np.testing.assert_allclose(frequencies(top_p=0.5), softmax(nucleus), atol=0.04)


def test_stop_token():
    model, prompt = build(), tokens(t=4)
    plain = np.asarray(generate(model, prompt, max_new_tokens=10))
    stop = int(plain[0, 6])
    out = np.asarray(generate(model, prompt, max_new_tokens=10, stop_token=stop))
    for row, free in zip(out, plain):
        hits = np.flatnonzero(free[4:] == stop)
        length = len(free) if hits.size == 0 else 4 + int(hits[0])
        np.testing.assert_array_equal(row[:length], free[:length])
        assert np.all(row[length:] == stop)


def test_generation_compiles_once(caplog):
    def compilations(seed, temperature, top_p):
        model, key = build(seed), jax.random.key(seed)
        caplog.clear()
        with jax.log_compiles():
            generate(
                model, tokens(t=3), max_new_tokens=4, temperature=temperature, top_p=top_p, key=key
            )
        messages = [record.getMessage() for record in caplog.records]
        return sum(m.startswith("Compiling") and "_generate" in m for m in messages)

    assert compilations(0, 0.7, 0.9) == 1
    assert compilations(1, 0.9, 0.5) == 0


# Blocks, compilation, sharding


def test_block_and_set_block():
    model, ids = build(), tokens()
    before = forward(model, ids)
    x = model.embedded(ids)
    for i in range(3):
        block = model.block(i)
        assert isinstance(block, DecoderBlock)
        assert block.attention.q_proj.kernel.shape == (32, 32)
        x = block(x)
    np.testing.assert_allclose(model.logits(model.norm(x)), before, rtol=1e-4, atol=1e-5)

    block = model.block(1)
    kernel = block.ffn.up_proj.kernel
    kernel[...] = jnp.zeros_like(kernel[...])
    np.testing.assert_array_equal(forward(model, ids), before)
    model.set_block(1, block)
    stacked = model.blocks.ffn.up_proj.kernel[...]
    assert not np.any(stacked[1])
    assert np.any(stacked[0])
    assert np.any(stacked[2])
    model.set_block(1, build().block(1))
    np.testing.assert_array_equal(forward(model, ids), before)


def test_compilation_is_flat_in_depth():
    def lines(depth):
        config = dataclasses.replace(GQA, n_layers=depth)
        graphdef, params = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
        traced = loss_and_gradient.trace(graphdef, params, tokens())
        return len(str(traced.jaxpr).splitlines()), len(traced.lower().as_text().splitlines())

    assert lines(2) == lines(8)


def test_sharded_equals_unsharded(mesh):
    model, ids = build(), tokens(b=4)
    graphdef, params = nnx.split(model)
    specs = param_specs(params)
    assert jax.tree.structure(specs) == jax.tree.structure(params)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    sharded = jax.device_put(params, shardings)
    kernel = sharded["blocks"]["ffn"]["up_proj"]["kernel"][...]
    assert kernel.sharding.shard_shape(kernel.shape) == (3, 32, 24)
    placed = jax.device_put(ids, NamedSharding(mesh, PartitionSpec("data")))
    logits = forward(nnx.merge(graphdef, sharded), placed)
    np.testing.assert_allclose(logits, forward(model, ids), rtol=1e-4, atol=1e-5)
    loss, gradient = loss_and_gradient(graphdef, sharded, placed)
    loss1, gradient1 = loss_and_gradient(graphdef, params, ids)
    np.testing.assert_allclose(loss, loss1, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gradient, gradient1
    )
    out = generate(nnx.merge(graphdef, sharded), placed[:, :9], max_new_tokens=3)
    np.testing.assert_array_equal(out[:, 9:], jnp.argmax(forward(model, out), -1)[:, 8:-1])


def test_logical_axes_and_specs():
    P = PartitionSpec
    params = abstract_params(dataclasses.replace(GQA, tie_embeddings=False))
    specs = {path_name(k): v for k, v in jax.tree_util.tree_leaves_with_path(param_specs(params))}
    assert specs["embed/embedding"] == P("model", None)
    assert specs["head/kernel"] == P(None, "model")
    assert specs["blocks/attention/q_proj/kernel"] == P(None, None, "model")
    assert specs["blocks/attention/q_proj/bias"] == P(None, "model")
    assert specs["blocks/attention/k_proj/kernel"] == P(None, None, None)
    assert specs["blocks/attention/o_proj/kernel"] == P(None, "model", None)
    assert specs["blocks/ffn/down_proj/kernel"] == P(None, "model", None)
    assert specs["norm/scale"] == P(None)
    assert logical_axes("blocks/ffn/up_proj/kernel", 3) == ("layers", "embed", "mlp")
    rules = {"embed": "data", "kv": ("data", "model")}
    block = {"attention": {"v_proj": {"kernel": jnp.ones((4, 4))}}, "count": jnp.int32(0)}
    assert param_specs(block, rules) == {
        "attention": {"v_proj": {"kernel": P("data", ("data", "model"))}},
        "count": P(),
    }


# Errors


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"d_ff": 0}, "d_ff is 0; it must be a positive integer"),
        ({"sliding_window": -1}, "sliding_window is -1; it must be a positive integer"),
        ({"n_kv_heads": 3}, "n_kv_heads is 3; it must divide n_heads, which is 4"),
        ({"n_heads": 5, "n_kv_heads": 5}, "n_heads is 5; it must divide d_model, which is 32"),
        ({"head_dim": 7}, "head_dim is 7; it must be even"),
        ({"rope_theta": 0.0}, r"rope_theta is 0.0; it must be positive"),
    ],
)
def test_config_errors(overrides, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GQA, **overrides)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "linear", "factor": 0.5}, "factor is 0.5; it must be at least 1"),
        ({"kind": "llama3", "factor": 8.0}, "original_max_seq_len is None; kind='llama3' needs"),
        ({"kind": "dynamic", "factor": 2.0}, "original_max_seq_len is None; kind='dynamic' needs"),
        (
            {"kind": "linear", "factor": 2.0, "low_freq_factor": 4.0},
            "low_freq_factor is 4.0 and high_freq_factor is 4.0",
        ),
    ],
)
def test_rope_scaling_errors(options, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**options)


def test_unknown_size():
    with pytest.raises(ValueError, match=r"name is 'gpt-2'; known are laptop, 1m, .*mistral-7b"):
        llama_config("gpt-2")
    assert llama_config("laptop", n_layers=4).n_layers == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.7}, "key is None at temperature 0.7"),
        ({"key": jax.random.key(0)}, "at temperature 0.0; sampling, alone, needs one"),
        ({"temperature": -1.0}, "temperature is -1.0; it must not be negative"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"max_new_tokens": 30}, "make 34 tokens; max_seq_len is 24"),
        ({"top_k": 41}, "top_k is 41; it must be from 1 to 40"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
    ],
)
def test_generate_errors(options, message):
    with pytest.raises(ValueError, match=message):
        generate(build(), tokens(t=4), **{"max_new_tokens": 2, **options})


def test_call_errors():
    model = build()
    with pytest.raises(ValueError, match="tokens has 25 positions; max_seq_len allows 24"):
        model(tokens(t=25))
    with pytest.raises(ValueError, match="prompt has shape"):
        generate(model, tokens(t=0), max_new_tokens=2)
    with pytest.raises(ValueError, match="i is 3; this model has blocks 0 to 2"):
        model.block(3)
    with pytest.raises(ValueError, match="i is -1; this model has blocks 0 to 2"):
        model.set_block(-1, model.block(0))
    with pytest.raises(ValueError, match="max_len is 25; it must be from 1 to max_seq_len = 24"):
        init_cache(GQA, 2, 25)
    with pytest.raises(ValueError, match="batch is 0"):
        init_cache(GQA, 0)
    with pytest.raises(
        ValueError, match=r"cache has keys \(3, 1, 24, 2, 8\) .* \(3, 2, 24, 2, 8\)"
    ):
        model.decode(tokens(), init_cache(GQA, 1))
    half = KVCache(jnp.zeros((3, 2, 8, 1, 8)), jnp.zeros((3, 2, 8, 1, 8)), jnp.int32(0))
    with pytest.raises(ValueError, match=r"this model and batch need .* \(3, 2, 8, 2, 8\)"):
        model.decode(tokens(t=4), half)


def test_spec_errors():
    with pytest.raises(ValueError, match=r"rules names \['head'\]; logical axes are embed, "):
        param_specs({}, {"head": "model"})
    with pytest.raises(ValueError, match=r"path is .other/kernel.; the parameters of Llama"):
        param_specs({"other": {"kernel": jnp.ones((2, 2))}})
    with pytest.raises(ValueError, match=r"ffn/up_proj/kernel has 4 axes"):
        logical_axes("ffn/up_proj/kernel", 4)
