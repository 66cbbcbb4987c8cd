"""`python -m experiments.kernel_heterogeneity`: end to end, dictionaries, bad settings."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.harness.cli import main
from experiments.harness.config import ExperimentError
from experiments.kernel_heterogeneity.__main__ import EXPERIMENT
from experiments.kernel_heterogeneity.coding import (
    dictionaries,
    draw_crops,
    encode,
    fitted_bandwidths,
    measure,
)
from experiments.kernel_heterogeneity.config import LABELS, MINIMUM, PRESETS, STUDY, Config

TEST = PRESETS["test"]


def test_end_to_end(tmp_path, capsys):
    main(EXPERIMENT, ["--preset", "test", "--out", str(tmp_path)])
    assert "claim: heterogeneous kernels need less than .7" in capsys.readouterr().out
    (folder,) = (tmp_path / "kernel_heterogeneity").iterdir()
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    assert set(metrics[MINIMUM]) == set(LABELS)
    assert set(metrics[STUDY]) == set(LABELS) - {"full_learned", "thin_learned"}
    for arm in metrics[MINIMUM].values():
        assert np.shape(arm["psnr"]) == (2, 1)
    assert np.shape(metrics[STUDY]["full"]["psnr"]) == (2, 2)
    for name in ("resilience", "crops", "kernels", "bandwidths"):
        assert (folder / f"{name}.png").stat().st_size > 5000
    stamps = {f: f.stat().st_mtime_ns for f in (folder / "arms").iterdir()}
    assert len(stamps) == 10
    main(EXPERIMENT, ["--resume", str(folder)])
    assert {f: f.stat().st_mtime_ns for f in (folder / "arms").iterdir()} == stamps


def test_dictionaries_are_those_of_the_study():
    made = dictionaries(Config())
    assert {filters.shape for filters in made.values()} == {(12, 12, 144)}
    norms = jnp.linalg.norm(made["full"].reshape(144, -1), axis=0)
    assert 1.4 < float(norms.min()) < 1.6
    assert 3.8 < float(norms.max()) < 4.0
    found = fitted_bandwidths(Config(), made["full"])
    expected = np.tile(np.repeat(5.0 * np.arange(1, 7), 2), 12)
    # below ten degrees a kernel of 12 pixels hardly changes
    assert np.mean(np.abs(np.asarray(found) - expected) <= 5.1) > 0.9


def test_dropping_coefficients_makes_codes_sparser_and_worse():
    filters = dictionaries(TEST)["full"]
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(2, 24, 24)), jnp.float32)
    codes = encode(images, filters, solver=STUDY, config=TEST)
    found = measure(images, codes, filters, jnp.float32(0.01), jnp.asarray([0.01, 0.1, 0.3]))
    assert bool((jnp.diff(found["dropped_sparseness"], axis=0) >= 0).all())
    assert bool((jnp.diff(found["dropped_psnr"], axis=0) <= 0).all())
    np.testing.assert_allclose(found["active"], (codes != 0).sum(axis=(1, 2, 3)) / 24**2, rtol=1e-4)


def test_crops_must_fit():
    photos = [np.zeros((20, 40), np.float32)]
    with pytest.raises(ExperimentError, match=r"crop is 24; an image has \(20, 40\) pixels"):
        draw_crops(TEST, photos, np.random.default_rng(0), 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"size": 11}, "size is 11; it must be even"),
        ({"crop": 8}, "crop is 8; it must be at least 16 and the size of a kernel, 12"),
        ({"relax": 2.0}, r"relax is 2.0; it must be in \(0, 2\)"),
        ({"lam": 0.0}, "lam is 0.0; it must be positive"),
        ({"crops": 0}, "crops is 0; it must be at least 1"),
        ({"learn_steps": -1}, "learn_steps is -1 and tol 0.0001; neither may be negative"),
        ({"cutoffs": (0.0,)}, r"cutoffs are \(0.0,\); give positive ones"),
    ],
)
def test_config_errors(overrides, message):
    with pytest.raises(ExperimentError, match=message):
        dataclasses.replace(Config(), **overrides)


def test_the_papers_setting_traces():
    lines = EXPERIMENT.check(PRESETS["paper"])
    assert "(1, 256, 256, 144)" in lines[0]
