"""The blocks of CRATE as modules; the mathematics is `sparsejax.coding`.

Source: White-Box Transformers via Sparse Rate Reduction (2023, arXiv 2306.01129, 2311.13110).
"""

from typing import Any, cast

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from sparsejax.coding.crate import dictionary_init, mssa
from sparsejax.coding.rate_reduction import projected_coding_rate
from sparsejax.coding.solvers import ista_step, odl_block
from sparsejax.models.blocks import matrix_dot_general
from sparsejax.models.crate_config import CrateConfig
from sparsejax.models.gpt import LayerNorm
from sparsejax.models.llama_config import require

RATE_EPS = 0.01  # of the published figures of rates by layer


def uniform_linear(
    config: CrateConfig, size_in: int, size_out: int, rngs: nnx.Rngs, *, bias: bool = True
) -> nnx.Linear:
    """A matrix `[in, out]` and a bias, uniform within `1 / sqrt(in)` as PyTorch makes them."""
    edge = size_in**-0.5

    def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        return nnx.initializers.uniform(2 * edge)(key, shape, dtype) - edge

    return nnx.Linear(
        size_in,
        size_out,
        use_bias=bias,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=init,
        bias_init=init,
        dot_general=matrix_dot_general,
        rngs=rngs,
    )


class MSSA(nnx.Module):
    """Multi-head subspace self-attention: `qkv`, and `out_proj` unless one head spans all.

    use_softmax: False weighs tokens by their scaled products, an option of the decoder.
    """

    def __init__(self, config: CrateConfig, *, rngs: nnx.Rngs, use_softmax: bool = True):
        d, inner = config.d_model, config.n_heads * config.head_width
        self.heads, self.use_softmax, self.dtype = config.n_heads, use_softmax, config.dtype
        self.qkv = uniform_linear(config, d, inner, rngs, bias=False)
        projected = config.n_heads > 1 or inner != d
        bias = config.out_bias
        self.out_proj = uniform_linear(config, inner, d, rngs, bias=bias) if projected else None

    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "#b #k #n #n"] | None = None
    ) -> Float[Array, "b n d"]:
        """What is added to the tokens; `mask` is True where a token may attend."""
        out, weights, bias = self.out_proj, None, None
        if out is not None:
            weights = out.kernel[...].T.astype(self.dtype)
            bias = None if out.bias is None else out.bias[...].astype(self.dtype)
        qkv = self.qkv.kernel[...].T.astype(self.dtype)
        options = {"heads": self.heads, "mask": mask, "use_softmax": self.use_softmax}
        return mssa(x, qkv, weights, bias, **options)

    def projections(self, x: Float[Array, "b n d"]) -> Float[Array, "b k n p"]:
        """The tokens in each subspace."""
        b, n, _ = x.shape
        return self.qkv(x).reshape(b, n, self.heads, -1).swapaxes(1, 2)


class ISTA(nnx.Module):
    """One step towards sparse codes of a token, from the token, in a complete `dictionary [d, d]`.

    dictionary: to use instead of a new one. Raises ValueError unless it is square.
    """

    def __init__(
        self, config: CrateConfig, *, rngs: nnx.Rngs, dictionary: Float[Array, "d k"] | None = None
    ):
        d = config.d_model
        if dictionary is None:
            dictionary = dictionary_init(rngs.params(), (d, d), jnp.dtype(config.param_dtype))
        require(
            dictionary.shape == (d, d),
            f"dictionary has shape {dictionary.shape}; it must be square, ({d}, {d}).",
        )
        self.step_size, self.lam, self.dtype = config.step_size, config.lam, config.dtype
        self.dictionary = nnx.Param(dictionary)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Codes of normed tokens, not negative."""
        dictionary = self.dictionary[...].astype(self.dtype)
        return ista_step(x, x, dictionary, step_size=self.step_size, lam=self.lam)


class OvercompleteISTA(nnx.Module):
    """Codes in a wide `dictionary [d, s]`, and what it, or `output [d, s]`, makes of them."""

    def __init__(self, config: CrateConfig, *, rngs: nnx.Rngs):
        shape = (config.d_model, cast(int, config.dictionary_width))
        self.config = config
        self.dictionary = nnx.Param(self._init(rngs, shape))
        self.output = nnx.Param(self._init(rngs, shape)) if config.dictionary_separate else None

    def _init(self, rngs: nnx.Rngs, shape: tuple[int, ...]) -> Array:
        dtype = jnp.dtype(self.config.param_dtype)
        return dictionary_init(rngs.params(), shape[::-1], dtype).T

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """What the codes of normed tokens stand for."""
        return self.with_codes(x)[0]

    def with_codes(
        self, x: Float[Array, "b n d"]
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b n s"]]:
        """As `__call__`, and the codes."""
        config = self.config
        codes, y = odl_block(
            x,
            self.dictionary[...].astype(config.dtype),
            step_size=config.step_size,
            lam=config.lam,
            num_steps=config.dictionary_steps,
        )
        if self.output is not None:
            y = codes @ self.output[...].astype(config.dtype).T
        return y, codes


class CrateBlock(nnx.Module):
    """`half = x + mssa(norm(x))`, then the codes of `norm(half)`: no residual around those."""

    def __init__(self, config: CrateConfig, *, rngs: nnx.Rngs):
        norm = {"eps": config.norm_eps, "param_dtype": config.param_dtype}
        self.config = config
        self.attention_norm = LayerNorm(config.d_model, **norm)
        self.attention = MSSA(config, rngs=rngs)
        self.ista_norm = LayerNorm(config.d_model, **norm)
        wide = config.dictionary_width is not None
        self.ista = OvercompleteISTA(config, rngs=rngs) if wide else ISTA(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "#b #k #n #n"] | None = None
    ) -> Float[Array, "b n d"]:
        """The tokens after this block; `mask` is True where a token may attend."""
        return self._codes(x, mask)[0]

    def detailed(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "#b #k #n #n"] | None = None
    ) -> tuple[Float[Array, "b n d"], dict[str, Array]]:
        """As `__call__`, with the `rate` and the `density` of `layer_statistics`, each `[b]`."""
        rate = projected_coding_rate(self.attention.projections(self.attention_norm(x)), RATE_EPS)
        y, codes = self._codes(x, mask)
        density = jnp.mean((codes != 0).astype(jnp.float32), axis=(1, 2))
        return y, {"rate": rate, "density": density}

    def _codes(self, x: Array, mask: Array | None) -> tuple[Array, Array]:
        """The block's output, and the codes in it."""
        half = x + self.attention(self.attention_norm(x), mask)
        normed = self.ista_norm(half)
        if isinstance(self.ista, ISTA):
            codes = self.ista(normed)
            return codes, codes
        y, codes = self.ista.with_codes(normed)
        return (half + y if self.config.dictionary_residual else y), codes


class CrateDecoderBlock(nnx.Module):
    """`h = norm(x) A^T`, then `h - mssa(norm(h))`: from codes to tokens that are spread again."""

    def __init__(self, config: CrateConfig, *, rngs: nnx.Rngs, use_softmax: bool = True):
        d, norm = config.d_model, {"eps": config.norm_eps, "param_dtype": config.param_dtype}
        self.dtype = config.dtype
        self.linear_norm = LayerNorm(d, **norm)
        dtype = jnp.dtype(config.param_dtype)
        self.dictionary = nnx.Param(dictionary_init(rngs.params(), (d, d), dtype))
        self.attention_norm = LayerNorm(d, **norm)
        self.attention = MSSA(config, rngs=rngs, use_softmax=use_softmax)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """The tokens after this block."""
        h = self.linear_norm(x) @ self.dictionary[...].astype(self.dtype).T
        return h - self.attention(self.attention_norm(h))
