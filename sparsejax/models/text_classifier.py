"""A classifier of texts: an encoder over tokens, whose mean a linear head reads.

Source: Devlin et al., "BERT", 2019, for the sizes and the learned positions; the norms come before
the branches, and the mean over the tokens takes the place of the class token.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax.models.config_checks import named, require_sizes
from sparsejax.models.encoder import Encoder, embedding, linear
from sparsejax.models.encoder_config import EncoderConfig
from sparsejax.models.llama_config import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextClassifierConfig(EncoderConfig):
    """Static description of a `TextClassifier`; hashable.

    vocab_size, max_seq_len: number of tokens, and the longest text that the model accepts.
    num_classes: number of logits; 1 makes a regression.
    pad_id: the token that fills short texts.

    The other fields are those of `EncoderConfig`, and so are the errors.
    """

    vocab_size: int = 30522
    max_seq_len: int = 512
    num_classes: int = 2
    pad_id: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "vocab_size", "max_seq_len", "num_classes")
        require(
            0 <= self.pad_id < self.vocab_size,
            f"pad_id is {self.pad_id}; it must be a token, from 0 to {self.vocab_size - 1}.",
        )


TEXT_CLASSIFIER_SIZES: Mapping[str, TextClassifierConfig] = MappingProxyType(
    {
        "tiny": TextClassifierConfig(d_model=128, n_layers=2, n_heads=2),
        "small": TextClassifierConfig(d_model=512, n_layers=4, n_heads=8),
        "base": TextClassifierConfig(d_model=768, n_layers=12, n_heads=12),
    }
)
"""Named configurations, with BERT's vocabulary. The first two sizes are those of Turc et al.,
"Well-Read Students Learn Better", 2019."""


def text_classifier_config(name: str, **changes) -> TextClassifierConfig:
    """The configuration called `name` in `TEXT_CLASSIFIER_SIZES`, with fields as in `changes`.

    Raises ValueError for an unknown name, and as `TextClassifierConfig` does.

    >>> text_classifier_config("tiny", num_classes=5).d_model
    128
    """
    return dataclasses.replace(named(TEXT_CLASSIFIER_SIZES, name), **changes)


class TextClassifier(Encoder):
    """A classifier of texts; `nnx.split` gives a graph and exactly its parameters.

    Paths: `embed/embedding [vocab, d]`, `positions/embedding [max_seq_len, d]`,
    `blocks/attention/q_proj/kernel [layers, in, out]` and so on, `norm/scale [d]`,
    `head/kernel [d, classes]`. With f the width of the feed-forward layer these are
    `d (vocab + max_seq_len) + layers (4 d^2 + 2 d f + 9 d + f) + 2 d + (d + 1) classes` parameters.
    Call it under `jit`: outside, the loop over the blocks is compiled anew at every call.

    >>> model = TextClassifier(text_classifier_config("tiny", n_layers=1), rngs=nnx.Rngs(0))
    >>> model(jnp.array([[5, 7, 9, 0], [8, 0, 0, 0]])).shape
    (2, 2)
    """

    config: TextClassifierConfig

    def __init__(self, config: TextClassifierConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.embed = embedding(config, config.vocab_size, rngs=rngs)
        self.positions = embedding(config, config.max_seq_len, rngs=rngs)
        self.head = linear(config, config.d_model, config.num_classes, dtype="float32", rngs=rngs)

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b classes"]:
        """Logits of the classes (or the one value of a regression), float32.

        Tokens equal to `pad_id` change nothing, wherever they stand after the text; a text of them
        alone gives the head's bias. A token outside the vocabulary gives NaN.
        Raises ValueError if `tokens` is no matrix, or `t` exceeds `max_seq_len`. Differentiable in
        the parameters.
        """
        return self.head(self.features(tokens))

    def features(self, tokens: Int[Array, "b t"]) -> Float[Array, "b d"]:
        """What the head reads: the mean over the tokens that are no padding, float32."""
        limit = self.config.max_seq_len
        require(
            tokens.ndim == 2 and tokens.shape[1] <= limit,
            f"tokens has the shape {tokens.shape}; it must be [batch, length], with a length of at "
            f"most max_seq_len = {limit}.",
        )
        real = tokens != self.config.pad_id
        x = self.encode(self.embedded(tokens), real).astype(jnp.float32)
        count = jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1).astype(jnp.float32)
        return jnp.sum(jnp.where(real[..., None], x, 0.0), axis=1) / count

    def embedded(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Token plus position embeddings in `config.dtype`: what the first block reads."""
        positions = self.positions.embedding[...][: tokens.shape[1]]
        return (self.embed(tokens) + positions).astype(self.config.dtype)
