"""Real shapes of the op, for tests, compilation reports and benchmarks."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows of one width.

    Attributes:
      rows, width: of x. k: expected number of entries that are on.
      masked: whether some entries are invalid, as in causal attention.
    """

    rows: int
    width: int
    k: int | float
    masked: bool = False


SHAPES = {
    "spark_gemma2_2b_ffn": Shape(64, 13824, 1106),
    "spark_gemma2_2b_attention_8k": Shape(64, 8192, 256, masked=True),
    "gemma3n_e2b_ffn": Shape(64, 8192, 0.05 * 8192),
    "gemma3n_e4b_ffn": Shape(64, 16384, 0.05 * 16384),
    "gemma2_2b_ffn": Shape(64, 9216, 0.08 * 9216),
    "wide": Shape(16, 65536, 0.08 * 65536),
}
"""What models run."""

RAGGED = {
    "ragged_short": Shape(3, 129, 20),
    "ragged_masked": Shape(5, 208, 16, masked=True),
    "ragged_rows": Shape(9, 1000, 80),
}
"""Widths that are no multiple of 128 and rows that fill no block."""
