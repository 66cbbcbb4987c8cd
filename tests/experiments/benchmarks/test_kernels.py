"""The benchmark of kernels from end to end in its smallest setting."""

import json
import math

import pytest

from experiments.benchmarks.kernels import __main__ as kernels
from experiments.benchmarks.kernels import common


def test_the_small_preset_runs_and_writes_every_row(tmp_path, capsys):
    kernels.main(["--preset", "test", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "benchmarks" / "kernels.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert len(rows) == len(report["rows"])
    for row in rows.values():
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("ratio", "median_ms"))
        assert row["baseline"] in rows
    goals = {row["goal"] for row in rows.values()}
    assert {"<= 1/50", "<= 2.5", "<= 4", "<= 0.556"} <= goals
    assert "goals met" in capsys.readouterr().out


def test_one_part_alone(tmp_path):
    kernels.main(["--preset", "test", "--out", str(tmp_path), "--only", "topk_sort"])
    report = json.loads((tmp_path / "benchmarks" / "kernels.json").read_text())
    assert len(report["rows"]) == 5
    with pytest.raises(SystemExit):
        kernels.main(["--only", "nothing"])


def test_the_sorts_are_judged_by_the_fastest():
    naps = {"slow": 0.02, "fast": 0.001, "middle": 0.01}
    calls = {name: (lambda s=seconds: common.time.sleep(s)) for name, seconds in naps.items()}
    assert common.fastest(calls) == "fast"
