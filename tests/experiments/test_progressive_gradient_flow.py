"""Progressive gradient flow end to end: results, resuming, a vision transformer, bad input."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import progressive_gradient_flow as experiment
from experiments.harness import cli
from experiments.harness.run import execute
from experiments.progressive_gradient_flow import EXPERIMENT, PRESETS

TEST = PRESETS["test"]


@pytest.fixture(scope="module", autouse=True)
def datasets(tmp_path_factory):
    """Datasets of this module, away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEJAX_DATA", str(tmp_path_factory.mktemp("datasets")))
        yield


def only_run(out):
    (folder,) = (out / experiment.SLUG).iterdir()
    return folder


def test_the_whole_experiment_and_its_resumption(tmp_path, capsys):
    execute(EXPERIMENT, dataclasses.replace(TEST, out=str(tmp_path)))
    folder = only_run(tmp_path)
    assert "claim: at 1:8 MdGf-Exp beats SR-STE 2e-4" in capsys.readouterr().out
    for name in ("accuracy", "gradient_variance", "accuracy_by_noise", "noise_by_sparsity"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
    summary = json.loads((folder / "summary.json").read_text())
    assert len(summary["claims"]) == 4
    arms = summary["metrics"]
    assert set(arms) == {*TEST.recipe, "mdgf_exp@4"}
    noise = {name: np.mean(values["0.1"]["grad_variance"]) for name, values in arms.items()}
    # the masked gradient fades with the mask, the straight-through one does not
    assert noise["mdgf_exp"] < 0.5 * noise["mdgf_exp,straight_through"]
    assert summary["claims"][2]["holds"] == (noise["mdgf_exp"] < noise["srste=2e-4"] / 10)

    (folder / "summary.json").unlink()
    (folder / "arms" / "mdgf_exp-lr0.1.json").unlink()
    execute(EXPERIMENT, cli.parse(EXPERIMENT, ["--resume", str(folder)]))
    again = json.loads((folder / "summary.json").read_text())
    assert again["metrics"] == arms
    assert again["claims"] == summary["claims"]


def test_a_vision_transformer_has_sparse_feed_forward_kernels(tmp_path):
    config = dataclasses.replace(
        TEST, out=str(tmp_path), model="vit_tiny_patch4", recipe=("mdgf_exp",), epochs=1, seeds=1,
        batch=400, optimizer="adamw", lr=(1e-3,), augment="none",
    )  # fmt: skip
    execute(EXPERIMENT, config)
    values = json.loads((only_run(tmp_path) / "summary.json").read_text())["metrics"]["mdgf_exp"]
    assert 0 <= values["0.001"]["test_accuracy"][0] <= 100
    kernel = np.zeros((2, 8, 8), np.float32)
    chosen = {
        where: [
            path
            for path in ("blocks/ffn/up_proj/kernel", "blocks/attention/q_proj/kernel",
                         "blocks/attention/o_proj/kernel", "patch_embed/kernel", "head/kernel")
            if experiment.scope(dataclasses.replace(config, sparsity_loc=where))(path, kernel)
        ]
        for where in ("FF", "FFQKV", "all")
    }  # fmt: skip
    assert [len(paths) for paths in chosen.values()] == [1, 2, 3]


def test_recipes_are_read_with_their_options():
    config = dataclasses.replace(TEST, epochs=20, noise_m=(0,))
    found = dataclasses.replace(
        config, recipe=("srste=2e-3", "mdgf_linear,dense=0.05,fine=0.5,coef=0.01", "ste",
                        "sdgf_geometric,frames=2,dense=0.2"),
    ).arms(steps_per_epoch=7)  # fmt: skip
    srste, linear, ste, geometric = found.values()
    assert (srste.srste_decay, srste.dense_epochs) == (2e-3, 0)
    assert (linear.dense_epochs, linear.fine_tune_epochs, linear.decay_coef) == (1, 10, 0.01)
    assert ste.dense_epochs == 0
    assert geometric.stages() == ((4, 2, 16), (11, 1, 8))
    assert {arm.steps_per_epoch for arm in found.values()} == {7}
    labels = [experiment.label_of(name) for name in found]
    assert labels[:2] == ["SR-STE 2e-3", "MdGf-Linear, dense 0.05, fine 0.5, coef 0.01"]


def test_the_paper_setting_is_checked_as_far_as_it_can_be_built(capsys):
    assert execute(EXPERIMENT, PRESETS["paper"]) is None
    printed = capsys.readouterr().out
    assert "vit_base_patch16 on imagenet2012, 86,567,656 parameters" in printed
    assert "one training step traced" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "magic"], "recipe 'magic': recipe is 'magic'; allowed are mdgf_exp"),
        (["--recipe", "ste=1"], "a pull is for srste"),
        (["--recipe", "srste=-1"], "srste_decay is -1.0"),
        (["--recipe", "mdgf_exp,fast"], "'fast' is none of dense, fine, frames, coef"),
        (["--recipe", "mdgf_exp,dense=x"], "could not convert string to float: 'x'"),
        (["--recipe", "mdgf_exp,dense=1"], "their sum must be below 1"),
        (["--dense-fraction", "-0.1"], "neither may be negative"),
        (["--recipe", "sdgf_geometric"], "stage 0 (8:64) needs groups of 64 along axis -2"),
        (["--lr", "0"], "lr is (0.0,); give positive values"),
        (["--width", "0"], "width is 0"),
        (["--noise-m", "1"], "noise_m is (1,); give sizes of 2 or more, or 0"),
        (["--update-every", "0"], "update_every is 0"),
        (["--sparsity-loc", "QK"], "sparsity-loc"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, error_of, unchecked):
    assert message in error_of(EXPERIMENT, arguments)
