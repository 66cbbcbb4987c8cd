"""The DSnoT experiment end to end: results, resuming, arms, bad input."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.dsnot import laptop
from experiments.dsnot.__main__ import EXPERIMENT
from experiments.dsnot.config import PRESETS, Arm, Config, list_arms
from experiments.harness import cli, digits
from experiments.harness.run import execute


@pytest.fixture(scope="module", autouse=True)
def datasets(tmp_path_factory):
    """Datasets of this module, away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEJAX_DATA", str(tmp_path_factory.mktemp("datasets")))
        yield


def settings(out, **changes) -> Config:
    return dataclasses.replace(PRESETS["test"], out=str(out), **changes)


def only_run(out):
    return max(p for p in (out / "dsnot").iterdir() if (p / "config.json").is_file())


def test_the_whole_experiment_and_its_resumption(tmp_path, capsys):
    result = execute(EXPERIMENT, settings(tmp_path))
    folder = only_run(tmp_path)
    printed = capsys.readouterr().out
    for piece in ("relMSE", "+ 4 cycles", "any sign", "SparseGPT, mask only", "claim: swaps bring"):
        assert piece in printed
    for name in ("rel_mean", "rel_mse", "loss", "perplexity"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["seeds"] == 2
    assert summary["card"]["timing"] == "after"
    metrics = summary["metrics"]
    arms = metrics["arms"]
    assert set(arms) == {
        f"{start}-s0.6-{change}"
        for start in ("magnitude", "wanda")
        for change in ("c0", "c4", "c4-free")
    }
    for start in ("magnitude", "wanda"):
        before, after = arms[f"{start}-s0.6-c0"], arms[f"{start}-s0.6-c4"]
        assert np.mean(after["rel_mean"]) < np.mean(before["rel_mean"])
    means = {name: np.mean(values) for name, values in metrics["perplexity"].items()}
    assert set(means) == {"dense", "magnitude", "wanda", "sparsegpt", "mask"}
    errors, mean_errors, loss, order = result.claims
    for claim, key, ratio in (
        (errors, "rel_mse", 0.75), (mean_errors, "rel_mean", 0.2), (loss, "loss", 1.0)
    ):  # fmt: skip
        below = [
            np.mean(arms[f"{s}-s0.6-c4"][key]) <= ratio * np.mean(arms[f"{s}-s0.6-c0"][key])
            for s in ("magnitude", "wanda")
        ]
        assert claim.holds == all(below)
    assert order.holds == (means["sparsegpt"] < means["wanda"] < means["magnitude"])

    (folder / "summary.json").unlink()
    for name in ("wanda-s0.6-c4", "language"):
        (folder / "arms" / f"{name}.json").unlink()
    execute(EXPERIMENT, cli.parse(EXPERIMENT, ["--resume", str(folder)]))
    again = json.loads((folder / "summary.json").read_text())
    assert again["metrics"] == metrics
    assert again["claims"] == summary["claims"]


def test_networks_are_pruned_in_order_and_measured_with_their_own_inputs():
    config = dataclasses.replace(PRESETS["test"], seeds=1)
    data = digits.load_digits(digits.SPLIT, digits.SHIFT)
    assert data.train_x.shape == (1000, 64)
    assert data.test_x.shape == (797, 64)
    assert float(data.train_x.min()) == pytest.approx(-0.3)
    (dense,) = laptop.train_networks(config, data)
    arm = Arm("wanda", 0.6, 4)
    found = laptop.prune_networks(arm, config, [dense], data)
    assert 0 < found["rel_mean"][0] < found["rel_mse"][0] < 1
    images = data.train_x[: config.images]
    assert float(laptop.mean_errors(dense, dense, images)) == 0.0
    half = {n: layer | {"kernel": layer["kernel"] * 0.5} for n, layer in dense.items()}
    assert float(laptop.mean_errors(dense, half, images)) == pytest.approx(0.25, rel=1e-4)


def test_every_arm_has_its_start():
    arms = list_arms(PRESETS["laptop"])
    assert len({arm.name for arm in arms}) == len(arms) == 2 * 2 * 7
    for arm in arms:
        assert Arm(arm.initial, arm.sparsity) in arms
        method = arm.method(PRESETS["laptop"])
        assert (method.max_cycles, method.require_same_sign) == (arm.cycles, arm.same_sign)


def test_the_paper_setting_builds_abstractly(capsys):
    assert execute(EXPERIMENT, PRESETS["paper"]) is None
    printed = capsys.readouterr().out
    assert "224 projections with 6,476,005,376 weights, 70% pruned" in printed
    assert "11008 x 4096: DSnoT on Wanda (bool mask) and SparseGPT (bfloat16 weights" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "1.0"], "sparsity is (1.0,); give shares between 0 and 1"),
        (["--initial", "random"], "initial is 'random'; known are magnitude, wanda, sparsegpt"),
        (["--cycles", "0"], "cycles is 0; it must be at least 1"),
        (["--threshold", "-1"], "threshold is -1.0; it must not be negative"),
        (["--sequences", "40"], "sequences * sequence_length is 1280; there are 1000 training"),
        (["--mlp-batch", "2000"], "mlp_batch is 2000; there are 1000 training images"),
        (["--pattern", "2-4"], "pattern is '2-4'; it must look like 2:4"),
        (["--mesh", "data=8"], "mesh and multihost are not for this experiment"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, error_of):
    assert message in error_of(EXPERIMENT, arguments)
