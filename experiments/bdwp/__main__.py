"""`python -m experiments.bdwp`."""

import functools
from typing import Any

from flax import nnx

import sparsejax as sj
from experiments.bdwp.array import array_costs, show_traffic
from experiments.bdwp.config import LABELS, PRESETS, SLUG, Config
from experiments.bdwp.laptop import digits_arm, pregeneration_is_exact
from experiments.bdwp.report import draw, make_claims
from experiments.harness.abstract_training import check_backbone
from experiments.harness.arms import (
    arms_table,
    as_metrics,
    print_table,
    run_arms,
)
from experiments.harness.backbone_arms import backbone_runner, nm_card
from experiments.harness.cli import main
from experiments.harness.config import Experiment, Result, Table
from experiments.harness.data.images import ImageData
from experiments.harness.images import Method, backbone_builder
from experiments.harness.run import Run
from sparsejax import weights


def run(config: Config, run: Run) -> Result:
    """Trains every arm, checks pre-generation, and puts networks on the modelled array."""
    arms, labels = config.arms(), config.labels()
    if config.is_mlp:
        train = functools.partial(digits_arm, config)
    else:

        def backbone_plan(arm: str, data: ImageData) -> Method:
            return plan(config, *arms[arm], backbone_builder(config, data))

        train = backbone_runner(run, config, SLUG, backbone_plan)
    found = run_arms(run, SLUG, config, train, list(arms), config.lr)
    columns: dict[str, Any] = {
        "test_accuracy": ("test accuracy (%)", 2),
        "test_loss": ("test loss", 3),
        "macs": ("MACs a step", "{:.3f}".format),
    }
    title = f"{config.model} on {config.dataset}, {config.epochs} epochs, {config.seeds} seed(s)"
    accuracy = arms_table(title, found, labels, columns)
    pattern = config.patterns()[0]
    costs = {name: array_costs(config, name, pattern) for name in config.cost_models}
    cost = Table(
        f"Training on a {config.array} array that skips zeros at {pattern}: MACs over dense, and "
        "speed-up of the modelled cycles",
        ("network", *(LABELS[method] for method in config.method)),
        tuple(
            (name, *(f"{macs:.3f}, {speed:.2f}x" for macs, speed in by_method.values()))
            for name, by_method in costs.items()
        ),
    )
    for table in (accuracy, cost):
        print_table(run, table)
    exact = None
    if config.is_mlp and config.pregenerate_steps:
        exact = pregeneration_is_exact(config)
    show_traffic(run, config)
    draw(config, run, found, costs)
    card = nm_card(config, len(config.lr), sj.GradientRule.STRAIGHT_THROUGH)
    metrics = {**as_metrics(found, curves=("accuracy_curve",)), "array": costs}
    return Result(make_claims(config, found, costs, exact), card, metrics, (accuracy, cost))


def plan(config: Config, method: str, pattern: sj.NM, build: Any) -> Method:
    """How a backbone is trained by a method: its layers multiply in another way, no more."""

    def sparse(rngs: nnx.Rngs) -> nnx.Module:
        model = build(rngs)
        if method == "dense":
            return model
        return weights.bdwp_model(model, pattern, decay=config.decay, method=method)  # type: ignore[arg-type]

    return Method(sparse)


def check(config: Config) -> list[str]:
    """Builds the paper's setting and traces a step with BDWP in its layers."""
    pattern = config.patterns()[0]

    def describe(model: nnx.Module, images: Any) -> list[str]:
        del images
        chosen = weights.bdwp_layers(model, pattern)
        return [f"{len(chosen)} layers are {pattern} in both passes; first and last stay dense"]

    return check_backbone(
        config, lambda build: plan(config, "bdwp", pattern, build), describe=describe
    )


EXPERIMENT = Experiment(
    slug=SLUG,
    paper="Efficient N:M sparse DNN training using algorithm, architecture, and dataflow co-design",
    presets=PRESETS,
    run=run,
    check=check,
)

if __name__ == "__main__":
    main(EXPERIMENT)
