"""What the solvers refuse while tracing, where values are known."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Array, Float

from sparsejax.core import proximal
from sparsejax.core.selection import is_concrete

Scalar = int | float | Float[Array, ""]
Prox = Callable[..., Array]


def check_settings(
    prox: str | Prox, lam: Scalar, steps: int, tol: float, *, name: str = "num_steps"
) -> Prox:
    """The rule called `prox`, or `prox` itself, after checks of the others; steps is `name`.

    Raises:
      ValueError: steps below 1, tol or a known lam negative, or an unknown penalty.

    >>> import jax.numpy as jnp
    >>> check_settings("l1", 0.1, 10, 0.0)(jnp.ones(1), lam=0.5, step=1.0)
    Array([0.5], dtype=float32)
    """
    if steps < 1:
        raise ValueError(f"{name} is {steps}; it must be at least 1")
    if tol < 0:
        raise ValueError(f"tol is {tol}; it must not be negative")
    if is_concrete(lam) and not float(lam) >= 0:
        raise ValueError(f"lam is {lam}; it must not be negative")
    return proximal.penalty(prox).prox if isinstance(prox, str) else prox


def check_dictionary(dictionary: Float[Array, "n k"], x: Float[Array, "b m"]) -> None:
    """Refuses a dictionary that does not fit the data, or that is known to hold no atom.

    Raises:
      ValueError: shapes that do not match; a column of zeros, or values that are not finite, in a
        dictionary or data that are known.

    >>> import jax.numpy as jnp
    >>> check_dictionary(jnp.eye(2), jnp.ones((1, 2)))
    """
    if x.ndim != 2 or dictionary.ndim != 2 or x.shape[1] != dictionary.shape[0]:
        raise ValueError(
            f"x and dictionary have shapes {x.shape} and {dictionary.shape}; they must be [b, n] "
            "and [n, k]"
        )
    check_finite(x=x, dictionary=dictionary)
    if is_concrete(dictionary):
        empty = ~(np.asarray(dictionary) != 0).any(axis=0)
        if empty.any():
            raise ValueError(
                f"dictionary has an atom of zeros, column {int(empty.argmax())}; drop or "
                "resample it"
            )


def check_finite(**arrays: Float[Array, "..."]) -> None:
    """Refuses arrays that are known to hold a value that is not finite, by their names.

    Raises:
      ValueError: naming the first.

    >>> import jax.numpy as jnp
    >>> check_finite(x=jnp.ones(2))
    """
    for name, value in arrays.items():
        if is_concrete(value) and not np.isfinite(np.asarray(value, np.float64)).all():
            raise ValueError(f"{name} holds values that are not finite")
