"""The benchmark of kernels from end to end in its smallest setting."""

import json
import math

from experiments.benchmarks.kernels import __main__ as kernels
from experiments.benchmarks.kernels import common


def test_the_small_preset_runs_and_writes_every_row(tmp_path, capsys):
    kernels.main(["--preset", "test", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "benchmarks" / "kernels.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert len(rows) == len(report["rows"]) == 5 + 4 * 3
    for row in rows.values():
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("ratio", "median_ms"))
        assert row["baseline"] in rows
    goals = {name: row["goal"] for name, row in rows.items() if row["goal"] is not None}
    assert sorted(goals.values()) == ["<= 1/50", "<= 2.5", "<= 4"]
    assert all("statistical_topk" in name for name in goals)
    assert "goals met" in capsys.readouterr().out


def test_the_sorts_are_judged_by_the_fastest():
    naps = {"slow": 0.02, "fast": 0.001, "middle": 0.01}
    calls = {name: (lambda s=seconds: common.time.sleep(s)) for name, seconds in naps.items()}
    assert common.fastest(calls) == "fast"
