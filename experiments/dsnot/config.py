"""Settings of the DSnoT experiment, its presets, and the arms that are compared."""

import dataclasses
from typing import Any, Literal

import sparsejax as sj
from experiments.harness import digits
from experiments.harness.config import ExperimentError
from experiments.harness.language import LanguageConfig, is_pretrained
from sparsejax import weights

SLUG = "dsnot"
STARTS = ("magnitude", "wanda")
LABELS = {
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "mask": "SparseGPT, mask only",
}


@dataclasses.dataclass(frozen=True)
class Config(LanguageConfig):
    """Settings of `python -m experiments.dsnot`."""

    seeds: int = 4
    """Trained networks, and draws of calibration windows for the language model."""
    sparsity: tuple[float, ...] = (0.6, 0.7)
    """Shares of every hidden layer's weights that are pruned; the first is that of the claims."""
    initial: tuple[str, ...] = STARTS
    """What the swaps start from: magnitude, wanda, sparsegpt."""
    cycles: tuple[int, ...] = (3, 10, 50)
    """Swaps that an output may have; the largest is that of the claims."""
    threshold: float = 0.1
    """Expected error, summed over a sequence, at which an output is left alone."""
    var_power: float = 1.0
    """Power of the input variance that divides the gain of a returning weight."""
    width: int = 256
    """Nodes of each of the three hidden layers."""
    mlp_steps: int = 400
    """Training steps of a network."""
    mlp_batch: int = 50
    """Images a step."""
    mlp_learning_rate: float = 0.05
    """At the start; it falls to 0 along a cosine."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 5e-4
    """Added to the gradient, of biases too."""
    sequences: int = 16
    """Groups of calibration images that stand for sequences."""
    sequence_length: int = 32
    """Images in each."""
    pattern: str = "2:4"
    """Kept and group size in the language model."""
    calibration: int = 128
    """Training windows that the language model is pruned with."""
    amounts: tuple[str, ...] = ("2:4", "4:8", "0.5", "0.6", "0.7")
    """With a pretrained model: patterns and shares that it is pruned to."""
    skip: Literal["mlp", "self_attn"] | None = None
    """With a pretrained model: layers that the swaps leave alone."""
    chunk: int = 8
    """With a pretrained model: calibration windows at a time."""
    save: bool = False
    """With a pretrained model: keep every pruned model as a Hugging Face directory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        digits.check_settings(
            self,
            positive=("cycles", "width", "mlp_steps", "mlp_batch", "sequences", "sequence_length",
                      "calibration"),
            shares=("momentum",),
            known={"initial": tuple(LABELS)[:3]},
            one_device=not is_pretrained(self.model),
        )  # fmt: skip
        if not self.sparsity or not all(0 < share < 1 for share in self.sparsity):
            raise ExperimentError(f"sparsity is {self.sparsity}; give shares between 0 and 1")
        if not self.threshold >= 0:
            raise ExperimentError(f"threshold is {self.threshold}; it must not be negative")
        for name, most in (("mlp_batch", self.mlp_batch), ("sequences * sequence_length",
                                                           self.images)):  # fmt: skip
            if most > digits.SPLIT:
                raise ExperimentError(f"{name} is {most}; there are {digits.SPLIT} training images")
        if self.chunk < 1 or not self.amounts:
            raise ExperimentError(f"chunk is {self.chunk} and amounts {self.amounts}; give some")
        try:
            sj.NM.parse(self.pattern)
            for amount in self.amounts:
                weights.PruneMethod(**parse_amount(amount))
        except ValueError as error:
            raise ExperimentError(str(error)) from error

    @property
    def images(self) -> int:
        """Calibration images."""
        return self.sequences * self.sequence_length

    @property
    def nm(self) -> sj.NM:
        """The pattern of the language model."""
        return sj.NM.parse(self.pattern)


def parse_amount(amount: str) -> dict[str, Any]:
    """`2:4` as a pattern, `0.6` as the share that is pruned: arguments of a `PruneMethod`.

    Raises:
      ValueError: it is neither.
    """
    if ":" in amount:
        return {"pattern": sj.NM.parse(amount)}
    try:
        return {"sparsity": float(amount)}
    except ValueError as error:
        raise ValueError(f"amount is {amount!r}; give N:M or a share such as 0.6") from error


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to prune a network; no cycles is the mask that the others start from."""

    initial: str
    sparsity: float
    cycles: int = 0
    same_sign: bool = True

    @property
    def name(self) -> str:
        """Unique in a run."""
        rule = "" if self.same_sign else "-free"
        return f"{self.initial}-s{self.sparsity:g}-c{self.cycles}{rule}"

    @property
    def label(self) -> str:
        """For people."""
        if not self.cycles:
            return LABELS[self.initial]
        rule = "" if self.same_sign else ", any sign"
        return f"+ {self.cycles} cycles{rule}"

    def method(self, config: Config) -> weights.PruneMethod:
        """The arm for the library."""
        return weights.PruneMethod(
            "dsnot",
            self.initial,  # type: ignore[arg-type]
            sparsity=self.sparsity,
            max_cycles=self.cycles,
            threshold=config.threshold,
            var_power=config.var_power,
            require_same_sign=self.same_sign,
        )


def list_arms(config: Config) -> list[Arm]:
    """Everything that the networks are pruned by: starts first, then more and more cycles."""
    return [
        Arm(initial, sparsity, cycles, same_sign)
        for sparsity in config.sparsity
        for initial in config.initial
        for cycles in (0, *sorted(config.cycles))
        for same_sign in ((True, False) if cycles else (True,))
    ]


PRESETS = {
    "laptop": Config(),
    "test": Config(
        preset="test",
        seeds=2,
        sparsity=(0.6,),
        cycles=(4,),
        width=32,
        mlp_steps=60,
        dense_steps=30,
        batch=4,
        seq_len=32,
        calibration=16,
        checkpoint_every=30,
        log_every=10,
    ),
    # 2048 tokens a sequence and 4096 inputs in the paper: the threshold is a sum over tokens, and
    # 50 cycles are 1.2 % of the inputs
    "pretrained": Config(
        preset="pretrained",
        model="smollm2",
        seeds=1,
        batch=1,
        seq_len=511,
        eval_windows=24,
        calibration=32,
        initial=("magnitude", "wanda", "sparsegpt"),
        cycles=(7,),
        threshold=0.025,
    ),
    "paper": Config(
        preset="paper", model="llama-2-7b", dataset="c4/en", seeds=1, seq_len=2048, sparsity=(0.7,)
    ),
}
