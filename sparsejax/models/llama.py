"""The LLaMA family of decoders: LLaMA 2 and 3, TinyLlama, SmolLM2, Qwen2.5 and Mistral.

The blocks are one `DecoderBlock` whose parameters have a leading layer axis, run by `jax.lax.scan`,
so tracing and compilation cost the same at any depth. Every projection is a matrix `[in, out]`
(`[layers, in, out]` in the stack): the contracted axis, along which N:M groups run, is always -2.

Source: Touvron et al., "Llama 2", 2023; Grattafiori et al., "The Llama 3 Herd of Models", 2024;
Su et al., "RoFormer", 2021 (rotary embedding); Shazeer, "GLU Variants", 2020 (SwiGLU).
"""

import itertools
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from sparsejax.models.blocks import (
    decode_blocks,
    matrix_dot_general,
    put_block,
    run_blocks,
    run_blocks_detailed,
    slice_blocks,
    stack_blocks,
    take_block,
)
from sparsejax.models.decoding import KVCache, check_cache
from sparsejax.models.llama_config import LlamaConfig, require
from sparsejax.models.llama_layers import (
    Attention,
    FeedForward,
    RMSNorm,
    Rope,
    linear,
    rope_tables,
)
from sparsejax.models.partition import Rules, axes_of, specs_of


class DecoderBlock(nnx.Module):
    """Pre-norm residual block: attention, then feed-forward."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        norm = {"eps": config.norm_eps, "param_dtype": config.param_dtype}
        self.config = config
        self.attention_norm = RMSNorm(config.d_model, **norm)
        self.attention = _attention(config, rngs)
        self.ffn_norm = RMSNorm(config.d_model, **norm)
        self.ffn = _feed_forward(config, rngs)

    def __call__(self, x: Float[Array, "b t d"], rope: Rope | None = None) -> Float[Array, "b t d"]:
        """The residual stream after this block; `rope` defaults to positions `0 .. t - 1`."""
        return self.detailed(x, rope)[0]

    def detailed(
        self, x: Float[Array, "b t d"], rope: Rope | None = None
    ) -> tuple[Float[Array, "b t d"], dict[str, Array]]:
        """As `__call__`, with what sparse layers tell beside it; see `Llama.detailed`."""
        if rope is None:
            rope = rope_tables(self.config, jnp.arange(x.shape[1])[None])
        attended, found = self.attention.detailed(self.attention_norm(x), rope)
        x = x + attended
        fed, more = self.ffn.detailed(self.ffn_norm(x))
        return x + fed, {**found, **more}

    def decode(
        self, x: Float[Array, "b t d"], rope: Rope, cache: KVCache, layer: Int[Array, ""]
    ) -> tuple[Float[Array, "b t d"], KVCache]:
        """As `__call__`, reading and writing the cache of `layer`."""
        attended, cache = self.attention.decode(self.attention_norm(x), rope, cache, layer)
        x = x + attended
        return x + self.ffn.decode(self.ffn_norm(x)), cache


def _attention(config: LlamaConfig, rngs: nnx.Rngs) -> Attention:
    if config.attention == "dense":
        return Attention(config, rngs=rngs)
    from sparsejax.models.sparse_layers import SparkAttention  # imports Pallas, which takes long

    return SparkAttention(config, rngs=rngs)


def _feed_forward(config: LlamaConfig, rngs: nnx.Rngs) -> Any:
    if config.ffn == "gated":
        return FeedForward(config, rngs=rngs)
    from sparsejax.models import sparse_layers

    kinds = {
        "relu": sparse_layers.ReluFeedForward,
        "spark": sparse_layers.SparkFeedForward,
        "block": sparse_layers.BlockFeedForward,
    }
    return kinds[config.ffn](config, rngs=rngs)


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

    block_type: type[DecoderBlock] = DecoderBlock

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size,
            config.d_model,
            param_dtype=jnp.dtype(config.param_dtype),
            embedding_init=nnx.initializers.normal(config.embed_std),
            rngs=rngs,
        )
        if config.positions == "learned":
            self.positions = nnx.Embed(
                config.max_seq_len,
                config.d_model,
                param_dtype=jnp.dtype(config.param_dtype),
                embedding_init=nnx.initializers.normal(config.embed_std),
                rngs=rngs,
            )
        self.blocks = stack_blocks(partial(self.block_type, config), config.n_layers, rngs)
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps, param_dtype=config.param_dtype)
        if not config.tie_embeddings:
            self.head = linear(
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
        x, rope = self._begin(tokens, positions)
        for _, blocks in self.parts():
            x = run_blocks(blocks, x, rope, remat=self.config.remat)
        return self.norm(x)

    def detailed(
        self, tokens: Int[Array, "b t"], *, positions: Int[Array, "#b t"] | None = None
    ) -> tuple[Float[Array, "b t d"], dict[str, Array]]:
        """As `hidden`, with what the sparse layers tell of every token, layers first.

        "spark" and "relu" feed-forward layers: `num_active [layers, b, t]`; of "gated" ones those
        under a sparsity target alone. "block": `logits` and `gates [layers, b, t, experts]`, in
        float32. "spark" attention: `keys_kept [layers, b, heads, t]`.
        """
        x, rope = self._begin(tokens, positions)
        found = []
        for _, blocks in self.parts():
            x, details = run_blocks_detailed(blocks, x, rope, remat=self.config.remat)
            found.append(details)
        names = {name: None for details in found for name in details}
        joined = {
            name: jnp.concatenate([details[name] for details in found if name in details])
            for name in names
        }
        return self.norm(x), joined

    def parts(self) -> list[tuple[int, Any]]:
        """Consecutive blocks that are alike, each with the number of its first layer.

        One part, unless `config.sparsity_pattern` differs from layer to layer.
        """
        if self.config.sparsity_pattern is None:
            return [(0, self.blocks)]
        found, first = [], 0
        for target, run in itertools.groupby(self.config.sparsity_pattern):
            last = first + len(list(run))
            blocks = slice_blocks(self.blocks, first, last)
            if not isinstance(blocks, nnx.List):
                blocks.ffn.target_sparsity = target
            found.append((first, blocks))
            first = last
        return found

    def _begin(
        self, tokens: Int[Array, "b t"], positions: Int[Array, "#b t"] | None
    ) -> tuple[Float[Array, "b t d"], Rope]:
        """What the first block reads, and the rotation of all blocks."""
        limit = self.config.max_seq_len
        require(
            tokens.shape[1] <= limit,
            f"tokens has {tokens.shape[1]} positions; max_seq_len allows {limit}.",
        )
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        return self.embedded(tokens, positions=positions), rope_tables(self.config, positions)

    def embedded(
        self, tokens: Int[Array, "b t"], *, positions: Int[Array, "#b t"] | None = None
    ) -> Float[Array, "b t d"]:
        """The embeddings of `tokens` in `config.dtype`: what the first block reads.

        positions: as in `__call__`; learned ones are added.
        """
        x = self.embed(tokens)
        if self.config.positions == "learned":
            x += self.positions(
                jnp.arange(tokens.shape[1])[None] if positions is None else positions
            )
        return x.astype(self.config.dtype)

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
        x = self.embedded(tokens, positions=positions)
        for first, blocks in self.parts():
            x, cache = decode_blocks(blocks, x, cache, rope, first=first)
        x = jnp.where(end > room, jnp.nan, x[:, -1:] if last_only else x)
        return self.logits(self.norm(x)), cache._replace(length=end)

    def block(self, i: int) -> DecoderBlock:
        """A standalone copy of block `i`. Raises ValueError if there is none."""
        block = take_block(self.blocks, i, self.config.n_layers)
        if self.config.sparsity_pattern is not None:
            block.ffn.target_sparsity = self.config.sparsity_pattern[i]
        return block

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
        "positions/embedding": ("positions", "embed"),
        # Of TransformedLlama alone:
        **{f"blocks/{name}_shortcut": ("embed", "embed_out") for name in ("attention", "ffn")},
        # Of the sparse feed-forward layers:
        "predictor_proj/kernel": ("embed", "mlp"),
        "ffn/up_rows": ("mlp", "embed"),
        "ffn/router": ("experts", "embed"),
        "ffn/router_norm": ("experts",),
        "ffn/up": ("experts", "expert_mlp", "embed"),
        "ffn/down": ("experts", "expert_mlp", "embed"),
        # Of Gpt alone:
        "up_proj/bias": ("mlp",),
        **{f"{name}/bias": ("embed",) for name in ("o_proj", "down_proj")},
        **{f"{name}/bias": ("embed",) for name in ("norm", "attention_norm", "ffn_norm")},
    }
)
"""What each axis of a parameter means, by the end of its path; the stack puts `layers` in front."""
_OWNER = "Llama and Gpt"

DEFAULT_RULES: Mapping[str, str | None] = MappingProxyType(
    {"vocab": "model", "heads": "model", "mlp": "model", "experts": "model"}
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
    rules: logical axis (`vocab, positions, embed, heads, kv, mlp, experts, expert_mlp, layers`) to
        mesh axis or axes.

    Raises ValueError for an unknown logical axis or parameter.

    >>> from jax.sharding import PartitionSpec
    >>> specs = param_specs({"up_proj": {"kernel": jnp.ones((2, 4, 8))}})  # [layers, in, out]
    >>> specs["up_proj"]["kernel"] == PartitionSpec(None, None, "model")
    True
    """
    return specs_of(params, rules, LOGICAL_AXES, _OWNER)
