"""Flax NNX backbones that the experiments train.

`Llama` is the LLaMA family of decoders with its named sizes, its cache and its generation.
"""

from sparsejax.models.decoding import generate, init_cache
from sparsejax.models.llama import (
    DEFAULT_RULES,
    LOGICAL_AXES,
    Attention,
    DecoderBlock,
    FeedForward,
    KVCache,
    Llama,
    RMSNorm,
    logical_axes,
    param_specs,
    rope_tables,
)
from sparsejax.models.llama_config import (
    LLAMA_SIZES,
    LlamaConfig,
    RopeScaling,
    llama_config,
    parameter_count,
)

__all__ = [
    "DEFAULT_RULES",
    "LLAMA_SIZES",
    "LOGICAL_AXES",
    "Attention",
    "DecoderBlock",
    "FeedForward",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "RMSNorm",
    "RopeScaling",
    "generate",
    "init_cache",
    "llama_config",
    "logical_axes",
    "param_specs",
    "parameter_count",
    "rope_tables",
]
