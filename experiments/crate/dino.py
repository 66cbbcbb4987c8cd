"""Self-distillation: a student predicts what its own average says of another view of a digit."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from scipy.stats import entropy

from experiments.crate.config import SLUG, DinoConfig
from experiments.crate.figures import draw_attention, draw_rows, make_card
from experiments.crate.measures import (
    feature_accuracies,
    features_table,
    first_images,
    normalised,
    share_images,
    unnormalised,
)
from experiments.crate.training import check_images, image_trainer
from experiments.harness.arms import Found, as_metrics, best_rate, mean, print_table, run_arms
from experiments.harness.config import Claim, Result
from experiments.harness.data.images import ImageData, load_images
from experiments.harness.objective import Objective
from experiments.harness.progress import mean_and_deviation
from experiments.harness.rows import over_batches
from experiments.harness.run import Run
from sparsejax.coding import (
    centered_targets,
    dino_loss,
    sinkhorn_targets,
    update_center,
    update_teacher,
)
from sparsejax.models import CrateClassifier, CrateImageConfig, class_attention

GLOBAL_VIEWS = 2


class DinoNetwork(nnx.Module):
    """A CRATE whose head is the first layer of a projection onto prototypes of unit length.

    sizes: of the backbone, `num_classes` being the width of the projection.
    """

    def __init__(
        self, sizes: CrateImageConfig, *, bottleneck: int, prototypes: int, rngs: nnx.Rngs
    ):
        self.backbone = CrateClassifier(sizes, rngs=rngs)
        self.project = nnx.Linear(sizes.num_classes, bottleneck, rngs=rngs)
        self.prototypes = nnx.Linear(bottleneck, prototypes, use_bias=False, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b prototypes"]:
        """The cosine between the projected image and each prototype."""
        x = self.project(jax.nn.gelu(self.backbone(images)))
        return _unit(x, -1) @ _unit(self.prototypes.kernel[...], 0)


def _unit(x: Array, axis: int) -> Array:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=axis, keepdims=True) + 1e-12)


class Network(NamedTuple):
    """Compiled functions of a network's parameters.

    Attributes:
      init: key -> parameters. logits: parameters, images -> cosines.
      features: parameters, images -> class tokens. attention: parameters, images -> maps.
    """

    init: Callable[[PRNGKeyArray], PyTree]
    logits: Callable[[PyTree, Array], Array]
    features: Callable[[PyTree, Array], Array]
    attention: Callable[[PyTree, Array], Array]


def make_network(config: DinoConfig, sizes: CrateImageConfig) -> Network:
    """The functions of the network around a backbone of these sizes."""
    build = lambda key: DinoNetwork(  # noqa: E731
        sizes, bottleneck=config.bottleneck, prototypes=config.prototypes, rngs=nnx.Rngs(key)
    )
    graph = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))))[0]
    backbone = lambda params: nnx.merge(graph, params).backbone  # noqa: E731

    def features(params: PyTree, images: Array) -> Array:
        model = backbone(params)
        return model.head_norm(model.features(images)).astype(jnp.float32)

    return Network(
        jax.jit(lambda key: nnx.state(build(key))),
        jax.jit(lambda params, images: nnx.merge(graph, params)(images)),
        jax.jit(features),
        jax.jit(lambda params, images: class_attention(backbone(params), images)),
    )


def random_views(
    key: PRNGKeyArray, images: Float[Array, "b h w c"], config: DinoConfig,
    zoom: tuple[float, float],
) -> Float[Array, "b h w c"]:  # fmt: skip
    """Crops of other size, place, rotation and contrast, each image for itself, of one shape.

    A crop smaller than the image lies within it before it is rotated; beyond the image its edge
    goes on.
    """
    b, h, w, _ = images.shape
    keys = jax.random.split(key, 4)
    side = jax.random.uniform(keys[0], (b,), minval=zoom[0], maxval=zoom[1])
    place = jax.random.uniform(keys[1], (b, 2), minval=-1.0)
    angle = jax.random.uniform(keys[2], (b,), minval=-config.rotation, maxval=config.rotation)
    contrast = 1 + config.jitter * jax.random.uniform(keys[3], (b,), minval=-1.0)
    middle = jnp.asarray([(h - 1) / 2, (w - 1) / 2])
    offsets = jnp.stack(jnp.mgrid[:h, :w], -1) - middle

    def one(image: Array, side: Array, place: Array, angle: Array, contrast: Array) -> Array:
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        turned = offsets @ jnp.asarray([[cos, sin], [-sin, cos]]) * side
        at = turned + middle + place * middle * jnp.abs(1 - side)
        sample = functools.partial(
            jax.scipy.ndimage.map_coordinates, coordinates=tuple(at.transpose(2, 0, 1)), order=1,
            mode="nearest",
        )  # fmt: skip
        return contrast * jax.vmap(sample, in_axes=-1, out_axes=-1)(image)

    return jax.vmap(one)(images, side, place, angle, contrast)


def make_views(
    key: PRNGKeyArray, images: Float[Array, "b h w c"], config: DinoConfig
) -> Float[Array, "views b h w c"]:
    """Two large crops in front, then the small ones."""
    zooms = [config.global_zoom] * GLOBAL_VIEWS + [config.local_zoom] * config.local_views
    keys = jax.random.split(key, len(zooms))
    return jnp.stack([random_views(k, images, config, z) for k, z in zip(keys, zooms, strict=True)])


def objective(config: DinoConfig, network: Network, data: ImageData, steps: int) -> Objective:
    """The student is trained; the memory holds the teacher, its average, and a centre if asked."""
    centred, sharp = config.balance == "center", config.teacher_temperature

    def init(key: PRNGKeyArray) -> tuple[PyTree, PyTree]:
        params = network.init(key)
        teacher = jax.tree.map(jnp.copy, params)  # not the student's buffers: steps donate them
        center = {"center": jnp.zeros(config.prototypes)} if centred else {}
        return params, {"teacher": teacher, **center}

    def all_logits(params: PyTree, views: Array) -> Array:
        flat = network.logits(params, views.reshape(-1, *views.shape[2:]))
        return flat.reshape(*views.shape[:2], -1)

    def loss(params: PyTree, memory: PyTree, batch: Any, key: PRNGKeyArray) -> tuple[Array, Any]:
        views = make_views(key, normalised(batch["image"], data), config)
        teacher = all_logits(memory["teacher"], views[:GLOBAL_VIEWS])
        if centred:
            targets = centered_targets(teacher, memory["center"], temperature=sharp)
            center = update_center(memory["center"], teacher, momentum=config.center_momentum)
            memory = {**memory, "center": center}
        else:
            targets = sinkhorn_targets(teacher, temperature=sharp)
        student = all_logits(params, views)
        value = dino_loss(student, targets, temperature=config.student_temperature)
        return value, (memory, {})

    def remember(memory: PyTree, params: PyTree, count: Array) -> PyTree:
        left = 0.5 * (1 + jnp.cos(jnp.pi * count / steps))
        momentum = 1 - (1 - config.teacher_momentum) * left
        teacher = update_teacher(memory["teacher"], params, momentum=momentum)
        return {**memory, "teacher": teacher}

    return Objective(init, loss, remember)


def trainer(
    run: Run, config: DinoConfig, data: ImageData
) -> Callable[[str, float, int], dict[str, Any]]:
    """Builds `train(arm, rate, seed)`, compiled once."""
    sizes = config.crate(side=data.side, channels=data.channels, classes=config.hidden)
    network = make_network(config, sizes)

    def measure(state: dict[str, Any], own: ImageData, seed: int) -> dict[str, Any]:
        return measured(config, network, state["memory"], own, seed)

    goal = functools.partial(objective, config, network, data)
    return image_trainer(run, config, data, goal, measure)


def check_dino(config: DinoConfig) -> list[str]:
    """Traces a training step of the paper's setting; nothing if it can run."""

    def goal(data: ImageData, steps: int) -> Objective:
        sizes = config.crate(side=data.side, channels=data.channels, classes=config.hidden)
        return objective(config, make_network(config, sizes), data, steps)

    return check_images(config, goal)


def measured(
    config: DinoConfig, network: Network, memory: PyTree, data: ImageData, seed: int
) -> dict[str, Any]:
    """What the teacher's features are worth, what it tells apart, and its attention.

    `told_apart` is exp of the information that the assignment to a prototype holds about the image:
    1 for a teacher that says the same of all, be it one prototype or none in particular.
    `test_loss` is the share of test images whose neighbours are wrong: losses of different learning
    rates cannot be compared, for each has a teacher of its own.
    """
    params, start = memory["teacher"], network.init(jax.random.key(seed))
    weights = {"trained": params, "random": start}
    features = {name: functools.partial(network.features, p) for name, p in weights.items()}
    found: dict[str, Any] = dict(feature_accuracies(config, data, features))
    test, _ = first_images(data, config.measured)
    logits = over_batches(functools.partial(network.logits, params), test)
    said = np.asarray(jax.nn.softmax((logits - logits.mean(0)) / config.teacher_temperature, -1))
    attention = np.asarray(network.attention(params, jnp.asarray(test[: config.shown])), float)
    return found | {
        "test_loss": 1 - found["neighbours_trained"] / 100,
        "told_apart": float(np.exp(entropy(said.mean(0)) - entropy(said, axis=-1).mean())),
        "attention": attention.round(4).tolist(),
    }


def run_dino(config: DinoConfig, run: Run) -> Result:
    """Trains with every learning rate, and compares features with those of random weights."""
    data = load_images(config.dataset, side=config.image_size)
    found = run_arms(run, SLUG, config, trainer(run, config, data), ["dino"], config.learning_rates)
    rate, best = best_rate(found["dino"])
    title = (
        f"CRATE without labels on {config.dataset}, {config.epochs} epochs at rate {rate:g}, "
        f"{config.seeds} seed(s)"
    )
    table = features_table(title, best, config)
    print_table(run, table)
    if run.is_main:
        draw(config, run, best, share_images(config, data, config.seed))
    budget = f"{config.epochs} epochs, the best of {len(config.learning_rates)} learning rates"
    metrics = as_metrics(found, curves=("attention",))
    return Result(make_claims(config, found), make_card(config, budget), metrics, (table,))


def make_claims(config: DinoConfig, found: Found) -> tuple[Claim, ...]:
    """Features against those of random weights, and that the teacher says different things."""
    best = best_rate(found["dino"])[1]
    ours, theirs = best["neighbours_trained"], best["neighbours_random"]
    apart = best["told_apart"]
    return (
        Claim(
            "without labels CRATE learns features whose nearest neighbours beat those of random "
            "weights by more than 5 points",
            mean(ours) > mean(theirs) + 5,
            f"{mean_and_deviation(ours, 1)} %",
            f"{mean_and_deviation(theirs, 1)} %, of pixels "
            f"{mean_and_deviation(best['neighbours_pixels'], 1)} %",
            config.seeds,
        ),
        Claim(
            "the teacher does not collapse: it tells apart as many groups of images as there are "
            "digits",
            min(apart) >= 10,
            f"{mean_and_deviation(apart, 1)} of {config.prototypes}",
            "10",
            config.seeds,
        ),
    )


def draw(config: DinoConfig, run: Run, best: dict[str, list[Any]], data: ImageData) -> None:
    """Views of test images, and the attention of the first seed's teacher."""
    images, _ = first_images(data, config.shown)
    views = make_views(jax.random.key(config.seed), jnp.asarray(images), config)
    names = ["large crop"] * GLOBAL_VIEWS + ["small crop"] * config.local_views
    rows = {"image": unnormalised(images, data)} | {
        f"{name} {i + 1}": unnormalised(np.asarray(view), data)
        for i, (name, view) in enumerate(zip(names, views, strict=True))
    }
    draw_rows(rows, "views of the same images", run.folder / "views.png")
    draw_attention(rows["image"], np.asarray(best["attention"][0]),
                   "attention of the class token, last layer, learned without labels",
                   run.folder / "attention.png")  # fmt: skip
