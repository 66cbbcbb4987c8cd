"""Optax transforms that keep parameters sparse, wrapped around an optimiser."""

from sparsejax.core.transforms.dynamic import (
    DynamicSparsityState,
    dynamic_sparsity,
    prune_and_regrow,
    rigl,
    sparse_evolution,
)
from sparsejax.core.transforms.fractions import (
    ExactFraction,
    exact_fraction,
    floor_product,
    fraction_table,
)
from sparsejax.core.transforms.gradual import SparsityState, gradual_pruning
from sparsejax.core.transforms.slots import mask_optimizer_slots, reset_optimizer_slots
from sparsejax.core.transforms.state import get_masks, set_masks
from sparsejax.core.transforms.static import StaticSparsityState, static_sparsity

__all__ = [
    "DynamicSparsityState",
    "ExactFraction",
    "SparsityState",
    "StaticSparsityState",
    "dynamic_sparsity",
    "exact_fraction",
    "floor_product",
    "fraction_table",
    "get_masks",
    "gradual_pruning",
    "mask_optimizer_slots",
    "prune_and_regrow",
    "reset_optimizer_slots",
    "rigl",
    "set_masks",
    "sparse_evolution",
    "static_sparsity",
]
