"""Real shapes of the ops, for tests, compilation reports and benchmarks."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """One token through the active neurons of a feed-forward layer.

    Attributes:
      inputs: width of the rows of `up`. outputs: of those of `down`.
      neurons: in all. active: of them, for this token.
      capacity: entries of the index list.
    """

    inputs: int
    outputs: int
    neurons: int
    active: int
    capacity: int


@dataclasses.dataclass(frozen=True)
class Experts:
    """A chunk of tokens through the experts that any of them chose.

    Attributes:
      tokens: of the chunk. width: of a token.
      experts: in all. size: neurons of each. union: experts that are chosen.
    """

    tokens: int
    width: int
    experts: int
    size: int
    union: int


SHAPES = {
    "spark_gemma2_2b": Shape(1280, 2304, 13824, 1106, 1280),
    "gated_gemma2_2b": Shape(2304, 2304, 13824, 1106, 1280),
    "spark_small": Shape(256, 512, 3072, 246, 320),
}
"""What models run: Gemma-2 2B behind a predictor of 1024 inputs, and with its gate known."""

EXPERTS = {
    "blockffn_0.1b_token": Experts(1, 768, 48, 64, 10),
    "blockffn_0.1b_draft": Experts(8, 768, 48, 64, 14),
    "blockffn_0.1b_chunk": Experts(32, 768, 48, 64, 15),
    "blockffn_2.8b_chunk": Experts(32, 2048, 128, 128, 40),
}
"""BlockFFN's scales, with the unions of experts that drafts of such lengths had."""

RAGGED = {
    "ragged": Shape(52, 140, 30, 11, 19),
}
"""Widths that are no multiple of 128, and a list that fills no block."""

RAGGED_EXPERTS = {
    "ragged": Experts(5, 40, 6, 20, 3),
    "ragged_wide": Experts(19, 130, 4, 24, 4),
}
"""Tokens, widths and neurons that fill no block."""
