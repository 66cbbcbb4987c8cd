"""Labelled images as batches: held in memory where they fit, else read and cropped on the way."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from experiments.harness.data.arrays import load_arrays
from experiments.harness.data.batches import epoch_batches
from experiments.harness.data.errors import DatasetError
from experiments.harness.data.load import load_source, open_builder

IN_MEMORY = 2**30  # bytes of a split's pixels
PROBE = 1000  # images that mean and deviation are taken from
RESIZE = 256 / 224  # the short side before a central crop, over the crop's side
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random crop: share of the image, width / height
Batch = Mapping[str, Shaped[np.ndarray, "batch ..."]]
Pixels = UInt8[np.ndarray, "h w c"]


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A dataset of images with one label each.

    Attributes:
      name: of TFDS. classes: how many labels. side, channels: of a square image in a batch.
      train, test: records. examples: how many of the first.
      fixed: all images have that side already, and batches are cut from memory.
      mean, deviation: of each channel, pixels scaled to 0..1.
    """

    name: str
    classes: int
    side: int
    channels: int
    train: Any
    test: Any
    examples: int
    fixed: bool
    mean: Float[np.ndarray, "c"]
    deviation: Float[np.ndarray, "c"]

    def batches(self, *, batch: int, seed: int, shard: tuple[int, int] = (0, 1)) -> Any:
        """Endless training batches: `image` uint8 `[batch, side, side, channels]`, and `label`.

        A grain iterator, whose state can be kept. Images that are not of one side are cropped at
        random. `shard` as for `epoch_batches`.
        """
        if self.fixed:
            return epoch_batches(self.train, batch=batch, seed=seed, shard=shard)
        import grain

        index, count = shard
        order = grain.MapDataset.source(self.train).seed(seed).shuffle().repeat(None)
        crops = order.random_map(functools.partial(_random_crop, side=self.side))
        rows = crops.batch(batch, drop_remainder=True)[index::count]
        return iter(
            rows.to_iter_dataset(grain.ReadOptions(num_threads=16, prefetch_buffer_size=64))
        )

    def test_batches(self, batch: int) -> Iterator[Batch]:
        """The test images once, in order; the last batch is filled up with label -1."""
        count = len(self.test["label"]) if self.fixed else len(self.test)
        for start in range(0, count, batch):
            rows = range(start, min(start + batch, count))
            if self.fixed:
                images, labels = self.test["image"][rows], self.test["label"][rows]
            else:
                records = [_central_crop(self.test[i], side=self.side) for i in rows]
                images, labels = (np.stack([r[k] for r in records]) for k in ("image", "label"))
            missing = batch - len(rows)
            yield {
                "image": np.pad(images, ((0, missing), *[(0, 0)] * 3)),
                "label": np.pad(labels.astype(np.int32), (0, missing), constant_values=-1),
            }


def load_images(name: str, *, side: int | None = None) -> ImageData:
    """A dataset of ours or of TFDS with the features `image` and `label`.

    Args:
      name: with the splits `train` and `test`, or else `validation`.
      side: of the crops of images that differ in shape, 224 by default; images of one square shape
        keep theirs.

    Raises:
      DatasetError: it is not prepared, holds no labelled images, or `side` is not its own.
    """
    info = open_builder(name).info
    features: Any = info.features
    if not {"image", "label"} <= set(features):
        raise DatasetError(f"dataset {name!r} has {', '.join(features)}: not image and label")
    splits = list(info.splits)
    test = next((split for split in ("test", "validation") if split in splits), None)
    if "train" not in splits or test is None:
        raise DatasetError(f"dataset {name!r} has {', '.join(splits)}: not train and test")
    shape, classes = features["image"].shape, features["label"].num_classes
    height, width, channels = shape
    fixed = None not in shape and height == width
    if fixed and side not in (None, height):
        raise DatasetError(f"the images of {name!r} are {height} pixels wide, not {side}")
    size: int = height if fixed else (side or 224)
    if fixed and math.prod(shape) * info.splits["train"].num_examples <= IN_MEMORY:
        train, held = (_labelled(load_arrays(name, split)) for split in ("train", test))
        count, probe = len(train["label"]), train["image"][:PROBE]
    else:
        fixed = False
        train, held = (load_source(name, split) for split in ("train", test))
        count = len(train)
        records = (train[i] for i in range(min(PROBE, count)))
        probe = np.stack([_central_crop(record, side=size)["image"] for record in records])
    pixels = probe.astype(np.float32) / 255
    mean, deviation = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))
    return ImageData(
        name=name,
        classes=classes,
        side=size,
        channels=channels or 3,
        train=train,
        test=held,
        examples=count,
        fixed=fixed,
        mean=mean,
        deviation=np.maximum(deviation, 1e-3),
    )


def _labelled(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"image": arrays["image"], "label": arrays["label"].astype(np.int32)}


def _random_crop(record: Mapping[str, Any], rng: np.random.Generator, *, side: int) -> Batch:
    """A crop of random area and shape, resized: Inception's way."""
    image = record["image"]
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(*AREA)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            y, x = (int(rng.integers(0, n + 1)) for n in (height - h, width - w))
            return _record(_resized(image[y : y + h, x : x + w], (side, side)), record)
    return _central_crop(record, side=side)


def _central_crop(record: Mapping[str, Any], *, side: int) -> Batch:
    """The middle of the image, whose short side is a little longer than the crop's."""
    image = record["image"]
    short = round(side * RESIZE)
    scale = short / min(image.shape[:2])
    size = [max(side, round(n * scale)) for n in image.shape[:2]]
    image = _resized(image, (size[1], size[0]))
    y, x = ((n - side) // 2 for n in size)
    return _record(image[y : y + side, x : x + side], record)


def _record(image: Pixels, record: Mapping[str, Any]) -> Batch:
    return {"image": image, "label": np.int32(record["label"])}  # type: ignore[dict-item]


def _resized(image: Pixels, size: Sequence[int]) -> Pixels:
    from PIL import Image

    flat = image[..., 0] if image.shape[-1] == 1 else image
    out = np.asarray(Image.fromarray(flat).resize((size[0], size[1]), Image.Resampling.BILINEAR))
    return out.reshape(*out.shape[:2], image.shape[-1])
