"""The CAST experiment end to end: results, resuming, meshes, several processes, bad input."""

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments.cast_llama.__main__ import EXPERIMENT, check
from experiments.cast_llama.config import PRESETS, Config
from experiments.cast_llama.report import is_lower, make_claims
from experiments.cast_llama.trials import Trial, best_rates
from experiments.harness import cli
from experiments.harness.run import execute
from sparsejax.weights import load_compact

ROOT = pathlib.Path(__file__).parents[2]
CLOCK = ("seconds", "commit")


@pytest.fixture(scope="module", autouse=True)
def datasets(tmp_path_factory):
    """Datasets and dense models of this module, away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEJAX_DATA", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def settings(out, **changes) -> Config:
    return dataclasses.replace(PRESETS["test"], out=str(out), **changes)


def only_run(out):
    return max(p for p in (out / "cast_llama").iterdir() if (p / "config.json").is_file())


def command(*arguments):
    return [
        sys.executable,
        "-m",
        "experiments.cast_llama",
        "--preset",
        "test",
        *map(str, arguments),
    ]


def test_the_whole_experiment(out, capsys):
    result = execute(EXPERIMENT, settings(out))
    folder = only_run(out)
    printed = capsys.readouterr().out
    for piece in (
        "CAST",
        "SR-STE",
        "AST",
        "Wanda",
        "Greedy continuations",
        "claim: CAST at 2:4 beats",
    ):
        assert piece in printed
    assert f"everything is in {folder}" in printed
    for name in ("loss", "groups_in_pattern", "weight_magnitudes"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["seeds"] == 2
    perplexities = summary["metrics"]["perplexity"]
    assert set(perplexities) == set(settings(out).methods)
    assert all(1 < value < 200 for values in perplexities.values() for value in values)
    sizes = summary["metrics"]["files"]
    assert sizes["file"] < 0.65 * sizes["dense"]
    sparse = load_compact(folder / "sparse_model.safetensors")
    kernels = [w for path, w in sparse.items() if path.endswith("_proj/kernel")]
    assert len(kernels) == 7
    for kernel in kernels:
        groups = np.asarray(kernel != 0).reshape(2, -1, 4, kernel.shape[-1])
        assert groups.sum(2).max() <= 2
    assert result.claims[0].seeds == 2


@pytest.mark.parametrize(
    ("after", "words", "holds"),
    [
        (
            {"cast": 3.4, "naive": 3.5, "sparsegpt": 4.0},
            ["at 2:4 beats", "every other"],
            [1, 1],
        ),
        ({"cast": 3.6, "naive": 3.5, "srste": 3.7}, ["beats", "every other"], [0, 0]),
        ({"cast": 3.6, "sparsegpt": 4.0}, ["closer to dense than pruning at once"], [1]),
        ({"cast": 3.6, "sparsegpt_retrained": 3.5}, ["than every other sparse method"], [0]),
        ({"naive": 3.5, "wanda_retrained": 3.4}, ["masks of Wanda at 2:4, held"], [1]),
        (
            {"naive": 3.5, "wanda_retrained": 3.6, "sparsegpt_retrained": 3.2},
            ["masks of SparseGPT and of Wanda at 2:4, held"],
            [0],
        ),
        ({"sparsegpt_retrained": 3.08}, ["stays within 0.1 of"], [1]),
        ({"naive": 3.5}, ["stays within 0.1 of"], [0]),
    ],
)
def test_claims_are_computed_from_the_figures(after, words, holds):
    rate = PRESETS["pretrained"].learning_rates[0]
    trials = [Trial(n, rate, 0, value, value, 1.0, None, None) for n, value in after.items()]
    claims = make_claims(PRESETS["pretrained"], 3.0, trials, best_rates(trials))
    assert [claim.holds for claim in claims] == [bool(held) for held in holds]
    for word, claim in zip(words, claims, strict=True):
        assert word in claim.sentence


def test_one_method_is_ahead_of_another_in_every_seed():
    def trials(*values):
        return [Trial("cast", 1e-3, i, v, v, 1.0, None, None) for i, v in enumerate(values)]

    assert is_lower(trials(3.0, 3.2), trials(3.1, 3.3))
    assert not is_lower(trials(3.0, 3.2), trials(3.3, 3.1))
    assert is_lower(trials(3.0, 3.2), trials(3.3))
    assert not is_lower(trials(3.0, 3.2), trials(3.1))


def test_the_dense_model_is_kept_for_later_runs(out, capsys):
    execute(EXPERIMENT, settings(out, methods=("magnitude",), bits=()))
    assert "kept from an earlier run" in capsys.readouterr().out
    execute(EXPERIMENT, settings(out, methods=("magnitude",), bits=(), dense_learning_rate=2e-3))
    assert "kept from an earlier run" not in capsys.readouterr().out


def test_a_run_killed_in_the_middle_resumes_to_the_same_numbers(out, tmp_path):
    changes = {
        "methods": ("cast",), "seeds": 1, "steps": 200, "checkpoint_every": 20, "bits": (),
    }  # fmt: skip
    execute(EXPERIMENT, settings(tmp_path / "whole", **changes))
    flags = ("--methods", "cast", "--seeds", "1", "--steps", "200", "--checkpoint-every", "20",
             "--bits")  # fmt: skip
    broken = tmp_path / "broken"
    process = subprocess.Popen(command("--out", broken, *flags), cwd=ROOT)
    try:
        deadline = time.time() + 120
        while not list(broken.glob("cast_llama/*/trials/cast-lr0.003-seed0/[1-9]*0")):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.time() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    killed, whole = only_run(broken), only_run(tmp_path / "whole")
    assert not (killed / "summary.json").exists()
    steps = [
        int(p.name) for p in (killed / "trials/cast-lr0.003-seed0").iterdir() if p.name.isdigit()
    ]
    assert steps
    assert max(steps) < 200
    execute(EXPERIMENT, cli.parse(EXPERIMENT, ["--resume", str(killed)]))
    one, two = (
        [json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (killed, whole)
    )
    assert one == two
    first, second = (json.loads((f / "summary.json").read_text()) for f in (killed, whole))
    assert first["metrics"]["perplexity"] == second["metrics"]["perplexity"]
    a, b = (load_compact(f / "sparse_model.safetensors") for f in (killed, whole))
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path])


def test_a_mesh_gives_the_numbers_of_one_device(out, tmp_path):
    changes = {"methods": ("wanda", "cast"), "seeds": 1, "batch": 8, "bits": ()}
    alone = execute(EXPERIMENT, settings(tmp_path, **changes))
    sharded = execute(EXPERIMENT, settings(tmp_path / "mesh", mesh="data=4,model=2", **changes))
    for name in ("wanda", "cast"):
        np.testing.assert_allclose(
            sharded.metrics["perplexity"][name], alone.metrics["perplexity"][name], rtol=2e-3
        )


def test_two_processes_train_together(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    flags = ["--methods", "cast", "--seeds", "1", "--mesh", "data=2", "--multihost",
             "--coordinator", address, "--num-processes", "2"]  # fmt: skip
    flags_of_xla = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    environment = os.environ | {"XLA_FLAGS": flags_of_xla}
    processes = [
        subprocess.Popen(
            command("--out", tmp_path, *flags, "--process-id", i), cwd=ROOT, env=environment
        )
        for i in range(2)
    ]
    try:
        assert [p.wait(timeout=180) for p in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    together = json.loads((only_run(tmp_path) / "summary.json").read_text())
    config = settings(tmp_path / "alone", methods=("cast",), seeds=1, bits=())
    alone = execute(EXPERIMENT, config)
    np.testing.assert_allclose(
        together["metrics"]["perplexity"]["cast"], alone.metrics["perplexity"]["cast"], rtol=2e-3
    )


def test_the_paper_setting_builds_abstractly():
    lines = " ".join(check(dataclasses.replace(PRESETS["paper"])))
    for figure in ("6,738,415,616 parameters", "224 tensors", "6,476,005,376 weights"):
        assert figure in lines


def test_other_patterns_and_the_users_own_text(out, tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n\n" * 200)
    changes = {"methods": ("naive",), "seeds": 1, "bits": ()}
    config = settings(tmp_path, text=(str(text),), pattern="1:4", **changes)
    execute(EXPERIMENT, config)
    summary = json.loads((only_run(tmp_path) / "summary.json").read_text())
    assert summary["metrics"]["files"]["file"] < summary["metrics"]["files"]["dense"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pattern", "5:4"], "n is 5 and m is 4; allowed is 1 <= n <= m"),
        (["--pattern", "half"], "pattern is 'half'; it must look like 2:4"),
        (["--pattern", "2:7", "--methods", "naive"], "length 96, not a multiple of m = 7"),
        (["--stepz", "1"], "Unrecognized options: --stepz, 1 Perhaps you meant: --steps INT"),
        (["--methods", "magic"], "known are magnitude, wanda"),
        (["--model", "gpt-9"], "which is no path and none of laptop"),
        (["--dataset", "no_such_set"], "no_such_set"),
        (["--text", "{tmp}/missing.txt"], "missing.txt"),
        (["--text", "{tmp}/empty.txt"], "empty"),
        (["--text", "{tmp}/binary.txt"], "binary.txt"),
        (["--text", "{tmp}/short.txt"], "short"),
        (["--mesh", "data=3"], "3 devices, and there are 8"),
        (["--out", "{tmp}/short.txt"], "cannot be written"),
        (["--learning-rates", "-1"], "give positive ones"),
        (["--l1-decay", "-1", "--methods", "cast"], "l1_decay is -1.0; it must be at least 0"),
        (["--no-force", "--methods", "cast"], "at least 1.5 times that is needed"),
    ],
)
def test_bad_input_is_one_clear_line(out, arguments, message, tmp_path, error_of):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\x00\xff\x00")
    (tmp_path / "short.txt").write_text("too short")
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    assert message in error_of(EXPERIMENT, ["--out", str(out), *arguments])


def test_a_run_of_another_model_does_not_resume(out, capsys):
    execute(EXPERIMENT, settings(out, methods=("naive",), seeds=1))
    folder = only_run(out)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model": "1m"}))
    with pytest.raises(SystemExit) as stop:
        cli.main(EXPERIMENT, ["--resume", str(folder)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "is of another model" in error
    assert error.count("\n") == 1
    assert jax.device_count() == 8
