"""Whole datasets in memory."""

import os

import numpy as np

from experiments.harness.data.errors import DatasetError
from experiments.harness.data.load import load_source


def load_arrays(
    name: str, split: str, *, data_dir: str | os.PathLike[str] | None = None
) -> dict[str, np.ndarray]:
    """A whole split as one array per feature, the records along axis 0.

    Texts become an array of `bytes` objects. A feature whose records have several shapes, or
    nested features, raise a `DatasetError`.
    """
    source = load_source(name, split, data_dir=data_dir)
    records = [source[index] for index in range(len(source))]
    arrays = {}
    for feature, first in records[0].items():
        values = [record[feature] for record in records]
        if isinstance(first, bytes | str):
            arrays[feature] = np.array(values, dtype=object)
            continue
        if isinstance(first, dict) or len({np.shape(value) for value in values}) > 1:
            raise DatasetError(
                f"feature {feature!r} of dataset {name!r} differs in shape from record to record:"
                " read it with load_source"
            )
        arrays[feature] = np.stack(values)
    return arrays
