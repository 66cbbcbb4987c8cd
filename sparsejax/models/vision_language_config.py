"""Sizes of a vision-language decoder, and how its prompt is pruned."""

import dataclasses
from typing import Literal

from jaxtyping import Array, Bool, Int

from sparsejax.models.config_checks import require_choice, require_sizes
from sparsejax.models.decoding import DType
from sparsejax.models.llama_config import LlamaConfig, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionLanguageConfig:
    """Static description of a `VisionLanguage`; hashable.

    vision_tokens, patch_inputs: image tokens of a sample, and numbers in each.
    prefix: text tokens before the image.
    vocab_size, markers: text tokens and markers that there are; a marker is an embedding that is
        added to a token of either kind.
    outputs: classes of the head; None means `vocab_size`. Read `head_outputs`.
    d_model, n_layers, n_heads, n_kv_heads, d_ff, rope_theta, norm_eps, embed_std, dtype,
        param_dtype: as in `LlamaConfig`.
    max_seq_len: the most tokens of a prompt and its continuation.
    rotary: rotate queries and keys by their positions; without it order counts for masks alone.
    image_attention: `"causal"`, or `"full"`: image tokens see all image tokens.
    blind_layers: so many first layers in which text sees no image.

    Raises ValueError for sizes that cannot be, naming the field.
    """

    vision_tokens: int
    patch_inputs: int
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    max_seq_len: int
    n_kv_heads: int | None = None
    prefix: int = 0
    markers: int = 0
    outputs: int | None = None
    rotary: bool = True
    image_attention: Literal["causal", "full"] = "causal"
    blind_layers: int = 0
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    embed_std: float = 0.02
    dtype: DType = "float32"
    param_dtype: DType = "float32"

    def __post_init__(self) -> None:
        require_sizes(self, "vision_tokens", "patch_inputs", "head_outputs")
        require_choice(self, "image_attention", ("causal", "full"))
        for name in ("prefix", "markers", "blind_layers"):
            value = getattr(self, name)
            require(value >= 0, f"{name} is {value}; it must not be negative.")
        least = self.prefix + self.vision_tokens
        require(
            self.decoder.max_seq_len > least,
            f"max_seq_len is {self.max_seq_len}; prefix and image take {least}, and text follows.",
        )

    @property
    def decoder(self) -> LlamaConfig:
        """The blocks as those of a `Llama`, with its checks."""
        shared = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(LlamaConfig)
            if hasattr(self, field.name)
        }
        # whose attention rotates nothing where positions are learned
        return LlamaConfig(**shared, positions="rope" if self.rotary else "learned")

    @property
    def head_outputs(self) -> int:
        """Logits that the head gives for a token."""
        return self.vocab_size if self.outputs is None else self.outputs

    def is_image(self, positions: Int[Array, "*s"]) -> Bool[Array, "*s"]:
        """Whether the tokens at these positions are of the image."""
        return (positions >= self.prefix) & (positions < self.prefix + self.vision_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoreMatching:
    """How a prompt is pruned.

    rho, beta: of `core_neurons`.
    reference, token: of `reference_set`; None is the fifth token from the end. on_flat, capacity:
        of `core_tokens`. Without a capacity tokens are masked and keep their places; with one they
        are dropped: later layers and the cache have `capacity` places for a prompt.
    mode: `"drop_after"`, tokens are chosen after layer `select_layer` for all later layers and for
        the cache of every layer; or `"mask_cache"`, as in the released code: each layer of `layers`
        chooses for its own cache, and all tokens pass through all layers.
    layers: first layer and the one behind the last, those whose neurons (and, for `"mask_cache"`,
        tokens) are pruned; None for all.

    Source: CoreMatching; defaults are those of its code, but for `select_layer` and `layers`.
    """

    rho: float = 0.2
    beta: float = 0.4
    select_layer: int = 5
    layers: tuple[int, int] | None = None
    reference: Literal["token", "core_neurons"] = "token"
    token: int | None = None
    on_flat: Literal["none", "all"] = "none"
    mode: Literal["drop_after", "mask_cache"] = "drop_after"
    capacity: int | None = None

    def __post_init__(self) -> None:
        require_choice(self, "mode", ("drop_after", "mask_cache"))

    def places(self, n_layers: int) -> tuple[range, range]:
        """The layers whose neurons are pruned, and those that choose tokens.

        Raises ValueError if the model has no such layers.
        """
        first, stop = (0, n_layers) if self.layers is None else self.layers
        require(
            0 <= first < stop <= n_layers,
            f"layers is {self.layers}; it must be a part of 0 to {n_layers}.",
        )
        pruned, last = range(first, stop), n_layers - 1
        if self.mode == "mask_cache":
            return pruned, pruned
        require(
            0 <= self.select_layer <= last,
            f"select_layer is {self.select_layer}; this model has layers 0 to {last}.",
        )
        return pruned, range(self.select_layer, self.select_layer + 1)
