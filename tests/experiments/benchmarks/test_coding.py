"""The benchmark of sparse coding from end to end in its smallest setting."""

import json
import math

import numpy as np

from experiments.benchmarks import coding


def test_the_small_preset_runs_and_writes_every_row(tmp_path, capsys):
    coding.main(["--preset", "test", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "benchmarks" / "coding.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert len(rows) == len(report["rows"]) >= 12
    for row in rows.values():
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("ratio", "median_ms"))
        assert row["baseline"] in rows
    assert "goals met" in capsys.readouterr().out


def test_steps_are_the_fewest_that_are_enough():
    assert coding.enough_steps(lambda n: n, lambda n: n >= 45) == 50
    assert coding.enough_steps(lambda n: n, lambda n: False) == 2000


def test_quality_is_that_of_the_problem():
    config = coding.PRESETS["test"]
    x, _ = coding.problem(config)
    none = np.zeros((config.patches, config.atoms), np.float32)
    assert coding.residual(config, none) == 2 * coding.objective(config, none)
    np.testing.assert_allclose(coding.residual(config, none), np.sum(x.astype(float) ** 2))
