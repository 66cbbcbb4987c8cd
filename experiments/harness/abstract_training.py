"""A backbone and one training step of it as shapes, for settings that are checked without a run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import PyTree

from experiments.harness.data import missing_dataset
from experiments.harness.data.images import ImageData
from experiments.harness.images import ImageConfig, Method, build_backbone, make_trainer
from experiments.harness.training import size_of

PAPER_SIDE = {"imagenet2012": 224, "cifar10": 32, "cifar100": 32, "oxford_flowers102": 224,
              "oxford_iiit_pet": 224}  # fmt: skip
PAPER_IMAGES = {"imagenet2012": 1281167, "cifar10": 50000, "cifar100": 50000,
                "oxford_flowers102": 1020, "oxford_iiit_pet": 3680}  # fmt: skip
PAPER_CLASSES = {"imagenet2012": 1000, "cifar10": 10, "cifar100": 100, "oxford_flowers102": 102,
                 "oxford_iiit_pet": 37}  # fmt: skip
PRUNABLE = r"^(?!stem/).*kernel$"  # of a ResNet: the first convolution stays dense
Transform = Callable[[PyTree, optax.GradientTransformation], optax.GradientTransformation]


class TracedStep(NamedTuple):
    """What a training step returns, as shapes.

    Attributes:
      params: of the model. opt: state of its optimiser, masks included. side: of the images.
    """

    params: PyTree
    opt: PyTree
    side: int

    @property
    def mebibytes(self) -> float:
        """Of parameters and optimiser state together."""
        leaves = jax.tree.leaves((self.params, self.opt))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 2**20


def abstract_params(config: ImageConfig, **changes: Any) -> PyTree:
    """Shapes of the parameters of the backbone that the settings name.

    Args:
      **changes: of the model's own configuration, for example a `base_width`.
    """
    model = nnx.eval_shape(lambda: _builder(config, **changes)(nnx.Rngs(0)))
    return nnx.split(model, nnx.Param, ...)[1]


def trace_step(config: ImageConfig, transform: Transform, **changes: Any) -> TracedStep:
    """Traces a training step, forward and backward, on a batch of the dataset's images.

    Args:
      transform: parameters, optimiser of the settings -> the optimiser that is used.
      **changes: see `abstract_params`.
    """
    method = Method(build=_builder(config, **changes), transform=transform)
    return trace_training(config, method, abstract_images(config))


def abstract_images(config: ImageConfig) -> ImageData:
    """A paper's dataset without its images."""
    name = config.dataset
    mean, deviation = np.full(3, 0.5), np.full(3, 0.25)
    return ImageData(
        name, PAPER_CLASSES[name], _side(config), 3, (), (), PAPER_IMAGES[name], False, mean,
        deviation,
    )  # fmt: skip


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
    missing = missing_dataset(config.dataset, PAPER_SIDE)
    if missing is None:
        return []
    plan = method(_builder(config))
    model = nnx.eval_shape(lambda: plan.build(nnx.Rngs(0)))
    traced = trace_training(config, plan, abstract_images(config))
    steps, side = PAPER_IMAGES[config.dataset] // config.batch, traced.side
    count = size_of(traced.params)
    setting = (
        f"paper setting: {config.model} on {config.dataset}, {count:,} parameters, "
        f"{config.epochs} epochs of {steps:,} steps with {config.batch} images of {side} x {side}"
    )
    return [
        setting,
        *describe(model, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)),
        f"one training step traced; parameters and optimiser take {traced.mebibytes:,.0f} MiB",
        f"checked abstractly: {missing}",
    ]


def trace_training(config: ImageConfig, method: Method, data: ImageData) -> TracedStep:
    """Traces a step of a method on a batch of these images, of which only the sizes matter."""
    side, batch = data.side, config.batch
    trainer = make_trainer(
        config,
        method,
        steps_per_epoch=data.examples // batch,
        mean=data.mean,
        deviation=data.deviation,
    )
    images = jax.ShapeDtypeStruct((batch, side, side, data.channels), jnp.uint8)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    before = jax.eval_shape(trainer.init, 0, 0.1)
    after, _ = jax.eval_shape(trainer.step, before, {"image": images, "label": labels})
    return TracedStep(after["params"], after["opt"], side)


def _side(config: ImageConfig) -> int:
    return config.image_size or PAPER_SIDE[config.dataset]


def _builder(config: ImageConfig, **changes: Any) -> Callable[..., nnx.Module]:
    sizes = {"classes": PAPER_CLASSES[config.dataset], "side": _side(config), "channels": 3}
    return lambda rngs, **more: build_backbone(config, rngs=rngs, **sizes, **changes, **more)
