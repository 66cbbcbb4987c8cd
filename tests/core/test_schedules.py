"""Schedules against their formulas and at their ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax as sj


def test_cubic_rises_from_initial_to_final():
    schedule = sj.cubic(begin=10, end=50, freq=10, initial=0.2)
    steps = np.arange(80)
    got = jax.vmap(lambda t: schedule(t, 0.9))(steps)
    p = np.clip((steps - 10) / 40, 0, 1)
    np.testing.assert_allclose(got, 0.9 + (0.2 - 0.9) * (1 - p) ** 3, rtol=1e-5)
    np.testing.assert_array_equal(
        np.flatnonzero(jax.vmap(schedule.is_update)(steps)), [10, 20, 30, 40, 50]
    )


def test_jaxpruner_convention_is_one_step_ahead_and_counts_from_zero():
    schedule = sj.cubic(begin=7, end=31, freq=5, convention="jaxpruner")
    steps = np.arange(40)
    p = np.clip(steps + 1 - 7, 0, 24) / 24
    np.testing.assert_allclose(
        jax.vmap(lambda t: schedule(t, 0.8))(steps), 0.8 * (1 - (1 - p) ** 3), rtol=1e-5
    )
    np.testing.assert_array_equal(
        np.flatnonzero(jax.vmap(schedule.is_update)(steps)), [10, 15, 20, 25, 30]
    )


def test_a_forced_last_update_and_one_shot():
    forced = sj.cubic(begin=0, end=25, freq=10, force_final=True)
    due = jax.vmap(forced.is_update)(np.arange(40))
    np.testing.assert_array_equal(np.flatnonzero(due), [0, 10, 20, 25])
    shot = sj.one_shot(5)
    got = [(float(shot(t, 0.5)), bool(shot.is_update(t))) for t in (4, 5, 6)]
    assert got == [(0.0, False), (0.5, True), (0.5, False)]


def test_cosine_drop():
    steps = np.arange(120)
    got = jax.vmap(lambda t: sj.cosine_drop(t, end=100, alpha=0.3))(steps)
    wanted = np.where(steps < 100, 0.15 * (1 + np.cos(np.pi * steps / 100)), 0)
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_errors_name_argument_and_range(unchecked):
    for wrong, message in [
        ({"begin": -1, "end": 5}, "begin is -1"),
        ({"begin": 6, "end": 5}, "end is 5; it must not come before begin = 6"),
        ({"begin": 0, "end": 5, "freq": 0}, "freq is 0"),
        ({"begin": 0, "end": 5, "freq": 2}, "freq is 2; it must divide end - begin = 5"),
        ({"begin": 0, "end": 5, "freq": 5, "convention": "x"}, "convention is 'x'"),
    ]:
        with pytest.raises(ValueError, match=message):
            sj.cubic(**wrong)
    with pytest.raises(ValueError, match=r"final is 1\.5; a sparsity"):
        sj.polynomial_sparsity(jnp.int32(0), final=1.5, begin=0, end=1)
    with pytest.raises(ValueError, match=r"initial is 0\.1; the jaxpruner convention starts at 0"):
        sj.polynomial_sparsity(0, initial=0.1, final=0.5, begin=0, end=1, convention="jaxpruner")
    with pytest.raises(ValueError, match="convention is 'x'"):
        sj.polynomial_sparsity(0, final=0.5, begin=0, end=1, convention="x")
    with pytest.raises(ValueError, match="phase is 'x'"):
        sj.is_update_step(0, begin=0, end=1, freq=1, phase="x")
    with pytest.raises(ValueError, match="freq is 0"):
        sj.is_update_step(0, begin=0, end=1, freq=0)
    with pytest.raises(ValueError, match="alpha is 2"):
        sj.cosine_drop(0, end=1, alpha=2.0)
    with pytest.raises(ValueError, match="end is 0"):
        sj.cosine_drop(0, end=0)


def test_periodic_mask_decay_and_stepwise_patterns():
    periodic = sj.Periodic(begin=10, end=30, freq=10)
    got = [(float(periodic(t, 0.5)), bool(periodic.is_update(t))) for t in (9, 10, 15, 30, 40)]
    assert got == [(0.0, False), (0.5, True), (0.5, False), (0.5, True), (0.5, False)]
    linear, exponential = (
        f(coef=0.25, start=2) for f in (sj.linear_mask_decay, sj.exponential_mask_decay)
    )
    np.testing.assert_allclose([linear(t) for t in (0, 2, 4, 9)], [1, 1, 0.5, 0])
    np.testing.assert_allclose([exponential(t) for t in (0, 2, 4)], [1, 1, np.exp(-0.5)], rtol=1e-6)
    phases = {"epochs": 12, "dense_epochs": 2, "fine_tune_epochs": 2}
    assert sj.stepwise_nm(1, 8, kind="geometric", **phases) == (
        (2, 8, 64), (4, 4, 32), (6, 2, 16), (8, 1, 8),
    )  # fmt: skip
    densify = sj.stepwise_nm(1, 8, kind="densify", frames=2, **phases)
    assert densify == ((2, 1, 16), (6, 1, 8))
    assert sj.stepwise_nm(4, 4, **phases) == ((2, 4, 4),)


def test_errors_of_the_other_schedules(unchecked):
    phases = {"epochs": 4, "dense_epochs": 1, "fine_tune_epochs": 1}
    for wrong, message in [
        ({"kind": "x"}, "kind is 'x'"),
        ({"frames": 0}, "frames is 0"),
        ({"epochs": 2}, "leave 0 to decay in"),
        ({"n": 9}, "n is 9 and m is 8"),
        ({"n": 3}, "the stepwise kind needs a power of two"),
    ]:
        with pytest.raises(ValueError, match=message):
            sj.stepwise_nm(**({"n": 1, "m": 8} | phases | wrong))
    with pytest.raises(ValueError, match=r"coef is -1\.0 and start 0"):
        sj.linear_mask_decay(coef=-1.0)
    with pytest.raises(ValueError, match="freq is 0"):
        sj.Periodic(0, 1, 0)
