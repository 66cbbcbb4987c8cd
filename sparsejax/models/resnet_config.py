"""Settings of the convolutional classifiers, and the names of the published ResNets."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from sparsejax.models.config_checks import (
    named,
    require_choice,
    require_dtypes,
    require_positive,
    require_sizes,
)
from sparsejax.models.decoding import DType
from sparsejax.models.llama_config import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvNetConfig:
    """What every convolutional classifier has; all that `ResNet9` and `VGG19` have.

    num_classes, in_channels: of the logits and of the images.
    base_width: channels of the narrowest layers; all the others are multiples of it, so that it
        widens the whole network: the first convolution and the head on their inner side alone.
    norm_momentum, norm_eps: share of the old running averages that a batch leaves, and what is
        added to the variance, in every batch norm.
    dtype, param_dtype: of the activations and of the parameters. Batch norms, running averages,
        pooled features and logits are float32 whatever `dtype` is.

    Raises ValueError for values that cannot be, naming the field.
    """

    num_classes: int = 10
    in_channels: int = 3
    base_width: int = 64
    norm_momentum: float = 0.9
    norm_eps: float = 1e-5
    dtype: DType = "float32"
    param_dtype: DType = "float32"

    def __post_init__(self) -> None:
        require_sizes(self, "num_classes", "in_channels", "base_width")
        require_positive(self, "norm_eps")
        require(
            0 <= self.norm_momentum < 1,
            f"norm_momentum is {self.norm_momentum}; it must be at least 0 and below 1.",
        )
        require_dtypes(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetConfig(ConvNetConfig):
    """Static description of a `ResNet`; hashable, so it may be a static argument of `jit`.

    stage_sizes: blocks of each stage; stage i has `base_width * 2**i` channels (four times that
        after a bottleneck) and, but for the first, halves the image.
    block: `"basic"`, two 3 x 3 convolutions, or `"bottleneck"`, 1 x 1, 3 x 3, 1 x 1 with the stride
        on the 3 x 3.
    stem: `"cifar"`, one 3 x 3 convolution, or `"imagenet"`, one of 7 x 7 with stride 2 and then the
        maximum over 3 x 3 with stride 2.
    shortcut: where a block changes the shape, `"projection"` is a 1 x 1 convolution with batch norm
        and `"identity_pad"` skips pixels and appends channels of zeros (He's option A).
    zero_init_last_scale: every block starts as the identity, for the scale of its last batch norm
        starts at 0 (Goyal et al., 2017).

    The other fields are those of `ConvNetConfig`, and so are the errors.
    """

    stage_sizes: tuple[int, ...]
    block: Literal["basic", "bottleneck"] = "basic"
    stem: Literal["cifar", "imagenet"] = "imagenet"
    shortcut: Literal["projection", "identity_pad"] = "projection"
    zero_init_last_scale: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = self.stage_sizes
        require(
            len(sizes) > 0 and all(isinstance(size, int) and size > 0 for size in sizes),
            f"stage_sizes is {sizes!r}; it must hold positive integers, at least one.",
        )
        require_choice(self, "block", ("basic", "bottleneck"))
        require_choice(self, "stem", ("cifar", "imagenet"))
        require_choice(self, "shortcut", ("projection", "identity_pad"))


def _imagenet(*stage_sizes: int, **options) -> ResNetConfig:
    return ResNetConfig(stage_sizes=stage_sizes, num_classes=1000, **options)


def _cifar(*stage_sizes: int, **options) -> ResNetConfig:
    return ResNetConfig(stage_sizes=stage_sizes, stem="cifar", **options)


def _narrow(blocks: int) -> ResNetConfig:
    return _cifar(blocks, blocks, blocks, base_width=16, shortcut="identity_pad")


RESNET_SIZES: Mapping[str, ResNetConfig] = MappingProxyType(
    {
        "resnet18": _imagenet(2, 2, 2, 2),
        "resnet34": _imagenet(3, 4, 6, 3),
        "resnet50": _imagenet(3, 4, 6, 3, block="bottleneck"),
        "resnet18_cifar": _cifar(2, 2, 2, 2),
        "resnet34_cifar": _cifar(3, 4, 6, 3),
        "resnet50_cifar": _cifar(3, 4, 6, 3, block="bottleneck"),
        "resnet20": _narrow(3),
        "resnet56": _narrow(9),
    }
)
"""Named configurations. Plain names are the networks of ImageNet, 1000 classes; `_cifar` is their
trunk behind the stem for small images, 10 classes; `resnet20` and `resnet56` are He's for CIFAR,
three stages of 16, 32 and 64 channels with option A."""


def resnet_config(name: str, **changes) -> ResNetConfig:
    """The configuration called `name` in `RESNET_SIZES`, with fields replaced by `changes`.

    Raises ValueError for an unknown name, and as `ResNetConfig` does.

    >>> resnet_config("resnet18_cifar", base_width=128).stage_sizes  # a wide ResNet
    (2, 2, 2, 2)
    """
    return dataclasses.replace(named(RESNET_SIZES, name), **changes)
