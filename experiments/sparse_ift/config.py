"""Settings of the Sparse-IFT experiment, and its arms."""

import dataclasses
import re
from typing import Literal

from experiments.harness.config import ExperimentError
from experiments.harness.images import ImageConfig
from experiments.harness.nm_training import check_arms

SLUG = "sparse_ift"
FAMILIES = ("dense", "narrow", "wide", "parallel", "factorized", "doped")
LOCAL = ("parallel", "factorized", "doped")
MASKS = ("rigl", "set", "static")
NAMES = {"rigl": "RigL", "set": "SET", "static": "static"}
_ARM = re.compile(rf"({'|'.join(FAMILIES)})(?::(0?\.\d+))?(?::({'|'.join(MASKS)}))?")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One network and how its masks move.

    Attributes:
      family: see `Config.family`. sparsity: that its size is made for. mask: see `Config.mask`.
      width: of the dense network on digits; 0 for a backbone.
    """

    family: str
    sparsity: float
    mask: str
    width: int

    @property
    def name(self) -> str:
        """In files and tables of figures."""
        parts = [self.family] if self.family == "dense" else [
            self.family, f"{self.sparsity:g}", self.mask
        ]  # fmt: skip
        return "-".join(parts + ([f"w{self.width}"] if self.width else []))

    @property
    def label(self) -> str:
        """In tables and figures for people, where the width is said elsewhere."""
        kind = "" if self.family == "dense" else f" {self.sparsity:g} {NAMES[self.mask]}"
        return self.family + kind


@dataclasses.dataclass(frozen=True)
class Config(ImageConfig):
    """Settings of `python -m experiments.sparse_ift`."""

    seeds: int = 8
    """How many seeds each arm is run with: initialisation, masks and batches."""
    family: tuple[str, ...] = (
        "dense", "wide:0.5", "wide", "wide:0.9", "wide:0.75:static", "wide:0.9:static",
        "wide:0.9:set", "narrow", "parallel", "factorized", "doped",
    )  # fmt: skip
    """Compared, FAMILY[:SPARSITY][:MASK]: dense; wide, parallel, factorized or doped, of the dense
    network's FLOPs; narrow, sparse but not larger."""
    sparsity: float = 0.75
    """Of families that do not name theirs; sizes are made for it."""
    mask: Literal["rigl", "set", "static"] = "rigl"
    """Of families that do not name theirs: grown by gradient, at random, or never moved."""
    distribution: Literal["uniform", "erk"] = "uniform"
    """How zeros are shared among the sparse layers."""
    drop_fraction: float = 0.3
    """Share of the active weights that a first move drops; it falls to 0 along a cosine."""
    update_every: int = 25
    """Steps between two moves of the masks."""
    end_fraction: float = 0.75
    """Share of training after which masks stay."""
    match_flops: bool = True
    """Take the sparsity at which the FLOPs are exactly the dense network's, near the given one."""
    lr: tuple[float, ...] = (0.03, 0.1)
    """Peak learning rates; every arm is shown at its best one."""
    width: tuple[int, ...] = (12, 8)
    """Nodes of the hidden layers of the dense network on digits; claims are of the first."""
    epochs: int = 40
    """Passes over the training images."""
    weight_decay: float = 5e-4
    """Of every parameter: added to the gradient by SGD, apart from it by AdamW."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_arms(self, positive=("width", "update_every"), known={"mask": MASKS})
        if not 0 <= self.drop_fraction < 1:
            raise ExperimentError(f"drop_fraction is {self.drop_fraction}; it must be in [0, 1)")
        if not 0 < self.end_fraction <= 1:
            raise ExperimentError(f"end_fraction is {self.end_fraction}; it must be in (0, 1]")
        if not self.family:
            raise ExperimentError("family is empty; give one or several, such as dense wide:0.9")
        families = {arm.family for arm in self.arms().values()}
        if self.model.startswith("vit_") and families != {"dense"}:
            raise ExperimentError(
                f"model is {self.model}; Sparse-IFT is here for the mlp and for convolutions"
            )

    def arms(self) -> dict[str, Arm]:
        """Every arm by name: the families, at every width of the network on digits."""
        found = {}
        for width in self.width if self.is_mlp else (0,):
            for text in self.family:
                match = _ARM.fullmatch(text)
                if not match:
                    raise ExperimentError(
                        f"family is {text!r}; it must look like wide, wide:0.9 or wide:0.9:set, "
                        f"with one of {', '.join(FAMILIES)}"
                    )
                family, given, mask = match.groups()
                sparsity = float(given or self.sparsity)
                if not 0 < sparsity < 1:
                    raise ExperimentError(f"sparsity is {sparsity}; it must be between 0 and 1")
                arm = Arm(family, sparsity, mask or self.mask, width)
                found[arm.name] = arm
        return found

    def labels(self) -> dict[str, str]:
        """What tables and figures call the arms."""
        return {name: arm.label for name, arm in self.arms().items()}


PRESETS = {
    "laptop": Config(),
    "test": Config(preset="test", seeds=2, family=("dense", "wide", "wide:0.75:static"), lr=(0.1,),
                   width=(12,), epochs=2, update_every=5),
    "paper": Config(preset="paper", seeds=3, dataset="cifar100", model="resnet18_cifar",
                    family=("dense", "wide"), lr=(0.1,), batch=128, epochs=200, nesterov=True,
                    schedule="multistep", update_every=100, log_every=100, checkpoint_every=4000),
}  # fmt: skip
