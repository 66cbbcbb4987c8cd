"""Coding rates: how many nats a set of tokens costs, as a whole and per subspace.

Tokens are rows. Rates are log-determinants of Gram matrices, of their smaller side, by Cholesky
factors in float32 at least.

Source: White-Box Transformers via Sparse Rate Reduction (2023, arXiv 2306.01129, 2311.13110).
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.core.dtypes import widen

Norm = Literal["l0", "l1"]


def coding_rate(z: Float[Array, "*b n d"], eps2: float) -> Float[Array, "*b"]:
    """`R(Z) = logdet(I + d / (n eps2) Z Z^T) / 2` in nats. Differentiated in z.

    Args:
      z: n tokens of d features. eps2: the squared precision, above 0.

    Raises:
      ValueError: eps2 is not positive.

    >>> round(float(coding_rate(jnp.eye(2), 1.0)), 4)
    0.6931
    """
    _check_positive("eps2", eps2)
    n, d = z.shape[-2:]
    return _half_logdet(widen(z), d / (n * eps2))


def subspace_coding_rate(
    z: Float[Array, "*b n d"], bases: Float[Array, "k d p"], eps2: float
) -> Float[Array, "*b"]:
    """`R^c(Z | U) = sum_k logdet(I + p / (n eps2) (Z U_k) (Z U_k)^T) / 2` in nats.

    Differentiated in z and bases.

    Args:
      z: n tokens of d features. bases: k subspaces of p dimensions. eps2: as in `coding_rate`.

    Raises:
      ValueError: eps2 is not positive, or bases for another number of features.

    >>> round(float(subspace_coding_rate(jnp.eye(2), jnp.eye(2)[None], 1.0)), 4)
    0.6931
    """
    projected, alpha = _projected(z, bases, eps2)
    return jnp.sum(_half_logdet(projected, alpha), axis=-1)


def sparse_rate_reduction(
    z: Float[Array, "*b n d"],
    bases: Float[Array, "k d p"],
    eps2: float,
    lam: float | Float[Array, ""],
    *,
    norm: Norm = "l0",
) -> Float[Array, "*b"]:
    """`R(Z) - R^c(Z | U) - lam * ||Z||`: what a CRATE layer is meant to raise.

    Args:
      z, bases, eps2: as in `subspace_coding_rate`. lam: weight of the norm over tokens and
        features: "l0" counts entries (and has no gradient), "l1" sums their sizes.

    Raises:
      ValueError: as `subspace_coding_rate`, or an unknown norm.

    >>> round(float(sparse_rate_reduction(jnp.eye(2), jnp.eye(2)[None], 1.0, 0.5)), 4)
    -1.0
    """
    if norm not in ("l0", "l1"):
        raise ValueError(f"norm is {norm!r}; allowed are 'l0' and 'l1'")
    wide = widen(z)
    sizes = (wide != 0).astype(wide.dtype) if norm == "l0" else jnp.abs(wide)
    lam = jnp.asarray(lam, wide.dtype)
    rates = coding_rate(z, eps2) - subspace_coding_rate(z, bases, eps2)
    return rates - lam * jnp.sum(sizes, axis=(-2, -1))


def coding_rate_gradient(
    z: Float[Array, "*b n d"],
    bases: Float[Array, "k d p"],
    eps2: float,
    *,
    order: int | None = None,
) -> Float[Array, "*b n d"]:
    """The gradient of `subspace_coding_rate` in z, in closed form or as a Neumann series.

        alpha sum_k (I + alpha Z_k Z_k^T)^-1 Z_k U_k^T,  Z_k = Z U_k,  alpha = p / (n eps2)

    Args:
      z, bases, eps2: as in `subspace_coding_rate`.
      order: None inverts; otherwise the inverse is `sum_{i <= order} (-alpha Z_k Z_k^T)^i`, which
        diverges where alpha times a squared singular value of Z_k passes 1.

    Raises:
      ValueError: as `subspace_coding_rate`, or a negative order.

    Source: White-Box Transformers, the step from the gradient to MSSA (order 1).

    >>> coding_rate_gradient(jnp.eye(2), jnp.eye(2)[None], 1.0).round(3).tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """
    if order is not None and order < 0:
        raise ValueError(f"order is {order}; it must be at least 0, or None")
    w, alpha = _projected(z, bases, eps2)
    # by the push-through identity the inverse acts on the smaller side
    gram = jnp.einsum("...np,...nq->...pq", w, w)
    if order is None:
        eye = jnp.eye(w.shape[-1], dtype=w.dtype)
        factor = jax.scipy.linalg.cho_factor(eye + alpha * gram)
        solved = jnp.swapaxes(jax.scipy.linalg.cho_solve(factor, jnp.swapaxes(w, -1, -2)), -1, -2)
    else:
        solved = term = w
        for _ in range(order):
            term = -alpha * jnp.einsum("...np,...pq->...nq", term, gram)
            solved = solved + term
    return (alpha * jnp.einsum("...knp,kdp->...nd", solved, widen(bases))).astype(z.dtype)


def projected_coding_rate(w: Float[Array, "*b k n p"], eps: float) -> Float[Array, "*b"]:
    """`sum_k logdet(I + p / (n eps) W_k W_k^T) / 2` with the rows of W scaled to unit length.

    The measure by layer of the paper's figures, W being what the attention projects its tokens to.
    A row of zeros contributes nothing. Differentiated in w.

    Args:
      w: by heads. eps: takes the place of `eps2`; 0.01 in the published code.

    Raises:
      ValueError: eps is not positive.

    >>> projected_coding_rate(jnp.zeros((1, 2, 3)), 0.01)
    Array(0., dtype=float32)
    """
    _check_positive("eps", eps)
    w = widen(w)
    n, p = w.shape[-2:]
    square = jnp.sum(jnp.square(w), axis=-1, keepdims=True)
    unit = w * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)
    return jnp.sum(_half_logdet(unit, p / (n * eps)), axis=-1)


def _projected(z: Array, bases: Array, eps2: float) -> tuple[Array, float]:
    """The tokens in each subspace `[*b, k, n, p]`, and alpha."""
    _check_positive("eps2", eps2)
    (n, d), (_, features, p) = z.shape[-2:], bases.shape
    if features != d:
        raise ValueError(f"bases has shape {bases.shape} for {d} features; it must be [k, {d}, p]")
    z, bases = widen(z), widen(bases)
    return jnp.einsum("...nd,kdp->...knp", z, bases), p / (n * eps2)


def _half_logdet(w: Array, alpha: float) -> Array:
    """`logdet(I + alpha W W^T) / 2`, of the smaller Gram matrix."""
    n, p = w.shape[-2:]
    gram = jnp.einsum("...np,...mp->...nm" if n < p else "...np,...nq->...pq", w, w)
    factor = jnp.linalg.cholesky(jnp.eye(min(n, p), dtype=w.dtype) + alpha * gram)
    return jnp.sum(jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1)), axis=-1)


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}; it must be positive")
