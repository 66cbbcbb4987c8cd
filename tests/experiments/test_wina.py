"""The WINA experiment: digits, a small language model, resuming, the paper's setting, errors."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.harness import cli, digits
from experiments.harness.data import AsciiTokenizer, TokenizedText
from experiments.harness.language import LanguageModel
from experiments.harness.run import execute
from experiments.wina import greedy, laptop, methods, pretrained, products
from experiments.wina.__main__ import EXPERIMENT
from experiments.wina.config import PRESETS, Arm, Config, list_arms
from experiments.wina.methods import Setting, Workshop
from experiments.wina.pretrained_report import Cell, make_claims
from sparsejax import activations as act
from sparsejax.models import Llama, LlamaConfig, init_cache

TINY = LlamaConfig(
    vocab_size=128, d_model=32, n_layers=2, n_heads=4, d_ff=64, max_seq_len=64, n_kv_heads=2,
    tie_embeddings=True, embed_std=0.3,
)  # fmt: skip
LETTERS = np.random.default_rng(0).integers(0, 128, 400).astype(np.int32)
TEXT = TokenizedText(LETTERS[:300], LETTERS[300:], 128, "ascii")
TOKENS = jnp.asarray(LETTERS[:24].reshape(2, 12))
UP, DOWN = "blocks/ffn/up_proj/kernel", "blocks/ffn/down_proj/kernel"
call = nnx.jit(lambda model, tokens: model(tokens))


@pytest.fixture(scope="module", autouse=True)
def datasets(tmp_path_factory):
    """Datasets of this module, away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEJAX_DATA", str(tmp_path_factory.mktemp("datasets")))
        yield


def settings(out, **changes) -> Config:
    return dataclasses.replace(PRESETS["test"], out=str(out), **changes)


def only_run(out):
    (folder,) = (out / "wina").iterdir()
    return folder


def test_the_whole_experiment_and_its_resumption(tmp_path, capsys):
    result = execute(EXPERIMENT, settings(tmp_path))
    assert result is not None
    folder = only_run(tmp_path)
    printed = capsys.readouterr().out
    for piece in ("WINA-T", "R-Sparse", "claim: on digits WINA in rotated bases is more accurate"):
        assert piece in printed
    for name in ("accuracy", "layer"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["card"]["what"] == "activations"
    metrics = summary["metrics"]
    networks = metrics["networks"]

    def accuracy(method, share):
        return np.mean(networks[f"{method}-{share} accuracy"])

    dense = np.mean(networks["dense accuracy"])
    assert dense > 70
    for method in ("teal", "wina", "wina-t", "r-sparse"):
        assert 0 < accuracy(method, 0.9) < accuracy(method, 0.5) <= dense + 3
    first, masks, layer, speed = result.claims
    ours = accuracy("wina-t", 0.9)
    assert first.holds == (ours > accuracy("teal", 0.9) and ours > accuracy("teal-t", 0.9))
    assert masks.holds
    assert np.mean(metrics["masks"]["any"]) < 90
    assert layer.holds
    times = metrics["times"]["layer"]
    assert speed.holds == all(times[share]["ratio"] < 1 for share in ("80%", "90%"))
    alphas = {a for s in (0.5, 0.9) for a in networks[f"r-sparse-{s} alpha"]}
    assert alphas <= set(PRESETS["test"].alphas)

    (folder / "summary.json").unlink()
    (folder / "arms" / "networks.json").unlink()
    execute(EXPERIMENT, cli.parse(EXPERIMENT, ["--resume", str(folder)]))
    again = json.loads((folder / "summary.json").read_text())
    assert again["metrics"] == metrics
    assert again["claims"] == summary["claims"]


def test_a_rotated_network_is_the_network():
    data = laptop.load(1)
    assert data.train_x.shape == (1297, 64)
    assert data.test_x.shape == (500, 64)
    assert 0 == float(data.train_x.min()) < float(data.train_x.max()) == 1
    assert not np.array_equal(data.train_x, laptop.load(2).train_x)
    params = digits.init_mlp(jax.random.key(0), (64, 24, 10))
    wanted = digits.accuracy(params, (data.test_x, data.test_y))
    for method in laptop.BASES:
        layers = laptop.in_basis(params, method)
        found = laptop.measure(layers, data, sparsity=0.0)
        assert float(found["accuracy"]) == pytest.approx(float(wanted), abs=0.5)
        gram = np.asarray(layers[0].kernel @ layers[0].kernel.T)
        off = np.abs(gram - np.diag(np.diag(gram))).max()
        assert (off < 1e-4) == method.endswith("-t")
        norms = np.ones(64) if method.startswith("teal") else np.sqrt(np.diag(gram))
        np.testing.assert_allclose(layers[0].c, norms, atol=1e-5)


def test_r_sparse_of_the_digits_keeps_its_budget():
    data, params = laptop.load(0), digits.init_mlp(jax.random.key(0), (64, 24, 10))
    layers = laptop.r_sparse_layers(params, data, 0.5, 0.5)
    x = data.train_x
    for layer in layers:
        width, outputs = layer.kernel.shape
        _, rank = act.r_sparse_budget(width, outputs, 0.5, 0.5)
        assert layer.factors[0].shape == (width, rank)
        c = jnp.linalg.norm(layer.kernel, axis=-1)
        assert float((jnp.abs(x) * c > layer.threshold).mean()) == pytest.approx(0.25, abs=0.01)
        x = jax.nn.relu(laptop.r_sparse_outputs(layer, x))
    # all of the budget for inputs, and a budget of nearly all, is the network itself
    whole = laptop.measure_r_sparse(laptop.r_sparse_layers(params, data, 1e-9, 1.0), data)
    wanted = digits.accuracy(params, (data.test_x, data.test_y))
    assert float(whole["accuracy"]) == pytest.approx(float(wanted), abs=0.5)


# a language model


@pytest.fixture(scope="module")
def tiny():
    return Llama(TINY, rngs=nnx.Rngs(0))


def small(out, **changes) -> Config:
    common = {"seq_len": 31, "eval_windows": 2, "calibration": 2, "tuning": 1, "rounds": 1,
              "decode_tokens": 0, "sparsity": (0.25, 0.5), "alphas": (0.7,)}  # fmt: skip
    return dataclasses.replace(PRESETS["pretrained"], out=str(out), **(common | changes))


@pytest.fixture
def loaded(tiny, monkeypatch):
    """A small random model in the place of the one in the wheel."""

    def load(config, mesh):
        assert mesh is None
        graph, params = nnx.split(tiny)
        return LanguageModel(TINY, graph, params, TEXT, None, AsciiTokenizer())

    monkeypatch.setattr(pretrained, "pretrained_model", load)


def test_a_language_model_and_its_resumption(loaded, tmp_path, capsys):
    result = execute(EXPERIMENT, small(tmp_path, methods=("teal-t", "wina-t", "r-sparse", "cats")))
    assert result is not None
    folder = only_run(tmp_path)
    printed = capsys.readouterr().out
    for piece in ("CATS (equal MACs)", "WINA-T (k, gate)", "claim: WINA-T has a lower perplexity"):
        assert piece in printed
    assert (folder / "pretrained.png").stat().st_size > 10_000
    cells = result.metrics["cells"]
    assert list(cells) == [
        "teal-t", "wina-t", "wina-t-k_gate", "r-sparse", "cats", "cats-matched"
    ]  # fmt: skip
    assert result.metrics["dense"] == pytest.approx(result.metrics["dense rotated"], rel=1e-4)
    for name, row in cells.items():
        # CATS spares up and down alone: half of all is more than it can drop
        assert set(row) == ({"0.25"} if name == "cats-matched" else {"0.25", "0.5"}), name
        for share, cell in row.items():
            assert cell["perplexity"] > 1
            assert cell["adds"] < result.metrics["dense multiply-adds"] or "-t" in name
            kept = 1 - float(share)
            if name == "r-sparse":
                kept *= cell["alpha"]
            if name == "cats":
                sizes = methods.projection_sizes(TINY)
                kept = 1 - float(share) * (sizes[UP] + sizes[DOWN]) / sum(sizes.values())
            assert cell["kept"] == pytest.approx(kept, abs=0.08), name
    (table,) = result.tables
    assert len(table.rows) == 1 + 2 * 5 + 1
    for name in ("cats-0.5", "setting-cats"):
        (folder / "arms" / f"{name}.json").unlink()
    (folder / "summary.json").unlink()
    again = execute(EXPERIMENT, cli.parse(EXPERIMENT, ["--resume", str(folder)]))
    assert again is not None
    assert again.metrics == result.metrics


def test_the_greedy_search_and_exact_numbers(loaded, tmp_path):
    changes = {"sparsity": (0.4,), "calibration": 1}
    found = execute(
        EXPERIMENT, small(tmp_path / "greedy", methods=("wina-t",), norms=("k_gate",),
                          allocation="greedy", greedy_step=0.5, **changes)
    )  # fmt: skip
    assert found is not None
    assert found.card.allocation.value == "learned"
    arms = only_run(tmp_path / "greedy") / "arms"
    setting = json.loads((arms / "setting-wina-t-k_gate.json").read_text())["settings"]["0.4"]
    sizes = methods.projection_sizes(TINY)
    for layer in range(TINY.n_layers):
        dropped = sum(sizes[path] * share[layer] for path, share in setting["sparsity"].items())
        assert dropped / sum(sizes.values()) == pytest.approx(0.4, abs=0.04)
    assert len({tuple(share) for share in setting["sparsity"].values()}) > 1
    exact = execute(EXPERIMENT, small(tmp_path / "exact", methods=("teal",), mask_by="topk",
                                      decode_tokens=2, **changes))  # fmt: skip
    assert exact is not None
    cell = exact.metrics["cells"]["teal"]["0.4"]
    assert cell["kept"] == pytest.approx(0.6, abs=0.03)
    assert cell["speed"] > 0
    assert cell["dense_speed"] > 0
    assert exact.claims[-1].holds == (cell["speed"] > cell["dense_speed"])


def workshop(tiny, **changes):
    return Workshop(small("", **changes), tiny, TEXT)


def uniform(share):
    return {path: [share] * TINY.n_layers for path in methods.projection_sizes(TINY)}


@pytest.mark.parametrize("method", ["cats", "r-sparse", "wina-t"])
def test_one_token_at_a_time_gives_the_same_logits(tiny, method):
    shop, arm = workshop(tiny), Arm(method)
    if method == "cats":
        setting = Setting({"ffn": [0.5] * 2}, {"ffn": [0.05, 0.1]})
    else:
        limits = act.input_thresholds(shop.scores(arm), 0.5)
        setting = Setting(uniform(0.4), limits, alpha=0.7)
    masked = call(shop.build(arm, setting), TOKENS[:1])
    reading = shop.build(arm, setting, decoding=True)
    decode = nnx.jit(lambda model, token, cache: model.decode(token, cache))
    cache, found = init_cache(TINY, 1, 12), []
    for token in TOKENS[0]:
        logits, cache = decode(reading, token[None, None], cache)
        found.append(logits[0, 0])
    np.testing.assert_allclose(jnp.stack(found), masked[0], atol=2e-4)
    assert float(jnp.abs(masked - call(tiny, TOKENS[:1])).max()) > 0.01


def test_thresholds_that_drop_nothing_leave_the_model(tiny):
    wanted = call(tiny, TOKENS)
    cats = act.cats_model(tiny, 0.0)
    np.testing.assert_allclose(call(cats, TOKENS), wanted, atol=1e-5)
    # what is dropped goes through a product of full rank: nothing is lost at any threshold
    factors = workshop(tiny).factors
    whole = act.r_sparse_model(tiny, 0.5, factors)
    np.testing.assert_allclose(call(whole, TOKENS), wanted, atol=1e-4)
    none = act.cats_model(tiny, np.full(2, np.inf))
    tiny_off = nnx.clone(tiny)
    tiny_off.blocks.ffn.down_proj.kernel = nnx.Param(0 * tiny.blocks.ffn.down_proj.kernel[...])
    np.testing.assert_allclose(call(none, TOKENS), call(tiny_off, TOKENS), atol=1e-5)


def test_kept_weights_are_counted(tiny):
    counted = products.with_counts(tiny)
    assert set(products.kept_weights(counted, TOKENS).values()) == {1.0}
    sparse = act.sparse_inputs(counted, {"up_proj": [0.5, 0.75], "": 0.0})
    shares = products.kept_weights(sparse, TOKENS)
    assert shares[UP] == 0.375
    assert shares[DOWN] == 1.0


def test_thresholds_of_gates_drop_their_share(tiny):
    windows = np.asarray(TOKENS)
    found = methods.count_gates(tiny, windows, [0.3, 0.8])
    dense = [float(x) for x in found[0.3]]
    assert all(0 <= a < b for a, b in zip(dense, found[0.8]))
    cats = act.cats_model(products.with_counts(tiny), np.asarray(found[0.3]))
    assert products.kept_weights(cats, TOKENS)[DOWN] == pytest.approx(0.7, abs=0.05)


def test_other_thresholds_go_into_the_state_of_a_block(tiny):
    block = tiny.block(1)
    state = nnx.state(act.sparse_inputs(block, thresholds=0.0, gather=False))
    limits = {p.removeprefix("blocks/"): 0.25 for p in methods.projection_sizes(TINY)}
    wanted = nnx.state(act.sparse_inputs(block, thresholds=0.25, gather=False))
    jax.tree.map(np.testing.assert_array_equal, greedy.with_thresholds(state, limits), wanted)


def test_multiply_adds():
    sizes = methods.projection_sizes(TINY)
    total, head = TINY.n_layers * sum(sizes.values()), 128 * 32
    assert methods.multiply_adds(None, None, TINY) == total + head
    half = Setting(uniform(0.5), {})
    assert methods.multiply_adds(Arm("teal"), half, TINY) == total / 2 + head
    assert methods.multiply_adds(Arm("wina-t"), half, TINY) == total / 2 + head + 4 * 32**2
    matched = Arm("cats", matched=True)
    share = methods.gate_sparsity(matched, 0.25, TINY)
    cats = Setting({"ffn": [share] * 2}, {})
    assert methods.multiply_adds(matched, cats, TINY) == pytest.approx(0.75 * total + head)
    assert methods.gate_sparsity(matched, 0.6, TINY) is None


def test_claims_are_computed_from_the_figures():
    config = PRESETS["pretrained"]
    base = {"teal": 20.0, "wina": 18.0, "teal-t": 30.0, "wina-t": 15.0, "r-sparse": 19.0}
    found = {Arm(m): dict.fromkeys(config.sparsity, Cell(p, 0.5, 1.0, 1.0, 3.0, 2.0))
             for m, p in base.items()}  # fmt: skip
    found[Arm("cats", matched=True)] = {0.25: Cell(17.0, 0.5, 1.0, 1.0)}
    claims = make_claims(config, found)
    assert [c.holds for c in claims] == [True, True, True, True, False, True]
    found[Arm("wina-t")] = dict.fromkeys(config.sparsity, Cell(25.0, 0.5, 1.0, 1.0, 1.0, 2.0))
    assert [c.holds for c in make_claims(config, found)][:2] == [False, True]
    (alone,) = make_claims(config, {})
    assert not alone.holds


def test_the_model_chooses_the_preset_and_arms_their_names():
    assert cli.parse(EXPERIMENT, ["--model", "smollm2"]).preset == "pretrained"
    assert cli.parse(EXPERIMENT, []).preset == "laptop"
    arms = list_arms(PRESETS["pretrained"])
    assert len({arm.name for arm in arms}) == len({arm.label for arm in arms}) == len(arms) == 8


def test_the_paper_setting_builds_abstractly(capsys):
    assert execute(EXPERIMENT, PRESETS["paper"]) is None
    printed = capsys.readouterr().out
    assert "llama-2-7b, 6,738,415,616 parameters" in printed
    # the paper's own figure for this model
    assert "65%: logits (1, 2048, 32000) and (1, 1, 32000) of a decoded token trace; 63.7%" in (
        printed
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "1.0"], "sparsity is (1.0,); give shares between 0 and 1"),
        (["--sparsity", "-0.5"], "sparsity is -0.5; it must be in [0, 1]"),
        (["--methods", "magic"], "methods is 'magic'; known are teal, wina, teal-t, wina-t, r-sp"),
        (["--methods", "cats"], "methods is 'cats'; known are teal, wina, teal-t, wina-t, r-sp"),
        (["--alphas", "2"], "alphas is 2.0; it must be in [0, 1]"),
        (["--spreads", "-1"], "spreads is (-1.0,); give some, none negative"),
        (["--hidden", "0"], "hidden is 0; it must be at least 1"),
        (["--mlp-batch", "0"], "mlp_batch is 0; it must be at least 1"),
        (["--mlp-batch", "2000"], "mlp_batch is 2000; there are 1297 training images"),
        (["--mlp-learning-rate", "0"], "mlp_learning_rate is 0.0; it must be positive"),
        (["--decode-tokens", "-1"], "decode_tokens is -1; it must be at least 0"),
        (["--greedy-step", "0"], "greedy_step is 0.0; it must be in (0, 1]"),
        (["--norms", "none"], "norms is 'none'; known are all, k_gate"),
        (["--model", "60m"], "model is '60m'; give a pretrained one, or none for digits"),
        (["--mesh", "data=8"], "mesh and multihost are not for this experiment"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, error_of):
    assert message in error_of(EXPERIMENT, arguments)
