"""A backbone and one training step of it as shapes, for settings that are checked without a run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import PyTree

from experiments.harness.images import ImageConfig, Method, build_backbone, make_trainer
from experiments.harness.nm_training import PAPER_CLASSES, PAPER_IMAGES, PAPER_SIDE

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
    side, batch = PAPER_SIDE[config.dataset], config.batch
    trainer = make_trainer(
        config,
        Method(build=_builder(config, **changes), transform=transform),
        steps_per_epoch=PAPER_IMAGES[config.dataset] // batch,
        mean=[0.5] * 3,
        deviation=[0.25] * 3,
    )
    images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.uint8)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    before = jax.eval_shape(trainer.init, 0, 0.1)
    after, _ = jax.eval_shape(trainer.step, before, {"image": images, "label": labels})
    return TracedStep(after["params"], after["opt"], side)


def _builder(config: ImageConfig, **changes: Any) -> Callable[[nnx.Rngs], nnx.Module]:
    sizes = {
        "classes": PAPER_CLASSES[config.dataset],
        "side": PAPER_SIDE[config.dataset],
        "channels": 3,
    }
    return lambda rngs: build_backbone(config, rngs=rngs, **sizes, **changes)
