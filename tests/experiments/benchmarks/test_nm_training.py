"""The benchmark of N:M training runs and reports every method with its loss."""

import json
import math

import pytest

from experiments.benchmarks import nm_training


@pytest.fixture(autouse=True)
def datasets(tmp_path, monkeypatch):
    """Datasets of this test, away from the user's."""
    monkeypatch.setenv("SPARSEJAX_DATA", str(tmp_path / "datasets"))


def test_the_small_preset_runs_and_writes_every_row(tmp_path, capsys):
    nm_training.main(["--preset", "test", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "benchmarks" / "nm_training.json").read_text())
    names = [row["name"] for row in report["rows"]]
    methods = ("dense", "STE", "SR-STE", "mask decay", "structure decay", "BDWP", "CAST")
    assert names == [f"2:4, {method}" for method in methods]
    for row in report["rows"]:
        assert math.isfinite(row["ratio"])
        assert 0 < float(row["held-out loss"]) < 10
    assert "held-out loss" in capsys.readouterr().out
