"""Pruning block by block: inputs from the pruned prefix, masks, reports."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparsejax as sj
from sparsejax import weights
from sparsejax.models import Llama, llama_config

PATTERN = sj.NM(2, 4)


class Block(nnx.Module):
    """A residual block of two layers, one of them in a list."""

    def __init__(self, key):
        rngs = nnx.Rngs(key)
        self.first = nnx.Linear(8, 12, rngs=rngs)
        self.rest = nnx.List([nnx.Linear(12, 8, rngs=rngs)])

    def __call__(self, x):
        return x + self.rest[0](jnp.tanh(self.first(x)))


def data():
    return jax.random.normal(jax.random.key(5), (6, 3, 8)) * jnp.arange(1.0, 9.0)


def test_inputs_of_every_layer_are_captured_and_the_block_is_unchanged():
    block, x = Block(0), data()
    out, inputs = weights.capture_inputs(block, x)
    np.testing.assert_array_equal(out, block(x))
    assert set(inputs) == {"first/kernel", "rest/0/kernel"}
    np.testing.assert_array_equal(inputs["first/kernel"], x)
    np.testing.assert_array_equal(inputs["rest/0/kernel"], jnp.tanh(block.first(x)))


@pytest.mark.parametrize("name", ["magnitude", "wanda"])
@pytest.mark.parametrize("amount", [{"pattern": PATTERN}, {"sparsity": 0.6}], ids=str)
def test_equals_pruning_by_hand(name, amount):
    blocks, x = [Block(1), Block(2)], data()
    dense = [nnx.clone(block) for block in blocks]
    method = weights.PruneMethod(name, **amount)
    masks, reports = weights.prune_sequential(blocks, x, method=method, chunk=4)
    for block, original, mask, report in zip(blocks, dense, masks, reports):
        hidden = jnp.tanh(original.first(x))  # the block's own layers are still dense here
        for layer, before, inputs, kept, lost in (
            (block.first, original.first, x, mask["first"], report["first/kernel"]),
            (block.rest[0], original.rest[0], hidden, mask["rest"][0], report["rest/0/kernel"]),
        ):
            kernel = before.kernel[...]
            if name == "magnitude":
                wanted = weights.magnitude_mask(kernel, **amount)
            else:
                wanted = weights.wanda_mask(kernel, weights.activation_stats(inputs), **amount)
            np.testing.assert_array_equal(kept["kernel"][...], wanted)
            np.testing.assert_array_equal(layer.kernel[...], jnp.where(wanted, kernel, 0.0))
            assert kept["bias"][...].ndim == 0
            error = inputs @ (kernel - layer.kernel[...])
            share = float(jnp.sum(error**2) / jnp.sum((inputs @ kernel) ** 2))
            assert lost == pytest.approx(share, rel=1e-4)
        x = block(x)  # the next block sees the pruned prefix


def test_a_llama_is_pruned_block_by_block():
    config = llama_config("laptop", d_model=16, n_heads=2, n_kv_heads=2, d_ff=32)
    model = Llama(config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (4, 8), 0, 128)
    blocks = [model.block(i) for i in range(config.n_layers)]
    masks, reports = weights.prune_sequential(
        blocks, model.embedded(tokens), method=weights.PruneMethod("wanda", pattern=PATTERN)
    )
    assert all(len(report) == 7 and all(0 < e < 1 for e in report.values()) for report in reports)
    assert sj.count_masks(masks[1]).density == 0.5
    for i, block in enumerate(blocks):
        model.set_block(i, block)
    kernel = model.blocks.attention.q_proj.kernel[...]
    assert float(jnp.mean(kernel != 0)) == 0.5


def test_errors(unchecked):
    method = weights.PruneMethod(pattern=PATTERN)
    with pytest.raises(ValueError, match="there are no calibration samples"):
        weights.prune_sequential([Block(0)], data()[:0], method=method)
    with pytest.raises(ValueError, match="block 0: the inputs of 'first/kernel' are not finite"):
        weights.prune_sequential([Block(0)], data().at[0, 0, 0].set(jnp.nan), method=method)
    with pytest.raises(ValueError, match="name is 'obs'; allowed are 'magnitude' and 'wanda'"):
        weights.PruneMethod("obs", sparsity=0.5)
    with pytest.raises(ValueError, match="exactly one of sparsity and pattern"):
        weights.PruneMethod()
