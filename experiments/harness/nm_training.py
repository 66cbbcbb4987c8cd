"""What the experiments on N:M training share: the digits network, scopes and the bad input."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from flax import nnx
from jaxtyping import Array, PyTree

import sparsejax as sj
from experiments.harness import digits
from experiments.harness.config import ExperimentError
from experiments.harness.images import (
    ImageConfig,
    learning_rate,
    make_optimizer,
)
from sparsejax.core.selection import default_where

HIDDEN = 128


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


def check_arms(
    config: Any,
    *,
    positive: Sequence[str] = (),
    known: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Refuses learning rates `lr` and other settings out of range, and on digits the batch.

    Args:
      config: an `ImageConfig` with the peak rates `lr`.
      positive, known: see `digits.check_settings`.

    Raises:
      ExperimentError: naming the setting.
    """
    digits.check_settings(
        config,
        positive=positive,
        known=known,
        one_device=config.is_mlp,
        examples=digits.SPLIT if config.is_mlp else None,
    )
    if not config.lr or any(not rate > 0 for rate in config.lr):
        raise ExperimentError(f"lr is {config.lr}; give positive values, one or several")


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
