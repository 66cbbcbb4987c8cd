"""Sparsity as pure functions over PyTrees.

The algebra of `sparsejax.core` is exported here (`sj.NM`, `sj.sr_ste`, `sj.make_masks`, ...); the
rooms are modules: `sj.weights` holds methods for sparse weights, `sj.activations` for sparse
activations, `sj.coding` for sparse representations. `sparsejax.models` holds the Flax NNX backbones
and is imported by name.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sparsejax import coding, core, weights
from sparsejax.core import *  # noqa: F403

if TYPE_CHECKING:
    from sparsejax import activations

__version__ = "0.1.0"
__all__ = ["__version__", "activations", "coding", "core", "weights"]
__all__ += core.__all__


def __getattr__(name: str) -> Any:
    """Rooms that stand on kernels come when they are asked for: Pallas is slow to import."""
    if name == "activations":
        return importlib.import_module("sparsejax.activations")
    raise AttributeError(f"module 'sparsejax' has no attribute {name!r}")
