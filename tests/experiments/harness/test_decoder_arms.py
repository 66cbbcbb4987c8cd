"""Small decoders trained alike: what is measured, resuming, compilations, meshes, bad settings."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.harness.config import ExperimentError
from experiments.harness.data import DatasetError, window_batches
from experiments.harness.decoder_arms import (
    Arm,
    DecoderConfig,
    Penalty,
    as_arm,
    check_decoder,
    decoder_runner,
    load_text,
)
from experiments.harness.run import Run

SMALL = DecoderConfig(
    d_model=16, heads=2, batch=8, seq_len=16, steps=12, warmup=2, eval_windows=20, seeds=2,
    checkpoint_every=5, log_every=4,
)  # fmt: skip


@functools.cache
def text():
    return load_text(SMALL)


def observe(details):
    return {"fired": jnp.mean(details["num_active"], dtype=jnp.float32)}


def relu_arm(config, **more):
    return Arm(config.decoder(256, d_ff=24, ffn="relu"), observe=observe, **more)


def test_the_text_is_the_top_level_modules_in_order():
    found = text()
    assert (found.vocab_size, found.name) == (256, "stdlib")
    whole = len(found.train) + len(found.validation)
    assert len(found.train) / whole == pytest.approx(0.95, abs=1e-3)
    import __future__  # the first of them by name

    with open(__future__.__file__) as file:
        assert bytes(found.train[:400].astype(np.uint8)).decode() == file.read()[:400]
    assert "def " in bytes(found.validation[-20_000:].astype(np.uint8)).decode()


def test_a_trial_is_trained_measured_and_resumed_to_the_same_numbers(tmp_path):
    config = dataclasses.replace(SMALL, out=str(tmp_path))
    run = Run("toy", config)
    found = decoder_runner(run, "toy", config, text(), {"relu": relu_arm(config)})("relu", 3e-3, 1)
    assert found.curves["step"] == [4, 8, 12]
    assert found.curves["loss"][-1] < found.curves["loss"][0]
    assert set(found.curves) == {"step", "loss", "fired"}
    assert 2 < found.test_loss < np.log(256)
    for shares in (found.test, found.train):
        assert 0 < shares["fired"] < 24
    stored = as_arm(found)
    assert stored["test_loss"] == found.test_loss
    assert stored["test_fired"] == found.test["fired"]
    assert stored["train_fired"] == found.train["fired"]

    # as after a kill between two checkpoints
    trial = run.folder / "trials" / "relu-lr0.003-seed1"
    assert (trial / "12").is_dir()
    resumed = Run("toy", dataclasses.replace(config, resume=str(run.folder)))
    again = decoder_runner(resumed, "toy", config, text(), {"relu": relu_arm(config)})
    assert as_arm(again("relu", 3e-3, 1)) == stored
    shutil.rmtree(trial / "12")
    assert as_arm(again("relu", 3e-3, 1)) == stored


def test_a_host_can_go_on_with_the_batches_of_all():
    draw = functools.partial(window_batches, text().train, seq_len=16, seed=3)
    parts, whole = [draw(batch=4, shard=(i, 2)) for i in range(2)], draw(batch=8)
    for _ in range(3):
        for part in parts:
            next(part)
    whole.set_state(parts[1].get_state())
    np.testing.assert_array_equal(next(whole), np.concatenate([next(part) for part in parts]))


def test_seeds_and_rates_of_an_arm_share_their_compilations(tmp_path, caplog):
    config = dataclasses.replace(SMALL, out=str(tmp_path), steps=3)
    train = decoder_runner(Run("toy", config), "toy", config, text(), {"relu": relu_arm(config)})
    with jax.log_compiles():
        trials = ((3e-3, 0), (3e-3, 1), (1e-2, 0))
        losses = [train("relu", *trial).test_loss for trial in trials]
    compiled = [r.message for r in caplog.records if "Finished XLA compilation" in r.message]
    for name, shapes in (("init", 1), ("step", 1), ("measured", 2)):  # windows, and batches
        assert sum(f"jit({name})" in message for message in compiled) == shapes, name
    assert len(set(losses)) == 3


def test_a_penalty_is_in_the_loss_and_keeps_its_state(tmp_path):
    config = dataclasses.replace(SMALL, out=str(tmp_path), log_every=1, steps=5)

    def apply(details, state):
        extra = 100 * state + 0 * jnp.mean(details["num_active"])
        return extra, state + 1, {"penalty": extra}

    plain = relu_arm(config)
    arms = {"plain": plain, "penalised": plain._replace(penalty=Penalty(jnp.float32(0), apply))}
    train = decoder_runner(Run("toy", config), "toy", config, text(), arms)
    found = {name: train(name, 3e-3, 0) for name in arms}
    assert found["penalised"].curves["penalty"] == [0, 100, 200, 300, 400]
    # without a gradient it changes nothing, and the loss that is logged is the cross-entropy
    np.testing.assert_allclose(
        found["penalised"].curves["loss"], found["plain"].curves["loss"], rtol=1e-5
    )


def test_a_mesh_trains_to_the_same_numbers(tmp_path):
    found = {}
    for mesh in (None, "data=4,model=2"):
        config = dataclasses.replace(SMALL, out=str(tmp_path), mesh=mesh, steps=6)
        arms = {"relu": relu_arm(config)}
        found[mesh] = decoder_runner(Run("toy", config), "toy", config, text(), arms)(
            "relu", 3e-3, 0
        )
    assert jax.device_count() == 8
    kernel = found["data=4,model=2"].params.blocks.ffn.up_proj.kernel[...]
    assert "model" in str(kernel.sharding.spec)
    one, many = (as_arm(found[mesh]) for mesh in found)
    np.testing.assert_allclose(one["test_loss"], many["test_loss"], rtol=1e-3)
    np.testing.assert_allclose(one["curves"]["loss"], many["curves"]["loss"], rtol=1e-3)
    np.testing.assert_allclose(one["test_fired"], many["test_fired"], rtol=1e-2)


def test_an_arm_is_built_abstractly():
    (line,) = check_decoder(SMALL, relu_arm(SMALL))
    # bytes twice, positions, 4 x 16 x 16 of attention, 2 x 16 x 24, two norms, and the last norm
    count = 2 * 256 * 16 + 16 * 16 + 2 * (4 * 16 * 16 + 2 * 16 * 24 + 2 * 16) + 16
    assert line.startswith(f"{count:,} parameters; a step of 8 x 16 tokens gives fired, loss")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 0}, "d_model is 0; it must be at least 1"),
        ({"batch": 0}, "batch is 0; it must be at least 1"),
        ({"warmup": 12}, "warmup is 12; it must be below steps = 12"),
        ({"learning_rates": ()}, r"learning_rates are \(\); give positive ones that differ"),
        ({"learning_rates": (1e-3, 1e-3)}, "give positive ones that differ"),
        ({"learning_rates": (-1e-3,)}, "give positive ones that differ"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0 and eval_windows 20; neither may be neg"),
        ({"eval_windows": -1}, "weight_decay is 0.1 and eval_windows -1; neither may be neg"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ExperimentError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_models_and_texts_that_cannot_be(tmp_path):
    with pytest.raises(ExperimentError, match="n_kv_heads is 3; it must divide n_heads"):
        dataclasses.replace(SMALL, kv_heads=3).decoder(256, d_ff=8)
    with pytest.raises(ExperimentError, match="ffn_k is None; 'spark' needs it"):
        SMALL.decoder(256, d_ff=8, ffn="spark")
    with pytest.raises(DatasetError, match="nowhere"):
        load_text(dataclasses.replace(SMALL, dataset="nowhere"))
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(DatasetError, match="needs"):
        load_text(dataclasses.replace(SMALL, text=(str(short),)))
