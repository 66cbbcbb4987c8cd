"""Compiled functions of a batch, on as many rows as there are."""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import PyTree, Shaped


def over_batches(
    function: Callable[..., PyTree], *arrays: Shaped[np.ndarray, "n ..."], size: int = 256
) -> PyTree:
    """A jitted function of rows, on all rows with one compilation: results stand row below row."""
    count, out = len(arrays[0]), None
    for start in range(0, count, size):
        rows = [a[start : start + size] for a in arrays]
        kept = len(rows[0])
        filled = [
            np.pad(a, [(0, size - kept), *[(0, 0)] * (a.ndim - 1)], mode="edge") for a in rows
        ]
        found = jax.device_get(function(*filled))
        if out is None:
            out = jax.tree.map(lambda a: np.empty((count, *a.shape[1:]), a.dtype), found)
        for whole, part in zip(jax.tree.leaves(out), jax.tree.leaves(found), strict=True):
            whole[start : start + kept] = part[:kept]
    return out
