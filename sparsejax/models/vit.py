"""The vision transformer: an encoder over the patches of an image.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparsejax.models.encoder import Encoder, embedding, linear
from sparsejax.models.llama_config import require
from sparsejax.models.vit_config import ViTConfig


class ViT(Encoder):
    """A classifier of images; `nnx.split` gives a graph and exactly its parameters.

    Paths: `patch_embed/kernel [patch * patch * channels, d]`, `class_token/embedding [1, d]` unless
    `pool` is `"mean"`, `positions/embedding [seq_len, d]`, `blocks/attention/q_proj/kernel [layers,
    in, out]` and so on, `norm/scale [d]`, `head/kernel [d, classes]`.
    Call it under `jit`: outside, the loop over the blocks is compiled anew at every call.

    >>> from sparsejax.models import vit_config
    >>> config = vit_config("tiny", n_layers=1, patch_size=8, image_size=16, num_classes=10)
    >>> graphdef, params = nnx.split(ViT(config, rngs=nnx.Rngs(0)))
    >>> nnx.merge(graphdef, params)(jnp.zeros((2, 16, 16, 3))).shape
    (2, 10)
    """

    config: ViTConfig

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        pixels = config.patch_size**2 * config.in_channels
        # Pixels have a scale of their own: tokens shall have it too, at any patch size.
        scaled = nnx.initializers.lecun_normal()
        self.patch_embed = linear(config, pixels, config.d_model, kernel_init=scaled, rngs=rngs)
        if config.pool == "class":
            self.class_token = embedding(config, 1, rngs=rngs)
        self.positions = embedding(config, config.seq_len, rngs=rngs)
        self.head = linear(config, config.d_model, config.num_classes, dtype="float32", rngs=rngs)

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        """Logits of the classes, float32.

        Raises ValueError unless the images are `[b, image_size, image_size, in_channels]`.
        Differentiable in parameters and images.
        """
        return self.head(self.features(images))

    def features(self, images: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
        """What the head reads: the class token after the last norm, or the mean, float32."""
        x = self.encode(self.embedded(images))
        if self.config.pool == "class":
            return x[:, 0].astype(jnp.float32)
        return jnp.mean(x, axis=1, dtype=jnp.float32)

    def embedded(self, images: Float[Array, "b h w c"]) -> Float[Array, "b t d"]:
        """Tokens with their positions in `config.dtype`: what the first block reads.

        The class token is the first; patches follow row by row, each flattened from
        `[patch, patch, channels]`.
        """
        config, side = self.config, self.config.image_size
        require(
            images.ndim == 4 and images.shape[1:] == (side, side, config.in_channels),
            f"images has the shape {images.shape}; it must be [batch, {side}, {side}, "
            f"{config.in_channels}].",
        )
        b, patch, count = images.shape[0], config.patch_size, config.patches
        x = images.reshape(b, count, patch, count, patch, -1).transpose(0, 1, 3, 2, 4, 5)
        x = self.patch_embed(x.reshape(b, count**2, -1).astype(config.dtype))
        if config.pool == "class":
            token = self.class_token.embedding[...].astype(config.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (b, 1, config.d_model)), x], axis=1)
        return x + self.positions.embedding[...].astype(config.dtype)
