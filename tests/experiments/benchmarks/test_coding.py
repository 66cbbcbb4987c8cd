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


def test_steps_are_the_fewest_that_are_enough(monkeypatch):
    config = coding.PRESETS["test"]
    asked = []

    def solve(x, dictionary, steps):
        asked.append((len(x), steps))
        return np.full((len(x), 1), 1 / steps)

    def measure(config, codes):
        assert config is coding.PRESETS["test"]
        return codes[:, 0] * (2 if len(codes) == config.patches else 1)

    monkeypatch.setattr(coding, "_FEW", 10)
    wanted = np.full(config.patches, 1 / 45)
    # as good as the library on few patches with 60 steps, on all of them only with 120
    assert coding.enough_steps(config, solve, measure, wanted) == 120
    assert asked[-3:] == [(60, 60), (60, 80), (60, 120)]
    assert asked[0] == (10, 5)
    assert coding.enough_steps(config, solve, measure, 0 * wanted) == 2000


def test_quality_is_that_of_the_problem():
    config = coding.PRESETS["test"]
    x, dictionary = coding.problem(config)
    none = np.zeros((config.patches, config.atoms), np.float32)
    np.testing.assert_array_equal(coding.residual(config, none), 2 * coding.objective(config, none))
    np.testing.assert_allclose(coding.residual(config, none), np.sum(x.astype(float) ** 2, axis=1))
    first = np.zeros((3, config.atoms), np.float32)
    first[:, 2] = 2.0
    found = coding.objective(config, first) - 0.5 * coding.residual(config, first)
    np.testing.assert_allclose(found, 2 * config.lam)
    np.testing.assert_allclose(
        coding.residual(config, first), np.sum((x[:3] - 2 * dictionary[:, 2]) ** 2, 1), rtol=1e-5
    )
