"""GGUF checkpoints of the llama architecture (LLaMA, Mistral, SmolLM2, ...) as a `Llama`.

Quantised weights come back as the float values that they stand for. Needs the extra `llm`.
"""

import math
import os
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sparsejax.models.decoding import DType
from sparsejax.models.gguf_file import GgufFile
from sparsejax.models.llama import DEFAULT_RULES, Llama
from sparsejax.models.llama_config import LlamaConfig, RopeScaling
from sparsejax.models.loading import CheckpointError, Rules, build_llama

_TOP = {
    "embed/embedding": "token_embd.weight",
    "norm/scale": "output_norm.weight",
    "head/kernel": "output.weight",
}
_BLOCK = {
    "attention/q_proj/kernel": "attn_q.weight",
    "attention/k_proj/kernel": "attn_k.weight",
    "attention/v_proj/kernel": "attn_v.weight",
    "attention/o_proj/kernel": "attn_output.weight",
    "ffn/gate_proj/kernel": "ffn_gate.weight",
    "ffn/up_proj/kernel": "ffn_up.weight",
    "ffn/down_proj/kernel": "ffn_down.weight",
    "attention_norm/scale": "attn_norm.weight",
    "ffn_norm/scale": "ffn_norm.weight",
}
_ROPE_FACTORS = "rope_freqs.weight"
_MOST = 2**31  # no size of a model is larger, and products of two stay exact


def load_gguf(
    path: str | os.PathLike[str],
    *,
    dtype: DType = "float32",
    param_dtype: DType = "float32",
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
) -> Llama:
    """Loads a GGUF file of the llama architecture.

    One tensor at a time is dequantised and laid onto its shard. Nothing in the file is trusted:
    sizes, counts and offsets are compared with the file's length first.

    path: of the file. dtype, param_dtype: of activations and parameters. mesh, rules: as in
        `param_specs`; None puts the model on one device.

    Raises CheckpointError with everything found wrong: no GGUF file, another architecture, missing,
    extra or misshapen tensors, metadata that disagrees with them, or values that are not finite.
    """
    file = GgufFile(path)
    config, problems = _config(file, dtype, param_dtype)
    if config is not None:
        problems += _check_tensors(file, config)
    if config is None or problems:
        raise CheckpointError(file.path, problems)
    heads = {"attn_q.weight": config.n_heads, "attn_k.weight": config.kv_heads}

    def fetch(name: str, layer: int | None) -> np.ndarray:
        if layer is None:
            values = file.read(_TOP[name])
        else:
            short = _BLOCK[name.removeprefix("blocks/")]
            values = file.read(f"blk.{layer}.{short}")
            if short in heads:
                values = _halves_from_pairs(values, heads[short])
        return values.T if name.endswith("/kernel") else values

    return build_llama(config, fetch, mesh=mesh, rules=rules)


def _halves_from_pairs(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys `[out, in]` from rotary pairs (2j, 2j + 1) to (j, j + half)."""
    return w.reshape(heads, -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


class _Metadata:
    """Typed look-ups that note what is wrong instead of raising."""

    def __init__(self, values: dict[str, Any]):
        self.values, self.problems = values, []

    def size(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _MOST:
            self.problems.append(f"{key} is {_shown(value)}; it must be a positive integer")
            return 1
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        if not plain or not math.isfinite(value) or value <= 0:
            self.problems.append(f"{key} is {_shown(value)}; it must be a positive number")
            return 1.0
        return float(str(np.float32(value)))  # 1e-5, which float32 holds as 9.99999975e-06


def _shown(value: Any) -> str:
    return "missing" if value is None else repr(value)[:60]


def _config(
    file: GgufFile, dtype: DType, param_dtype: DType
) -> tuple[LlamaConfig | None, list[str]]:
    """The configuration that the metadata describe, and what is wrong with them."""
    data, shapes = _Metadata(file.metadata), {n: t.shape for n, t in file.tensors.items()}
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        return None, [f"general.architecture is {_shown(architecture)}; only 'llama' is known"]
    heads = data.size("llama.attention.head_count")
    d_model = data.size("llama.embedding_length")
    width = data.size("llama.attention.key_length", max(1, d_model // heads))
    layers = data.size("llama.block_count")
    embedding = shapes.get("token_embd.weight", (1, 1))
    vocabulary = data.size("llama.vocab_size", embedding[0])
    settings = {
        "vocab_size": vocabulary,
        "d_model": d_model,
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": data.size("llama.attention.head_count_kv", heads),
        "d_ff": data.size("llama.feed_forward_length"),
        "max_seq_len": data.size("llama.context_length"),
        "head_dim": width,
        "rope_theta": data.number("llama.rope.freq_base", 10_000.0),
        "norm_eps": data.number("llama.attention.layer_norm_rms_epsilon"),
    }
    problems = data.problems
    if layers > len(file.tensors):  # before anything loops over the layers
        problems.append(f"llama.block_count is {layers}, of {len(file.tensors)} tensors in all")
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if file.metadata.get(key, width) != width:
            problems.append(f"{key} is {_shown(file.metadata[key])}; only {width} is supported")
    for key in ("llama.expert_count", "llama.attention.sliding_window"):
        if file.metadata.get(key):
            problems.append(f"{key} is {_shown(file.metadata[key])}; that is not supported")
    if problems:
        return None, problems
    try:
        scaling = _rope_scaling(file, settings["rope_theta"], width)
        config = LlamaConfig(
            **settings,
            rope_scaling=scaling,
            tie_embeddings="output.weight" not in shapes,
            dtype=dtype,
            param_dtype=param_dtype,
        )
    except ValueError as error:
        return None, [str(error)]
    return config, []


def _rope_scaling(file: GgufFile, theta: float, width: int) -> RopeScaling | None:
    kind = file.metadata.get("llama.rope.scaling.type", "none")
    if kind == "linear":
        data = _Metadata(file.metadata)
        factor = data.number("llama.rope.scaling.factor", 1.0)
        if data.problems:
            raise ValueError(data.problems[0])
        return RopeScaling("linear", factor)
    if kind != "none":
        raise ValueError(f"llama.rope.scaling.type is {_shown(kind)}; known are none and linear")
    if _ROPE_FACTORS not in file.tensors:
        return None
    # LLaMA 3.1 and later store the divisor of every frequency, all made from these settings.
    factors = file.read(_ROPE_FACTORS).reshape(-1)
    factor, original = float(factors.max(initial=0)), 8192
    if factors.shape == (width // 2,) and factor >= 1:
        turns = original * theta ** -(np.arange(0, width, 2) / width) / (2 * math.pi)
        kept = np.clip((turns - 1) / 3, 0, 1)
        if np.allclose(factors, 1 / (kept + (1 - kept) / factor), rtol=1e-3):
            return RopeScaling("llama3", factor, original_max_seq_len=original)
    raise ValueError(f"{_ROPE_FACTORS} is not LLaMA 3's scaling of rotary frequencies")


def _check_tensors(file: GgufFile, config: LlamaConfig) -> list[str]:
    d, width = config.d_model, config.head_width
    q, kv, ff = config.n_heads * width, config.kv_heads * width, config.d_ff
    expected: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (config.vocab_size, d),
        "output_norm.weight": (d,),
    }
    if not config.tie_embeddings:
        expected["output.weight"] = (config.vocab_size, d)
    if _ROPE_FACTORS in file.tensors:
        expected[_ROPE_FACTORS] = file.tensors[_ROPE_FACTORS].shape
    for i in range(config.n_layers):
        for short, shape in {
            "attn_q": (q, d),
            "attn_k": (kv, d),
            "attn_v": (kv, d),
            "attn_output": (d, q),
            "ffn_gate": (ff, d),
            "ffn_up": (ff, d),
            "ffn_down": (d, ff),
            "attn_norm": (d,),
            "ffn_norm": (d,),
        }.items():
            expected[f"blk.{i}.{short}.weight"] = shape
    problems = []
    for name in sorted(expected.keys() | file.tensors.keys()):
        if name not in file.tensors:
            problems.append(f"tensor {name!r} is missing")
        elif name not in expected:
            problems.append(f"tensor {name!r} has no place in this architecture")
        elif file.tensors[name].shape != expected[name]:
            found = file.tensors[name].shape
            problems.append(f"tensor {name!r} has shape {found}, the metadata say {expected[name]}")
    return problems
