"""Masks that never change: pruning at initialisation, one-shot pruning, fine-tuning."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from sparsejax.core.masks import apply_masks, check_masks
from sparsejax.core.selection import is_dense


class StaticSparsityState(NamedTuple):
    """State of `static_sparsity`."""

    masks: PyTree  # structure of the parameters, bool
    inner: PyTree  # state of the wrapped optimiser


def static_sparsity(
    inner: optax.GradientTransformation, masks: PyTree, *, mask_gradients: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Keeps parameters on fixed masks while `inner` trains them.

    The update of a pruned entry is `-param`, so that `optax.apply_updates` itself gives sparse
    parameters, whatever they were before.

    Args:
      inner: the optimiser to wrap.
      masks: mask tree of the parameters' paths. It is copied into the state at `init`, so that it
        is an argument, not a constant, of a jitted step.
      mask_gradients: gradients of pruned entries are zero for `inner`, so its moments stay zero.

    Returns:
      A transform with extra arguments; `update` needs `params`.

    Raises:
      ValueError: in `init`, masks of another structure or shape; in `update`, without params.

    >>> params = {"kernel": jnp.asarray([[1.0], [2.0]])}
    >>> masks = {"kernel": jnp.asarray([[False], [True]])}
    >>> tx = static_sparsity(optax.sgd(0.5), masks)
    >>> updates, state = tx.update({"kernel": jnp.ones((2, 1))}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["kernel"][:, 0]
    Array([0. , 1.5], dtype=float32)
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> StaticSparsityState:
        checked = jax.tree.map(jnp.array, check_masks(masks, params))  # copies: states are donated
        return StaticSparsityState(checked, inner.init(params))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, StaticSparsityState]:
        if params is None:
            raise ValueError("params is None; static_sparsity needs them to stay sparse")
        if mask_gradients:
            updates = apply_masks(updates, state.masks)
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        return keep_sparse(updates, params, state.masks), StaticSparsityState(
            state.masks, inner_state
        )

    return optax.GradientTransformationExtraArgs(init, update)


def keep_sparse(updates: PyTree, params: PyTree, masks: PyTree) -> PyTree:
    """Updates that leave kept entries as they are and end at zero everywhere else.

    Args:
      updates, params, masks: trees of one structure.
    """

    def one(update: Array, param: Array, mask: Array) -> Array:
        return update if is_dense(mask) else jnp.where(mask, update, -param.astype(update.dtype))

    return jax.tree.map(one, updates, params, masks)
