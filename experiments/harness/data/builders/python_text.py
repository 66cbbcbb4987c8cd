"""`python_text`: the English articles and the source code that come with Python."""

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from experiments.harness.data.errors import DatasetError
from experiments.harness.data.holdout import hold_out

NOT_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def topic_articles() -> list[tuple[str, str]]:
    """Name and text of the articles behind Python's `help()`, in the order of their names."""
    from pydoc_data.topics import topics

    return sorted(topics.items())


def source_files(folder: str | Path | None = None) -> list[tuple[str, str]]:
    """Relative path and text of the standard library's *.py files, tests left out, by path.

    Files that an installation writes about itself (`_sysconfigdata*`, `config-*/`) are left out
    too: they name its folders and compilers. So are the few files that are not UTF-8.
    """
    root = Path(folder or sysconfig.get_path("stdlib"))
    files = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if NOT_SOURCE.intersection(parts) or parts[0].startswith(("_sysconfigdata", "config-")):
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            files.append(("/".join(parts), text))
    return sorted(files)


class PythonText(tfds.core.GeneratorBasedBuilder):
    """Articles (`topics`) or code files (`source`); the last tenth of them is `validation`."""

    # The text changes with Python, so each Python has its own version of the dataset.
    VERSION = tfds.core.Version(".".join(map(str, ("1", *sys.version_info[1:3]))))
    BUILDER_CONFIGS = [  # noqa: RUF012 (the form that TFDS asks for)
        tfds.core.BuilderConfig(name="topics", description="the articles behind help()"),
        tfds.core.BuilderConfig(name="source", description="the standard library's code"),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Text that comes with Python; the version is 1.<minor>.<micro> of Python.",
            features=tfds.features.FeaturesDict(
                {"text": tfds.features.Text(), "name": tfds.features.Text()}
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        assert self.builder_config is not None
        if self.builder_config.name == "topics":
            documents = topic_articles()
        else:
            documents = source_files()
        if len(documents) < 2:
            raise DatasetError(
                f"python_text/{self.builder_config.name}: this Python ({sys.executable}) comes"
                " without that text"
            )
        train, validation = hold_out(documents)
        return {
            "train": self._generate_examples(train),
            "validation": self._generate_examples(validation),
        }

    def _generate_examples(self, documents: Any) -> Iterator[tuple[int, dict[str, str]]]:
        for index, (name, text) in enumerate(documents):
            yield index, {"text": text, "name": name}
