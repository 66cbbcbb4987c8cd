"""Classifiers of sparse codes: what heterogeneous kernels are worth to a network behind them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

import sparsejax as sj
from experiments.harness.abstract_training import (
    PAPER_SIDE,
    abstract_images,
    trace_training,
)
from experiments.harness.arms import (
    Found,
    arms_table,
    as_metrics,
    best_rate,
    mean,
    print_table,
    run_arms,
)
from experiments.harness.config import Claim, ExperimentError, Result
from experiments.harness.data import missing_dataset
from experiments.harness.data.images import ImageData, load_images
from experiments.harness.digits import static_settings
from experiments.harness.images import Method, backbone_builder, compile_trainer, train_backbone
from experiments.harness.progress import mean_and_deviation
from experiments.harness.rows import over_batches
from experiments.harness.run import Run
from experiments.harness.sharding import make_mesh
from experiments.harness.training import size_of
from experiments.kernel_heterogeneity.coding import dictionaries, encode_as_studied
from experiments.kernel_heterogeneity.config import LABELS, SLUG, DownstreamConfig
from experiments.kernel_heterogeneity.report import make_card
from sparsejax.coding import local_contrast_normalise

NAMES = ("full", "thin")
POINTS = 1.0  # of accuracy, the allowed distance
_CHUNK = 64  # images that are coded together


def run_downstream(config: DownstreamConfig, run: Run) -> Result:
    """Codes the images with both dictionaries, and trains on the codes at every cutoff."""
    data = load_images(config.dataset, side=config.image_size)
    arms = {f"{name}-{cutoff:g}": (name, cutoff) for name in NAMES for cutoff in config.cutoffs}
    mesh = make_mesh(config.mesh)

    @functools.lru_cache(maxsize=1)
    def coded(name: str) -> dict[float, tuple[ImageData, float]]:
        return code_images(config, data, dictionaries(config)[name])

    @functools.cache
    def trainer() -> Any:
        maps = as_maps(config, data)
        return compile_trainer(config, maps, Method(backbone_builder(config, maps)), mesh)

    def train(arm: str, rate: float, seed: int) -> dict[str, Any]:
        name, cutoff = arms[arm]
        maps, active = coded(name)[cutoff]
        found = train_backbone(run, f"{arm}-lr{rate:g}-seed{seed}", config, maps, trainer(),
                               seed=seed, peak=rate, mesh=mesh, slug=SLUG)  # fmt: skip
        return {**found, "active": active}

    found = run_arms(run, SLUG, config, train, list(arms), config.learning_rates)
    labels = {
        arm: f"{LABELS[name]}, {f'from {cutoff:g}' if cutoff else 'all'}"
        for arm, (name, cutoff) in arms.items()
    }
    table = arms_table(
        f"{config.model} on the codes of {config.dataset}, {config.epochs} epochs, "
        f"{config.seeds} seed(s)",
        found,
        labels,
        {"active": ("active per pixel", 2), "test_accuracy": ("test accuracy (%)", 2),
         "test_loss": ("test loss", 3)},
    )  # fmt: skip
    print_table(run, table)
    budget = (
        f"{config.epochs} epochs for every arm, each at its best of "
        f"{len(config.learning_rates)} learning rates"
    )
    card = make_card(config, sj.Timing.DURING, budget)
    return Result(make_claims(config, found), card, as_metrics(found), (table,))


def as_maps(
    config: DownstreamConfig, data: ImageData, train: Any = (), test: Any = ()
) -> ImageData:
    """The dataset with maps for images, which training shall take as they are."""
    kernels = config.kernels
    return dataclasses.replace(
        data,
        channels=kernels,
        train=train,
        test=test,
        mean=np.zeros(kernels, np.float32),
        deviation=np.full(kernels, 1 / 255, np.float32),  # pixels would be divided by 255
    )


def code_images(
    config: DownstreamConfig, data: ImageData, filters: Float[Array, "kh kw m"]
) -> dict[float, tuple[ImageData, float]]:
    """Maps of both splits, and active coefficients per pixel of the training images, by cutoff.

    Every map is divided by its root mean square over the training images; a coefficient that is not
    active stays 0. In float16: at the paper's size 18 GB for each cutoff.

    Raises:
      ExperimentError: images that are not held in memory, or are too small.
    """
    if not data.fixed:
        raise ExperimentError(f"{data.name} is not held in memory; its codes would not be, either")
    frame, least = data.side * config.enlarge, max(7, config.size)
    if frame < least:
        raise ExperimentError(
            f"enlarge is {config.enlarge}: images of {frame} pixels are coded, of which kernels "
            f"and the local norm need {least}"
        )
    code = functools.partial(maps_of, filters=filters, config=static_settings(config))
    train, test = (
        over_batches(code, part["image"], size=_CHUNK) for part in (data.train, data.test)
    )
    found = {}
    for i, cutoff in enumerate(config.cutoffs):
        square = sum(np.square(part, dtype=np.float64).sum((0, 1, 2))
                     for part in np.array_split(train["maps"][:, i], 64))  # fmt: skip
        scale = np.sqrt(square / (len(train["maps"]) * data.side**2))
        scale = np.where(scale > 0, scale, 1).astype(np.float16)
        trained, held = (
            {"image": maps["maps"][:, i] / scale, "label": part["label"]}
            for maps, part in ((train, data.train), (test, data.test))
        )
        images = as_maps(config, data, trained, held)
        found[cutoff] = (images, float(train["active"][:, i].mean()))
    return found


@functools.partial(jax.jit, static_argnames="config")
def maps_of(
    images: UInt8[Array, "n h w c"],
    *,
    filters: Float[Array, "kh kw m"],
    config: DownstreamConfig,
) -> dict[str, Array]:
    """Codes of the study's solver, those below a cutoff dropped, shrunk to the images' sides.

    Returns:
      `maps`, float16 `[n, cuts, h, w, m]`, and `active`, coefficients per pixel `[n, cuts]`.
    """
    n, h, w, _ = images.shape
    grey = jnp.mean(images.astype(jnp.float32) / 255, axis=-1)
    large = jax.image.resize(grey, (n, h * config.enlarge, w * config.enlarge), "bilinear")
    ready = jax.vmap(lambda image: local_contrast_normalise(image)[0])(large)
    codes = encode_as_studied(ready, filters, config)

    def dropped(cutoff: Array) -> tuple[Array, Array]:
        kept = jnp.where(jnp.abs(codes) < cutoff, 0, codes)
        active = jnp.mean(kept != 0, axis=(1, 2, 3), dtype=jnp.float32) * codes.shape[-1]
        shape = (n, h, w, codes.shape[-1])
        return jax.image.resize(kept, shape, "bilinear").astype(jnp.float16), active

    maps, active = jax.lax.map(dropped, jnp.asarray(config.cutoffs, jnp.float32))
    return {"maps": jnp.moveaxis(maps, 0, 1), "active": active.T}


def make_claims(config: DownstreamConfig, found: Found) -> tuple[Claim, ...]:
    """Accuracy of both dictionaries, and what dropping coefficients takes from it."""
    best = {arm: best_rate(by_rate)[1] for arm, by_rate in found.items()}
    cutoffs = sorted(config.cutoffs)

    def values(name: str, cutoff: float, metric: str = "test_accuracy") -> list[float]:
        return best[f"{name}-{cutoff:g}"][metric]

    active = [mean(values(name, cutoffs[0], "active")) for name in NAMES]
    ours, theirs = (values(name, cutoffs[0]) for name in NAMES)
    claims = [
        Claim(
            f"with {active[0] / active[1]:.2f} of the active coefficients a classifier of "
            f"heterogeneous codes is at most {POINTS:g} point less accurate",
            active[0] < active[1] and mean(ours) >= mean(theirs) - POINTS,
            f"{mean_and_deviation(ours, 2)} %",
            f"{mean_and_deviation(theirs, 2)} % (homogeneous)",
            config.seeds,
        )
    ]
    if len(cutoffs) > 1:
        lost = {
            name: [a - b for a, b in zip(values(name, cutoffs[0]), values(name, cutoffs[-1]),
                                         strict=True)]
            for name in NAMES
        }  # fmt: skip
        claims.append(
            Claim(
                f"to drop coefficients below {cutoffs[-1]:g} takes no more accuracy from the "
                "heterogeneous codes",
                mean(lost["full"]) <= mean(lost["thin"]),
                f"{mean_and_deviation(lost['full'], 2)} points",
                f"{mean_and_deviation(lost['thin'], 2)} points",
                config.seeds,
            )
        )
    return tuple(claims)


def check_downstream(config: DownstreamConfig) -> list[str]:
    """Traces the coding and a training step on the paper's images; nothing if they are there."""
    missing = missing_dataset(config.dataset, PAPER_SIDE)
    if missing is None:
        return []
    data = abstract_images(config)
    pixels = jax.ShapeDtypeStruct((_CHUNK, data.side, data.side, data.channels), jnp.uint8)
    filters = jax.ShapeDtypeStruct((config.size, config.size, config.kernels), jnp.float32)
    trace = functools.partial(maps_of, config=static_settings(config))
    maps = jax.eval_shape(trace, pixels, filters=filters)["maps"]
    given = as_maps(config, data)
    step = trace_training(config, Method(backbone_builder(config, given)), given)
    size = size_of(step.params)
    setting = (
        f"paper setting: {config.model} on codes {maps.shape[2:]} of {config.dataset}, {size:,} "
        f"parameters, {config.epochs} epochs with {config.batch} images"
    )
    traced = (
        "coding and one training step traced; parameters and optimiser take "
        f"{step.mebibytes:,.0f} MiB"
    )
    return [setting, traced, f"checked abstractly: {missing}"]
