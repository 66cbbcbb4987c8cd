"""The CoreMatching experiment: results, resuming, core neurons, a loaded model, bad input."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.corematching import cells, neurons, overlap, report
from experiments.corematching.__main__ import EXPERIMENT
from experiments.corematching.config import PRESETS, timed_model, vision_model
from experiments.harness import cli
from experiments.harness.config import ExperimentError
from experiments.harness.run import execute
from sparsejax.activations import core_neurons
from sparsejax.models import Llama, LlamaConfig, init_cache, rope_tables
from sparsejax.models.vision_language import VisionLanguage

TEST = PRESETS["test"]
SMALL = LlamaConfig(
    vocab_size=40, d_model=16, n_layers=3, n_heads=2, d_ff=24, max_seq_len=32, n_kv_heads=1
)


@pytest.fixture(scope="module", autouse=True)
def datasets(tmp_path_factory):
    """Datasets of this module, away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEJAX_DATA", str(tmp_path_factory.mktemp("datasets")))
        yield


def only_run(out):
    return max(p for p in (out / "corematching").iterdir() if (p / "config.json").is_file())


def test_the_whole_experiment_and_its_resumption(tmp_path, capsys):
    result = execute(EXPERIMENT, dataclasses.replace(TEST, out=str(tmp_path)))
    folder = only_run(tmp_path)
    printed = capsys.readouterr().out
    for piece in ("Asked cell among the kept", "core by |a|", "core neurons", "claim: behind"):
        assert piece in printed
    for name in ("accuracy-layer0", "recall-layer0", "overlap", "neurons"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
    summary = json.loads((folder / "summary.json").read_text())
    metrics = summary["metrics"]
    tokens = metrics["tokens"]["layer0"]
    assert len(tokens) == 1 + 4 * 3 * 3
    for rule in ("4", "8"):
        for name in ("token", "core_neurons", "attention", "random"):
            assert tokens[f"{name}-{rule}-kept"] == [int(rule)] * 2
    assert tokens["random-elbow-kept"] == tokens["token-elbow-kept"]
    assert set(metrics["neurons"]) == {"dense", "0.4", "0.8"}
    recall, answers = result.claims
    chance = np.mean(tokens["token-elbow-kept"]) / 16
    assert recall.holds == (np.mean(tokens["token-elbow-recall"]) >= 2 * chance)
    assert answers.holds == all(
        np.mean(tokens[f"token-{rule}-accuracy"]) > np.mean(tokens[f"random-{rule}-accuracy"])
        for rule in ("elbow", "4", "8")
    )

    (folder / "summary.json").unlink()
    for name in ("layer0", "neurons-0.4"):
        (folder / "arms" / f"{name}.json").unlink()
    execute(EXPERIMENT, cli.parse(EXPERIMENT, ["--resume", str(folder)]))
    again = json.loads((folder / "summary.json").read_text())
    assert again["metrics"] == metrics
    assert again["claims"] == summary["claims"]


# decoders of marked digits


def test_every_sample_asks_for_the_digit_whose_marker_the_question_has():
    x, y = cells.split_digits(3)[0]
    assert len(x) == 1297
    assert len(cells.split_digits(3)[1][0]) == 500
    drawn = cells.draw_cells(np.random.default_rng(0), 50, x, y, TEST)
    rows = np.arange(50)
    for markers, asked in zip(drawn.markers, drawn.asked):
        assert len(set(markers[:-1])) == 16
        assert markers[-1] == markers[asked]
    pixels = {row.tobytes(): label for row, label in zip(x, y)}
    shown = drawn.patches[rows, drawn.asked]
    assert [pixels[one.tobytes()] for one in shown] == drawn.labels.tolist()
    batches, again = cells.CellBatches(TEST, 0), cells.CellBatches(TEST, 0)
    first, second = next(batches), next(batches)
    assert not np.array_equal(first.markers, second.markers)
    again.set_state({"number": 1})
    np.testing.assert_array_equal(next(again).patches, second.patches)


def test_the_decoder_is_that_of_the_page():
    config = vision_model(PRESETS["laptop"])
    params = nnx.split(VisionLanguage(config, rngs=nnx.Rngs(0)))[1]
    assert (config.rotary, config.image_attention, config.blind_layers) == (False, "full", 1)
    assert jnp.std(params["markers"]["embedding"][...]) == pytest.approx(0.5, rel=0.05)
    for name, inputs in (("gate", 48), ("up", 48), ("down", 192)):
        matrix = params["blocks"][2]["ffn"][name][...]
        assert matrix.shape == (192, 48)
        assert jnp.std(matrix) == pytest.approx(inputs**-0.5, rel=0.05)
    assert params["patch_embed"]["kernel"].shape == (64, 48)


def test_tokens_are_kept_by_the_rule_and_scored_by_their_reference():
    scores = jnp.asarray([[9.0, 1, 8, 2, 1], [1, 1, 1, 1, 1]])
    config = dataclasses.replace(TEST, vision_tokens=5, keep=("2", "elbow", "3"))
    keep = jax.jit(overlap.kept_tokens, static_argnums=1)
    top, elbow, three = keep(scores, config)
    np.testing.assert_array_equal(top, [[1, 0, 1, 0, 0], [1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(elbow, [[1, 0, 1, 0, 0], [0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(three, [[1, 0, 1, 1, 0], [1, 1, 1, 0, 0]])
    every = dataclasses.replace(config, on_flat="all", keep=("elbow",))
    assert keep(scores, every)[0, 1].all()

    keys = jax.random.split(jax.random.key(0), 3)
    layer = overlap.Layer(
        jax.random.normal(keys[0], (1, 6, 2, 4)),
        jax.random.normal(keys[1], (1, 6, 2, 4)),
        jnp.zeros((1, 6, 2, 4)),
        jax.random.normal(keys[2], (1, 6, 20)),
    )
    score = jax.jit(overlap.image_scores, static_argnums=1)
    found = dict(zip(config.reference, score(layer, config)))
    active = np.asarray(layer.a[0]) > 0
    np.testing.assert_array_equal(found["token"][0], (active[:5] & active[5]).sum(1))
    core = np.isin(np.arange(20), core_neurons(layer.a[0], rho=0.2, beta=0.4)[0])
    np.testing.assert_array_equal(found["core_neurons"][0], (active[:5] & core).sum(1))
    asks = np.einsum("hw,mhw->hm", layer.q[0, -1], layer.k[0]) / 2
    weights = np.exp(asks) / np.exp(asks).sum(1, keepdims=True)
    np.testing.assert_allclose(found["attention"][0], weights.mean(0)[:5], rtol=1e-5)


def test_tokens_dropped_behind_the_last_layer_change_no_answer():
    config = dataclasses.replace(TEST, samples=32)
    graph, params = nnx.split(VisionLanguage(vision_model(config), rngs=nnx.Rngs(0)))
    drawn = cells.test_cells(config, 0, 32, cells.MEASURED)
    last = config.layers - 1
    found = overlap.measure(graph, params, drawn, jax.random.key(0), jnp.int32(last), config=config)
    np.testing.assert_array_equal(found["accuracy"], jnp.full(12, found["full"]))
    first = overlap.measure(graph, params, drawn, jax.random.key(0), jnp.int32(0), config=config)
    assert not np.array_equal(first["accuracy"], found["accuracy"])


# core neurons of a language model


def test_masks_follow_the_core_and_compact_decoding_is_masked_decoding():
    model = Llama(SMALL, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 40)
    empty = init_cache(SMALL, 2, 20)
    logits, cache, found = neurons.follow(graph, params, tokens, empty, rho=0.5, betas=(0.5,))

    @jax.jit
    def by_hand(params):
        """Logits, and activations of the first layer."""
        model = nnx.merge(graph, params)
        block, x = model.block(0), model.embedded(tokens)
        rope = rope_tables(SMALL, jnp.arange(12)[None])
        h = block.ffn_norm(x + block.attention(block.attention_norm(x), rope))
        return model(tokens), jax.nn.silu(block.ffn.gate_proj(h)) * block.ffn.up_proj(h)

    wanted, a = by_hand(params)
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-5)
    assert cache.length == 12
    own = found["own-0.5"]
    assert own.shape == (3, 2, 24)
    np.testing.assert_array_equal(own.sum(-1), 12)
    assert not np.array_equal(own, found["magnitude-0.5"])
    for sample in range(2):
        core = core_neurons(a[sample], rho=0.5, beta=0.5)[0]
        np.testing.assert_array_equal(np.flatnonzero(own[0, sample]), core)

    # one sample: layers 1 and 2 with their core alone
    alone = jax.tree.map(lambda leaf: leaf[:, :1] if leaf.ndim else leaf, cache)
    kept = own[:, :1].at[0].set(True)
    later = jax.random.randint(jax.random.key(2), (1, 3), 0, 40)
    masked = neurons.follow(graph, params, later, alone, kept)[0]
    listed = np.stack([np.flatnonzero(mask) for mask in own[:, 0]])
    small = neurons.compact_model(model, listed, (1, 3))
    assert small.blocks[0].ffn.up_proj.kernel.shape == (16, 24)
    assert small.blocks[1].ffn.up_proj.kernel.shape == (16, 12)
    small_graph, small_params = nnx.split(small)

    @jax.jit
    def decode(params, tokens):
        return nnx.merge(small_graph, params).decode(tokens, alone)[0]

    compact = decode(small_params, later)
    np.testing.assert_allclose(compact, masked, rtol=1e-4, atol=1e-5)
    dense = neurons.follow(graph, params, later, alone)[0]
    assert jnp.abs(dense - masked).max() > 1e-3

    nats = neurons.surprise(graph, params, later, alone, kept)
    log_p = jax.nn.log_softmax(masked[0, :-1])
    wanted = -np.mean([log_p[i, later[0, i + 1]] for i in range(2)])
    assert float(nats[0]) == pytest.approx(wanted, rel=1e-4)
    count = later.shape[1]
    written = neurons.continue_greedily(small_graph, small_params, later[:, :1], alone, count=count)
    fed = jnp.concatenate([later[:, :1], written[:, :-1]], axis=1)
    np.testing.assert_array_equal(written, jnp.argmax(decode(small_params, fed), axis=-1))


def test_draws_share_no_window_and_each_spans_the_text():
    config = dataclasses.replace(TEST, prompt=3, continuation=2, prompts=4)
    windows = neurons.prompt_windows(config, np.arange(6 * 9))
    assert windows.shape == (2, 4, 6)
    assert len(np.unique(windows[..., 0])) == 8
    assert windows[0, 0, 0] == 0
    assert windows[1, -1, 0] == 48
    assert windows[0, -1, 0] > windows[1, -2, 0]
    with pytest.raises(ExperimentError, match="has 5 windows of 6 tokens, 2 draws need 8"):
        neurons.prompt_windows(config, np.arange(6 * 5))
    assert [neurons.prompts_at_once(n) for n in (1, 6, 7, 8, 9, 24)] == [1, 6, 7, 8, 3, 8]


def test_a_loaded_model_is_measured_and_timed(tmp_path, capsys, monkeypatch):
    from experiments.corematching import __main__ as room
    from experiments.harness.language import LanguageModel

    tokens = jax.random.randint(jax.random.key(1), (4 * 17,), 0, 40)
    text = type("Text", (), {"validation": np.asarray(tokens)})()
    tokenizer = type("Tokenizer", (), {"name": "tiny"})()
    graph, params = nnx.split(Llama(SMALL, rngs=nnx.Rngs(0)))
    model = LanguageModel(SMALL, graph, params, text, None, tokenizer)
    monkeypatch.setattr(room, "pretrained_model", lambda config, mesh: model)
    config = dataclasses.replace(
        PRESETS["pretrained"], out=str(tmp_path), seeds=2, prompts=2, prompt=12, continuation=4,
        beta=(0.25, 1.0), core_layers="1:3", decode_tokens=2, rounds=1,
    )  # fmt: skip
    result = execute(EXPERIMENT, config)
    assert "tiny" in capsys.readouterr().out
    found = result.metrics["neurons"]
    for kind in neurons.KINDS:  # all neurons are the dense model
        np.testing.assert_allclose(found["1"][kind], found["dense"]["dense"], rtol=1e-5)
        assert not np.allclose(found["0.25"][kind], found["dense"]["dense"], rtol=1e-5)
    assert set(result.metrics["speed"]) == {"dense", "0.25", "1"}
    for name in ("neurons", "speed"):
        assert (only_run(tmp_path) / f"{name}.png").stat().st_size > 10_000
    assert not result.claims[0].holds  # equal at 1
    assert "tokens/s" in result.claims[2].ours


def test_claims_are_computed_from_the_figures():
    config = PRESETS["laptop"]

    def layer(recall, ours, theirs):
        values = {"token-elbow-recall": [recall] * 3, "token-elbow-kept": [4.0] * 3}
        for rule in ("elbow", "4", "8"):
            values[f"token-{rule}-accuracy"] = [ours] * 3
            values[f"random-{rule}-accuracy"] = [theirs] * 3
        return values

    good = {0: layer(0.1, 0.6, 0.5), 1: layer(0.5, 0.1, 0.9)}
    assert [claim.holds for claim in report.token_claims(config, good)] == [True, True]
    bad = {0: layer(0.9, 0.5, 0.5), 1: layer(0.49, 0.9, 0.1)}
    assert [claim.holds for claim in report.token_claims(config, bad)] == [False, False]

    def losses(own, other, random):
        return {"own": [own] * 3, "other": [other] * 3, "random": [random] * 3}

    mixed = {0: layer(0.9, 0.5, 0.5), 1: layer(0.9, 0.5, 0.5)}
    for rule in ("elbow", "4", "8"):
        mixed[0][f"token-{rule}-accuracy"] = [0.4, 0.6, 0.6]
    claim = report.token_claims(config, mixed)[1]
    assert claim.holds
    assert "more at each with 2 of 6 decoders" in claim.ours

    found = {"dense": {"dense": [1.0] * 3}, "0.2": losses(2, 3, 4), "0.4": losses(1, 1, 2)}
    times = {name: {"ms": ms, "ratio": ms / 10} for name, ms in
             (("dense", 10.0), ("0.2", 5.0), ("0.4", 8.0))}  # fmt: skip
    claims = report.neuron_claims(config, found, times)
    assert [claim.holds for claim in claims] == [True, False, True]
    assert claims[0].ours == f"{math.exp(2):.4g}, {math.exp(1):.4g}"
    assert claims[2].ours == "200.0, 125.0 tokens/s"
    assert len(report.neuron_claims(config, found, {})) == 2


def test_the_setting_of_the_paper_builds_abstractly(capsys):
    assert execute(EXPERIMENT, PRESETS["paper"]) is None
    printed = capsys.readouterr().out
    for piece in ("6,742,609,920 parameters, 32 layers of width 4096 with 11008 neurons",
                  "one training step traced", "caches of 224 places, 32 of them for what follows",
                  "where dense ones have 672", "it reads 61% of the rows"):  # fmt: skip
        assert piece in printed
    assert timed_model(PRESETS["laptop"]).prefix == 5
    assert PRESETS["paper"].layer_range(32) == (6, 27)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--form", "chat"], "form is 'chat'; it is checked with --preset paper and timed"),
        (["--markers", "8"], "markers is 8; 16 image tokens need as many"),
        (["--reference", "attention"], "token must be among them"),
        (["--reference", "magic"], "reference is 'magic'; known are token, core_neurons, attent"),
        (["--keep", "17"], "keep is '17'; give elbow or numbers from 1 to 16"),
        (["--keep", "knee"], "keep is 'knee'; give elbow or numbers"),
        (["--select-layer", "1"], "select_layer is 1; it must be from 0 to 0"),
        (["--warmup", "20"], "warmup is 20; it must be at least 1 and below vision_steps"),
        (["--vision-learning-rate", "0"], "vision_learning_rate is 0.0; it must be positive"),
        (["--samples", "300"], "samples is 300; it must be a multiple of 256"),
        (["--rho", "0"], "rho, beta and vision_beta must be above 0"),
        (["--beta", "1.5"], "beta is 1.5; it must be in [0, 1]"),
        (["--prompt", "60"], "prompt and continuation have 76 tokens; seq_len allows 64"),
        (["--decode-tokens", "-1"], "decode_tokens is -1; it must be at least 0"),
        (["--core-layers", "3"], "core_layers is '3'; it must be all or FIRST:STOP"),
        (
            ["--core-layers", "1:3"],
            "core_layers is '1:3'; it must be all or FIRST:STOP, with STOP ",
        ),
        (
            ["--capacity", "64"],
            "capacity is 64; it must be more than the 64 tokens of text, which stay",
        ),
        (["--timed", "1", "32", "2", "64"], "timed is (1, 32, 2, 64); it must have 2 layers or"),
        (["--timed", "2", "32", "3", "64"], "n_heads is 3; it must divide d_model, which is 32"),
        (["--heads", "3"], "n_heads is 3; it must divide d_model, which is 16"),
        (["--d", "0"], "d is 0; it must be at least 1"),
        (["--mesh", "data=8"], "mesh and multihost are not for this experiment"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, error_of):
    assert message in error_of(EXPERIMENT, arguments)
