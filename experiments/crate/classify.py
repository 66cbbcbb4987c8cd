"""Classifiers: CRATE and a ViT of equal width, and what CRATE's layers do to their tokens."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, PyTree

from experiments.crate.config import SLUG, ClassifyConfig
from experiments.crate.figures import draw_attention, make_card
from experiments.crate.measures import first_images, share_images, unnormalised
from experiments.harness.abstract_training import check_backbone
from experiments.harness.arms import (
    Found,
    Metrics,
    arms_table,
    as_metrics,
    best_rate,
    mean,
    print_table,
    run_arms,
)
from experiments.harness.backbone_arms import backbone_runner
from experiments.harness.config import Claim, Result
from experiments.harness.data.images import ImageData, load_images
from experiments.harness.images import Method, backbone_builder
from experiments.harness.plots import draw_curves, new_figure, save
from experiments.harness.progress import mean_and_deviation
from experiments.harness.rows import over_batches
from experiments.harness.run import Run
from experiments.harness.training import size_of
from sparsejax.models import CrateClassifier, class_attention, layer_statistics

LABELS = {"crate": "CRATE", "vit": "ViT"}
POINTS = 2.0  # of accuracy, the allowed distance
MEASURES = ("rate", "density")


def run_classify(config: ClassifyConfig, run: Run) -> Result:
    """Trains both arms, compares accuracies and measures CRATE's layers."""
    share = functools.partial(share_images, config)
    train = backbone_runner(
        run,
        config,
        SLUG,
        lambda arm, data: plan(config, arm, backbone_builder(config.of_family(arm), data)),
        share=share,
        after=measurer(config),
    )
    found = run_arms(run, SLUG, config, train, list(LABELS), config.learning_rates)
    columns = {
        "parameters": ("parameters", lambda n: f"{n:,.0f}"),
        "test_accuracy": ("test accuracy (%)", 2),
        "test_loss": ("test loss", 3),
        "train_loss": ("train loss", 3),
    }
    table = arms_table(
        f"{config.model} and a ViT of its width on {config.dataset}, {config.epochs} epochs, "
        f"{config.seeds} seed(s)",
        found,
        LABELS,
        columns,
    )
    print_table(run, table)
    if run.is_main:
        data = load_images(config.dataset, side=config.image_size)
        draw(config, run, best_rate(found["crate"])[1], share(data, config.seed))
    budget = (
        f"{config.epochs} epochs for both arms, each at its best of "
        f"{len(config.learning_rates)} learning rates"
    )
    metrics = as_metrics(found, curves=("attention",))
    return Result(make_claims(config, found), make_card(config, budget), metrics, (table,))


def plan(config: ClassifyConfig, arm: str, build: Callable[..., nnx.Module]) -> Method:
    """How an arm is trained, whose settings `build` has: of equal width, depth and heads."""
    changes = {**config.sizes(), **({"lam": config.lam} if arm == "crate" else {})}
    return Method(lambda rngs: build(rngs, **changes))


def measurer(config: ClassifyConfig) -> Callable[[str, dict[str, Any], ImageData], dict[str, Any]]:
    """What `backbone_runner` adds to an arm: its size, and of CRATE the measures of its layers.

    Of every layer `rate` and `density`, means and deviations over the test images, with the trained
    and with the initial weights; and what the class token attends to in the last one.
    """

    @functools.cache
    def compiled(side: int, channels: int, classes: int) -> tuple[Any, Any, Any]:
        sizes = config.crate(side=side, channels=channels, classes=classes)
        init = lambda key: nnx.state(CrateClassifier(sizes, rngs=nnx.Rngs(key)))  # noqa: E731
        graph = nnx.split(nnx.eval_shape(lambda: CrateClassifier(sizes, rngs=nnx.Rngs(0))))[0]

        @jax.jit
        def layers(params: PyTree, images: Array) -> dict[str, Array]:
            found = layer_statistics(nnx.merge(graph, params), images)
            return {name: values.T for name, values in found.items()}

        maps = lambda params, images: class_attention(nnx.merge(graph, params), images)  # noqa: E731
        return jax.jit(init), layers, jax.jit(maps)

    def measure(arm: str, state: dict[str, Any], data: ImageData) -> dict[str, Any]:
        params = state["params"]
        found: dict[str, Any] = {"parameters": size_of(params)}
        if arm != "crate":
            return found
        init, layers, maps = compiled(data.side, data.channels, data.classes)
        images, _ = first_images(data, config.measured)
        start = init(jax.random.wrap_key_data(state["key"]))  # the draw that training began with
        for name, weights in (("random", start), ("trained", params)):
            measured = over_batches(functools.partial(layers, weights), images)
            for measure_name, values in measured.items():
                found[f"{measure_name}_{name}"] = values.mean(0).tolist()
                found[f"{measure_name}_{name}_deviation"] = values.std(0, ddof=1).tolist()
        attention = np.asarray(maps(params, images[: config.shown]), float)
        return found | {"attention": attention.round(4).tolist()}

    return measure


def make_claims(config: ClassifyConfig, found: Found) -> tuple[Claim, ...]:
    """Accuracy against the ViT, and how the measures run with depth."""
    crate, vit = (best_rate(found[arm])[1] for arm in ("crate", "vit"))
    ours, theirs = crate["test_accuracy"], vit["test_accuracy"]
    share = mean(crate["parameters"]) / mean(vit["parameters"])
    rates, densities = (np.mean(crate[f"{name}_trained"], axis=0) for name in MEASURES)
    before = (np.mean(crate[f"{name}_random"], axis=0) for name in MEASURES)
    texts = [f"{a.mean():.{digits}f}" for a, digits in zip(before, (1, 3), strict=True)]
    return (
        Claim(
            f"with {share:.2f} of the parameters of a ViT of equal width CRATE is at most "
            f"{POINTS:g} points less accurate",
            mean(ours) >= mean(theirs) - POINTS,
            f"{mean_and_deviation(ours, 2)} %",
            f"{mean_and_deviation(theirs, 2)} %",
            config.seeds,
        ),
        Claim(
            "in the trained CRATE the coding rate falls from each layer to the next, and so does "
            "the share of codes that are not 0",
            bool((np.diff(rates) < 0).all() and (np.diff(densities) < 0).all()),
            "rates " + ", ".join(f"{v:.1f}" for v in rates)
            + "; shares " + ", ".join(f"{v:.2f}" for v in densities),
            f"random weights, mean of the layers: rate {texts[0]}, share {texts[1]}",
            config.seeds,
        ),
    )  # fmt: skip


def draw(config: ClassifyConfig, run: Run, crate: Metrics, data: ImageData) -> None:
    """The measures by layer, and the attention of the first seed's last layer."""
    titles = {"rate": "coding rate of the projected tokens (nats)", "density": "codes not 0"}
    for name, text in titles.items():
        figure, axes = new_figure(
            f"CRATE on {config.dataset}, {config.seeds} seed(s), test images", "layer", text
        )
        curves = {
            f"{kind} weights": [
                (np.arange(1, len(values) + 1), values) for values in crate[f"{name}_{kind}"]
            ]
            for kind in ("random", "trained")
        }
        draw_curves(axes, curves)
        axes.legend(frameon=False)
        save(figure, run.folder / f"{name}.png")
    images, _ = first_images(data, config.shown)
    maps, title = np.asarray(crate["attention"][0]), "attention of the class token, last layer"
    draw_attention(unnormalised(images, data), maps, title, run.folder / "attention.png")


def check_classify(config: ClassifyConfig) -> list[str]:
    """Builds the paper's model and traces a training step; nothing if it can run."""
    lines = check_backbone(config, lambda build: plan(config, "crate", build))
    if not lines:
        return []
    vit = check_backbone(config.of_family("vit"), lambda build: plan(config, "vit", build))
    return [*lines[:-1], *vit]
