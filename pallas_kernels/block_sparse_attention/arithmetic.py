"""What every implementation computes on a block of queries and keys."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.block_sparse_attention.canonical import Rule


class Softmax(NamedTuple):
    """A softmax on the way: largest logit, sum and output of the keys so far, for rows `[R, 1]`.

    Attributes:
      top, total: `[R, 1]`. out: `[R, Dv]`, not yet divided by the sum.
    """

    top: Array
    total: Array
    out: Array


def wide(dtype: Any) -> Any:
    """What logits and sums are computed in."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def logits(
    products: Array,
    rule: Rule,
    *,
    allowed: Array,
    log_weight: Array | None,
    positions: tuple[Array, Array] | None,
) -> Array:
    """Logits `[R, K]` of the products of queries and keys; -inf where a key does not count.

    Args:
      allowed: bool, broadcasting. log_weight: `[1, K]`.
      positions: of queries `[R, 1]` and keys `[1, K]`, where the rule masks by them.
    """
    found = products * rule.scale
    if log_weight is not None:
        found = found + log_weight
    if rule.mask_mod is not None and positions is not None:
        allowed = allowed & rule.mask_mod(*positions)
    return jnp.where(allowed, found, -jnp.inf)


def finite(x: Array) -> Array:
    """-inf, the logit of nothing, replaced by 0: a row that sees nothing gives exp(-inf - 0)."""
    return jnp.where(x == -jnp.inf, 0, x)


def normalised(found: Softmax) -> tuple[Array, Array]:
    """Output and log-sum-exp `[R, 1]`; 0 and -inf where nothing was seen."""
    some = found.total != 0
    total = jnp.where(some, found.total, 1)
    return found.out / total, jnp.where(some, finite(found.top) + jnp.log(total), -jnp.inf)


def logit_gradient(s: Array, lse: Array, dp: Array, delta: Array) -> tuple[Array, Array]:
    """Weights of the softmax, and the gradient of the logits.

    Args:
      s: logits `[R, K]`. dp: `dout @ v^T`, `[R, K]`.
      lse, delta: `[R, 1]`; delta is `sum(out * dout) - dlse`.
    """
    p = jnp.exp(s - finite(lse))
    return p, p * (dp - delta)
