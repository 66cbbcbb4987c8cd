"""The encoder that `ViT` and `TextClassifier` share: pre-norm blocks where all tokens see all.

The blocks are one `EncoderBlock` whose parameters have a leading layer axis, run by `jax.lax.scan`,
so tracing and compilation cost the same at any depth. Every projection is a matrix `[in, out]`
(`[layers, in, out]` in the stack) with a bias.

Source: Vaswani et al., "Attention Is All You Need", 2017; Xiong et al., "On Layer Normalization in
the Transformer Architecture", 2020 (norm before each branch).
"""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from sparsejax.models.blocks import (
    matrix_dot_general,
    put_block,
    run_blocks,
    stack_blocks,
    take_block,
)
from sparsejax.models.encoder_config import EncoderConfig
from sparsejax.models.gpt import LayerNorm
from sparsejax.models.partition import Rules, specs_of


def full_attention(
    q: Float[Array, "b t heads width"],
    k: Float[Array, "b s heads width"],
    v: Float[Array, "b s heads width"],
    visible: Bool[Array, "b s"] | None = None,
) -> Float[Array, "b t heads width"]:
    """Softmax attention of every query to every key, float32.

    visible: the keys that may be attended to; None means all. Where an example has none, its keys
        all weigh the same.
    """
    # Products on CPU want their batch in front, and the softmax's division costs less after the
    # product: up to twice as fast there as jax.nn.dot_product_attention.
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    scores = jnp.einsum("bhqd,bhsd->bhqs", q, k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    if visible is not None:
        scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(v.dtype)
    out = jnp.einsum("bhqs,bhsd->bhqd", weights, v, preferred_element_type=jnp.float32)
    return (out / total).transpose(0, 2, 1, 3)


def linear(
    config: EncoderConfig, size_in: int, size_out: int, *, rngs: nnx.Rngs, **options: Any
) -> nnx.Linear:
    """A matrix `[in, out]` with bias, which computes in `config.dtype` unless `options` say so."""
    return nnx.Linear(
        size_in,
        size_out,
        dtype=jnp.dtype(options.pop("dtype", config.dtype)),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=options.pop("kernel_init", nnx.initializers.normal(config.init_std)),
        dot_general=matrix_dot_general,
        rngs=rngs,
        **options,
    )


def embedding(config: EncoderConfig, size: int, *, rngs: nnx.Rngs) -> nnx.Embed:
    """A table `[size, d_model]`."""
    return nnx.Embed(
        size,
        config.d_model,
        param_dtype=jnp.dtype(config.param_dtype),
        embedding_init=nnx.initializers.normal(config.init_std),
        rngs=rngs,
    )


class EncoderAttention(nnx.Module):
    """Attention among all tokens: `q_proj`, `k_proj`, `v_proj`, `o_proj`."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        d = config.d_model
        self.config = config
        self.q_proj = linear(config, d, d, rngs=rngs)
        self.k_proj = linear(config, d, d, rngs=rngs)
        self.v_proj = linear(config, d, d, rngs=rngs)
        self.o_proj = linear(config, d, d, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b t d"], visible: Bool[Array, "b t"] | None = None
    ) -> Float[Array, "b t d"]:
        """Attention among the tokens of `x`, to those that are `visible`."""
        shape = (*x.shape[:2], self.config.n_heads, self.config.head_width)
        q, k, v = (p(x).reshape(shape) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(full_attention(q, k, v, visible).reshape(x.shape).astype(x.dtype))


class EncoderFeedForward(nnx.Module):
    """`down_proj(gelu(up_proj(x)))`, with the exact GELU (Hendrycks, 2016)."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.up_proj = linear(config, config.d_model, config.ff_width, rngs=rngs)
        self.down_proj = linear(config, config.ff_width, config.d_model, rngs=rngs)

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """The block's second residual branch."""
        return self.down_proj(jax.nn.gelu(self.up_proj(x), approximate=False))


class EncoderBlock(nnx.Module):
    """Pre-norm residual block: attention, then feed-forward."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        norm = {"eps": config.norm_eps, "param_dtype": config.param_dtype}
        self.config = config
        self.attention_norm = LayerNorm(config.d_model, **norm)
        self.attention = EncoderAttention(config, rngs=rngs)
        self.ffn_norm = LayerNorm(config.d_model, **norm)
        self.ffn = EncoderFeedForward(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b t d"], visible: Bool[Array, "b t"] | None = None
    ) -> Float[Array, "b t d"]:
        """The residual stream after this block; attention is to the `visible` tokens, or to all."""
        x = x + self.attention(self.attention_norm(x), visible)
        return x + self.ffn(self.ffn_norm(x))


class Encoder(nnx.Module):
    """A stack of blocks and the norm behind them: `blocks/...`, `norm/scale`, `norm/bias`."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.blocks = stack_blocks(partial(EncoderBlock, config), config.n_layers, rngs)
        self.norm = LayerNorm(config.d_model, eps=config.norm_eps, param_dtype=config.param_dtype)

    def encode(
        self, x: Float[Array, "b t d"], visible: Bool[Array, "b t"] | None = None
    ) -> Float[Array, "b t d"]:
        """The residual stream after all blocks and the norm, in the dtype of `x`."""
        return self.norm(run_blocks(self.blocks, x, visible, remat=self.config.remat))

    def block(self, i: int) -> EncoderBlock:
        """A standalone copy of block `i`. Raises ValueError if there is none."""
        return take_block(self.blocks, i, self.config.n_layers)

    def set_block(self, i: int, block: EncoderBlock) -> None:
        """Writes the parameters of `block` into block `i`. Raises ValueError if there is none."""
        put_block(self.blocks, i, block, self.config.n_layers)


ENCODER_AXES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "embed/embedding": ("vocab", "embed"),
        "class_token/embedding": ("one", "embed"),
        "positions/embedding": ("positions", "embed"),
        "patch_embed/kernel": ("patch", "embed"),
        "head/kernel": ("embed", "classes"),
        "head/bias": ("classes",),
        **{f"{name}_proj/kernel": ("embed", "heads") for name in "qkv"},
        **{f"{name}_proj/bias": ("heads",) for name in "qkv"},
        "o_proj/kernel": ("heads", "embed"),
        "up_proj/kernel": ("embed", "mlp"),
        "up_proj/bias": ("mlp",),
        "down_proj/kernel": ("mlp", "embed"),
        **{f"{name}/bias": ("embed",) for name in ("patch_embed", "o_proj", "down_proj")},
        **{f"{name}/bias": ("embed",) for name in ("norm", "attention_norm", "ffn_norm")},
        **{f"{name}/scale": ("embed",) for name in ("norm", "attention_norm", "ffn_norm")},
    }
)
"""What each axis of a parameter means, by the end of its path; the stack puts `layers` in front."""

ENCODER_RULES: Mapping[str, str | None] = MappingProxyType({"heads": "model", "mlp": "model"})
"""Logical axis to mesh axis, as tensor parallelism wants it; the rest is replicated."""


def encoder_param_specs(params: PyTree, rules: Rules = ENCODER_RULES) -> PyTree:
    """The PartitionSpec of every leaf of a `ViT` or a `TextClassifier`.

    params: `nnx.split(model)[1]`, its abstract twin, or any tree whose paths end as the
        parameters' do: a mask tree, one block, the state of an Adam. Scalars are replicated.
    rules: logical axis (`vocab, positions, patch, one, embed, heads, mlp, classes, layers`) to mesh
        axis or axes.

    Raises ValueError for an unknown logical axis or parameter.

    >>> from jax.sharding import PartitionSpec
    >>> specs = encoder_param_specs({"up_proj": {"kernel": jnp.ones((2, 4, 8))}})
    >>> specs["up_proj"]["kernel"] == PartitionSpec(None, None, "model")
    True
    """
    return specs_of(params, rules, ENCODER_AXES, "encoders")
