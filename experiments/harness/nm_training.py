"""What the experiments on N:M training share: the digits network, scopes and the bad input."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, PyTree

import sparsejax as sj
from experiments.harness import digits
from experiments.harness.config import ExperimentError
from experiments.harness.data import open_builder
from experiments.harness.data.errors import DatasetError
from experiments.harness.images import (
    ImageConfig,
    Method,
    build_backbone,
    learning_rate,
    make_optimizer,
    make_trainer,
)
from sparsejax.core.selection import default_where

HIDDEN = 128
PAPER_SIDE = {"imagenet2012": 224, "cifar10": 32, "cifar100": 32}
PAPER_IMAGES = {"imagenet2012": 1281167, "cifar10": 50000, "cifar100": 50000}
PAPER_CLASSES = {"imagenet2012": 1000, "cifar10": 10, "cifar100": 100}


def hidden_layers(layers: int) -> str:
    """The kernels of the first `layers` layers of the digits network; the head stays dense."""
    return rf"^layer[0-{layers - 1}]/kernel$"


def backbone_scope(path: str, leaf: Any) -> bool:
    """The kernels of a backbone that are sparse: all but the first layer and the classifier."""
    stem = path.startswith(("stem", "prep", "patch_embed", "stages/0/0/conv/"))
    return default_where(path, leaf) and not stem and not path.startswith("head")


def scope_size(build: Callable[[nnx.Rngs], nnx.Module], where: sj.Where) -> int:
    """Weights of a model in the chosen leaves."""
    params = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param, ...)[1]
    leaves = dict(sj.named_leaves(params))
    return sum(leaves[path].size for path in sj.selected_paths(params, where))


def check_digits(config: ImageConfig) -> None:
    """Refuses a batch that the digits do not fill, on the laptop's network.

    Raises:
      ExperimentError: naming it.
    """
    if config.is_mlp:
        digits.check_settings(config, positive=("epochs",), examples=digits.SPLIT)


def digits_setup(
    config: ImageConfig, seed: int, *, layers: int, hidden: int = HIDDEN
) -> tuple[PyTree, Array, digits.Digits]:
    """Initial parameters, batches by epoch, and data: the same for every method of a seed."""
    sizes = (digits.INPUTS, *[hidden] * layers, digits.CLASSES)
    params = digits.init_mlp(jax.random.key(seed), sizes)
    each = digits.SPLIT // config.batch
    order = digits.batch_order(
        seed, steps=config.epochs * each, batch=config.batch, examples=digits.SPLIT
    )
    data = digits.load_digits(digits.SPLIT, digits.SHIFT)
    return params, order.reshape(config.epochs, each, config.batch), data


def digits_sgd(config: ImageConfig, peak: float | Array) -> optax.GradientTransformation:
    """SGD with momentum and coupled weight decay, its rate a warm-up and a cosine."""
    rate = learning_rate(config, digits.SPLIT // config.batch, peak)
    return make_optimizer(config, rate)


def nm_masks(params: PyTree, pattern: sj.Pattern, where: sj.Where) -> PyTree:
    """The masks that a projection of these parameters uses."""
    return sj.make_masks(sj.magnitude(params), pattern=pattern, where=where)


def check_backbone(
    config: ImageConfig,
    method: Callable[[Callable[..., nnx.Module]], Method],
    *,
    describe: Callable[[nnx.Module, Any], list[str]] = lambda model, images: [],
) -> list[str]:
    """What `--preset paper` says of a backbone: its sizes, and one training step traced.

    Args:
      method: the way to train a model, from the function that builds it.
      describe: more lines about the model and its images.

    Returns:
      Lines to print; none if the dataset is there, so that the run can start.
    """
    try:
        open_builder(config.dataset)
        return []
    except DatasetError as error:
        missing = str(error)
    base = config.dataset.split("/", maxsplit=1)[0].split(":", maxsplit=1)[0]
    if base not in PAPER_SIDE:
        raise ExperimentError(missing)
    side = config.image_size or PAPER_SIDE[base]
    build = functools.partial(_built, config, classes=PAPER_CLASSES[base], side=side, channels=3)
    plan = method(build)
    model = nnx.eval_shape(lambda: plan.build(nnx.Rngs(0)))
    _, params, _ = nnx.split(model, nnx.Param, ...)
    steps = PAPER_IMAGES[base] // config.batch
    trainer = make_trainer(
        config, plan, steps_per_epoch=steps, mean=[0.5] * 3, deviation=[0.25] * 3
    )
    state = jax.eval_shape(trainer.init, 0, 0.1)
    images = jax.ShapeDtypeStruct((config.batch, side, side, 3), jnp.uint8)
    batch = {"image": images, "label": jax.ShapeDtypeStruct((config.batch,), jnp.int32)}
    jax.eval_shape(trainer.step, state, batch)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    setting = (
        f"paper setting: {config.model} on {config.dataset}, {count:,} parameters, "
        f"{config.epochs} epochs of {steps:,} steps with {config.batch} images of {side} x {side}"
    )
    return [
        setting,
        *describe(model, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)),
        f"one training step traced; its state takes {stored / 2**20:,.0f} MiB",
        f"checked abstractly: {missing}",
    ]


def _built(config: ImageConfig, rngs: nnx.Rngs, **sizes: Any) -> nnx.Module:
    return build_backbone(config, rngs=rngs, **sizes)
