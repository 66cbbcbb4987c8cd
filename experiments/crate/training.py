"""Training on images of what is no classifier."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.crate.config import SLUG, ImagesConfig
from experiments.crate.measures import share_images
from experiments.harness.abstract_training import PAPER_SIDE, abstract_images
from experiments.harness.config import ExperimentError
from experiments.harness.data import missing_dataset
from experiments.harness.data.images import ImageData
from experiments.harness.images import learning_rate, make_optimizer
from experiments.harness.objective import Objective, compile_training, traced
from experiments.harness.run import Run
from experiments.harness.sharding import host_batch, make_mesh
from experiments.harness.training import size_of, train


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
    state, _ = traced(
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
    batch, per_epoch = host_batch(config.batch), examples // config.batch
    if not per_epoch:
        raise ExperimentError(f"batch is {config.batch}; there are {examples} examples")
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
