"""The scaling study end to end on tiny sizes, its verdicts, and its settings."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import cast_scaling
from experiments.cast_scaling import EXPERIMENT, PRESETS, Cell, Config, check
from experiments.harness import cli
from experiments.harness.run import execute
from experiments.harness.scaling_law import ScalingLaw


def test_the_whole_experiment_and_resuming_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SPARSEJAX_DATA", str(tmp_path / "datasets"))
    result = execute(EXPERIMENT, dataclasses.replace(PRESETS["test"], out=str(tmp_path)))
    printed = capsys.readouterr().out
    assert "claim: a law fitted on the smaller runs predicts the held-out losses of CAST" in printed
    assert "32 (held out)" in printed
    [folder] = (tmp_path / "cast_scaling").iterdir()
    for name in ("cast_law", "dense_law"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
    summary = json.loads((folder / "summary.json").read_text())
    cells = summary["metrics"]["cast"]["cells"]
    assert [c["tokens"] for c in cells] == [256, 512, 1024] * 3
    assert [c["held_out"] for c in cells] == [False] * 8 + [True]
    assert cells[0]["parameters"] < cells[3]["parameters"] < cells[6]["parameters"]
    assert all(0 < loss < 6 for c in cells for loss in c["losses"])
    (folder / "summary.json").unlink()
    again = execute(EXPERIMENT, cli.parse(EXPERIMENT, ["--resume", str(folder)]))
    assert again.claims == result.claims
    assert again.metrics == result.metrics


LAW = ScalingLaw(E=1.0, a=50.0, alpha=0.5, b=30.0, beta=0.5, residual=0.0)


def cells(error):
    """What runs under the law would give, the held-out one off by an error."""
    made = []
    for size in (100, 400, 900):
        for tokens in (100, 400, 900):
            held_out = size == tokens == 900
            loss = float(LAW.predict(size, tokens)) * (1 + error * held_out)
            made.append(Cell(str(size), size, tokens, (loss * 0.999, loss * 1.001), held_out))
    return made


@pytest.mark.parametrize(("error", "holds"), [(0.0, True), (0.025, True), (0.04, False)])
def test_verdicts(error, holds):
    found = cells(error)
    law = cast_scaling.fit(found)
    claim = cast_scaling.make_claim(Config(), "cast", law, found)
    assert claim.holds == holds
    assert cast_scaling.error(law, found[-1]) == pytest.approx(1 / (1 + error) - 1, abs=2e-3)
    assert cast_scaling.last_loss(found, found[-1]) == found[-2].mean


def test_a_law_must_beat_no_law():
    found = cells(0.0)
    flat = dataclasses.replace(found[-1], losses=(found[-2].mean,))
    law = cast_scaling.fit(found)
    claim = cast_scaling.make_claim(Config(bound=1.0), "cast", law, [*found[:-1], flat])
    assert not claim.holds
    assert claim.baseline == "0.00%"


def test_sizes_obey_the_pattern_and_grow():
    counts = []
    for size in PRESETS["laptop"].sizes:
        sizes = cast_scaling.size_config(PRESETS["laptop"], size, 128)
        counts.append(cast_scaling.parameter_count(sizes))
        assert sizes.d_model % 8 == sizes.d_ff % 8 == 0
    assert counts == sorted(counts)
    assert 3e4 < counts[0] < counts[-1] < 5e5
    np.testing.assert_array_less(2.5, counts[-1] / counts[1])


def test_the_paper_setting_builds_abstractly():
    lines = " ".join(check(PRESETS["paper"]))
    for figure in ("llama-2-7b: 6,738,415,616 parameters", "a step of llama-2-7b traces"):
        assert figure in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "32", "huge", "64"], "sizes has 'huge': give widths or laptop"),
        (["--sizes", "32", "64"], "give three or more different ones"),
        (["--sizes", "32", "64", "64"], "give three or more different ones"),
        (["--budgets", "1", "3", "2"], "give three or more, ascending"),
        (["--budgets", "0", "1", "2"], "budgets must be positive"),
        (["--held-out", "3"], "held_out is 3; it must be at least 1 and below 3"),
        (["--bound", "0"], "bound is 0.0; it must be positive"),
        (["--mesh", "data=2"], "leave mesh and multihost out"),
        (["--sizes", "32", "64", "66"], "n_heads is 4; it must divide d_model, which is 66"),
    ],
)
def test_bad_settings_are_one_clear_line(arguments, message, error_of, monkeypatch):
    monkeypatch.setattr(cast_scaling, "train_size", lambda c, r, t, size: size_check(c, size))
    monkeypatch.setattr(cast_scaling, "load_text", lambda config: None)
    assert message in error_of(EXPERIMENT, arguments)


def size_check(config, size):
    cast_scaling.size_config(config, size, 128)
    return {}
