"""GPT-2: learned positions, LayerNorm before each branch, biases everywhere, and a tied head.

Queries, keys and values have a matrix each, where the published checkpoints fuse the three, so that
the projections of `Llama` and of this model are found by the same expression,
`_proj/kernel$`. Every matrix is `[in, out]` (`[layers, in, out]` in the stack).

Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from sparsejax.models.attention import causal_attention
from sparsejax.models.blocks import (
    decode_blocks,
    matrix_dot_general,
    put_block,
    run_blocks,
    stack_blocks,
    take_block,
)
from sparsejax.models.decoding import DType, KVCache, check_cache, write_layer
from sparsejax.models.gpt_config import GptConfig
from sparsejax.models.llama_config import require


class LayerNorm(nnx.Module):
    """`scale * (x - mean) / sqrt(variance + eps) + bias` over the last axis, in float32.

    Source: Ba et al., "Layer Normalization", 2016.
    """

    def __init__(self, width: int, *, eps: float = 1e-5, param_dtype: DType = "float32"):
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((width,), param_dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """The normalised `x`, in the dtype of `x`."""
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        inverse = lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        scale, bias = (p[...].astype(jnp.float32) for p in (self.scale, self.bias))
        return (wide * inverse * scale + bias).astype(x.dtype)


def _linear(
    config: GptConfig, size_in: int, size_out: int, rngs: nnx.Rngs, *, residual: bool = False
) -> nnx.Linear:
    std = config.init_std * ((2 * config.n_layers) ** -0.5 if residual else 1.0)
    return nnx.Linear(
        size_in,
        size_out,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=nnx.initializers.normal(std),
        dot_general=matrix_dot_general,
        rngs=rngs,
    )


class GptAttention(nnx.Module):
    """Causal attention, every head with its own keys: `q_proj`, `k_proj`, `v_proj`, `o_proj`."""

    def __init__(self, config: GptConfig, *, rngs: nnx.Rngs):
        d = config.d_model
        self.config = config
        self.q_proj = _linear(config, d, d, rngs)
        self.k_proj = _linear(config, d, d, rngs)
        self.v_proj = _linear(config, d, d, rngs)
        self.o_proj = _linear(config, d, d, rngs, residual=True)

    def project(
        self, x: Float[Array, "b t d"]
    ) -> tuple[
        Float[Array, "b t heads width"],
        Float[Array, "b t heads width"],
        Float[Array, "b t heads width"],
    ]:
        """Queries, keys and values."""
        shape = (*x.shape[:2], self.config.n_heads, self.config.head_width)
        return (
            self.q_proj(x).reshape(shape),
            self.k_proj(x).reshape(shape),
            self.v_proj(x).reshape(shape),
        )

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Attention among the tokens of `x`."""
        q, k, v = self.project(x)
        out = causal_attention(q, k, v, jnp.arange(x.shape[1]), None, aligned=True)
        return self.o_proj(out.reshape(x.shape).astype(x.dtype))

    def decode(
        self, x: Float[Array, "b t d"], cache: KVCache, layer: Int[Array, ""]
    ) -> tuple[Float[Array, "b t d"], KVCache]:
        """Attention of `x` to the cache of `layer` and itself; the cache with `x` written in."""
        q, k, v = self.project(x)
        cache, k, v = write_layer(cache, layer, k, v)
        queries = cache.length + jnp.arange(x.shape[1], dtype=jnp.int32)
        out = causal_attention(
            q, k.astype(x.dtype), v.astype(x.dtype), queries, None, aligned=False
        )
        return self.o_proj(out.reshape(x.shape).astype(x.dtype)), cache


class GptFeedForward(nnx.Module):
    """`down_proj(gelu(up_proj(x)))`, with GELU's approximation by tanh (Hendrycks, 2016)."""

    def __init__(self, config: GptConfig, *, rngs: nnx.Rngs):
        self.up_proj = _linear(config, config.d_model, config.ff_width, rngs)
        self.down_proj = _linear(config, config.ff_width, config.d_model, rngs, residual=True)

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """The block's second residual branch."""
        return self.down_proj(jax.nn.gelu(self.up_proj(x), approximate=True))


class GptBlock(nnx.Module):
    """Pre-norm residual block: attention, then feed-forward."""

    def __init__(self, config: GptConfig, *, rngs: nnx.Rngs):
        norm = {"eps": config.norm_eps, "param_dtype": config.param_dtype}
        self.config = config
        self.attention_norm = LayerNorm(config.d_model, **norm)
        self.attention = GptAttention(config, rngs=rngs)
        self.ffn_norm = LayerNorm(config.d_model, **norm)
        self.ffn = GptFeedForward(config, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """The residual stream after this block."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.ffn(self.ffn_norm(x))

    def decode(
        self, x: Float[Array, "b t d"], cache: KVCache, layer: Int[Array, ""]
    ) -> tuple[Float[Array, "b t d"], KVCache]:
        """As `__call__`, reading and writing the cache of `layer`."""
        attended, cache = self.attention.decode(self.attention_norm(x), cache, layer)
        x = x + attended
        return x + self.ffn(self.ffn_norm(x)), cache


class Gpt(nnx.Module):
    """A decoder-only language model; `nnx.split` gives a graph and exactly its parameters.

    Paths: `embed/embedding [vocab, d]`, which is the head too, `positions/embedding [max_seq_len,
    d]`, `blocks/attention/q_proj/kernel [layers, in, out]` and so on, `norm/scale [d]`.
    Call it under `jit`: outside, the loop over the blocks is compiled anew at every call.

    >>> from sparsejax.models import gpt_config
    >>> model = Gpt(gpt_config("laptop"), rngs=nnx.Rngs(0))
    >>> graphdef, params = nnx.split(model)
    >>> nnx.merge(graphdef, params)(jnp.zeros((1, 8), jnp.int32)).shape
    (1, 8, 128)
    """

    def __init__(self, config: GptConfig, *, rngs: nnx.Rngs):
        def embedding(size: int) -> nnx.Embed:
            return nnx.Embed(
                size,
                config.d_model,
                param_dtype=jnp.dtype(config.param_dtype),
                embedding_init=nnx.initializers.normal(config.init_std),
                rngs=rngs,
            )

        self.config = config
        self.embed = embedding(config.vocab_size)
        self.positions = embedding(config.max_seq_len)
        self.blocks = stack_blocks(partial(GptBlock, config), config.n_layers, rngs)
        self.norm = LayerNorm(config.d_model, eps=config.norm_eps, param_dtype=config.param_dtype)

    def __call__(
        self, tokens: Int[Array, "b t"], *, positions: Int[Array, "#b t"] | None = None
    ) -> Float[Array, "b t v"]:
        """Logits of the next token, float32.

        positions: of the tokens, `0 .. t - 1` by default; who sees whom follows the order of
        `tokens` whatever they are. A token outside the vocabulary, or a position of `max_seq_len`
        or more, gives NaN.
        Raises ValueError if `t` exceeds `max_seq_len`. Differentiable in the parameters.
        """
        return self.logits(self.hidden(tokens, positions=positions))

    def hidden(
        self, tokens: Int[Array, "b t"], *, positions: Int[Array, "#b t"] | None = None
    ) -> Float[Array, "b t d"]:
        """The residual stream after the last norm, in `config.dtype`; arguments as `__call__`."""
        x = self.embedded(tokens, positions=positions)
        return self.norm(run_blocks(self.blocks, x, remat=self.config.remat))

    def embedded(
        self, tokens: Int[Array, "b t"], *, positions: Int[Array, "#b t"] | None = None
    ) -> Float[Array, "b t d"]:
        """The sum of token and position embeddings in `config.dtype`: what the first block reads.

        Raises ValueError if `t` exceeds `max_seq_len`.
        """
        limit = self.config.max_seq_len
        require(
            tokens.shape[1] <= limit,
            f"tokens has {tokens.shape[1]} positions; max_seq_len allows {limit}.",
        )
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        return (self.embed(tokens) + self.positions(positions)).astype(self.config.dtype)

    def logits(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Logits of a normed residual stream, float32."""
        table = self.embed.embedding[...].astype(hidden.dtype)
        return matrix_dot_general(hidden, table.T, preferred_element_type=jnp.float32)

    def decode(
        self, tokens: Int[Array, "b t"], cache: KVCache, *, last_only: bool = False
    ) -> tuple[Float[Array, "b n v"], KVCache]:
        """Logits of `tokens` as the continuation of what `cache` holds, and the cache after them.

        The same call prefills and steps. last_only: compute the logits of the last token alone
        (`n = 1`; otherwise `n = t`), which a long prompt wants.
        Raises ValueError if the cache does not fit model or batch, or is too short. A length that
        is traced cannot be compared: there, an overflow turns all the logits into NaN.
        """
        check_cache(cache, self.config, tokens.shape)
        room, end = cache.k.shape[2], cache.length + tokens.shape[1]
        positions = cache.length + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        x = self.embedded(tokens, positions=positions)
        x, cache = decode_blocks(self.blocks, x, cache)
        x = jnp.where(end > room, jnp.nan, x[:, -1:] if last_only else x)
        return self.logits(self.norm(x)), cache._replace(length=end)

    def block(self, i: int) -> GptBlock:
        """A standalone copy of block `i`. Raises ValueError if there is none."""
        return take_block(self.blocks, i, self.config.n_layers)

    def set_block(self, i: int, block: GptBlock) -> None:
        """Writes the parameters of `block` into block `i`. Raises ValueError if there is none."""
        put_block(self.blocks, i, block, self.config.n_layers)
