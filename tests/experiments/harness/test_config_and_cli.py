"""Settings and the command line: what is refused, and how it is said."""

import dataclasses
import json

import pytest

import sparsejax as sj
from experiments.harness import cli
from experiments.harness.config import (
    Claim,
    Experiment,
    ExperimentError,
    Result,
    RunConfig,
    as_arguments,
    as_json,
    read_config,
)
from experiments.harness.run import execute


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a test."""

    steps: int = 3
    """Number of steps."""
    rates: tuple[float, ...] = (0.1,)
    """Rates."""
    force: bool = False
    """Force it."""


CARD = sj.SparsityCard(
    what=sj.WhatIsSparse.WEIGHTS,
    granularity=sj.Granularity.N_M,
    timing=sj.Timing.DURING,
    path=sj.TrainingPath.DENSE_TO_SPARSE,
    dynamics=sj.MaskDynamics.STATIC,
    allocation=sj.Allocation.UNIFORM,
    criterion=sj.Criterion.MAGNITUDE,
    gradient=sj.GradientRule.MASKED,
    seeds=3,
    budget="3 steps",
    simulated=True,
)


def experiment(run=None):
    presets = {"laptop": Config(), "test": Config(preset="test", steps=1)}
    return Experiment("toy", "A paper", presets, run or (lambda config, run: None))


def parse(*arguments):
    return cli.parse(experiment(), list(arguments))


def test_presets_and_flags():
    assert parse() == Config()
    assert parse("--preset", "test") == Config(preset="test", steps=1)
    changed = parse("--steps", "7", "--rates", "1", "2", "--force", "--preset=test")
    assert changed == Config(preset="test", steps=7, rates=(1.0, 2.0), force=True)
    assert changed.seed_list() == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stepz", "4"], "Unrecognized options: --stepz, 4 Perhaps you meant: --steps INT"),
        (["--steps", "x"], "Error parsing --steps: invalid literal for int()"),
        (["--preset", "huge"], "preset is 'huge'; toy has laptop, test"),
        (["--seeds", "0"], "seeds is 0; it must be at least 1"),
        (["--seed", "-1"], "seed is -1; it must not be negative"),
        (["--resume", "nowhere"], "nowhere is no run folder: No such file"),
        (["--resume", "x", "--steps", "3"], "give no other flag"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(experiment(), arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_errors_of_a_run_are_one_line_too(capsys, tmp_path):
    def fail(config, run):
        raise ExperimentError("first line\n  second line")

    with pytest.raises(SystemExit) as stop:
        cli.main(experiment(fail), ["--out", str(tmp_path)])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: first line second line\n"


def test_a_folder_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        cli.main(experiment(), ["--out", str(tmp_path / "file")])
    assert "cannot be written: Not a directory" in capsys.readouterr().err


def test_a_run_writes_its_settings_and_summary(tmp_path, capsys):
    claim = Claim("sparse is good", True, "1.0", "2.0", 3)
    cli.main(
        experiment(lambda config, run: Result((claim,), CARD, {"x": 1})), ["--out", str(tmp_path)]
    )
    (folder,) = (tmp_path / "toy").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    wanted = {
        "slug": "toy", "paper": "A paper", "claim": "sparse is good", "holds": True,
        "ours": "1.0", "baseline": "2.0", "seeds": 3, "preset": "laptop", "metrics": {"x": 1},
    }  # fmt: skip
    assert wanted.items() <= summary.items()
    assert {"seconds", "device", "versions", "commit"} <= summary.keys()
    assert summary["card"]["granularity"] == "n_m"
    assert read_config(folder / "config.json") == as_json(Config(out=str(tmp_path)))
    line = "claim: sparse is good - holds (ours 1.0, baseline 2.0, 3 seeds)"
    assert line in capsys.readouterr().out
    assert "does not hold" in dataclasses.replace(claim, holds=False).line


def test_settings_survive_the_way_through_a_file(tmp_path):
    config = Config(steps=9, rates=(0.5, 0.25), force=True, out=str(tmp_path), mesh="data=8")
    (tmp_path / "config.json").write_text(json.dumps(as_json(config)))
    resumed = parse("--resume", str(tmp_path))
    assert resumed == dataclasses.replace(config, resume=str(tmp_path))
    assert parse(*as_arguments(as_json(config))) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[1]", "it holds no settings"),
        ('{"steps": {"a": 1}}', "it holds no settings"),
    ],
)
def test_a_damaged_settings_file(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ExperimentError, match=message):
        read_config(tmp_path / "config.json")


def test_unknown_settings_in_a_file_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"evil": 1}')
    with pytest.raises(ExperimentError, match="Unrecognized options: --evil"):
        parse("--resume", str(tmp_path))


def test_a_resumed_run_counts_the_time_of_its_earlier_parts(tmp_path):
    def once(config, run):
        return Result((Claim("it runs", True, "1", "0", 1),), CARD)

    execute(experiment(once), Config(preset="test", out=str(tmp_path)))
    (folder,) = (tmp_path / "toy").iterdir()
    assert json.loads((folder / "elapsed.json").read_text())["seconds"] < 100
    (folder / "elapsed.json").write_text('{"seconds": 1000}')
    execute(experiment(once), cli.parse(experiment(once), ["--resume", str(folder)]))
    assert 1000 <= json.loads((folder / "summary.json").read_text())["seconds"] < 1100
    assert 1000 <= json.loads((folder / "elapsed.json").read_text())["seconds"] < 1100
