"""Sparsity as pure functions over PyTrees.

The algebra of `sparsejax.core` is exported here (`sj.NM`, `sj.sr_ste`, `sj.make_masks`, ...); the
rooms are modules: `sj.weights` holds methods for sparse weights. `sparsejax.models` holds the Flax
NNX backbones and is imported by name.
"""

from sparsejax import core, weights
from sparsejax.core import *  # noqa: F403

__version__ = "0.1.0"
__all__ = ["__version__", "core", "weights"]
__all__ += core.__all__
