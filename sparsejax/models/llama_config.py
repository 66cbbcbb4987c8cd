"""Sizes and settings of the LLaMA family, and the names of the published ones."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from sparsejax.models.decoding import DType

FeedForwardKind = Literal["gated", "relu", "spark", "block"]
RouterNorm = Literal["rms", "sum", "none"]


def require(condition: bool, message: str) -> None:
    """Raises a ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed to reach contexts beyond those of pre-training.

    kind: `"linear"` divides every frequency by `factor`; `"dynamic"` enlarges the base with the
        length of the sequence once that passes `original_max_seq_len` (NTK-aware); `"llama3"`
        divides the low frequencies alone, with a smooth band in between.
    factor: the ratio of the new context to the old, at least 1.
    low_freq_factor, high_freq_factor: edges of llama3's band, in turns per original context.
    original_max_seq_len: context of pre-training, in tokens; required by dynamic and llama3.

    Source: Chen et al., 2023 (linear); LLaMA 3.1 (llama3); dynamic and the names as in Hugging Face
    Transformers.
    """

    kind: Literal["linear", "dynamic", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int | None = None

    def __post_init__(self) -> None:
        kinds = ("linear", "dynamic", "llama3")
        require(self.kind in kinds, f"kind is {self.kind!r}; allowed are {', '.join(kinds)}.")
        require(self.factor >= 1, f"factor is {self.factor}; it must be at least 1.")
        require(
            self.kind == "linear" or (self.original_max_seq_len or 0) > 0,
            f"original_max_seq_len is {self.original_max_seq_len}; kind={self.kind!r} needs a "
            "positive number of tokens.",
        )
        require(
            0 < self.low_freq_factor < self.high_freq_factor,
            f"low_freq_factor is {self.low_freq_factor} and high_freq_factor is "
            f"{self.high_freq_factor}; both must be positive and the first the smaller.",
        )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Static description of a decoder; hashable, so it may be a static argument of `jit`.

    vocab_size, d_model, n_layers, n_heads, d_ff, max_seq_len: sizes; `max_seq_len` is the longest
        sequence that the model accepts, in tokens.
    n_kv_heads: key and value heads, a divisor of `n_heads`; None means `n_heads`. Read `kv_heads`.
    head_dim: width of a head, even; None means `d_model // n_heads`. Read `head_width`.
    rope_theta, rope_scaling: base of the rotary frequencies and what changes them.
    norm_eps: added to the mean square in every norm.
    tie_embeddings: the head is the transposed embedding.
    qkv_bias: biases on queries, keys and values (Qwen2); there are no others.
    sliding_window: each token sees itself and the `sliding_window - 1` before it (Mistral).
    embed_std: standard deviation of the initial embedding; matrices have `1 / sqrt(in)`.
    remat: the backward pass recomputes whole blocks from their inputs; without it, all but the
        outputs of the projections.
    dtype, param_dtype: of the activations and of the parameters. Softmax, statistics of the norms,
        rotation and logits are float32 whatever `dtype` is.
    positions: "learned" adds an embedding of the position instead of rotating (as GPT-2).
    ffn: "gated" multiplies `activation` of a gate and another projection, "relu" has one projection
        and a ReLU (Lazy Neuron), "spark" a predictor (Spark Transformer), "block" experts behind a
        router of ReLU and RMSNorm (BlockFFN). `d_ff` is the width of all neurons. `activation` is
        that of "gated"; "gelu" is the approximation by tanh.
    sparsity_pattern: of "gated": the share of neurons that statistical top-k switches off in each
        layer; 0 leaves the top-k out (Gemma 3n).
    ffn_k: neurons of a token: those of "spark", in expectation; the most that "relu" keeps.
    ffn_r: features that the predictor of "spark" reads; None means half. Read `ffn_split`.
    n_experts: of "block", of `d_ff / n_experts` neurons each.
    router_norm: of "block": what divides the gates, see `relu_rms_router`.
    attention: "spark" chooses about `attention_k` keys by the first `attention_r` features of a
        head (None: half; read `attention_split`), each part with rotations of its own.

    Raises ValueError for sizes that cannot be, naming the field.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    max_seq_len: int
    n_kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    sliding_window: int | None = None
    embed_std: float = 0.02
    remat: bool = False
    dtype: DType = "float32"
    param_dtype: DType = "float32"
    positions: Literal["rope", "learned"] = "rope"
    ffn: FeedForwardKind = "gated"
    activation: Literal["silu", "gelu"] = "silu"
    sparsity_pattern: tuple[float, ...] | None = None
    ffn_k: int | None = None
    ffn_r: int | None = None
    n_experts: int | None = None
    router_norm: RouterNorm = "rms"
    attention: Literal["dense", "spark"] = "dense"
    attention_k: int | None = None
    attention_r: int | None = None

    def __post_init__(self) -> None:
        optional = ("n_kv_heads", "head_dim", "sliding_window", "ffn_k", "ffn_r", "n_experts")
        optional += ("attention_k", "attention_r")
        sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "d_ff", "max_seq_len")
        for name in (*sizes, *optional):
            value = getattr(self, name)
            fits = (isinstance(value, int) and value > 0) or (value is None and name in optional)
            require(fits, f"{name} is {value!r}; it must be a positive integer.")
        for name in ("rope_theta", "norm_eps", "embed_std"):
            value = getattr(self, name)
            require(value > 0, f"{name} is {value}; it must be positive.")
        for name in ("dtype", "param_dtype"):
            value, allowed = getattr(self, name), ("float32", "bfloat16")
            require(value in allowed, f"{name} is {value!r}; allowed are {', '.join(allowed)}.")
        require(
            self.n_heads % self.kv_heads == 0,
            f"n_kv_heads is {self.n_kv_heads}; it must divide n_heads, which is {self.n_heads}.",
        )
        require(
            self.head_dim is not None or self.d_model % self.n_heads == 0,
            f"n_heads is {self.n_heads}; it must divide d_model, which is {self.d_model}, "
            "unless head_dim is given.",
        )
        require(
            self.positions == "learned" or self.head_width % 2 == 0,
            f"head_dim is {self.head_width}; it must be even, for rotary pairs.",
        )
        check_sparse_layers(self)

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def ffn_split(self) -> int:
        """Leading features that the predictor of a Spark FFN reads."""
        return self.d_model // 2 if self.ffn_r is None else self.ffn_r

    @property
    def attention_split(self) -> int:
        """Leading features of a head by which Spark attention chooses keys."""
        return self.head_width // 2 if self.attention_r is None else self.attention_r

    @property
    def rotary_widths(self) -> tuple[int, ...]:
        """Widths of the parts of a head that are rotated each by itself."""
        r, width = self.attention_split, self.head_width
        return (r, width - r) if self.attention == "spark" else (width,)


def check_sparse_layers(config: LlamaConfig) -> None:
    """Raises ValueError for settings of the sparse layers that cannot be, naming the field."""
    choices = {
        "positions": ("rope", "learned"),
        "ffn": ("gated", "relu", "spark", "block"),
        "activation": ("silu", "gelu"),
        "attention": ("dense", "spark"),
        "router_norm": ("rms", "sum", "none"),
    }
    for name, allowed in choices.items():
        value = getattr(config, name)
        require(value in allowed, f"{name} is {value!r}; allowed are {', '.join(allowed)}.")
    belongs = {
        "sparsity_pattern": ("ffn", ("gated",), ()),
        "ffn_k": ("ffn", ("relu", "spark"), ("spark",)),
        "ffn_r": ("ffn", ("spark",), ()),
        "n_experts": ("ffn", ("block",), ("block",)),
        "attention_k": ("attention", ("spark",), ("spark",)),
        "attention_r": ("attention", ("spark",), ()),
    }
    for name, (field, users, needing) in belongs.items():
        value, kind = getattr(config, name), getattr(config, field)
        require(
            value is None or kind in users,
            f"{name} is {value}; {field} is {kind!r}, and {' or '.join(map(repr, users))} uses it.",
        )
        require(value is not None or kind not in needing, f"{name} is None; {kind!r} needs it.")
    pattern = config.sparsity_pattern
    if pattern is not None:
        require(
            len(pattern) == config.n_layers and all(0 <= s < 1 for s in pattern),
            f"sparsity_pattern is {pattern}; it must be {config.n_layers} numbers in [0, 1).",
        )
    for name, split, width in (
        ("ffn_r", config.ffn_split, config.d_model),
        ("attention_r", config.attention_split, config.head_width),
    ):
        require(
            getattr(config, name) is None or split < width,
            f"{name} is {split}; it must be below the width, {width}.",
        )
    require(
        config.positions == "learned" or all(width % 2 == 0 for width in config.rotary_widths),
        f"attention_r is {config.attention_split} of {config.head_width}; both parts must be even, "
        "for rotary pairs.",
    )
    require(
        config.d_ff % (config.n_experts or 1) == 0,
        f"n_experts is {config.n_experts}; it must divide d_ff, which is {config.d_ff}.",
    )
    require(
        config.positions == "rope" or config.rope_scaling is None,
        f"rope_scaling is {config.rope_scaling}; positions are learned.",
    )


def _llama(vocab: int, d: int, layers: int, heads: tuple[int, int], ff: int, ctx: int, **options):
    return LlamaConfig(
        vocab, d, layers, heads[0], ff, max_seq_len=ctx, n_kv_heads=heads[1], **options
    )


_LLAMA32 = {
    "rope_theta": 5e5,
    "rope_scaling": RopeScaling("llama3", 32.0, original_max_seq_len=8192),
    "tie_embeddings": True,
}

_QWEN25 = {"rope_theta": 1e6, "norm_eps": 1e-6, "tie_embeddings": True, "qkv_bias": True}

LLAMA_SIZES: Mapping[str, LlamaConfig] = MappingProxyType(
    {
        "laptop": _llama(128, 96, 2, (4, 4), 256, 64),
        "1m": _llama(2048, 128, 4, (4, 4), 352, 256, tie_embeddings=True),
        "10m": _llama(8192, 320, 6, (5, 5), 864, 512, tie_embeddings=True),
        "60m": _llama(32000, 512, 8, (8, 8), 1376, 1024),
        "135m": _llama(49152, 576, 30, (9, 3), 1536, 8192, rope_theta=1e5, tie_embeddings=True),
        "350m": _llama(32000, 1024, 24, (16, 16), 2736, 1024),
        "tinyllama-1.1b": _llama(32000, 2048, 22, (32, 4), 5632, 2048),
        "llama-2-7b": _llama(32000, 4096, 32, (32, 32), 11008, 4096),
        "llama-2-13b": _llama(32000, 5120, 40, (40, 40), 13824, 4096),
        "llama-3-8b": _llama(128256, 4096, 32, (32, 8), 14336, 8192, rope_theta=5e5),
        "llama-3.2-1b": _llama(128256, 2048, 16, (32, 8), 8192, 131072, **_LLAMA32),
        "llama-3.2-3b": _llama(128256, 3072, 28, (24, 8), 8192, 131072, **_LLAMA32),
        "qwen2.5-0.5b": _llama(151936, 896, 24, (14, 2), 4864, 32768, **_QWEN25),
        "mistral-7b": _llama(32000, 4096, 32, (32, 8), 14336, 32768, sliding_window=4096),
    }
)
"""Named configurations. `laptop` has 0.25 M parameters, `1m` to `350m` are a ladder for scaling
studies (`135m` is SmolLM2-135M), and the rest are the published models of those names."""


def llama_config(name: str, **overrides) -> LlamaConfig:
    """The configuration called `name` in `LLAMA_SIZES`, with fields replaced by `overrides`.

    Raises ValueError for an unknown name, and as `LlamaConfig` does.

    >>> llama_config("laptop", n_layers=4).n_layers
    4
    """
    require(name in LLAMA_SIZES, f"name is {name!r}; known are {', '.join(LLAMA_SIZES)}.")
    return dataclasses.replace(LLAMA_SIZES[name], **overrides)


def parameter_count(config: LlamaConfig) -> int:
    """Number of parameters of `Llama(config)`; a tied head counts once."""
    d, width = config.d_model, config.head_width
    q, kv = config.n_heads * width, config.kv_heads * width
    bias = q + 2 * kv if config.qkv_bias else 0
    matrices = 3 if config.ffn == "gated" else 2
    router = (config.n_experts or 0) * (d + (config.router_norm == "rms"))
    block = 2 * d * (q + kv) + bias + matrices * d * config.d_ff + router + 2 * d
    vocabulary = config.vocab_size * d * (1 if config.tie_embeddings else 2)
    positions = config.max_seq_len * d if config.positions == "learned" else 0
    return vocabulary + positions + config.n_layers * block + d
