"""The gradual pruning experiment end to end, and the character task that it is run on."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax as sj
from experiments.gradual_pruning import EXPERIMENT, PRESETS, Config, check
from experiments.harness import cli
from experiments.harness.characters import (
    CONTEXT,
    VOCABULARY,
    RandomWindows,
    init_params,
    kernel_entries,
    load_characters,
    losses,
    make_bits,
    make_step,
    train_arm,
)
from experiments.harness.run import Run, execute

TINY = {"seeds": 1, "steps": 12, "begin": 2, "end": 8, "freq": 2, "checkpoint_every": 5}


def settings(out, **changes) -> Config:
    return dataclasses.replace(PRESETS["test"], out=str(out), **changes)


def only_run(out):
    return max(p for p in (out / "gradual_pruning").iterdir() if (p / "config.json").is_file())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: result and folder."""
    out = tmp_path_factory.mktemp("runs")
    result = execute(EXPERIMENT, settings(out))
    return result, only_run(out)


def test_the_whole_experiment(finished):
    result, folder = finished
    for name in ("bits_by_nonzeros", "training"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["card"] == result.card.to_dict()
    assert summary["card"]["timing"] == "during"
    assert summary["seeds"] == 2
    nonzeros = summary["metrics"]["nonzeros"]
    kept = sum(sj.keep_count(24 * n, 0.1) for n in (128, 64))
    assert nonzeros["large sparse 0.9"] == nonzeros["one-shot 0.9"] == kept
    assert nonzeros["dense"] == kernel_entries(24)
    assert abs(nonzeros["small dense 0.9"] - kept) <= kernel_entries(1) / 2
    bits = summary["metrics"]["bits"]
    assert set(bits) == set(nonzeros)
    assert all(len(b) == 2 and all(2 < x < 8 for x in b) for b in bits.values())


def test_the_verdict_is_that_of_the_figures(finished):
    result, _ = finished
    means = {name: np.mean(values) for name, values in result.metrics["bits"].items()}
    first, second = result.claims
    assert first.holds == (means["small dense 0.9"] - means["large sparse 0.9"] > 0.05)
    assert second.holds == (means["one-shot 0.9"] - means["large sparse 0.9"] > 0.3)
    assert "small dense" in first.sentence


def test_resuming_a_finished_run_gives_its_numbers(finished):
    result, folder = finished
    lines = (folder / "metrics.jsonl").read_text()
    again = execute(EXPERIMENT, cli.parse(EXPERIMENT, ["--resume", str(folder)]))
    assert again.metrics == result.metrics
    assert (folder / "metrics.jsonl").read_text() == lines


def test_a_run_stopped_in_the_middle_resumes_to_the_same_numbers(finished, tmp_path, monkeypatch):
    result, whole = finished
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    trial = "large-sparse-0.9-lr0.002-seed1"
    shutil.rmtree(folder / "trials" / trial)
    draw, trained = RandomWindows.__next__, []

    def stop_at_30(self):
        trained.append(self.get_state()["number"])
        if trained[-1] == 30:
            raise KeyboardInterrupt
        return draw(self)

    resumed = cli.parse(EXPERIMENT, ["--resume", str(folder)])
    with monkeypatch.context() as patch:
        patch.setattr(RandomWindows, "__next__", stop_at_30)
        with pytest.raises(KeyboardInterrupt):
            execute(EXPERIMENT, resumed)
    assert [p.name for p in (folder / "trials" / trial).iterdir() if p.name.isdigit()] == ["20"]
    assert trained[0] == 0
    assert execute(EXPERIMENT, resumed).metrics == result.metrics


def one_arm(config):
    """The large sparse network alone, trained as the experiment does."""
    text = load_characters()
    return train_arm(
        config, Run("gradual_pruning", config), text, "sparse", hidden=config.hidden,
        optimizer=config.pruning(0.9), step=make_step(config, config.pruning(0.9)),
        bits=make_bits(text.test), slug="gradual_pruning",
    )  # fmt: skip


def test_a_mesh_gives_the_numbers_of_one_device(tmp_path):
    alone = one_arm(settings(tmp_path, **TINY))
    spread = one_arm(settings(tmp_path / "mesh", mesh="data=8", **TINY))
    assert spread[0].bits == pytest.approx(alone[0].bits, rel=2e-3)
    assert spread[0].nonzeros == alone[0].nonzeros


def test_the_order_of_jaxpruner_reaches_the_sparsity(tmp_path):
    trials = one_arm(settings(tmp_path, order="jaxpruner", **TINY))
    assert trials[0].nonzeros == sum(sj.keep_count(24 * n, 0.1) for n in (128, 64))


def test_pruned_weights_are_zero_and_one_step_serves_all_sparsities():
    config = settings("unused")
    step = make_step(config, config.pruning(0.9))
    text = load_characters()
    for sparsity in (0.9, 0.5):
        params = init_params(jax.random.key(0), config.hidden)
        rate = config.learning_rate(2e-3)
        state = {"params": params, "opt": config.pruning(sparsity)(rate).init(params)}
        batches = RandomWindows(text.train, batch=8, seed=0)
        for _ in range(config.end):
            state, _ = step(state, next(batches), jnp.float32(2e-3))
        masks = sj.get_masks(state["opt"])
        for layer in ("hidden", "output"):
            kernel, mask = (t[layer]["kernel"] for t in (state["params"], masks))
            assert int(mask.sum()) == sj.keep_count(mask.size, 1 - sparsity)
            np.testing.assert_array_equal(kernel != 0, mask)
        assert masks["embedding"].ndim == 0
    assert step._cache_size() == 1


def test_the_text_is_the_sources_of_four_modules():
    text = load_characters()
    assert text.train.dtype == np.uint8
    assert max(text.train.max(), text.test.max()) == VOCABULARY - 1
    total = len(text.train) + len(text.test)
    assert total > 300_000
    assert len(text.train) == int(0.9 * total)
    counts = np.bincount(np.concatenate([text.train, text.test]), minlength=VOCABULARY)
    assert (np.diff(counts[:-1]) <= 0).all()  # the commonest first


def test_windows_are_drawn_with_replacement_and_resume():
    text = np.arange(20, dtype=np.uint8)
    batches = RandomWindows(text, batch=50, seed=3)
    first, state, second = next(batches), batches.get_state(), next(batches)
    assert first.shape == (50, CONTEXT + 1)
    assert len(np.unique(first, axis=0)) == 20 - CONTEXT  # fewer than drawn
    assert not np.array_equal(first, second)
    other = RandomWindows(text, batch=50, seed=3)
    other.set_state(json.loads(json.dumps(state)))
    np.testing.assert_array_equal(next(other), second)


def test_bits_are_the_mean_over_every_window():
    text = load_characters().test[:100]
    params = init_params(jax.random.key(1), 8)
    windows = np.stack([text[i : i + CONTEXT + 1] for i in range(100 - CONTEXT)])
    expected = float(losses(params, jnp.asarray(windows)).mean()) / math.log(2)
    assert make_bits(text, chunk=64)(params) == pytest.approx(expected, rel=1e-5)


def test_the_recipe_of_the_paper_page():
    config = PRESETS["laptop"]
    rate = config.learning_rate(2e-3)
    assert float(rate(jnp.int32(0))) == pytest.approx(2e-3)
    assert float(rate(jnp.int32(config.steps - 1))) == pytest.approx(1e-4)
    assert (config.begin, config.end, config.freq, config.steps) == (250, 1750, 50, 2500)
    params = init_params(jax.random.key(0), 512)
    assert float(params["embedding"].std()) == pytest.approx(1, rel=0.1)
    assert float(params["hidden"]["kernel"].std()) == pytest.approx(math.sqrt(2 / 128), rel=0.05)
    assert float(params["output"]["kernel"].std()) == pytest.approx(math.sqrt(1 / 512), rel=0.05)
    assert sj.selected_paths(params) == ("hidden/kernel", "output/kernel")
    widths = [sj.match_dense_width(kernel_entries, n) for n in (19_661, 9_831, 4_915)]
    assert widths == [102, 51, 26]


def test_the_paper_setting_builds_abstractly(capsys):
    assert execute(EXPERIMENT, PRESETS["paper"]) is None
    printed = capsys.readouterr().out
    for piece in (
        "25,557,032 parameters, 53 kernels in scope",
        "sparsity 0.875 at step 100,000: 3,186,688 of 25,493,504 weights stay",
        "one step of gradual pruning around SGD traced for 1,024 images of 224 x 224",
        "a run wants imagenet2012 prepared by TFDS, and a training loop of this experiment",
    ):
        assert piece in printed
    assert check(dataclasses.replace(PRESETS["paper"], task="characters")) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsities", "1.0"], "sparsities has 1.0; each must be between 0 and 1"),
        (["--sparsities", "0.9", "0.9"], "sparsities are (0.9, 0.9); they must differ"),
        (["--claim-sparsity", "0.7"], "claim_sparsity is 0.7; it must be one of (0.9,)"),
        (["--freq", "7"], "freq is 7; it must divide end - begin = 25"),
        (["--begin", "-5"], "begin is -5; it must not be negative"),
        (["--begin", "35"], "end is 30; it must not come before begin = 35"),
        (["--end", "40"], "end is 40; it must come before steps = 40"),
        (["--order", "jaxpruner", "--begin", "4", "--end", "28", "--freq", "3"],
         "end is 28; with the order jaxpruner freq = 3 must divide it"),
        (["--hidden", "0"], "hidden is 0; it must be at least 1"),
        (["--learning-rates", "-1"], "give positive ones"),
        (["--learning-rates", "1e-3", "1e-3"], "they must differ"),
        (["--power", "0"], "power is 0.0; it must be positive"),
        (["--task", "imagenet2012"], "only --preset paper checks it"),
        (["--sparsity", "0.9"], "Unrecognized options: --sparsity"),
        (["--mesh", "data=3"], "3 devices, and there are 8"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(arguments, message, error_of):
    assert message in error_of(EXPERIMENT, arguments)


def test_arms_without_masks_train_with_the_same_optimizer():
    config = settings("unused")
    params = init_params(jax.random.key(0), 8)
    rate = config.learning_rate(2e-3)
    dense = optax.adam(rate)
    sparse = config.pruning(0.9)(rate)
    grads = jax.tree.map(jnp.ones_like, params)
    ours = sparse.update(grads, sparse.init(params), params)[0]  # before pruning begins
    theirs = dense.update(grads, dense.init(params), params)[0]
    jax.tree.map(np.testing.assert_allclose, ours, theirs)
