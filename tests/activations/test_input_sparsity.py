"""Whole models with sparsified inputs: layers, stacks, decoding that skips, calibration."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from sparsejax.activations import input_sparsity as si
from sparsejax.activations import wina
from sparsejax.core.selection import named_leaves
from sparsejax.models import Llama, generate, llama_config, load_hf, save_hf

RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.integers(0, 128, (2, 12)))
Q, GATE, DOWN = "attention/q_proj", "ffn/gate_proj", "ffn/down_proj"


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


class Stack(nnx.Module):
    """Layers run by a scan, and a head."""

    def __init__(self, rngs):
        stack = nnx.vmap(lambda rngs: nnx.Linear(24, 24, rngs=rngs))
        self.blocks = nnx.split_rngs(splits=3)(stack)(rngs)
        self.head = nnx.Linear(24, 10, rngs=rngs)

    def __call__(self, x):
        graph, state = nnx.split(self.blocks)
        body = jax.checkpoint(lambda x, s: (jnp.tanh(nnx.merge(graph, s)(x)), None))
        return self.head(jax.lax.scan(body, x, state)[0])


def by_hand(model, x, sparse):
    """The stack layer by layer; `sparse(i, x, kernel)` is a product."""
    for i, (w, b) in enumerate(zip(model.blocks.kernel[...], model.blocks.bias[...])):
        x = jnp.tanh(sparse(i, x, w) + b)
    return model.head(x)


def norms(kernel):
    return wina.column_norms(kernel, where=lambda path, leaf: True)


@functools.partial(jax.jit, static_argnums=0)
def run(graph, state, *inputs):
    return nnx.merge(graph, state)(*inputs)


def call(model, *inputs):
    return run(*nnx.split(model), *inputs)


@pytest.fixture(scope="module")
def stack():
    return Stack(nnx.Rngs(0))


@pytest.fixture(scope="module")
def llama():
    return Llama(llama_config("laptop"), rngs=nnx.Rngs(0))


# whole models


def test_every_stacked_layer_has_its_own_sparsity(stack):
    x = normal(4, 6, 24)
    shares = [0.0, 0.5, 0.75]
    for criterion in ("wina", "teal"):

        def product(i, x, w, criterion=criterion):
            c = norms(w) if criterion == "wina" else jnp.ones(())
            return wina.sparse_linear(x, w, c, shares[i])

        sparse = si.sparse_inputs(stack, {"blocks": shares}, criterion=criterion)
        np.testing.assert_allclose(
            call(sparse, x), by_hand(stack, x, product), rtol=1e-5, atol=1e-5
        )
    limits = np.asarray([0.1, 0.5, 1.0])

    def above(i, x, w):
        mask = wina.wina_mask(x, norms(w), by="threshold", threshold=limits[i])
        mask |= ~wina.prefill_positions(6, fraction=0.5)[:, None]
        return jnp.where(mask, x, 0) @ w

    sparse = si.sparse_inputs(stack, thresholds=limits, fraction=0.5)
    np.testing.assert_allclose(call(sparse, x), by_hand(stack, x, above), rtol=1e-5, atol=1e-5)


def test_a_language_model(llama):
    sparse = si.sparse_inputs(llama, 0.5)
    wanted = call(llama, TOKENS)
    # the same parameters at the same paths, with settings beside them; the head is dense
    inner, before = (dict(named_leaves(nnx.state(m))) for m in (sparse.model, llama))
    assert before.keys() < inner.keys()
    added = {path.rsplit("/", 2)[0] for path in inner.keys() - before.keys()}
    assert added == {path[: -len("/kernel")] for path in before if "proj" in path}
    for path, leaf in before.items():
        assert inner[path] is leaf
    assert float(jnp.abs(call(sparse, TOKENS) - wanted).max()) > 0.1
    np.testing.assert_array_equal(call(llama, TOKENS), wanted)
    dense = si.sparse_inputs(llama, 0)
    np.testing.assert_allclose(call(dense, TOKENS), wanted, rtol=1e-5, atol=1e-5)
    # the first position of 12 is dense at a fraction of 0.99, and sees itself alone
    prompt = si.sparse_inputs(llama, 0.5, fraction=0.99)
    np.testing.assert_allclose(call(prompt, TOKENS)[:, 0], wanted[:, 0], rtol=1e-5, atol=1e-5)


def test_each_projection_has_its_setting(llama):
    shares = {GATE: [0.25, 0.5], "attention": 0.5, "_proj": 0.0}
    sparse = si.sparse_inputs(llama, shares, norms="(k|gate)_proj")
    settings = dict(named_leaves(nnx.state(sparse.model, si.InputSetting)))
    for name, kept in ((GATE, [72, 48]), (Q, [48, 48]), (DOWN, [256, 256])):
        np.testing.assert_array_equal(settings[f"blocks/{name}/dot_general/limit"], kept)
    for name in (Q, GATE, DOWN, "attention/k_proj", "attention/o_proj"):
        c = settings[f"blocks/{name}/dot_general/c"]
        if name in (GATE, "attention/k_proj"):
            kernel = dict(named_leaves(nnx.state(llama)))[f"blocks/{name}/kernel"]
            np.testing.assert_allclose(c, np.linalg.norm(kernel, axis=-1), rtol=1e-6)
        else:
            np.testing.assert_array_equal(c, np.ones(2))
    only = si.sparse_inputs(llama, 0.5, where="head")
    assert len(dict(named_leaves(nnx.state(only.model, si.InputSetting)))) == 3


# decoding


@pytest.mark.parametrize("setting", [{"sparsity": 0.6}, {"thresholds": 0.5}], ids=str)
def test_one_token_reads_the_kept_rows_alone(stack, setting):
    x = normal(1, 24).at[:, 4].set(0.0)
    sparse = si.sparse_inputs(stack, **setting, criterion="teal", where="blocks")
    wanted = call(sparse.model, x)
    np.testing.assert_allclose(call(sparse, x), wanted, rtol=1e-5, atol=1e-5)
    masked = si.SparseInputs(sparse.model, gather=False)
    np.testing.assert_array_equal(call(masked, x), wanted)
    # what multiplies the dropped input of the first layer is not read
    poisoned = nnx.clone(sparse)
    kernel = poisoned.model.blocks.kernel
    kernel[...] = kernel[...].at[0, 4].set(jnp.nan)
    np.testing.assert_allclose(call(poisoned, x), wanted, rtol=1e-5, atol=1e-5)
    assert np.isnan(call(poisoned.model, x)).all()


def test_the_kernels_of_a_stack_are_not_copied(stack):
    sparse = si.sparse_inputs(stack, 0.6)
    x = normal(1, 24)
    text = {
        gather: run.lower(*nnx.split(si.SparseInputs(sparse.model, gather=gather)), x)
        .compile()
        .as_text()
        for gather in (True, False)
    }
    sliced = "f32[1,24,24]"  # one layer of [3, 24, 24]
    assert sliced in text[False]
    assert sliced not in text[True]


def test_generation_from_a_checkpoint(llama, tmp_path):
    save_hf(tmp_path / "model", llama)
    sparse = si.sparse_inputs(load_hf(tmp_path / "model"), 0.5)
    prompt = TOKENS[:1, :4]
    text = generate(sparse, prompt, max_new_tokens=5)
    # token by token, as the whole sequence at once
    with_text = call(sparse, text)
    np.testing.assert_array_equal(jnp.argmax(with_text[:, 3:-1], axis=-1), text[:, 4:])


def test_narrow_activations_and_logits_that_are_wider():
    layer = nnx.Linear(
        16,
        8,
        use_bias=False,
        dtype=jnp.bfloat16,
        preferred_element_type=jnp.float32,
        rngs=nnx.Rngs(0),
    )
    sparse = si.sparse_inputs(layer, 0.5)
    x = normal(16)
    for got in (call(sparse, x), call(sparse.model, x)):
        assert got.dtype == jnp.float32
        wanted = wina.sparse_linear(x, layer.kernel[...], norms(layer.kernel[...]), 0.5)
        assert np.linalg.norm(got - wanted) < 0.02 * np.linalg.norm(wanted)


# composition


def test_one_trace_for_all_settings_gradients_and_seeds(stack):
    x = normal(5, 24)
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def step(graph, params, settings, x):
        traces.append(x.shape)

        def loss(params):
            return jnp.sum(nnx.merge(graph, params, settings)(x) ** 2)

        return jax.grad(loss)(params)

    for shares in ([0.5, 0.6, 0.7], [0.9, 0.5, 0.5]):
        sparse = si.sparse_inputs(stack, {"blocks": shares})
        graph, params, settings = nnx.split(sparse, nnx.Param, ...)
        grads = step(graph, params, settings, x)
    assert len(traces) == 1

    def product(i, x, w):
        return wina.sparse_linear(x, w, norms(w), shares[i])

    def by_hand_loss(kernel):
        model = nnx.clone(stack)
        model.blocks.kernel[...] = kernel
        return jnp.sum(by_hand(model, x, product) ** 2)

    wanted = jax.jit(jax.grad(by_hand_loss))(stack.blocks.kernel[...])
    found = grads["model"]["blocks"]["kernel"][...]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    # one token, through the rows alone
    both = [
        step(nnx.graphdef(m), params, settings, x[:1])["model"]["blocks"]["kernel"][...]
        for m in (sparse, si.SparseInputs(sparse.model, gather=False))
    ]
    np.testing.assert_allclose(both[0], both[1], rtol=1e-4, atol=1e-4)

    two = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), nnx.state(sparse))
    seeds = jax.jit(jax.vmap(lambda state: nnx.merge(graph, state)(x[:1])))(two)
    np.testing.assert_allclose(seeds[1], call(sparse, x[:1]), rtol=1e-5, atol=1e-5)


def test_eight_devices(stack, mesh):
    x = normal(8, 4, 24)
    sparse = si.sparse_inputs(stack, 0.6)
    graph, state = nnx.split(sparse)

    def place(path, leaf):
        spec = PartitionSpec(None, None, "model") if leaf.ndim == 3 else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    spread = jax.tree_util.tree_map_with_path(place, state)
    batch = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    np.testing.assert_allclose(run(graph, spread, batch), call(sparse, x), rtol=1e-5, atol=1e-5)
    one = x[:1, :1]
    np.testing.assert_allclose(run(graph, spread, one), call(sparse, one), rtol=1e-5, atol=1e-5)
    # what is made from spread parameters is spread
    inside = si.sparse_inputs(nnx.merge(graph, spread).model, 0.5, where="head")
    assert inside.model.blocks.kernel[...].sharding.spec == PartitionSpec(None, None, "model")


# calibration


@functools.partial(jax.jit, static_argnums=(0, 3))
def histograms(graph, state, x, criterion):
    return si.input_histograms(nnx.merge(graph, state), x, criterion=criterion, where="blocks|head")


def scores_by_hand(model, x, criterion):
    seen = []

    def product(i, x, w):
        seen.append(x if criterion == "teal" else jnp.abs(x) * norms(w))
        return x @ w

    by_hand(model, x, product)
    return [np.abs(np.asarray(scores)).astype(np.float16).ravel() for scores in seen]


@pytest.mark.parametrize("criterion", ["wina", "teal"])
def test_histograms_are_those_of_all_scores(stack, criterion):
    batches = [normal(3, 5, 24), normal(3, 5, 24).at[0].set(0.0)]
    graph, state = nnx.split(stack)
    counts = [histograms(graph, state, x, criterion) for x in batches]
    total = jax.tree.map(jnp.add, *counts)
    assert set(total) == {"blocks/kernel", "head/kernel"}
    assert total["blocks/kernel"].shape == (3, 31745)
    np.testing.assert_array_equal(total["blocks/kernel"].sum(-1), 3 * [2 * 15 * 24])
    shares = {"blocks": [0.3, 0.0, 0.8], "head": 0.5}
    thresholds = si.input_thresholds(total, shares)
    by_batch = [scores_by_hand(stack, x, criterion) for x in batches]
    for i, share in enumerate(shares["blocks"]):
        scores = np.concatenate([by_layer[i] for by_layer in by_batch])
        # rounding of a layer's input may move a score to the next float16
        wanted = wina.empirical_icdf(scores, share) if share else 0.0
        np.testing.assert_allclose(thresholds["blocks/kernel"][i], wanted, rtol=2e-3)
    np.testing.assert_array_equal(np.asarray(total["blocks/kernel"])[0], _counts(by_batch, 0))
    # and they drop what they should
    sparse = si.sparse_inputs(
        stack, thresholds=thresholds, criterion=criterion, where="blocks|head"
    )
    assert np.isfinite(call(sparse, batches[0])).all()


def _counts(by_batch, i):
    bits = np.concatenate([by_layer[i] for by_layer in by_batch]).view(np.uint16)
    return np.bincount(bits, minlength=31745)


@pytest.mark.vectors
def test_calibration_gives_the_published_thresholds(reference):
    for case in reference("wina").cases("icdf"):
        x = jnp.asarray(case["criterion"])
        layer = nnx.Linear(x.shape[-1], 2, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        counts = si.input_histograms(layer, x, criterion="teal")
        for q, threshold in zip(case["q"], case["threshold"]):
            found = si.input_thresholds(counts, float(q))["kernel"]
            np.testing.assert_allclose(found, threshold, rtol=1e-6)
        case.ignore("mask_at_q1", reason="compared in test_wina.py")


def test_calibration_of_a_language_model_reaches_its_sparsity(llama):
    counts = jax.jit(lambda s, t: si.input_histograms(nnx.merge(nnx.graphdef(llama), s), t))(
        nnx.state(llama), TOKENS
    )
    assert {path.split("/")[-2] for path in counts} == {
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    }
    for path, n in counts.items():
        width = 256 if "down" in path else 96
        np.testing.assert_array_equal(n.sum(-1), 2 * [24 * width])
    # the inputs of the first projections do not depend on what else is sparse
    thresholds = si.input_thresholds(counts, 0.5)
    path = f"blocks/{Q}/kernel"
    x = llama.block(0).attention_norm(llama.embedded(TOKENS))
    mask = wina.wina_mask(
        x,
        norms(llama.blocks.attention.q_proj.kernel[...][0]),
        by="threshold",
        threshold=float(thresholds[path][0]),
    )
    assert abs(float(mask.mean()) - 0.5) < 2e-3
    sparse = si.sparse_inputs(llama, thresholds=thresholds)
    assert np.isfinite(call(sparse, TOKENS)).all()


def test_extreme_scores_have_their_bins(unchecked):
    layer = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    count = functools.partial(si.input_histograms, layer, criterion="teal")
    seen = np.flatnonzero(count(jnp.asarray([0.0, 3e-8, 1e6, -6e-8]))["kernel"])
    # zero and what rounds to it, the smallest number, and the largest
    np.testing.assert_array_equal(seen, [0, 1, 0x7BFF])
    for bad in (jnp.inf, jnp.nan):
        counts = count(jnp.asarray([0.0, 1.0, bad, 2.0]))
        with pytest.raises(ValueError, match="the inputs of 'kernel' are not finite"):
            si.input_thresholds(counts, 0.5)


# errors


class Other(nnx.Module):
    """A kernel that is not in an nnx.Linear, and an output without floats."""

    def __init__(self, rngs):
        self.kernel = nnx.Param(jnp.ones((4, 4)))
        self.linear = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return jnp.argmax(self.linear(x), axis=-1)


def test_errors(stack, unchecked):
    for settings, message in (
        ({}, "exactly one of sparsity and thresholds is needed, neither given"),
        ({"sparsity": 0.5, "thresholds": 0.1}, "is needed, both given"),
        ({"sparsity": 1.5}, r"sparsity is 1.5; it must be in \[0, 1\]"),
        ({"sparsity": [0.1, 0.2]}, r"sparsity has shape \(2,\) for 'blocks/kernel'; .* or \(3,\)"),
        ({"sparsity": {"x": 0.1}}, "sparsity has nothing for layer 'blocks/kernel'; it has x"),
        ({"sparsity": {"blocks": 0.1, "x": 0.2}}, "sparsity has x, which is no chosen layer"),
        ({"thresholds": -1.0}, "thresholds has -1.0 for 'blocks/kernel'; at least 0"),
        ({"thresholds": float("nan")}, "thresholds has nan for 'blocks/kernel'"),
        ({"sparsity": 0.5, "criterion": "x"}, "criterion is 'x'; allowed are 'wina' and 'teal'"),
        (
            {"sparsity": 0.5, "criterion": "teal", "norms": "k"},
            "norms is 'k'; the criterion 'teal'",
        ),
        ({"sparsity": 0.5, "norms": "k_proj"}, "where matches no leaf: 'k_proj'"),
        ({"sparsity": 0.5, "where": "nothing"}, "where matches no leaf: 'nothing'"),
        ({"sparsity": 0.5, "where": "bias"}, "where matches no leaf: 'bias'; .* are blocks/kernel"),
        ({"sparsity": 0.5, "fraction": 0.0}, r"fraction is 0.0; it must be in \(0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            si.sparse_inputs(stack, **settings)
    with pytest.raises(
        ValueError, match=r"where matches no leaf: '\^kernel'; .* are linear/kernel"
    ):
        si.sparse_inputs(Other(nnx.Rngs(0)), 0.5, where="^kernel")
    with pytest.raises(ValueError, match="the model's output holds no floating-point numbers"):
        si.input_histograms(Other(nnx.Rngs(0)), jnp.ones(4))
    with pytest.raises(ValueError, match="sparsity is 2"):
        si.input_thresholds({"kernel": jnp.ones(31745).at[-1].set(0)}, 2)
    sparse = si.sparse_inputs(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), 0.5).model
    with pytest.raises(
        ValueError, match=r"dimension_numbers is .* the last axis of x is contracted"
    ):
        sparse.dot_general(jnp.ones((4, 4)), jnp.ones((4, 4)), (((0,), (0,)), ((), ())))
