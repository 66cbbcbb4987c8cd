"""The three products of a layer: the output, and the gradients of its input and of its kernel.

Unlike in JAX's own derivative, the kernel of the input gradient may be another than that of the
output, and the gradient of the kernel is summed in float32 at least whatever its terms are.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Matmul:
    """`[p, i] x [i, o]`, and its two transposes."""

    precision: Any
    dtype: Any

    def output(self, x: Array, w: Array) -> Array:
        return self._contract(x, w, 1, 0, self.dtype)

    def input_gradient(self, dy: Array, w: Array, shape: tuple[int, ...]) -> Array:
        del shape
        return self._contract(dy, w, 1, 1, None)

    def weight_gradient(self, x: Array, dy: Array, shape: tuple[int, ...]) -> Array:
        del shape
        return self._contract(x, dy, 0, 0, _wide(x))

    def _contract(self, a: Array, b: Array, a_axis: int, b_axis: int, dtype: Any) -> Array:
        return lax.dot_general(
            a,
            b,
            (((a_axis,), (b_axis,)), ((), ())),
            precision=self.precision,
            preferred_element_type=dtype,
        )


@dataclasses.dataclass(frozen=True)
class Convolution:
    """Channels last, `[..., i, o]` kernels, and its two transposes."""

    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    precision: Any
    dtype: Any

    def output(self, x: Array, w: Array) -> Array:
        return self._convolve(x, w, self.dtype)

    def input_gradient(self, dy: Array, w: Array, shape: tuple[int, ...]) -> Array:
        x = jax.ShapeDtypeStruct(shape, dy.dtype)
        return jax.linear_transpose(lambda x: self._convolve(x, w, None), x)(dy)[0]

    def weight_gradient(self, x: Array, dy: Array, shape: tuple[int, ...]) -> Array:
        # a convolution of x with dy that reduces over the batch; written out, because the sum
        # is to be wider than its terms
        last, space = x.ndim - 1, tuple(range(1, x.ndim - 1))
        sizes = zip(x.shape[1:-1], dy.shape[1:-1], shape, self.strides, self.pads)
        pads = [
            (low, kernel + (out - 1) * step - size - low)
            for size, out, kernel, step, (low, _) in sizes
        ]
        return lax.conv_general_dilated(
            x,
            dy,
            (1,) * len(space),
            pads,
            rhs_dilation=self.strides,
            dimension_numbers=lax.ConvDimensionNumbers(
                (last, 0, *space),
                (last, 0, *space),
                (last - 1, last, *range(last - 1)),
            ),
            precision=self.precision,
            preferred_element_type=_wide(x),
        )

    def _convolve(self, x: Array, w: Array, dtype: Any) -> Array:
        return lax.conv_general_dilated(
            x,
            w,
            self.strides,
            self.pads,
            dimension_numbers=channels_last(x.ndim),
            precision=self.precision,
            preferred_element_type=dtype,
        )


def channels_last(ndim: int) -> lax.ConvDimensionNumbers:
    """Dimension numbers of Flax: `[b, ..., i]`, `[..., i, o]`, `[b, ..., o]`."""
    last = ndim - 1
    image = (0, last, *range(1, last))
    return lax.ConvDimensionNumbers(image, (last, last - 1, *range(last - 1)), image)


def _wide(x: Array) -> Any:
    return jnp.float32 if x.dtype.itemsize < 4 else x.dtype
