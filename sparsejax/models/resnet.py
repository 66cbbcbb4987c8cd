"""Residual networks for images, in their first form: batch norm and ReLU after the convolutions.

Source: He et al., "Deep Residual Learning for Image Recognition", 2016. The bottleneck has its
stride on the 3 x 3 convolution, as the networks that are compared today do.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from sparsejax.models.conv_layers import BatchNorm, Images, check_images, classifier, conv
from sparsejax.models.resnet_config import ResNetConfig


class ResidualBlock(nnx.Module):
    """`relu(branch(x) + skip(x))`, with `shortcut` and `shortcut_norm` where `skip` is learned."""

    def __init__(
        self, config: ResNetConfig, size_in: int, size_out: int, stride: int, rngs: nnx.Rngs
    ):
        changed = stride > 1 or size_out != size_in
        self.stride, self.added = stride, size_out - size_in
        self.projected = changed and config.shortcut == "projection"
        if self.projected:
            self.shortcut = conv(config, size_in, size_out, 1, stride=stride, rngs=rngs)
            self.shortcut_norm = BatchNorm(config, size_out, rngs=rngs)

    def branch(self, x: Images, *, train: bool) -> Float[Array, "b _h _w _c"]:
        """The residual branch, up to its last batch norm."""
        raise NotImplementedError

    def skip(self, x: Images, *, train: bool) -> Float[Array, "b _h _w _c"]:
        """What the branch is added to: `x`, in the shape of the branch."""
        if self.projected:
            return self.shortcut_norm(self.shortcut(x), train=train)
        x = x[:, :: self.stride, :: self.stride]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.added)))

    def __call__(self, x: Images, *, train: bool) -> Float[Array, "b _h _w _c"]:
        """The images after this block."""
        return jax.nn.relu(self.branch(x, train=train) + self.skip(x, train=train))


class BasicBlock(ResidualBlock):
    """Two convolutions of 3 x 3: `conv1`, `norm1`, `conv2`, `norm2`."""

    expansion = 1

    def __init__(
        self, config: ResNetConfig, size_in: int, width: int, stride: int, *, rngs: nnx.Rngs
    ):
        super().__init__(config, size_in, width, stride, rngs)
        last = 0.0 if config.zero_init_last_scale else 1.0
        self.conv1 = conv(config, size_in, width, 3, stride=stride, rngs=rngs)
        self.norm1 = BatchNorm(config, width, rngs=rngs)
        self.conv2 = conv(config, width, width, 3, rngs=rngs)
        self.norm2 = BatchNorm(config, width, scale=last, rngs=rngs)

    def branch(self, x: Images, *, train: bool) -> Float[Array, "b _h _w _c"]:
        """The residual branch, up to its last batch norm."""
        x = jax.nn.relu(self.norm1(self.conv1(x), train=train))
        return self.norm2(self.conv2(x), train=train)


class BottleneckBlock(ResidualBlock):
    """Convolutions of 1 x 1, 3 x 3 and 1 x 1: `conv1`, `norm1` to `conv3`, `norm3`."""

    expansion = 4

    def __init__(
        self, config: ResNetConfig, size_in: int, width: int, stride: int, *, rngs: nnx.Rngs
    ):
        wide = self.expansion * width
        super().__init__(config, size_in, wide, stride, rngs)
        last = 0.0 if config.zero_init_last_scale else 1.0
        self.conv1 = conv(config, size_in, width, 1, rngs=rngs)
        self.norm1 = BatchNorm(config, width, rngs=rngs)
        self.conv2 = conv(config, width, width, 3, stride=stride, rngs=rngs)
        self.norm2 = BatchNorm(config, width, rngs=rngs)
        self.conv3 = conv(config, width, wide, 1, rngs=rngs)
        self.norm3 = BatchNorm(config, wide, scale=last, rngs=rngs)

    def branch(self, x: Images, *, train: bool) -> Float[Array, "b _h _w _c"]:
        """The residual branch, up to its last batch norm."""
        x = jax.nn.relu(self.norm1(self.conv1(x), train=train))
        x = jax.nn.relu(self.norm2(self.conv2(x), train=train))
        return self.norm3(self.conv3(x), train=train)


class ResNet(nnx.Module):
    """A classifier of images; its state is parameters and the running averages of batch norms.

    Paths: `stem/kernel [size, size, in, out]`, `stem_norm/scale`, `stages/0/1/conv1/kernel`,
    `stages/0/1/norm1/scale`, `stages/1/0/shortcut/kernel` and so on, `head/kernel [in, classes]`.

    In training, a call updates the running averages of the module that is called. As a pure
    function, with the averages in and out; `copy=True` gives the averages to the trace of the
    gradient, outside of which Flax would not let them change:

    >>> from sparsejax.models import resnet_config
    >>> config = resnet_config("resnet20", stage_sizes=(1,))
    >>> model = ResNet(config, rngs=nnx.Rngs(0))
    >>> graphdef, params, averages = nnx.split(model, nnx.Param, nnx.BatchStat)
    >>> def loss(params, averages, images):
    ...     model = nnx.merge(graphdef, params, averages, copy=True)
    ...     logits = model(images, train=True)
    ...     return jnp.mean(logits**2), nnx.state(model, nnx.BatchStat)
    >>> step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    >>> (value, averages), gradient = step(params, averages, jnp.ones((4, 8, 8, 3)))
    >>> nnx.merge(graphdef, params, averages)(jnp.ones((4, 8, 8, 3)), train=False).shape
    (4, 10)
    """

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs):
        block = BasicBlock if config.block == "basic" else BottleneckBlock
        size, stride = (3, 1) if config.stem == "cifar" else (7, 2)
        width = config.base_width
        self.config = config
        self.stem = conv(config, config.in_channels, width, size, stride=stride, rngs=rngs)
        self.stem_norm = BatchNorm(config, width, rngs=rngs)
        stages, size_in = [], width
        for i, count in enumerate(config.stage_sizes):
            blocks, width = [], config.base_width * 2**i
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(block(config, size_in, width, stride, rngs=rngs))
                size_in = width * block.expansion
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        self.head = classifier(config, size_in, rngs=rngs)

    def __call__(
        self, images: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b classes"]:
        """Logits of the classes, float32.

        train: normalise by the statistics of the batch and update the running averages with them;
            otherwise normalise by the averages, and change nothing.
        Raises ValueError unless `c` is `in_channels`. Differentiable in parameters and images.
        """
        return self.head(self.features(images, train=train))

    def features(
        self, images: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b features"]:
        """What the head reads: the last stage averaged over the image, float32."""
        check_images(self.config, images.shape)
        x = self.stem(images.astype(self.config.dtype))
        x = jax.nn.relu(self.stem_norm(x, train=train))
        if self.config.stem == "imagenet":
            padding = ((0, 0), (1, 1), (1, 1), (0, 0))
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)
        for stage in self.stages:
            for block in stage:
                x = block(x, train=train)
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
