"""Perplexity of a language model over windows of tokens."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Perplexity = Callable[[Any, np.ndarray], float]


def make_perplexity(
    logits: Callable[[Any, jax.Array], jax.Array], *, batch: int = 64
) -> Perplexity:
    """Builds `perplexity(params, windows)`, compiled once for a model.

    Every window of L + 1 tokens stands by itself and gives L predictions; the perplexity is the
    exponential of the mean negative log-likelihood over all predictions.

    Args:
      logits: `(params, tokens [b, L]) -> [b, L, vocabulary]`.
      batch: windows at a time; the last, smaller batch is padded and not counted.
    """

    @jax.jit
    def nll(params: Any, windows: jax.Array, valid: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(logits(params, windows[:, :-1]).astype(jnp.float32))
        picked = jnp.take_along_axis(log_p, windows[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(valid[:, None], picked, 0.0))

    def perplexity(params: Any, windows: np.ndarray) -> float:
        total = 0.0
        for start in range(0, len(windows), batch):
            part = windows[start : start + batch]
            padding = np.zeros((batch - len(part), part.shape[1]), part.dtype)
            valid = np.arange(batch) < len(part)
            total += float(nll(params, np.concatenate([part, padding]), valid))
        predictions = len(windows) * (windows.shape[1] - 1)
        return math.exp(min(total / predictions, 700.0))

    return perplexity
