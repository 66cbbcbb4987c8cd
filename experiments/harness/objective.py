"""Training of any objective: compiled once for all seeds and learning rates, kept by `train`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, PRNGKeyArray, PyTree

from experiments.harness.sharding import state_shardings

Optimizer = Callable[[Array], optax.GradientTransformation]
Specs = Callable[[PyTree], Mapping[str, PartitionSpec]]


class Objective(NamedTuple):
    """What is learned.

    Attributes:
      init: key -> parameters, and what is remembered from step to step.
      loss: parameters, memory, batch, key -> what is minimised, (new memory, scalars to log); a
        `loss` among these is logged instead of what is minimised.
      remember: memory, parameters after the step, number of the step -> new memory.
    """

    init: Callable[[PRNGKeyArray], tuple[PyTree, PyTree]]
    loss: Callable[
        [PyTree, PyTree, Any, PRNGKeyArray], tuple[Array, tuple[PyTree, dict[str, Array]]]
    ]
    remember: Callable[[PyTree, PyTree, Array], PyTree] = lambda memory, params, step: memory


class Training(NamedTuple):
    """Functions of an objective, shared by seeds and learning rates.

    Attributes:
      init: seed, peak learning rate -> state. step: state, batch -> state, metrics.
    """

    init: Callable[[Any, Any], dict[str, Any]]
    step: Callable[[dict[str, Any], Any], tuple[dict[str, Any], dict[str, Array]]]


def make_training(objective: Objective, optimizer: Optimizer) -> Training:
    """Training as pure functions; `optimizer` is given the peak learning rate."""

    def init(seed: Any, peak: Any) -> dict[str, Any]:
        key = jax.random.key(seed)
        params, memory = objective.init(key)
        return {
            "params": params,
            "memory": memory,
            "opt": optimizer(jnp.float32(peak)).init(params),
            "step": jnp.zeros((), jnp.int32),
            "key": jax.random.key_data(key),
            "peak": jnp.float32(peak),
        }

    def step(state: dict[str, Any], batch: Any) -> tuple[dict[str, Any], dict[str, Array]]:
        params, count = state["params"], state["step"]
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), count)

        def loss(params: PyTree) -> tuple[Array, tuple[PyTree, dict[str, Array]]]:
            return objective.loss(params, state["memory"], batch, key)

        (value, (memory, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt = optimizer(state["peak"]).update(grads, state["opt"], params)
        params = optax.apply_updates(params, updates)
        memory = objective.remember(memory, params, count)
        new = {"params": params, "memory": memory, "opt": opt, "step": count + 1}
        return state | new, {"loss": value} | metrics

    return Training(init, step)


def compile_training(
    objective: Objective,
    optimizer: Optimizer,
    mesh: Mesh | None,
    *,
    specs: Specs = lambda params: {},
) -> Training:
    """`make_training`, jitted: on one device, or its batches over a mesh.

    Args:
      specs: parameters -> how the mesh divides them, by path; those left out are whole everywhere.
    """
    plain, layout = make_training(objective, optimizer), None
    if mesh is not None:
        state = jax.eval_shape(plain.init, 0, 0.0)
        layout = state_shardings(state, specs(state["params"]), mesh)
    outputs = None if layout is None else (layout, None)
    return Training(
        jax.jit(plain.init, out_shardings=layout),
        jax.jit(plain.step, donate_argnums=0, out_shardings=outputs),
    )


def adamw_cosine(
    peak: Array, *, warmup: int, steps: int, weight_decay: float, clip_norm: float = 1.0
) -> optax.GradientTransformation:
    """AdamW as language models take it: gradients clipped, a linear warm-up, a cosine to 0."""
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, steps)
    rate = lambda count: peak * shape(count)  # noqa: E731
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=weight_decay),
    )


def traced(
    objective: Objective, optimizer: Optimizer, batch: PyTree
) -> tuple[dict[str, Any], dict[str, Array]]:
    """What a training step returns, state and metrics, as shapes; nothing is computed."""
    training = make_training(objective, optimizer)
    return jax.eval_shape(training.step, jax.eval_shape(training.init, 0, 0.1), batch)
