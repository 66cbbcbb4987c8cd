"""Sparse codes by proximal gradient: ISTA and FISTA, for matrices and for operators.

Codes `a` of data `x` minimise `||x - D a||^2 / 2 + lam * sum penalty(a_i)`. Data are rows: `x` is
`[b, n]`, a dictionary `[n, k]`, codes are `[b, k]`.

Sources: Daubechies, Defrise and De Mol (2004); Beck and Teboulle (2009); Beyond l1 sparse coding in
V1 (2023, arXiv 2301.10002); the ISTA layer of CRATE (2023, arXiv 2306.01129).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sparsejax.coding.checks import Prox, Scalar, check_dictionary, check_settings
from sparsejax.core import proximal
from sparsejax.core.dtypes import widen
from sparsejax.core.selection import is_concrete


class Operators(NamedTuple):
    """A linear map in place of a matrix.

    Attributes:
      apply: codes to data. adjoint: its transpose, data to codes.
    """

    apply: Callable[[Array], Array]
    adjoint: Callable[[Array], Array]


class Trace(NamedTuple):
    """Codes, and the objective of every row before each step and at the end, `[steps + 1, b]`."""

    codes: Array
    objective: Array


def ista(
    x: Float[Array, "b *n"],
    dictionary: Float[Array, "n k"] | Operators,
    *,
    prox: str | Prox = "l1",
    lam: Scalar,
    num_steps: int,
    step: Scalar | None = None,
    init: Float[Array, "b *k"] | None = None,
    tol: float = 0.0,
) -> Float[Array, "b *k"]:
    """Iterative shrinkage: `a <- prox(a + step * (x - D a) D)`, from zero codes unless told.

    With the default step it converges to a stationary point for every penalty; which one depends on
    the start where the penalty is not convex. Differentiated through its steps (reverse mode needs
    tol 0; see `implicit_codes` for a gradient at the fixed point).

    Args:
      x: data. dictionary: `[n, k]`, or `Operators`.
      prox: name of a penalty (`sparsejax.core.PENALTIES`), or `(z, *, lam, step, norms) -> y`.
      lam: at least 0. num_steps: at most so many.
      step: None: `1 / spectral_norm_sq(dictionary)`; operators need one.
      init: codes to start from.
      tol: a row stops once a step changes its codes by no more than this share of their norm; 0
        takes all the steps. Rows do not influence each other.

    Raises:
      ValueError: shapes that do not match, lam negative, step or num_steps not positive, an unknown
        penalty, a column of zeros in a known dictionary, or operators without a step.

    >>> ista(jnp.asarray([[2.0, 0.5]]), jnp.eye(2), lam=1.0, num_steps=5)
    Array([[1., 0.]], dtype=float32)
    """
    return _solve(x, dictionary, prox, lam, num_steps, step, init, tol, momentum=False)


def fista(
    x: Float[Array, "b *n"],
    dictionary: Float[Array, "n k"] | Operators,
    *,
    prox: str | Prox = "l1",
    lam: Scalar,
    num_steps: int,
    step: Scalar | None = None,
    init: Float[Array, "b *k"] | None = None,
    tol: float = 0.0,
) -> Float[Array, "b *k"]:
    """ISTA with Nesterov's momentum, for convex penalties; arguments and errors as `ista`.

    Raises:
      ValueError: as `ista`, or the name of a penalty that is not convex.

    Source: Beck and Teboulle, A fast iterative shrinkage-thresholding algorithm (2009).

    >>> fista(jnp.asarray([[2.0, 0.5]]), jnp.eye(2), lam=1.0, num_steps=5)
    Array([[1., 0.]], dtype=float32)
    """
    _check_convex(prox)
    return _solve(x, dictionary, prox, lam, num_steps, step, init, tol, momentum=True)


def ista_trace(
    x: Float[Array, "b n"],
    dictionary: Float[Array, "n k"],
    *,
    prox: str = "l1",
    lam: Scalar,
    num_steps: int,
    step: Scalar | None = None,
    init: Float[Array, "b k"] | None = None,
    momentum: bool = False,
) -> Trace:
    """`ista`, or `fista` with momentum, and the objective on the way.

    Raises:
      ValueError: as `ista`, or momentum with a penalty that is not convex.

    >>> ista_trace(jnp.asarray([[2.0, 0.5]]), jnp.eye(2), lam=1.0, num_steps=1).objective.tolist()
    [[2.125], [1.625]]
    """
    of = proximal.penalty(prox)
    if momentum:
        _check_convex(prox)
    advance, codes = _steps(x, dictionary, prox, lam, num_steps, step, init, 0.0, momentum=momentum)
    wide = widen(x)

    def record(state: Any, _: None) -> tuple[Any, Array]:
        return advance(*state), _objective(wide, dictionary, state[0], of, lam)

    start = (codes, codes, jnp.ones((), wide.dtype))
    (codes, _, _), seen = lax.scan(record, start, length=num_steps)
    last = _objective(wide, dictionary, codes, of, lam)
    return Trace(codes.astype(x.dtype), jnp.concatenate([seen, last[None]]))


def ista_step(
    codes: Float[Array, "*b k"],
    target: Float[Array, "*b n"],
    dictionary: Float[Array, "n k"],
    *,
    step_size: Scalar,
    lam: Scalar,
) -> Float[Array, "*b k"]:
    """`relu(codes - step_size * (codes D^T - target) D - step_size * lam)`.

    One step of ISTA for codes that are not negative; CRATE's layer passes its token as codes and
    target. Sums are float32 at least. Differentiated in all arrays.

    Raises:
      ValueError: shapes that do not match.

    Source: CRATE, section on the ISTA block.

    >>> ista_step(jnp.zeros(2), jnp.ones(2), jnp.eye(2), step_size=0.5, lam=0.5)
    Array([0.25, 0.25], dtype=float32)
    """
    n, k = dictionary.shape
    if codes.shape[-1] != k or target.shape[-1] != n:
        raise ValueError(
            f"codes, target and dictionary have shapes {codes.shape}, {target.shape} and "
            f"{dictionary.shape}; they must be [*b, k], [*b, n] and [n, k]"
        )
    wide = widen(codes)
    step, lam = jnp.asarray(step_size, wide.dtype), jnp.asarray(lam, wide.dtype)
    # small steps vanish in the sums of narrow dtypes; the products stand them
    residual = widen(codes @ dictionary.T) - widen(target)
    gradient = widen(residual.astype(codes.dtype) @ dictionary)
    return jax.nn.relu(wide - step * gradient - step * lam).astype(codes.dtype)


def odl_block(
    x: Float[Array, "*b d"],
    dictionary: Float[Array, "d s"],
    *,
    step_size: Scalar,
    lam: Scalar,
    num_steps: int,
) -> tuple[Float[Array, "*b s"], Float[Array, "*b d"]]:
    """Codes after `num_steps` of `ista_step` from zero, and what the dictionary makes of them.

    Differentiated through the steps.

    Raises:
      ValueError: num_steps below 1, or shapes that do not match.

    Source: CRATE-alpha, the overcomplete dictionary block.

    >>> codes, y = odl_block(jnp.ones(2), jnp.eye(2), step_size=0.5, lam=0.5, num_steps=2)
    >>> codes
    Array([0.375, 0.375], dtype=float32)
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1")

    def body(codes: Array, _: None) -> tuple[Array, None]:
        return ista_step(codes, x, dictionary, step_size=step_size, lam=lam), None

    zeros = jnp.zeros((*x.shape[:-1], dictionary.shape[1]), x.dtype)
    codes, _ = lax.scan(body, zeros, length=num_steps)
    return codes, codes @ dictionary.T


def objective(
    x: Float[Array, "b n"],
    dictionary: Float[Array, "n k"],
    codes: Float[Array, "b k"],
    *,
    lam: Scalar,
    penalty: str = "l1",
) -> Float[Array, "b"]:
    """`||x - D a||^2 / 2 + lam * sum penalty(a_i)` of every row.

    Raises:
      ValueError: an unknown penalty.

    >>> objective(jnp.ones((1, 2)), jnp.eye(2), jnp.asarray([[1.0, 0.0]]), lam=1.0)
    Array([1.5], dtype=float32)
    """
    return _objective(x, dictionary, codes, proximal.penalty(penalty), lam)


def spectral_norm_sq(dictionary: Float[Array, "n k"]) -> Float[Array, ""]:
    """The largest squared singular value, by the eigenvalues of the smaller Gram matrix.

    It is never underestimated, so that a step of one over it is never too long.

    >>> round(float(spectral_norm_sq(jnp.asarray([[2.0, 0.0], [0.0, 1.0]]))), 3)
    4.0
    """
    wide = widen(dictionary)
    n, k = wide.shape
    gram = wide @ wide.T if n <= k else wide.T @ wide
    return jnp.linalg.eigvalsh(gram)[-1]


def _solve(
    x: Array,
    dictionary: Array | Operators,
    prox: str | Prox,
    lam: Scalar,
    num_steps: int,
    step: Scalar | None,
    init: Array | None,
    tol: float,
    *,
    momentum: bool,
) -> Array:
    advance, codes = _steps(x, dictionary, prox, lam, num_steps, step, init, tol, momentum=momentum)
    one = jnp.ones((), codes.dtype)
    if tol:
        codes = _until_still(advance, codes, one, num_steps, tol)
    else:
        body = lambda state, _: (advance(*state), None)  # noqa: E731
        (codes, _, _), _ = lax.scan(body, (codes, codes, one), length=num_steps)
    return codes.astype(x.dtype)


def _steps(
    x: Array,
    dictionary: Array | Operators,
    prox: str | Prox,
    lam: Scalar,
    num_steps: int,
    step: Scalar | None,
    init: Array | None,
    tol: float,
    *,
    momentum: bool,
) -> tuple[Callable[..., tuple[Array, Array, Array]], Array]:
    """One step, of codes, the point ahead of them and the momentum's number; and the start."""
    rule, maps = _checked(x, dictionary, prox, lam, num_steps, step, tol)
    norms = None
    if not isinstance(dictionary, Operators):
        norms = jnp.linalg.norm(widen(dictionary), axis=0)
        step = 1 / spectral_norm_sq(dictionary) if step is None else step
    wide = widen(x)
    mu = jnp.asarray(step, wide.dtype)
    shape = jax.eval_shape(maps.adjoint, wide).shape
    codes = jnp.zeros(shape, wide.dtype) if init is None else init.astype(wide.dtype)
    if codes.shape != shape:
        raise ValueError(f"init has shape {codes.shape}; it must be {shape}")

    def advance(codes: Array, ahead: Array, q: Array) -> tuple[Array, Array, Array]:
        gradient = maps.adjoint(wide - maps.apply(ahead))
        after = rule(ahead + mu * gradient, lam=lam, step=mu, norms=norms)
        if not momentum:
            return after, after, q
        larger = (1 + jnp.sqrt(1 + 4 * q * q)) / 2
        return after, after + ((q - 1) / larger) * (after - codes), larger

    return advance, codes


def _until_still(advance: Any, codes: Array, one: Array, num_steps: int, tol: float) -> Array:
    """Advances each row until it stands still."""
    axes = tuple(range(1, codes.ndim))

    def going(state: Any) -> Array:
        return (state[0] < num_steps) & ~jnp.all(state[-1])

    def body(state: Any) -> Any:
        i, codes, ahead, q, still = state
        after, further, q = advance(codes, ahead, q)
        change = jnp.sum(jnp.square(after - codes), axis=axes)
        still_now = change <= tol**2 * jnp.sum(jnp.square(after), axis=axes)
        kept = still.reshape(-1, *(1 for _ in axes))
        after, further = jnp.where(kept, codes, after), jnp.where(kept, ahead, further)
        return i + 1, after, further, q, still | still_now

    still = jnp.zeros(codes.shape[0], bool)
    return lax.while_loop(going, body, (jnp.int32(0), codes, codes, one, still))[1]


def _objective(
    x: Array, dictionary: Array, codes: Array, of: proximal.Penalty, lam: Scalar
) -> Array:
    norms = jnp.linalg.norm(widen(dictionary), axis=0)
    error = jnp.sum(jnp.square(x - codes @ dictionary.T), axis=1) / 2
    return error + jnp.sum(of.value(codes, lam=lam, norms=norms), axis=1)


def _check_convex(prox: str | Prox) -> None:
    if isinstance(prox, str) and not proximal.penalty(prox).convex:
        raise ValueError(f"prox is {prox!r}, which is not convex; ista takes it")


def _checked(
    x: Array,
    dictionary: Array | Operators,
    prox: str | Prox,
    lam: Scalar,
    num_steps: int,
    step: Scalar | None,
    tol: float,
) -> tuple[Prox, Operators]:
    """The rule and the maps, after checks of what is known while tracing."""
    rule = check_settings(prox, lam, num_steps, tol)
    if step is not None and is_concrete(step) and not float(step) > 0:
        raise ValueError(f"step is {step}; it must be positive")
    if isinstance(dictionary, Operators):
        if step is None:
            raise ValueError("step is None; operators need one, at most 1 / their squared norm")
        if prox == "cel0":
            raise ValueError("prox is 'cel0', which needs the columns of a matrix")
        return rule, dictionary
    check_dictionary(dictionary, x)
    matrix = widen(dictionary)
    return rule, Operators(lambda a: a @ matrix.T, lambda r: r @ matrix)
