"""Flax NNX backbones that the experiments train.

`Llama` is the LLaMA family of decoders and `Gpt` is GPT-2, with their named sizes, cache and
generation; `load_hf` and `save_hf` read and write them as Hugging Face Transformers does,
and `load_gguf` reads GGUF files.
"""

from sparsejax.models.decoding import generate, init_cache
from sparsejax.models.gguf import load_gguf
from sparsejax.models.gguf_tokenizer import gguf_tokenizer
from sparsejax.models.gpt import Gpt, GptBlock, LayerNorm
from sparsejax.models.gpt_config import GPT_SIZES, GptConfig, gpt_config
from sparsejax.models.hf import load_hf, load_hf_gpt
from sparsejax.models.hf_config import hf_config, to_hf_config
from sparsejax.models.hf_save import save_hf
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
from sparsejax.models.loading import CheckpointError

__all__ = [
    "DEFAULT_RULES",
    "GPT_SIZES",
    "LLAMA_SIZES",
    "LOGICAL_AXES",
    "Attention",
    "CheckpointError",
    "DecoderBlock",
    "FeedForward",
    "Gpt",
    "GptBlock",
    "GptConfig",
    "KVCache",
    "LayerNorm",
    "Llama",
    "LlamaConfig",
    "RMSNorm",
    "RopeScaling",
    "generate",
    "gguf_tokenizer",
    "gpt_config",
    "hf_config",
    "init_cache",
    "llama_config",
    "load_gguf",
    "load_hf",
    "load_hf_gpt",
    "logical_axes",
    "param_specs",
    "parameter_count",
    "rope_tables",
    "save_hf",
    "to_hf_config",
]
