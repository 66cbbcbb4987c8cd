"""Settings of the Spark Transformer experiment, its presets, and the arms that are compared."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.harness import digits
from experiments.harness.config import ExperimentError
from experiments.harness.decoder_arms import Arm, DecoderConfig
from sparsejax.models import LlamaConfig

SLUG = "spark_transformer"
LABELS = {
    "gated": "gated GELU",
    "narrow": "gated GELU, narrow",
    "spark": "Spark FFN",
    "stat_topk": "statistical top-k",
    "relu": "ReLU",
    "topk": "ReLU, k largest",
}
VOCABULARY = 256  # bytes
GATED_MATRICES, OTHER_MATRICES = 3, 2
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Config(DecoderConfig):
    """Settings of `python -m experiments.spark_transformer`."""

    learning_rates: tuple[float, ...] = (3e-3, 6e-3, 1.2e-2)
    """Peak learning rates; every arm is shown at its best one."""
    ffn: tuple[str, ...] = ("gated", "narrow", "spark", "stat_topk", "relu")
    """Compared: gated (GELU), narrow (the same with as many multiply-adds as spark), spark,
    stat_topk (gated, with a statistical top-k of the gates), relu, topk (relu, the k largest)."""
    attn: tuple[str, ...] = ("dense", "spark")
    """Attention: dense with every ffn, spark with the ffn spark; spark alone with every ffn."""
    d_ff: int = 256
    """Neurons of a gated layer. Those with two matrices instead of three have 1.5 times as many."""
    ffn_k: int = 31
    """Neurons of a token, of spark in expectation."""
    ffn_r: int = 32
    """Features that the predictor of spark reads."""
    attn_k: int = 16
    """Keys of a query under Spark attention, in expectation."""
    attn_r: int = 8
    """Features of a head that choose them."""
    sparsity_pattern: tuple[float, ...] = (1 - 20 / 256,)
    """Of stat_topk: the share of neurons that are switched off, for all layers or one for each."""
    timed: tuple[str, ...] = ("64x9216", "16x65536", "64x9216:bfloat16")
    """Rows and their lengths that operators are timed on; the first decides the claims."""
    rounds: int = 9
    """Measurements of each operator."""

    def __post_init__(self) -> None:
        super().__post_init__()
        digits.check_settings(
            self,
            positive=("d_ff", "ffn_k", "ffn_r", "attn_k", "attn_r", "rounds"),
            known={"ffn": tuple(LABELS), "attn": ("dense", "spark")},
            one_device=False,
            examples=None,
        )
        if self.d_ff % OTHER_MATRICES:
            raise ExperimentError(f"d_ff is {self.d_ff}; it must be even, for 1.5 times as many")
        head = self.head_dim or self.d_model // self.heads
        for name, most in (("ffn_k", self.wide), ("ffn_r", self.d_model), ("attn_r", head)):
            if getattr(self, name) >= most:
                raise ExperimentError(f"{name} is {getattr(self, name)}; it must be below {most}")
        pattern = self.sparsity_pattern
        if len(pattern) not in (1, self.layers) or not all(0 <= share < 1 for share in pattern):
            raise ExperimentError(
                f"sparsity_pattern is {pattern}; give one share in [0, 1), or {self.layers}"
            )
        if not self.timed:
            raise ExperimentError("timed is empty; give some, such as 64x9216")
        for text in self.timed:
            Rows.parse(text)
        self.arms()  # the model's own checks

    @property
    def wide(self) -> int:
        """Neurons of a layer of two matrices with the parameters of a gated one."""
        return self.d_ff * GATED_MATRICES // OTHER_MATRICES

    @property
    def narrow(self) -> int:
        """Neurons of a gated layer with the multiply-adds of Spark's."""
        adds = ffn_multiply_adds(self.model("spark"), self.ffn_k / self.wide)
        return max(1, round(adds / self.layers / (GATED_MATRICES * self.d_model)))

    def model(self, ffn: str, attn: str = "dense") -> LlamaConfig:
        """The model of an arm."""
        pattern = self.sparsity_pattern
        layers = {
            "gated": {"d_ff": self.d_ff, "activation": "gelu"},
            "narrow": {"activation": "gelu"},
            "spark": {"d_ff": self.wide, "ffn": "spark", "ffn_k": self.ffn_k, "ffn_r": self.ffn_r},
            "stat_topk": {
                "d_ff": self.d_ff,
                "activation": "gelu",
                "sparsity_pattern": pattern * self.layers if len(pattern) == 1 else pattern,
            },
            "relu": {"d_ff": self.wide, "ffn": "relu"},
            "topk": {"d_ff": self.wide, "ffn": "relu", "ffn_k": self.ffn_k},
        }[ffn]
        if ffn == "narrow":
            layers |= {"d_ff": self.narrow}
        if attn == "spark":
            layers |= {"attention": attn, "attention_k": self.attn_k, "attention_r": self.attn_r}
        return self.decoder(VOCABULARY, **layers)

    def arms(self) -> dict[str, Arm]:
        """What is trained, by name: the feed-forward layer, with `+attn` for Spark attention."""
        found = {}
        for attn in self.attn:
            alone = len(self.attn) == 1 or attn == "dense"
            for ffn in self.ffn if alone else [name for name in self.ffn if name == "spark"]:
                model = self.model(ffn, attn)
                observe = functools.partial(observe_shares, model)
                found[f"{ffn}{'+attn' * (attn == 'spark')}"] = Arm(model, observe=observe)
        return found


def label(arm: str) -> str:
    """What tables and figures call an arm."""
    ffn, _, attention = arm.partition("+")
    return LABELS[ffn] + ", Spark attention" * bool(attention)


def observe_shares(model: LlamaConfig, details: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Share of neurons that are on, mean of the layers, and of the keys that may be attended to.

    Args:
      model: the arm's. details: of `Llama.detailed`; a layer that counts nothing is on.
    """
    found = {"active": jnp.float32(1)}
    if "num_active" in details:
        counts = details["num_active"]
        counted = jnp.sum(jnp.mean(counts, axis=(1, 2))) / model.d_ff
        found["active"] = (counted + model.n_layers - len(counts)) / model.n_layers
    if "keys_kept" in details:
        kept = details["keys_kept"]
        found["keys"] = jnp.mean(kept) / ((kept.shape[-1] + 1) / 2)
    return found


def ffn_multiply_adds(model: LlamaConfig, active: float) -> float:
    """Of all feed-forward layers for a token, where neurons that are off are skipped.

    What decides which neurons are on is computed for all of them: gates, the one projection of
    "relu", or Spark's predictor.

    Args:
      active: share of neurons that are on.
    """
    d, f, on = model.d_model, model.d_ff, active * model.d_ff
    read = model.ffn_split if model.ffn == "spark" else d
    second = {"gated": d, "spark": d - read, "relu": 0}[model.ffn]
    return model.n_layers * (read * f + second * on + d * on)


class Rows(NamedTuple):
    """What operators are timed on: `rows` of normal entries, each `width` long."""

    rows: int
    width: int
    dtype: str

    @classmethod
    def parse(cls, text: str) -> "Rows":
        """From `64x9216`, or `64x9216:bfloat16`.

        Raises ExperimentError for other text.
        """
        sizes, _, dtype = text.partition(":")
        rows, _, width = sizes.partition("x")
        if not (rows.isdecimal() and width.isdecimal() and int(rows) and int(width) > 1) or (
            (dtype or "float32") not in DTYPES
        ):
            raise ExperimentError(f"timed is {text!r}; it must look like 64x9216:bfloat16")
        return cls(int(rows), int(width), dtype or "float32")

    def __str__(self) -> str:
        return f"[{self.rows}, {self.width}] {self.dtype}"


PRESETS = {
    "laptop": Config(),
    "test": Config(
        preset="test",
        seeds=2,
        learning_rates=(3e-3,),
        ffn=("gated", "spark"),
        d_model=16,
        d_ff=32,
        ffn_k=6,
        ffn_r=8,
        heads=2,
        attn_r=4,
        attn_k=6,
        batch=4,
        seq_len=16,
        steps=20,
        warmup=5,
        eval_windows=8,
        timed=("8x512",),
        rounds=2,
        checkpoint_every=10,
        log_every=5,
    ),
    # rate, warm-up and batch are not in what was read of the paper: 2T tokens in 480,000 steps
    "paper": Config(
        preset="paper",
        seeds=1,
        dataset="c4/en",
        learning_rates=(1e-3,),
        ffn=("gated", "spark", "stat_topk"),
        d_model=2304,
        layers=26,
        heads=8,
        kv_heads=4,
        head_dim=256,
        positions="rope",
        d_ff=9216,
        ffn_k=1106,
        ffn_r=1024,
        attn_k=256,
        attn_r=128,
        sparsity_pattern=(0.95,) * 10 + (0.0,) * 16,
        batch=512,
        seq_len=8192,
        steps=480_000,
        warmup=1000,
        dtype="bfloat16",
        remat=True,
        timed=("64x9216", "64x13824", "64x13824:bfloat16"),
        log_every=100,
        checkpoint_every=5000,
    ),
}
