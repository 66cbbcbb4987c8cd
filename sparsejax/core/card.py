"""The vocabulary of an experiment on sparsity, and the card that states it.

The axes are those of Liu & Wang, Ten lessons we have learned in the new "Sparseland" (2023).
"""

import dataclasses
import enum
from typing import Any


class WhatIsSparse(enum.Enum):
    """What holds the zeros."""

    WEIGHTS = "weights"
    ACTIVATIONS = "activations"
    ATTENTION = "attention"
    GRADIENTS = "gradients"
    DATA = "data"


class Granularity(enum.Enum):
    """The unit that is zero or not."""

    UNSTRUCTURED = "unstructured"
    N_M = "n_m"
    BLOCK = "block"
    CHANNEL = "channel"


class Timing(enum.Enum):
    """When the mask is found."""

    BEFORE = "before"
    DURING = "during"
    AFTER = "after"


class TrainingPath(enum.Enum):
    """Whether training is ever dense."""

    DENSE = "dense"
    DENSE_TO_SPARSE = "dense_to_sparse"
    SPARSE_TO_SPARSE = "sparse_to_sparse"


class MaskDynamics(enum.Enum):
    """Whether the mask changes at constant density."""

    STATIC = "static"
    DYNAMIC = "dynamic"


class Allocation(enum.Enum):
    """How density is shared among the layers."""

    GLOBAL = "global"
    UNIFORM = "uniform"
    ERK = "erk"
    LEARNED = "learned"


class Criterion(enum.Enum):
    """What makes an entry worth keeping."""

    RANDOM = "random"
    MAGNITUDE = "magnitude"
    GRADIENT = "gradient"
    SALIENCY = "saliency"
    SCORE = "score"


class GradientRule(enum.Enum):
    """What pruned entries feel. Dense gradients need dense memory, whatever the mask."""

    MASKED = "masked"
    DENSE = "dense"
    STRAIGHT_THROUGH = "straight_through"


@dataclasses.dataclass(frozen=True)
class SparsityCard:
    """What every experiment states about itself.

    Attributes:
      what, granularity, timing, path, dynamics, allocation, criterion, gradient: one per axis.
      seeds: runs behind each figure. budget: what the methods had in common.
      simulated: whether zeros were multiplied rather than skipped.
    """

    what: WhatIsSparse
    granularity: Granularity
    timing: Timing
    path: TrainingPath
    dynamics: MaskDynamics
    allocation: Allocation
    criterion: Criterion
    gradient: GradientRule
    seeds: int
    budget: str
    simulated: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: v.value if isinstance(v, enum.Enum) else v for k, v in values.items()}

    def to_markdown(self) -> str:
        """A two-column table."""
        rows = [f"| {name} | {value} |" for name, value in self.to_dict().items()]
        return "\n".join(["| axis | value |", "|---|---|", *rows])
