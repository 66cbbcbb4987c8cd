"""The training loop: progress, checkpoints, and every way a run can end."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.harness import run as run_module
from experiments.harness.checkpoints import Checkpoints
from experiments.harness.config import ExperimentError, RunConfig
from experiments.harness.data import epoch_batches
from experiments.harness.run import InterruptedRunError, Run
from experiments.harness.training import TrainingFailedError, train

STEPS = 20
TX = optax.adam(1e-2)


def new_run(tmp_path, **changes):
    return Run("toy", RunConfig(out=str(tmp_path), checkpoint_every=5, log_every=3, **changes))


def start():
    w = {"w": jnp.ones(4)}
    return {"params": w, "opt": TX.init(w), "key": jax.random.key_data(jax.random.key(0))}


@jax.jit
def compiled(state, batch):
    key, noise = jax.random.split(jax.random.wrap_key_data(state["key"]))
    x = batch["x"] + jax.random.normal(noise, (4,))
    loss, grads = jax.value_and_grad(lambda p: jnp.mean((x @ p["w"]) ** 2))(state["params"])
    updates, opt = TX.update(grads, state["opt"])
    params = optax.apply_updates(state["params"], updates)
    new = {"params": params, "opt": opt, "key": jax.random.key_data(key)}
    return new, {"loss": loss, "mean": x.mean()}


def batches():
    x = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    return epoch_batches({"x": x}, batch=4, seed=3)


def go(run, step=compiled):
    return train(
        run, "trial", state=start(), step=step, batches=batches(), steps=STEPS, slug="toy",
        inspect=lambda state: {"norm": jnp.sum(state["params"]["w"])},
    )  # fmt: skip


def assert_same(one, two):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


def lines(run):
    return [json.loads(x) for x in (run.folder / "metrics.jsonl").read_text().splitlines()]


def test_a_trial_logs_and_finishes(tmp_path):
    run = new_run(tmp_path)
    state = go(run)
    logged = run.metrics("trial")
    assert [x["step"] for x in logged] == [3, 6, 9, 12, 15, 18, 20]
    assert logged[-1]["norm"] == float(state["params"]["w"].sum())
    assert {"loss", "mean"} <= logged[0].keys()
    again = go(new_run(tmp_path, resume=str(run.folder)))
    assert_same(again, state)
    assert len(lines(run)) == 7


@pytest.mark.parametrize("crash_at", [4, 7, 13])
def test_a_killed_trial_goes_on_to_the_same_numbers(tmp_path, crash_at):
    whole = new_run(tmp_path / "whole")
    wanted = go(whole)
    broken = new_run(tmp_path / "broken")
    calls = 0

    def crash(state, batch):
        nonlocal calls
        calls += 1
        if calls == crash_at:
            raise RuntimeError("killed")
        return compiled(state, batch)

    with pytest.raises(RuntimeError, match="killed"):
        go(broken, crash)
    # the time up to the last checkpoint is kept with it
    assert (broken.folder / "elapsed.json").exists() == (crash_at > 5)
    with open(broken.folder / "metrics.jsonl", "a") as file:
        file.write('{"trial": "trial", "st')  # half a line
    resumed = new_run(tmp_path, resume=str(broken.folder))
    assert_same(go(resumed), wanted)
    assert lines(resumed) == lines(whole)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    wanted = go(new_run(tmp_path / "whole"))
    run = new_run(tmp_path / "stopped")
    calls = 0

    def press(state, batch):
        nonlocal calls
        calls += 1
        if calls == 7:
            signal.raise_signal(signal.SIGINT)
        return compiled(state, batch)

    with run_module._ctrl_c(run), pytest.raises(InterruptedRunError) as stopped:
        go(run, press)
    assert "stopped at step 7 of trial, saved" in str(stopped.value)
    assert f"python -m experiments.toy --resume {run.folder}" in str(stopped.value)
    assert_same(go(new_run(tmp_path, resume=str(run.folder))), wanted)


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    run = new_run(tmp_path)
    with run_module._ctrl_c(run):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("bad", "where"), [(2, "no checkpoint was written yet"), (8, "last good checkpoint is step 5")]
)
def test_a_loss_that_is_no_number_stops_with_its_step(tmp_path, bad, where):
    calls = 0

    def diverge(state, batch):
        nonlocal calls
        calls += 1
        state, metrics = compiled(state, batch)
        return state, metrics | ({"loss": jnp.float32(jnp.nan)} if calls == bad else {})

    with pytest.raises(TrainingFailedError, match=f"loss of trial is nan at step {bad}; .*{where}"):
        go(new_run(tmp_path), diverge)


def test_checkpoints_of_another_model_are_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path / "a")
    checkpoints.save(3, {"w": jnp.ones((2, 3)), "m": jnp.asarray(True)}, {"x": 1})
    like = {"w": jnp.zeros((2, 3)), "m": jnp.asarray(False)}
    step, state, extra = checkpoints.restore(like)
    assert (step, extra) == (3, {"x": 1})
    assert_same(state, {"w": jnp.ones((2, 3)), "m": jnp.asarray(True)})
    with pytest.raises(ExperimentError, match=r"another model: 'w' is float32\[2,3\], needed is"):
        checkpoints.restore({"w": jnp.zeros((3, 2)), "m": like["m"]})
    with pytest.raises(ExperimentError, match=r"another model: 'v' is not there"):
        checkpoints.restore({**like, "v": like["w"]})
    checkpoints.close()
    with pytest.raises(ExperimentError, match="holds no checkpoint"):
        Checkpoints(tmp_path / "b").restore(like)


def test_a_damaged_checkpoint_is_one_clear_error(tmp_path):
    checkpoints = Checkpoints(tmp_path / "a")
    checkpoints.save(1, {"w": jnp.ones(3)}, {})
    checkpoints.close()
    for path in (tmp_path / "a" / "1").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(ExperimentError, match="is damaged"):
        Checkpoints(tmp_path / "a").restore({"w": jnp.ones(3)})
