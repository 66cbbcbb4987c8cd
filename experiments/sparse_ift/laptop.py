"""The networks on digits: initial values, and a whole training as one compiled function."""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, PRNGKeyArray, PyTree

import sparsejax as sj
from experiments.harness import digits
from experiments.harness.nm_training import digits_setup, digits_sgd
from experiments.sparse_ift.config import Arm, Config
from experiments.sparse_ift.networks import (
    LAYERS,
    Cost,
    Perceptron,
    build_arm,
    cost,
    optimizer,
    start_masks,
)
from sparsejax import weights

CHANCE = 20.0  # percent: a network that is not better is counted as collapsed
GAINS: Mapping[str, float] = dict.fromkeys(("u", "sparse", "dense_u", "dense_v"), math.sqrt(0.5))
"""Of the first layer of a linear factorisation, and of two layers that are added."""


class Explored(NamedTuple):
    """State of `exploring`: of the wrapped optimiser, and what was active ever and always."""

    inner: PyTree
    ever: PyTree
    always: PyTree


def exploring(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Remembers which weights were active at any step, and which at every one."""

    def init(params: PyTree) -> Explored:
        state: Any = tx.init(params)
        return Explored(state, state.masks, state.masks)

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> Any:
        updates, inner = tx.update(updates, state.inner, params)
        ever = sj.exploration_update(state.ever, inner.masks)  # type: ignore[union-attr]
        always = jax.tree.map(jnp.logical_and, state.always, inner.masks)  # type: ignore[union-attr]
        return updates, Explored(inner, ever, always)

    return optax.GradientTransformation(init, update)


@functools.cache
def expense(arm: Arm, config: Config) -> Cost:
    """What an arm costs on one example."""
    build = functools.partial(Perceptron, base_width=arm.width)
    return cost(arm, config, build, jax.ShapeDtypeStruct((1, digits.INPUTS), jnp.float32))


def initial(key: PRNGKeyArray, shapes: PyTree, arm: Arm, sparsity: Mapping[str, float]) -> PyTree:
    """He-normal kernels, those of sparse layers over `sqrt(1 - sparsity)`; zero biases.

    The gain is that of the replaced layer: a sum of ReLUs, or two layers that are added, start with
    outputs of the variance that one has.
    """
    normal = jax.nn.initializers.he_normal()
    paths = [path for path, _ in sj.named_leaves(shapes)]
    keys = dict(zip(paths, jax.random.split(key, len(paths))))
    k = 1
    if arm.family == "parallel":
        k = int(weights.sift_size("parallel", 1, 1, arm.sparsity))

    def draw(path: str, leaf: Any) -> Array:
        *_, list_name, name, _ = ("", *path.split("/"))
        gain = GAINS.get(name, 1.0)
        if list_name == "branches":
            gain = 1 / math.sqrt(k * (1 + (k - 1) / math.pi))  # k ReLUs have a mean, too
        return normal(keys[path], leaf.shape) * gain / math.sqrt(1 - sparsity.get(path, 0.0))

    return sj.map_selected(draw, shapes, otherwise=lambda leaf: jnp.zeros(leaf.shape, leaf.dtype))


@functools.partial(jax.jit, static_argnames=("arm", "config"))
def train_digits(key: PRNGKeyArray, order: Array, data: digits.Digits, peak: Array, *, arm: Arm,
                 config: Config) -> dict[str, Array]:  # fmt: skip
    """One training; the rates and seeds of an arm share the compilation."""
    build = functools.partial(Perceptron, base_width=arm.width)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: build_arm(arm, config, build, nnx.Rngs(0))))
    sparsity, steps = expense(arm, config).sparsity, order.shape[0] * order.shape[1]
    test = (data.test_x, data.test_y)
    init_key, mask_key, set_key = jax.random.split(key, 3)
    params = initial(init_key, shapes, arm, sparsity)
    tx = digits_sgd(config, peak)
    if arm.family != "dense":
        masks = start_masks(mask_key, params, sparsity)
        params = sj.apply_masks(params, masks)
        tx = exploring(optimizer(tx, arm, config, sparsity, steps, lambda _: (masks, set_key)))

    def network(params: PyTree, x: Array) -> Array:
        return nnx.merge(graph, params)(x)

    trained = digits.train(
        tx, params, order, data, network=network,
        observe=lambda before, after: digits.accuracy(after, test, network),
    )  # fmt: skip
    found = {
        "test_accuracy": trained.test_accuracy,
        "test_loss": trained.test_loss,
        "train_loss": trained.train_loss,
        "accuracy_curve": trained.observed,
    }
    kernels = {path: x for path, x in sj.named_leaves(params) if path.endswith("kernel")}
    if arm.family == "dense":
        entries = jnp.int32(sum(x.size for x in kernels.values()))
        return found | {"nonzeros": entries, "reached": entries}
    state: Any = trained.state

    def active(masks: PyTree, paths: Iterable[str]) -> Array:
        by_path = dict(sj.named_leaves(masks))  # a scalar mask stands for a whole kernel
        whole = (jnp.broadcast_to(by_path[path], kernels[path].shape) for path in paths)
        return jnp.sum(jnp.stack([jnp.sum(mask) for mask in whole]))

    size = sum(kernels[path].size for path in sparsity)
    return found | {
        "nonzeros": active(state.inner.masks, kernels),
        "reached": active(state.ever, kernels),
        "ever": active(state.ever, sparsity) / size,
        "always": active(state.always, sparsity) / size,
    }


def digits_arm(config: Config, name: str, rate: float, seed: int) -> dict[str, Any]:
    """One training on the digits."""
    arm, static = config.arms()[name], digits.static_settings(config)
    _, order, data = digits_setup(config, seed, layers=LAYERS - 1, hidden=arm.width)
    found = train_digits(jax.random.key(seed), order, data, jnp.float32(rate), arm=arm,
                         config=static)  # fmt: skip
    values: dict[str, Any] = {
        key: [float(v) for v in x] if x.ndim else float(x) for key, x in found.items()
    }
    spent = expense(arm, static)
    return values | {
        "training_flops": spent.training(arm, config),
        "collapsed": float(values["test_accuracy"] < CHANCE),
    }
