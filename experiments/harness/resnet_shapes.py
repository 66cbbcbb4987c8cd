"""The shapes of a ResNet-50, for settings that are checked without running them."""

from typing import Any

import jax

PRUNABLE = r"^(?!first/).*kernel$"  # the first convolution stays dense


def resnet50_shapes() -> dict[str, Any]:
    """Shapes of the parameters of a ResNet-50 for 1,000 classes, kernels HWIO."""

    def conv(size: int, n_in: int, n_out: int) -> dict[str, Any]:
        return {
            "kernel": jax.ShapeDtypeStruct((size, size, n_in, n_out), "float32"),
            "norm": {n: jax.ShapeDtypeStruct((n_out,), "float32") for n in ("bias", "scale")},
        }

    params: dict[str, Any] = {"first": conv(7, 3, 64)}
    n_in = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            layers = {"a": conv(1, n_in, width), "b": conv(3, width, width),
                      "c": conv(1, width, 4 * width)}  # fmt: skip
            if block == 0:
                layers["shortcut"] = conv(1, n_in, 4 * width)
            params[f"stage{stage}_block{block}"] = layers
            n_in = 4 * width
    kernel, bias = (jax.ShapeDtypeStruct(s, "float32") for s in ((n_in, 1000), (1000,)))
    return params | {"classes": {"kernel": kernel, "bias": bias}}
