"""The SR-STE experiment: results, resuming, backbones, the setting of the paper, bad input."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax as sj
from experiments import sr_ste
from experiments.harness import cli
from experiments.harness.run import execute
from experiments.sr_ste import EXPERIMENT, PRESETS, OutputMajor

TEST = PRESETS["test"]


@pytest.fixture(scope="module", autouse=True)
def datasets(tmp_path_factory):
    """Datasets of this module, away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEJAX_DATA", str(tmp_path_factory.mktemp("datasets")))
        yield


def only_run(out):
    (folder,) = (out / "sr_ste").iterdir()
    return folder


def test_the_whole_experiment_and_its_resumption(tmp_path, capsys):
    execute(EXPERIMENT, dataclasses.replace(TEST, out=str(tmp_path)))
    folder = only_run(tmp_path)
    printed = capsys.readouterr().out
    for piece in ("SR-STE 0.002", "ASP", "claim: at 1:8 SR-STE 0.002 is as accurate as STE"):
        assert piece in printed
    for name in ("accuracy", "sad"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["seeds"] == 2
    assert len(summary["claims"]) == 3
    assert summary["card"]["granularity"] == "n_m"
    arms = summary["metrics"]
    assert set(arms) == {"dense", "asp", "ste", "srste-0.002", "srste-0.02"}
    sads = [np.mean(arms[name]["0.1"]["sad"]) for name in ("ste", "srste-0.002", "srste-0.02")]
    assert sads[0] > sads[1] > sads[2] > 0
    assert summary["claims"][1]["holds"] == (sads[1] < sads[0] / 2)

    (folder / "summary.json").unlink()
    (folder / "arms" / "ste-lr0.1.json").unlink()
    execute(EXPERIMENT, cli.parse(EXPERIMENT, ["--resume", str(folder)]))
    again = json.loads((folder / "summary.json").read_text())
    assert again["metrics"] == summary["metrics"]
    assert again["claims"] == summary["claims"]


def test_asp_is_dense_half_way_and_holds_its_mask_after():
    params, order, data = sr_ste.digits_setup(TEST, 0, layers=2, hidden=16)
    found = sr_ste.train_digits(params, order, data, jnp.float32(0.1), jnp.float32(0),
                                method="asp", config=TEST)  # fmt: skip
    # the mask by magnitude changes while training is dense, and not after the mask is set
    first, second = (int(n) for n in found["flips_curve"])
    assert first > 0
    assert second == 0


def test_flat_groups_run_over_the_pixels_of_an_output():
    scores = jax.random.uniform(jax.random.key(0), (3, 3, 4, 2))  # HWIO: 36 entries an output
    mask = OutputMajor(1, 12).mask(scores)
    np.testing.assert_array_equal(mask.sum((0, 1, 2)), [3, 3])
    outputs = np.asarray(mask).transpose(3, 0, 1, 2).reshape(2, 3, 12)
    np.testing.assert_array_equal(outputs.sum(-1), 1)
    with pytest.raises(ValueError, match="not a multiple of m = 5"):
        OutputMajor(1, 5).mask(scores)


def test_a_backbone_is_trained_and_its_first_layer_stays_dense(tmp_path, capsys):
    config = dataclasses.replace(
        TEST, out=str(tmp_path), model="resnet20", m=4, n=2, method=("ste",), epochs=1, seeds=1,
        batch=400, augment="crop_flip", color_jitter=0.2,
    )  # fmt: skip
    execute(EXPERIMENT, config)
    summary = json.loads((only_run(tmp_path) / "summary.json").read_text())
    values = summary["metrics"]["ste"]["0.1"]
    assert 0 <= values["test_accuracy"][0] <= 100
    assert 0 <= values["sad"][0] < 1
    scope = sr_ste.default_scope(config)
    kernel = np.zeros((3, 3, 4, 4), np.float32)
    assert scope("stages/0/0/conv1/kernel", kernel)
    assert not scope("stem/kernel", kernel)
    assert not scope("head/kernel", kernel[0, 0])
    assert sr_ste.default_scope(dataclasses.replace(config, sparse_stem=True))(
        "stem/kernel", kernel
    )


def test_the_views_are_those_of_the_library():
    params = {"a": {"kernel": jax.random.normal(jax.random.key(0), (8, 4))}}
    for method, pull in (("ste", 0.0), ("srste", 0.3)):
        view = sr_ste.sparse_view(params, method, pull, sj.NM(2, 4), None)
        wanted = sj.sr_ste(params, sj.NM(2, 4), decay=pull)
        np.testing.assert_array_equal(view["a"]["kernel"], wanted["a"]["kernel"])
    assert sr_ste.sparse_view(params, "asp", 0.0, sj.NM(2, 4), None) is params


def test_the_paper_setting_is_checked_as_far_as_it_can_be_built(capsys):
    assert execute(EXPERIMENT, PRESETS["paper"]) is None
    printed = capsys.readouterr().out
    for piece in ("resnet50 on imagenet2012, 25,557,032 parameters, 120 epochs of 5,004 steps",
                  "one training step traced", "prepare it once with tensorflow-cpu"):  # fmt: skip
        assert piece in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "magic"], "method is 'magic'; known are dense, asp, ste, srste"),
        (["--lambda-w", "-1"], "all must be positive"),
        (["--lr"], "lr"),
        (["--n", "3", "--m", "2"], "n is 3 and m is 2"),
        (["--m", "5"], "axis 0 of shape (64, 16) has length 64, not a multiple of m = 5"),
        (["--batch", "2000"], "batch is 2000; it must be from 1 to 1000"),
        (["--epochs", "0"], "epochs is 0; it must be at least 1"),
        (["--width", "0"], "width is 0"),
        (["--warmup-epochs", "9"], "warmup_epochs is 9; it must be at least 0 and below epochs"),
        (["--momentum", "1"], "momentum is 1.0; it must be in [0, 1)"),
        (["--weight-decay", "-1"], "weight_decay is -1.0"),
        (["--mesh", "data=2"], "mesh and multihost are for backbones"),
        (["--optimizer", "adamw"], "the mlp takes sgd"),
        (["--model", "resnet19"], "model is 'resnet19'; known are mlp, resnet18"),
        (["--model", "vit_tiny_patch3"], "model vit_tiny_patch3: "),
        (["--dataset", "cifar10"], "the mlp is for small_digits, name a backbone"),
        (["--dataset", "cifar10", "--model", "resnet20"], "prepare it once with tensorflow-cpu"),
        (["--dataset", "python_text", "--model", "resnet20"], "not image and label"),
        (["--image-size", "9", "--model", "resnet20"], "are 8 pixels wide, not 9"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, error_of):
    assert message in error_of(EXPERIMENT, arguments)


def test_claims_are_computed_from_the_figures():
    config = PRESETS["laptop"]

    def arm(accuracy, sad):
        values = {"test_accuracy": [accuracy] * 4, "test_loss": [0.1] * 4, "sad": [sad] * 4}
        return dict.fromkeys(config.lr, values)

    found = {"asp": arm(90.0, 0), "ste": arm(95.0, 0.4), "srste-0.002": arm(94.8, 0.1),
             "srste-0.006": arm(94, 0.05), "srste-0.02": arm(94, 0.02)}  # fmt: skip
    assert [c.holds for c in sr_ste.make_claims(config, found)] == [True, True, True]
    found["srste-0.002"] = arm(94.0, 0.3)
    assert [c.holds for c in sr_ste.make_claims(config, found)] == [False, False, True]
    alone = dataclasses.replace(config, method=("dense",))
    (claim,) = sr_ste.make_claims(alone, {"dense": arm(98.0, 0)})
    assert not claim.holds
