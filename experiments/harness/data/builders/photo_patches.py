"""`photo_patches`: square crops of the colour photos that scikit-image and scikit-learn ship."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

TRAIN_PHOTOS = (
    "astronaut",
    "chelsea",
    "flower",
    "hubble_deep_field",
    "immunohistochemistry",
    "motorcycle",
    "retina",
    "rocket",
)
TEST_PHOTOS = ("china", "coffee")
PHOTOS = TRAIN_PHOTOS + TEST_PHOTOS
STRIDE = 32
MOST_PER_PHOTO = 256


def photo(name: str) -> UInt8[np.ndarray, "h w 3"]:
    """The whole photo of that name."""
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        return load_sample_image(f"{name}.jpg")
    import skimage.data

    if name == "motorcycle":
        return skimage.data.stereo_motorcycle()[0]
    return getattr(skimage.data, name)()


def crops(image: UInt8[np.ndarray, "h w 3"], side: int) -> Iterator[UInt8[np.ndarray, "s s 3"]]:
    """Crops on a grid of stride 32, row by row; of more than 256, 256 at even distances."""
    height, width, _ = image.shape
    corners = [
        (top, left)
        for top in range(0, height - side + 1, STRIDE)
        for left in range(0, width - side + 1, STRIDE)
    ]
    count = min(len(corners), MOST_PER_PHOTO)
    for index in np.linspace(0, len(corners) - 1, count).round().astype(int):
        top, left = corners[index]
        yield image[top : top + side, left : left + side]


class PhotoPatches(tfds.core.GeneratorBasedBuilder):
    """Crops with the photo's number as label; `test` holds all crops of two unseen photos."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 (the form that TFDS asks for)
        tfds.core.BuilderConfig(name="32x32", description="crops of 32 x 32 pixels"),
        tfds.core.BuilderConfig(name="64x64", description="crops of 64 x 64 pixels"),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        side = self._side()
        return tfds.core.DatasetInfo(
            builder=self,
            description="Crops of photos; the photos of the test split are not in train.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(side, side, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=list(PHOTOS)),
                }
            ),
            disable_shuffling=True,
        )

    def _side(self) -> int:
        assert self.builder_config is not None
        return int(self.builder_config.name.split("x")[0])

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        return {
            "train": self._generate_examples(TRAIN_PHOTOS),
            "test": self._generate_examples(TEST_PHOTOS),
        }

    def _generate_examples(self, names: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        from PIL import Image  # a numpy image would need TensorFlow to be encoded

        index = 0
        for name in names:
            for crop in crops(photo(name), self._side()):
                yield index, {"image": Image.fromarray(crop), "label": name}
                index += 1
