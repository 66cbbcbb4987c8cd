"""Real shapes of the op, for tests, compilation reports and benchmarks."""

import dataclasses

from pallas_kernels.block_sparse_matmul.layout import Features


@dataclasses.dataclass(frozen=True)
class Shape:
    """A weight, its blocks and the activations.

    Attributes:
      outputs, inputs: of the weight. block: (bo, bk).
      sparsity: the share of blocks that is not stored; every block row stores as many.
      positions: pixels of an image, or tokens. batch: images.
      features: where the features of the activations lie.
    """

    outputs: int
    inputs: int
    block: tuple[int, int]
    sparsity: float
    positions: int
    features: Features = "first"
    batch: int = 1

    @property
    def rows(self) -> int:
        """Block rows."""
        return self.outputs // self.block[0]

    @property
    def columns(self) -> int:
        """Block columns."""
        return self.inputs // self.block[1]

    @property
    def stored(self) -> int:
        """Stored blocks a row."""
        return max(1, round((1 - self.sparsity) * self.columns))

    @property
    def x(self) -> tuple[int, ...]:
        """The shape of the activations."""
        if self.features == "last":
            return (self.positions, self.inputs)
        return (self.batch, self.inputs, self.positions)


POINTWISE = {
    "512_at_14x14": Shape(512, 512, (32, 1), 0.9, 14 * 14),
    "512_at_14x14_80": Shape(512, 512, (32, 1), 0.8, 14 * 14),
    "512_at_14x14_95": Shape(512, 512, (32, 1), 0.95, 14 * 14),
    "512_at_14x14_in_16": Shape(512, 512, (16, 1), 0.9, 14 * 14),
    "512_at_14x14_in_tiles": Shape(512, 512, (32, 32), 0.875, 14 * 14),
}
"""1x1 convolutions of MobileNet v1, at the sparsities of Fast sparse ConvNets."""

SHAPES = {
    **POINTWISE,
    "mobilenet_256_at_28x28": Shape(256, 256, (32, 1), 0.9, 28 * 28),
    "transformer_1024": Shape(1024, 1024, (64, 64), 0.875, 256, "last"),
    "bert_base_ffn": Shape(3072, 768, (64, 64), 0.75, 512, "last"),
    "llama_7b_ffn": Shape(11008, 4096, (128, 128), 0.75, 2048, "last"),
    "llama_7b_down": Shape(4096, 11008, (128, 128), 0.9, 512, "last"),
}
"""What models run."""

RAGGED = {
    "ragged_first": Shape(24, 40, (8, 8), 0.5, 19, "first", batch=2),
    "ragged_rows": Shape(15, 7, (5, 1), 0.5, 33, "first"),
    "ragged_last": Shape(12, 18, (4, 3), 0.5, 21, "last"),
    "ragged_tiles": Shape(256, 384, (128, 128), 0.5, 19, "last"),
}
"""Positions and blocks that are no power of two and fill no tile."""
