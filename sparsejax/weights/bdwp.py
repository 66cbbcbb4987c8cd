"""BDWP: N:M weights in the forward and in the backward product of a layer, each along its own axis.

The forward product reduces over the inputs of a kernel and the input gradient over its outputs, so
a kernel is pruned twice: in groups of inputs for the one, of outputs for the other. The gradient
that reaches the input is therefore not the derivative of the output, and is not meant to be. The
weight gradient is dense and goes to the dense weight.

Source: Efficient N:M sparse DNN training using algorithm, architecture, and dataflow co-design
(2023, arXiv 2309.13015).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from sparsejax.core.gradients import Decay, pull_to_zero
from sparsejax.core.patterns import NM, nm_mask
from sparsejax.core.selection import is_concrete
from sparsejax.weights.bdwp_products import Convolution, Matmul
from sparsejax.weights.compact import NMCompact, compress_nm, decompress_nm

Method = Literal["dense", "srste", "sdwp", "sdgp", "bdwp"]
METHODS: tuple[str, ...] = get_args(Method)
FORWARD_PRUNED = ("srste", "bdwp")
"""The methods whose forward product is N:M."""
BACKWARD_PRUNED = ("sdwp", "sdgp", "bdwp")
"""The methods whose input gradient is an N:M product (SDGP prunes the data in it)."""


class NMPair(NamedTuple):
    """The two compact forms of one kernel `[i, o]`.

    Attributes:
      ff: of the kernel, arrays `[i*n/m, o]`: what the forward product reads.
      bp: of its transpose, arrays `[o*n/m, i]`: what the input gradient reads.
    """

    ff: NMCompact
    bp: NMCompact


def bdwp_dot(
    x: Float[Array, "*b i"],
    w: Float[Array, "i o"],
    n: int,
    m: int,
    *,
    decay: Decay = 2e-4,
    method: Method = "bdwp",
) -> Float[Array, "*b o"]:
    """`x @ w` with N:M weights in training; the products are those of the method.

    With M_in and M_out the masks of `abs(w)` along the inputs and the outputs (`ties="last"`), and
    d = x^T dy the dense weight gradient:

        dense   y = x w            dx = dy w^T             dw = d
        srste   y = x (w * M_in)   dx = dy (w * M_in)^T    dw = d + decay * (1 - M_in) * w
        sdwp    y = x w            dx = dy (w * M_out)^T   dw = d
        sdgp    y = x w            dx = prune(dy) w^T      dw = d; dy is pruned along its outputs
        bdwp    y = x (w * M_in)   dx = dy (w * M_out)^T   dw = d + decay * (1 - M_in) * w

    Gradients flow to x and w alone. The backward pass keeps x and w and makes its masks anew: on
    1024 x 1024 a mask takes a twentieth of the product's time, while a masked copy would hold a
    second model in memory; within one compiled step XLA shares what both passes compute.

    Args:
      x: its dtype is that of the products. w: masked as it is, then cast to the dtype of x; its
        gradient is summed in float32 at least and has the dtype of w.
      n, m: static; n of m weights are kept.
      decay: pull of what the forward product prunes towards zero, at least 0; may be traced.
      method: static.

    Raises:
      TypeError: x or w is not floating point.
      ValueError: an unknown method, n > m, a negative concrete decay, or an axis of w that m does
        not divide.

    >>> w = jnp.asarray([[1.0, 2.0], [4.0, 3.0]])
    >>> y, pull = jax.vjp(lambda x: bdwp_dot(x, w, 1, 2), jnp.ones((1, 2)))
    >>> y  # 4 is the largest of its column, 3 that of the other
    Array([[4., 3.]], dtype=float32)
    >>> pull(y)[0]  # 3*2 and 4*4: the largest of the rows are 2 and 4
    Array([[ 6., 16.]], dtype=float32)
    """
    return matmul(x, w, n, m, decay=decay, method=method)


def bdwp_conv(
    x: Float[Array, "b h w i"],
    w: Float[Array, "kh kw i o"],
    n: int,
    m: int,
    *,
    strides: int | Sequence[int] = 1,
    padding: str | Sequence[tuple[int, int]] = "SAME",
    decay: Decay = 2e-4,
    method: Method = "bdwp",
) -> Float[Array, "b h2 w2 o"]:
    """`bdwp_dot` for a convolution: groups of input channels forward, of output channels backward.

    The input gradient is the transposed convolution of dy with `w * M_out`, the weight gradient the
    ordinary one; groups lie at a fixed kernel position.

    Args:
      x: images. w: kernel. n, m, decay, method: see `bdwp_dot`.
      strides: static; one number, or one an axis.
      padding: static; "SAME", "SAME_LOWER", "VALID", or (low, high) for each axis.

    Raises:
      TypeError, ValueError: as `bdwp_dot`; also strides below 1 or another padding.
    """
    return convolution(x, w, n, m, strides=strides, padding=padding, decay=decay, method=method)


def pregenerate(w: Float[Array, "i o"], n: int, m: int, *, dtype: Any = None) -> NMPair:
    """Both compact forms of a kernel, for `bdwp_dot_compact`.

    To be called once a step on what the update left, after weight decay and clipping, and after a
    checkpoint was restored: a pair says nothing about the kernel it was made from but its shape.

    Args:
      w: dense kernel; the masks are those of `bdwp_dot`.
      dtype: of the stored values; None keeps that of w. The masks come from w as it is.

    Raises:
      TypeError: w is not floating point.
      ValueError: n > m, or an axis of w that m does not divide.
    """
    _check(w, w, NM(n, m), "bdwp")

    def compact(w: Array) -> NMCompact:
        pattern = NM(n, m, axis=0, ties="last")
        mask = pattern.mask(jnp.abs(w))
        kept = _keep(w, mask).astype(dtype or w.dtype)
        return compress_nm(kept, pattern, mask=mask)

    w = lax.stop_gradient(w)
    return NMPair(compact(w), compact(w.T))


def bdwp_dot_compact(
    x: Float[Array, "*b i"], w: Float[Array, "i o"], pair: NMPair, *, decay: Decay = 2e-4
) -> Float[Array, "*b o"]:
    """`bdwp_dot` that reads the weights from a pair; the gradient goes to w.

    With the pair that `pregenerate` makes of this w, the same numbers as `bdwp_dot`.

    Args:
      x: its dtype is that of the products. w: dense kernel, read for the pull alone.
      pair: gets no gradient. decay: see `bdwp_dot`.

    Raises:
      TypeError: x or w is not floating point.
      ValueError: the pair of a kernel of another shape, or a negative concrete decay.
    """
    ff, bp = pair
    shape = tuple(w.shape)
    for name, part, wanted in (("ff", ff, shape), ("bp", bp, shape[::-1])):
        if part.shape != wanted or part.axis != 0:
            raise ValueError(
                f"pair.{name} is of shape {part.shape}, grouped along {part.axis}; a kernel of "
                f"shape {shape} needs {wanted}, grouped along 0: pregenerate it anew"
            )
    _check(x, w, NM(ff.n, ff.m), "bdwp")
    y: Array = _compact_product(_flat(x), w, pair, _static_zero(decay, "bdwp"))
    return y.reshape(*x.shape[:-1], w.shape[1])


def matmul(
    x: Float[Array, "*b i"],
    w: Float[Array, "i o"],
    n: int,
    m: int,
    *,
    decay: Decay,
    method: Method,
    precision: Any = None,
    dtype: Any = None,
) -> Float[Array, "*b o"]:
    """`bdwp_dot` with the options of `lax.dot_general`; dtype: its `preferred_element_type`."""
    rule = _Rule(NM(n, m), method, Matmul(precision, dtype))
    _check(x, w, rule.pattern, method)
    y: Array = _product(rule, _flat(x), w, _static_zero(decay, method))
    return y.reshape(*x.shape[:-1], w.shape[1])


def convolution(
    x: Float[Array, "b *space i"],
    w: Float[Array, "*kernel i o"],
    n: int,
    m: int,
    *,
    strides: int | Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    decay: Decay,
    method: Method,
    precision: Any = None,
    dtype: Any = None,
) -> Float[Array, "b *space2 o"]:
    """`bdwp_conv` over any number of axes, with the options of `lax.conv_general_dilated`."""
    axes = w.ndim - 2
    steps = (strides,) * axes if isinstance(strides, int) else tuple(strides)
    if len(steps) != axes or min(steps, default=1) < 1:
        raise ValueError(f"strides is {strides}; it must be {axes} numbers of at least 1")
    if isinstance(padding, str):
        if padding not in ("SAME", "SAME_LOWER", "VALID"):
            raise ValueError(
                f"padding is {padding!r}; allowed are SAME, SAME_LOWER, VALID and pairs"
            )
        pairs = lax.padtype_to_pads(x.shape[1:-1], w.shape[:-2], steps, padding)
    else:
        pairs = padding
    if len(pairs) != axes or any(np.shape(pair) != (2,) for pair in pairs):
        raise ValueError(f"padding is {padding}; it must be {axes} pairs (low, high)")
    pads = tuple((int(low), int(high)) for low, high in pairs)
    rule = _Rule(NM(n, m), method, Convolution(steps, pads, precision, dtype))
    _check(x, w, rule.pattern, method)
    return _product(rule, x, w, _static_zero(decay, method))


@dataclasses.dataclass(frozen=True)
class _Rule:
    pattern: NM
    method: Method
    product: Matmul | Convolution

    def mask(self, x: Array, axis: int) -> Array:
        return nm_mask(jnp.abs(x), self.pattern.n, self.pattern.m, axis=axis, ties="last")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(rule: _Rule, x: Array, w: Array, decay: Array | None) -> Array:
    return _product_forward(rule, x, w, decay)[0]


def _product_forward(rule: _Rule, x: Array, w: Array, decay: Array | None) -> tuple[Array, Any]:
    used = _keep(w, rule.mask(w, -2)) if rule.method in FORWARD_PRUNED else w
    return rule.product.output(x, used.astype(x.dtype)), (x, w, decay)


def _product_backward(rule: _Rule, residuals: Any, dy: Array) -> tuple[Any, ...]:
    x, w, decay = residuals
    dy = dy.astype(x.dtype)
    mask = rule.mask(w, -2) if rule.method in FORWARD_PRUNED else None
    turned = rule.mask(w, -1) if rule.method in ("sdwp", "bdwp") else mask
    used = w if turned is None else _keep(w, turned)
    pruned = _keep(dy, rule.mask(dy, -1)) if rule.method == "sdgp" else dy
    dx = rule.product.input_gradient(pruned, used.astype(x.dtype), x.shape)
    return dx, *_weight_gradient(rule.product, x, dy, w, mask, decay)


_product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def _compact_product(x: Array, w: Array, pair: NMPair, decay: Array | None) -> Array:
    return _compact_forward(x, w, pair, decay)[0]


_PLAIN = Matmul(None, None)


def _compact_forward(x: Array, w: Array, pair: NMPair, decay: Array | None) -> tuple[Array, Any]:
    y = _PLAIN.output(x, decompress_nm(pair.ff).astype(x.dtype))
    return y, (x, w, pair, decay)


def _compact_backward(residuals: Any, dy: Array) -> tuple[Any, ...]:
    x, w, pair, decay = residuals
    dy = dy.astype(x.dtype)
    # turned back, so that the product is the one of bdwp_dot to the last bit
    dx = _PLAIN.input_gradient(dy, decompress_nm(pair.bp).T.astype(x.dtype), x.shape)
    # what is kept, not what is not zero: a stored value may have underflowed
    ones = jnp.ones_like(pair.ff.values)
    mask = decompress_nm(dataclasses.replace(pair.ff, values=ones)) != 0
    dw, no_decay = _weight_gradient(_PLAIN, x, dy, w, mask, decay)
    return dx, dw, None, no_decay


_compact_product.defvjp(_compact_forward, _compact_backward)


def _weight_gradient(
    product: Matmul | Convolution,
    x: Array,
    dy: Array,
    w: Array,
    mask: Array | None,
    decay: Any,  # under scan it may come back as a number
) -> tuple[Array, Array | None]:
    dw = product.weight_gradient(x, dy, w.shape)
    if mask is None or decay is None:
        return dw.astype(w.dtype), None
    return pull_to_zero(dw, w, mask, decay).astype(w.dtype), jnp.zeros_like(decay)


def _keep(x: Array, mask: Array) -> Array:
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def _flat(x: Array) -> Array:
    # XLA's CPU backend takes three times as long over dw if the leading axes are several
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _static_zero(decay: Decay, method: Method) -> Array | None:
    """The decay as an array, or None where it is known to do nothing."""
    if is_concrete(decay):
        if not decay >= 0:
            raise ValueError(f"decay is {decay}; it must not be negative")
        if decay == 0:
            return None
    return jnp.asarray(decay) if method in FORWARD_PRUNED else None


def check_method(method: str) -> None:
    """Refuses an unknown method."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; allowed are {', '.join(METHODS)}")


def misfit(shape: tuple[int, ...], pattern: NM, method: Method) -> str | None:
    """Why a kernel of that shape cannot be pruned by the method, or None."""
    inputs, outputs = shape[-2:]
    if method in FORWARD_PRUNED and inputs % pattern.m:
        return f"{inputs} inputs are not a multiple of m = {pattern.m}, as {method} needs"
    if method in BACKWARD_PRUNED and outputs % pattern.m:
        return f"{outputs} outputs are not a multiple of m = {pattern.m}, as {method} needs"
    return None


def _check(x: Array, w: Array, pattern: NM, method: Method) -> None:
    check_method(method)
    for name, value in (("x", x), ("w", w)):
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point, not {value.dtype}")
    problem = misfit(w.shape, pattern, method)
    if problem:
        raise ValueError(f"w has shape {w.shape}: its {problem}")
