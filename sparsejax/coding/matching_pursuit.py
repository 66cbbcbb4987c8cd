"""Greedy sparse codes: matching pursuit and orthogonal matching pursuit, batched."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sparsejax.coding.checks import check_dictionary
from sparsejax.core.dtypes import widen


def matching_pursuit(
    x: Float[Array, "b n"],
    dictionary: Float[Array, "n k"],
    *,
    num_steps: int,
    tol: float = 0.0,
) -> Float[Array, "b k"]:
    """Adds to each row, step by step, the atom that its residual correlates with most.

    An atom may be chosen again. Works on correlations, which a step changes by a row of the Gram
    matrix: no residual is formed. Not differentiated by what is chosen; the coefficients are.

    Args:
      x: data. dictionary: atoms as columns, of any length but 0.
      num_steps: at most so many. tol: a row stops once its residual is no longer than this share
        of the row itself; 0 takes all the steps.

    Raises:
      ValueError: shapes that do not match, num_steps below 1, tol outside [0, 1), an atom of zeros
        or values that are not finite where they are known.

    Source: Mallat and Zhang, Matching pursuits with time-frequency dictionaries (1993).

    >>> matching_pursuit(jnp.asarray([[3.0, 1.0]]), jnp.eye(2), num_steps=1)
    Array([[3., 0.]], dtype=float32)
    """
    _check(x, dictionary, num_steps, tol)
    wide, atoms = widen(x), widen(dictionary)
    norms = jnp.linalg.norm(atoms, axis=0)
    unit = atoms / norms
    gram = unit.T @ unit
    square = jnp.sum(jnp.square(wide), axis=1)
    rows = jnp.arange(len(wide))

    def body(state: Any, _: None) -> tuple[Any, None]:
        correlations, codes, left = state
        best = jnp.argmax(jnp.abs(correlations), axis=1)
        gain = correlations[rows, best]
        gain = jnp.where(left > tol**2 * square, gain, 0)
        correlations = correlations - gain[:, None] * gram[best]
        return (correlations, codes.at[rows, best].add(gain), left - gain * gain), None

    start = (wide @ unit, jnp.zeros((len(wide), atoms.shape[1]), wide.dtype), square)
    (_, codes, _), _ = lax.scan(body, start, length=num_steps)
    return (codes / norms).astype(x.dtype)


def orthogonal_matching_pursuit(
    x: Float[Array, "b n"],
    dictionary: Float[Array, "n k"],
    *,
    num_atoms: int,
    tol: float = 0.0,
) -> Float[Array, "b k"]:
    """As `matching_pursuit`, but after each step all coefficients are those of least squares.

    The chosen atoms of each row are kept as an orthonormal basis (Gram-Schmidt, twice), so that a
    step is one product with the dictionary and one with the basis. An atom that adds nothing to the
    span, to rounding, ends the row.

    Args:
      num_atoms: at most so many an row, and at most n. tol: as in `matching_pursuit`.

    Raises:
      ValueError: as `matching_pursuit`, or num_atoms above n or k.

    Source: Pati, Rezaiifar and Krishnaprasad, Orthogonal matching pursuit (1993).

    >>> orthogonal_matching_pursuit(jnp.asarray([[3.0, 1.0]]), jnp.eye(2), num_atoms=2)
    Array([[3., 1.]], dtype=float32)
    """
    _check(x, dictionary, num_atoms, tol, name="num_atoms")
    (b, n), k = x.shape, dictionary.shape[1]
    if num_atoms > min(n, k):
        raise ValueError(f"num_atoms is {num_atoms}; it must be at most {min(n, k)}, of {n} x {k}")
    wide, atoms = widen(x), widen(dictionary)
    norms = jnp.linalg.norm(atoms, axis=0)
    unit = atoms / norms
    square = jnp.sum(jnp.square(wide), axis=1)
    rows, edge = jnp.arange(b), 8 * jnp.finfo(wide.dtype).eps

    def body(i: Array, state: Any) -> Any:
        residual, basis, triangle, chosen, used, on = state
        sizes = jnp.where(used, -1, jnp.abs(residual @ unit))
        best = jnp.argmax(sizes, axis=1).astype(jnp.int32)
        atom = unit.T[best]
        parts = jnp.einsum("bin,bn->bi", basis, atom)
        rest = atom - jnp.einsum("bin,bi->bn", basis, parts)
        # once more, for what rounding has left along the basis
        more = jnp.einsum("bin,bn->bi", basis, rest)
        rest = rest - jnp.einsum("bin,bi->bn", basis, more)
        length = jnp.linalg.norm(rest, axis=1)
        far = jnp.sum(jnp.square(residual), axis=1) > tol**2 * square
        on = on & far & (length > jnp.sqrt(edge)) & (sizes[rows, best] > 0)
        direction = jnp.where(on[:, None], rest / jnp.where(on, length, 1)[:, None], 0)
        gain = jnp.sum(residual * direction, axis=1)
        column = (parts + more).at[:, i].set(jnp.where(on, length, 1))
        # a step that is off leaves a row of the identity, which the solution does not see
        column = jnp.where(on[:, None], column, jnp.zeros_like(column).at[:, i].set(1))
        return (
            residual - gain[:, None] * direction,
            basis.at[:, i].set(direction),
            triangle.at[:, :, i].set(column),
            chosen.at[:, i].set(best),
            used.at[rows, best].set(used[rows, best] | on),
            on,
        )

    start = (
        wide,
        jnp.zeros((b, num_atoms, n), wide.dtype),
        jnp.zeros((b, num_atoms, num_atoms), wide.dtype),
        jnp.zeros((b, num_atoms), jnp.int32),
        jnp.zeros((b, k), bool),
        jnp.ones(b, bool),
    )
    _, basis, triangle, chosen, _, _ = lax.fori_loop(0, num_atoms, body, start)
    projections = jnp.einsum("bin,bn->bi", basis, wide)
    solved = jax.scipy.linalg.solve_triangular(triangle, projections[..., None])[..., 0]
    codes = jnp.zeros((b, k), wide.dtype).at[rows[:, None], chosen].add(solved)
    return (codes / norms).astype(x.dtype)


def _check(x: Array, dictionary: Array, steps: int, tol: float, name: str = "num_steps") -> None:
    if steps < 1:
        raise ValueError(f"{name} is {steps}; it must be at least 1")
    if not 0 <= tol < 1:
        raise ValueError(f"tol is {tol}; it must be in [0, 1)")
    check_dictionary(dictionary, x)
