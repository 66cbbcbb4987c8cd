"""`python -m experiments.beyond_l1`: end to end, the comparison at equal error, bad settings."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from experiments.beyond_l1.__main__ import EXPERIMENT, load_patches
from experiments.beyond_l1.config import PRESETS, Config
from experiments.beyond_l1.report import l1_active, make_claims, matched
from experiments.harness.cli import main
from experiments.harness.config import ExperimentError
from experiments.harness.natural_images import load_photos

TEST = PRESETS["test"]


def test_end_to_end(tmp_path, capsys):
    main(EXPERIMENT, ["--preset", "test", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert "claim: at the error nearest 0.02" in text
    (folder,) = (tmp_path / "beyond_l1").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    arm = summary["metrics"]["cel0"]["0.2"]
    assert all(0 < error < 1 for error in arm["error"])
    assert all(0 < active < TEST.atoms for active in arm["active"])
    for name in ("activity", "dictionaries", "selectivity", "gabor_shapes"):
        assert (folder / f"{name}.png").stat().st_size > 5000
    stamps = {f: f.stat().st_mtime_ns for f in (folder / "arms").iterdir()}
    assert len(stamps) == 3
    main(EXPERIMENT, ["--resume", str(folder)])
    assert {f: f.stat().st_mtime_ns for f in (folder / "arms").iterdir()} == stamps


def found_of(l1, other):
    """Arms of two seeds with given `(error, active)`."""

    def arms(points):
        return {
            float(i): {"error": [e, e], "active": [a, a], "selective": [0.9, 0.9]}
            for i, (e, a) in enumerate(points, 1)
        }

    return {"l1": arms(l1), "cel0": arms(other)}


def test_penalties_are_compared_at_equal_error():
    config = dataclasses.replace(TEST, seeds=2)
    found = found_of([(0.01, 80.0), (0.04, 40.0)], [(0.02, 30.0), (0.001, 90.0)])
    assert l1_active(config, found, 0, 0.02) == pytest.approx(60)
    assert l1_active(config, found, 0, 0.001) is None
    assert matched(config, found, "cel0") == [(1.0, 0.02, pytest.approx(0.5))] * 2
    assert make_claims(config, found)[0].holds
    dense = found_of([(0.01, 80.0), (0.04, 40.0)], [(0.02, 55.0)])
    assert not make_claims(config, dense)[0].holds
    outside = found_of([(0.01, 80.0), (0.04, 40.0)], [(0.2, 5.0)])
    claim = make_claims(config, outside)[0]
    assert not claim.holds
    assert "outside l1's errors" in claim.ours


def test_patches_are_of_one_scale_and_not_flat():
    photos = load_photos("sklearn")
    assert [photo.ndim for photo in photos] == [2, 2]
    train, test = load_patches(TEST, photos, 0)
    np.testing.assert_allclose(train.mean(axis=1), 0, atol=1e-5)
    assert train.std(axis=1).min() > TEST.flat
    assert len(test) < TEST.test_patches
    again, _ = load_patches(TEST, photos, 0)
    np.testing.assert_array_equal(train, again)


def test_a_folder_of_photos(tmp_path):
    with pytest.raises(ExperimentError, match="holds no image"):
        load_photos(str(tmp_path))
    Image.fromarray(np.full((9, 8, 3), 51, np.uint8)).save(tmp_path / "a.png")
    (grey,) = load_photos(str(tmp_path))
    np.testing.assert_allclose(grey, np.full((9, 8), 0.2), rtol=1e-6)
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(ExperimentError, match=r"b.png cannot be read as an image"):
        load_photos(str(tmp_path))
    with pytest.raises(ExperimentError, match="photos is 'nothing'; it must be sklearn, a folder"):
        load_photos("nothing")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"penalty": ("l0",)}, "allowed are l1, l2/3, l1/2, l0, cel0, and l1 must be there"),
        ({"penalty": ("l1", "l3")}, r"penalty is \('l1', 'l3'\)"),
        ({"lam": (0.0,)}, r"lam is \(0.0,\); give positive numbers that differ"),
        ({"l1_lam": (0.1,)}, r"l1_lam is \(0.1,\); interpolation needs two"),
        ({"patch": 3}, "patch is 3; it must be at least 4"),
        ({"atoms": 0}, "atoms is 0; it must be at least 1"),
        ({"f0": 0.0}, "f0 is 0.0, flat 0.1 and target_error 0.02"),
        ({"gabor_fits": -1}, "gabor_fits is -1; it must not be negative"),
    ],
)
def test_config_errors(overrides, message):
    with pytest.raises(ExperimentError, match=message):
        dataclasses.replace(Config(), **overrides)


def test_the_papers_setting_traces():
    lines = EXPERIMENT.check(PRESETS["paper"])
    assert len(lines) == 6
    assert "(256, 1024)" in lines[0]
