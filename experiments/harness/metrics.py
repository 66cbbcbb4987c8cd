"""Measures of a classifier besides accuracy: calibration, and labels made wrong on purpose."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sparsejax.core.dtypes import widen
from sparsejax.core.selection import is_concrete


def expected_calibration_error(
    probs: Float[Array, "n c"], labels: Int[Array, " n"], *, num_bins: int = 15
) -> Float[Array, ""]:
    """Mean distance of accuracy from confidence, over bins of equal width: a fraction in [0, 1].

    The confidence is the largest probability and the prediction its first place. Bins are closed on
    the right, the first at 0 as well; each weighs as many examples as it has.

    Args:
      probs: probabilities of c classes, each row summing to 1.
      labels: the right classes.
      num_bins: at least 1.

    Raises:
      ValueError: num_bins below 1, no examples, labels of another number, or concrete
        probabilities that do not sum to 1 within 1e-3.

    Source: Naeini et al., Bayesian binning (2015); Lazy Neuron (2023, arXiv 2210.06313), table of
    the top-k ViT, which shows percent.

    >>> probs = jnp.asarray([[0.8, 0.2], [0.8, 0.2]])
    >>> expected_calibration_error(probs, jnp.asarray([0, 1])).round(3)
    Array(0.3, dtype=float32)
    """
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}; it must be at least 1")
    n = probs.shape[0]
    if not n or labels.shape != (n,):
        raise ValueError(f"probs has shape {probs.shape} and labels {labels.shape}: one a row")
    probs = widen(probs)
    if is_concrete(probs):
        worst = float(jnp.max(jnp.abs(jnp.sum(probs, axis=-1) - 1)))
        if not worst <= 1e-3:
            raise ValueError(f"probs has a row whose sum is {worst:.3g} away from 1")
    confidence = jnp.max(probs, axis=-1)
    right = (jnp.argmax(probs, axis=-1) == labels).astype(probs.dtype)
    place = jnp.clip(jnp.ceil(confidence * num_bins).astype(jnp.int32) - 1, 0, num_bins - 1)
    # n_b / N |acc_b - conf_b|, where the means' n_b cancels
    gaps = jnp.zeros(num_bins, probs.dtype).at[place].add(right - confidence)
    return jnp.sum(jnp.abs(gaps)) / n


def corrupt_labels(
    key: PRNGKeyArray, labels: Int[Array, " n"], *, p: float, num_classes: int
) -> Int[Array, " n"]:
    """Replaces each label with probability p by a uniform draw from all classes.

    The right class is among them, so that `p (1 - 1 / num_classes)` of the labels become wrong.

    Args:
      key: split in two: which labels, and what they become.
      labels: classes, of any shape.
      p: in [0, 1]. num_classes: at least 1.

    Raises:
      ValueError: p outside [0, 1], or num_classes below 1.

    Source: Lazy Neuron (2023), section on robustness to label noise.

    >>> corrupt_labels(jax.random.key(0), jnp.asarray([1, 2, 3]), p=0.0, num_classes=10)
    Array([1, 2, 3], dtype=int32)
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p is {p}; it must be in [0, 1]")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; it must be at least 1")
    who, which = jax.random.split(key)
    drawn = jax.random.randint(which, labels.shape, 0, num_classes, labels.dtype)
    return jnp.where(jax.random.bernoulli(who, p, labels.shape), drawn, labels)
