"""Thresholding functions: the proximal maps of sparsity penalties, in closed form.

Each solves `min_y (y - z)^2 / 2 + t * penalty(y)` for every entry, with t = step * lambda. At or
below its threshold an entry is 0; t = 0 is the identity. Gradients are those of the formulas, with
no NaN below the thresholds.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.core.selection import is_concrete

Weight = int | float | Float[Array, "..."]


def soft_threshold(z: Float[Array, "*s"], t: Weight) -> Float[Array, "*s"]:
    """`sign(z) * max(|z| - t, 0)`, for the penalty `|y|`.

    Args:
      z: entries. t: at least 0, broadcast against z.

    Raises:
      ValueError: a negative concrete t.

    >>> soft_threshold(jnp.asarray([-3.0, 0.5, 2.0]), 1.0)
    Array([-2.,  0.,  1.], dtype=float32)
    """
    t = _weight(t, z)
    return jnp.sign(z) * jnp.maximum(jnp.abs(z) - t, 0)


def nonnegative_soft_threshold(z: Float[Array, "*s"], t: Weight) -> Float[Array, "*s"]:
    """`max(z - t, 0)`, for the penalty `y` on `y >= 0`; arguments as `soft_threshold`."""
    return jnp.maximum(z - _weight(t, z), 0)


def hard_threshold(z: Float[Array, "*s"], t: Weight) -> Float[Array, "*s"]:
    """`z` where `|z| > sqrt(2 t)`, for the penalty `[y != 0]`; arguments as `soft_threshold`."""
    return jnp.where(jnp.abs(z) > jnp.sqrt(2 * _weight(t, z)), z, 0)


def half_threshold(z: Float[Array, "*s"], t: Weight) -> Float[Array, "*s"]:
    """For the penalty `|y|^(1/2)`; arguments as `soft_threshold`.

    Source: Xu et al., L1/2 regularization (2012), with s = 2 t in its convention.
    """
    t = _weight(t, z)
    s = 2 * t
    threshold = (54.0 ** (1 / 3) / 4) * s ** (2 / 3)
    above = jnp.abs(z) > threshold
    size = jnp.where(above, jnp.abs(z), 1)
    argument = jnp.clip((s / 8) * (size / 3) ** -1.5, -1, 1)
    # where z is not above the threshold the formula is not used, and its gradient must be finite
    angle = jnp.arccos(jnp.where(above, argument, 0))
    shrunk = (2 / 3) * size * (1 + jnp.cos(2 * math.pi / 3 - 2 * angle / 3))
    return jnp.where(above, jnp.sign(z) * shrunk, 0)


def two_thirds_threshold(z: Float[Array, "*s"], t: Weight) -> Float[Array, "*s"]:
    """For the penalty `|y|^(2/3)`; arguments as `soft_threshold`.

    Source: Cao et al., Fast image deconvolution using closed-form thresholding formulas of Lq
    (2013), with s = 2 t in its convention.
    """
    t = _weight(t, z)
    s = 2 * t
    threshold = (2 / 3) * (3 * s**3) ** 0.25
    above = jnp.abs(z) > threshold
    safe_s = jnp.where(s > 0, s, 1)
    size = jnp.where(above, jnp.abs(z), 1)
    argument = jnp.where(above & (s > 0), (27 / 16) * size**2 * safe_s**-1.5, 2)
    phi = jnp.arccosh(jnp.maximum(argument, 1 + 1e-7))
    a = (2 / math.sqrt(3)) * safe_s**0.25 * jnp.sqrt(jnp.cosh(phi / 3))
    inner = jnp.where(above & (s > 0), 2 * size / a - a * a, 1)
    root = ((a + jnp.sqrt(jnp.maximum(inner, 0))) / 2) ** 3
    return jnp.where(above, jnp.sign(z) * jnp.where(s > 0, root, size), 0)


def cel0_threshold(
    z: Float[Array, "*s k"],
    *,
    lam: Weight,
    step: Weight,
    norms: Float[Array, "k"],
) -> Float[Array, "*s k"]:
    """For the continuous exact relaxation of `lam * [y != 0]`.

    With c the norm of a column and `c^2 * step < 1` it is `sign(z) * min(|z|, max(|z| - sqrt(2 lam)
    * step * c, 0) / (1 - c^2 * step))`; otherwise the hard threshold at `sqrt(2 * step * lam)`.

    Args:
      z: entries, one column an entry of the last axis.
      lam, step: at least 0. norms: of the columns.

    Raises:
      ValueError: a negative concrete lam or step.

    Source: Soubies et al., A continuous exact l0 penalty (2015).
    """
    lam, step = _weight(lam, z), _weight(step, z)
    norms = norms.astype(z.dtype)
    size = jnp.abs(z)
    curvature = norms**2 * step
    relaxed = curvature < 1
    shrunk = jnp.maximum(size - jnp.sqrt(2 * lam) * step * norms, 0)
    continuous = jnp.minimum(size, shrunk / jnp.where(relaxed, 1 - curvature, 1))
    hard = jnp.where(size > jnp.sqrt(2 * step * lam), size, 0)
    return jnp.sign(z) * jnp.where(relaxed, continuous, hard)


def group_soft_threshold(
    z: Float[Array, "*s"], t: Weight, *, axis: int | tuple[int, ...] = -1
) -> Float[Array, "*s"]:
    """Shrinks the L2 norm of every group by t: `z * max(1 - t / ||z||, 0)`.

    Args:
      z: entries. t: at least 0, broadcast against the norms (kept axes of length 1).
      axis: the axes that make up a group.

    Raises:
      ValueError: a negative concrete t.

    Source: Yuan & Lin, Model selection and estimation in regression with grouped variables (2006).

    >>> [round(float(x), 2) for x in group_soft_threshold(jnp.asarray([3.0, 4.0]), 1.0)]
    [2.4, 3.2]
    """
    t = _weight(t, z)
    square = jnp.sum(z * z, axis=axis, keepdims=True)
    norm = jnp.sqrt(jnp.where(square > 0, square, 1))
    return z * jnp.where(square > 0, jnp.maximum(1 - t / norm, 0), 0)


def _weight(t: Weight, z: Array) -> Array:
    if is_concrete(t) and not bool(jnp.all(jnp.asarray(t) >= 0)):
        raise ValueError(f"the threshold's weight is {t}; it must not be negative")
    return jnp.asarray(t).astype(z.dtype)


@dataclasses.dataclass(frozen=True)
class Penalty:
    """A sparsity penalty in one call form for all.

    Attributes:
      name: as in `PENALTIES`. convex: whether momentum is safe.
      prox: `(z, *, lam, step, norms) -> y`; norms `[k]` are those of the columns, which CEL0 alone
        looks at.
      value: `(y, *, lam, norms) -> lam * penalty(y)` for every entry.
    """

    name: str
    convex: bool
    prox: Callable[..., Array]
    value: Callable[..., Array]


def _power(y: Array, exponent: float) -> Array:
    # the slope at 0 is infinite, and what multiplies it is 0
    size = jnp.where(y != 0, jnp.abs(y), 1)
    return jnp.where(y != 0, size**exponent, 0)


def _cel0_value(y: Array, *, lam: Weight, norms: Array) -> Array:
    lam, c = jnp.asarray(lam).astype(y.dtype), norms.astype(y.dtype)
    size, edge = jnp.abs(y), jnp.sqrt(2 * lam) / c
    return jnp.where(size <= edge, lam - (c**2 / 2) * (size - edge) ** 2, lam)


def _simple(
    name: str, rule: Callable[..., Array], value: Callable[[Array], Array], *, convex: bool = False
) -> Penalty:
    def prox(z: Array, *, lam: Weight, step: Weight, norms: Array | None = None) -> Array:
        del norms
        return rule(z, jnp.asarray(lam).astype(z.dtype) * jnp.asarray(step).astype(z.dtype))

    def weighed(y: Array, *, lam: Weight, norms: Array | None = None) -> Array:
        del norms
        return jnp.asarray(lam).astype(y.dtype) * value(y)

    return Penalty(name, convex, prox, weighed)


PENALTIES: Mapping[str, Penalty] = MappingProxyType(
    {
        penalty.name: penalty
        for penalty in (
            _simple("l1", soft_threshold, jnp.abs, convex=True),
            _simple("l0", hard_threshold, lambda y: (y != 0).astype(y.dtype)),
            _simple("l1/2", half_threshold, lambda y: _power(y, 0.5)),
            _simple("l2/3", two_thirds_threshold, lambda y: _power(y, 2 / 3)),
            Penalty("cel0", False, cel0_threshold, _cel0_value),
            _simple(
                "nonnegative_l1",
                nonnegative_soft_threshold,
                lambda y: jnp.where(y >= 0, y, jnp.inf),
                convex=True,
            ),
        )
    }
)
"""The penalties by name."""


def penalty(name: str) -> Penalty:
    """The penalty called `name`.

    Raises:
      ValueError: an unknown name.

    >>> penalty("l1").prox(jnp.asarray([3.0]), lam=1.0, step=0.5)
    Array([2.5], dtype=float32)
    """
    if name not in PENALTIES:
        raise ValueError(f"penalty is {name!r}; allowed are {', '.join(PENALTIES)}")
    return PENALTIES[name]
