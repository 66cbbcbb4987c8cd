"""Hugging Face's config.json to our configurations and back, whatever the architecture."""

from collections.abc import Collection, Mapping
from typing import Any

from sparsejax.models.decoding import DType
from sparsejax.models.gpt_config import GptConfig
from sparsejax.models.hf_fields import architecture
from sparsejax.models.hf_gpt import GPT_ARCHITECTURE, gpt_layout, read_gpt, write_gpt
from sparsejax.models.hf_layout import Layout
from sparsejax.models.hf_llama import LLAMA_ARCHITECTURES, llama_layout, read_llama, write_llama
from sparsejax.models.llama_config import LlamaConfig

_READERS = {**dict.fromkeys(LLAMA_ARCHITECTURES, read_llama), GPT_ARCHITECTURE: read_gpt}


def hf_config(
    config: Mapping[str, Any], *, dtype: DType = "float32", param_dtype: DType = "float32"
) -> LlamaConfig | GptConfig:
    """The configuration that a parsed config.json of LLaMA, Qwen2, Mistral or GPT-2 describes.

    Absent entries mean what Transformers takes them to mean; both layouts of the rotary settings
    are read (`rope_theta` with `rope_scaling`, and `rope_parameters`). Under dynamic scaling
    `max_position_embeddings` is the original context, and `max_seq_len` is `factor` times that.

    dtype, param_dtype: of the model to be, whatever the checkpoint's are.

    Raises CheckpointError (a ValueError) naming every field that is missing, of the wrong type, out
    of range, or asks for something that our models lack.

    Source: the configuration classes of Hugging Face Transformers 4 and 5.

    >>> from sparsejax.models import llama_config
    >>> config = llama_config("mistral-7b")
    >>> hf_config(to_hf_config(config)).sliding_window
    4096
    """
    return _READERS[architecture(config, _READERS)](config, dtype, param_dtype)


def to_hf_config(config: LlamaConfig | GptConfig) -> dict[str, Any]:
    """The config.json of `config`, in the layouts of Transformers 4 and 5 at once.

    The architecture of a `LlamaConfig` is Qwen2 if there are biases, else Mistral if there is a
    window, else LLaMA. `hf_config` reads it back to `config`, except what it does not hold:
    initial deviations, `remat`, the dtypes, and under dynamic scaling a `max_seq_len` other than
    `factor` times the original.
    """
    return write_gpt(config) if isinstance(config, GptConfig) else write_llama(config)


def layout_of(config: LlamaConfig | GptConfig, names: Collection[str] = ()) -> Layout:
    """Where the parameters lie; `names` are the checkpoint's tensors, where there is one."""
    return gpt_layout(config, names) if isinstance(config, GptConfig) else llama_layout(config)
