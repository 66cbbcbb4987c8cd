"""Images of a seed, and what their features are worth: nearest neighbours and a linear probe."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.crate.config import DinoConfig, ImagesConfig, MaeConfig
from experiments.harness.arms import Metrics
from experiments.harness.config import ExperimentError, Table
from experiments.harness.data.images import ImageData
from experiments.harness.progress import mean_and_deviation
from experiments.harness.rows import over_batches

PIXELS = "pixels"


def share_images(config: ImagesConfig, data: ImageData, seed: int) -> ImageData:
    """Both splits together, cut anew by the seed into `resplit` training images and the others.

    Raises ExperimentError if that leaves nothing to train or to test on.
    """
    if not config.resplit:
        return data
    if not data.fixed:
        raise ExperimentError(
            f"resplit is {config.resplit}; {data.name} is not held in memory: give 0"
        )
    both = {name: np.concatenate([data.train[name], data.test[name]]) for name in data.train}
    count = len(both["label"])
    if config.resplit >= count:
        raise ExperimentError(f"resplit is {config.resplit}; there are {count} images in all")
    order = np.random.default_rng(seed).permutation(count)
    train, test = (
        {name: array[rows] for name, array in both.items()}
        for rows in (order[: config.resplit], order[config.resplit :])
    )
    return dataclasses.replace(data, train=train, test=test, examples=config.resplit)


def first_images(
    data: ImageData, count: int, *, train: bool = False
) -> tuple[Float[np.ndarray, "n h w c"], Int[np.ndarray, " n"]]:
    """The first images of a split and their labels, normalised by channel."""
    source = dataclasses.replace(data, test=data.train) if train else data
    images, labels, found = [], [], 0
    for batch in source.test_batches(min(count, 256)):
        real = batch["label"] >= 0
        images.append(batch["image"][real])
        labels.append(batch["label"][real])
        found += int(real.sum())
        if found >= count:
            break
    pixels = np.concatenate(images)[:count]
    return np.asarray(normalised(pixels, data)), np.concatenate(labels)[:count]


def normalised(images: Array | np.ndarray, data: ImageData) -> Array:
    """Pixels scaled to 0..1, less the mean of their channel, over its deviation."""
    return (jnp.asarray(images, jnp.float32) / 255 - data.mean) / data.deviation


def unnormalised(
    images: Float[np.ndarray, "n h w c"], data: ImageData
) -> Float[np.ndarray, "n h w c"]:
    """Pixels from 0 to 1 again."""
    return np.clip(np.asarray(images) * data.deviation + data.mean, 0, 1)


def feature_accuracies(
    config: MaeConfig | DinoConfig,
    data: ImageData,
    features: Mapping[str, Callable[[Array], Array]],
) -> dict[str, float]:
    """`probe_NAME` and `neighbours_NAME` in percent, for features by name and for plain pixels.

    features: functions of images, jitted.
    """
    sets = [first_images(data, config.measured, train=train) for train in (True, False)]
    labels = [labels for _, labels in sets]
    found = {}
    for name in (*features, PIXELS):
        train, test = (
            over_batches(features[name], images) if name in features
            else images.reshape(len(images), -1)
            for images, _ in sets
        )  # fmt: skip
        both = (train, labels[0], test, labels[1])
        found[f"probe_{name}"] = probe_accuracy(*both)
        found[f"neighbours_{name}"] = neighbour_accuracy(*both, neighbours=config.neighbours)
    return found


def features_table(title: str, metrics: Metrics, config: MaeConfig | DinoConfig) -> Table:
    """The accuracies of `feature_accuracies` over the seeds."""
    columns = {"neighbours": f"{config.neighbours} nearest neighbours (%)",
               "probe": "linear probe (%)"}  # fmt: skip
    names = [name.removeprefix("probe_") for name in metrics if name.startswith("probe_")]
    rows = tuple(
        (name, *(mean_and_deviation(metrics[f"{column}_{name}"], 1) for column in columns))
        for name in names
    )
    return Table(title, ("features", *columns.values()), rows)


def neighbour_accuracy(
    train: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test: Float[np.ndarray, "m d"],
    test_labels: Int[np.ndarray, " m"],
    *,
    neighbours: int,
) -> float:
    """Percent of test features whose nearest training features, by angle, vote for their label."""
    sizes = {"count": min(neighbours, len(train)), "classes": int(train_labels.max()) + 1}
    vote = functools.partial(_vote, known=_unit(train), labels=train_labels, **sizes)
    return 100 * float(np.mean(over_batches(vote, _unit(test)) == test_labels))


@functools.partial(jax.jit, static_argnames=("count", "classes"))
def _vote(rows: Array, *, known: Array, labels: Array, count: int, classes: int) -> Array:
    """The label that most of the nearest rows have; among equals the lowest."""
    nearest = jax.lax.top_k(rows @ known.T, count)[1]
    votes = jax.nn.one_hot(labels[nearest], classes)
    return jnp.argmax(votes.sum(1), -1)


def probe_accuracy(
    train: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test: Float[np.ndarray, "m d"],
    test_labels: Int[np.ndarray, " m"],
) -> float:
    """Percent of test features that a logistic regression on training features labels right."""
    from sklearn.linear_model import LogisticRegression

    mean, deviation = train.mean(0), np.maximum(train.std(0), 1e-6)
    probe = LogisticRegression(max_iter=500).fit((train - mean) / deviation, train_labels)
    return 100 * float(np.mean(probe.predict((test - mean) / deviation) == test_labels))


def _unit(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
