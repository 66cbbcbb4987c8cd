"""Flax NNX backbones that the experiments train.

`Llama` is the LLaMA family of decoders, with sparse feed-forward and attention layers too, and
`Gpt` is GPT-2, with their named sizes, cache and generation; `unroll` makes them decode faster.
`load_hf` and `save_hf` read and write them as Hugging Face Transformers does, and `load_gguf` reads
GGUF files. `ResNet`, `ResNet9`, `VGG19` and `ViT` classify images (channels last), `TextClassifier`
texts; `CrateClassifier`, `CrateMAE` and `CrateLM` are white-box transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sparsejax.models.blocks import unroll
from sparsejax.models.conv_layers import replicated_specs
from sparsejax.models.convnets import VGG19, ResNet9
from sparsejax.models.crate import (
    CRATE_AXES,
    CRATE_RULES,
    CrateClassifier,
    CrateLM,
    CrateMAE,
    class_attention,
    crate_param_specs,
    layer_statistics,
)
from sparsejax.models.crate_config import (
    CRATE_SIZES,
    CrateConfig,
    CrateImageConfig,
    CrateTextConfig,
    crate_config,
)
from sparsejax.models.crate_layers import ISTA, MSSA, CrateBlock, CrateDecoderBlock
from sparsejax.models.crate_torch import crate_from_torch, crate_to_torch, load_crate, save_crate
from sparsejax.models.decoding import generate, init_cache
from sparsejax.models.encoder import (
    ENCODER_AXES,
    ENCODER_RULES,
    EncoderBlock,
    encoder_param_specs,
    full_attention,
)
from sparsejax.models.encoder_config import EncoderConfig
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
    DecoderBlock,
    KVCache,
    Llama,
    logical_axes,
    param_specs,
)
from sparsejax.models.llama_config import (
    LLAMA_SIZES,
    LlamaConfig,
    RopeScaling,
    llama_config,
    parameter_count,
)
from sparsejax.models.llama_layers import Attention, FeedForward, RMSNorm, rope_tables
from sparsejax.models.loading import CheckpointError
from sparsejax.models.resnet import BasicBlock, BottleneckBlock, ResNet
from sparsejax.models.resnet_config import (
    RESNET_SIZES,
    ConvNetConfig,
    ResNetConfig,
    resnet_config,
)
from sparsejax.models.text_classifier import (
    TEXT_CLASSIFIER_SIZES,
    TextClassifier,
    TextClassifierConfig,
    text_classifier_config,
)
from sparsejax.models.transformed import TransformedBlock, TransformedLlama, transform_llama
from sparsejax.models.vision_language_config import CoreMatching, VisionLanguageConfig
from sparsejax.models.vit import ViT
from sparsejax.models.vit_config import VIT_SIZES, ViTConfig, vit_config

if TYPE_CHECKING:
    from sparsejax.models.vision_language import VisionLanguage, vision_language_param_specs

__all__ = [
    "CRATE_AXES",
    "CRATE_RULES",
    "CRATE_SIZES",
    "DEFAULT_RULES",
    "ENCODER_AXES",
    "ENCODER_RULES",
    "GPT_SIZES",
    "ISTA",
    "LLAMA_SIZES",
    "LOGICAL_AXES",
    "MSSA",
    "RESNET_SIZES",
    "TEXT_CLASSIFIER_SIZES",
    "VGG19",
    "VIT_SIZES",
    "Attention",
    "BasicBlock",
    "BottleneckBlock",
    "CheckpointError",
    "ConvNetConfig",
    "CoreMatching",
    "CrateBlock",
    "CrateClassifier",
    "CrateConfig",
    "CrateDecoderBlock",
    "CrateImageConfig",
    "CrateLM",
    "CrateMAE",
    "CrateTextConfig",
    "DecoderBlock",
    "EncoderBlock",
    "EncoderConfig",
    "FeedForward",
    "Gpt",
    "GptBlock",
    "GptConfig",
    "KVCache",
    "LayerNorm",
    "Llama",
    "LlamaConfig",
    "RMSNorm",
    "ResNet",
    "ResNet9",
    "ResNetConfig",
    "RopeScaling",
    "TextClassifier",
    "TextClassifierConfig",
    "TransformedBlock",
    "TransformedLlama",
    "ViT",
    "ViTConfig",
    "VisionLanguage",
    "VisionLanguageConfig",
    "class_attention",
    "crate_config",
    "crate_from_torch",
    "crate_param_specs",
    "crate_to_torch",
    "encoder_param_specs",
    "full_attention",
    "generate",
    "gguf_tokenizer",
    "gpt_config",
    "hf_config",
    "init_cache",
    "layer_statistics",
    "llama_config",
    "load_crate",
    "load_gguf",
    "load_hf",
    "load_hf_gpt",
    "logical_axes",
    "param_specs",
    "parameter_count",
    "replicated_specs",
    "resnet_config",
    "rope_tables",
    "save_crate",
    "save_hf",
    "text_classifier_config",
    "to_hf_config",
    "transform_llama",
    "unroll",
    "vision_language_param_specs",
    "vit_config",
]


def __getattr__(name: str) -> Any:
    """What stands on kernels comes when it is asked for: Pallas is slow to import."""
    if name in ("VisionLanguage", "vision_language_param_specs"):
        return getattr(importlib.import_module("sparsejax.models.vision_language"), name)
    raise AttributeError(f"module 'sparsejax.models' has no attribute {name!r}")
