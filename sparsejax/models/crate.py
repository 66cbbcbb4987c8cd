"""CRATE: a white-box transformer of images and text, whose layers compress and sparsify.

The blocks are one module with a leading layer axis, run by `jax.lax.scan`, so tracing and
compilation cost the same at any depth.

Source: White-Box Transformers via Sparse Rate Reduction (2023, arXiv 2306.01129, 2311.13110);
Masked Completion via Structured Diffusion with White-Box Transformers (2024, arXiv 2404.02446).
"""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from sparsejax.coding.crate import attention_maps, patchify, random_keep, sincos_positions
from sparsejax.models.blocks import (
    matrix_dot_general,
    put_block,
    run_blocks,
    run_blocks_detailed,
    stack_blocks,
    take_block,
)
from sparsejax.models.crate_config import CrateConfig, CrateImageConfig, CrateTextConfig
from sparsejax.models.crate_layers import CrateBlock, CrateDecoderBlock, uniform_linear
from sparsejax.models.gpt import LayerNorm
from sparsejax.models.llama_config import require
from sparsejax.models.partition import Rules, specs_of


class CrateEncoder(nnx.Module):
    """A stack of `CrateBlock`s, as all the models have it: `blocks/...`."""

    def __init__(self, config: CrateConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.blocks = stack_blocks(partial(CrateBlock, config), config.n_layers, rngs)

    def encode(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "#b #k #n #n"] | None = None
    ) -> Float[Array, "b n d"]:
        """Tokens after all blocks; there is no norm behind them."""
        return run_blocks(self.blocks, x, mask, remat=self.config.remat)

    def block(self, i: int) -> CrateBlock:
        """A standalone copy of block `i`. Raises ValueError if there is none."""
        return take_block(self.blocks, i, self.config.n_layers)

    def set_block(self, i: int, block: CrateBlock) -> None:
        """Writes the parameters of `block` into block `i`. Raises ValueError if there is none."""
        put_block(self.blocks, i, block, self.config.n_layers)


class CrateClassifier(CrateEncoder):
    """A classifier of images; `nnx.split` gives a graph and exactly its parameters.

    Call it under `jit`: outside, the loop over the blocks is compiled anew at every call.

    >>> from sparsejax.models import crate_config
    >>> config = crate_config("tiny", n_layers=1, patch_size=8, image_size=16, num_classes=10)
    >>> graphdef, params = nnx.split(CrateClassifier(config, rngs=nnx.Rngs(0)))
    >>> nnx.merge(graphdef, params)(jnp.zeros((2, 16, 16, 3))).shape
    (2, 10)
    """

    config: CrateImageConfig

    def __init__(self, config: CrateImageConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        d, norm = config.d_model, {"eps": config.norm_eps, "param_dtype": config.param_dtype}
        self.patch_norm = LayerNorm(config.pixels, **norm)
        self.patch_embed = uniform_linear(config, config.pixels, d, rngs)
        self.embed_norm = LayerNorm(d, **norm)
        self.class_token = _embedding(config, 1, 1.0, rngs)
        self.positions = _embedding(config, config.patches + 1, 1.0, rngs)
        self.head_norm = LayerNorm(d, **norm)
        self.head = uniform_linear(config, d, config.num_classes, rngs)

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        """Logits of the classes, float32.

        Raises ValueError unless the images have the size and channels of the configuration.
        Differentiable in parameters and images.
        """
        return self.head(self.head_norm(self.features(images))).astype(jnp.float32)

    def features(self, images: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
        """The class token after the last block."""
        return self.encode(self.embedded(images))[:, 0]

    def embedded(self, images: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
        """Class token and patches with their positions: what the first block reads."""
        config = self.config
        _check_images(images, config)
        x = self.patch_norm(patchify(images.astype(config.dtype), config.patch_size))
        x = self.embed_norm(self.patch_embed(x))
        positions = self.positions.embedding[...].astype(config.dtype)
        return with_class_token(x, self.class_token.embedding[...]) + positions


class CrateMAE(CrateEncoder):
    """A masked autoencoder of square images, whose decoder runs the layers' steps backwards.

    The encoder sees all tokens, those of removed patches as one learned token.

    use_softmax: of the decoder's attention.

    >>> from sparsejax.models import crate_config
    >>> config = crate_config("tiny", n_layers=1, patch_size=8, image_size=16, lam=0.5)
    >>> model = CrateMAE(config, rngs=nnx.Rngs(0))
    >>> noise = jnp.asarray(2 * [[0.1, 0.9, 0.4, 0.3]])
    >>> prediction, keep = nnx.jit(lambda m, x: m(x, noise))(model, jnp.zeros((2, 16, 16, 3)))
    >>> prediction.shape, keep.sum(axis=1).tolist()
    ((2, 4, 192), [1, 1])
    """

    config: CrateImageConfig

    def __init__(self, config: CrateImageConfig, *, rngs: nnx.Rngs, use_softmax: bool = True):
        require(
            config.sides[0] == config.sides[1],
            f"image_size is {config.image_size}; the masked autoencoder takes squares.",
        )
        super().__init__(config, rngs=rngs)
        d, norm = config.d_model, {"eps": 1e-6, "param_dtype": config.param_dtype}
        self.patch_embed = _xavier_linear(config, config.pixels, d, rngs)
        self.class_token = _embedding(config, 1, 0.02, rngs)
        self.mask_token = _embedding(config, 1, 0.02, rngs)
        self.norm = LayerNorm(d, **norm)
        block = partial(CrateDecoderBlock, config, use_softmax=use_softmax)
        self.decoder_blocks = stack_blocks(block, config.n_layers, rngs)
        self.decoder_norm = LayerNorm(d, **norm)
        self.predictor = _xavier_linear(config, d, config.pixels, rngs)

    def __call__(
        self,
        images: Float[Array, "b h w c"],
        noise: Float[Array, "b n"],
        *,
        ratio: float = 0.75,
    ) -> tuple[Float[Array, "b n ppc"], Bool[Array, "b n"]]:
        """Predicted patches, float32, and which patches were visible; see `masked_patch_loss`.

        noise: uniform, one number a patch; those with the least stay visible, `1 - ratio` of them.
        Raises ValueError for images of another size, or ratio outside [0, 1).
        """
        keep = random_keep(noise, ratio)
        codes = self.norm(self.encode(self.embedded(images, keep)))
        x = run_blocks(self.decoder_blocks, codes, remat=self.config.remat)
        return self.predictor(self.decoder_norm(x))[:, 1:].astype(jnp.float32), keep

    def features(self, images: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
        """The class token of the whole image after the encoder and its norm."""
        return self.norm(self.encode(self.embedded(images)))[:, 0]

    def embedded(
        self, images: Float[Array, "b h w c"], keep: Bool[Array, "b patches"] | None = None
    ) -> Float[Array, "b n d"]:
        """What the first block reads: class token, visible patches and mask tokens, placed."""
        config = self.config
        _check_images(images, config)
        x = self.patch_embed(patchify(images.astype(config.dtype), config.patch_size))
        if keep is not None:
            x = jnp.where(keep[..., None], x, self.mask_token.embedding[...].astype(x.dtype))
        side = config.sides[0] // config.patch_size
        places = jnp.asarray(sincos_positions(config.d_model, side), x.dtype)
        return with_class_token(x, self.class_token.embedding[...]) + places


class CrateLM(CrateEncoder):
    """A language model: causal as GPT, or one that sees all tokens as BERT; the head is tied.

    >>> config = CrateTextConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=32, max_seq_len=8)
    >>> model = CrateLM(config, rngs=nnx.Rngs(0))
    >>> nnx.jit(lambda m, x: m(x))(model, jnp.zeros((1, 8), jnp.int32)).shape
    (1, 8, 32)
    """

    config: CrateTextConfig

    def __init__(self, config: CrateTextConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        d, norm = config.d_model, {"eps": config.norm_eps, "param_dtype": config.param_dtype}
        self.embed = _embedding(config, config.vocab_size, 0.02, rngs)
        self.positions = _embedding(config, config.max_seq_len, 0.02, rngs)
        if config.type_vocab_size:
            self.types = _embedding(config, config.type_vocab_size, 0.02, rngs)
        if not config.causal:
            self.embed_norm = LayerNorm(d, **norm)
        self.norm = LayerNorm(d, **norm)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        *,
        visible: Bool[Array, "b t"] | None = None,
        types: Int[Array, "b t"] | None = None,
    ) -> Float[Array, "b t v"]:
        """Logits over the vocabulary, float32: of the next token if causal, else of each token.

        visible: False for padding, which nobody attends to. types: of the segments.
        Raises ValueError for more tokens than `max_seq_len`, or types where there are none.
        """
        x = self.norm(self.encode(self.embedded(tokens, types), self.mask(tokens, visible)))
        table = self.embed.embedding[...].astype(x.dtype)
        return matrix_dot_general(x, table.T, preferred_element_type=jnp.float32)

    def embedded(
        self, tokens: Int[Array, "b t"], types: Int[Array, "b t"] | None = None
    ) -> Float[Array, "b t d"]:
        """What the first block reads."""
        config, t = self.config, tokens.shape[1]
        require(
            t <= config.max_seq_len,
            f"tokens has {t} positions; max_seq_len allows {config.max_seq_len}.",
        )
        require(
            types is None or config.type_vocab_size > 0,
            "types are given; type_vocab_size, which is 0, says that there are none.",
        )
        x = self.embed.embedding[...][tokens] + self.positions.embedding[...][:t]
        if config.type_vocab_size:
            x += self.types.embedding[...][jnp.zeros_like(tokens) if types is None else types]
        x = x.astype(config.dtype)
        return x if config.causal else self.embed_norm(x)

    def mask(
        self, tokens: Int[Array, "b t"], visible: Bool[Array, "b t"] | None
    ) -> Bool[Array, "#b 1 #t t"] | None:
        """Who may attend to whom; a token always sees itself."""
        t = tokens.shape[1]
        allowed = jnp.tril(jnp.ones((1, 1, t, t), bool)) if self.config.causal else None
        if visible is not None:
            seen = visible[:, None, None, :] | jnp.eye(t, dtype=bool)
            allowed = seen if allowed is None else allowed & seen
        return allowed


def layer_statistics(
    model: CrateClassifier | CrateMAE, images: Float[Array, "b h w c"]
) -> dict[str, Float[Array, "depth b"]]:
    """How compressed and how sparse the tokens of each image are, layer by layer.

    Returns:
      `rate`: `projected_coding_rate` of what the attention projects its normed tokens to, with eps
      0.01. `density`: the share of codes that are not 0. Both `[depth, b]`, float32.

    Source: the layer-wise figures of CRATE.

    >>> from sparsejax.models import crate_config
    >>> config = crate_config("tiny", n_layers=2, patch_size=8, image_size=16)
    >>> model = CrateClassifier(config, rngs=nnx.Rngs(0))
    >>> nnx.jit(layer_statistics)(model, jnp.ones((3, 16, 16, 3)))["rate"].shape
    (2, 3)
    """
    x = model.embedded(images)
    return run_blocks_detailed(model.blocks, x, None, remat=model.config.remat)[1]


def class_attention(
    model: CrateClassifier | CrateMAE, images: Float[Array, "b h w c"], layer: int = -1
) -> Float[Array, "b k n"]:
    """How much the class token attends to each patch in one layer, by head.

    Raises ValueError for a layer that is not there.

    >>> from sparsejax.models import crate_config
    >>> config = crate_config("tiny", n_layers=2, patch_size=8, image_size=16)
    >>> class_attention(CrateClassifier(config, rngs=nnx.Rngs(0)), jnp.ones((1, 16, 16, 3))).shape
    (1, 6, 4)
    """
    layers = model.config.n_layers
    require(-layers <= layer < layers, f"layer is {layer}; this model has {layers}.")
    x = model.embedded(images)
    for i in range(layer % layers):
        x = model.block(i)(x)
    block = model.block(layer % layers)
    weights = block.attention.qkv.kernel[...].T.astype(x.dtype)
    maps = attention_maps(block.attention_norm(x), weights, heads=model.config.n_heads)
    return maps[:, :, 0, 1:]


def with_class_token(x: Float[Array, "b n d"], token: Float[Array, "1 d"]) -> Float[Array, "b m d"]:
    """`x` with one more token in front, the same for all."""
    first = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], *token.shape))
    return jnp.concatenate([first, x], axis=1)


def _check_images(images: Array, config: CrateImageConfig) -> None:
    shape = (*config.sides, config.in_channels)
    require(
        images.ndim == 4 and images.shape[1:] == shape,
        f"images has the shape {images.shape}; it must be [batch, {', '.join(map(str, shape))}].",
    )


def _embedding(config: CrateConfig, size: int, std: float, rngs: nnx.Rngs) -> nnx.Embed:
    return nnx.Embed(
        size,
        config.d_model,
        param_dtype=jnp.dtype(config.param_dtype),
        embedding_init=nnx.initializers.normal(std),
        rngs=rngs,
    )


def _xavier_linear(config: CrateConfig, size_in: int, size_out: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        size_in,
        size_out,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=nnx.initializers.xavier_uniform(),
        dot_general=matrix_dot_general,
        rngs=rngs,
    )


CRATE_AXES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "patch_embed/kernel": ("patch", "embed"),
        "predictor/kernel": ("embed", "patch"),
        "predictor/bias": ("patch",),
        "patch_norm/scale": ("patch",),
        "patch_norm/bias": ("patch",),
        "class_token/embedding": ("one", "embed"),
        "mask_token/embedding": ("one", "embed"),
        "positions/embedding": ("positions", "embed"),
        "embed/embedding": ("vocab", "embed"),
        "types/embedding": ("types", "embed"),
        "head/kernel": ("embed", "classes"),
        "head/bias": ("classes",),
        "qkv/kernel": ("embed", "heads"),
        "out_proj/kernel": ("heads", "embed"),
        "ista/dictionary": ("embed", "atoms"),
        "ista/output": ("embed", "atoms"),
        "decoder_blocks/dictionary": ("embed", "atoms"),
        **{f"{name}/bias": ("embed",) for name in ("out_proj", "patch_embed")},
        **{
            f"{name}/{part}": ("embed",)
            for name in ("attention_norm", "ista_norm", "linear_norm", "embed_norm", "head_norm",
                         "norm", "decoder_norm")
            for part in ("scale", "bias")
        },
    }
)  # fmt: skip
"""What each axis of a parameter means, by the end of its path; the stack puts `layers` in front."""

CRATE_RULES: Mapping[str, str | None] = MappingProxyType({"heads": "model", "vocab": "model"})
"""Logical axis to mesh axis, as tensor parallelism wants it; the rest is replicated."""


def crate_param_specs(params: PyTree, rules: Rules = CRATE_RULES) -> PyTree:
    """The PartitionSpec of every leaf of a CRATE model.

    params: `nnx.split(model)[1]`, its abstract twin, or any tree whose paths end as the
        parameters' do, such as the state of an Adam. Scalars are replicated.
    rules: logical axis to mesh axis or axes; see `CRATE_AXES`.

    Raises ValueError for an unknown logical axis or parameter.

    >>> from jax.sharding import PartitionSpec
    >>> specs = crate_param_specs({"qkv": {"kernel": jnp.ones((2, 4, 8))}})
    >>> specs["qkv"]["kernel"] == PartitionSpec(None, None, "model")
    True
    """
    return specs_of(params, rules, CRATE_AXES, "CRATE models")
