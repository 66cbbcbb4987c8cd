"""The random pruning experiment end to end: results, resuming, exact densities, bad input."""

import dataclasses
import json
import threading

import numpy as np
import pytest

import sparsejax as sj
from experiments import random_pruning
from experiments.harness import cli, digits
from experiments.harness.abstract_training import abstract_params
from experiments.harness.images import ImageConfig
from experiments.harness.run import InterruptedRunError, Run, execute
from experiments.random_pruning import EXPERIMENT, PRESETS, Arm, Config


@pytest.fixture(scope="module", autouse=True)
def datasets(tmp_path_factory):
    """Datasets of this module, away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEJAX_DATA", str(tmp_path_factory.mktemp("datasets")))
        yield


def settings(out, **changes) -> Config:
    return dataclasses.replace(PRESETS["test"], out=str(out), **changes)


def only_run(out):
    (folder,) = (out / "random_pruning").iterdir()
    return folder


def test_the_digits_are_those_that_scikit_learn_ships_in_one_fixed_order():
    data = digits.load_digits()
    assert data.train_x.shape == (1257, 64)
    assert data.test_x.shape == (540, 64)
    np.testing.assert_allclose(data.train_x.mean(0), 0, atol=1e-6)
    values = np.concatenate([data.train_x, data.test_x])
    steps = (values - values.min(0)) * 16
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4)
    assert set(np.asarray(data.test_y)) == set(range(10))


def test_batches_are_drawn_without_replacement():
    order = np.asarray(digits.batch_order(3, steps=25, batch=64))
    assert order.shape == (25, 64)
    assert len(set(order[:19].ravel())) == 19 * 64
    np.testing.assert_array_equal(order, digits.batch_order(3, steps=25, batch=64))
    assert (order != np.asarray(digits.batch_order(4, steps=25, batch=64))).any()


def test_the_whole_experiment_and_its_resumption(tmp_path, capsys):
    execute(EXPERIMENT, settings(tmp_path))
    folder = only_run(tmp_path)
    printed = capsys.readouterr().out
    for piece in ("uniform 80%", "ERK 80%", "RigL", "random, SNIP ratios",
                  "claim: a random ERK mask at 80% sparsity comes within 3 points"):  # fmt: skip
        assert piece in printed
    for name in ("accuracy", "methods"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["seeds"] == 2
    assert len(summary["claims"]) == 3
    assert summary["card"]["dynamics"] == "static"
    assert summary["card"]["criterion"] == "random"
    arms = summary["metrics"]["arms"]
    assert len(arms) == len(random_pruning.list_arms(PRESETS["test"])) == 10
    size = 64 * 16 + 16 * 16 + 16 * 10
    for name, values in arms.items():
        assert all(0 <= value <= 100 for value in values["test_accuracy"])
        # exact counts, rounded layer by layer
        if name.endswith("w16-d0.2"):
            np.testing.assert_allclose(values["density"], 0.2, atol=2 / size)
    np.testing.assert_allclose(arms["static-dense-w8-d1"]["density"], 1)
    dense = np.mean(arms["static-dense-w16-d1"]["test_accuracy"])
    assert dense > np.mean(arms["static-erk-w16-d0.2"]["test_accuracy"])
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 * len(arms)

    # a run that was cut off: no summary, two arms missing, a line of an arm that was not kept
    (folder / "summary.json").unlink()
    for name in ("rigl-erk-w16-d0.2", "static-uniform-w8-d0.2"):
        (folder / "arms" / f"{name}.json").unlink()
    execute(EXPERIMENT, cli.parse(EXPERIMENT, ["--resume", str(folder)]))
    again = json.loads((folder / "summary.json").read_text())
    assert again["metrics"] == summary["metrics"]
    assert again["claims"] == summary["claims"]
    resumed = (folder / "metrics.jsonl").read_text().splitlines()
    assert sorted(resumed) == sorted(lines)

    (folder / "arms" / "rigl-erk-w16-d0.2.json").write_text("[1")
    with pytest.raises(SystemExit):
        cli.main(EXPERIMENT, ["--resume", str(folder)])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "rigl-erk-w16-d0.2.json is damaged" in error


def test_ctrl_c_says_how_to_continue(tmp_path):
    run = Run("random_pruning", settings(tmp_path))
    assert isinstance(run.stopping, threading.Event)
    run.stopping.set()
    with pytest.raises(InterruptedRunError, match="stopped before static-dense-w8-d1; continue"):
        random_pruning.run(run.config, run)


def test_arms_of_one_seed_share_everything_but_the_masks():
    sparse, denser = (
        random_pruning.arm_masks(Arm(16, d, "static", "uniform"), 0, 5) for d in (0.1, 0.3)
    )
    for name, layer in sparse.items():
        # the same noise: the sparser mask lies inside the denser one
        assert bool((denser[name]["kernel"] | ~layer["kernel"]).all())
        assert layer["bias"].shape == ()


@pytest.mark.parametrize("criterion", random_pruning.CRITERIA)
def test_the_ratios_of_a_criterion_are_kept_and_its_positions_are_not(criterion):
    own = random_pruning.arm_masks(Arm(16, 0.2, criterion, None), 0, 5)
    drawn = random_pruning.arm_masks(Arm(16, 0.2, "static", criterion), 0, 5)
    kept = sum(int(layer["kernel"].sum()) for layer in own.values())
    assert abs(kept - 0.2 * (64 * 16 + 16 * 16 + 16 * 10)) <= 1
    for name in own:
        assert own[name]["kernel"].sum() == drawn[name]["kernel"].sum()
        assert bool((own[name]["kernel"] != drawn[name]["kernel"]).any())


def test_other_ratios_and_densities_by_flags():
    config = cli.parse(
        EXPERIMENT,
        ["--preset", "test", "--ratio", "erk_plus", "snip", "--density", "0.4", "--method", "rigl"],
    )
    arms = random_pruning.list_arms(config)
    assert Arm(16, 0.4, "static", "erk_plus") in arms
    assert {arm.method for arm in arms if arm.density == 0.2} == {"rigl"}
    accuracies = {arm: [50.0 + arm.width, 60.0] for arm in arms}
    (claim,) = random_pruning.make_claims(config, accuracies)
    assert claim.sentence.startswith("a random erk_plus mask at 60% sparsity")
    assert not claim.holds


def test_claims_are_computed_from_the_accuracies():
    config = PRESETS["laptop"]
    arms = random_pruning.list_arms(config)
    level = {"dense": 98.0, "erk": 90.0, "uniform": 80.0}
    bonus = {"set": 3.0, "rigl": 20.0}

    def accuracy(arm, width=0.0):
        return [level.get(arm.ratio or "", 50.0) + bonus.get(arm.method, 0) + width * arm.width] * 5

    first, ratios, order = random_pruning.make_claims(config, {a: accuracy(a) for a in arms})
    assert (first.holds, ratios.holds, order.holds) == (False, True, False)
    closer = {a: accuracy(a, 0.03 * (a.ratio == "erk" and a.density == 0.1)) for a in arms}
    assert random_pruning.make_claims(config, closer)[0].holds


def test_the_paper_setting_is_checked_as_far_as_it_can_be_built(capsys):
    config = dataclasses.replace(PRESETS["paper"], width=(16, 32), density=(0.1,))
    assert execute(EXPERIMENT, config) is None
    printed = capsys.readouterr().out
    for figure in (
        "270,896 weights in 22 tensors; ERK at density 0.1 keeps 27,090 of them",
        "1,081,440 weights in 22 tensors; ERK at density 0.1 keeps 108,144 of them",
        "a training step on 128 images of 32 x 32 traces",
        "need cifar10 prepared by TFDS, and a training loop of this experiment",
    ):
        assert figure in printed


def test_the_paper_resnet_differs_from_the_first_one_in_its_shortcuts_alone():
    images = ImageConfig(dataset="cifar10", model="resnet20")
    sizes = {}
    for shortcut in ("identity_pad", "projection"):
        params = dict(sj.named_leaves(abstract_params(images, shortcut=shortcut)))
        sizes[shortcut] = {path: params[path].size for path in sj.selected_paths(params)}
    first = sizes["identity_pad"]
    assert (len(first), sum(first.values())) == (20, 268_336)
    assert sizes["projection"] == first | {
        "stages/1/0/shortcut/kernel": 16 * 32,
        "stages/2/0/shortcut/kernel": 32 * 64,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--density", "0"], "density is 0.0; it must be between 0 and 1"),
        (["--at", "128"], "at is '128'; it must look like 128:0.03"),
        (["--at", "8:1.5"], "density is 1.5"),
        (["--method", "magic"], "method is 'magic'; known are static, set, rigl"),
        (["--ratio", "half"], "ratio is 'half'; known are uniform"),
        (["--width", "0"], "width is 0; it must be at least 1"),
        (["--width"], "width"),
        (["--batch", "2000"], "batch is 2000; it must be from 1 to 1257"),
        (["--alpha", "2"], "alpha is 2.0; it must be in [0, 1]"),
        (["--freq", "0"], "freq is 0"),
        (["--mesh", "data=2"], "it runs on 1 device"),
        (["--step", "3"], "Unrecognized options: --step, 3 Perhaps you meant: --steps"),
        (["--ratio", "uniform_plus", "--density", "0.1"], "would get density"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, error_of):
    assert message in error_of(EXPERIMENT, arguments)
