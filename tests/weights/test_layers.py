"""The layers of a model and what a call of it multiplies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparsejax as sj
from sparsejax import weights
from sparsejax.models import Llama, LlamaConfig

CONFIG = LlamaConfig(vocab_size=24, d_model=16, n_layers=3, n_heads=2, d_ff=32, max_seq_len=8)


class ConvNet(nnx.Module):
    """A stem, a strided, a grouped and a shared convolution, batch statistics and a head."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.convs = nnx.List(
            [
                nnx.Conv(8, 16, (3, 3), strides=2, padding="VALID", rngs=rngs),
                nnx.Conv(16, 16, (1, 3), feature_group_count=4, rngs=rngs),
            ]
        )
        self.mix = nnx.Linear(16, 16, rngs=rngs)
        self.unused = nnx.Linear(4, 4, rngs=rngs)
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x, *, scale=1.0, extra=None):
        x = nnx.relu(self.norm(self.stem(x))) * scale
        for conv in self.convs:
            x = conv(x)
        x = self.mix(jax.nn.relu(self.mix(x)))
        x = jnp.mean(x, axis=(1, 2)) if extra is None else jnp.mean(x, axis=(1, 2)) + extra
        return self.head(x)


def by_path(products):
    return {product.path: product for product in products}


def test_convolutions_groups_strides_and_repeated_calls():
    model = ConvNet(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.state(model))
    x = jax.ShapeDtypeStruct((2, 9, 8, 3), jnp.float32)
    products = by_path(
        weights.layer_products(model, x, scale=2.0, extra=jnp.zeros((2, 16), jnp.float32))
    )
    wanted = {  # positions of every call, reduction, outputs
        "stem/kernel": ((2 * 9 * 8,), 27, 8),
        "convs/0/kernel": ((2 * 4 * 3,), 72, 16),
        "convs/1/kernel": ((2 * 4 * 3,), 3 * 4, 16),
        "mix/kernel": ((2 * 4 * 3,) * 2, 16, 16),
        "head/kernel": ((2,), 16, 10),
    }
    assert {p: (v.calls, v.reduction, v.outputs) for p, v in products.items()} == wanted
    mix = products["mix/kernel"]
    assert (mix.positions, mix.macs) == (48, 48 * 16 * 16)
    assert mix.products == ((24, 16, 16), (24, 16, 16))
    after = nnx.state(model)  # the statistics of the batch were the copy's
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
        np.testing.assert_array_equal(old, new)
    assert model.mix.dot_general is jax.lax.dot_general
    paths = [path for path, _ in weights.named_layers(model)]
    assert sorted(paths) == sorted([*wanted, "unused/kernel"])
    assert set(paths) <= {path for path, _ in sj.core.named_leaves(nnx.state(model))}
    for path, layer in weights.named_layers(model):
        assert isinstance(layer, nnx.Linear | nnx.Conv)
        assert path.endswith("/kernel")


def test_stacked_blocks_count_once_for_every_layer():
    model = Llama(CONFIG, rngs=nnx.Rngs(0))
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    products = by_path(weights.layer_products(model, tokens))
    assert products["blocks/ffn/down_proj/kernel"].products == ((16, 32, 16),) * 3
    assert products["head/kernel"].products == ((16, 16, 24),)
    assert len(products) == 8
    block = 4 * 16 * 16 + 3 * 16 * 32
    assert sum(p.macs for p in products.values()) == 16 * (3 * block + 16 * 24)

    class Seeds(nnx.Module):
        def __init__(self):
            split = nnx.split_rngs(splits=5)
            self.layers = split(nnx.vmap(lambda rngs: nnx.Linear(4, 6, rngs=rngs)))(nnx.Rngs(0))

        def __call__(self, x):
            return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.layers, x)

    (seeds,) = weights.layer_products(Seeds(), jax.ShapeDtypeStruct((3, 4), jnp.float32))
    assert seeds.products == ((3, 4, 6),) * 5


def test_any_number_of_batch_and_space_axes():
    line = nnx.Conv(4, 6, 3, padding="CAUSAL", rngs=nnx.Rngs(0))
    for batch, positions in (((), 7), ((5,), 35), ((2, 5), 70)):
        x = jax.ShapeDtypeStruct((*batch, 7, 4), jnp.float32)
        assert weights.layer_products(line, x)[0].products == ((positions, 12, 6),)
    linear = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    (product,) = weights.layer_products(linear, jnp.ones((2, 3, 4)))
    assert (product.path, product.products) == ("kernel", ((6, 4, 6),))


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match=r"the call ran no nnx.Linear and no nnx.Conv; .* has 0"):
        weights.layer_products(nnx.Embed(4, 4, rngs=nnx.Rngs(0)), jnp.zeros(2, jnp.int32))
