"""TensorFlow Datasets without its banners, logs and progress bars."""

import contextlib
import io
from collections.abc import Iterator
from types import ModuleType

from experiments.harness.data.errors import DatasetError


def import_tfds() -> ModuleType:
    """TensorFlow Datasets, or a `DatasetError` that says how to install it."""
    try:
        import tensorflow_datasets as tfds
    except ModuleNotFoundError as error:
        raise DatasetError(
            f"datasets need the package {error.name}: pip install 'sparsejax[experiments]'"
        ) from error
    return tfds


@contextlib.contextmanager
def quiet_tfds() -> Iterator[ModuleType]:
    """Yield TensorFlow Datasets; what it prints, logs or draws inside the block is dropped."""
    tfds = import_tfds()
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    tfds.disable_progress_bar()
    sink = io.StringIO()
    try:
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            yield tfds
    finally:
        logging.set_verbosity(verbosity)
