"""Grey photographs for experiments on natural images: packaged ones, a folder, or a dataset."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments.harness.config import ExperimentError
from experiments.harness.data import load_source
from experiments.harness.data.builders.photo_patches import photo

PACKAGED = "sklearn"
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_LARGEST = 64 * 2**20  # pixels of an image


def load_photos(source: str, *, most: int | None = None) -> list[Float[np.ndarray, "h w"]]:
    """Grey images: means of the channels over 255, float32.

    Args:
      source: `sklearn` (two photographs that come with scikit-learn), a folder of images, or an
        image dataset of TFDS with its split, for example `imagenette/train`.
      most: so many at most, the first ones.

    Raises:
      ExperimentError, DatasetError: nothing there, or an image that cannot be read.
    """
    folder = Path(source).expanduser()
    if source == PACKAGED:
        images: Iterator[np.ndarray] = (photo(name) for name in ("china", "flower"))
    elif folder.is_dir():
        images = _from_folder(folder)
    else:
        images = _from_dataset(source)
    found = []
    for image in images:
        found.append(_grey(image))
        if len(found) == most:
            break
    return found


def _from_folder(folder: Path) -> Iterator[np.ndarray]:
    from PIL import Image, UnidentifiedImageError

    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not files:
        raise ExperimentError(f"{folder} holds no image; suffixes are {', '.join(_SUFFIXES)}")
    for path in files:
        try:
            with Image.open(path) as image:
                if image.width * image.height > _LARGEST:
                    size = f"{image.width} x {image.height}"
                    raise ExperimentError(f"{path} has {size} pixels; {_LARGEST} are allowed")
                yield np.asarray(image.convert("RGB"))
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise ExperimentError(f"{path} cannot be read as an image: {error}") from error


def _from_dataset(source: str) -> Iterator[np.ndarray]:
    name, _, split = source.rpartition("/")
    if not name:
        raise ExperimentError(
            f"photos is {source!r}; it must be {PACKAGED}, a folder, or a TFDS dataset with its "
            "split, as in imagenette/train"
        )
    records: Any = load_source(name, split)
    for i in range(len(records)):
        yield records[i]["image"]


def _grey(image: np.ndarray) -> Float[np.ndarray, "h w"]:
    values = np.asarray(image, np.float32) / 255
    return values if values.ndim == 2 else values.mean(axis=-1)
