"""Settings of the WINA experiment, its presets, and the arms that are compared."""

import dataclasses
from typing import Literal

from experiments.harness import digits
from experiments.harness.config import ExperimentError
from experiments.harness.language import LanguageConfig, is_pretrained

SLUG = "wina"
TRAIN = 1297  # digits; the other 500 are for testing
LABELS = {
    "teal": "TEAL",
    "wina": "WINA",
    "teal-t": "TEAL-T",
    "wina-t": "WINA-T",
    "r-sparse": "R-Sparse",
    "cats": "CATS",
}
NORMS = {"all": "", "k_gate": " (k, gate)"}


@dataclasses.dataclass(frozen=True)
class Config(LanguageConfig):
    """Settings of `python -m experiments.wina`."""

    seeds: int = 8
    """Random layers, and trained networks; a pretrained model is one."""
    methods: tuple[str, ...] = ("teal", "wina", "teal-t", "wina-t", "r-sparse")
    """Compared: teal, wina, both in rotated bases (-t), r-sparse, and cats, which needs a language
    model."""
    sparsity: tuple[float, ...] = (0.4, 0.5, 0.65, 0.8, 0.9)
    """Shares of the inputs that are dropped."""
    alphas: tuple[float, ...] = (0.5, 0.7, 0.85, 1.0)
    """Of R-Sparse: shares of its budget that go to kept inputs, the best on training data is taken;
    1 has no low rank."""
    spreads: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Of the random layer: deviations of the logarithm of its norms."""
    hidden: tuple[int, ...] = (256, 128)
    """Nodes of the hidden layers of the network on digits."""
    mlp_epochs: int = 25
    """Passes over the digits."""
    mlp_batch: int = 64
    """Images a step."""
    mlp_learning_rate: float = 1e-3
    """Of Adam."""
    timed: tuple[int, int] = (2048, 5632)
    """Inputs and outputs of the layer that is timed."""
    rounds: int = 9
    """Measurements of each time."""
    norms: tuple[str, ...] = ("all", "k_gate")
    """Of wina-t on a language model: norms of all projections (the paper), or of k and gate alone
    (the published code)."""
    mask_by: Literal["threshold", "topk"] = "threshold"
    """Of TEAL and WINA on a language model: calibrated thresholds, or exact numbers of inputs."""
    allocation: Literal["uniform", "greedy"] = "uniform"
    """Of the same: one sparsity for all projections, or the greedy search in every layer."""
    greedy_step: float = 0.1
    """Rise of the greedy search, as a share of the inputs of q."""
    greedy_windows: int = 1
    """Training windows that the greedy search measures on."""
    calibration: int = 8
    """Training windows that thresholds come from."""
    tuning: int = 2
    """Training windows that R-Sparse's alpha is chosen on."""
    decode_tokens: int = 16
    """Tokens of each timed generation, which starts from one; 0 times nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        loaded = is_pretrained(self.model)
        if not loaded and self.preset != "paper" and self.model != "laptop":
            raise ExperimentError(
                f"model is {self.model!r}; give a pretrained one, or none for digits"
            )
        methods = tuple(LABELS)[: None if loaded or self.preset == "paper" else -1]
        digits.check_settings(
            self,
            positive=("hidden", "mlp_epochs", "mlp_batch", "timed", "rounds", "calibration",
                      "tuning", "greedy_windows"),
            shares=("sparsity", "alphas"),
            known={"methods": methods, "norms": tuple(NORMS)},
            examples=None,
        )  # fmt: skip
        if not all(0 < share < 1 for share in self.sparsity):
            raise ExperimentError(f"sparsity is {self.sparsity}; give shares between 0 and 1")
        if self.mlp_batch > TRAIN:
            raise ExperimentError(
                f"mlp_batch is {self.mlp_batch}; there are {TRAIN} training images"
            )
        if not self.spreads or min(self.spreads) < 0:
            raise ExperimentError(f"spreads is {self.spreads}; give some, none negative")
        if self.decode_tokens < 0:
            raise ExperimentError(f"decode_tokens is {self.decode_tokens}; it must be at least 0")
        if not self.mlp_learning_rate > 0:
            raise ExperimentError(
                f"mlp_learning_rate is {self.mlp_learning_rate}; it must be positive"
            )
        if not 0 < self.greedy_step <= 1:
            raise ExperimentError(f"greedy_step is {self.greedy_step}; it must be in (0, 1]")


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to sparsify a language model.

    Attributes:
      method: one of `LABELS`. norms: of `NORMS`, for WINA.
      matched: of CATS, which spares up and down alone: the gate so much sparser that it drops as
        many multiply-adds as the others at the same sparsity.
    """

    method: str
    norms: str = "all"
    matched: bool = False

    @property
    def name(self) -> str:
        """Unique in a run."""
        return f"{self.method}{'-k_gate' * (self.norms == 'k_gate')}{'-matched' * self.matched}"

    @property
    def label(self) -> str:
        """For people."""
        matched = " (equal MACs)" * self.matched
        return f"{LABELS[self.method]}{NORMS[self.norms]}{matched}"

    @property
    def rotated(self) -> bool:
        """Whether it works in the rotated model."""
        return self.method.endswith("-t")

    @property
    def criterion(self) -> Literal["wina", "teal"]:
        """What scores the inputs; R-Sparse's score is WINA's."""
        return "teal" if self.method.startswith("teal") else "wina"

    @property
    def where_norms(self) -> str | None:
        """Which kernels have norms, as `sparse_inputs` takes it."""
        return "(k|gate)_proj" if self.norms == "k_gate" else None


def list_arms(config: Config) -> list[Arm]:
    """Everything that a language model is sparsified by."""
    arms = []
    for method in config.methods:
        arms += [Arm(method, norms) for norms in (config.norms if method == "wina-t" else ("all",))]
        arms += [Arm(method, matched=True)] * (method == "cats")
    return arms


PRESETS = {
    "laptop": Config(),
    "test": Config(
        preset="test",
        seeds=2,
        sparsity=(0.5, 0.9),
        alphas=(0.5, 1.0),
        spreads=(0.0, 1.0),
        hidden=(32,),
        mlp_epochs=15,
        timed=(256, 512),
        rounds=2,
    ),
    "pretrained": Config(
        preset="pretrained",
        model="smollm2",
        seeds=1,
        methods=tuple(LABELS),
        sparsity=(0.25, 0.4, 0.5, 0.65),
        alphas=(0.7, 0.85, 0.95, 1.0),
        batch=1,
        seq_len=511,
        eval_windows=24,
        rounds=3,
    ),
    "paper": Config(
        preset="paper",
        model="llama-2-7b",
        dataset="c4/en",
        seeds=1,
        methods=tuple(LABELS),
        sparsity=(0.25, 0.4, 0.5, 0.65),
        batch=1,
        seq_len=2048,
        calibration=20,
        mask_by="topk",
        allocation="greedy",
        greedy_step=0.025,
    ),
}
