"""Two networks for small images: the fast ResNet-9 and VGG-19 with batch norm.

They are called as `ResNet` is, and their state is split as there.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparsejax.models.conv_layers import (
    ConvNorm,
    Images,
    check_images,
    classifier,
    halved,
)
from sparsejax.models.resnet_config import ConvNetConfig

_LOGIT_SCALE = 0.125  # of ResNet-9's author: a head without bias whose logits start small
_VGG19 = ((1, 2), (2, 2), (4, 4), (8, 4), (8, 4))  # width over base_width, convolutions


class ResNet9(nnx.Module):
    """A classifier of images that trains in seconds: eight convolutions and a head without bias.

    Widths are 1, 2, 4 and 8 times `base_width`; with 64 and 10 classes it has 6,573,120 parameters.
    Paths: `prep/conv/kernel`, `prep/norm/scale`, `layer1/conv/kernel`, `residual1/0/conv/kernel`,
    `residual1/1/conv/kernel`, `layer2/...`, `layer3/...`, `residual3/...`, `head/kernel`.

    Source: Page, "How to Train Your ResNet", 2018, an entry of DAWNBench (Coleman et al., 2017).

    >>> from sparsejax.core.selection import named_leaves
    >>> model = nnx.eval_shape(lambda: ResNet9(ConvNetConfig(), rngs=nnx.Rngs(0)))  # no arrays
    >>> sum(leaf.size for _, leaf in named_leaves(nnx.state(model, nnx.Param)))
    6573120
    """

    def __init__(self, config: ConvNetConfig, *, rngs: nnx.Rngs):
        def residual(width: int):
            return nnx.List([ConvNorm(config, width, width, rngs=rngs) for _ in range(2)])

        width = config.base_width
        self.config = config
        self.prep = ConvNorm(config, config.in_channels, width, rngs=rngs)
        self.layer1 = ConvNorm(config, width, 2 * width, rngs=rngs)
        self.residual1 = residual(2 * width)
        self.layer2 = ConvNorm(config, 2 * width, 4 * width, rngs=rngs)
        self.layer3 = ConvNorm(config, 4 * width, 8 * width, rngs=rngs)
        self.residual3 = residual(8 * width)
        self.head = classifier(config, 8 * width, use_bias=False, rngs=rngs)

    def __call__(
        self, images: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b classes"]:
        """Logits of the classes, float32; `train` as for `ResNet`.

        Raises ValueError unless `c` is `in_channels` and `h` and `w` are divisible by 8.
        """
        return self.head(self.features(images, train=train)) * _LOGIT_SCALE

    def features(
        self, images: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b features"]:
        """What the head reads: the maximum over the last image, float32."""
        check_images(self.config, images.shape, multiple=8)
        x = self.prep(images.astype(self.config.dtype), train=train)
        x = _added(self.residual1, halved(self.layer1(x, train=train)), train=train)
        x = halved(self.layer2(x, train=train))
        x = _added(self.residual3, halved(self.layer3(x, train=train)), train=train)
        return jnp.max(x, axis=(1, 2)).astype(jnp.float32)


class VGG19(nnx.Module):
    """A classifier of images: sixteen convolutions in five stages, and one linear layer.

    Widths are 1, 2, 4, 8 and 8 times `base_width`. With 64 it has 20,035,018 parameters for 10
    classes and 20,081,188 for 100: `9 * 2,224,320` in the convolutions, `2 * 5,504` in the batch
    norms, and `513 * classes` in the head.
    Paths: `stages/0/1/conv/kernel`, `stages/0/1/norm/scale` and so on, `head/kernel`.
    With images of 32 x 32, XLA's CPU backend spends most of a step on the last stage: it is slow at
    images smaller than the kernel. Accelerators are not.

    Source: Simonyan and Zisserman, "Very Deep Convolutional Networks", 2015, configuration E; batch
    norm and the one linear layer are what CIFAR is commonly trained with.

    >>> from sparsejax.core.selection import named_leaves
    >>> config = ConvNetConfig(num_classes=100)
    >>> model = nnx.eval_shape(lambda: VGG19(config, rngs=nnx.Rngs(0)))  # no arrays
    >>> sum(leaf.size for _, leaf in named_leaves(nnx.state(model, nnx.Param)))
    20081188
    """

    def __init__(self, config: ConvNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        stages, size_in = [], config.in_channels
        for multiple, count in _VGG19:
            layers, width = [], multiple * config.base_width
            for _ in range(count):
                layers.append(ConvNorm(config, size_in, width, rngs=rngs))
                size_in = width
            stages.append(nnx.List(layers))
        self.stages = nnx.List(stages)
        self.head = classifier(config, size_in, rngs=rngs)

    def __call__(
        self, images: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b classes"]:
        """Logits of the classes, float32; `train` as for `ResNet`.

        Raises ValueError unless `c` is `in_channels` and `h` and `w` are divisible by 32.
        """
        return self.head(self.features(images, train=train))

    def features(
        self, images: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b features"]:
        """What the head reads: the last stage averaged over the image (32 x 32 leave one pixel)."""
        check_images(self.config, images.shape, multiple=32)
        x = images.astype(self.config.dtype)
        for stage in self.stages:
            for layer in stage:
                x = layer(x, train=train)
            x = halved(x)
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)


def _added(layers: Sequence[ConvNorm], x: Images, *, train: bool) -> Images:
    y = x
    for layer in layers:
        y = layer(y, train=train)
    return x + y
