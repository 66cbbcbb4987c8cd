"""The project's own datasets, built from data that other packages ship: no download."""

import dataclasses
import importlib
from typing import Any


@dataclasses.dataclass(frozen=True)
class ProjectDataset:
    """What is known of a project dataset without importing TensorFlow Datasets.

    The first of `configs` is the default; `module` and `builder` say where the TFDS builder is.
    """

    configs: tuple[str, ...]
    splits: tuple[str, ...]
    module: str
    builder: str
    summary: str

    def builder_class(self) -> Any:
        """The TFDS builder class; imports TensorFlow Datasets."""
        return getattr(importlib.import_module(f"{__name__}.{self.module}"), self.builder)


PROJECT_DATASETS: dict[str, ProjectDataset] = {
    "python_text": ProjectDataset(
        configs=("topics", "source"),
        splits=("train", "validation"),
        module="python_text",
        builder="PythonText",
        summary="articles on Python (topics), the standard library's code (source)",
    ),
    "small_digits": ProjectDataset(
        configs=("8x8", "32x32"),
        splits=("train", "test"),
        module="small_digits",
        builder="SmallDigits",
        summary="1,797 handwritten digits in 10 classes",
    ),
    "photo_patches": ProjectDataset(
        configs=("32x32", "64x64"),
        splits=("train", "test"),
        module="photo_patches",
        builder="PhotoPatches",
        summary="crops of ten colour photos, two of them held out",
    ),
}

__all__ = ["PROJECT_DATASETS", "ProjectDataset"]
