"""The layers of a vision-language decoder: attention under any mask, neurons row by row."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from sparsejax.activations import gated_ffn
from sparsejax.models.blocks import matrix_dot_general
from sparsejax.models.llama import Attention, RMSNorm
from sparsejax.models.vision_language_cache import LayerCache
from sparsejax.models.vision_language_config import VisionLanguageConfig

FFN = Mapping[str, Array]


class Layer(NamedTuple):
    """What a block computed: rotated queries and keys, values, and its neurons' activations."""

    q: Array  # [b, m, heads, head_width]
    k: Array  # [b, m, kv_heads, head_width]
    v: Array  # [b, m, kv_heads, head_width]
    a: Array  # [b, m, d_ff]


class NeuronMajorFFN(nnx.Module):
    """`(silu(x gate^T) * (x up^T)) down`, every matrix `[f, d]`: a row a neuron."""

    def __init__(self, config: VisionLanguageConfig, *, rngs: nnx.Rngs):
        shape, dtype = (config.d_ff, config.d_model), jnp.dtype(config.param_dtype)
        reads = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-1, out_axis=-2)
        writes = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
        self.dtype = jnp.dtype(config.dtype)
        self.gate = nnx.Param(reads(rngs.params(), shape, dtype))
        self.up = nnx.Param(reads(rngs.params(), shape, dtype))
        self.down = nnx.Param(writes(rngs.params(), shape, dtype))

    def params(self) -> dict[str, Float[Array, "f d"]]:
        """The matrices as `gated_ffn` takes them, in the dtype of the activations."""
        leaves = {"gate": self.gate, "up": self.up, "down": self.down}
        return {name: leaf[...].astype(self.dtype) for name, leaf in leaves.items()}

    def activations(self, x: Float[Array, "*b d"]) -> Float[Array, "*b f"]:
        """What the neurons give; those above zero are active."""
        w = self.params()
        up = matrix_dot_general(x, w["up"].T)
        return jax.nn.silu(matrix_dot_general(x, w["gate"].T)) * up

    def output(self, a: Float[Array, "*b f"]) -> Float[Array, "*b d"]:
        """What the layer adds to the residual stream for these activations."""
        return matrix_dot_general(a, self.params()["down"])


def masked_attention(
    q: Float[Array, "b t heads width"],
    k: Float[Array, "b s kv_heads width"],
    v: Float[Array, "b s kv_heads width"],
    visible: Bool[Array, "b t s"],
) -> Float[Array, "b t heads width"]:
    """Softmax attention under a mask of each sample, float32; who sees none sees all alike.

    Query head h reads key head `h // (heads / kv_heads)`.
    """
    b, t, heads, width = q.shape
    q = q.reshape(b, t, k.shape[2], -1, width)
    scores = jnp.einsum("btgrd,bsgd->bgrts", q, k, preferred_element_type=jnp.float32)
    lowest = jnp.finfo(jnp.float32).min
    scores = jnp.where(visible[:, None, None], scores * width**-0.5, lowest)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bgrts,bsgd->btgrd", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(b, t, heads, width)


class VisionLanguageBlock(nnx.Module):
    """Pre-norm residual block: attention under a given mask, then feed-forward."""

    def __init__(self, config: VisionLanguageConfig, *, rngs: nnx.Rngs):
        norm = {"eps": config.norm_eps, "param_dtype": config.param_dtype}
        self.attention_norm = RMSNorm(config.d_model, **norm)
        self.attention = Attention(config.decoder, rngs=rngs)
        self.ffn_norm = RMSNorm(config.d_model, **norm)
        self.ffn = NeuronMajorFFN(config, rngs=rngs)

    def project(self, x: Float[Array, "b t d"], rope: Any) -> Any:
        """Queries, keys and values of the residual stream."""
        return self.attention.project(self.attention_norm(x), rope)

    def attend(
        self,
        x: Float[Array, "b t d"],
        q: Float[Array, "b t heads width"],
        k: Float[Array, "b s kv_heads width"],
        v: Float[Array, "b s kv_heads width"],
        visible: Bool[Array, "b t s"],
    ) -> Float[Array, "b t d"]:
        """The residual stream after attention."""
        out = masked_attention(q, k, v, visible)
        return x + self.attention.o_proj(out.reshape(*x.shape[:2], -1).astype(x.dtype))

    def __call__(
        self, x: Float[Array, "b m d"], rope: Any, visible: Bool[Array, "b m m"]
    ) -> tuple[Float[Array, "b m d"], Layer]:
        """The residual stream after this block, and what was computed on the way."""
        q, k, v = self.project(x, rope)
        x = self.attend(x, q, k, v, visible)
        a = self.ffn.activations(self.ffn_norm(x))
        return x + self.ffn.output(a), Layer(q, k, v, a)

    def decode(
        self,
        x: Float[Array, "b t d"],
        rope: Any,
        cache: LayerCache,
        visible: Bool[Array, "b t s"],
        core: FFN | None,
    ) -> tuple[Float[Array, "b t d"], LayerCache]:
        """As `__call__` for tokens behind a cache, with the neurons of `core` if it is given."""
        q, k, v = self.project(x, rope)
        start = (0, cache.end, 0, 0)
        keys = lax.dynamic_update_slice(cache.k, k.astype(cache.k.dtype), start)
        values = lax.dynamic_update_slice(cache.v, v.astype(cache.v.dtype), start)
        x = self.attend(x, q, keys, values, visible)
        x = x + gated_ffn(self.ffn.params() if core is None else core, self.ffn_norm(x))
        return x, cache._replace(k=keys, v=values, end=cache.end + x.shape[1])
