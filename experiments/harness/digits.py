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
SPLIT, SHIFT = 1000, 0.3  # of the experiments whose data are not centred
ConfigT = TypeVar("ConfigT", bound=RunConfig)
LEVEL = 15  # images hold 15 times the scanned values 0..16


class Digits(NamedTuple):
    """Training and test examples of `small_digits`."""

    train_x: Float[Array, "train 64"]
    train_y: Int[Array, "train"]
    test_x: Float[Array, "test 64"]
    test_y: Int[Array, "test"]


@functools.cache
def load_digits(train: int = TRAIN, shift: float | None = None) -> Digits:
    """Both splits of the dataset together, scaled to 0..1 and cut anew by one fixed permutation.

    The dataset's own test split is by other writers and harder; the figures that experiments
    compare with are for a split at random.

    Args:
      train: how many of the 1,797 examples are for training, the others for testing.
      shift: taken off every input; None takes off the mean of the training examples.
    """
    parts = [load_arrays("small_digits", split) for split in ("train", "test")]
    images = np.concatenate([part["image"] for part in parts]).reshape(-1, INPUTS) // LEVEL
    labels = np.concatenate([part["label"] for part in parts]).astype(np.int32)
    order = np.random.default_rng(0).permutation(len(images))
    x, y = (images / 16).astype(np.float32)[order], labels[order]
    x = x - (x[:train].mean(0) if shift is None else np.float32(shift))
    return Digits(*(jnp.asarray(a) for a in (x[:train], y[:train], x[train:], y[train:])))


def init_mlp(key: PRNGKeyArray, sizes: tuple[int, ...]) -> dict[str, dict[str, Array]]:
    """A ReLU network `layer{i}/{kernel,bias}`: He-normal kernels (in, out) and zero biases."""
    initializer = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, len(sizes) - 1)
    return {
        f"layer{i}": {"kernel": initializer(k, (n, m), jnp.float32), "bias": jnp.zeros(m)}
        for i, (k, n, m) in enumerate(zip(keys, sizes, sizes[1:]))
    }


Network = Callable[[PyTree, Array], Array]


def mlp_logits(params: PyTree, x: Float[Array, "n in"]) -> Float[Array, "n classes"]:
    """The outputs of `init_mlp`'s network."""
    for i in range(len(params)):
        layer = params[f"layer{i}"]
        x = (x if i == 0 else jax.nn.relu(x)) @ layer["kernel"] + layer["bias"]
    return x


def cross_entropy(
    params: PyTree, batch: tuple[Array, Array], network: Network = mlp_logits
) -> Float[Array, ""]:
    """Mean cross-entropy of `(x, labels)`, in nats."""
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(network(params, x), y).mean()


def accuracy(
    params: PyTree, batch: tuple[Array, Array], network: Network = mlp_logits
) -> Float[Array, ""]:
    """Share of `(x, labels)` that is right, in percent."""
    x, y = batch
    return 100 * (jnp.argmax(network(params, x), -1) == y).mean()


def batch_order(
    seed: int, *, steps: int, batch: int, examples: int = TRAIN
) -> Int[Array, "steps batch"]:
    """Which training examples each step sees: without replacement, each epoch in a new order."""
    rng, whole = np.random.default_rng(seed), examples // batch
    epochs = [rng.permutation(examples)[: whole * batch] for _ in range(-(-steps // whole))]
    return jnp.asarray(np.concatenate(epochs).reshape(-1, batch)[:steps], jnp.int32)


def sgd(
    rate: Any, *, momentum: float | Array, weight_decay: float | Array, nesterov: bool = False
) -> optax.GradientTransformation:
    """SGD with momentum and coupled weight decay, of every parameter."""
    decay = optax.add_decayed_weights(weight_decay)
    return optax.chain(decay, optax.sgd(rate, momentum, nesterov=nesterov))


def check_settings(
    config: Any,
    *,
    positive: Sequence[str] = (),
    shares: Sequence[str] = (),
    known: Mapping[str, Sequence[str]] | None = None,
    one_device: bool = True,
    examples: int | None = TRAIN,
) -> None:
    """Refuses settings out of range, the batch included, and with `one_device` a mesh.

    Args:
      config: a `RunConfig` with a `batch`; a setting may be a value or a tuple of them, not empty.
      positive: names of those that are at least 1. shares: of those in [0, 1].
      known: allowed values of a setting by its name.
      examples: the most that a batch may hold, None for any number.

    Raises:
      ExperimentError: naming the setting.
    """
    if examples is not None and not 1 <= config.batch <= examples:
        raise ExperimentError(f"batch is {config.batch}; it must be from 1 to {examples}")
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
      params: after the last step, dense. state: of the optimiser.
      losses: of each batch, before its step.
      train_loss, test_loss, test_accuracy: of the whole sets, after the last step and through the
        view (nats, nats, percent).
      measured: what `measure` gave at each step. observed: what `observe` gave at each epoch.
    """

    params: PyTree
    state: PyTree
    losses: Float[Array, "steps"]
    train_loss: Float[Array, ""]
    test_loss: Float[Array, ""]
    test_accuracy: Float[Array, ""]
    measured: PyTree = None
    observed: PyTree = None


def train(
    tx: optax.GradientTransformation,
    params: PyTree,
    order: Int[Array, "*epochs steps batch"],
    data: Digits,
    *,
    network: Network = mlp_logits,
    view: Callable[[PyTree, Array], PyTree] = lambda params, step: params,
    measure: Callable[[PyTree], PyTree] = lambda gradients: None,
    observe: Callable[[PyTree, PyTree], PyTree] = lambda before, after: None,
) -> Trained:
    """A whole training as one scan; call it inside `jit` with masks and keys as arguments.

    Args:
      order: the examples of each step; with a leading axis, epoch by epoch.
      network: params, inputs -> logits. view: params, step -> params of the forward pass.
      measure: gradients -> anything, at each step.
      observe: params at the begin and at the end of an epoch -> anything.
    """

    def step(carry: Any, rows: Array) -> tuple[Any, Any]:
        count, params, state = carry
        batch = (data.train_x[rows], data.train_y[rows])

        def loss(params: PyTree) -> Array:
            return cross_entropy(view(params, count), batch, network)

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        after = (count + 1, optax.apply_updates(params, updates), state)
        return after, (value, measure(gradients))

    def epoch(carry: Any, rows: Array) -> tuple[Any, Any]:
        after, found = lax.scan(step, carry, rows)
        return after, (found, observe(carry[1], after[1]))

    epochs = order if order.ndim == 3 else order[None]
    begin = (jnp.zeros((), jnp.int32), params, tx.init(params))
    (count, params, state), (found, observed) = lax.scan(epoch, begin, epochs)
    losses, measured = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)
    used, test = view(params, count - 1), (data.test_x, data.test_y)
    return Trained(
        params,
        state,
        losses,
        cross_entropy(used, (data.train_x, data.train_y), network),
        cross_entropy(used, test, network),
        accuracy(used, test, network),
        measured,
        observed,
    )


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
