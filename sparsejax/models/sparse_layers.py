"""Sparse layers of `Llama`: masked in training, and reading what is needed alone in decoding.

Sources: Spark Transformer (2025, arXiv 2506.06644), BlockFFN (2025, arXiv 2507.08771), Lazy Neuron
(2023, arXiv 2210.06313).
"""

from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from sparsejax.activations.block_ffn import ExpertPath, RouterNorm, block_ffn
from sparsejax.activations.spark import spark_attention, spark_attention_step, spark_ffn
from sparsejax.activations.topk_mlp import top_k_activation
from sparsejax.activations.wina import product_of_kept
from sparsejax.models.attention import visible_keys
from sparsejax.models.llama_config import LlamaConfig
from sparsejax.models.llama_layers import Attention, kernel_init, linear

Found = dict[str, Array]


class ReluFeedForward(nnx.Module):
    """`down_proj(top_k(relu(up_proj(x))))`; without `config.ffn_k` all that fire stay."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.k = config.d_ff if config.ffn_k is None else config.ffn_k
        self.up_proj = linear(config, config.d_model, config.d_ff, rngs)
        self.down_proj = linear(config, config.d_ff, config.d_model, rngs)

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """The block's second residual branch."""
        return self.detailed(x)[0]

    def detailed(self, x: Float[Array, "... d"]) -> tuple[Float[Array, "... d"], Found]:
        """As `__call__`, and `num_active [...]`."""
        a = self._activations(x)
        return self.down_proj(a), {"num_active": jnp.sum(a > 0, axis=-1, dtype=jnp.int32)}

    def decode(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """As `__call__`; of a single token, from the rows of `down_proj` that are on alone."""
        if x.shape[:-1] != (1, 1):
            return self(x)
        a = self._activations(x).reshape(-1)
        return product_of_kept(a, self.down_proj.kernel[...], a > 0, a.size).reshape(x.shape)

    def _activations(self, x: Array) -> Array:
        return top_k_activation(jax.nn.relu(self.up_proj(x)), self.k)


class SparkFeedForward(nnx.Module):
    """`(gelu(topk(predictor_proj(x1))) * (x2 @ up_rows.T)) @ down_proj`; see `spark_ffn`.

    x1 are the first `config.ffn_split` features of x, x2 the others. `up_rows [d_ff, others]` lies
    neuron by neuron, as decoding reads it.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.r, self.k, self.dtype = config.ffn_split, cast(int, config.ffn_k), config.dtype
        rest = config.d_model - self.r
        self.predictor_proj = linear(config, self.r, config.d_ff, rngs)
        up = kernel_init(rngs.params(), (rest, config.d_ff), jnp.dtype(config.param_dtype))
        self.up_rows = nnx.Param(up.T)
        self.down_proj = linear(config, config.d_ff, config.d_model, rngs)

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """The block's second residual branch."""
        return self.detailed(x)[0]

    def detailed(self, x: Float[Array, "... d"]) -> tuple[Float[Array, "... d"], Found]:
        """As `__call__`, and `num_active [...]`."""
        params = {name: w.astype(self.dtype) for name, w in self._params().items()}
        params["K2"] = params["K2_rows"].T
        y, found = spark_ffn(params, x, r=self.r, k=self.k)
        return y, {"num_active": found["num_active"]}

    def decode(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """As `__call__`; of a token for each sequence, from the rows that are on alone."""
        if x.shape[1] > 1:
            return self(x)
        params = self._params()
        # room for all: a loop as long as the list reads no more for it
        return spark_ffn(params, x, r=self.r, k=self.k, sparse_capacity=len(params["V"]))[0]

    def _params(self) -> dict[str, Array]:
        """As they are stored: decoding casts no weight that it does not read."""
        return {
            "K1": self.predictor_proj.kernel[...],
            "K2_rows": self.up_rows[...],
            "V": self.down_proj.kernel[...],
        }


class BlockFeedForward(nnx.Module):
    """Experts behind a router of ReLU and, by `config.router_norm`, a norm; see `block_ffn`."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        d, experts = config.d_model, cast(int, config.n_experts)
        width, dtype = config.d_ff // experts, jnp.dtype(config.param_dtype)
        self.dtype = config.dtype
        self.norm: RouterNorm = config.router_norm
        router = 0.1 * kernel_init(rngs.params(), (d, experts), dtype)
        up = kernel_init(rngs.params(), (d, config.d_ff), dtype)
        down = kernel_init(rngs.params(), (config.d_ff, d), dtype)
        self.router = nnx.Param(router.T)
        if self.norm == "rms":
            self.router_norm = nnx.Param(jnp.ones((experts,), dtype))
        self.up = nnx.Param(up.T.reshape(experts, width, d))
        self.down = nnx.Param(down.reshape(experts, width, d))

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """The block's second residual branch."""
        return self.detailed(x)[0]

    def detailed(self, x: Float[Array, "... d"]) -> tuple[Float[Array, "... d"], Found]:
        """As `__call__`, and `logits` and `gates [..., experts]` of the router."""
        y, found = self._layer(x, "dense")
        aux = {name: found[name].reshape(*x.shape[:-1], -1) for name in ("logits", "gates")}
        return y, aux

    def decode(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """As `__call__`, from the experts alone that any of these tokens chose."""
        return self._layer(x, "union")[0]

    def _layer(self, x: Array, path: ExpertPath) -> tuple[Array, Found]:
        routing = ("router", "router_norm") if self.norm == "rms" else ("router",)
        names = (*routing, "up", "down")
        params = {name: getattr(self, name)[...] for name in names}
        # those of a union are widened as they are read, and no others
        ready = names if path == "dense" else routing
        params |= {name: params[name].astype(self.dtype) for name in ready}
        y, found = block_ffn(params, x.reshape(-1, x.shape[-1]), norm=self.norm, path=path)
        return y.reshape(x.shape), found


class SparkAttention(Attention):
    """Attention whose heads choose keys by their first features; see `spark_attention`."""

    def attend(
        self,
        q: Float[Array, "b t heads width"],
        k: Float[Array, "b t kv_heads width"],
        v: Float[Array, "b t kv_heads width"],
    ) -> tuple[Float[Array, "b t heads width"], Found]:
        """Attention among the tokens of a sequence, and `keys_kept [b, heads, t]`."""
        order = jnp.arange(q.shape[1])
        out, keep = self._masked(q, k, v, order)
        return out, {"keys_kept": jnp.sum(keep, axis=-1, dtype=jnp.int32)}

    def attend_cached(
        self,
        q: Float[Array, "b t heads width"],
        k: Float[Array, "b s kv_heads width"],
        v: Float[Array, "b s kv_heads width"],
        queries: Int[Array, "t"],
    ) -> Float[Array, "b t heads width"]:
        """Attention to a cache; a single token reads the rows of the keys that it chose alone."""
        if q.shape[1] > 1:
            return self._masked(q, k, v, queries)[0]
        seen = visible_keys(queries, jnp.arange(k.shape[1]), self.config.sliding_window)[0]
        r, top_k = self.config.attention_split, cast(int, self.config.attention_k)

        def sequence(each: tuple[Array, Array, Array]) -> Array:
            return spark_attention_step(*each, r=r, top_k=top_k, mask=seen)[0]

        return lax.map(sequence, (q[:, 0], k, v))[:, None]

    def _masked(self, q: Array, k: Array, v: Array, queries: Array) -> tuple[Array, Array]:
        groups = q.shape[2] // k.shape[2]
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
        k, v = (jnp.repeat(x, groups, axis=1) for x in (k, v))
        mask = visible_keys(queries, jnp.arange(k.shape[2]), self.config.sliding_window)
        r, top_k = self.config.attention_split, cast(int, self.config.attention_k)
        out, found = spark_attention(q, k, v, r=r, top_k=top_k, mask=mask)
        return out.transpose(0, 2, 1, 3), found["keep"]
