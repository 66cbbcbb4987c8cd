"""Handwritten digits and multilayer perceptrons: a small task that several experiments share.

A step takes far less than a millisecond, so a whole training is one `lax.scan`. Results of finished
arms are kept as JSON in the run folder, so that a resumed run does only what is left.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from experiments.harness.config import ExperimentError, RunConfig
from experiments.harness.data import load_arrays
from experiments.harness.run import InterruptedRunError, Run, resume_hint, write_json

INPUTS, CLASSES, TRAIN = 64, 10, 1257
ConfigT = TypeVar("ConfigT", bound=RunConfig)
LEVEL = 15  # images hold 15 times the scanned values 0..16


class Digits(NamedTuple):
    """1,257 training and 540 test examples of `small_digits`, minus the training mean."""

    train_x: Float[Array, "train 64"]
    train_y: Int[Array, "train"]
    test_x: Float[Array, "test 64"]
    test_y: Int[Array, "test"]


@functools.cache
def load_digits() -> Digits:
    """Both splits of the dataset together, cut anew by one fixed permutation.

    The dataset's own test split is by other writers and harder; the figures that experiments
    compare with are for a split at random.
    """
    parts = [load_arrays("small_digits", split) for split in ("train", "test")]
    images = np.concatenate([part["image"] for part in parts]).reshape(-1, INPUTS) // LEVEL
    labels = np.concatenate([part["label"] for part in parts]).astype(np.int32)
    order = np.random.default_rng(0).permutation(len(images))
    x, y = (images / 16).astype(np.float32)[order], labels[order]
    x = x - x[:TRAIN].mean(0)
    return Digits(*(jnp.asarray(a) for a in (x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:])))


def init_mlp(key: PRNGKeyArray, sizes: tuple[int, ...]) -> dict[str, dict[str, Array]]:
    """A ReLU network `layer{i}/{kernel,bias}`: He-normal kernels (in, out) and zero biases."""
    initializer = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, len(sizes) - 1)
    return {
        f"layer{i}": {"kernel": initializer(k, (n, m), jnp.float32), "bias": jnp.zeros(m)}
        for i, (k, n, m) in enumerate(zip(keys, sizes, sizes[1:]))
    }


def mlp_logits(params: PyTree, x: Float[Array, "n in"]) -> Float[Array, "n classes"]:
    """The outputs of `init_mlp`'s network."""
    for i in range(len(params)):
        layer = params[f"layer{i}"]
        x = (x if i == 0 else jax.nn.relu(x)) @ layer["kernel"] + layer["bias"]
    return x


def cross_entropy(params: PyTree, batch: tuple[Array, Array]) -> Float[Array, ""]:
    """Mean cross-entropy of `(x, labels)`, in nats."""
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(mlp_logits(params, x), y).mean()


def accuracy(params: PyTree, batch: tuple[Array, Array]) -> Float[Array, ""]:
    """Share of `(x, labels)` that is right, in percent."""
    x, y = batch
    return 100 * (jnp.argmax(mlp_logits(params, x), -1) == y).mean()


def batch_order(seed: int, *, steps: int, batch: int) -> Int[Array, "steps batch"]:
    """Which training examples each step sees: without replacement, each epoch in a new order."""
    rng, whole = np.random.default_rng(seed), TRAIN // batch
    epochs = [rng.permutation(TRAIN)[: whole * batch] for _ in range(-(-steps // whole))]
    return jnp.asarray(np.concatenate(epochs).reshape(-1, batch)[:steps], jnp.int32)


def check_settings(
    config: Any,
    *,
    positive: Sequence[str] = (),
    shares: Sequence[str] = (),
    known: Mapping[str, Sequence[str]] | None = None,
    one_device: bool = True,
) -> None:
    """Refuses settings out of range, the batch included, and with `one_device` a mesh.

    Args:
      config: a `RunConfig` with a `batch`; a setting may be a value or a tuple of them, not empty.
      positive: names of those that are at least 1. shares: of those in [0, 1].
      known: allowed values of a setting by its name.

    Raises:
      ExperimentError: naming the setting.
    """
    if not 1 <= config.batch <= TRAIN:
        raise ExperimentError(f"batch is {config.batch}; it must be from 1 to {TRAIN}")
    if one_device and (config.mesh is not None or config.multihost):
        raise ExperimentError("mesh and multihost are not for this experiment: it runs on 1 device")
    for name in (*positive, *shares, *(known or {})):
        given = getattr(config, name)
        for value in given if isinstance(given, tuple) else (given,):
            if name in positive and value < 1:
                raise ExperimentError(f"{name} is {value}; it must be at least 1")
            if name in shares and not 0 <= value <= 1:
                raise ExperimentError(f"{name} is {value}; it must be in [0, 1]")
            if known and name in known and value not in known[name]:
                raise ExperimentError(f"{name} is {value!r}; known are {', '.join(known[name])}")
        if given == ():
            raise ExperimentError(f"{name} is empty; give one value or several")


def static_settings(config: ConfigT) -> ConfigT:
    """The settings without their folders: a static argument that a resumed run shares."""
    return dataclasses.replace(config, resume=None, out="")


class Trained(NamedTuple):
    """A finished training.

    Attributes:
      params: after the last step. state: of the optimiser. losses: of each batch, before its step.
      train_loss, test_accuracy: of the whole sets, after the last step (nats, percent).
    """

    params: PyTree
    state: PyTree
    losses: Float[Array, "steps"]
    train_loss: Float[Array, ""]
    test_accuracy: Float[Array, ""]


def train(
    tx: optax.GradientTransformation, params: PyTree, order: Int[Array, "steps batch"], data: Digits
) -> Trained:
    """A whole training as one scan; call it inside `jit` with masks and keys as arguments."""

    def step(carry: tuple[PyTree, PyTree], rows: Array) -> tuple[tuple[PyTree, PyTree], Array]:
        params, state = carry
        batch = (data.train_x[rows], data.train_y[rows])
        loss, gradients = jax.value_and_grad(cross_entropy)(params, batch)
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), loss

    (params, state), losses = lax.scan(step, (params, tx.init(params)), order)
    train_loss = cross_entropy(params, (data.train_x, data.train_y))
    return Trained(params, state, losses, train_loss, accuracy(params, (data.test_x, data.test_y)))


def kept_arm(run: Run, slug: str, name: str, compute: Callable[[], dict[str, Any]]) -> Any:
    """The result of an arm: from an earlier part of this run, or computed, logged and kept.

    Args:
      run: where it is kept, as `arms/<name>.json`. slug: the experiment. name: the arm.
      compute: gives JSON values; lists hold one value for each seed.

    Raises:
      InterruptedRunError: Ctrl-C was pressed; finished arms are kept.
      ExperimentError: the file of the arm is damaged.
    """
    path = run.folder / "arms" / f"{name}.json"
    if path.is_file():
        try:
            found = json.loads(path.read_text())
            if not isinstance(found, dict):
                raise ValueError("it holds no result")
        except ValueError as error:
            raise ExperimentError(f"{path} is damaged ({error}); delete it to resume") from error
        return found
    if run.stopping.is_set():
        raise InterruptedRunError(
            f"stopped before {name}; continue with: {resume_hint(slug, run.folder)}"
        )
    result = compute()
    if run.config.resume:
        run.forget_after(name, -1)  # lines of an arm that was cut off before it was kept
    for i, seed in enumerate(run.config.seed_list()):
        values = {k: v[i] for k, v in result.items() if isinstance(v, list)}
        run.log(trial=name, seed=seed, **values)
    path.parent.mkdir(exist_ok=True)
    write_json(path, result)
    return result
