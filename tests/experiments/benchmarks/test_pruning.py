"""The benchmark of whole-model pruning, killed and resumed, on a small model."""

import json

from experiments.benchmarks import pruning


def test_the_small_preset_resumes_to_the_same_bits(tmp_path, capsys):
    arguments = ["--preset", "test", "--out", str(tmp_path), "--methods", "sparsegpt"]
    pruning.main(arguments)
    report = json.loads((tmp_path / "benchmarks" / "pruning.json").read_text())
    [row] = report["rows"]
    assert row["same_bits"]
    assert 1 <= row["blocks_before_the_kill"] <= 3
    assert row["peak_bytes"] < 4 * pruning.GIB
    assert "same bits" in capsys.readouterr().out
