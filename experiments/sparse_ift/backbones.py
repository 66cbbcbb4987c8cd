"""Backbones: how each arm is trained, and the setting of the paper as far as it can be built."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import PyTree

import sparsejax as sj
from experiments.harness.abstract_training import PAPER_IMAGES, PAPER_SIDE, check_backbone
from experiments.harness.backbone_arms import backbone_runner
from experiments.harness.data.images import ImageData
from experiments.harness.images import Method, backbone_builder
from experiments.harness.run import Run
from experiments.sparse_ift.config import SLUG, Arm, Config
from experiments.sparse_ift.networks import (
    Builder,
    Cost,
    build_arm,
    cost,
    optimizer,
    seeded_key,
    start_masks,
)


def plan(arm: Arm, config: Config, build: Builder, spent: Cost, steps: int) -> Method:
    """How a backbone is trained: parameters start masked, and the optimiser keeps them so.

    Args:
      build: of the dense model. spent: the arm's. steps: in all.
    """
    if arm.family == "dense":
        return Method(build)

    def start(params: PyTree) -> tuple[PyTree, Any]:
        masks_key, set_key = jax.random.split(seeded_key(params, spent.sparsity))
        return start_masks(masks_key, params, spent.sparsity), set_key

    def transform(
        params: PyTree, inner: optax.GradientTransformation
    ) -> optax.GradientTransformation:
        del params  # the masks are those of the state
        return optimizer(inner, arm, config, spent.sparsity, steps, start)

    return Method(
        lambda rngs: build_arm(arm, config, build, rngs),
        transform=transform,
        start=lambda params: sj.apply_masks(params, start(params)[0]),
    )


def backbone_arm(config: Config, run: Run) -> Callable[[str, float, int], dict[str, Any]]:
    """Trains a backbone of these settings, and says what each arm costs."""
    costs: dict[str, Cost] = {}

    def backbone_plan(name: str, data: ImageData) -> Method:
        arm, build = config.arms()[name], backbone_builder(config, data)
        image = jax.ShapeDtypeStruct((1, data.side, data.side, data.channels), jnp.float32)
        costs[name] = cost(arm, config, build, image)
        steps = config.epochs * (data.examples // config.batch)
        return plan(arm, config, build, costs[name], steps)

    train = backbone_runner(run, config, SLUG, backbone_plan)

    def priced(name: str, rate: float, seed: int) -> dict[str, Any]:
        found, spent = train(name, rate, seed), costs[name]
        flops = spent.training(config.arms()[name], config)
        return found | {"nonzeros": float(spent.nonzeros), "training_flops": flops}

    return priced


def check(config: Config) -> list[str]:
    """Builds the paper's setting and traces a training step of every sparse arm."""
    lines: list[str] = []
    for arm in config.arms().values():
        if arm.family != "dense":
            lines += _check_arm(config, arm)
    return lines


def _check_arm(config: Config, arm: Arm) -> list[str]:
    side = config.image_size or PAPER_SIDE.get(config.dataset, 0)
    steps = config.epochs * (PAPER_IMAGES.get(config.dataset, config.batch) // config.batch)
    spent: list[Cost] = []

    def method(build: Any) -> Method:
        spent.append(cost(arm, config, build, jax.ShapeDtypeStruct((1, side, side, 3), "float32")))
        return plan(arm, config, build, spent[0], steps)

    def describe(model: nnx.Module, images: Any) -> list[str]:
        del model, images
        found, shares = spent[0], sorted(spent[0].sparsity.values())
        share = f"{shares[0]:.4f}" + (f" to {shares[-1]:.4f}" if shares[0] != shares[-1] else "")
        line = (
            f"{arm.label}: {found.whole:,} multiply-accumulates forward without zeros; with "
            f"sparsity {share} in {len(shares)} layers {found.used:,.0f}, "
            f"{found.used / found.dense:.4f} of the dense network's {found.dense:,}"
        )
        return [line]

    return check_backbone(config, method, describe=describe)
