"""Checkpoints of LLaMA, Qwen2 and Mistral: config.json to `LlamaConfig` and back, and tensors.

What a configuration asks for and `Llama` does not have is refused by name. Settings that change no
output of a finished model (dropout, initialisation, caches) are not looked at.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, cast

from sparsejax.core.untrusted import is_size, listed, shown
from sparsejax.models.decoding import DType
from sparsejax.models.hf_fields import MOST_POSITIONS, Fields, architecture
from sparsejax.models.hf_layout import Layout, Source
from sparsejax.models.llama_config import LlamaConfig, RopeScaling
from sparsejax.models.loading import CheckpointError


@dataclasses.dataclass(frozen=True)
class _Family:
    """What Transformers assumes of an architecture where config.json is silent."""

    model_type: str
    max_seq_len: int
    kv_heads: int | None
    sliding_window: int | None


_FAMILIES = {
    "LlamaForCausalLM": _Family("llama", 2048, None, None),
    "Qwen2ForCausalLM": _Family("qwen2", 32768, 32, 4096),
    "MistralForCausalLM": _Family("mistral", 131072, 8, 4096),
}
LLAMA_ARCHITECTURES = tuple(_FAMILIES)

# Each would change what the model computes.
_ABSENT = (
    "add_cross_attention",
    "compression_config",
    "is_encoder_decoder",
    "mlp_bias",
    "pruned_heads",
    "quantization_config",
    "rope_interleaved",
)
_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
}


def read_llama(config: Mapping[str, Any], dtype: DType, param_dtype: DType) -> LlamaConfig:
    """The `LlamaConfig` of a config.json; see `hf_config`."""
    name = architecture(config, LLAMA_ARCHITECTURES)
    family, fields = _FAMILIES[name], Fields(config, [])
    heads = fields.size("num_attention_heads")
    sizes = {
        "vocab_size": fields.size("vocab_size"),
        "d_model": fields.size("hidden_size"),
        "n_layers": fields.size("num_hidden_layers"),
        "n_heads": heads,
        "d_ff": fields.size("intermediate_size"),
        "n_kv_heads": fields.size("num_key_value_heads", family.kv_heads or heads),
        "head_dim": None if fields.get("head_dim") is None else fields.size("head_dim"),
    }
    if not fields.problems:
        _check_heads(sizes, fields.problems)
    length = fields.size("max_position_embeddings", family.max_seq_len, MOST_POSITIONS)
    theta, scaling = _rope(fields, length)
    if scaling is not None and scaling.kind == "dynamic":
        length = int(scaling.factor * length)
        if length > MOST_POSITIONS:
            fields.problems.append(f"factor of rope_scaling makes {length} positions")
    rest = {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_seq_len": length,
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "tie_embeddings": fields.flag("tie_word_embeddings"),
        "qkv_bias": name == "Qwen2ForCausalLM",
        "sliding_window": _window(name, fields, sizes["n_layers"]),
    }
    _check_features(name, fields)
    if fields.problems:
        raise CheckpointError("config.json", fields.problems)
    return LlamaConfig(**sizes, **rest, dtype=dtype, param_dtype=param_dtype)


def _check_heads(sizes: Mapping[str, Any], problems: list[str]) -> None:
    heads, kv, width = sizes["n_heads"], sizes["n_kv_heads"], sizes["head_dim"]
    if heads % kv:
        problems.append(
            f"num_key_value_heads is {kv}; it must divide num_attention_heads = {heads}"
        )
    if width is None and sizes["d_model"] % heads:
        problems.append(
            f"num_attention_heads is {heads}; it must divide hidden_size = {sizes['d_model']}"
        )
    elif (width or sizes["d_model"] // heads) % 2:
        problems.append(f"head_dim is {width or sizes['d_model'] // heads}; it must be even")


def _check_features(name: str, fields: Fields) -> None:
    expected = _FAMILIES[name].model_type
    if fields.get("model_type") not in (None, expected):
        fields.refuse("model_type", f"{name} has {expected!r}")
    if fields.get("hidden_act") not in (None, "silu", "swish"):
        fields.refuse("hidden_act", "only 'silu' is supported")
    # Qwen2's biases are not a matter of configuration.
    if name != "Qwen2ForCausalLM" and fields.flag("attention_bias"):
        fields.refuse("attention_bias", "a bias on o_proj is not supported")
    if fields.get("is_causal") not in (None, True):
        fields.refuse("is_causal")
    for absent in _ABSENT:
        if fields.get(absent):
            fields.refuse(absent)


def _window(name: str, fields: Fields, n_layers: int) -> int | None:
    """The sliding window, which must be the same in all layers."""
    window = None
    given = fields.has("sliding_window")
    if name == "MistralForCausalLM" and not (given and fields.get("sliding_window") is None):
        window = fields.size("sliding_window", _FAMILIES[name].sliding_window)
    kinds = fields.get("layer_types")
    if name == "Qwen2ForCausalLM" and fields.flag("use_sliding_window"):
        window = fields.size("sliding_window", None if given else _FAMILIES[name].sliding_window)
        first = fields.get("max_window_layers")
        first = 28 if first is None else first
        if not is_size(first, 0):
            fields.refuse("max_window_layers", "it must be an integer that is not negative")
        elif kinds is None and 0 < first < n_layers:
            fields.refuse("max_window_layers", "layers of different kinds are not supported")
        elif (first >= n_layers) if kinds is None else not _all_are(kinds, "sliding_attention"):
            window = None
    expected = "full_attention" if window is None else "sliding_attention"
    if kinds is not None and not (_all_are(kinds, expected) and len(kinds) == n_layers):
        fields.refuse("layer_types", f"it must be {n_layers} times {expected!r}")
    return window


def _all_are(kinds: object, kind: str) -> bool:
    return isinstance(kinds, list) and all(each == kind for each in kinds)


def _rope(fields: Fields, length: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary positions, from either layout or both if they agree."""
    old, new = fields.get("rope_scaling") or {}, fields.get("rope_parameters") or {}
    for name, value in (("rope_scaling", old), ("rope_parameters", new)):
        if not isinstance(value, dict):
            fields.refuse(name, "it must be an object")
            return 1.0, None
    theta = fields.number("rope_theta", 10_000.0)
    wheres = [("rope_scaling", old)] if old or not new else []
    wheres += [("rope_parameters", new)] if new else []
    found = [_rope_object(fields, where, value, theta, length) for where, value in wheres]
    if fields.has("rope_theta") and any(base != theta for base, _ in found):
        fields.refuse("rope_theta", "another rope_theta contradicts it")
    if found[0] != found[-1]:
        fields.refuse("rope_scaling", "rope_parameters contradicts it")
    return found[0]


def _rope_object(
    fields: Fields, where: str, rope: dict[str, Any], theta: float, length: int
) -> tuple[float, RopeScaling | None]:
    problems: list[str] = []
    inner = Fields(rope, problems)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        problems.append(f"rope_type is {shown(kind)}; allowed are {', '.join(_ROPE_KEYS)}")
        kind = "default"
    else:
        known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE_KEYS[kind]}
        if unknown := sorted(set(rope) - known):
            problems.append(f"rope_type {kind!r} has no {listed(unknown)}")
    for part in (fields, inner):
        if part.get("partial_rotary_factor") not in (None, 1, 1.0):
            part.refuse("partial_rotary_factor")
    theta, scaling = inner.number("rope_theta", theta), None
    if kind != "default":
        options = {"factor": inner.number("factor")}
        if options["factor"] < 1:
            inner.refuse("factor", "it must be at least 1")
        if kind == "llama3":
            options["low_freq_factor"] = low = inner.number("low_freq_factor")
            options["high_freq_factor"] = high = inner.number("high_freq_factor")
            # Transformers prefers the entry of the whole configuration where there is one.
            holder = inner if fields.get("original_max_position_embeddings") is None else fields
            length = holder.size("original_max_position_embeddings", length, MOST_POSITIONS)
            if not problems and not low < high:
                problems.append(
                    f"low_freq_factor is {low}; it must be below high_freq_factor = {high}"
                )
        if not problems:
            original = None if kind == "linear" else length
            scaling = RopeScaling(cast(Any, kind), **options, original_max_seq_len=original)
    fields.problems += [f"{where}: {problem}" for problem in problems]
    return theta, scaling


def write_llama(config: LlamaConfig) -> dict[str, Any]:
    """The config.json of a `Llama`; see `to_hf_config`."""
    # Transformers' LLaMA wants heads that divide the width, whatever head_dim is.
    narrow = config.sliding_window is not None or config.d_model % config.n_heads != 0
    name = "MistralForCausalLM" if narrow else "LlamaForCausalLM"
    name = "Qwen2ForCausalLM" if config.qkv_bias else name
    scaling, length = config.rope_scaling, config.max_seq_len
    if scaling is not None and scaling.kind == "dynamic":
        length = scaling.original_max_seq_len
    out = {
        "architectures": [name],
        "model_type": _FAMILIES[name].model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else _rope_json(scaling, old=True),
        "rope_parameters": {
            "rope_theta": config.rope_theta,
            **({"rope_type": "default"} if scaling is None else _rope_json(scaling, old=False)),
        },
        "tie_word_embeddings": config.tie_embeddings,
        "sliding_window": config.sliding_window,
    }
    if name == "LlamaForCausalLM":
        del out["sliding_window"]
        out |= {"attention_bias": False, "mlp_bias": False}
    if name == "Qwen2ForCausalLM":
        windowed = config.sliding_window is not None
        kind = "sliding_attention" if windowed else "full_attention"
        out |= {
            "use_sliding_window": windowed,
            "max_window_layers": 0 if windowed else config.n_layers,
            "layer_types": [kind] * config.n_layers,
        }
    return out


def _rope_json(scaling: RopeScaling, old: bool) -> dict[str, Any]:
    # Early versions knew linear and dynamic, and just these two entries of them.
    kind = "type" if old and scaling.kind != "llama3" else "rope_type"
    out: dict[str, Any] = {kind: scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        out |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
    return out


def llama_layout(config: LlamaConfig) -> Layout:
    """The layout of LlamaForCausalLM, which Qwen2ForCausalLM and MistralForCausalLM share."""
    d, ff, vocab = config.d_model, config.d_ff, config.vocab_size
    q, kv = config.n_heads * config.head_width, config.kv_heads * config.head_width
    layer = "model.layers.{}."
    projections = {
        "attention/q_proj": ("self_attn.q_proj", d, q),
        "attention/k_proj": ("self_attn.k_proj", d, kv),
        "attention/v_proj": ("self_attn.v_proj", d, kv),
        "attention/o_proj": ("self_attn.o_proj", q, d),
        "ffn/gate_proj": ("mlp.gate_proj", d, ff),
        "ffn/up_proj": ("mlp.up_proj", d, ff),
        "ffn/down_proj": ("mlp.down_proj", ff, d),
    }
    norms = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    sources = {
        "embed/embedding": Source("model.embed_tokens.weight", (vocab, d)),
        "norm/scale": Source("model.norm.weight", (d,)),
    }
    for path, name in norms.items():
        sources[f"blocks/{path}/scale"] = Source(f"{layer}{name}.weight", (d,))
    for path, (name, size_in, size_out) in projections.items():
        kernel = Source(f"{layer}{name}.weight", (size_out, size_in), transposed=True)
        sources[f"blocks/{path}/kernel"] = kernel
        if config.qkv_bias and path[-6:] in ("q_proj", "k_proj", "v_proj"):
            sources[f"blocks/{path}/bias"] = Source(f"{layer}{name}.bias", (size_out,))
    copies = {"lm_head.weight": "model.embed_tokens.weight"}
    if not config.tie_embeddings:
        sources["head/kernel"] = Source("lm_head.weight", (vocab, d), transposed=True)
        copies = {}
    # Checkpoints of LLaMA 2 hold the rotary frequencies, which the configuration says as well.
    frequencies = re.compile(r"model\.layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq")
    return Layout(sources, config.n_layers, frequencies, copies)
