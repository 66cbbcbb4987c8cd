"""The benchmark of transforms runs and reports every row."""

import json
import math

from experiments.benchmarks import transforms


def test_the_small_preset_runs_and_writes_every_row(tmp_path, capsys):
    transforms.main(["--preset", "test", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "benchmarks" / "transforms.json").read_text())
    names = [row["name"] for row in report["rows"]]
    for kind in ("LLaMA", "square"):
        for method in ("static", "gradual", "RigL", "SET"):
            assert f"{kind}, {method}: no mask update" in names
        for method in ("gradual", "gradual 2:4", "RigL", "SET"):
            assert f"{kind}, {method}: mask update" in names
    assert "masks, 2:4: ours" in names
    for row in report["rows"]:
        assert math.isfinite(row["ratio"])
        assert row["ratio"] > 0
    assert "goals met" in capsys.readouterr().out
