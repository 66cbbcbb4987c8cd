"""What pruned entries feel: straight-through, SR-STE and decaying masks, as views; SR-STE in optax.

A view maps parameters to the parameters that the forward pass uses. The straight-through ones are
one projection, `project`, whose backward pass hands the gradient of the projected weight to the
dense one.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from sparsejax.core.masks import check_masks, leaf_mask
from sparsejax.core.patterns import NM, Density, Pattern, Ties
from sparsejax.core.selection import Where, is_array, is_concrete, is_dense, map_selected

Decay = int | float | Float[Array, ""]
MaskGradient = Literal["masked", "straight_through"]


@jax.custom_vjp
def project(w: Float[Array, "*s"], mask: Bool[Array, "*s"], decay: Decay) -> Float[Array, "*s"]:
    """`w` where the mask is True, zero elsewhere; the gradient passes to every entry.

    The gradient with respect to `w` is `g + decay * (1 - mask) * w`, with g the gradient at the
    projected weight, not masked. The mask and the decay get none.
    """
    return jnp.where(mask, w, jnp.zeros((), w.dtype))


def _project_forward(w: Array, mask: Array, decay: Decay) -> tuple[Array, tuple[Any, ...]]:
    return project(w, mask, decay), (w, mask, decay)


def _project_backward(residuals: tuple[Any, ...], g: Array) -> tuple[Any, ...]:
    w, mask, decay = residuals
    # under `lax.switch` a constant arrives as a numpy array
    return pull_to_zero(g, w, mask, jnp.asarray(decay)), None, jnp.zeros_like(decay)


def pull_to_zero(
    g: Float[Array, "*s"], w: Float[Array, "*s"], mask: Bool[Array, "*s"], decay: Decay
) -> Float[Array, "*s"]:
    """`g + decay * (1 - mask) * w`, in the dtype of g."""
    rate = jnp.asarray(decay).astype(w.dtype)
    return g + jnp.where(mask, jnp.zeros((), w.dtype), rate * w).astype(g.dtype)


project.defvjp(_project_forward, _project_backward)


def nm_project(
    w: Float[Array, "*s"],
    n: int,
    m: int,
    *,
    axis: int | None = -2,
    ties: Ties = "last",
    decay: Decay = 2e-4,
    mask: Bool[Array, "*s"] | None = None,
) -> Float[Array, "*s"]:
    """Projects a weight on an N:M pattern by magnitude; SR-STE in the backward pass.

    Args:
      w: dense weight; gets the gradient `g + decay * (1 - mask) * w`.
      n: kept in a group. m: group size. axis, ties: see `NM`.
      decay: pull of the pruned entries towards zero, at least 0; 0 is plain straight-through.
      mask: to reuse one; None makes it from `abs(w)`.

    Raises:
      TypeError: `w` is not floating point.
      ValueError: an impossible pattern, a negative concrete decay, or a mask of another shape.

    Source: Zhou et al., Learning N:M fine-grained structured sparse neural networks (2021).
    """
    return _view("", w, NM(n, m, axis, ties), decay, mask, None)


def sr_ste(
    params: PyTree,
    pattern: Pattern,
    *,
    decay: Decay = 2e-4,
    where: Where = None,
    masks: PyTree | None = None,
    density: Density = None,
) -> PyTree:
    """View of the parameters in which every chosen leaf is projected on the pattern.

    Differentiate through it: pruned entries receive the gradient of their projected zero plus
    `decay` times themselves, so that they can come back but do not drift.

    The view of a whole NNX module is a new module: state that its forward pass changes (batch
    statistics, dropout keys) has to be carried back with `nnx.update`, or split the parameters off
    and view those.

    Args:
      params: any PyTree of arrays.
      pattern: for example `NM(2, 4)`; masks come from `abs(w)`, anew at every call.
      decay: at least 0; may be traced.
      where: which leaves, see `selected_paths`.
      masks: mask tree to use instead of fresh ones; its dense leaves pass through.
      density: share that stays, for patterns that need one; may be traced.

    Raises:
      ValueError: `where` matches nothing, the pattern does not fit a leaf (named), a negative
        concrete decay, or masks of another structure.

    Source: Zhou et al. (2021), equation 9.

    >>> params = {"kernel": jnp.asarray([[1.0], [4.0], [2.0], [3.0]])}
    >>> sr_ste(params, NM(2, 4))["kernel"][:, 0]
    Array([0., 4., 0., 3.], dtype=float32)
    >>> loss = lambda p: sr_ste(p, NM(2, 4), decay=0.1)["kernel"].sum()
    >>> jax.grad(loss)(params)["kernel"][:, 0]  # 1, and 0.1 times itself where it is pruned
    Array([1.1, 1. , 1.2, 1. ], dtype=float32)
    """
    if masks is None:
        return map_selected(
            lambda path, w: _view(path, w, pattern, decay, None, density), params, where=where
        )
    return map_selected(
        lambda path, w, mask: w if is_dense(mask) else _view(path, w, pattern, decay, mask, None),
        params,
        check_masks(masks, params),
        where=_anything if where is None else where,
    )


def ste(
    params: PyTree,
    pattern: Pattern,
    *,
    where: Where = None,
    masks: PyTree | None = None,
    density: Density = None,
) -> PyTree:
    """`sr_ste` without the pull: the gradient of the projected weight, unchanged."""
    return sr_ste(params, pattern, decay=0.0, where=where, masks=masks, density=density)


def mask_decay_weight(
    w: Float[Array, "*s"],
    beta: int | float | Float[Array, ""],
    n: int,
    m: int,
    *,
    axis: int | None = -2,
    gradient: MaskGradient = "masked",
) -> Float[Array, "*s"]:
    """A weight whose entries outside its N:M pattern are multiplied by `beta`.

    `w * (mask + beta * (1 - mask))` with the mask made from `abs(w)`, of equals the last stays.
    Mask and beta are constants of the gradient, which with g at the result is
    `g * (mask + beta * (1 - mask))` if "masked", and g itself if "straight_through".

    Args:
      w: dense weight. n: kept in a group. m: group size. axis: see `NM`.
      beta: in [0, 1], from a schedule such as `exponential_mask_decay`; may be traced. 1 is the
        identity, 0 the projection on the pattern.
      gradient: "masked" is the chain rule, so that what reaches pruned entries fades with beta;
        "straight_through" is what the authors' code does.

    Raises:
      TypeError: `w` is not floating point.
      ValueError: a concrete beta outside [0, 1], an unknown gradient or an impossible pattern.

    Source: Bambhaniya et al., Progressive gradient flow for robust N:M sparsity training (2024).

    >>> w = jnp.asarray([[1.0], [4.0], [2.0], [3.0]])
    >>> mask_decay_weight(w, 0.5, 2, 4)[:, 0]
    Array([0.5, 4. , 1. , 3. ], dtype=float32)
    """
    return _decayed("", w, beta, NM(n, m, axis), gradient)


def mask_decay(
    params: PyTree,
    beta: int | float | Float[Array, ""],
    pattern: NM,
    *,
    gradient: MaskGradient = "masked",
    where: Where = None,
) -> PyTree:
    """View of the parameters in which every chosen leaf is a `mask_decay_weight`.

    Args:
      params: any PyTree of arrays. beta, gradient: see `mask_decay_weight`.
      pattern: for example `NM(1, 8)`; masks come from `abs(w)`, anew at every call.
      where: which leaves, see `selected_paths`.

    Raises:
      ValueError: `where` matches nothing or the pattern does not fit a leaf (named); otherwise as
        `mask_decay_weight`.
    """
    return map_selected(
        lambda path, w: _decayed(path, w, beta, pattern, gradient), params, where=where
    )


@jax.custom_vjp
def _scale_straight_through(w: Array, factor: Array) -> Array:
    return w * factor


_scale_straight_through.defvjp(
    lambda w, factor: (w * factor, None), lambda residuals, g: (g, jnp.zeros_like(g))
)


def _decayed(path: str, w: Any, beta: Any, pattern: NM, gradient: MaskGradient) -> Array:
    name = path or "w"
    _check_floating(name, w)
    if gradient not in get_args(MaskGradient):
        allowed = " and ".join(map(repr, get_args(MaskGradient)))
        raise ValueError(f"gradient is {gradient!r}; allowed are {allowed}")
    if is_concrete(beta) and not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}; it must be in [0, 1]")
    mask = leaf_mask(name, jnp.abs(lax.stop_gradient(w)), None, pattern)
    one, beta = jnp.ones((), w.dtype), jnp.asarray(beta).astype(w.dtype)
    factor = lax.stop_gradient(jnp.where(mask, one, beta))
    return w * factor if gradient == "masked" else _scale_straight_through(w, factor)


def srste_decay(
    pattern: Pattern, *, decay: Decay = 2e-4, where: Where = None, density: Density = None
) -> optax.GradientTransformation:
    """Adds SR-STE's pull to the gradients, as the first link of an optax chain.

    `chain(srste_decay(p), opt)` with gradients through `ste(params, p)` does the same as `opt` with
    gradients through `sr_ste(params, p)`. `update` needs `params`.

    Args:
      pattern, decay, where, density: as for `sr_ste`.

    Raises:
      ValueError: in `update`, without params; otherwise as `sr_ste`.
    """
    _check_decay(decay)

    def init(params: PyTree) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError("params is None; srste_decay pulls on the parameters: pass them")

        def pull(path: str, g: Array, w: Array) -> Array:
            return pull_to_zero(g, w, leaf_mask(path, jnp.abs(w), density, pattern), decay)

        return map_selected(pull, updates, params, where=where), state

    return optax.GradientTransformation(init, update)


def _view(
    path: str,
    w: Any,
    pattern: Pattern,
    decay: Decay,
    mask: Array | None,
    density: Density,
) -> Array:
    name = path or "w"
    _check_floating(name, w)
    _check_decay(decay)
    if mask is None:
        mask = leaf_mask(name, jnp.abs(lax.stop_gradient(w)), density, pattern)
    elif mask.shape != w.shape:
        raise ValueError(f"the mask of {name!r} has shape {mask.shape}, its weight {w.shape}")
    return project(w, mask, jnp.asarray(decay).astype(w.dtype))


def _check_floating(name: str, w: Any) -> None:
    if not (is_array(w) and jnp.issubdtype(w.dtype, jnp.floating)):
        raise TypeError(f"{name!r} must be floating point, not {getattr(w, 'dtype', type(w))}")


def _check_decay(decay: Decay) -> None:
    if is_concrete(decay) and not decay >= 0:
        raise ValueError(f"decay is {decay}; it must not be negative")


def _anything(path: str, leaf: Any) -> bool:
    del path, leaf
    return True
