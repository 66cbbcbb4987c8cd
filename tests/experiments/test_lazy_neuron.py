"""The lazy neuron experiment: results, resuming, a pretrained model, full size, bad input."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from tokenizers import decoders, models, pre_tokenizers

from experiments.harness import cli, digits
from experiments.harness.run import Run, execute
from experiments.lazy_neuron import label_noise, lemma, pretrained, report
from experiments.lazy_neuron.__main__ import EXPERIMENT
from experiments.lazy_neuron.config import PRESETS, PretrainedConfig, arm_label, arm_name
from sparsejax.activations import measure_activations
from sparsejax.models import Llama, LlamaConfig, save_hf

LAPTOP, TEST = PRESETS["laptop"], PRESETS["test"]


@pytest.fixture(scope="module", autouse=True)
def datasets(tmp_path_factory):
    """Datasets of this module, away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEJAX_DATA", str(tmp_path_factory.mktemp("datasets")))
        yield


def test_the_whole_experiment_and_its_resumption(tmp_path, capsys):
    result = execute(EXPERIMENT, dataclasses.replace(TEST, out=str(tmp_path)))
    (folder,) = (tmp_path / "lazy_neuron").iterdir()
    printed = capsys.readouterr().out
    for piece in ("ReLU 32", "cross-entropy", "Digits", "claim: nothing asks for it"):
        assert piece in printed
    for name in ("shares", "neurons", "label_noise"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
    summary = json.loads((folder / "summary.json").read_text())
    arms = summary["metrics"]["arms"]
    assert set(arms) == {"relu-16", "relu-32", "relu-32-top4"}
    assert max(arms["relu-32-top4"]["0.003"]["test_share"]) <= 4 / 32
    for metrics in (by_rate["0.003"] for by_rate in arms.values()):
        assert "neuron_rate" not in metrics
        layers = [metrics[f"test_share_layer{i}"] for i in range(2)]
        np.testing.assert_allclose(np.mean(layers, axis=0), metrics["test_share"], rtol=1e-5)
        starts = np.mean(metrics["initial_layers"], axis=1)
        np.testing.assert_allclose(starts, metrics["initial_share"], rtol=1e-5)
        assert all(0.1 < share < 0.8 for share in metrics["initial_share"])
    # counted by measure_activations, and by the model itself
    kept = json.loads((folder / "arms" / "relu-32-lr0.003.json").read_text())
    rates = np.asarray(kept["neuron_rate"])
    assert rates.shape == (2, 2, 32)
    np.testing.assert_allclose(rates.mean((1, 2)), kept["test_share"], rtol=1e-4)
    assert set(summary["metrics"]["digits"]) == {
        f"k{k}-noise{p}" for k in (0, 4) for p in ("0", "0.4")
    }
    ends = {w: np.mean(arms[f"relu-{w}"]["0.003"]["test_share"]) for w in (16, 32)}
    falls = [np.mean(arms[f"relu-{w}"]["0.003"]["initial_share"]) - ends[w] for w in (16, 32)]
    assert result.claims[0].holds == (min(falls) >= 0.1 and ends[16] > ends[32])
    assert result.claims[2].holds == (32 * ends[32] > 16 * ends[16])

    (folder / "summary.json").unlink()
    for name in ("relu-16-lr0.003", "lemma"):
        (folder / "arms" / f"{name}.json").unlink()
    execute(EXPERIMENT, cli.parse(EXPERIMENT, ["--resume", str(folder)]))
    again = json.loads((folder / "summary.json").read_text())
    assert again["metrics"] == summary["metrics"]
    assert again["claims"] == summary["claims"]


@pytest.mark.parametrize("loss", lemma.LOSSES)
def test_the_mean_gradient_is_positive_where_a_neuron_fires(loss):
    mean, error = lemma.mean_gradients(jax.random.key(5), 20_000, loss)
    assert ((mean / error)[: lemma.FIRING] > 4).all()
    assert (mean[lemma.FIRING :] == 0).all()


def test_a_gradient_of_the_lemma_is_that_of_its_formula():
    # one draw: [p > 0] V^T (softmax(V relu(p)) - onehot(label))
    key = jax.random.key(3)
    mean, _ = lemma.mean_gradients(key, 1, lemma.LOSSES[0])
    at, last, _ = jax.random.split(key, 3)
    p = jax.random.uniform(at, (lemma.NEURONS,), minval=0.3, maxval=2.0)
    V = jax.random.uniform(last, (lemma.CLASSES, lemma.NEURONS), minval=-1.0)
    on = jnp.arange(lemma.NEURONS) < lemma.FIRING
    z = V @ jnp.where(on, p, 0)
    wanted = on * (V.T @ (jax.nn.softmax(z) - jax.nn.one_hot(lemma.LABEL, lemma.CLASSES)))
    np.testing.assert_allclose(mean, wanted, atol=1e-6)


def test_digits_are_cut_by_the_seed_and_standardised():
    one, two = label_noise._split(0), label_noise._split(1)
    assert one.train_x.shape == (1297, 64)
    assert one.test_x.shape == (500, 64)
    moves = one.train_x.std(0) > 0
    np.testing.assert_allclose(one.train_x.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(one.train_x.std(0)[moves], 0.5, rtol=1e-4)
    assert 0 < (~moves).sum() < 10
    assert not jnp.array_equal(one.train_y, two.train_y)
    for cut in (one, two):  # the same images
        labels = jnp.concatenate([cut.train_y, cut.test_y])
        whole = digits.load_digits(1297, 0.0)
        wanted = jnp.concatenate([whole.train_y, whole.test_y])
        np.testing.assert_array_equal(jnp.bincount(labels), jnp.bincount(wanted))


def test_networks_on_digits_keep_k_and_learn_less_from_wrong_labels():
    config = dataclasses.replace(TEST, width=64, digits_steps=150, seeds=1)
    found = {
        (k, p): label_noise.train_seeds(k, p, config) for k, p in ((0, 0.0), (8, 0.0), (8, 0.8))
    }
    assert found[0, 0.0]["test_accuracy"][0] > 85
    assert found[8, 0.0]["test_accuracy"][0] > 85
    assert found[8, 0.8]["test_accuracy"][0] < found[8, 0.0]["test_accuracy"][0] - 10
    assert found[8, 0.0]["share"][0] <= 8 / 64
    assert found[0, 0.0]["share"][0] > 8 / 64
    assert 0 <= found[8, 0.8]["ece"][0] <= 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model of 256 tokens, one a byte."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(letters))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sizes = LlamaConfig(256, 16, 3, 2, 48, 64)
    path = tmp_path_factory.mktemp("hub") / "tiny"
    save_hf(path, Llama(sizes, rngs=nnx.Rngs(7)), tokenizer=tokenizer.to_str())
    return path


def test_a_pretrained_model_is_measured(folder, tmp_path, capsys):
    arguments = ["--model", str(folder), "--out", str(tmp_path), "--seq-len", "31",
                 "--eval-windows", "3", "--batch", "2"]  # fmt: skip
    config = cli.parse(EXPERIMENT, arguments)
    assert isinstance(config, PretrainedConfig)
    result = execute(EXPERIMENT, config)
    printed = capsys.readouterr().out
    assert "claim: no neuron of tiny" in printed
    (run,) = (tmp_path / "lazy_neuron").iterdir()
    assert (run / "layers.png").stat().st_size > 10_000
    trained = result.metrics["trained"]
    assert all(len(values) == 3 for values in trained.values())
    assert min(trained["nonzero"]) > 0.999
    for a, b in zip(trained["mass 0.5"], trained["mass 0.9"]):
        assert 0 < a < b < 1
    assert len(result.tables[0].rows) == 3 + 2

    (run / "arms" / "trained.json").unlink()
    again = execute(EXPERIMENT, cli.parse(EXPERIMENT, ["--resume", str(run)]))
    assert again.metrics == result.metrics


def test_layers_are_measured_as_by_the_library(tmp_path):
    model = Llama(LlamaConfig(64, 16, 3, 2, 48, 32), rngs=nnx.Rngs(1))
    windows = np.random.default_rng(0).integers(0, 64, (5, 20)).astype(np.int32)
    config = PretrainedConfig(out=str(tmp_path), batch=2)
    run = Run("lazy_neuron", config)
    found = pretrained.measure_layers(run, "toy", model, windows, config)
    for name, threshold in (("positive", None), ("nonzero", 0.0)):
        tokens = jnp.asarray(windows)
        stats = measure_activations(model, tokens, threshold=threshold)["blocks/ffn/down_proj"]
        np.testing.assert_allclose(found[name], stats["nonzero_fraction"], atol=1e-5)


def test_concentration_counts_the_fewest_neurons():
    config = PretrainedConfig(masses=(0.5, 0.9), thresholds=(0.1,))
    values = np.asarray([[4.0, 0.0, 3.0, 2.0, 1.0], [0.0, 0.0, 10.0, 0.0, 0.0]])
    found = pretrained.concentration(values, config)
    # 4 + 3 of 10 are the first half, 4 + 3 + 2 make nine tenths; all mass in one neuron
    assert found == pytest.approx({"mass 0.5": 1.5 / 5, "mass 0.9": 2 / 5, "above 0.1": 2.5 / 5})


def test_claims_are_computed_from_the_figures():
    def arm(start, end, train):
        values = {"initial_share": start, "test_share": end, "train_share": train, "test_loss": 2.0}
        return {3e-3: {name: [value] * 3 for name, value in values.items()}}

    def verdicts(narrow=0.37, wide=0.3, train=0.3, least=5.0, silent=0.0, cost=0.03):
        found = {"relu-128": arm(0.5, narrow, narrow), "relu-512": arm(0.5, wide, train)}
        found["relu-512-top24"] = arm(0.05, 0.05, 0.05)
        found["relu-512-top24"][3e-3]["test_loss"] = [2 + cost] * 3
        signs = {loss: {"least": [9.0, least], "most_silent": [silent]} for loss in lemma.LOSSES}
        return [claim.holds for claim in report.make_claims(LAPTOP, found, signs)]

    def failing(**changes):
        return [i for i, holds in enumerate(verdicts(**changes)) if not holds]

    assert failing() == []
    assert failing(narrow=0.41) == [0]  # falls by 9 points
    assert failing(wide=0.38, train=0.38) == [0]  # wider is denser
    assert failing(train=0.32) == [1]
    assert failing(wide=0.09, train=0.09) == [2]  # 46 neurons against 47
    assert failing(cost=0.05) == [3]
    assert failing(least=2.9) == failing(silent=0.1) == [4]


def test_claims_on_a_pretrained_model_are_computed_from_the_figures():
    config = PretrainedConfig()
    trained = {"nonzero": [1.0, 0.9995, 1.0, 1.0], "mass 0.9": [0.5, 0.4, 0.45, 0.5]}
    null = {"mass 0.9": [0.6] * 4}

    def verdicts(**changes):
        return [c.holds for c in pretrained.make_claims(config, "x", trained | changes, null)]

    assert verdicts() == [True, True, True]
    assert verdicts(nonzero=[1.0, 0.99, 1.0, 1.0]) == [False, True, True]
    assert verdicts(**{"mass 0.9": [0.5, 0.4, 0.65, 0.6]}) == [True, False, False]


def test_the_paper_setting_builds_abstractly(capsys):
    assert execute(EXPERIMENT, PRESETS["paper"]) is None
    printed = capsys.readouterr().out
    # 12 x (4 x 768^2 + 2 x 768 x 3072 + 2 x 768), bytes twice, 512 positions, the last norm
    assert printed.count("85,740,288 parameters; a step of 128 x 512 tokens gives loss, share") == 2
    for piece in ("ReLU 3072, top 128", "T5-Base's sizes", "prepare it once with tensorflow-cpu"):
        assert piece in printed


def test_names_of_arms():
    assert arm_label(arm_name(512)) == "ReLU 512"
    arms = dataclasses.replace(LAPTOP, topk=(16, 128)).arms()
    assert list(arms) == ["relu-128", "relu-512", "relu-512-top16", "relu-512-top128"]
    assert arms["relu-512-top16"].model.ffn_k == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--d-ff", "32", "16"], "d_ff is (32, 16); give widths that rise"),
        (["--d-ff", "0"], "d_ff is 0; it must be at least 1"),
        (["--topk", "32"], "topk is (32,); give numbers from 1 to 31 that differ"),
        (["--topk", "0"], "topk is (0,); give numbers from 1 to 31 that differ"),
        (["--digits-topk", "4", "4"], "digits_topk is (4, 4); give numbers from 0 to 15"),
        (["--digits-topk"], "digits_topk is empty; give one value or several"),
        (["--label-noise", "1.5"], "label_noise is 1.5; it must be in [0, 1]"),
        (["--digits-batch", "1298"], "digits_batch is 1298; there are 1297 training images"),
        (["--digits-learning-rate", "0"], "digits_learning_rate is 0.0; it must be positive"),
        (["--lemma-draws", "0"], "lemma_draws is 0; it must be at least 1"),
        (["--heads", "3"], "n_heads is 3; it must divide d_model"),
        (["--preset", "paper", "--dataset", "nowhere"], "nowhere"),
        (["--preset", "pretrained", "--masses", "1.0"], "masses is (1.0,); give shares between"),
        (["--preset", "pretrained", "--thresholds", "0"], "thresholds is (0.0,); give shares"),
        (["--preset", "pretrained", "--mesh", "data=8"], "it runs on 1 device"),
        (["--preset", "pretrained", "--model", "1m"], "model is '1m'; it must be smollm2"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(arguments, message, error_of):
    assert message in error_of(EXPERIMENT, arguments)
