"""The LLaMA family of decoders: LLaMA 2 and 3, TinyLlama, SmolLM2, Qwen2.5 and Mistral.

The blocks are one `DecoderBlock` whose parameters have a leading layer axis, run by `jax.lax.scan`,
so tracing and compilation cost the same at any depth. Every projection is a matrix `[in, out]`
(`[layers, in, out]` in the stack): the contracted axis, along which N:M groups run, is always -2.

Source: Touvron et al., "Llama 2", 2023; Grattafiori et al., "The Llama 3 Herd of Models", 2024;
Su et al., "RoFormer", 2021 (rotary embedding); Shazeer, "GLU Variants", 2020 (SwiGLU).
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from sparsejax.models.attention import causal_attention
from sparsejax.models.blocks import (
    decode_blocks,
    matrix_dot_general,
    put_block,
    run_blocks,
    take_block,
)
from sparsejax.models.decoding import DType, KVCache, check_cache, write_layer
from sparsejax.models.llama_config import LlamaConfig, require
from sparsejax.models.partition import Rules, axes_of, specs_of

Rope = tuple[Float[Array, "#b t half"], Float[Array, "#b t half"]]


def rope_tables(config: LlamaConfig, positions: Int[Array, "#b t"]) -> Rope:
    """Cosine and sine of the rotary angles, each float32 `[b, t, head_width / 2]`.

    Angle j of position p is `p * theta ** (-2 j / head_width)`, then scaled as
    `config.rope_scaling` says. For `"dynamic"` the length of the sequence is the largest position
    plus one, over the whole batch.

    Source: Su et al., 2021, equation 34, in the Hugging Face layout (pairs `j, j + head_width/2`).
    """
    width, scaling = config.head_width, config.rope_scaling
    exponents = np.arange(0, width, 2, dtype=np.float64) / width
    frequencies = config.rope_theta**-exponents
    growth = None
    if scaling is not None and scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling is not None and scaling.kind == "llama3":
        turns = cast(int, scaling.original_max_seq_len) * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    elif scaling is not None:
        original = cast(int, scaling.original_max_seq_len)
        length = jnp.maximum(jnp.max(positions) + 1, original).astype(jnp.float32)
        # A width of 2 has the one exponent 0, which no base changes.
        power = (-exponents * width / max(width - 2, 1)).astype(np.float32)
        growth = (scaling.factor * length / original - (scaling.factor - 1)) ** power
    angles = positions.astype(jnp.float32)[..., None] * frequencies.astype(np.float32)
    angles = angles if growth is None else angles * growth
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: Float[Array, "b t heads width"], rope: Rope) -> Float[Array, "b t heads width"]:
    cos, sin = (table[:, :, None, :] for table in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _kernel_init(key: PRNGKeyArray, shape: tuple[int, ...], dtype) -> Array:
    return jax.random.normal(key, shape, dtype) * jnp.asarray(shape[-2] ** -0.5, dtype)


class RMSNorm(nnx.Module):
    """`scale * x / sqrt(mean(x^2) + eps)` over the last axis, in float32 (Zhang, 2019)."""

    def __init__(self, width: int, *, eps: float = 1e-5, param_dtype: DType = "float32"):
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """The normalised `x`, in the dtype of `x`."""
        wide = x.astype(jnp.float32)
        inverse = lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * inverse * self.scale[...].astype(jnp.float32)).astype(x.dtype)


def _linear(config: LlamaConfig, size_in: int, size_out: int, rngs: nnx.Rngs, **options):
    return nnx.Linear(
        size_in,
        size_out,
        use_bias=options.pop("use_bias", False),
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=_kernel_init,
        dot_general=matrix_dot_general,
        rngs=rngs,
        **options,
    )


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions: `q_proj`, `k_proj`, `v_proj`, `o_proj`.

    Source: Ainslie et al., "GQA", 2023; Jiang et al., "Mistral 7B", 2023 (sliding window).
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        width, bias = config.head_width, config.qkv_bias
        wide, narrow = config.n_heads * width, config.kv_heads * width
        self.config = config
        self.q_proj = _linear(config, config.d_model, wide, rngs, use_bias=bias)
        self.k_proj = _linear(config, config.d_model, narrow, rngs, use_bias=bias)
        self.v_proj = _linear(config, config.d_model, narrow, rngs, use_bias=bias)
        self.o_proj = _linear(config, wide, config.d_model, rngs)

    def project(
        self, x: Float[Array, "b t d"], rope: Rope
    ) -> tuple[
        Float[Array, "b t heads width"],
        Float[Array, "b t kv_heads width"],
        Float[Array, "b t kv_heads width"],
    ]:
        """Rotated queries, rotated keys, and values."""
        q, k, v = (
            projection(x).reshape(*x.shape[:2], -1, self.config.head_width)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return _rotate(q, rope), _rotate(k, rope), v

    def __call__(self, x: Float[Array, "b t d"], rope: Rope) -> Float[Array, "b t d"]:
        """Attention among the tokens of `x`; `rope` as from `rope_tables`."""
        q, k, v = self.project(x, rope)
        order = jnp.arange(x.shape[1])
        out = causal_attention(q, k, v, order, self.config.sliding_window, aligned=True)
        return self.o_proj(out.reshape(*x.shape[:2], -1).astype(x.dtype))

    def decode(
        self, x: Float[Array, "b t d"], rope: Rope, cache: KVCache, layer: Int[Array, ""]
    ) -> tuple[Float[Array, "b t d"], KVCache]:
        """Attention of `x` to the cache of `layer` and itself; the cache with `x` written in."""
        q, k, v = self.project(x, rope)
        cache, k, v = write_layer(cache, layer, k, v)
        queries = cache.length + jnp.arange(x.shape[1], dtype=jnp.int32)
        k, v = k.astype(x.dtype), v.astype(x.dtype)
        out = causal_attention(q, k, v, queries, self.config.sliding_window, aligned=False)
        return self.o_proj(out.reshape(*x.shape[:2], -1).astype(x.dtype)), cache


class FeedForward(nnx.Module):
    """SwiGLU: `down_proj(silu(gate_proj(x)) * up_proj(x))`."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.gate_proj = _linear(config, config.d_model, config.d_ff, rngs)
        self.up_proj = _linear(config, config.d_model, config.d_ff, rngs)
        self.down_proj = _linear(config, config.d_ff, config.d_model, rngs)

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """The block's second residual branch."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderBlock(nnx.Module):
    """Pre-norm residual block: attention, then feed-forward."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        norm = {"eps": config.norm_eps, "param_dtype": config.param_dtype}
        self.config = config
        self.attention_norm = RMSNorm(config.d_model, **norm)
        self.attention = Attention(config, rngs=rngs)
        self.ffn_norm = RMSNorm(config.d_model, **norm)
        self.ffn = FeedForward(config, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"], rope: Rope | None = None) -> Float[Array, "b t d"]:
        """The residual stream after this block; `rope` defaults to positions `0 .. t - 1`."""
        if rope is None:
            rope = rope_tables(self.config, jnp.arange(x.shape[1])[None])
        x = x + self.attention(self.attention_norm(x), rope)
        return x + self.ffn(self.ffn_norm(x))

    def decode(
        self, x: Float[Array, "b t d"], rope: Rope, cache: KVCache, layer: Int[Array, ""]
    ) -> tuple[Float[Array, "b t d"], KVCache]:
        """As `__call__`, reading and writing the cache of `layer`."""
        attended, cache = self.attention.decode(self.attention_norm(x), rope, cache, layer)
        x = x + attended
        return x + self.ffn(self.ffn_norm(x)), cache


class Llama(nnx.Module):
    """A decoder-only language model; `nnx.split` gives a graph and exactly its parameters.

    Paths: `embed/embedding [vocab, d]`, `blocks/attention/q_proj/kernel [layers, in, out]` and so
    on, `norm/scale [d]`, and `head/kernel [d, vocab]` unless the embeddings are tied.
    Call it under `jit`: outside, the loop over the blocks is compiled anew at every call.

    >>> from sparsejax.models import llama_config
    >>> model = Llama(llama_config("laptop"), rngs=nnx.Rngs(0))
    >>> graphdef, params = nnx.split(model)
    >>> nnx.merge(graphdef, params)(jnp.zeros((1, 8), jnp.int32)).shape
    (1, 8, 128)
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.n_layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> DecoderBlock:
            return DecoderBlock(config, rngs=rngs)

        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size,
            config.d_model,
            param_dtype=jnp.dtype(config.param_dtype),
            embedding_init=nnx.initializers.normal(config.embed_std),
            rngs=rngs,
        )
        self.blocks = stack(rngs)
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps, param_dtype=config.param_dtype)
        if not config.tie_embeddings:
            self.head = _linear(
                config,
                config.d_model,
                config.vocab_size,
                rngs,
                preferred_element_type=jnp.float32,
            )

    def __call__(
        self, tokens: Int[Array, "b t"], *, positions: Int[Array, "#b t"] | None = None
    ) -> Float[Array, "b t v"]:
        """Logits of the next token, float32.

        positions: rotary positions, `0 .. t - 1` by default; who sees whom follows the order of
        `tokens` whatever they are. A token outside the vocabulary gives NaN.
        Raises ValueError if `t` exceeds `max_seq_len`. Differentiable in the parameters.
        """
        return self.logits(self.hidden(tokens, positions=positions))

    def hidden(
        self, tokens: Int[Array, "b t"], *, positions: Int[Array, "#b t"] | None = None
    ) -> Float[Array, "b t d"]:
        """The residual stream after the last norm, in `config.dtype`; arguments as `__call__`."""
        limit = self.config.max_seq_len
        require(
            tokens.shape[1] <= limit,
            f"tokens has {tokens.shape[1]} positions; max_seq_len allows {limit}.",
        )
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        rope = rope_tables(self.config, positions)
        x = run_blocks(self.blocks, self.embedded(tokens), rope, remat=self.config.remat)
        return self.norm(x)

    def embedded(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """The embeddings of `tokens` in `config.dtype`: what the first block reads."""
        return self.embed(tokens).astype(self.config.dtype)

    def logits(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Logits of a normed residual stream, float32."""
        if not self.config.tie_embeddings:
            return self.head(hidden)
        table = self.embed.embedding[...].astype(hidden.dtype)
        return matrix_dot_general(hidden, table.T, preferred_element_type=jnp.float32)

    def decode(
        self, tokens: Int[Array, "b t"], cache: KVCache, *, last_only: bool = False
    ) -> tuple[Float[Array, "b n v"], KVCache]:
        """Logits of `tokens` as the continuation of what `cache` holds, and the cache after them.

        The same call prefills and steps. last_only: compute the logits of the last token alone
        (`n = 1`; otherwise `n = t`), which a long prompt wants.
        The logits equal those of a full forward pass, with one exception: `"dynamic"` RoPE scaling
        beyond its original length, where cached keys keep the rotation of their time.
        Raises ValueError if the cache does not fit model or batch, or is too short. A length that
        is traced cannot be compared: there, an overflow turns all the logits into NaN.
        """
        check_cache(cache, self.config, tokens.shape)
        room, end = cache.k.shape[2], cache.length + tokens.shape[1]
        positions = cache.length + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        rope = rope_tables(self.config, positions)
        x, cache = decode_blocks(self.blocks, self.embedded(tokens), cache, rope)
        x = jnp.where(end > room, jnp.nan, x[:, -1:] if last_only else x)
        return self.logits(self.norm(x)), cache._replace(length=end)

    def block(self, i: int) -> DecoderBlock:
        """A standalone copy of block `i`. Raises ValueError if there is none."""
        return take_block(self.blocks, i, self.config.n_layers)

    def set_block(self, i: int, block: DecoderBlock) -> None:
        """Writes the parameters of `block` into block `i`. Raises ValueError if there is none."""
        put_block(self.blocks, i, block, self.config.n_layers)


LOGICAL_AXES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "embed/embedding": ("vocab", "embed"),
        "head/kernel": ("embed", "vocab"),
        "q_proj/kernel": ("embed", "heads"),
        "o_proj/kernel": ("heads", "embed"),
        "down_proj/kernel": ("mlp", "embed"),
        "q_proj/bias": ("heads",),
        **{f"{name}/kernel": ("embed", "kv") for name in ("k_proj", "v_proj")},
        **{f"{name}/bias": ("kv",) for name in ("k_proj", "v_proj")},
        **{f"{name}/kernel": ("embed", "mlp") for name in ("gate_proj", "up_proj")},
        **{f"{name}/scale": ("embed",) for name in ("norm", "attention_norm", "ffn_norm")},
        # Of Gpt alone:
        "positions/embedding": ("positions", "embed"),
        "up_proj/bias": ("mlp",),
        **{f"{name}/bias": ("embed",) for name in ("o_proj", "down_proj")},
        **{f"{name}/bias": ("embed",) for name in ("norm", "attention_norm", "ffn_norm")},
    }
)
"""What each axis of a parameter means, by the end of its path; the stack puts `layers` in front."""
_OWNER = "Llama and Gpt"

DEFAULT_RULES: Mapping[str, str | None] = MappingProxyType(
    {"vocab": "model", "heads": "model", "mlp": "model"}
)
"""Logical axis to mesh axis, as tensor parallelism wants it; the rest is replicated."""


def logical_axes(path: str, ndim: int) -> tuple[str, ...]:
    """Names of the axes of the parameter at `path`, for example `("layers", "embed", "heads")`.

    Only the last two parts of `path` count. Raises ValueError if neither `Llama` nor `Gpt` has such
    a parameter or it has neither `ndim` axes nor, without the layer axis, one fewer.
    """
    return axes_of(path, ndim, LOGICAL_AXES, _OWNER)


def param_specs(params: PyTree, rules: Rules = DEFAULT_RULES) -> PyTree:
    """The PartitionSpec of every leaf, in the structure of `params`.

    params: `nnx.split(model)[1]`, its abstract twin, or any tree whose paths end as the
        parameters' do: a mask tree, one block, the state of an Adam. Scalars are replicated.
    rules: logical axis (`vocab, positions, embed, heads, kv, mlp, layers`) to mesh axis or axes.

    Raises ValueError for an unknown logical axis or parameter.

    >>> from jax.sharding import PartitionSpec
    >>> specs = param_specs({"up_proj": {"kernel": jnp.ones((2, 4, 8))}})  # [layers, in, out]
    >>> specs["up_proj"]["kernel"] == PartitionSpec(None, None, "model")
    True
    """
    return specs_of(params, rules, LOGICAL_AXES, _OWNER)
