"""Sparse codes by coordinate descent: one atom after the other, for all rows at once."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sparsejax.coding.checks import Prox, Scalar, check_dictionary, check_settings
from sparsejax.core.dtypes import widen


def coordinate_descent(
    x: Float[Array, "b n"],
    dictionary: Float[Array, "n k"],
    *,
    prox: str | Prox = "l1",
    lam: Scalar,
    num_sweeps: int,
    init: Float[Array, "b k"] | None = None,
    tol: float = 0.0,
) -> Float[Array, "b k"]:
    """Minimises `||x - D a||^2 / 2 + lam * sum penalty(a_i)` one coordinate at a time, cyclically.

    Each is set to the minimiser with the others held: the proximal map with step 1 over the atom's
    squared norm. No sweep raises the objective, of any penalty. Differentiated through its sweeps
    (reverse mode needs tol 0; `implicit_codes` serves at the solution).

    Args:
      x, dictionary, prox, lam, init: as in `ista`. num_sweeps: at most so many passes.
      tol: a row stops once a sweep changes its codes by no more than this share of their norm; 0
        takes all the sweeps.

    Raises:
      ValueError: as `ista`.

    Source: Friedman, Hastie and Tibshirani, Regularization paths by coordinate descent (2010).

    >>> coordinate_descent(jnp.asarray([[2.0, 0.5]]), jnp.eye(2), lam=1.0, num_sweeps=1)
    Array([[1., 0.]], dtype=float32)
    """
    check_dictionary(dictionary, x)
    rule = check_settings(prox, lam, num_sweeps, tol, name="num_sweeps")
    atoms = widen(dictionary).T  # [k, n]
    squares = jnp.sum(jnp.square(atoms), axis=1)
    norms = jnp.sqrt(squares)
    k, b = len(atoms), x.shape[0]
    # coordinates lie in front, so that one is a row of memory
    codes = jnp.zeros((k, b), atoms.dtype) if init is None else widen(init).T
    residual = widen(x).T - atoms.T @ codes  # [n, b]

    def visit(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        codes, residual = state
        atom, step, a = atoms[i], 1 / squares[i], codes[i]
        after = rule(
            a + step * (atom @ residual),
            lam=lam,
            step=step,
            norms=jnp.broadcast_to(norms[i], a.shape),
        )
        residual = residual - atom[:, None] * (after - a)
        return codes.at[i].set(after), residual

    def sweep(state: tuple[Array, Array]) -> tuple[Array, Array]:
        body = lambda state, i: (visit(i, state), None)  # noqa: E731
        return lax.scan(body, state, jnp.arange(k))[0]

    if not tol:
        body = lambda state, _: (sweep(state), None)  # noqa: E731
        (codes, _), _ = lax.scan(body, (codes, residual), length=num_sweeps)
        return codes.T.astype(x.dtype)

    def going(state: tuple) -> Array:
        return (state[0] < num_sweeps) & ~jnp.all(state[-1])

    def until_still(state: tuple) -> tuple:
        i, codes, residual, still = state
        after, left = sweep((codes, residual))
        change = jnp.sum(jnp.square(after - codes), axis=0)
        still_now = change <= tol**2 * jnp.sum(jnp.square(after), axis=0)
        after, left = jnp.where(still, codes, after), jnp.where(still, residual, left)
        return i + 1, after, left, still | still_now

    start = (jnp.int32(0), codes, residual, jnp.zeros(b, bool))
    return lax.while_loop(going, until_still, start)[1].T.astype(x.dtype)
