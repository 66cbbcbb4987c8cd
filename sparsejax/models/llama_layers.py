"""The layers of a decoder of the LLaMA family: norm, rotation, attention and feed-forward.

Source: Su et al., "RoFormer", 2021 (rotary embedding); Zhang and Sennrich, 2019 (RMSNorm).
"""

import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sparsejax.models.attention import causal_attention
from sparsejax.models.blocks import matrix_dot_general
from sparsejax.models.decoding import DType, KVCache, write_layer
from sparsejax.models.llama_config import LlamaConfig

Rope = tuple[Float[Array, "#b t half"], Float[Array, "#b t half"]]


def rope_tables(config: LlamaConfig, positions: Int[Array, "#b t"]) -> Rope:
    """Cosine and sine of the rotary angles, each float32 `[b, t, head_width / 2]`.

    Angle j of position p is `p * theta ** (-2 j / width)`, then scaled as `config.rope_scaling`
    says. For `"dynamic"` the length of the sequence is the largest position plus one, over the
    whole batch. Where a head is rotated in parts (`config.rotary_widths`), the angles of the parts
    follow each other.

    Source: Su et al., 2021, equation 34, in the Hugging Face layout (pairs `j, j + width/2`).
    """
    tables = [_angles(config, width, positions) for width in config.rotary_widths]
    angles = jnp.concatenate(tables, axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def _angles(
    config: LlamaConfig, width: int, positions: Int[Array, "#b t"]
) -> Float[Array, "#b t half"]:
    scaling = config.rope_scaling
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
    return angles if growth is None else angles * growth


def rotate(
    x: Float[Array, "b t heads width"], rope: Rope, widths: tuple[int, ...]
) -> Float[Array, "b t heads width"]:
    """`x` with each part of its heads, of these widths, rotated by its angles in `rope`."""
    cos, sin = (table[:, :, None, :] for table in rope)
    parts, start = [], 0
    for width in widths:
        half = width // 2
        first = x[..., start : start + half].astype(jnp.float32)
        second = x[..., start + half : start + width].astype(jnp.float32)
        c, s = (table[..., start // 2 : start // 2 + half] for table in (cos, sin))
        parts += [first * c - second * s, second * c + first * s]
        start += width
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)


def kernel_init(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> Array:
    """Normal, of variance 1 / inputs: the axis before the last."""
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


def linear(
    config: LlamaConfig, size_in: int, size_out: int, rngs: nnx.Rngs, **options: Any
) -> nnx.Linear:
    """A projection in the dtypes of the model, without a bias unless asked for."""
    return nnx.Linear(
        size_in,
        size_out,
        use_bias=options.pop("use_bias", False),
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=kernel_init,
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
        self.q_proj = linear(config, config.d_model, wide, rngs, use_bias=bias)
        self.k_proj = linear(config, config.d_model, narrow, rngs, use_bias=bias)
        self.v_proj = linear(config, config.d_model, narrow, rngs, use_bias=bias)
        self.o_proj = linear(config, wide, config.d_model, rngs)

    def project(
        self, x: Float[Array, "b t d"], rope: Rope
    ) -> tuple[
        Float[Array, "b t heads width"],
        Float[Array, "b t kv_heads width"],
        Float[Array, "b t kv_heads width"],
    ]:
        """Queries, keys and values, the first two rotated unless positions are learned."""
        q, k, v = (
            projection(x).reshape(*x.shape[:2], -1, self.config.head_width)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.positions == "learned":
            return q, k, v
        widths = self.config.rotary_widths
        return rotate(q, rope, widths), rotate(k, rope, widths), v

    def __call__(self, x: Float[Array, "b t d"], rope: Rope) -> Float[Array, "b t d"]:
        """Attention among the tokens of `x`; `rope` as from `rope_tables`."""
        return self.detailed(x, rope)[0]

    def detailed(
        self, x: Float[Array, "b t d"], rope: Rope
    ) -> tuple[Float[Array, "b t d"], dict[str, Array]]:
        """As `__call__`, with what a sparse form tells beside it."""
        out, found = self.attend(*self.project(x, rope))
        return self.o_proj(out.reshape(*x.shape[:2], -1).astype(x.dtype)), found

    def decode(
        self, x: Float[Array, "b t d"], rope: Rope, cache: KVCache, layer: Int[Array, ""]
    ) -> tuple[Float[Array, "b t d"], KVCache]:
        """Attention of `x` to the cache of `layer` and itself; the cache with `x` written in."""
        q, k, v = self.project(x, rope)
        cache, k, v = write_layer(cache, layer, k, v)
        queries = cache.length + jnp.arange(x.shape[1], dtype=jnp.int32)
        out = self.attend_cached(q, k.astype(x.dtype), v.astype(x.dtype), queries)
        return self.o_proj(out.reshape(*x.shape[:2], -1).astype(x.dtype)), cache

    def attend(
        self,
        q: Float[Array, "b t heads width"],
        k: Float[Array, "b t kv_heads width"],
        v: Float[Array, "b t kv_heads width"],
    ) -> tuple[Float[Array, "b t heads width"], dict[str, Array]]:
        """Attention among the tokens of a sequence."""
        order = jnp.arange(q.shape[1])
        return causal_attention(q, k, v, order, self.config.sliding_window, aligned=True), {}

    def attend_cached(
        self,
        q: Float[Array, "b t heads width"],
        k: Float[Array, "b s kv_heads width"],
        v: Float[Array, "b s kv_heads width"],
        queries: Int[Array, "t"],
    ) -> Float[Array, "b t heads width"]:
        """Attention of tokens at the places `queries` to a cache that holds them too."""
        return causal_attention(q, k, v, queries, self.config.sliding_window, aligned=False)


class FeedForward(nnx.Module):
    """SwiGLU, or GeGLU: `down_proj(activation(gate_proj(x)) * up_proj(x))`.

    target_sparsity: the share of neurons that statistical top-k of the gates switches off, before
        the activation; of a stack of layers that differ it is 0, see `Llama.parts`.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.activation = config.activation
        self.target_sparsity = 0.0
        self.gate_proj = linear(config, config.d_model, config.d_ff, rngs)
        self.up_proj = linear(config, config.d_model, config.d_ff, rngs)
        self.down_proj = linear(config, config.d_ff, config.d_model, rngs)

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """The block's second residual branch."""
        return self.detailed(x)[0]

    def detailed(self, x: Float[Array, "... d"]) -> tuple[Float[Array, "... d"], dict[str, Array]]:
        """As `__call__`, with what a sparse form tells beside it: `num_active` under a target."""
        a, found = self._activations(x)
        return self.down_proj(a), found

    def decode(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """As `__call__`; of a single token under a target, from the rows of `down_proj` that are
        on alone."""
        if not self.target_sparsity or x.shape[:-1] != (1, 1):
            return self(x)
        from sparsejax.activations.wina import product_of_kept

        a = self._activations(x)[0].reshape(-1)
        kernel = self.down_proj.kernel[...]
        return product_of_kept(a, kernel, a != 0, a.size).reshape(x.shape)

    def _activations(self, x: Array) -> tuple[Array, dict[str, Array]]:
        gates, found = self.gate_proj(x), {}
        if self.target_sparsity:
            from pallas_kernels import statistical_topk  # Pallas takes long to import

            gates = statistical_topk(gates, target_sparsity=self.target_sparsity)
            found["num_active"] = jnp.sum(gates > 0, axis=-1, dtype=jnp.int32)
        silu = self.activation == "silu"
        gates = jax.nn.silu(gates) if silu else jax.nn.gelu(gates, approximate=True)
        return gates * self.up_proj(x), found
