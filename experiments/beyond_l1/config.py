"""Settings of `python -m experiments.beyond_l1`."""

import dataclasses

import sparsejax as sj
from experiments.harness.config import ExperimentError, RunConfig
from experiments.harness.natural_images import PACKAGED

SLUG = "beyond_l1"
BASELINE = "l1"
LABELS = {"l1": "l1", "l2/3": "l2/3", "l1/2": "l1/2", "l0": "l0 (hard)", "cel0": "CEL0"}


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings of `python -m experiments.beyond_l1`."""

    photos: str = PACKAGED
    """`sklearn` (two photographs), a folder of images, or a TFDS dataset as imagenette/train."""
    most_photos: int = 100
    """Images that are read at most."""
    penalty: tuple[str, ...] = tuple(LABELS)
    """Penalties that are compared; l1 is the one that others are read against."""
    lam: tuple[float, ...] = (0.1, 0.2, 0.4)
    """Weights of every penalty."""
    l1_lam: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8)
    """Weights of l1, between whose errors it is interpolated."""
    patch: int = 10
    """Side of a patch in pixels."""
    atoms: int = 200
    """Atoms of the dictionary."""
    train_patches: int = 5000
    """Patches drawn for training; those that are nearly constant are dropped."""
    test_patches: int = 1000
    """Patches drawn for the test, likewise."""
    updates: int = 200
    """Batches, with a dictionary step each; its rate falls from 1 to 0."""
    batch: int = 100
    """Patches in a batch."""
    inference_steps: int = 60
    """ISTA steps for the codes of a batch, from zero."""
    f0: float = 0.4
    """Low-pass of the whitening, in cycles per pixel."""
    flat: float = 0.1
    """Patches of a standard deviation up to this, of the whitened scale, are dropped."""
    target_error: float = 0.02
    """Relative error near which penalties are compared."""
    gabor_fits: int = 60
    """Atoms of each dictionary that Gabor functions are fitted to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("most_photos", "patch", "atoms", "train_patches", "test_patches", "updates",
                     "batch", "inference_steps"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ExperimentError(f"{name} is {getattr(self, name)}; it must be at least 1")
        unknown = [name for name in self.penalty if name not in LABELS]
        if unknown or BASELINE not in self.penalty:
            raise ExperimentError(
                f"penalty is {self.penalty}; allowed are {', '.join(LABELS)}, and l1 must be there"
            )
        for name in ("lam", "l1_lam"):
            values = getattr(self, name)
            if not values or min(values) <= 0 or len(set(values)) < len(values):
                raise ExperimentError(f"{name} is {values}; give positive numbers that differ")
        if len(self.l1_lam) < 2:
            raise ExperimentError(f"l1_lam is {self.l1_lam}; interpolation needs two")
        if self.patch < 4:
            raise ExperimentError(f"patch is {self.patch}; it must be at least 4")
        if not (self.f0 > 0 and self.flat >= 0 and self.target_error > 0):
            raise ExperimentError(
                f"f0 is {self.f0}, flat {self.flat} and target_error {self.target_error}; the "
                "first and the last must be positive, and flat not negative"
            )
        if self.gabor_fits < 0:
            raise ExperimentError(f"gabor_fits is {self.gabor_fits}; it must not be negative")

    def lams(self, penalty: str) -> tuple[float, ...]:
        """Weights that a penalty is run with."""
        return self.l1_lam if penalty == BASELINE else self.lam


PRESETS = {
    "laptop": Config(),
    "test": Config(
        preset="test", seeds=2, penalty=("l1", "cel0"), lam=(0.2,), l1_lam=(0.1, 0.4), patch=6,
        atoms=48, train_patches=400, test_patches=100, updates=20, batch=40, inference_steps=20,
        gabor_fits=4,
    ),
    "paper": Config(
        preset="paper", photos="imagenette/train", patch=16, atoms=1024, train_patches=500_000,
        test_patches=20_000, updates=5000, inference_steps=200, gabor_fits=1024,
    ),
}  # fmt: skip

assert set(LABELS) <= set(sj.PENALTIES)
