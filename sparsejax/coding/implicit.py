"""Gradients of sparse codes at the solution, however they were found."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sparsejax.coding.checks import Prox, Scalar, check_dictionary, check_settings
from sparsejax.coding.solvers import spectral_norm_sq


def implicit_codes(
    x: Float[Array, "b n"],
    dictionary: Float[Array, "n k"],
    codes: Float[Array, "b k"],
    *,
    prox: str | Prox = "l1",
    lam: Scalar,
    num_steps: int = 100,
) -> Float[Array, "b k"]:
    """`codes` as they are, with the gradient of a fixed point of ISTA in x, dictionary and lam.

    However the codes were found, their gradient costs `num_steps` products and no memory for the
    steps: it solves `u = g + J^T u`, J being the Jacobian of one step at the codes, by as many
    iterations. Exact as far as codes are a fixed point and the iteration has converged. Reverse
    mode alone.

    Args:
      x, dictionary, prox, lam: what the codes solve. codes: a fixed point; not differentiated.

    Raises:
      ValueError: as `ista`.

    >>> from sparsejax.coding.solvers import ista
    >>> x, d = jnp.asarray([[2.0, 0.5]]), jnp.eye(2)
    >>> codes = ista(x, d, lam=1.0, num_steps=5)
    >>> jax.grad(lambda x: implicit_codes(x, d, codes, lam=1.0).sum())(x)
    Array([[1., 0.]], dtype=float32)
    """
    check_dictionary(dictionary, x)
    rule = check_settings(prox, lam, num_steps, 0.0)

    def one_step(codes: Array, x: Array, dictionary: Array, lam: Array) -> Array:
        step = lax.stop_gradient(1 / spectral_norm_sq(dictionary))
        norms = jnp.linalg.norm(dictionary, axis=0)
        ahead = codes + step * ((x - codes @ dictionary.T) @ dictionary)
        return rule(ahead, lam=lam, step=step, norms=norms)

    @jax.custom_vjp
    def fixed(codes: Array, x: Array, dictionary: Array, lam: Array) -> Array:
        return codes

    def forward(codes: Array, *inputs: Array) -> tuple[Array, Any]:
        return codes, (codes, *inputs)

    def backward(kept: Any, g: Array) -> tuple[Array, Array, Array, Array]:
        codes, *inputs = kept
        _, through = jax.vjp(lambda codes: one_step(codes, *inputs), codes)
        u = lax.fori_loop(0, num_steps, lambda _, u: g + through(u)[0], g)
        _, out = jax.vjp(lambda *inputs: one_step(codes, *inputs), *inputs)
        return jnp.zeros_like(g), *out(u)

    fixed.defvjp(forward, backward)
    return fixed(lax.stop_gradient(codes), x, dictionary, jnp.asarray(lam, x.dtype))
