"""Finding the masks inside an optimiser state, however deep it is nested."""

from typing import Any

import jax
from jaxtyping import PyTree

from sparsejax.core.masks import check_masks


def get_masks(opt_state: PyTree) -> PyTree:
    """The mask tree that a sparsity transform keeps in an optimiser state.

    Args:
      opt_state: the state of any optax transform, of `nnx.Optimizer` or a `TrainState`, chained
        and nested at will.

    Raises:
      ValueError: no transform in it keeps masks, or several do.
    """
    holders = _mask_holders(opt_state)
    if len(holders) != 1:
        found = "no" if not holders else str(len(holders))
        raise ValueError(f"opt_state holds {found} mask trees; exactly one is needed")
    return holders[0].masks


def set_masks(opt_state: PyTree, masks: PyTree) -> PyTree:
    """Replaces the mask tree inside an optimiser state.

    Raises:
      ValueError: opt_state does not hold exactly one mask tree, or `masks` does not fit it.
    """
    current = get_masks(opt_state)
    masks = check_masks(masks, current)
    return jax.tree.map(
        lambda node: node._replace(masks=masks) if _holds_masks(node) else node,
        opt_state,
        is_leaf=_holds_masks,
    )


def _holds_masks(node: Any) -> bool:
    return isinstance(node, tuple) and "masks" in getattr(node, "_fields", ())


def _mask_holders(opt_state: PyTree) -> list[Any]:
    return [node for node in jax.tree.leaves(opt_state, is_leaf=_holds_masks) if _holds_masks(node)]
