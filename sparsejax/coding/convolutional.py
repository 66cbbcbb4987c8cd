"""Convolutional sparse coding: an image as a sum of kernels at sparse places, circularly.

    min_x ||sum_m d_m * x_m - S||^2 / 2 + lam * sum_m penalty(x_m)

Images are `[h, w]`, kernels `[kh, kw, m]` (placed in the top left corner of the frame), maps of
coefficients `[h, w, m]`. Everything is dense: the maps of 144 kernels on 256 x 256 pixels take 38
MB in float32, and some ten such arrays live at once.

Sources: Wohlberg, Efficient algorithms for convolutional sparse representations (2016), and its
library SPORCO; Kernel Heterogeneity Improves Sparseness of Natural Images Representations (2023).
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from sparsejax.coding.checks import Scalar, check_finite
from sparsejax.coding.constraints import normalise
from sparsejax.coding.solvers import Operators, fista
from sparsejax.core.dtypes import widen
from sparsejax.core.proximal import soft_threshold
from sparsejax.core.selection import is_concrete

AdaptRho = Literal["relative", "decreasing"]
Prox = Callable[[Array, Array], Array]
_AXES = (-2, -1)


class CscState(NamedTuple):
    """Where ADMM has come to.

    Attributes:
      x: the dense maps of the quadratic part. y: the sparse ones, with exact zeros: the result.
      u: scaled dual. rho: the penalty at the end. num_iters_used: iterations until it stopped.
    """

    x: Float[Array, "*b h w m"]
    y: Float[Array, "*b h w m"]
    u: Float[Array, "*b h w m"]
    rho: Float[Array, "*b"]
    num_iters_used: Int[Array, "*b"]


class _Rule(NamedTuple):
    """How rho follows the residuals."""

    mu: float
    cap: float
    relative: bool
    rises: bool
    first: int


_RULES = {
    "relative": _Rule(1.2, 1000.0, relative=True, rises=True, first=1),
    "decreasing": _Rule(1.05, 100.0, relative=False, rises=False, first=0),
}


def csc_admm(
    image: Float[Array, "*b h w"],
    filters: Float[Array, "kh kw m"],
    lam: Scalar,
    *,
    rho: Scalar | None = None,
    relax: Scalar = 1.8,
    num_iters: int,
    tol: Scalar = 0.0,
    adapt_rho: AdaptRho | None = None,
    prox: Prox = soft_threshold,
) -> CscState:
    """Codes by the alternating direction method, the quadratic part solved in the Fourier domain.

    Images of a batch never influence each other. Differentiated through all iterations.

    Args:
      lam: at least 0, the same for every kernel whatever its norm.
      rho: None: `50 lam + 1`. relax: in (0, 2).
      tol: an image stops once both residuals are below this share of their scales; a known 0 never
        stops.
      adapt_rho: "relative" balances the relative residuals, as SPORCO does; without a tolerance it
        may cycle and stay above the minimum. "decreasing" only ever lowers rho.
      prox: `(z, t)`, a rule of `sparsejax.core.proximal`.

    Raises:
      ValueError: a kernel larger than the image, lam negative, rho not positive, relax outside
        (0, 2), num_iters below 1, an unknown rule, or a kernel of zeros that is known.

    >>> image, filters = jnp.ones((4, 4)), jnp.ones((1, 1, 1))
    >>> csc_admm(image, filters, 0.5, rho=1.0, num_iters=50).y[0, 0].round(2)
    Array([0.5], dtype=float32)
    """
    _check(image, filters, lam, num_iters)
    if rho is not None and is_concrete(rho) and not float(rho) > 0:
        raise ValueError(f"rho is {rho}; it must be positive")
    if is_concrete(relax) and not 0 < float(relax) < 2:
        raise ValueError(f"relax is {relax}; it must be in (0, 2)")
    if adapt_rho is not None and adapt_rho not in _RULES:
        raise ValueError(f"adapt_rho is {adapt_rho!r}; allowed are None, {', '.join(_RULES)}")
    frame = image.shape[-2:]
    batch = widen(image).reshape(-1, *frame)
    kernels = _spectrum(filters, frame)  # [m, h, w / 2 + 1]
    lam = jnp.asarray(lam, batch.dtype)
    start = jnp.asarray(50 * lam + 1 if rho is None else rho, batch.dtype)
    stops = not is_concrete(tol) or float(tol) > 0
    settings = {
        "lam": lam,
        "relax": jnp.asarray(relax, batch.dtype),
        "tol": jnp.asarray(tol, batch.dtype) if stops else None,
        "rule": None if adapt_rho is None else _RULES[adapt_rho],
        "prox": prox,
    }

    def one(image: Array) -> CscState:
        return _admm(image, kernels, start, num_iters, **settings)

    found = jax.vmap(one)(batch)
    leading = image.shape[:-2]
    maps = [jnp.moveaxis(a, 1, -1).reshape(*leading, *frame, -1) for a in found[:3]]
    maps = [a.astype(image.dtype) for a in maps]
    return CscState(*maps, found.rho.reshape(leading), found.num_iters_used.reshape(leading))


def csc_fista(
    image: Float[Array, "*b h w"],
    filters: Float[Array, "kh kw m"],
    lam: Scalar,
    *,
    num_iters: int,
) -> Float[Array, "*b h w m"]:
    """Codes of the l1 problem by FISTA, with the longest safe step.

    Raises:
      ValueError: as `csc_admm`.

    >>> csc_fista(jnp.ones((4, 4)), jnp.ones((1, 1, 1)), 0.5, num_iters=5)[0, 0].round(2)
    Array([0.5], dtype=float32)
    """
    _check(image, filters, lam, num_iters)
    frame = image.shape[-2:]
    kernels = _spectrum(filters, frame)
    longest = jnp.max(jnp.sum(jnp.square(jnp.abs(kernels)), axis=0))

    def apply(codes: Array) -> Array:
        return _back(jnp.sum(kernels * _forth(codes), axis=1), frame)

    def adjoint(residual: Array) -> Array:
        return _back(jnp.conj(kernels) * _forth(residual)[:, None], frame)

    batch = widen(image).reshape(-1, *frame)
    maps = Operators(apply, adjoint)
    codes = fista(batch, maps, lam=lam, num_steps=num_iters, step=1 / longest)
    shape = (*image.shape, filters.shape[-1])
    return jnp.moveaxis(codes, 1, -1).reshape(shape).astype(image.dtype)


def csc_reconstruct(
    codes: Float[Array, "*b h w m"], filters: Float[Array, "kh kw m"]
) -> Float[Array, "*b h w"]:
    """The image that codes stand for. Differentiated.

    Raises:
      ValueError: another number of kernels than of maps, or a kernel larger than the frame.

    >>> csc_reconstruct(jnp.ones((4, 4, 1)), jnp.ones((2, 2, 1)))[0, 0]
    Array(4., dtype=float32)
    """
    frame = codes.shape[-3:-1]
    if codes.shape[-1] != filters.shape[-1]:
        raise ValueError(
            f"codes have {codes.shape[-1]} maps for filters of shape {filters.shape}; there must "
            "be one a kernel"
        )
    _check_size(frame, filters)
    spectrum = _forth(jnp.moveaxis(widen(codes), -1, -3))
    return _back(jnp.sum(_spectrum(filters, frame) * spectrum, axis=-3), frame).astype(codes.dtype)


def csc_objective(
    image: Float[Array, "*b h w"],
    codes: Float[Array, "*b h w m"],
    filters: Float[Array, "kh kw m"],
    lam: Scalar,
) -> tuple[Float[Array, "*b"], Float[Array, "*b"], Float[Array, "*b"]]:
    """The data term, the l1 norm of the codes, and the objective.

    >>> terms = csc_objective(jnp.ones((2, 2)), jnp.zeros((2, 2, 1)), jnp.ones((1, 1, 1)), 0.1)
    >>> [float(term) for term in terms]
    [2.0, 0.0, 2.0]
    """
    error = widen(csc_reconstruct(codes, filters) - image)
    data = jnp.sum(jnp.square(error), axis=(-2, -1)) / 2
    l1 = jnp.sum(jnp.abs(widen(codes)), axis=(-3, -2, -1))
    return data, l1, data + jnp.asarray(lam, l1.dtype) * l1


def sparseness(codes: Float[Array, "*b h w m"]) -> Float[Array, "*b"]:
    """The share of coefficients that are 0.

    >>> sparseness(jnp.asarray([[[0.0, 1.0]]]))
    Array(0.5, dtype=float32)
    """
    return jnp.mean((codes == 0).astype(widen(codes).dtype), axis=(-3, -2, -1))


def psnr(reference: Float[Array, "*b h w"], estimate: Float[Array, "*b h w"]) -> Float[Array, "*b"]:
    """`10 log10((max S - min S)^2 / mean squared error)` in decibels, with the range of reference.

    >>> psnr(jnp.asarray([[0.0, 1.0]]), jnp.asarray([[0.1, 1.1]])).round(2)
    Array(20., dtype=float32)
    """
    reference = widen(reference)
    extent = jnp.max(reference, axis=_AXES) - jnp.min(reference, axis=_AXES)
    error = jnp.mean(jnp.square(reference - estimate), axis=_AXES)
    return 10 * jnp.log10(jnp.square(extent) / error)


def online_dictionary_step(
    filters: Float[Array, "kh kw m"],
    image: Float[Array, "h w"],
    step: Scalar | Int[Array, ""],
    *,
    lam: Scalar,
    rho: Scalar = 10.0,
    relax: Scalar = 1.8,
    num_iters: int = 300,
    tol: Scalar = 0.0,
) -> Float[Array, "kh kw m"]:
    """Kernels after one image: codes with fixed rho, a gradient step, and kernels of unit norm.

    The step is `100 / (step + 1000)` times the gradient of the data term; kernels keep their
    support. Project the first kernels too: `normalise(filters, axis=(0, 1))`.

    Args:
      step: number of the image, from 0.

    Raises:
      ValueError: as `csc_admm`.

    Source: SPORCO's online learner, as the study of kernel heterogeneity uses it.

    >>> filters = jnp.ones((2, 2, 1)) / 2
    >>> online_dictionary_step(filters, jnp.ones((4, 4)), 0, lam=0.1, num_iters=5).shape
    (2, 2, 1)
    """
    state = csc_admm(image, filters, lam, rho=rho, relax=relax, num_iters=num_iters, tol=tol)
    frame = image.shape
    codes = lax.stop_gradient(_forth(jnp.moveaxis(widen(state.y), -1, 0)))
    kernels = _spectrum(filters, frame)
    error = jnp.sum(codes * kernels, axis=0) - _forth(widen(image))
    eta = 100 / (jnp.asarray(step, jnp.finfo(image.dtype).dtype) + 1000)
    moved = _back(kernels, frame) - eta * _back(jnp.conj(codes) * error, frame)
    height, width, _ = filters.shape
    cropped = jnp.moveaxis(moved[:, :height, :width], 0, -1).astype(filters.dtype)
    return normalise(cropped, axis=(0, 1))


def _admm(
    image: Array,
    kernels: Array,
    rho: Array,
    num_iters: int,
    *,
    lam: Array,
    relax: Array,
    tol: Array | None,
    rule: _Rule | None,
    prox: Prox,
) -> Any:
    frame = image.shape
    projected = jnp.conj(kernels) * _forth(image)
    power = jnp.sum(jnp.square(jnp.abs(kernels)), axis=0)
    xi = 1 + 18.3 ** (jnp.log10(lam) + 1)

    def iterate(state: CscState, i: Array) -> CscState:
        _, y, u, rho, used = state
        b = projected + _forth(rho * (y - u))
        # Sherman-Morrison, frequency by frequency
        share = jnp.sum(kernels * b, axis=0) / (rho + power).astype(b.dtype)
        x = _back(b - jnp.conj(kernels) * share, frame) / rho
        relaxed = relax * x + (1 - relax) * y
        after = prox(relaxed + u, lam / rho)
        dual = u + relaxed - after
        moved = CscState(x, after, dual, rho, used + 1)
        return moved if rule is None else _adapted(moved, y, i, rule, xi)

    def body(carry: Any, i: Array) -> tuple[Any, None]:
        state, done = carry
        after = iterate(state, i)
        if tol is None:
            return (after, done), None
        # what has stopped stays as it was when it did
        kept = jax.tree.map(lambda old, new: jnp.where(done, old, new), state, after)
        return (kept, done | _converged(after, state.y, tol)), None

    zeros = jnp.zeros((kernels.shape[0], *frame), image.dtype)
    start = CscState(zeros, zeros, zeros, rho, jnp.int32(0))
    (found, _), _ = lax.scan(body, (start, jnp.asarray(False)), jnp.arange(num_iters))
    return found


def _adapted(state: CscState, before: Array, i: Array, rule: _Rule, xi: Array) -> CscState:
    """The state with rho moved towards balanced residuals, and the scaled dual with it."""
    x, y, u, rho, _ = state
    r, s = _norm(x - y), _norm(before - y)
    if rule.relative:
        scales = jnp.maximum(_norm(x), _norm(y)), _norm(u)
        r, s = (a / jnp.where(scale > 0, scale, 1) for a, scale in zip((r, s), scales))
    else:
        s = rho * s
    usable = (r > 0) & (s > 0)
    ratio = jnp.where(usable, r, 1) / (jnp.where(usable, s, 1) * xi)
    f = jnp.where(usable, jnp.minimum(rule.cap, jnp.sqrt(jnp.maximum(ratio, 1 / ratio))), rule.cap)
    up = (r > xi * rule.mu * s) & rule.rises & (i >= rule.first)
    down = (s > rule.mu / xi * r) & ~(r > xi * rule.mu * s) & (i >= rule.first)
    factor = jnp.where(up, f, jnp.where(down, 1 / f, 1)).astype(rho.dtype)
    return state._replace(rho=rho * factor, u=u / factor)


def _converged(state: CscState, before: Array, tol: Array) -> Array:
    x, y, u, rho, _ = state
    primal = _norm(x - y) < tol * jnp.maximum(_norm(x), _norm(y))
    return primal & (_norm(rho * (before - y)) < tol * rho * _norm(u))


def _norm(a: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(a)))


def _forth(a: Array) -> Array:
    return jnp.fft.rfft2(a, axes=_AXES)


def _back(a: Array, frame: tuple[int, ...]) -> Array:
    return jnp.fft.irfft2(a, s=frame, axes=_AXES)


def _spectrum(filters: Array, frame: tuple[int, ...]) -> Array:
    """Transforms of the kernels, zero-padded to the frame, `[m, h, w / 2 + 1]`."""
    kernels = jnp.moveaxis(widen(filters), -1, 0)
    pads = [(0, 0), *((0, big - small) for big, small in zip(frame, kernels.shape[1:]))]
    return _forth(jnp.pad(kernels, pads))


def _check(image: Array, filters: Array, lam: Scalar, num_iters: int) -> None:
    _check_size(image.shape[-2:], filters)
    if is_concrete(lam) and not float(lam) >= 0:
        raise ValueError(f"lam is {lam}; it must not be negative")
    if num_iters < 1:
        raise ValueError(f"num_iters is {num_iters}; it must be at least 1")
    check_finite(image=image, filters=filters)
    if is_concrete(filters):
        empty = ~(np.asarray(filters) != 0).any(axis=(0, 1))
        if empty.any():
            raise ValueError(f"filters has a kernel of zeros, number {int(empty.argmax())}")


def _check_size(frame: tuple[int, ...], filters: Array) -> None:
    if filters.shape[0] > frame[0] or filters.shape[1] > frame[1]:
        raise ValueError(
            f"filters has shape {filters.shape} for images of {frame[0]} x {frame[1]}; a kernel "
            "must not be larger"
        )
