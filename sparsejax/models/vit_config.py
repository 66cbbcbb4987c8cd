"""Sizes and settings of vision transformers, and the names of the published ones."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from sparsejax.models.config_checks import named, require_choice, require_sizes
from sparsejax.models.encoder_config import EncoderConfig
from sparsejax.models.llama_config import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(EncoderConfig):
    """Static description of a `ViT`; hashable, so it may be a static argument of `jit`.

    image_size, patch_size: sides of the images and of the patches, in pixels; the second divides
        the first.
    in_channels, num_classes: of the images and of the logits.
    pool: the head reads the `"class"` token or the `"mean"` of all patches, without such a token.

    The other fields are those of `EncoderConfig`, and so are the errors.
    """

    image_size: int = 224
    patch_size: int = 16
    in_channels: int = 3
    num_classes: int = 1000
    pool: Literal["class", "mean"] = "class"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "image_size", "patch_size", "in_channels", "num_classes")
        require_choice(self, "pool", ("class", "mean"))
        require(
            self.image_size % self.patch_size == 0,
            f"image_size is {self.image_size}; it must be divisible by patch_size, which is "
            f"{self.patch_size}.",
        )

    @property
    def patches(self) -> int:
        """Number of patches along one side."""
        return self.image_size // self.patch_size

    @property
    def seq_len(self) -> int:
        """Number of tokens: the patches, and the class token if there is one."""
        return self.patches**2 + (self.pool == "class")


VIT_SIZES: Mapping[str, ViTConfig] = MappingProxyType(
    {
        "tiny": ViTConfig(d_model=192, n_layers=12, n_heads=3),
        "small": ViTConfig(d_model=384, n_layers=12, n_heads=6),
        "base": ViTConfig(d_model=768, n_layers=12, n_heads=12),
        "large": ViTConfig(d_model=1024, n_layers=24, n_heads=16),
    }
)
"""Named configurations for images of 224 x 224 and patches of 16 x 16; tiny and small are those of
Touvron et al., "Training Data-Efficient Image Transformers", 2021."""


def vit_config(name: str, **changes) -> ViTConfig:
    """The configuration called `name` in `VIT_SIZES`, with fields replaced by `changes`.

    Raises ValueError for an unknown name, and as `ViTConfig` does.

    >>> vit_config("tiny", patch_size=4, image_size=32, num_classes=10).seq_len
    65
    """
    return dataclasses.replace(named(VIT_SIZES, name), **changes)
