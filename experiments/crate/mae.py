"""The masked autoencoder: removed patches are predicted, and features tried on the labels."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from experiments.crate.config import SLUG, MaeConfig
from experiments.crate.figures import draw_rows, make_card
from experiments.crate.measures import (
    feature_accuracies,
    features_table,
    first_images,
    normalised,
    share_images,
    unnormalised,
)
from experiments.crate.training import check_images, image_trainer
from experiments.harness.arms import (
    Found,
    arms_table,
    as_metrics,
    best_rate,
    mean,
    print_table,
    run_arms,
)
from experiments.harness.config import Claim, Result
from experiments.harness.data.images import ImageData, load_images
from experiments.harness.images import augmented
from experiments.harness.objective import Objective
from experiments.harness.progress import mean_and_deviation
from experiments.harness.rows import over_batches
from experiments.harness.run import Run
from experiments.harness.training import size_of
from sparsejax.coding import masked_patch_loss, patchify, random_keep
from sparsejax.models import CrateImageConfig, CrateMAE

GREY = 0.5


class Autoencoder(NamedTuple):
    """Compiled functions of a model's parameters.

    Attributes:
      init: key -> parameters. features: parameters, images -> means of the encoder's patches.
      errors: parameters, images, noise -> mean square of each image's removed patches.
      predict: parameters, images, noise -> patches, and which were visible.
    """

    init: Callable[[PRNGKeyArray], PyTree]
    features: Callable[[PyTree, Array], Array]
    errors: Callable[[PyTree, Array, Array], Array]
    predict: Callable[[PyTree, Array, Array], tuple[Array, Array]]


def make_autoencoder(config: MaeConfig, sizes: CrateImageConfig) -> Autoencoder:
    """The functions of the model of these sizes."""
    build = lambda key: CrateMAE(sizes, rngs=nnx.Rngs(key))  # noqa: E731
    graph = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))))[0]

    def features(params: PyTree, images: Array) -> Array:
        model = nnx.merge(graph, params)
        tokens = model.norm(model.encode(model.embedded(images)))
        return jnp.mean(tokens[:, 1:], axis=1, dtype=jnp.float32)

    def predict(params: PyTree, images: Array, noise: Array) -> tuple[Array, Array]:
        return nnx.merge(graph, params)(images, noise, ratio=config.ratio)

    def errors(params: PyTree, images: Array, noise: Array) -> Array:
        return image_losses(*predict(params, images, noise), images, sizes.patch_size)

    return Autoencoder(
        jax.jit(lambda key: nnx.state(build(key))),
        jax.jit(features),
        jax.jit(errors),
        jax.jit(predict),
    )


def image_losses(
    prediction: Float[Array, "b n ppc"],
    keep: Bool[Array, "b n"],
    images: Float[Array, "b h w c"],
    patch: int,
) -> Float[Array, " b"]:
    """`masked_patch_loss` of each image for itself."""
    one = lambda p, k, x: masked_patch_loss(p[None], x[None], k[None], patch=patch)  # noqa: E731
    return jax.vmap(one)(prediction, keep, images)


def visible_mean(
    images: Float[Array, "b h w c"], keep: Bool[Array, "b n"], patch: int
) -> Float[Array, "b n ppc"]:
    """The prediction of every patch as the mean of the image's visible ones."""
    patches = patchify(images, patch)
    weights = keep / jnp.maximum(keep.sum(1, keepdims=True), 1)
    mean = jnp.einsum("bn,bnp->bp", weights, patches)
    return jnp.broadcast_to(mean[:, None], patches.shape)


@functools.partial(jax.jit, static_argnames=("ratio", "patch"))
def constant_losses(
    images: Float[Array, "b h w c"],
    noise: Float[Array, "b n"],
    *,
    place: Float[Array, "h w c"],
    ratio: float,
    patch: int,
) -> dict[str, Float[Array, " b"]]:
    """Errors of each image's removed patches by two predictions that need no model.

    `visible_loss` by the mean of its visible patches, `place_loss` by the same patch of `place`.
    """
    keep = random_keep(noise, ratio)
    guesses = {
        "visible_loss": visible_mean(images, keep, patch),
        "place_loss": patchify(jnp.broadcast_to(place, images.shape), patch),
    }
    return {name: image_losses(guess, keep, images, patch) for name, guess in guesses.items()}


def as_pixels(
    patches: Float[np.ndarray, "b n ppc"], images: Float[np.ndarray, "b h w c"], patch: int
) -> Float[np.ndarray, "b h w c"]:
    """Images of the shape of `images`, from what `patchify` makes of them."""
    b, h, w, c = images.shape
    grid = np.reshape(patches, (b, h // patch, w // patch, patch, patch, c))
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(images.shape)


def run_mae(config: MaeConfig, run: Run) -> Result:
    """Trains with every learning rate, and compares reconstructions and features."""
    data = load_images(config.dataset, side=config.image_size)
    found = run_arms(run, SLUG, config, trainer(run, config, data), ["mae"], config.learning_rates)
    table = arms_table(
        f"CRATE-MAE on {config.dataset}, {config.ratio:.0%} of the patches removed, "
        f"{config.epochs} epochs, {config.seeds} seed(s)",
        found,
        {"mae": "CRATE-MAE"},
        {
            "parameters": ("parameters", lambda n: f"{n:,.0f}"),
            "test_loss": ("error", 3),
            "visible_loss": ("mean of visible patches", 3),
            "place_loss": ("mean training image", 3),
        },
    )
    best = best_rate(found["mae"])[1]
    tables = (table, features_table("What its features tell of the labels", best, config))
    for each in tables:
        print_table(run, each)
    if run.is_main:
        draw(config, run, best, share_images(config, data, config.seed))
    budget = f"{config.epochs} epochs, the best of {len(config.learning_rates)} learning rates"
    metrics = as_metrics(found, curves=("prediction", "keep"))
    return Result(make_claims(config, found), make_card(config, budget), metrics, tables)


def trainer(
    run: Run, config: MaeConfig, data: ImageData
) -> Callable[[str, float, int], dict[str, Any]]:
    """Builds `train(arm, rate, seed)`, compiled once."""
    sizes = config.crate(side=data.side, channels=data.channels)
    model = make_autoencoder(config, sizes)
    goal = objective(config, model, data, sizes.patches)

    def measure(state: dict[str, Any], own: ImageData, seed: int) -> dict[str, Any]:
        return measured(config, model, state["params"], own, sizes, seed)

    return image_trainer(run, config, data, lambda steps: goal, measure)


def check_mae(config: MaeConfig) -> list[str]:
    """Traces a training step of the paper's setting; nothing if it can run."""

    def goal(data: ImageData, steps: int) -> Objective:
        sizes = config.crate(side=data.side, channels=data.channels)
        return objective(config, make_autoencoder(config, sizes), data, sizes.patches)

    return check_images(config, goal)


def objective(config: MaeConfig, model: Autoencoder, data: ImageData, patches: int) -> Objective:
    """The mean square of the removed patches, drawn anew for each batch."""

    def loss(params: PyTree, memory: Any, batch: Any, key: PRNGKeyArray) -> tuple[Array, Any]:
        shift, drop = jax.random.split(key)
        images = augmented(shift, normalised(batch["image"], data), config)
        noise = jax.random.uniform(drop, (len(images), patches))
        return jnp.mean(model.errors(params, images, noise)), (memory, {})

    return Objective(lambda key: (model.init(key), ()), loss)


def measured(
    config: MaeConfig, model: Autoencoder, params: PyTree, data: ImageData,
    sizes: CrateImageConfig, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Errors of the test images by the model and by two constants, and what features are worth."""
    train, _ = first_images(data, config.measured, train=True)
    test, _ = first_images(data, config.measured)
    noise = np.random.default_rng(seed).random((len(test), sizes.patches), np.float32)
    guess = functools.partial(
        constant_losses, place=train.mean(0), ratio=config.ratio, patch=sizes.patch_size
    )
    errors = over_batches(functools.partial(model.errors, params), test, noise)
    found: dict[str, Any] = {
        "parameters": size_of(params),
        "test_loss": float(errors.mean()),
        **{k: float(v.mean()) for k, v in over_batches(guess, test, noise).items()},
    }
    start = model.init(jax.random.key(seed))
    weights = {"trained": params, "random": start}
    features = {name: functools.partial(model.features, p) for name, p in weights.items()}
    found |= feature_accuracies(config, data, features)
    shown = config.shown
    first = (jnp.asarray(rows[:shown]) for rows in (test, noise))
    prediction, keep = model.predict(params, *first)
    return found | {
        "prediction": np.asarray(prediction, float).round(3).tolist(),
        "keep": np.asarray(keep).tolist(),
    }


def make_claims(config: MaeConfig, found: Found) -> tuple[Claim, ...]:
    """Reconstruction against constants, and features against those of random weights."""
    best = best_rate(found["mae"])[1]
    constants = [best[name] for name in ("visible_loss", "place_loss")]
    return (
        Claim(
            f"CRATE-MAE predicts the {config.ratio:.0%} of the patches that it does not see with "
            "less than half the error of the mean of the visible ones, and better than the mean "
            "training image",
            mean(best["test_loss"]) < min(mean(constants[0]) / 2, mean(constants[1])),
            mean_and_deviation(best["test_loss"]),
            f"visible patches {mean_and_deviation(constants[0])}, mean image "
            f"{mean_and_deviation(constants[1])}",
            config.seeds,
        ),
        Claim(
            "a linear probe of its features beats one of random weights",
            mean(best["probe_trained"]) > mean(best["probe_random"]),
            f"{mean_and_deviation(best['probe_trained'], 1)} %",
            f"{mean_and_deviation(best['probe_random'], 1)} %, of pixels "
            f"{mean_and_deviation(best['probe_pixels'], 1)} %",
            config.seeds,
        ),
    )


def draw(config: MaeConfig, run: Run, best: dict[str, list[Any]], data: ImageData) -> None:
    """Test images of the first seed, what is left of them, and what the model makes of that."""
    images, _ = first_images(data, config.shown)
    sizes = config.crate(side=data.side, channels=data.channels)
    patch = sizes.patch_size
    keep = np.asarray(best["keep"][0])[:, :, None]
    seen = as_pixels(np.broadcast_to(keep, (*keep.shape[:2], sizes.pixels)), images, patch)
    predicted = as_pixels(np.asarray(best["prediction"][0]), images, patch)
    pixels = unnormalised(images, data)
    rows = {
        "image": pixels,
        "visible": np.where(seen, pixels, GREY),
        "completed": np.where(seen, pixels, unnormalised(predicted, data)),
    }
    draw_rows(rows, f"CRATE-MAE, {config.ratio:.0%} of the patches removed",
              run.folder / "reconstructions.png")  # fmt: skip
