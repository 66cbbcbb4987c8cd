"""Arms of a comparison that are trainings of a backbone, and what their experiments say alike."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import sparsejax as sj
from experiments.harness.data.images import ImageData, load_images
from experiments.harness.images import (
    ImageConfig,
    Method,
    Trainer,
    backbone_builder,
    compile_trainer,
    train_backbone,
)
from experiments.harness.nm_training import scope_size
from experiments.harness.run import Run
from experiments.harness.sharding import make_mesh


def backbone_runner(
    run: Run,
    config: ImageConfig,
    slug: str,
    plan: Callable[[str, ImageData], Method],
    *,
    scope: sj.Where = None,
    share: Callable[[ImageData, int], ImageData] = lambda data, seed: data,
    after: Callable[[str, dict[str, Any], ImageData], Mapping[str, Any]] = lambda *_: {},
) -> Callable[[str, float, int], dict[str, Any]]:
    """Reads the images once and compiles every arm once; `run_arms` calls what it returns.

    Args:
      plan: arm, images -> how it is trained.
      scope: the sparse leaves, of which SAD is a share.
      share: images, seed -> those that the seed trains and tests on, as many for every seed.
      after: arm, trained state, these images -> more JSON values.

    Returns:
      Arm, learning rate, seed -> what `train_backbone` found, with `sad` where masks were followed.
    """
    data, mesh = load_images(config.dataset, side=config.image_size), make_mesh(config.mesh)

    @functools.cache
    def trainer(arm: str) -> Trainer:
        return compile_trainer(config, share(data, 0), plan(arm, data), mesh)

    def train(arm: str, rate: float, seed: int) -> dict[str, Any]:
        trial = re.sub(r"[^\w.-]+", "-", f"{arm}-lr{rate:g}-seed{seed}")
        own = share(data, seed)
        found = train_backbone(run, trial, config, own, trainer(arm), seed=seed, peak=rate,
                               mesh=mesh, slug=slug,
                               after=lambda state: after(arm, state, own))  # fmt: skip
        if "flips" in found:
            found["sad"] = found.pop("flips") / scope_size(backbone_builder(config, data), scope)
        return found

    return train


def nm_card(config: ImageConfig, rates: int, gradient: sj.GradientRule) -> sj.SparsityCard:
    """The card of N:M training from scratch.

    Args:
      rates: how many learning rates every arm was given. gradient: what pruned entries feel.
    """
    return sj.SparsityCard(
        what=sj.WhatIsSparse.WEIGHTS,
        granularity=sj.Granularity.N_M,
        timing=sj.Timing.DURING,
        path=sj.TrainingPath.DENSE_TO_SPARSE,
        dynamics=sj.MaskDynamics.DYNAMIC,
        allocation=sj.Allocation.UNIFORM,
        criterion=sj.Criterion.MAGNITUDE,
        gradient=gradient,
        seeds=config.seeds,
        budget=f"{config.epochs} epochs for every arm, each at its best of {rates} learning rates",
        simulated=True,
    )
