"""Optimiser slots that follow the masks, in the state of any optax transform.

A slot is a floating-point leaf of the state whose path ends in a parameter's path and that has the
parameter's shape: a moment of Adam, a trace, an accumulated gradient, however deep the transforms
are chained, masked or nested. Factored statistics (Adafactor's rows and columns) are no slots: one
entry of theirs belongs to many weights.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from sparsejax.core.selection import is_array, is_dense, named_leaves


def map_slots(
    function: Callable[[Array, Any], Array], opt_state: PyTree, params: PyTree, other: PyTree
) -> PyTree:
    """Maps `function(slot, other_leaf)` over the slots of an optimiser state.

    Args:
      opt_state: any optax state. params: the parameters it belongs to.
      other: tree of the parameters' structure.

    Returns:
      The state with its slots replaced, in the same structure.
    """
    known = {
        path: (leaf.shape, mate)
        for (path, leaf), mate in zip(named_leaves(params), jax.tree.leaves(other))
        if is_array(leaf)
    }

    def one(path: str, leaf: Any) -> Any:
        if not (is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)):
            return leaf
        parts = path.split("/") if path else []
        for start in range(len(parts) + 1):  # the longest tail first
            tail = "/".join(parts[start:])
            if tail in known and known[tail][0] == leaf.shape:
                return function(leaf, known[tail][1])
        return leaf

    leaves = [one(path, leaf) for path, leaf in named_leaves(opt_state)]
    return jax.tree.unflatten(jax.tree.structure(opt_state), leaves)


def reset_optimizer_slots(opt_state: PyTree, params: PyTree, newly_grown: PyTree) -> PyTree:
    """Sets the slots of weights that have just become active to zero.

    Args:
      opt_state: state of any optax transform.
      params: the parameters it belongs to.
      newly_grown: bool tree of the parameters' structure; scalars (dense leaves) reset nothing.
    """

    def reset(slot: Array, grown: Any) -> Array:
        return slot if is_dense(grown) else jnp.where(grown, jnp.zeros((), slot.dtype), slot)

    return map_slots(reset, opt_state, params, newly_grown)


def mask_optimizer_slots(opt_state: PyTree, params: PyTree, masks: PyTree) -> PyTree:
    """Sets the slots of pruned weights to zero.

    Args:
      opt_state: state of any optax transform. params: the parameters it belongs to.
      masks: mask tree of the parameters' structure.
    """

    def mask(slot: Array, kept: Any) -> Array:
        return slot if is_dense(kept) else jnp.where(kept, slot, jnp.zeros((), slot.dtype))

    return map_slots(mask, opt_state, params, masks)
