"""Settings of `python -m experiments.kernel_heterogeneity`."""

import dataclasses
from typing import Literal

import numpy as np

from experiments.harness.config import ExperimentError, RunConfig, check_rates
from experiments.harness.images import ImageConfig
from experiments.harness.natural_images import PACKAGED

SLUG = "kernel_heterogeneity"
VARIANTS = ("codes", "downstream")
LABELS = {
    "full": "heterogeneous",
    "thin": "homogeneous",
    "full_unit": "heterogeneous, unit norm",
    "thin_unit": "homogeneous, unit norm",
    "full_learned": "learned from heterogeneous",
    "thin_learned": "learned from homogeneous",
}
STUDY, MINIMUM = "study", "minimum"
SOLVERS = {STUDY: "the study's solver", MINIMUM: "near the minimum"}


@dataclasses.dataclass(frozen=True)
class CodingConfig(RunConfig):
    """The dictionaries, and the study's solver."""

    lam: float = 1e-2
    """Weight of the l1 norm."""
    relax: float = 1.8
    """Relaxation of ADMM."""
    iterations: int = 100
    """Of the study's solver at most, whose rho follows the relative residuals."""
    tol: float = 1e-4
    """At which it stops."""
    size: int = 12
    """Side of a kernel in pixels."""
    orientations: int = 12
    """Of the heterogeneous dictionary."""
    bandwidths: int = 6
    """Of the heterogeneous dictionary, 5 degrees apart; the homogeneous one has as many kernels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("iterations", "orientations", "bandwidths")
        if not self.lam > 0:
            raise ExperimentError(f"lam is {self.lam}; it must be positive")
        if self.size < 2 or self.size % 2:
            raise ExperimentError(f"size is {self.size}; it must be even")
        if not 0 < self.relax < 2:
            raise ExperimentError(f"relax is {self.relax}; it must be in (0, 2)")
        if self.tol < 0:
            raise ExperimentError(f"tol is {self.tol}; it must not be negative")

    def check_positive(self, *names: str) -> None:
        """Refuses counts below 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise ExperimentError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def kernels(self) -> int:
        """Of each dictionary."""
        return 2 * self.orientations * self.bandwidths


@dataclasses.dataclass(frozen=True)
class Config(CodingConfig):
    """Settings of `python -m experiments.kernel_heterogeneity`."""

    photos: str = PACKAGED
    """`sklearn` (two photographs), a folder of images, or a TFDS dataset as imagenette/train."""
    most_photos: int = 100
    """Images that are read at most."""
    crop: int = 64
    """Side of a crop in pixels."""
    crops: int = 2
    """Crops of each photo and seed."""
    minimum_crops: int = 2
    """How many of a seed's crops are also coded near the minimum, one after the other photo."""
    minimum_iterations: int = 500
    """Of the solver with fixed rho."""
    minimum_rho: float = 0.2
    """Its rho."""
    learn_steps: int = 40
    """Images that each dictionary learns from; 0 leaves learning out."""
    learn_iterations: int = 60
    """Of the solver that codes an image for learning."""
    learn_rho: float = 10.0
    """Its fixed rho."""
    cutoffs: tuple[float, ...] = tuple(round(float(c), 4) for c in np.linspace(0.001, 0.5, 8))
    """Sizes below which coefficients are dropped, for the resilience."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive(
            "most_photos", "crops", "minimum_crops", "minimum_iterations", "learn_iterations"
        )
        for name in ("minimum_rho", "learn_rho"):
            if not getattr(self, name) > 0:
                raise ExperimentError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.crop < max(16, self.size):
            raise ExperimentError(
                f"crop is {self.crop}; it must be at least 16 and the size of a kernel, {self.size}"
            )
        if self.learn_steps < 0:
            raise ExperimentError(f"learn_steps is {self.learn_steps}; it must not be negative")
        if not self.cutoffs or min(self.cutoffs) <= 0:
            raise ExperimentError(f"cutoffs are {self.cutoffs}; give positive ones")


@dataclasses.dataclass(frozen=True)
class DownstreamConfig(CodingConfig, ImageConfig):
    """Settings of `python -m experiments.kernel_heterogeneity --variant downstream`."""

    preset: str = "downstream"
    """The set of defaults."""
    model: str = "resnet20"
    """The backbone that is given the codes: resnet18, resnet20, ..., resnet18_cifar, ..., vgg19."""
    epochs: int = 20
    """Passes over the training images."""
    warmup_epochs: int = 5
    """The learning rate rises linearly for so long, then falls along a cosine to 0."""
    optimizer: Literal["sgd", "adamw", "lion"] = "adamw"
    """AdamW, Lion, or SGD with momentum."""
    weight_decay: float = 0.05
    """Of every parameter."""
    augment: Literal["none"] = "none"
    """Maps of oriented kernels are neither shifted nor mirrored."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    """Peak learning rates; every arm is shown at its best one."""
    enlarge: int = 2
    """Images are coded at so many times their side, and their maps shrunk to it."""
    lam: float = 5e-3
    """Weight of the l1 norm: the study's .01 times its factor of .5."""
    cutoffs: tuple[float, ...] = (0.0, 0.5)
    """Sizes below which coefficients are dropped; classifiers are trained at each of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_mlp:
            raise ExperimentError("model is mlp; name a backbone, which takes maps")
        self.check_positive("enlarge")
        if not self.cutoffs or min(self.cutoffs) < 0 or len(set(self.cutoffs)) < len(self.cutoffs):
            raise ExperimentError(f"cutoffs are {self.cutoffs}; give different ones from 0")
        check_rates(self.learning_rates)


PRESETS = {
    "laptop": Config(),
    "test": Config(
        preset="test", seeds=2, crop=24, crops=1, minimum_crops=1, iterations=15,
        minimum_iterations=40, size=8, orientations=4, bandwidths=3, learn_steps=3,
        learn_iterations=10, cutoffs=(0.01, 0.2),
    ),
    "paper": Config(
        preset="paper", photos="imagenette/train", crop=256, crops=1, minimum_crops=600,
        learn_steps=800, learn_iterations=300,
    ),
    "downstream": DownstreamConfig(),
    "downstream_test": DownstreamConfig(
        preset="downstream_test", seeds=1, epochs=1, warmup_epochs=0, batch=256, iterations=5,
        size=8, orientations=3, bandwidths=2, learning_rates=(3e-3,), log_every=2,
    ),
    "downstream_paper": DownstreamConfig(
        preset="downstream_paper", dataset="cifar10", model="resnet18_cifar", seeds=4, epochs=100,
        warmup_epochs=30, batch=800, learning_rates=(2e-4,), iterations=250,
        cutoffs=(0.0, 2.0, 4.0), log_every=50, checkpoint_every=2000,
    ),
}  # fmt: skip
