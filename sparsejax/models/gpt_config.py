"""Sizes and settings of the GPT-2 family, and the names of the published ones."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from sparsejax.models.decoding import DType
from sparsejax.models.llama_config import require


@dataclasses.dataclass(frozen=True)
class GptConfig:
    """Static description of a GPT-2; hashable, so it may be a static argument of `jit`.

    vocab_size, d_model, n_layers, n_heads, max_seq_len: sizes; `max_seq_len` is the number of
        learned positions, hence the longest sequence that the model accepts, in tokens.
    d_ff: width of the feed-forward layer; None means `4 * d_model`. Read `ff_width`.
    norm_eps: added to the variance in every norm.
    init_std: standard deviation of initial embeddings and matrices; those that write to the
        residual stream have `init_std / sqrt(2 * n_layers)`.
    remat: the backward pass recomputes whole blocks from their inputs; without it, all but the
        outputs of the projections.
    dtype, param_dtype: of the activations and of the parameters. Softmax, statistics of the norms
        and logits are float32 whatever `dtype` is.

    Raises ValueError for sizes that cannot be, naming the field.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    max_seq_len: int
    d_ff: int | None = None
    norm_eps: float = 1e-5
    init_std: float = 0.02
    remat: bool = False
    dtype: DType = "float32"
    param_dtype: DType = "float32"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "max_seq_len", "d_ff"):
            value = getattr(self, name)
            fits = (isinstance(value, int) and value > 0) or (value is None and name == "d_ff")
            require(fits, f"{name} is {value!r}; it must be a positive integer.")
        for name in ("norm_eps", "init_std"):
            value = getattr(self, name)
            require(value > 0, f"{name} is {value}; it must be positive.")
        for name in ("dtype", "param_dtype"):
            value, allowed = getattr(self, name), ("float32", "bfloat16")
            require(value in allowed, f"{name} is {value!r}; allowed are {', '.join(allowed)}.")
        require(
            self.d_model % self.n_heads == 0,
            f"n_heads is {self.n_heads}; it must divide d_model, which is {self.d_model}.",
        )

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads: every head has its own."""
        return self.n_heads

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.d_model // self.n_heads

    @property
    def ff_width(self) -> int:
        """Width of the feed-forward layer."""
        return 4 * self.d_model if self.d_ff is None else self.d_ff


def _gpt2(d_model: int, n_layers: int, n_heads: int) -> GptConfig:
    return GptConfig(50257, d_model, n_layers, n_heads, 1024)


GPT_SIZES: Mapping[str, GptConfig] = MappingProxyType(
    {
        "laptop": GptConfig(128, 96, 2, 4, 64),
        "gpt2": _gpt2(768, 12, 12),
        "gpt2-medium": _gpt2(1024, 24, 16),
        "gpt2-large": _gpt2(1280, 36, 20),
        "gpt2-xl": _gpt2(1600, 48, 25),
    }
)
"""Named configurations: `laptop` has 0.24 M parameters, the rest are the published models."""


def gpt_config(name: str, **overrides) -> GptConfig:
    """The configuration called `name` in `GPT_SIZES`, with fields replaced by `overrides`.

    Raises ValueError for an unknown name, and as `GptConfig` does.

    >>> gpt_config("laptop", n_layers=4).n_layers
    4
    """
    require(name in GPT_SIZES, f"name is {name!r}; known are {', '.join(GPT_SIZES)}.")
    return dataclasses.replace(GPT_SIZES[name], **overrides)
