"""`python -m experiments.kernel_heterogeneity`: end to end, dictionaries, bad settings."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.harness.cli import main
from experiments.harness.config import ExperimentError
from experiments.harness.data.images import load_images
from experiments.kernel_heterogeneity.__main__ import EXPERIMENT
from experiments.kernel_heterogeneity.coding import (
    dictionaries,
    draw_crops,
    encode,
    fitted_bandwidths,
    measure,
)
from experiments.kernel_heterogeneity.config import (
    LABELS,
    MINIMUM,
    PRESETS,
    STUDY,
    CodingConfig,
    Config,
    DownstreamConfig,
)
from experiments.kernel_heterogeneity.downstream import code_images, make_claims, maps_of
from sparsejax import coding

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


def test_classifiers_of_codes_and_their_resumption(tmp_path, capsys):
    command = ["--variant", "downstream", "--preset", "test", "--out", str(tmp_path)]
    main(EXPERIMENT, command)
    assert "a classifier of heterogeneous codes is at most 1 point" in capsys.readouterr().out
    (folder,) = (tmp_path / "kernel_heterogeneity").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["preset"] == "downstream_test"
    metrics = summary["metrics"]
    assert list(metrics) == ["full-0", "full-0.5", "thin-0", "thin-0.5"]
    for name in ("full", "thin"):
        active = [metrics[f"{name}-{cutoff}"]["0.003"]["active"][0] for cutoff in ("0", "0.5")]
        assert active[0] > 1.5 * active[1] > 0
        assert 0 <= metrics[f"{name}-0"]["0.003"]["test_accuracy"][0] <= 100
    kept = folder / "arms" / "thin-0.5-lr0.003.json"
    before = json.loads(kept.read_text())
    kept.unlink()  # the training is there, and codes are the same again
    main(EXPERIMENT, ["--resume", str(folder)])
    assert json.loads(kept.read_text()) == before


def test_maps_are_codes_of_the_image():
    filters = dictionaries(TEST)["full"]
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    same = {field.name: getattr(TEST, field.name) for field in dataclasses.fields(CodingConfig)}
    config = dataclasses.replace(DownstreamConfig(**same), cutoffs=(0.0, 0.4))
    found = maps_of(images, filters=filters, config=config)
    assert found["maps"].shape == (3, 2, 8, 8, TEST.kernels)
    assert found["maps"].dtype == jnp.float16
    grey = jnp.asarray(images[..., 0]) / 255
    ready = np.stack([
        coding.local_contrast_normalise(jax.image.resize(image, (16, 16), "bilinear"))[0]
        for image in grey
    ])  # fmt: skip
    codes = np.asarray(encode(jnp.asarray(ready), filters, solver=STUDY, config=TEST))
    for i, cutoff in enumerate((0.0, 0.4)):
        kept = np.where(np.abs(codes) < cutoff, 0, codes)
        active = (kept != 0).sum((1, 2, 3)) / 16**2
        np.testing.assert_allclose(found["active"][:, i], active, atol=0.02)
        small = jax.image.resize(jnp.asarray(kept), (3, 8, 8, TEST.kernels), "bilinear")
        np.testing.assert_allclose(found["maps"][:, i], small, atol=2e-2)


def test_maps_are_scaled_and_zeros_stay():
    config = dataclasses.replace(PRESETS["downstream_test"], cutoffs=(0.5,))
    data = load_images("small_digits")
    few = dataclasses.replace(
        data,
        train={name: array[:64] for name, array in data.train.items()},
        test={name: array[:5] for name, array in data.test.items()},
        examples=64,
    )
    maps, active = code_images(config, few, dictionaries(config)["thin"])[0.5]
    assert (maps.channels, maps.examples, len(maps.test["image"])) == (12, 64, 5)
    rms = np.sqrt(np.square(maps.train["image"], dtype=np.float64).mean((0, 1, 2)))
    np.testing.assert_allclose(rms[rms > 0], 1, rtol=1e-2)
    assert (maps.train["image"] == 0).mean() > 0.3
    assert 0 < active < 12
    streamed = dataclasses.replace(few, fixed=False)
    with pytest.raises(ExperimentError, match="small_digits is not held in memory; its codes"):
        code_images(config, streamed, dictionaries(config)["thin"])
    small = dataclasses.replace(config, enlarge=1, size=12)
    with pytest.raises(ExperimentError, match="enlarge is 1: images of 8 pixels are coded"):
        code_images(small, few, dictionaries(small)["thin"])


def test_downstream_claims_are_computed_from_the_figures():
    config = PRESETS["downstream"]

    def claimed(full, thin, *, active=1.0, dropped=(90.0, 90.0)):
        arms = {"full-0": (full, active), "full-0.5": (dropped[0], 0.5), "thin-0": (thin, 2.0),
                "thin-0.5": (dropped[1], 1.0)}  # fmt: skip
        found = {
            arm: {1e-3: {"test_accuracy": [a] * 2, "test_loss": [0.1] * 2, "active": [n] * 2}}
            for arm, (a, n) in arms.items()
        }
        return [claim.holds for claim in make_claims(config, found)]

    assert claimed(95.0, 95.5) == [True, True]
    assert claimed(94.0, 95.5) == [False, True]
    assert claimed(95.0, 95.5, active=2.5) == [False, True]
    assert claimed(95.0, 95.0, dropped=(80.0, 90.0)) == [True, False]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model": "mlp", "optimizer": "sgd"}, "model is mlp; name a backbone, which takes maps"),
        ({"enlarge": 0}, "enlarge is 0; it must be at least 1"),
        ({"cutoffs": (0.1, 0.1)}, r"cutoffs are \(0.1, 0.1\); give different ones from 0"),
        ({"learning_rates": ()}, r"learning_rates are \(\); give positive ones that differ"),
        ({"size": 11}, "size is 11; it must be even"),
    ],
)
def test_downstream_config_errors(overrides, message):
    with pytest.raises(ExperimentError, match=message):
        dataclasses.replace(PRESETS["downstream"], **overrides)


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
        ({"learn_steps": -1}, "learn_steps is -1; it must not be negative"),
        ({"cutoffs": (0.0,)}, r"cutoffs are \(0.0,\); give positive ones"),
    ],
)
def test_config_errors(overrides, message):
    with pytest.raises(ExperimentError, match=message):
        dataclasses.replace(Config(), **overrides)


def test_the_papers_setting_traces():
    lines = EXPERIMENT.check(PRESETS["paper"])
    assert "(1, 256, 256, 144)" in lines[0]
    lines = EXPERIMENT.check(PRESETS["downstream_paper"])
    assert "resnet18_cifar on codes (32, 32, 144) of cifar10" in lines[0]
    assert "coding and one training step traced" in lines[1]
