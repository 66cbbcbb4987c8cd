"""Real shapes of the op, for tests, compilation reports and benchmarks."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """A product with an n:m weight.

    Attributes:
      rows: of x. inputs, outputs: of the weight, whose groups lie along the inputs.
    """

    rows: int
    inputs: int
    outputs: int
    n: int = 2
    m: int = 4


SHAPES = {
    "llama_7b_attention_decode": Shape(1, 4096, 4096),
    "llama_7b_up_decode": Shape(1, 4096, 11008),
    "llama_7b_down_decode": Shape(1, 11008, 4096),
    "llama_7b_attention_prefill": Shape(512, 4096, 4096),
    "llama_7b_up_prefill": Shape(512, 4096, 11008),
    "llama_7b_down_prefill": Shape(512, 11008, 4096),
    "vit_base_up": Shape(64 * 197, 768, 3072),
    "vit_base_down": Shape(64 * 197, 3072, 768, 4, 8),
    "bdwp_vit_small_up": Shape(128 * 65, 384, 1536, 2, 8),
    "bdwp_vit_small_down": Shape(128 * 65, 1536, 384, 2, 8),
}
"""What models run."""

RAGGED = {
    "ragged_2_4": Shape(3, 300, 200, 2, 4),
    "ragged_2_8": Shape(5, 1048, 136, 2, 8),
    "ragged_1_16": Shape(17, 48, 130, 1, 16),
}
"""Sizes that fill no tile, and groups whose positions end within a byte."""
