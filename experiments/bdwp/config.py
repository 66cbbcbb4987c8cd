"""Settings of the BDWP experiment, and its presets."""

import dataclasses
import re

import sparsejax as sj
from experiments.harness.config import ExperimentError
from experiments.harness.images import ImageConfig
from experiments.harness.nm_training import check_arms
from sparsejax.weights.bdwp import METHODS

SLUG = "bdwp"
LAYERS = 3
LABELS = {"dense": "dense", "srste": "SR-STE", "sdgp": "SDGP", "sdwp": "SDWP", "bdwp": "BDWP"}
PAPER_MODELS = {"resnet9": (512, 32, 10), "vit_small_patch4": (512, 32, 10),
                "vgg19": (512, 32, 100), "resnet18": (512, 224, 1000)}  # fmt: skip
"""Batch, side and classes of the networks whose training the paper speeds up."""


@dataclasses.dataclass(frozen=True)
class Config(ImageConfig):
    """Settings of `python -m experiments.bdwp`."""

    seeds: int = 4
    """How many seeds each arm is run with: initialisation and batches."""
    pattern: tuple[str, ...] = ("2:8", "1:16")
    """Weights kept of a group; the first is that of the claims."""
    method: tuple[str, ...] = ("dense", "srste", "sdgp", "sdwp", "bdwp")
    """Compared: dense; srste (sparse forward), sdgp and sdwp (sparse input gradients, by data or by
    weights), bdwp (both)."""
    decay: float = 2e-4
    """Pull of the weights that the forward pass prunes; srste and bdwp alone."""
    lr: tuple[float, ...] = (0.05, 0.1)
    """Peak learning rates; every method is shown at its best one."""
    epochs: int = 25
    """Passes over the training images."""
    width: int = 128
    """Nodes of the three hidden layers of the digits network."""
    pregenerate_steps: int = 20
    """Steps after which training from pre-generated compact weights is compared with masking on the
    fly, bit for bit; 0 leaves it out."""
    array: str = "32x32"
    """Rows and columns of the modelled systolic array."""
    adder_latency: int = 1
    """Cycles of its pipelined adders."""
    cost_models: tuple[str, ...] = tuple(PAPER_MODELS)
    """Networks whose training is put on the array."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_arms(
            self,
            positive=("width", "adder_latency"),
            known={"method": METHODS, "cost_models": tuple(PAPER_MODELS)},
        )
        if self.decay < 0 or self.pregenerate_steps < 0:
            raise ExperimentError(
                f"decay is {self.decay} and pregenerate_steps {self.pregenerate_steps}; neither "
                "may be negative"
            )
        if not self.pattern:
            raise ExperimentError("pattern is empty; give one or several, such as 2:8")
        self.patterns()  # their checks
        self.array_size()

    def patterns(self) -> list[sj.NM]:
        """`pattern` as patterns."""
        return [sj.NM.parse(text) for text in self.pattern]

    def array_size(self) -> tuple[int, int]:
        """Rows and columns."""
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", self.array):
            raise ExperimentError(f"array is {self.array!r}; it must look like 32x32")
        rows, cols = map(int, self.array.split("x"))
        return rows, cols

    def arms(self) -> dict[str, tuple[str, sj.NM]]:
        """Method and pattern of every arm, by name; dense training has no pattern."""
        found = {}
        for pattern in self.patterns():
            for method in self.method:
                name = "dense" if method == "dense" else f"{method}-{pattern.n}of{pattern.m}"
                found[name] = (method, pattern)
        return found

    def labels(self) -> dict[str, str]:
        """What tables and figures call the arms."""
        return {
            name: LABELS[method] + ("" if method == "dense" else f" {pattern}")
            for name, (method, pattern) in self.arms().items()
        }


PRESETS = {
    "laptop": Config(),
    "test": Config(preset="test", seeds=2, pattern=("2:8",), lr=(0.1,), epochs=2, width=16,
                   pregenerate_steps=5, cost_models=("resnet9",)),
    "paper": Config(preset="paper", seeds=3, dataset="imagenet2012", model="resnet18",
                    pattern=("2:8",), lr=(0.1,), epochs=90, batch=256, warmup_epochs=5,
                    weight_decay=1e-4, dtype="bfloat16", log_every=100, checkpoint_every=5000),
}  # fmt: skip
