"""`experiments.harness.rows`."""

import jax
import numpy as np

from experiments.harness.rows import over_batches


def test_rows_are_measured_with_one_compilation():
    traces = []

    @jax.jit
    def double(x):
        traces.append(x.shape)
        return {"y": 2 * x}

    rows = np.arange(14.0, dtype=np.float32).reshape(7, 2)
    np.testing.assert_array_equal(over_batches(double, rows, size=3)["y"], 2 * rows)
    assert traces == [(3, 2)]
