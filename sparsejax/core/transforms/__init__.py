"""Optax transforms that keep parameters sparse, wrapped around an optimiser."""

from sparsejax.core.transforms.state import get_masks, set_masks
from sparsejax.core.transforms.static import StaticSparsityState, static_sparsity

__all__ = ["StaticSparsityState", "get_masks", "set_masks", "static_sparsity"]
