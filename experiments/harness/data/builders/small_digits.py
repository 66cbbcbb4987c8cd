"""`small_digits`: the handwritten digits that scikit-learn ships."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int, UInt8

# Digits are 0..16; PNG images hold 15 times that (0..240), so `image // LEVEL` is exact.
LEVEL = 15
TRAIN = 1437


def digits(enlarge: int) -> tuple[UInt8[np.ndarray, "n h w 1"], Int[np.ndarray, "n"]]:
    """Images (15 times the values 0..16, each pixel repeated `enlarge` times) and labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = np.rint(images).astype(np.uint8).reshape(-1, 8, 8, 1) * np.uint8(LEVEL)
    return images.repeat(enlarge, axis=1).repeat(enlarge, axis=2), labels


class SmallDigits(tfds.core.GeneratorBasedBuilder):
    """1,797 digits: the first 1,437 are `train`, the other 360 (other writers) `test`."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 (the form that TFDS asks for)
        tfds.core.BuilderConfig(name="8x8", description="as scanned"),
        tfds.core.BuilderConfig(name="32x32", description="each pixel repeated 4 x 4 times"),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        side = self._side()
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits; image // 15 is the original value, 0..16.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(side, side, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            disable_shuffling=True,
        )

    def _side(self) -> int:
        assert self.builder_config is not None
        return int(self.builder_config.name.split("x")[0])

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        images, labels = digits(self._side() // 8)
        return {
            "train": self._generate_examples(images[:TRAIN], labels[:TRAIN]),
            "test": self._generate_examples(images[TRAIN:], labels[TRAIN:]),
        }

    def _generate_examples(self, images: Any, labels: Any) -> Iterator[tuple[int, dict]]:
        from PIL import Image  # a numpy image would need TensorFlow to be encoded

        for index, (image, label) in enumerate(zip(images, labels)):
            yield index, {"image": Image.fromarray(image[..., 0]), "label": int(label)}
