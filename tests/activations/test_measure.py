"""Activation sparsity of models: loops over layers, shared modules, functions, composition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from sparsejax.activations import measure, topk_mlp
from sparsejax.models import (
    Gpt,
    Llama,
    LlamaConfig,
    ViT,
    gpt_config,
    param_specs,
    vit_config,
)
from sparsejax.models.llama import rope_tables

CONFIG = LlamaConfig(vocab_size=24, d_model=16, n_layers=3, n_heads=2, d_ff=32, max_seq_len=8)
TOKENS = jax.random.randint(jax.random.key(0), (4, 8), 0, 24)


def same(found, wanted):
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)


def by_hand(model, tokens, *, layers=3, **options):
    """Statistics of a Llama's or a Gpt's layers, block by block."""
    x, stats = model.embedded(tokens), []
    for i in range(layers):
        block = model.block(i)
        rest = x + block.attention(block.attention_norm(x), *rope_of(model, tokens))
        h = block.ffn_norm(rest)
        if hasattr(block.ffn, "gate_proj"):
            a = jax.nn.silu(block.ffn.gate_proj(h)) * block.ffn.up_proj(h)
        else:
            a = jax.nn.gelu(block.ffn.up_proj(h), approximate=True)
        stats.append(topk_mlp.activation_stats(a, **options))
        x = block(x)
    return jax.tree.map(lambda *v: jnp.stack(v), *stats)


def rope_of(model, tokens):
    is_llama = isinstance(model, Llama)
    return (rope_tables(model.config, jnp.arange(tokens.shape[1])[None]),) if is_llama else ()


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(6, 10, rngs=rngs)
        self.act = jax.nn.relu
        self.down = nnx.Linear(10, 6, rngs=rngs)

    def __call__(self, x):
        return x + self.down(self.act(self.up(x)))


class Loop(nnx.Module):
    """Three blocks by `nnx.scan`, and one module that is called twice and stands in two places."""

    def __init__(self, rngs):
        self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: Block(rngs)))(rngs)
        self.shared = nnx.Linear(6, 6, rngs=rngs)
        self.again = self.shared
        self.seen = nnx.BatchStat(jnp.zeros(()))
        self.unused = nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, x, *, scale=1.0):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def run(block, x):
            return block(x)

        self.seen[...] = self.seen[...] + 1.0
        x = run(self.blocks, x)
        return self.again(self.shared(x) * scale)


def loop_by_hand(model, x, scale=1.0):
    graph, state = nnx.split(model.blocks)
    stats = []
    for i in range(3):
        block = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state))
        stats.append(topk_mlp.activation_stats(jax.nn.relu(block.up(x))))
        x = block(x)
    both = [topk_mlp.activation_stats(v) for v in (x, model.shared(x) * scale)]
    return jax.tree.map(lambda *v: jnp.stack(v), *stats), topk_mlp.merge_activation_stats(*both)


@pytest.mark.parametrize("remat", [False, True])
def test_a_decoder_is_measured_layer_by_layer(remat):
    model = Llama(dataclasses.replace(CONFIG, remat=remat), rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    valid = jnp.arange(8) < jnp.asarray([[8], [3], [5], [1]])
    traces = []

    @jax.jit
    def run(state, tokens, valid):
        traces.append(0)
        return measure.measure_activations(
            nnx.merge(graph, state), tokens, threshold=0.05, valid=valid
        )

    found = run(state, TOKENS, valid)
    assert set(found) == {"blocks/ffn/down_proj"}
    wanted = jax.jit(
        lambda s: by_hand(nnx.merge(graph, s), TOKENS, threshold=0.05, where=valid)
    )(state)  # fmt: skip
    same(found["blocks/ffn/down_proj"], wanted)
    assert found["blocks/ffn/down_proj"]["nonzero_fraction"].shape == (3,)
    assert found["blocks/ffn/down_proj"]["tokens"].tolist() == [17] * 3
    run(state, TOKENS + 1, valid)
    assert len(traces) == 1


def test_other_backbones():
    gpt = Gpt(gpt_config("laptop", n_layers=2, d_model=32, n_heads=2), rngs=nnx.Rngs(0))
    stats = measure.measure_activations(gpt, TOKENS)
    same(stats["blocks/ffn/down_proj"], by_hand(gpt, TOKENS, layers=2))
    config = vit_config("tiny", n_layers=2, d_model=32, n_heads=2, patch_size=8, image_size=16,
                        num_classes=10)  # fmt: skip
    vit = ViT(config, rngs=nnx.Rngs(0))
    found = measure.measure_activations(
        vit, jnp.ones((3, 16, 16, 3)), where=r"(down_proj|head)$"
    )  # fmt: skip
    assert set(found) == {"blocks/ffn/down_proj", "head"}
    assert found["blocks/ffn/down_proj"]["tokens"].tolist() == [15, 15]  # 4 patches and a class
    assert found["head"]["fired"].shape == (32,)
    assert found["head"]["tokens"] == 3


def test_functions_shared_modules_and_loops_of_flax():
    model = Loop(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (7, 6))
    before = jax.tree.map(np.asarray, nnx.state(model))
    found = measure.measure_activations(
        model, x, scale=2.0, where=r"blocks/(act|down)$|shared$|again$|unused$"
    )
    of_blocks, of_shared = loop_by_hand(model, x, scale=2.0)
    # a shared module has the path of its first place; what is not called is left out
    (shared,) = set(found) - {"blocks/act", "blocks/down"}
    assert shared in ("shared", "again")
    same(found["blocks/act"], of_blocks)
    same(found["blocks/down"], of_blocks)
    same(found[shared], of_shared)
    assert found[shared]["tokens"] == 14
    # the model is as it was, its batch statistics included
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(nnx.state(model))):
        np.testing.assert_array_equal(old, new)
    assert type(model.blocks.down) is nnx.Linear
    assert model.blocks.act is jax.nn.relu


def test_a_model_may_be_the_layer_itself():
    layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    x = jnp.asarray([[1.0, -1.0, 0.0, 2.0]])
    found = measure.measure_activations(layer, x, where=r"^$")
    np.testing.assert_array_equal(found[""]["fired"], [1, 0, 0, 1])
    by_predicate = measure.measure_activations(layer, inputs=x, where=lambda path, _: path == "")
    same(by_predicate[""], found[""])


def test_convolutions_are_watched_by_channel():
    conv = nnx.Conv(3, 5, (3, 3), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(2), (2, 4, 4, 3))
    (stats,) = measure.measure_activations(conv, x, where="").values()
    same(stats, topk_mlp.activation_stats(x))
    assert stats["tokens"] == 32


def test_it_maps_over_models_and_leaves_gradients_alone():
    graph, _ = nnx.split(Loop(nnx.Rngs(0)))
    states = [nnx.split(Loop(nnx.Rngs(seed)))[1] for seed in (0, 1)]
    x = jax.random.normal(jax.random.key(1), (7, 6))

    def measured(state, x):
        return measure.measure_activations(nnx.merge(graph, state), x, where="down$")

    many = jax.jit(jax.vmap(measured, (0, None)))(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), x
    )
    single = jax.jit(measured)
    for row, state in enumerate(states):
        one = single(state, x)
        for name, value in one["blocks/down"].items():
            np.testing.assert_array_equal(many["blocks/down"][name][row], value)

    def loss(x):
        stats = measured(states[0], x)["blocks/down"]
        return jnp.sum(x**2) + jnp.sum(stats["nonzero_fraction"]), stats

    grad, stats = jax.jit(jax.grad(loss, has_aux=True))(x)
    np.testing.assert_allclose(grad, 2 * x, rtol=1e-6)
    same(stats, single(states[0], x)["blocks/down"])


def test_narrow_and_sharded_models(mesh):
    model = Llama(CONFIG, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    specs = param_specs(state)
    spread = jax.tree.map(lambda w, s: jax.device_put(w, NamedSharding(mesh, s)), state, specs)
    tokens = jax.device_put(TOKENS, NamedSharding(mesh, PartitionSpec("data")))
    run = jax.jit(lambda s, t: measure.measure_activations(nnx.merge(graph, s), t))
    same(run(spread, tokens)["blocks/ffn/down_proj"], run(state, TOKENS)["blocks/ffn/down_proj"])
    layer = nnx.Linear(4, 3, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jnp.asarray([[1.0, -1.0, 1e-30, 0.0]], jnp.bfloat16)
    stats = measure.measure_activations(layer, x, where="")[""]
    np.testing.assert_array_equal(stats["fired"], [1, 0, 1, 0])
    assert stats["neuron_rate"].dtype == jnp.float32


def test_double_precision_stays(x64):
    layer = nnx.Linear(4, 3, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    stats = measure.measure_activations(layer, jnp.ones((3, 4)), where="")[""]
    assert stats["neuron_rate"].dtype == jnp.float64
    assert stats["fired"].dtype == jnp.int32


class Inner(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(4, 4, rngs=rngs)
        self.act = jax.nn.relu

    def __call__(self, x, mode):
        if mode == "vmap":
            return jax.vmap(self.layer)(x)
        return self.act(x), self.act(x[..., :2])


def test_bad_input_is_named(unchecked):
    model, x = Inner(nnx.Rngs(0)), jnp.ones((2, 4))
    llama = Llama(CONFIG, rngs=nnx.Rngs(0))
    call = measure.measure_activations
    for run, error, message in (
        (lambda: call(model, x, "vmap", where="layer$"), ValueError,
         "'layer' runs under a vmap inside the model, which cannot be watched"),
        (lambda: call(model, x, "widths", where="act$"), ValueError,
         "'act' is called with 4 float32 and 2 float32 entries; they must be equal"),
        (lambda: call(model, x, "vmap", where="gate$"), ValueError, "where matches no leaf: 'gate"),
        (lambda: call(Loop(nnx.Rngs(0)), jnp.ones((2, 6)), where="unused$"), ValueError,
         "the call ran nothing that where chooses: unused"),
        (lambda: call(llama, TOKENS, where="^embed$"), TypeError,
         r"'embed' has int32\[4, 8\] to watch; it must be floating point"),
        (lambda: call(llama, TOKENS, valid=jnp.ones((4, 7), bool)), ValueError,
         r"valid has shape \(4, 7\); 'blocks/ffn/down_proj' has tokens \(4, 8\)"),
        (lambda: call(model.layer, x, where="", threshold=-0.5), ValueError,
         "threshold is -0.5; it must not be negative"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            run()
