"""Images as batches, augmentation, schedules, and the training of backbones over a mesh."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.harness import images
from experiments.harness.config import ExperimentError
from experiments.harness.data import images as data_images
from experiments.harness.images import ImageConfig, Method
from experiments.harness.run import Run
from experiments.harness.sharding import make_mesh
from sparsejax.models import ViT, vit_config

CONFIG = ImageConfig(preset="test", model="vit_tiny_patch4", batch=320, epochs=1, augment="none",
                     warmup_epochs=0)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def datasets(tmp_path_factory):
    """Datasets of this module, away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEJAX_DATA", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def digits(datasets):
    return data_images.load_images("small_digits")


def tiny(rngs):
    config = vit_config("tiny", patch_size=4, image_size=8, in_channels=1, num_classes=10,
                        d_model=16, n_heads=2, n_layers=1, d_ff=16)  # fmt: skip
    return ViT(config, rngs=rngs)


def test_images_in_memory(digits):
    assert (digits.classes, digits.side, digits.channels, digits.examples) == (10, 8, 1, 1437)
    assert digits.fixed
    batches = digits.batches(batch=64, seed=0)
    first = next(batches)
    assert first["image"].shape == (64, 8, 8, 1)
    assert first["image"].dtype == np.uint8
    state = batches.get_state()
    following = next(batches)
    again = digits.batches(batch=64, seed=0)
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["image"], following["image"])
    seen = list(digits.test_batches(100))
    assert [len(b["label"]) for b in seen] == [100] * 4
    assert sum(int((b["label"] >= 0).sum()) for b in seen) == 360


def test_images_that_do_not_fit_in_memory_are_read_and_cropped(digits, monkeypatch):
    monkeypatch.setattr(data_images, "IN_MEMORY", 0)
    streamed = data_images.load_images("small_digits")
    assert not streamed.fixed
    assert (streamed.side, streamed.examples) == (8, 1437)
    batches = streamed.batches(batch=16, seed=0)
    state = batches.get_state()
    batch = next(batches)
    assert batch["image"].shape == (16, 8, 8, 1)
    batches.set_state(state)
    np.testing.assert_array_equal(next(batches)["label"], batch["label"])
    (last,) = streamed.test_batches(360)
    np.testing.assert_array_equal(last["label"], next(digits.test_batches(360))["label"])


@pytest.mark.parametrize("shape", [(40, 60, 3), (90, 30, 3), (8, 8, 1), (3, 200, 3)])
def test_crops_of_any_image_have_the_same_shape(shape):
    rng = np.random.default_rng(0)
    record = {"image": rng.integers(0, 256, shape, np.uint8), "label": 7}
    for crop in (
        data_images._central_crop(record, side=16),
        *(data_images._random_crop(record, rng, side=16) for _ in range(5)),
    ):
        assert crop["image"].shape == (16, 16, shape[-1])
        assert crop["label"] == 7


def test_the_rate_rises_and_falls():
    config = dataclasses.replace(CONFIG, epochs=10, warmup_epochs=2)
    rate = jax.vmap(images.learning_rate(config, 10, 0.5))(jnp.arange(100))
    np.testing.assert_allclose(rate[:20], 0.5 * np.arange(20) / 20, rtol=1e-5)
    np.testing.assert_allclose(rate[20], 0.5, rtol=1e-5)
    assert np.all(np.diff(rate[20:]) < 0)
    assert rate[-1] < 0.001


def test_augmentation_changes_each_image_for_itself():
    x = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    key = jax.random.key(1)
    np.testing.assert_array_equal(images.augmented(key, x, CONFIG), x)
    flipped = images.augmented(key, x, dataclasses.replace(CONFIG, augment="crop_flip"))
    assert flipped.shape == x.shape
    # every image is a shift by at most 2 of itself or of its mirror
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    for i, image in enumerate(np.asarray(flipped)):
        found = [
            np.allclose(image, padded[i, dy : dy + 16, dx : dx + 16][:, ::way])
            for dy in range(5)
            for dx in range(5)
            for way in (1, -1)
        ]
        assert any(found)
    jittered = images.augmented(key, x, dataclasses.replace(CONFIG, color_jitter=0.4))
    assert not np.allclose(jittered, x)
    assert np.isfinite(jittered).all()


def test_training_over_a_mesh_is_that_of_one_device(digits, tmp_path):
    found = []
    for number, text in enumerate([None, "data=8"]):
        mesh = make_mesh(text)
        run = Run("images", dataclasses.replace(CONFIG, out=str(tmp_path / str(number))))
        trainer = images.compile_trainer(CONFIG, digits, Method(tiny), mesh)
        found.append(
            images.train_backbone(run, "t", CONFIG, digits, trainer, seed=0, peak=0.1, mesh=mesh,
                                  slug="images")
        )  # fmt: skip
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 4


def test_batch_statistics_follow_training_and_masters_stay_float32(digits):
    config = dataclasses.replace(CONFIG, model="resnet20", dtype="bfloat16", batch=16)

    def build(rngs):
        return images.build_backbone(config, classes=10, side=8, channels=1, rngs=rngs,
                                     stage_sizes=(1,), base_width=8)  # fmt: skip

    trainer = images.make_trainer(config, Method(build), steps_per_epoch=2, mean=digits.mean,
                                  deviation=digits.deviation)  # fmt: skip
    state = trainer.init(0, 0.1)
    after, metrics = jax.jit(trainer.step)(state, next(digits.batches(batch=16, seed=0)))
    assert np.isfinite(metrics["loss"])
    assert {leaf.dtype for leaf in jax.tree.leaves(after["params"])} == {jnp.dtype("float32")}
    before = jax.tree.leaves(nnx.to_pure_dict(state["rest"]))
    moved = jax.tree.leaves(nnx.to_pure_dict(after["rest"]))
    assert any(not np.array_equal(a, b) for a, b in zip(before, moved, strict=True))


def test_errors_name_setting_and_range(digits):
    big = dataclasses.replace(CONFIG, batch=2000)
    with pytest.raises(ExperimentError, match="batch is 2000; there are 1437 images"):
        images.compile_trainer(big, digits, Method(tiny), None)
    wrong = dataclasses.replace(CONFIG, model="vit_tiny_patch3")
    with pytest.raises(ExperimentError, match="model vit_tiny_patch3: "):
        images.build_backbone(wrong, classes=10, side=8, channels=1, rngs=nnx.Rngs(0))
