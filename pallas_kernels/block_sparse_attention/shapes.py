"""Shapes that tests and benchmarks share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_attention.sources import KVSource


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call with one source.

    Attributes:
      queries, keys: how many. heads, key_heads, width: of them.
      block_q, block_k: tiles. slots: key tiles that each query tile lists.
    """

    queries: int
    keys: int
    heads: int
    key_heads: int
    width: int
    block_q: int
    block_k: int
    slots: int

    @property
    def density(self) -> float:
        """Share of the pairs that are listed."""
        return self.slots * self.block_k / self.keys


def long_context(tokens: int, block: int, density: float, heads: int = 1, width: int = 64) -> Shape:
    """Self-attention over many tokens at a share of its tiles."""
    slots = max(1, round(density * tokens / block))
    return Shape(tokens, tokens, heads, heads, width, block, block, slots)


SHAPES = {
    # Sparse Frontier's prefill of Qwen2.5-7B: 28 query heads, 4 key heads, blocks of 128 x 128
    "prefill_8k": Shape(8192, 8192, 28, 4, 128, 128, 128, 8),
    # Quest: pages of 16 tokens, one query, LLaMA-3-8B
    "decode_pages": Shape(1, 8192, 32, 8, 128, 1, 16, 64),
    # LLSA: tiles of 16 by 16
    "fine": Shape(4096, 4096, 8, 8, 64, 16, 16, 32),
    "video": long_context(16384, 64, 0.125, heads=8),
}
RAGGED = {
    "ragged": Shape(50, 75, 4, 2, 16, 16, 16, 3),
    "ragged_decode": Shape(1, 45, 4, 2, 16, 1, 8, 3),
}


def random_source(
    shape: Shape, seed: int = 0, dtype: jax.typing.DTypeLike = jnp.float32, *, full: bool = False
) -> tuple[jax.Array, KVSource]:
    """Random queries and a source whose lists are random too.

    Args:
      full: use every slot; otherwise counts are random, and those of the first query tile 0.
    """
    rng = np.random.default_rng(seed)
    tiles = -(-shape.queries // shape.block_q)
    blocks = -(-shape.keys // shape.block_k)
    scores = rng.random((shape.key_heads, tiles, blocks))
    starts = np.sort(np.argsort(scores, axis=-1)[..., : shape.slots], axis=-1) * shape.block_k
    counts = np.full(starts.shape[:2], shape.slots)
    if not full:
        counts = rng.integers(0, shape.slots + 1, counts.shape)
        counts[:, 0] = 0

    def normal(*size: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(size, np.float32), dtype)

    source = KVSource(
        normal(shape.key_heads, shape.keys, shape.width),
        normal(shape.key_heads, shape.keys, shape.width),
        jnp.asarray(starts, jnp.int32),
        jnp.asarray(counts, jnp.int32),
        width=shape.block_k,
    )
    return normal(shape.heads, shape.queries, shape.width), source
