"""Datasets as random-access sources: ours are prepared at their first use, others are found.

Nothing here downloads, and TensorFlow is not needed: prepared folders are read as array_record.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from experiments.harness.data.builders import PROJECT_DATASETS
from experiments.harness.data.catalogue import DatasetName, close_to, missing, parse_name
from experiments.harness.data.errors import DatasetError
from experiments.harness.data.quiet import quiet_tfds

_VERSION = re.compile(r"\d+\.\d+\.\d+")


def data_dir() -> Path:
    """Where datasets lie: $SPARSEJAX_DATA, else ~/.cache/sparsejax/datasets."""
    folder = os.environ.get("SPARSEJAX_DATA")
    return Path(folder).expanduser() if folder else Path.home() / ".cache/sparsejax/datasets"


def load_source(
    name: str, split: str, *, data_dir: str | os.PathLike[str] | None = None
) -> Sequence[dict[str, Any]]:
    """The records of a split as a random-access source (`len`, `[i]`, `__getitems__`).

    `name` is one of ours (`python_text`, `small_digits`, `photo_patches`, with or without
    `/config`), which is built if it is not there yet, or any TFDS name that was prepared in the
    data folder. `split` may be a TFDS slice such as `train[:10%]`. Raises `DatasetError`.
    """
    builder = open_builder(name, data_dir=data_dir)
    splits = list(builder.info.splits)
    if re.fullmatch(r"\w+", split) and split not in splits:
        hint = close_to(split, splits) or f": it has {', '.join(splits)}"
        raise DatasetError(f"dataset {name!r} has no split {split!r}{hint}")
    with quiet_tfds():
        try:
            source = builder.as_data_source(split=split)
            source[0]  # now, since the first image makes TFDS warn about its decoder
        except NotImplementedError as error:
            raise DatasetError(
                f"dataset {name!r} in {builder.data_dir} is not in array_record form; convert it"
                " once with tensorflow-cpu installed: tfds convert_format"
                f" --dataset_version_dir={builder.data_dir} --out_file_format=array_record"
            ) from error
        except ImportError as error:
            raise DatasetError(
                f"dataset {name!r} needs the package {error.name} to be read"
            ) from error
        except (AssertionError, LookupError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DatasetError(f"cannot read {split!r} of dataset {name!r}: {reason}") from error
    return source


def open_builder(name: str, *, data_dir: str | os.PathLike[str] | None = None) -> Any:
    """The read-only TFDS builder (`info`, `as_data_source`) of a dataset, ours prepared first."""
    parsed = parse_name(name)
    if parsed.base in PROJECT_DATASETS:
        folder = prepare(name, data_dir=data_dir)
    else:
        root = _root(data_dir)
        folder = _find(parsed, root)
        if folder is None:
            raise missing(parsed, root)
    with quiet_tfds() as tfds:
        return tfds.builder_from_directory(folder)


def missing_dataset(name: str, papers: Collection[str]) -> str | None:
    """Why a dataset is not there, or None where it is; for settings that are then only built.

    Args:
      papers: names that need not be there.

    Raises:
      DatasetError: another dataset is not there.
    """
    try:
        open_builder(name)
    except DatasetError as error:
        if name not in papers:
            raise
        return str(error)
    return None


def prepare(name: str, *, data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Build one of our datasets if it is not there yet; its folder.

    The build happens beside the final folder and is moved there in one step, so an interrupted
    build leaves nothing half done, and of two processes that build at once one moves first and
    the other takes its result.
    """
    parsed = parse_name(name)
    root = _root(data_dir)
    if parsed.base not in PROJECT_DATASETS:
        folder = _find(parsed, root)
        if folder is None:
            raise missing(parsed, root)
        return folder
    dataset = PROJECT_DATASETS[parsed.base]
    config = parsed.config or dataset.configs[0]
    if config not in dataset.configs:
        raise DatasetError(
            f"dataset {parsed.base!r} has no configuration {config!r}:"
            f" it has {', '.join(dataset.configs)}"
        )
    with quiet_tfds():
        builder_class = dataset.builder_class()
    version = str(builder_class.VERSION)
    if parsed.version not in (None, version):
        raise DatasetError(f"dataset {parsed.base!r} is at version {version}, not {parsed.version}")
    folder = root / parsed.base / config / version
    if not is_prepared(folder):
        try:
            _build(builder_class, config, folder, root)
        except ImportError as error:
            raise DatasetError(
                f"building dataset {name!r} needs the module {error.name}:"
                " pip install 'sparsejax[experiments]'"
            ) from error
        except OSError as error:
            raise DatasetError(
                f"cannot write dataset {name!r} to {root} ({error.strerror or error});"
                " set SPARSEJAX_DATA to a folder that can be written"
            ) from error
    return folder


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds a prepared TFDS dataset."""
    return (folder / "dataset_info.json").is_file() and (folder / "features.json").is_file()


def _root(folder: str | os.PathLike[str] | None) -> Path:
    return data_dir() if folder is None else Path(folder).expanduser()


def _build(builder_class: Any, config: str, folder: Path, root: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.mkdtemp(prefix=".prepare-", dir=root)
    try:
        with quiet_tfds() as tfds:
            builder = builder_class(config=config, data_dir=scratch, file_format="array_record")
            # Without this TFDS asks a public bucket whether it holds the dataset.
            offline = tfds.download.DownloadConfig(try_download_gcs=False)
            builder.download_and_prepare(download_config=offline)
        try:
            Path(builder.data_dir).rename(folder)
        except OSError:
            if not is_prepared(folder):
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _find(name: DatasetName, root: Path) -> Path | None:
    """The prepared folder of a dataset; TFDS lays it out as base[/config]/version."""
    base = root / name.base
    if name.config is not None:
        return _newest(base / name.config, name.version)
    found = _newest(base, name.version)
    if found is not None or not base.is_dir():
        return found
    default = _default_config(base)
    if default is not None and (found := _newest(base / default, name.version)) is not None:
        return found
    configs = sorted(path for path in base.iterdir() if _newest(path, name.version) is not None)
    if len(configs) > 1:
        raise DatasetError(
            f"dataset {name.base!r} is prepared in {len(configs)} configurations; name one:"
            f" {', '.join(f'{name.base}/{path.name}' for path in configs)}"
        )
    return _newest(configs[0], name.version) if configs else None


def _newest(folder: Path, version: str | None) -> Path | None:
    if version is not None:
        return folder / version if is_prepared(folder / version) else None
    if not folder.is_dir():
        return None
    versions = [
        path for path in folder.iterdir() if _VERSION.fullmatch(path.name) and is_prepared(path)
    ]
    return max(versions, key=lambda path: [int(n) for n in path.name.split(".")], default=None)


def _default_config(base: Path) -> str | None:
    with contextlib.suppress(OSError, ValueError):
        metadata = json.loads((base / ".config" / "metadata.json").read_text("utf-8"))
        return metadata.get("default_config_name")
    return None
