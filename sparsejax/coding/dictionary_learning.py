"""Dictionary learning by mini-batches: codes with the dictionary held, then a step of its atoms."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sparsejax.coding.checks import Scalar
from sparsejax.coding.constraints import normalise

Coder = Callable[[Array, Array], Array]


class DictionaryState(NamedTuple):
    """A dictionary in training.

    Attributes:
      dictionary: atoms of unit length. unused: consecutive batches in which no code used the atom.
      step: batches so far.
    """

    dictionary: Float[Array, "n k"]
    unused: Int[Array, "k"]
    step: Int[Array, ""]


def init_dictionary(key: PRNGKeyArray, n: int, k: int) -> DictionaryState:
    """Normal atoms of unit length.

    Raises:
      ValueError: n or k below 1.

    >>> init_dictionary(jax.random.key(0), 4, 8).dictionary.shape
    (4, 8)
    """
    if n < 1 or k < 1:
        raise ValueError(f"n is {n} and k is {k}; both must be at least 1")
    atoms = normalise(jax.random.normal(key, (n, k)), axis=0)
    return DictionaryState(atoms, jnp.zeros(k, jnp.int32), jnp.int32(0))


def dictionary_step(
    dictionary: Float[Array, "n k"],
    x: Float[Array, "b n"],
    codes: Float[Array, "b k"],
    *,
    learning_rate: Scalar,
) -> Float[Array, "n k"]:
    """`D + learning_rate * (x - a D^T)^T a / b`, then atoms of unit length; codes are constants.

    Raises:
      ValueError: shapes that do not match.

    Source: Olshausen and Field, Emergence of simple-cell receptive field properties (1996).

    >>> dictionary_step(jnp.eye(2), jnp.ones((1, 2)), jnp.eye(2)[:1], learning_rate=1.0).round(3)
    Array([[0.707, 0.   ],
           [0.707, 1.   ]], dtype=float32)
    """
    (n, k), b = dictionary.shape, len(x)
    if x.shape != (b, n) or codes.shape != (b, k):
        raise ValueError(
            f"dictionary, x and codes have shapes {dictionary.shape}, {x.shape} and {codes.shape}; "
            "they must be [n, k], [b, n] and [b, k]"
        )
    codes = jax.lax.stop_gradient(codes)
    rate = jnp.asarray(learning_rate, dictionary.dtype)
    return normalise(dictionary + rate / b * ((x - codes @ dictionary.T).T @ codes), axis=0)


def learn_batch(
    state: DictionaryState,
    x: Float[Array, "b n"],
    *,
    coder: Coder,
    learning_rate: Scalar,
    patience: int | None = None,
) -> tuple[DictionaryState, Float[Array, "b k"]]:
    """One batch of online learning: codes, `dictionary_step`, and dead atoms set anew.

    An atom that no code has used for `patience` batches becomes one of the rows of x that are
    represented worst, at unit length; the worst goes to the first dead atom.

    Args:
      coder: `(x, dictionary) -> codes`, for example `functools.partial(ista, lam=0.2,
        num_steps=60)`. patience: None leaves dead atoms alone.

    Returns:
      The state, and the codes that the step used.

    Raises:
      ValueError: patience below 1, and as `dictionary_step`.

    >>> from sparsejax.coding.solvers import ista
    >>> state = init_dictionary(jax.random.key(0), 4, 8)
    >>> coder = lambda x, d: ista(x, d, lam=0.1, num_steps=10)
    >>> state, codes = learn_batch(state, jnp.ones((3, 4)), coder=coder, learning_rate=1.0)
    >>> codes.shape, int(state.step)
    ((3, 8), 1)
    """
    if patience is not None and patience < 1:
        raise ValueError(f"patience is {patience}; it must be at least 1, or None")
    codes = coder(x, state.dictionary)
    after = dictionary_step(state.dictionary, x, codes, learning_rate=learning_rate)
    unused = jnp.where(jnp.any(codes != 0, axis=0), 0, state.unused + 1)
    if patience is not None:
        dead = unused >= patience
        after, unused = _resampled(after, dead, x, codes), jnp.where(dead, 0, unused)
    return DictionaryState(after, unused, state.step + 1), codes


def _resampled(dictionary: Array, dead: Array, x: Array, codes: Array) -> Array:
    errors = jnp.sum(jnp.square(x - codes @ dictionary.T), axis=1)
    worst = jnp.argsort(-errors)
    # the i-th dead atom takes the i-th worst row, and begins anew where rows run out
    place = (jnp.cumsum(dead) - 1) % len(x)
    rows = x[worst[place]]
    usable = dead & jnp.any(rows != 0, axis=1)
    return jnp.where(usable, normalise(rows.astype(dictionary.dtype)).T, dictionary)
