"""Training of what is no classifier: an objective with a memory, kept and resumed as any other."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray, PyTree

from experiments.crate.config import SLUG, ImagesConfig
from experiments.crate.measures import share_images
from experiments.harness.abstract_training import PAPER_SIDE, abstract_images
from experiments.harness.config import ExperimentError
from experiments.harness.data import missing_dataset
from experiments.harness.data.images import ImageData
from experiments.harness.images import learning_rate, make_optimizer
from experiments.harness.run import Run
from experiments.harness.sharding import make_mesh, state_shardings
from experiments.harness.training import size_of, train


class Objective(NamedTuple):
    """What is learned.

    Attributes:
      init: key -> parameters, and what is remembered from step to step.
      loss: parameters, memory, batch, key -> loss, new memory.
      remember: memory, parameters after the step, number of the step -> new memory.
    """

    init: Callable[[PRNGKeyArray], tuple[PyTree, PyTree]]
    loss: Callable[[PyTree, PyTree, Any, PRNGKeyArray], tuple[Array, PyTree]]
    remember: Callable[[PyTree, PyTree, Array], PyTree] = lambda memory, params, step: memory


class Training(NamedTuple):
    """Compiled functions of an objective, shared by seeds and learning rates.

    Attributes:
      init: seed, peak learning rate -> state. step: state, batch -> state, metrics.
    """

    init: Callable[[int, float], dict[str, Any]]
    step: Callable[[dict[str, Any], Any], tuple[dict[str, Any], dict[str, Array]]]


def make_training(
    objective: Objective, optimizer: Callable[[Array], optax.GradientTransformation]
) -> Training:
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

        def loss(params: PyTree) -> tuple[Array, PyTree]:
            return objective.loss(params, state["memory"], batch, key)

        (value, memory), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt = optimizer(state["peak"]).update(grads, state["opt"], params)
        params = optax.apply_updates(params, updates)
        memory = objective.remember(memory, params, count)
        new = {"params": params, "memory": memory, "opt": opt, "step": count + 1}
        return state | new, {"loss": value}

    return Training(init, step)


def compile_training(
    objective: Objective,
    optimizer: Callable[[Array], optax.GradientTransformation],
    mesh: Mesh | None,
) -> Training:
    """`make_training`, jitted; whole on one device, or data over a mesh."""
    plain, layout = make_training(objective, optimizer), None
    if mesh is not None:
        layout = state_shardings(jax.eval_shape(plain.init, 0, 0.0), {}, mesh)
    outputs = None if layout is None else (layout, None)
    return Training(
        jax.jit(plain.init, out_shardings=layout),
        jax.jit(plain.step, donate_argnums=0, out_shardings=outputs),
    )


def traced(
    objective: Objective, optimizer: Callable[[Array], optax.GradientTransformation], batch: PyTree
) -> dict[str, Any]:
    """The state after a training step, as shapes; nothing is computed."""
    training = make_training(objective, optimizer)
    state = jax.eval_shape(training.init, 0, 0.1)
    return jax.eval_shape(training.step, state, batch)[0]


def check_images(
    config: ImagesConfig, objective: Callable[[ImageData, int], Objective]
) -> list[str]:
    """What a preset of a paper says: a step of its training is traced; nothing if it can run.

    objective: images, steps in all -> what is learned.
    """
    missing = missing_dataset(config.dataset, PAPER_SIDE)
    if missing is None:
        return []
    data = abstract_images(config)
    per_epoch, side = data.examples // config.batch, data.side
    state = traced(
        objective(data, config.epochs * per_epoch),
        lambda peak: make_optimizer(config, learning_rate(config, per_epoch, peak)),
        {"image": jax.ShapeDtypeStruct((config.batch, side, side, data.channels), jnp.uint8)},
    )
    count = size_of(state["params"])
    setting = (
        f"paper setting: {config.preset} of {config.model} on {config.dataset}, "
        f"{count:,} parameters, {config.epochs} epochs of {per_epoch:,} steps "
        f"with {config.batch} images of {side} x {side}"
    )
    return [setting, "one training step traced", f"checked abstractly: {missing}"]


def host_batch(batch: int, examples: int) -> int:
    """A process's part of a batch.

    Raises ExperimentError for a batch that the processes do not divide, or beyond the examples.
    """
    hosts = jax.process_count()
    if batch % hosts:
        raise ExperimentError(f"batch is {batch}; {hosts} processes must divide it")
    if batch > examples:
        raise ExperimentError(f"batch is {batch}; there are {examples} examples")
    return batch // hosts


def image_trainer(
    run: Run,
    config: ImagesConfig,
    data: ImageData,
    objective: Callable[[int], Objective],
    measure: Callable[[dict[str, Any], ImageData, int], dict[str, Any]],
) -> Callable[[str, float, int], dict[str, Any]]:
    """Builds `train(arm, rate, seed)`, compiled once.

    Args:
      objective: steps in all -> what is learned. measure: trained state, images of the seed, seed
        -> JSON values.
    """
    mesh, examples = make_mesh(config.mesh), share_images(config, data, 0).examples
    batch, per_epoch = host_batch(config.batch, examples), examples // config.batch
    steps = config.epochs * per_epoch
    training = compile_training(
        objective(steps),
        lambda peak: make_optimizer(config, learning_rate(config, per_epoch, peak)),
        mesh,
    )
    shard = (jax.process_index(), jax.process_count())

    def run_arm(arm: str, rate: float, seed: int) -> dict[str, Any]:
        own = share_images(config, data, seed)
        batches = own.batches(batch=batch, seed=seed, shard=shard)
        state = train(run, f"{arm}-lr{rate:g}-seed{seed}", state=training.init(seed, rate),
                      step=training.step, batches=batches, steps=steps, mesh=mesh,
                      slug=SLUG)  # fmt: skip
        return measure(state, own, seed)

    return run_arm
