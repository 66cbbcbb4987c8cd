"""The ten lessons end to end, and the granularities that L3 compares."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax as sj
from experiments.harness import cli
from experiments.harness.characters import init_params, losses
from experiments.harness.run import execute
from experiments.ten_lessons.__main__ import EXPERIMENT
from experiments.ten_lessons.config import GRANULARITIES, PRESETS, Config, pattern, unit_scores
from experiments.ten_lessons.costs import training_costs
from experiments.ten_lessons.granularity import without_dead_units


def settings(out, **changes) -> Config:
    return dataclasses.replace(PRESETS["test"], out=str(out), **changes)


def only_run(out):
    return max(p for p in (out / "ten_lessons").iterdir() if (p / "config.json").is_file())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of L3: result and folder."""
    out = tmp_path_factory.mktemp("runs")
    result = execute(EXPERIMENT, settings(out))
    return result, only_run(out)


def test_the_whole_lesson_on_granularity(finished):
    result, folder = finished
    for name in ("bits_by_granularity", "training"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["card"] == result.card.to_dict()
    assert summary["card"]["simulated"] is True
    assert set(summary["metrics"]["nonzeros"].values()) == {32 * 192 // 8}
    means = {name: np.mean(values) for name, values in summary["metrics"]["bits"].items()}
    ours = means.pop("unstructured")
    assert set(means) == {"hidden units", "n:8 of inputs"}
    assert summary["holds"] == all(ours < other for other in means.values())
    assert summary["baseline"].endswith(min(means, key=lambda n: means[n]))
    assert summary["seeds"] == 2


def test_resuming_a_finished_run_gives_its_numbers(finished):
    result, folder = finished
    lines = (folder / "metrics.jsonl").read_text()
    again = execute(EXPERIMENT, cli.parse(EXPERIMENT, ["--resume", str(folder)]))
    assert again.metrics == result.metrics
    assert (folder / "metrics.jsonl").read_text() == lines


@pytest.mark.parametrize("lesson", ["L5", "L9"])
def test_the_whole_lesson_on_costs(tmp_path, capsys, lesson):
    result = execute(EXPERIMENT, settings(tmp_path, lesson=lesson, seeds=1))
    printed = capsys.readouterr().out
    for piece in ("kFLOP", "ms a step", "simulated", "bitmask", "csr"):
        assert piece in printed
    folder = only_run(tmp_path)
    assert (folder / "costs.png").stat().st_size > 10_000
    operations = result.metrics["operations"]
    dense = 3 * 2 * 32 * 192
    assert operations["dense"] == dense
    assert operations["static"] == operations["small dense"] == dense / 8
    assert operations["ste"] == operations["snfs"] == pytest.approx(dense * (2 / 8 + 1) / 3)
    assert set(result.metrics["seconds"]) == {"dense", "gradual", "rigl", "static", "small dense"}
    by_formula, measured = result.claims if lesson == "L5" else result.claims[::-1]
    assert by_formula.holds
    assert "of its time for 0.125 of its operations" in measured.ours
    ratio = result.metrics["time_ratio"]["static"]
    assert measured.holds == (np.mean(ratio) >= 0.9)


def test_gradual_training_costs_the_mean_of_the_cubic():
    config = PRESETS["laptop"]
    steps = np.arange(config.steps)
    progress = np.clip((steps - 200) / 1200, 0, 1)
    sparsity = 0.875 * (1 - (1 - progress) ** 3)
    expected = 3 * 1000 * np.mean(1 - sparsity)
    assert training_costs(config, 125, 1000)["gradual"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", GRANULARITIES)
@pytest.mark.parametrize("density", [1.0, 0.5, 0.3, 0.125])
def test_granularities_keep_what_they_say(name, density):
    config = PRESETS["test"]
    params = init_params(jax.random.key(0), config.hidden)
    scores = unit_scores(params) if name == "units" else sj.magnitude(params)
    shares = {"hidden/kernel": jnp.float32(density), "output/kernel": jnp.float32(density)}
    for path, share in shares.items():
        layer = path.split("/")[0]
        mask = np.asarray(pattern(config, name).mask(scores[layer]["kernel"], share))
        kept = mask.mean()
        if density in (1.0, 0.5, 0.125):
            assert kept == density
        rows, columns = mask.shape
        if name == "units":
            whole = mask.all(0) | ~mask.any(0) if layer == "hidden" else mask.all(1) | ~mask.any(1)
            assert whole.all()
        if name.startswith("outputs"):
            width = int(name.removeprefix("outputs"))
            blocks = mask.reshape(rows, columns // width, width)
            assert (blocks.all(-1) | ~blocks.any(-1)).all()
        if name == "blocks8":
            blocks = mask.reshape(rows // 8, 8, columns // 8, 8).sum((1, 3))
            assert np.isin(blocks, (0, 64)).all()
        if name == "inputs8":
            groups = mask.reshape(rows // 8, 8, columns).sum(1)
            assert (groups == max(1, round(8 * density))).all()
            expected = sj.NM(max(1, round(8 * density)), 8).mask(scores[layer]["kernel"])
            np.testing.assert_array_equal(mask, expected)


def test_units_are_ranked_by_all_their_weights_and_can_be_removed():
    params = init_params(jax.random.key(0), 32)
    units = np.abs(params["hidden"]["kernel"]).sum(0) + np.abs(params["output"]["kernel"]).sum(1)
    best = np.sort(np.argsort(units)[-4:])
    units_pattern = pattern(PRESETS["test"], "units")
    masks = sj.make_masks(unit_scores(params), 1 / 8, pattern=units_pattern)
    np.testing.assert_array_equal(np.flatnonzero(masks["hidden"]["kernel"].all(0)), best)
    np.testing.assert_array_equal(np.flatnonzero(masks["output"]["kernel"].all(1)), best)
    sparse = sj.apply_masks(params, masks)
    small = without_dead_units(sparse)
    assert small["hidden"]["kernel"].shape == (128, 4)
    windows = jax.random.randint(jax.random.key(1), (5, 9), 0, 64)
    np.testing.assert_allclose(losses(small, windows), losses(sparse, windows), rtol=1e-5)


def test_the_paper_setting_builds_abstractly(capsys):
    assert execute(EXPERIMENT, PRESETS["paper"]) is None
    printed = capsys.readouterr().out
    assert "53 kernels as [in, out] matrices with 25,493,504 weights" in printed
    assert "8 x 8 blocks: one step of gradual pruning traces" in printed
    assert "pruned unstructured, traces for 8 images of 224 x 224, forward and backward" in printed
    assert "the article has no setting of its own; a run wants imagenet2012 prepared" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lesson", "L2"], "lesson is 'L2'; known are L3, L5, L9 (L2 is experiments.gradual_"),
        (["--sparsity", "0.9"], "sparsity is 0.9; it must be a multiple of 1/8"),
        (["--sparsity", "1"], "sparsity is 1.0; it must be a multiple of 1/8 between 0 and 1"),
        (["--hidden", "24"], "hidden is 24; it must be a multiple of 16"),
        (["--freq", "7"], "freq is 7; it must divide end - begin = 25"),
        (["--arms", "units"], "give unstructured first and one or more of units"),
        (["--arms", "unstructured", "bricks"], "give unstructured first"),
        (["--lessons", "L3"], "Unrecognized options: --lessons"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, error_of):
    assert message in error_of(EXPERIMENT, arguments)
