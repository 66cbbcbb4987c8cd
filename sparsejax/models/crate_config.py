"""Sizes and settings of CRATE models, and the names of the published ones."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from sparsejax.models.config_checks import named, require_dtypes, require_positive, require_sizes
from sparsejax.models.decoding import DType
from sparsejax.models.llama_config import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrateConfig:
    """Static description of a stack of CRATE blocks; hashable.

    d_model, n_layers, n_heads: sizes.
    head_dim: dimensions of a subspace; None means `d_model / n_heads`. Read `head_width`.
    step_size, lam: of the sparsifying step; 0.1 and 0.1 in the published classifiers, 0.1 and 0.5
        in the masked autoencoders.
    out_bias: the output projection of the attention has a bias; not in the text models.
    dictionary_width: atoms of an overcomplete dictionary, `4 * d_model` in CRATE-alpha; None: the
        complete dictionary of CRATE, one step from the token itself.
    dictionary_steps: steps from zero codes with an overcomplete dictionary.
    dictionary_residual: adds the token to what an overcomplete dictionary makes of the codes.
    dictionary_separate: decodes the codes by a matrix of its own.
    norm_eps: added to the variance in every norm.
    remat: the backward pass recomputes whole blocks from their inputs; without it, all but the
        outputs of the projections.
    dtype, param_dtype: of the activations and of the parameters. Softmax, statistics of the norms,
        the sum of a sparsifying step, rates and logits are float32 whatever `dtype` is.

    Raises ValueError for values that cannot be, naming the field.
    """

    d_model: int
    n_layers: int
    n_heads: int
    head_dim: int | None = None
    step_size: float = 0.1
    lam: float = 0.1
    out_bias: bool = True
    dictionary_width: int | None = None
    dictionary_steps: int = 2
    dictionary_residual: bool = False
    dictionary_separate: bool = False
    norm_eps: float = 1e-5
    remat: bool = False
    dtype: DType = "float32"
    param_dtype: DType = "float32"

    def __post_init__(self) -> None:
        require_sizes(self, "d_model", "n_layers", "n_heads", "dictionary_steps")
        for name in ("head_dim", "dictionary_width"):
            if getattr(self, name) is not None:
                require_sizes(self, name)
        require_positive(self, "step_size", "norm_eps")
        require(self.lam >= 0, f"lam is {self.lam}; it must not be negative.")
        require_dtypes(self)
        require(
            self.head_dim is not None or self.d_model % self.n_heads == 0,
            f"n_heads is {self.n_heads}; it must divide d_model, which is {self.d_model}, unless "
            "head_dim is given.",
        )
        for name in ("dictionary_residual", "dictionary_separate"):
            require(
                self.dictionary_width is not None or not getattr(self, name),
                f"{name} is True; dictionary_width, which is None, must be given with it.",
            )

    @property
    def head_width(self) -> int:
        """Dimensions of one subspace."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrateImageConfig(CrateConfig):
    """A CRATE model of images; hashable.

    image_size: height and width in pixels, or both as one number. patch_size: divides both.
    in_channels, num_classes: of the images and of the logits.
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int = 16
    in_channels: int = 3
    num_classes: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "patch_size", "in_channels", "num_classes")
        sides = self.sides
        require(
            len(sides) == 2 and all(side > 0 and side % self.patch_size == 0 for side in sides),
            f"image_size is {self.image_size}; patch_size, which is {self.patch_size}, must divide "
            "both sides.",
        )

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width in pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size

    @property
    def patches(self) -> int:
        """Number of patches."""
        return (self.sides[0] // self.patch_size) * (self.sides[1] // self.patch_size)

    @property
    def pixels(self) -> int:
        """Numbers in one patch."""
        return self.patch_size**2 * self.in_channels


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrateTextConfig(CrateConfig):
    """A CRATE model of text; hashable.

    vocab_size, max_seq_len: tokens, and the longest sequence.
    causal: each token sees itself and what is before it (as GPT); otherwise all see all, and the
        embeddings are normed (as BERT).
    type_vocab_size: kinds of segments, 2 in BERT; 0 leaves their embedding out.
    """

    vocab_size: int
    max_seq_len: int
    causal: bool = True
    type_vocab_size: int = 0
    out_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "vocab_size", "max_seq_len")
        require(
            self.type_vocab_size >= 0,
            f"type_vocab_size is {self.type_vocab_size}; it must not be negative.",
        )


CRATE_SIZES: Mapping[str, CrateImageConfig] = MappingProxyType(
    {
        "tiny": CrateImageConfig(d_model=384, n_layers=12, n_heads=6),
        "small": CrateImageConfig(d_model=576, n_layers=12, n_heads=12),
        "base": CrateImageConfig(d_model=768, n_layers=12, n_heads=12),
        "large": CrateImageConfig(d_model=1024, n_layers=24, n_heads=16),
    }
)
"""Named configurations for images of 224 x 224 and patches of 16 x 16."""


def crate_config(name: str, **changes) -> CrateImageConfig:
    """The configuration called `name` in `CRATE_SIZES`, with fields replaced by `changes`.

    Raises ValueError for an unknown name, and as `CrateImageConfig` does.

    >>> crate_config("tiny", patch_size=4, image_size=32, num_classes=10).patches
    64
    """
    return dataclasses.replace(named(CRATE_SIZES, name), **changes)
