"""Dataset names: how they are written, which exist, and what to do about one that is missing."""

import contextlib
import dataclasses
import difflib
import re
from pathlib import Path

from experiments.harness.data.builders import PROJECT_DATASETS
from experiments.harness.data.errors import DatasetError
from experiments.harness.data.quiet import quiet_tfds

# TFDS imports these groups of builders at their first use; until then it does not list them.
FAMILIES = (
    "audio",
    "d4rl",
    "graphs",
    "image",
    "image_classification",
    "nearest_neighbors",
    "object_detection",
    "question_answering",
    "ranking",
    "recommendation",
    "rl_unplugged",
    "robomimic",
    "robotics",
    "structured",
    "summarization",
    "text",
    "text_simplification",
    "time_series",
    "translate",
    "video",
    "vision_language",
)
HUGGING_FACE = "huggingface:"
_NAME = re.compile(r"(?P<base>\w[\w\-]*)(/(?P<config>[^/:\s]+))?(:(?P<version>\d+\.\d+\.\d+))?")


@dataclasses.dataclass(frozen=True)
class DatasetName:
    """The parts of `base[/config][:version]`; a part that is not given is None."""

    text: str
    base: str
    config: str | None
    version: str | None


def parse_name(name: str) -> DatasetName:
    """Split a TFDS name into its parts; a `DatasetError` when it is not one."""
    match = _NAME.fullmatch(name.removeprefix(HUGGING_FACE))
    if match is None:
        raise DatasetError(f"{name!r} is not a dataset name: write name, name/config or name:1.0.0")
    return DatasetName(name, match["base"], match["config"], match["version"])


def known_names() -> list[str]:
    """Our names and those of the TFDS catalogue, as far as they can be had without TensorFlow."""
    names = set(PROJECT_DATASETS)
    with quiet_tfds() as tfds:
        for family in FAMILIES:
            try:
                getattr(tfds, family).__name__  # noqa: B018 (the access imports the family)
            except (ImportError, AttributeError):
                continue  # a family with further requirements
        with contextlib.suppress(ImportError):
            names.update(tfds.list_builders(with_community_datasets=False))
    return sorted(names)


def close_to(word: str, choices: list[str]) -> str:
    """The question 'did you mean ...?' or, with nothing close, an empty string."""
    matches = difflib.get_close_matches(word, choices, n=3)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def missing(name: DatasetName, root: Path) -> DatasetError:
    """The error for a dataset that is not in `root`: unknown, or how to prepare it."""
    if not name.text.startswith(HUGGING_FACE):
        names = known_names()
        if name.base not in names:
            hint = close_to(name.base, names) or f"; ours are {', '.join(PROJECT_DATASETS)}"
            return DatasetError(f"unknown dataset {name.text!r}{hint}")
        configs = _configs(name.base)
        if name.config is not None and name.config not in configs:
            some = ", ".join(configs[:8]) + (", ..." if len(configs) > 8 else "")
            hint = close_to(name.config, configs) or f"; it has {some or 'no configurations'}"
            return DatasetError(f"dataset {name.base!r} has no configuration {name.config!r}{hint}")
    return DatasetError(
        f"dataset {name.text!r} is not prepared in {root}; prepare it once with tensorflow-cpu"
        f" installed: {prepare_command(name, root)} (or copy a prepared folder there, or set"
        " SPARSEJAX_DATA to where it is)"
    )


def prepare_command(name: DatasetName, root: Path) -> str:
    """The shell command that downloads and prepares a TFDS dataset where TensorFlow is."""
    packages = "tensorflow-cpu tensorflow-datasets array_record"
    if name.text.startswith(HUGGING_FACE):
        packages += " datasets"
    builder = f"tfds.builder('{name.text}', data_dir='{root}', file_format='array_record')"
    return (
        f"pip install {packages} && python -c"
        f' "import tensorflow_datasets as tfds; {builder}.download_and_prepare()"'
    )


def _configs(base: str) -> list[str]:
    with quiet_tfds() as tfds:
        try:
            return sorted(tfds.builder_cls(base).builder_configs)
        except (ImportError, ValueError, AttributeError):
            return []
