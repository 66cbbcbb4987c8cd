"""Pruning block by block: inputs from the pruned prefix, masks, reports."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparsejax as sj
from sparsejax import weights
from sparsejax.core.scores import wanda_score
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


def by_hand(w, x, method):
    """What a layer becomes, and its mask."""
    stats, gram = weights.activation_stats(x), weights.hessian(x).value
    amount = {"sparsity": method.sparsity, "pattern": method.pattern}
    scores = {
        "wanda": wanda_score(w, jnp.sqrt(stats.sum_sq)),
        "sparsegpt": weights.sparsegpt_score(w, gram, damp=method.damp),
        "magnitude": jnp.abs(w),
    }
    if method.name == "sparsegpt" and method.update_weights:
        return weights.sparsegpt(w, gram, **amount, block=method.block, damp=method.damp)
    if method.name == "magnitude":
        mask = weights.magnitude_mask(w, **amount)
    elif method.name == "wanda":
        mask = weights.wanda_mask(w, stats, **amount)
    elif method.name == "sparsegpt":  # no cycles: the ranked score alone
        mask = weights.dsnot_mask(w, stats, scores["sparsegpt"], **amount, max_cycles=0)
    else:
        guarded = stats._replace(var=stats.var + 1e-6)
        mask = weights.dsnot_mask(
            w, guarded, scores[method.initial], **amount, max_cycles=method.max_cycles
        )
    return jnp.where(mask, w, 0.0), mask


HALF = {"pattern": PATTERN}
METHODS = [
    weights.PruneMethod("magnitude", **HALF),
    weights.PruneMethod("magnitude", sparsity=0.6),
    weights.PruneMethod("wanda", **HALF),
    weights.PruneMethod("wanda", sparsity=0.6),
    weights.PruneMethod("sparsegpt", **HALF, block=4, damp=0.1),
    weights.PruneMethod("sparsegpt", **HALF, update_weights=False),
    weights.PruneMethod("dsnot", sparsity=0.6, max_cycles=5),
    weights.PruneMethod("dsnot", "sparsegpt", **HALF, max_cycles=5),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{m.sparsity or 'nm'}")
def test_equals_pruning_by_hand(method):
    blocks, x = [Block(1), Block(2)], data()
    dense = [nnx.clone(block) for block in blocks]
    masks, reports = weights.prune_sequential(blocks, x, method=method, chunk=4)
    for block, original, mask, report in zip(blocks, dense, masks, reports):
        hidden = jnp.tanh(original.first(x))  # the block's own layers are still dense here
        for layer, before, inputs, kept, lost in (
            (block.first, original.first, x, mask["first"], report["first/kernel"]),
            (block.rest[0], original.rest[0], hidden, mask["rest"][0], report["rest/0/kernel"]),
        ):
            kernel, pruned = before.kernel[...], layer.kernel[...]
            wanted, wanted_mask = by_hand(kernel, inputs, method)
            np.testing.assert_array_equal(kept["kernel"][...], wanted_mask)
            np.testing.assert_allclose(pruned, wanted, atol=1e-4)
            assert not np.asarray(pruned)[~np.asarray(wanted_mask)].any()
            assert kept["bias"][...].ndim == 0
            error = inputs @ (kernel - pruned)
            share = float(jnp.sum(error**2) / jnp.sum((inputs @ kernel) ** 2))
            assert lost == pytest.approx(share, rel=1e-4)
        x = block(x)  # the next block sees the pruned prefix


class Named(nnx.Module):
    """Layers with the names that DSnoT may skip."""

    def __init__(self, key):
        rngs = nnx.Rngs(key)
        self.attn = nnx.Linear(8, 8, rngs=rngs)
        self.mlp = nnx.Linear(8, 8, rngs=rngs)
        self.attention = nnx.Linear(8, 8, rngs=rngs)
        self.up_proj = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.up_proj(self.attention(jnp.tanh(self.mlp(self.attn(x)))))


def test_skipped_layers_keep_the_initial_mask():
    x = data() + 1.0
    found = {}
    for name, skip, cycles in (
        ("initial", None, 0), ("all", None, 4), ("mlp", "mlp", 4), ("self_attn", "self_attn", 4)
    ):  # fmt: skip
        method = weights.PruneMethod("dsnot", "magnitude", **HALF, max_cycles=cycles, threshold=0.0)
        masks, _ = weights.prune_sequential([Named(0)], x, method=method, skip=skip)
        found[name] = {n: np.asarray(masks[0][n]["kernel"][...]) for n in ("attn", "mlp",
                       "attention", "up_proj")}  # fmt: skip
    for layer in ("attn", "mlp", "attention", "up_proj"):
        kind = "self_attn" if layer in ("attn", "attention") else "mlp"
        assert (found["all"][layer] != found["initial"][layer]).any()
        for skip in ("mlp", "self_attn"):
            wanted = found["initial" if skip == kind else "all"][layer]
            np.testing.assert_array_equal(found[skip][layer], wanted)


def test_chunks_of_any_size_collect_the_same():
    method = weights.PruneMethod("sparsegpt", **HALF)
    results = []
    for chunk in (6, 4):  # the last of which is smaller
        block = Block(1)
        _, report = weights.prune_sequential([block], data(), method=method, chunk=chunk)
        results.append((block.first.kernel[...], report[0]["rest/0/kernel"]))
    np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-4)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4)


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
    for options, message in (
        ({"name": "obs"}, "name is 'obs'; allowed are magnitude, wanda, sparsegpt, dsnot"),
        ({"initial": "dsnot"}, "initial is 'dsnot'; allowed are magnitude, wanda, sparsegpt"),
        ({"pattern": None}, "exactly one of sparsity and pattern is needed, neither given"),
        ({"sparsity": 0.5}, "exactly one of sparsity and pattern is needed, both given"),
        ({"pattern": None, "sparsity": 1.5}, r"sparsity is 1.5; it must be in \[0, 1\)"),
        ({"block": 0}, "block is 0; it must be at least 1"),
        ({"name": "sparsegpt", "block": 6}, "block is 6, not a multiple of m = 4"),
        ({"damp": -1.0}, "damp is -1.0; it must not be negative"),
        ({"max_cycles": -1}, "max_cycles is -1; it must not be negative"),
        ({"threshold": -0.1}, "threshold is -0.1; it must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.PruneMethod(**({"pattern": PATTERN} | options))
    with pytest.raises(ValueError, match="chunk is 0; it must be at least 1"):
        weights.prune_sequential([Block(0)], data(), method=method, chunk=0)
    with pytest.raises(ValueError, match="skip is 'mlp' and the method wanda: DSnoT alone skips"):
        weights.prune_sequential([Block(0)], data(), method=method, skip="mlp")
    swapped = weights.PruneMethod("dsnot", pattern=PATTERN)
    with pytest.raises(ValueError, match="skip is 'norm'; allowed are None, mlp, self_attn"):
        weights.prune_sequential([Block(0)], data(), method=swapped, skip="norm")
    odd = weights.PruneMethod("sparsegpt", pattern=sj.NM(2, 5), block=5)
    with pytest.raises(ValueError, match="block 0: 'first/kernel': w has 8 inputs, not a multiple"):
        weights.prune_sequential([Block(0)], data(), method=odd)
    undamped = weights.PruneMethod("sparsegpt", sparsity=0.5, damp=0.0)
    few = data()[:1, :2]  # two samples of eight inputs
    with pytest.raises(FloatingPointError, match="block 0: 'first/kernel': hessian has no Chole"):
        weights.prune_sequential([Block(0)], few, method=undamped)


def test_moments_of_two_widths_do_not_merge():
    wide, narrow = weights.hessian(data()), weights.hessian(data()[..., :4])
    both = weights.merge_hessian(weights.hessian(data()[:2]), weights.hessian(data()[2:]))
    np.testing.assert_allclose(both.value, wide.value, rtol=1e-4, atol=1e-2)
    assert both.n_seq == 6
    assert weights.hessian(data().astype(jnp.bfloat16)).value.dtype == jnp.float32
    with pytest.raises(ValueError, match="a has 8 inputs, b has 4"):
        weights.merge_hessian(wide, narrow)
    with pytest.raises(ValueError, match="there are no calibration samples"):
        weights.hessian(data()[:0])
