"""The layers of the convolutional classifiers: images `[batch, height, width, channels]`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PyTree

from sparsejax.models.llama_config import require
from sparsejax.models.resnet_config import ConvNetConfig

Images = Float[Array, "b h w c"]


def conv(
    config: ConvNetConfig,
    size_in: int,
    size_out: int,
    size: int,
    *,
    stride: int = 1,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A convolution `[size, size, in, out]` without bias, padded by `size // 2` on every side.

    Initial values are normal with variance 2 / (size^2 out).

    Source: He et al., "Delving Deep into Rectifiers", 2015.
    """
    return nnx.Conv(
        size_in,
        size_out,
        (size, size),
        strides=stride,
        # Not "SAME", which pads an even image with stride 2 on one side alone; not a list, which
        # would keep the model's graph from being hashed.
        padding=((size // 2, size // 2),) * 2,
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
        rngs=rngs,
    )


class BatchNorm(nnx.BatchNorm):
    """Batch norm in float32 over all axes but the last: `scale`, `bias`; averages `mean`, `var`.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015.
    """

    def __init__(self, config: ConvNetConfig, width: int, *, scale: float = 1.0, rngs: nnx.Rngs):
        super().__init__(
            width,
            momentum=config.norm_momentum,
            epsilon=config.norm_eps,
            dtype=jnp.float32,
            param_dtype=jnp.dtype(config.param_dtype),
            scale_init=nnx.initializers.constant(scale),
            rngs=rngs,
        )

    def __call__(self, x: Images, *, train: bool) -> Images:
        """The normalised `x`, in the dtype of `x`.

        train: by the batch's own mean and (biased) variance, which enter the running averages;
            otherwise by the averages.
        """
        return super().__call__(x, use_running_average=not train).astype(x.dtype)


class ConvNorm(nnx.Module):
    """`relu(norm(conv(x)))`, with a convolution of 3 x 3 and stride 1."""

    def __init__(self, config: ConvNetConfig, size_in: int, size_out: int, *, rngs: nnx.Rngs):
        self.conv = conv(config, size_in, size_out, 3, rngs=rngs)
        self.norm = BatchNorm(config, size_out, rngs=rngs)

    def __call__(self, x: Images, *, train: bool) -> Float[Array, "b h w _c"]:
        """The layer's output, of the image's height and width."""
        return jax.nn.relu(self.norm(self.conv(x), train=train))


def classifier(
    config: ConvNetConfig, size_in: int, *, use_bias: bool = True, rngs: nnx.Rngs
) -> nnx.Linear:
    """The head, `[in, num_classes]`, which computes in float32."""
    return nnx.Linear(
        size_in,
        config.num_classes,
        use_bias=use_bias,
        dtype=jnp.float32,
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )


def halved(x: Images) -> Float[Array, "b _h _w c"]:
    """The maximum of every 2 x 2 pixels; equal ones share the gradient.

    On CPU its gradient takes a sixth of the time of that of a `reduce_window`.
    """
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))


def check_images(config: ConvNetConfig, shape: Sequence[int], multiple: int = 1) -> None:
    """Raises ValueError unless `shape` is that of images that the network can read.

    multiple: what height and width must be divisible by.
    """
    fits = len(shape) == 4 and shape[3] == config.in_channels and 0 not in shape[1:3]
    require(
        fits and all(size % multiple == 0 for size in shape[1:3]),
        f"images has the shape {tuple(shape)}; it must be [batch, height, width, "
        f"{config.in_channels}]"
        + (f" with height and width divisible by {multiple}." if multiple > 1 else "."),
    )


def replicated_specs(tree: PyTree) -> PyTree:
    """An empty PartitionSpec for every leaf, in the structure of `tree`.

    For the parameters and running averages of convolutional classifiers, which are small: shard
    the batch alone. Under `jit` the batch norms' statistics are then those of the whole batch.

    >>> replicated_specs({"kernel": jnp.ones((3, 3, 4, 8))})["kernel"] == PartitionSpec()
    True
    """
    return jax.tree.map(lambda _: PartitionSpec(), tree)
