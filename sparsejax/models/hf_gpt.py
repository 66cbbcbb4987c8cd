"""Checkpoints of GPT-2: config.json to `GptConfig` and back, and tensors.

Queries, keys and values are the three parts of one tensor there, and matrices are `[in, out]`.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from sparsejax.models.decoding import DType
from sparsejax.models.gpt_config import GptConfig
from sparsejax.models.hf_fields import MOST_POSITIONS, Fields
from sparsejax.models.hf_layout import Layout, Source
from sparsejax.models.loading import CheckpointError

GPT_ARCHITECTURE = "GPT2LMHeadModel"

# Each would change what the model computes.
_ABSENT = (
    "add_cross_attention",
    "compression_config",
    "is_encoder_decoder",
    "pruned_heads",
    "quantization_config",
    "scale_attn_by_inverse_layer_idx",
)


def read_gpt(config: Mapping[str, Any], dtype: DType, param_dtype: DType) -> GptConfig:
    """The `GptConfig` of a config.json; see `hf_config`."""
    fields = Fields(config, [])
    sizes = {
        "vocab_size": fields.size("vocab_size"),
        "d_model": fields.size("n_embd"),
        "n_layers": fields.size("n_layer"),
        "n_heads": fields.size("n_head"),
        "max_seq_len": fields.size("n_positions", 1024, MOST_POSITIONS),
        "d_ff": None if fields.get("n_inner") is None else fields.size("n_inner"),
    }
    eps = fields.number("layer_norm_epsilon", 1e-5)
    if not fields.problems and sizes["d_model"] % sizes["n_heads"]:
        fields.refuse("n_head", f"it must divide n_embd = {sizes['d_model']}")
    if fields.get("model_type") not in (None, "gpt2"):
        fields.refuse("model_type", f"{GPT_ARCHITECTURE} has 'gpt2'")
    if fields.get("activation_function") not in (None, "gelu_new", "gelu_pytorch_tanh"):
        fields.refuse("activation_function", "only 'gelu_new' is supported")
    for present in ("is_causal", "scale_attn_weights", "tie_word_embeddings"):
        if fields.get(present) not in (None, True):
            fields.refuse(present)
    for absent in _ABSENT:
        if fields.get(absent):
            fields.refuse(absent)
    if fields.problems:
        raise CheckpointError("config.json", fields.problems)
    return GptConfig(**sizes, norm_eps=eps, dtype=dtype, param_dtype=param_dtype)


def write_gpt(config: GptConfig) -> dict[str, Any]:
    """The config.json of a `Gpt`; see `to_hf_config`."""
    return {
        "architectures": [GPT_ARCHITECTURE],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_positions": config.max_seq_len,
        "n_inner": config.d_ff,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": True,
    }


def gpt_layout(config: GptConfig, names: Collection[str] = ()) -> Layout:
    """The layout of GPT2LMHeadModel; the published files leave out its prefix `transformer.`."""
    prefix = "" if "wte.weight" in names else "transformer."
    d, ff, layer = config.d_model, config.ff_width, f"{prefix}h.{{}}."
    sources = {
        "embed/embedding": Source(f"{prefix}wte.weight", (config.vocab_size, d)),
        "positions/embedding": Source(f"{prefix}wpe.weight", (config.max_seq_len, d)),
    }
    norms = {
        "norm": f"{prefix}ln_f",
        "blocks/attention_norm": f"{layer}ln_1",
        "blocks/ffn_norm": f"{layer}ln_2",
    }
    for path, name in norms.items():
        sources[f"{path}/scale"] = Source(f"{name}.weight", (d,))
        sources[f"{path}/bias"] = Source(f"{name}.bias", (d,))
    for i, path in enumerate(("q_proj", "k_proj", "v_proj")):
        name, part = f"{layer}attn.c_attn", (i * d, (i + 1) * d)
        at = f"blocks/attention/{path}"
        sources[f"{at}/kernel"] = Source(f"{name}.weight", (d, 3 * d), columns=part)
        sources[f"{at}/bias"] = Source(f"{name}.bias", (3 * d,), columns=part)
    projections = {
        "attention/o_proj": ("attn.c_proj", d, d),
        "ffn/up_proj": ("mlp.c_fc", d, ff),
        "ffn/down_proj": ("mlp.c_proj", ff, d),
    }
    for path, (name, size_in, size_out) in projections.items():
        sources[f"blocks/{path}/kernel"] = Source(f"{layer}{name}.weight", (size_in, size_out))
        sources[f"blocks/{path}/bias"] = Source(f"{layer}{name}.bias", (size_out,))
    # The published files hold the causal mask, once a layer.
    masks = re.compile(rf"{re.escape(prefix)}h\.[0-9]+\.attn\.(masked_)?bias")
    return Layout(sources, config.n_layers, masks, {"lm_head.weight": f"{prefix}wte.weight"})
