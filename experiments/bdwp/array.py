"""What training costs on a systolic array that skips zeros, and in traffic of weights."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import sparsejax as sj
from experiments.bdwp.config import PAPER_MODELS, Config
from experiments.harness.images import build_backbone
from experiments.harness.run import Run
from sparsejax import weights

Costs = dict[str, dict[str, tuple[float, float]]]
"""By network and method: MACs over dense, and speed-up."""


def array_costs(config: Config, name: str, pattern: sj.NM) -> dict[str, tuple[float, float]]:
    """MAC ratio and speed-up on the array of every method, for a network of the paper.

    Layers that are dense in training count as such: the first, and the classifier.
    """
    batch, side, classes = PAPER_MODELS[name]
    shaped = dataclasses.replace(config, model=name, dataset="cifar10", dtype="float32")
    model = nnx.eval_shape(
        lambda: build_backbone(shaped, classes=classes, side=side, channels=3, rngs=nnx.Rngs(0))
    )
    images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)
    options = {} if name.startswith("vit") else {"train": True}
    layers = weights.layer_products(model, images, **options)
    rows, cols = config.array_size()

    def total(method: str) -> tuple[int, int]:
        chosen: Sequence[str] = ()
        if method != "dense":
            chosen = weights.bdwp_layers(model, pattern, method=method)  # type: ignore[arg-type]
        macs = cycles = 0
        for layer in layers:
            how: Any = method if layer.path in chosen else "dense"
            products = layer.products
            macs += weights.training_macs(products, pattern.n, pattern.m, method=how)["total"]
            cycles += sum(
                stage.cycles
                for stage in weights.schedule_offline(
                    products, pattern.n, pattern.m, method=how, rows=rows, cols=cols,
                    adder_latency=config.adder_latency,
                )
            )  # fmt: skip
        return macs, cycles

    macs, cycles = total("dense")
    found = {method: total(method) for method in config.method}
    return {method: (m / macs, cycles / c) for method, (m, c) in found.items()}


def show_traffic(run: Run, config: Config) -> None:
    """Bytes of weights that a step moves, with and without pre-generation."""
    for pattern in dict.fromkeys((*config.patterns(), sj.NM(2, 4))):
        made, fly = (
            weights.weight_traffic(pattern.n, pattern.m, pregenerated=p) for p in (True, False)
        )
        run.show(
            f"weights at {pattern}: {made:.3g} bytes an entry and step pre-generated, {fly:.3g} "
            f"masked on the fly"
        )
