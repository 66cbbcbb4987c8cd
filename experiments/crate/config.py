"""Settings of the CRATE experiment: one class for each thing that is trained, and the presets."""

import dataclasses
from typing import Literal, Self

from experiments.harness import digits
from experiments.harness.config import ExperimentError, check_rates
from experiments.harness.decoder_arms import DecoderConfig
from experiments.harness.images import TRANSFORMER, ImageConfig
from sparsejax.models import CrateImageConfig, crate_config

SLUG = "crate"
VARIANTS = ("classify", "mae", "dino", "gpt", "bert")
DATASET = "c4/en"  # of the paper presets of text; OpenWebText is none of TFDS


@dataclasses.dataclass(frozen=True)
class ImagesConfig(ImageConfig):
    """What the trainings on images share."""

    model: str = "crate_tiny_patch2"
    """crate_tiny_patchN, ..., crate_large_patchN; a classifier is compared with the vit_tiny_patchN
    of its width, depth and heads."""
    d_model: int | None = 64
    """Width; None: that of the named size."""
    layers: int | None = 6
    """Blocks; None: those of the named size."""
    heads: int | None = 4
    """Subspaces, each of d_model / heads dimensions; None: those of the named size."""
    lam: float = 0.1
    """Threshold of the sparsifying step, over its step size."""
    resplit: int = 1347
    """Training images that each seed draws from both splits, the others are for testing; 0 keeps
    the splits of the dataset, which on small_digits are by different writers."""
    epochs: int = 40
    """Passes over the training images."""
    batch: int = 64
    """Images in a batch, over all devices."""
    warmup_epochs: int = 5
    """The learning rate rises linearly for so long, then falls along a cosine to 0."""
    optimizer: Literal["sgd", "adamw", "lion"] = "adamw"
    """AdamW, Lion, or SGD with momentum."""
    clip_norm: float = 0.0
    """Largest norm of the gradients that AdamW and Lion are given; 0 for any, as published."""
    weight_decay: float = 0.05
    """Of every parameter."""
    augment: Literal["none", "crop", "crop_flip"] = "none"
    """Images shifted by up to an eighth of their side, and mirrored."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """Peak learning rates; every arm is shown at its best one."""
    measured: int = 2000
    """Test images that layers and features are measured on, the first ones; as many training images
    for a probe."""
    shown: int = 8
    """Test images in the figures."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if TRANSFORMER.fullmatch(self.model) is None:
            raise ExperimentError(f"model is {self.model!r}; it must be crate_SIZE_patchN")
        sizes = ("d_model", "layers", "heads")
        given = (name for name in sizes if getattr(self, name) is not None)
        check_counts(self, *given, "measured", "shown")
        if self.resplit < 0 or self.lam < 0:
            raise ExperimentError(
                f"resplit is {self.resplit} and lam {self.lam}; neither may be negative"
            )
        check_rates(self.learning_rates)

    @property
    def named_size(self) -> str:
        """The size in the name of the model."""
        return self.model.split("_")[1]

    def sizes(self) -> dict[str, int]:
        """Width, blocks and heads, as the configurations of the models call them."""
        named = crate_config(self.named_size)
        return {
            "d_model": self.d_model or named.d_model,
            "n_layers": self.layers or named.n_layers,
            "n_heads": self.heads or named.n_heads,
        }

    def crate(self, *, side: int, channels: int, classes: int = 1) -> CrateImageConfig:
        """The model for images of this size.

        Raises ExperimentError for sizes that do not go together.
        """
        patch = int(self.model.rsplit("patch", 1)[1])
        try:
            return crate_config(
                self.named_size,
                **self.sizes(),
                lam=self.lam,
                image_size=side,
                patch_size=patch,
                in_channels=channels,
                num_classes=classes,
                dtype=self.dtype,
            )
        except ValueError as error:
            raise ExperimentError(f"model {self.model}: {error}") from error

    def of_family(self, family: str) -> Self:
        """The same settings with the `crate` or the `vit` of this size and patch."""
        return dataclasses.replace(self, model="_".join([family, *self.model.split("_")[1:]]))

    def check_self_supervised(self) -> None:
        """Refuses what is for classifiers alone."""
        if not self.model.startswith("crate"):
            raise ExperimentError(f"model is {self.model!r}; it must be crate_SIZE_patchN")
        if self.label_smoothing:
            raise ExperimentError(
                f"label_smoothing is {self.label_smoothing}; this training has no labels: leave 0"
            )


@dataclasses.dataclass(frozen=True)
class ClassifyConfig(ImagesConfig):
    """Settings of `python -m experiments.crate`."""

    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes."""


@dataclasses.dataclass(frozen=True)
class MaeConfig(ImagesConfig):
    """Settings of `python -m experiments.crate --variant mae`."""

    preset: str = "mae"
    """The set of defaults."""
    layers: int | None = 4
    """Blocks of the encoder, and of the decoder; None: those of the named size."""
    lam: float = 0.5
    """Threshold of the sparsifying step, over its step size."""
    epochs: int = 60
    """Passes over the training images."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    """Peak learning rates; shown is the one with the least error."""
    ratio: float = 0.75
    """Share of the patches that is removed."""
    neighbours: int = 5
    """Of the classifier that features are tried with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_self_supervised()
        if not 0 < self.ratio < 1:
            raise ExperimentError(f"ratio is {self.ratio}; it must be between 0 and 1")
        check_counts(self, "neighbours")


@dataclasses.dataclass(frozen=True)
class DinoConfig(ImagesConfig):
    """Settings of `python -m experiments.crate --variant dino`."""

    preset: str = "dino"
    """The set of defaults."""
    layers: int | None = 4
    """Blocks; None: those of the named size."""
    epochs: int = 30
    """Passes over the training images."""
    weight_decay: float = 0.04
    """Of every parameter."""
    learning_rates: tuple[float, ...] = (3e-3, 1e-2)
    """Peak learning rates; shown is the best one by the neighbours of the test images."""
    hidden: int = 128
    """Width of the projection head."""
    bottleneck: int = 32
    """Width of its output, which is compared with the prototypes."""
    prototypes: int = 128
    """Outputs that views are assigned to."""
    local_views: int = 2
    """Small crops of an image beside its two large ones, enlarged to the same size."""
    global_zoom: tuple[float, float] = (0.8, 1.15)
    """Sides of the large crops, over that of the image."""
    local_zoom: tuple[float, float] = (0.7, 0.9)
    """Sides of the small crops."""
    rotation: float = 0.3
    """Largest rotation of a view, in radians."""
    jitter: float = 0.2
    """Largest change of a view's contrast, as a share."""
    balance: Literal["sinkhorn", "center"] = "sinkhorn"
    """What keeps the teacher from saying always the same: assignments that are made balanced in
    each batch, or as Caron et al. a running centre, which wants large batches."""
    teacher_temperature: float = 0.02
    """Of the teacher's outputs."""
    student_temperature: float = 0.1
    """Of the student's."""
    teacher_momentum: float = 0.9
    """Share of itself that the teacher keeps in a step, at first; it rises to 1 along a cosine."""
    center_momentum: float = 0.9
    """Share of itself that the centre keeps in a step, with `balance center`."""
    neighbours: int = 5
    """Of the classifier that features are tried with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_self_supervised()
        check_counts(self, "hidden", "bottleneck", "prototypes", "neighbours")
        for name in ("global_zoom", "local_zoom"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ExperimentError(f"{name} is {(low, high)}; give two positive sides that rise")
        for name in ("teacher_temperature", "student_temperature"):
            if not getattr(self, name) > 0:
                raise ExperimentError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("teacher_momentum", "center_momentum", "jitter"):
            if not 0 <= getattr(self, name) < 1:
                raise ExperimentError(f"{name} is {getattr(self, name)}; it must be in [0, 1)")
        if self.local_views < 0 or self.rotation < 0:
            raise ExperimentError(
                f"local_views is {self.local_views} and rotation {self.rotation}; neither may be "
                "negative"
            )


@dataclasses.dataclass(frozen=True)
class TextConfig(DecoderConfig):
    """Settings of `python -m experiments.crate --variant gpt`, and of `--variant bert`."""

    preset: str = "gpt"
    """The set of defaults."""
    objective: Literal["causal", "masked"] = "causal"
    """Predict the next byte from those before it, or masked ones from all others."""
    masked: float = 0.15
    """Share of the bytes that is masked."""
    layers: int = 4
    """Blocks."""
    learning_rates: tuple[float, ...] = (3e-3, 1e-2)
    """Peak learning rates; every arm is shown at its best one."""
    lam: float = 0.1
    """Threshold of the sparsifying step, over its step size."""
    alpha_width: int = 4
    """Atoms of CRATE-alpha's dictionary, over the width of the model; 0 leaves the arm out."""
    clip_norm: float = 1.0
    """Largest norm of the gradients, of every arm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kv_heads", "head_dim"):
            if getattr(self, name) is not None:
                raise ExperimentError(
                    f"{name} is {getattr(self, name)}; heads of d_model / heads are all there are"
                )
        if self.positions != "learned":
            raise ExperimentError(f"positions is {self.positions!r}; these models learn them")
        if not 0 < self.masked < 1:
            raise ExperimentError(f"masked is {self.masked}; it must be between 0 and 1")
        if self.lam < 0 or self.alpha_width < 0 or not self.clip_norm > 0:
            raise ExperimentError(
                f"lam is {self.lam}, alpha_width {self.alpha_width} and clip_norm "
                f"{self.clip_norm}; the last must be positive, and none may be negative"
            )


AnyConfig = ClassifyConfig | MaeConfig | DinoConfig | TextConfig


def check_counts(config: ImagesConfig, *names: str) -> None:
    """Refuses settings below 1."""
    digits.check_settings(config, positive=names, one_device=False, examples=None)


_TEST = {"seeds": 1, "d_model": 8, "layers": 1, "heads": 2, "learning_rates": (3e-3,)}
_TEST_IMAGES = {**_TEST, "epochs": 2, "warmup_epochs": 1, "batch": 256, "measured": 100, "shown": 2}
_TEST_TEXT = {**_TEST, "batch": 8, "seq_len": 16, "steps": 12, "warmup": 2, "eval_windows": 70}
_NAMED = {"d_model": None, "layers": None, "heads": None, "resplit": 0}  # sizes by the model's name
_LONG = {"dtype": "bfloat16", "log_every": 100, "checkpoint_every": 5000}
_TEXT = {
    "dataset": DATASET,
    "d_model": 768,
    "layers": 12,
    "heads": 12,
    "batch": 384,
    "seq_len": 1024,
    "steps": 600_000,
    "warmup": 2000,
    "learning_rates": (6e-4,),
    **_LONG,
}

PRESETS = {
    "laptop": ClassifyConfig(),
    "test": ClassifyConfig(
        preset="test",
        seeds=2,
        d_model=16,
        layers=2,
        heads=2,
        batch=256,
        epochs=2,
        warmup_epochs=1,
        learning_rates=(3e-3,),
        measured=128,
        shown=3,
        log_every=5,
    ),
    # the recipe of the papers; that of the published code has other rates and decay
    "paper": ClassifyConfig(
        preset="paper",
        dataset="imagenet2012",
        model="crate_base_patch16",
        epochs=150,
        batch=2048,
        warmup_epochs=5,
        optimizer="lion",
        learning_rates=(2.4e-4,),
        weight_decay=0.5,
        augment="crop_flip",
        **_NAMED,
        **_LONG,
    ),
    "mae": MaeConfig(),
    "mae_test": MaeConfig(preset="mae_test", **_TEST_IMAGES),
    "mae_paper": MaeConfig(
        preset="mae_paper",
        dataset="imagenet2012",
        model="crate_base_patch16",
        epochs=800,
        batch=4096,
        warmup_epochs=40,
        learning_rates=(3e-5,),
        weight_decay=0.1,
        augment="crop_flip",
        **_NAMED,
        **_LONG,
    ),
    "dino": DinoConfig(),
    "dino_test": DinoConfig(
        preset="dino_test",
        hidden=8,
        bottleneck=4,
        prototypes=16,
        local_views=1,
        **_TEST_IMAGES,
    ),
    # the recipe of Caron et al. for a small transformer
    "dino_paper": DinoConfig(
        preset="dino_paper",
        dataset="imagenet2012",
        model="crate_small_patch16",
        epochs=100,
        batch=1024,
        warmup_epochs=10,
        learning_rates=(2e-3,),
        hidden=2048,
        bottleneck=256,
        prototypes=65_536,
        local_views=8,
        global_zoom=(0.5, 1.0),
        local_zoom=(0.22, 0.5),
        rotation=0.0,
        jitter=0.4,
        balance="center",
        teacher_temperature=0.04,
        student_temperature=0.1,
        teacher_momentum=0.996,
        center_momentum=0.9,
        neighbours=20,
        **_NAMED,
        **_LONG,
    ),
    "gpt": TextConfig(),
    "gpt_test": TextConfig(preset="gpt_test", alpha_width=0, **_TEST_TEXT),
    "gpt_paper": TextConfig(preset="gpt_paper", **_TEXT),
    # masked bytes are predicted by their frequencies for the first thousand steps
    "bert": TextConfig(
        preset="bert", objective="masked", alpha_width=0, steps=3000, warmup=200, log_every=50
    ),
    "bert_test": TextConfig(preset="bert_test", objective="masked", alpha_width=0, **_TEST_TEXT),
    "bert_paper": TextConfig(
        preset="bert_paper", objective="masked", alpha_width=0, **{**_TEXT, "seq_len": 512}
    ),
}
