"""Settings that every encoder shares: `ViT` and `TextClassifier`."""

import dataclasses

from sparsejax.models.config_checks import require_dtypes, require_positive, require_sizes
from sparsejax.models.decoding import DType
from sparsejax.models.llama_config import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Static description of a stack of encoder blocks; hashable.

    d_model, n_layers, n_heads: sizes; `n_heads` divides `d_model`.
    d_ff: width of the feed-forward layer; None means `4 * d_model`. Read `ff_width`.
    norm_eps: added to the variance in every norm.
    init_std: standard deviation of initial embeddings and matrices.
    remat: the backward pass recomputes whole blocks from their inputs; without it, all but the
        outputs of the projections.
    dtype, param_dtype: of the activations and of the parameters. Softmax, statistics of the norms,
        pooled features and logits are float32 whatever `dtype` is.

    Raises ValueError for values that cannot be, naming the field.
    """

    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int | None = None
    norm_eps: float = 1e-6
    init_std: float = 0.02
    remat: bool = False
    dtype: DType = "float32"
    param_dtype: DType = "float32"

    def __post_init__(self) -> None:
        require_sizes(self, "d_model", "n_layers", "n_heads")
        if self.d_ff is not None:
            require_sizes(self, "d_ff")
        require_positive(self, "norm_eps", "init_std")
        require_dtypes(self)
        require(
            self.d_model % self.n_heads == 0,
            f"n_heads is {self.n_heads}; it must divide d_model, which is {self.d_model}.",
        )

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.d_model // self.n_heads

    @property
    def ff_width(self) -> int:
        """Width of the feed-forward layer."""
        return 4 * self.d_model if self.d_ff is None else self.d_ff
