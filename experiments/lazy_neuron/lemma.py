"""Why neurons fall silent: the mean gradient of the neurons that fire is positive."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from experiments.lazy_neuron.config import Config

NEURONS, FIRING, CLASSES, LABEL = 24, 12, 7, 2
LOSSES = ("cross-entropy", "squared error", "cross-entropy, random labels")
ERRORS = 3.0


def signs(config: Config) -> dict[str, Any]:
    """By loss and seed, the mean gradient over its standard error: the least of those that fire.

    Returns:
      `{loss: {"least": one a seed, "most_silent": the largest of the others, one a seed}}`.
    """
    found: dict[str, Any] = {}
    for loss in LOSSES:
        each = [mean_gradients(jax.random.key(s), config.lemma_draws, loss)
                for s in config.seed_list()]  # fmt: skip
        found[loss] = {
            "least": [float(jnp.min((mean / error)[:FIRING])) for mean, error in each],
            "most_silent": [float(jnp.max(jnp.abs(mean[FIRING:]))) for mean, _ in each],
        }
    return found


@functools.partial(jax.jit, static_argnames=("draws", "loss"))
def mean_gradients(
    key: Array, draws: int, loss: str
) -> tuple[Float[Array, "neurons"], Float[Array, "neurons"]]:  # noqa: F821
    """Mean over random last layers of the gradient by each pre-activation, and standard errors.

    Logits are `V relu(p)`, with V uniform in (-1, 1). Of the pre-activations p the first `FIRING`
    are uniform in (.3, 2), the others are negative.
    """
    at, last, label = jax.random.split(key, 3)
    p = jax.random.uniform(at, (NEURONS,), minval=0.3, maxval=2.0)
    p = p * jnp.where(jnp.arange(NEURONS) < FIRING, 1, -1)
    weights = jax.random.uniform(last, (draws, CLASSES, NEURONS), minval=-1.0)
    labels = jnp.full(draws, LABEL)
    if loss == LOSSES[2]:
        labels = jax.random.randint(label, (draws,), 0, CLASSES)

    def value(p: Array, weights: Array, label: Array) -> Array:
        logits = weights @ jax.nn.relu(p)
        if loss == LOSSES[1]:
            return jnp.sum((logits - jax.nn.one_hot(label, CLASSES)) ** 2) / 2
        return optax.softmax_cross_entropy_with_integer_labels(logits, label)

    gradients = jax.vmap(jax.grad(value), (None, 0, 0))(p, weights, labels)
    return gradients.mean(0), gradients.std(0, ddof=1) / draws**0.5
