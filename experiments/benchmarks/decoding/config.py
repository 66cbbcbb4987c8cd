"""The models that are compared, and what a run measures of them."""

import dataclasses
from typing import Any

from sparsejax.models import LlamaConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a run.

    Attributes:
      dense: the model with gated feed-forward layers.
      spark, block: what differs in a Spark Transformer, and in a BlockFFN, of as many parameters.
      spark_attention: what differs further where Spark chooses keys too.
      context: tokens in the cache. tokens: different ones that are decoded in turns: the rows of
        one alone would stay in the processor's cache.
      input_sparsity: share of inputs that WINA drops. token_sparsity: of experts that a token
        leaves off. core: share of neurons that are known in advance, or are core neurons.
      rounds: measurements of each row. min_seconds: what one lasts at least.
    """

    dense: LlamaConfig
    spark: dict[str, Any]
    block: dict[str, Any]
    spark_attention: dict[str, Any]
    context: int = 128
    tokens: int = 8
    input_sparsity: float = 0.65
    token_sparsity: float = 0.8
    core: float = 0.08
    rounds: int = 15
    min_seconds: float = 0.1

    def model(self, name: str) -> LlamaConfig:
        """The model called "dense", "spark", "spark_both" or "block"."""
        changes = {
            "dense": {},
            "spark": self.spark,
            "spark_both": {**self.spark, **self.spark_attention},
            "block": self.block,
        }
        return dataclasses.replace(self.dense, **changes[name])


LAYERS, GEMMA_LAYERS, GEMMA_VOCABULARY = 2, 26, 256_000
PRESETS = {
    "laptop": Config(
        dense=LlamaConfig(
            vocab_size=GEMMA_VOCABULARY * LAYERS // GEMMA_LAYERS,
            d_model=2304,
            n_layers=LAYERS,
            n_heads=8,
            n_kv_heads=4,
            head_dim=256,
            d_ff=9216,
            max_seq_len=256,
            tie_embeddings=True,
        ),
        spark={"ffn": "spark", "d_ff": 13824, "ffn_r": 1024, "ffn_k": 1106},
        block={"ffn": "block", "d_ff": 13824, "n_experts": 108},
        spark_attention={"attention": "spark", "attention_k": 32},
    ),
    "test": Config(
        dense=LlamaConfig(
            vocab_size=60,
            d_model=32,
            n_layers=2,
            n_heads=4,
            n_kv_heads=2,
            head_dim=8,
            d_ff=64,
            max_seq_len=20,
            tie_embeddings=True,
        ),
        spark={"ffn": "spark", "d_ff": 96, "ffn_r": 12, "ffn_k": 10},
        block={"ffn": "block", "d_ff": 96, "n_experts": 12},
        spark_attention={"attention": "spark", "attention_k": 4},
        context=9,
        rounds=2,
        min_seconds=1e-4,
    ),
}
"""The laptop's vocabulary has the share of Gemma's that its layers have of Gemma's layers, so that
reading the logits' matrix weighs as much as in the whole model."""
