"""Trainings of any objective: what a step does, what is remembered, and how it is laid out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from experiments.harness.objective import (
    Objective,
    adamw_cosine,
    compile_training,
    make_training,
    traced,
)

BATCH = jnp.arange(8.0).reshape(4, 2)


def start(key):
    return {"w": jax.random.normal(key, (2, 4))}, {"seen": jnp.int32(0), "last": jnp.zeros(2)}


def loss(params, memory, batch, key):
    noise = jax.random.normal(key)
    value = jnp.mean((batch @ params["w"] - 1) ** 2)
    return value, ({**memory, "seen": memory["seen"] + 1}, {"noise": noise})


def remember(memory, params, step):
    return {**memory, "last": jnp.stack([params["w"].sum(), step.astype(jnp.float32)])}


GOAL = Objective(start, loss, remember)


def test_a_step_is_the_optimisers_and_the_memory_sees_what_came_of_it():
    training = compile_training(GOAL, optax.sgd, None)
    state = training.init(3, 0.01)
    params, _ = start(jax.random.key(3))
    np.testing.assert_array_equal(state["params"]["w"], params["w"])
    error = jax.value_and_grad(lambda p: jnp.mean((BATCH @ p["w"] - 1) ** 2))
    noises = []
    for count in range(3):
        value, grads = error(params)
        params = jax.tree.map(lambda p, g: p - 0.01 * g, params, grads)
        state, metrics = training.step(state, BATCH)
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
        np.testing.assert_allclose(state["params"]["w"], params["w"], rtol=1e-5)
        np.testing.assert_allclose(state["memory"]["last"], [params["w"].sum(), count], rtol=1e-5)
        noises.append(float(metrics["noise"]))
    assert int(state["memory"]["seen"]) == int(state["step"]) == 3
    assert len(set(noises)) == 3  # a new key in every step


def test_a_loss_among_the_metrics_is_logged_instead():
    def penalised(params, memory, batch, key):
        value, (memory, _) = loss(params, memory, batch, key)
        return value + 100, (memory, {"loss": value})

    metrics = {}
    for name, goal in (("plain", GOAL), ("penalised", GOAL._replace(loss=penalised))):
        training = make_training(goal, optax.sgd)
        _, metrics[name] = training.step(training.init(0, 0.1), BATCH)
    assert metrics["penalised"]["loss"] == metrics["plain"]["loss"]


def test_shapes_without_computing():
    state, metrics = traced(GOAL, optax.adam, jax.ShapeDtypeStruct((4, 2), jnp.float32))
    assert state["params"]["w"].shape == (2, 4)
    assert {name: value.shape for name, value in metrics.items()} == {"loss": (), "noise": ()}


def test_parameters_are_divided_as_told_and_moments_with_them(mesh):
    whole = compile_training(GOAL, optax.adam, None)
    spec = PartitionSpec(None, "model")
    parts = compile_training(GOAL, optax.adam, mesh, specs=lambda params: {"w": spec})
    states = [training.init(0, 0.1) for training in (whole, parts)]
    for _ in range(2):
        states = [t.step(s, BATCH)[0] for t, s in zip((whole, parts), states, strict=True)]
    one, many = states
    assert many["params"]["w"].sharding.spec == many["opt"][0].mu["w"].sharding.spec == spec
    np.testing.assert_allclose(one["params"]["w"], many["params"]["w"], rtol=1e-5)


def test_the_rate_rises_and_falls_to_nothing():
    optimizer = adamw_cosine(jnp.float32(0.5), warmup=2, steps=6, weight_decay=0.0)
    params = {"w": jnp.ones(3)}
    state, sizes = optimizer.init(params), []
    for _ in range(7):
        updates, state = optimizer.update({"w": jnp.full(3, 100.0)}, state, params)
        sizes.append(float(-updates["w"][0]))
    np.testing.assert_allclose(sizes[:3], [0, 0.25, 0.5], rtol=1e-3, atol=1e-6)
    assert sizes[2] > sizes[4] > sizes[6] == 0
