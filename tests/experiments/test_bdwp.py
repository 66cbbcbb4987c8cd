"""The BDWP experiment end to end: results, resuming, a backbone, the modelled array, bad input."""

import dataclasses
import json

import pytest

import sparsejax as sj
from experiments.bdwp.__main__ import EXPERIMENT
from experiments.bdwp.config import PRESETS
from experiments.bdwp.laptop import mac_ratio
from experiments.bdwp.report import make_claims
from experiments.harness import cli
from experiments.harness.run import execute

TEST = PRESETS["test"]


@pytest.fixture(scope="module", autouse=True)
def datasets(tmp_path_factory):
    """Datasets of this module, away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEJAX_DATA", str(tmp_path_factory.mktemp("datasets")))
        yield


def only_run(out):
    (folder,) = (out / "bdwp").iterdir()
    return folder


def test_the_whole_experiment_and_its_resumption(tmp_path, capsys):
    execute(EXPERIMENT, dataclasses.replace(TEST, out=str(tmp_path)))
    folder = only_run(tmp_path)
    printed = capsys.readouterr().out
    for piece in ("BDWP 2:8", "resnet9", "weights at 2:4: 4.5 bytes an entry and step pre-gen",
                  "claim: BDWP at 2:8 loses at most 1.5 points"):  # fmt: skip
        assert piece in printed
    for name in ("accuracy", "accuracy_by_macs", "speed_up"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
    summary = json.loads((folder / "summary.json").read_text())
    claims = {claim["sentence"]: claim["holds"] for claim in summary["claims"]}
    assert len(claims) == 5
    assert claims["pre-generated weights give the same training bit for bit after 5 steps"]
    metrics = summary["metrics"]
    assert set(metrics) == {"dense", "srste-2of8", "sdgp-2of8", "sdwp-2of8", "bdwp-2of8", "array"}
    macs, speed = metrics["array"]["resnet9"]["bdwp"]
    assert macs == pytest.approx(0.502, abs=1e-3)
    assert 1.5 < speed < 2

    (folder / "summary.json").unlink()
    (folder / "arms" / "bdwp-2of8-lr0.1.json").unlink()
    execute(EXPERIMENT, cli.parse(EXPERIMENT, ["--resume", str(folder)]))
    again = json.loads((folder / "summary.json").read_text())
    assert again["metrics"] == metrics
    assert again["claims"] == summary["claims"]


def test_the_arithmetic_of_the_page():
    config = PRESETS["laptop"]
    ratios = [mac_ratio(config, method, sj.NM(2, 8)) for method in config.method]
    assert ratios == pytest.approx([1, 0.758, 0.758, 0.758, 0.515], abs=1e-3)


def test_a_backbone_takes_the_products_of_the_method(tmp_path):
    config = dataclasses.replace(TEST, out=str(tmp_path), model="vit_tiny_patch4", epochs=1,
                                 seeds=1, batch=400, method=("bdwp",), lr=(0.01,))  # fmt: skip
    execute(EXPERIMENT, config)
    metrics = json.loads((only_run(tmp_path) / "summary.json").read_text())["metrics"]
    assert 0 <= metrics["bdwp-2of8"]["0.01"]["test_accuracy"][0] <= 100


def test_the_paper_setting_is_checked_as_far_as_it_can_be_built(capsys):
    assert execute(EXPERIMENT, PRESETS["paper"]) is None
    printed = capsys.readouterr().out
    for piece in ("resnet18 on imagenet2012, 11,689,512 parameters", "19 layers are 2:8 in both",
                  "one training step traced"):  # fmt: skip
        assert piece in printed


def test_claims_are_computed_from_the_figures():
    config = PRESETS["laptop"]

    def arm(accuracy, macs=0.5):
        values = {"test_accuracy": [accuracy] * 4, "test_loss": [0.1] * 4, "macs": [macs] * 4}
        return dict.fromkeys(config.lr, values)

    found = {"dense": arm(98.0, 1.0), "srste-2of8": arm(97.0), "bdwp-2of8": arm(97.0)}
    costs = {"resnet9": {"bdwp": (0.5, 1.9)}, "vgg19": {"bdwp": (0.5, 1.7)}}
    claims = make_claims(config, found, costs, exact=True)
    assert [claim.holds for claim in claims] == [True] * 5
    found["bdwp-2of8"] = arm(95.0, 0.6)
    costs["vgg19"]["bdwp"] = (0.5, 1.5)
    claims = make_claims(config, found, costs, exact=False)
    assert [claim.holds for claim in claims] == [False] * 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "magic"], "method is 'magic'; known are dense, srste"),
        (["--pattern", "8"], "pattern is '8'; it must look like 2:4"),
        (["--pattern", "9:8"], "n is 9 and m is 8"),
        (["--pattern", "1:5"], "not a multiple of m = 5"),
        (["--array", "32"], "array is '32'; it must look like 32x32"),
        (["--array", "0x8"], "array is '0x8'"),
        (["--adder-latency", "0"], "adder_latency is 0; it must be at least 1"),
        (["--cost-models", "alexnet"], "cost_models is 'alexnet'; known are resnet9"),
        (["--decay", "-1"], "decay is -1.0"),
        (["--pregenerate-steps", "-1"], "pregenerate_steps -1; neither may be negative"),
        (["--lr", "0"], "lr is (0.0,)"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, error_of):
    assert message in error_of(EXPERIMENT, arguments)
