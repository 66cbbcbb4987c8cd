"""The layers of Sparse-IFT: parallel, factorised and doped, linear or convolutional.

They are built dense; which of their kernels are sparse is said by `sparse_parts`. Every kernel is
drawn He-normal (fan out) as if it were dense. Batch norms use batch statistics when a layer is
called with `train=True`, running ones with `train=False`, and otherwise as `model.train()` and
`model.eval()` have said.

Source: Thangarasa et al., Sparse-IFT (2024, arXiv 2303.11525) and its code.
"""

import math
from typing import Any, Literal, TypeAlias, TypedDict, Unpack, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Kernel: TypeAlias = tuple[int, int] | None
Padding: TypeAlias = Literal["SAME", "VALID"] | tuple[tuple[int, int], tuple[int, int]] | None
Factor: TypeAlias = Literal["linear", "nonlinear_norelu", "nonlinear_relu"]


class LayerOptions(TypedDict, total=False):
    """Options that every layer here has; see `KernelLayer`."""

    kernel: Kernel
    strides: int | tuple[int, int]
    padding: Padding
    dtype: DTypeLike | None
    param_dtype: DTypeLike


class KernelLayer(nnx.Module):
    """One kernel and no bias: `[in, out]`, or `[kh, kw, in, out]` over `[..., h, w, in]`.

    Args:
      d_in, d_out: channels.
      kernel: (kh, kw), or None for a linear layer.
      strides: of both axes of a convolution.
      padding: "SAME", "VALID" or ((top, bottom), (left, right)); None: (n - 1) // 2 before and
        n // 2 after, whatever the stride ("SAME" pads an even image after it only).
      dtype: of the product; None: the wider of input and kernel.
      param_dtype: of the kernel.
      gain: of the standard deviation at the start.

    Raises:
      ValueError: a size, kernel or stride below 1, or strides or padding for a linear layer.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        kernel: Kernel = None,
        strides: int | tuple[int, int] = 1,
        padding: Padding = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        gain: float = 1.0,
        rngs: nnx.Rngs,
    ):
        strides = (strides, strides) if isinstance(strides, int) else strides
        if min(d_in, d_out, *(kernel or ()), *strides) < 1:
            raise ValueError(
                f"d_in is {d_in}, d_out {d_out}, kernel {kernel} and strides {strides}; none may "
                "be below 1"
            )
        if kernel is None and (strides != (1, 1) or padding is not None):
            raise ValueError(
                f"strides is {strides} and padding {padding}; a linear layer (kernel=None) has none"
            )
        if kernel is not None and padding is None:
            h, w = kernel
            padding = (((h - 1) // 2, h // 2), ((w - 1) // 2, w // 2))
        self.strides, self.padding, self.dtype = strides, padding, dtype
        draw = nnx.initializers.variance_scaling(2.0 * gain**2, "fan_out", "normal")
        shape = (*(kernel or ()), d_in, d_out)
        self.kernel = nnx.Param(draw(rngs.params(), shape, param_dtype))

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*c o"]:
        """The product with the kernel."""
        return self.product(x, self.kernel[...])

    def product(self, x: Float[Array, "*b i"], kernel: Array) -> Float[Array, "*c o"]:
        """The product with another kernel, in the same geometry."""
        dtype = self.dtype or jnp.promote_types(x.dtype, kernel.dtype)
        x, kernel = x.astype(dtype), kernel.astype(dtype)
        if self.padding is None:
            return x @ kernel
        batch = x.shape[:-3]
        y = lax.conv_general_dilated(
            x.reshape(-1, *x.shape[-3:]),
            kernel,
            self.strides,
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y.reshape(*batch, *y.shape[1:])


class SparseParallel(nnx.Module):
    """k sparse branches of one shape, summed: `sum_j BN_j(W_j x)`, or `sum_j ReLU(W_j x)`.

    Without something between product and sum the branches were one dense kernel. With batch norm
    the ReLU is after the sum, in the network. Without, k positive numbers are added, and kernels
    are drawn smaller, by `sqrt(1 + (k - 1) / pi)`: then masked branches of density 1 / k start with
    the mean square of one dense ReLU layer. The branches are multiplied as one kernel of k times
    the outputs.

    Args:
      d_in, d_out: of the dense layer.
      k: branches, `sift_size("parallel", ...)`.
      **layer: kernel, strides, padding, dtype, param_dtype: see `KernelLayer`.
      norm: batch norm of every branch (eps 1e-5), else its ReLU.
      use_bias: one bias, after the sum.

    Attributes:
      branches: k layers with one `kernel` each, the sparse parts.
      norm: batch norm over k x d_out channels, those of branch j from j * d_out on; or None.

    Raises:
      ValueError: k below 1, or as `KernelLayer`.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        k: int,
        *,
        norm: bool = True,
        use_bias: bool = False,
        rngs: nnx.Rngs,
        **layer: Unpack[LayerOptions],
    ):
        if k < 1:
            raise ValueError(f"k is {k}; a layer needs a branch")
        gain = 1.0 if norm else 1 / math.sqrt(1 + (k - 1) / math.pi)
        branches = [KernelLayer(d_in, d_out, gain=gain, rngs=rngs, **layer) for _ in range(k)]
        self.branches = nnx.List(branches)
        self.norm = _batch_norm(k * d_out, layer, rngs) if norm else None
        self.bias = _bias(d_out, layer) if use_bias else None

    def __call__(self, x: Float[Array, "*b i"], *, train: bool | None = None) -> Array:
        """The sum of the branches, `[..., d_out]`."""
        wide = jnp.concatenate([branch.kernel[...] for branch in self.branches], axis=-1)
        y = self.branches[0].product(x, wide)
        y = jax.nn.relu(y) if self.norm is None else _normalised(self.norm, y, train)
        y = jnp.sum(y.reshape(*y.shape[:-1], len(self.branches), -1), axis=-2)
        return _biased(y, self.bias)


class SparseFactorized(nnx.Module):
    """Two sparse factors with something between them: `V f(U x)`.

    U has the kernel, strides and padding of the dense layer, V is 1 x 1.

    Args:
      d_in, d_out: of the dense layer.
      rank: channels between the factors, `sift_size("factorized", ...)`.
      **layer: kernel, strides, padding, dtype, param_dtype: see `KernelLayer`.
      factor: f: "linear" nothing, "nonlinear_norelu" batch norm (eps 1e-5), "nonlinear_relu" batch
        norm and ReLU.
      use_bias: one bias, after V.

    Attributes:
      u, v: layers with one `kernel` each, the sparse parts. norm: the batch norm, or None.

    Raises:
      ValueError: a rank below 1, an unknown factor, or as `KernelLayer`.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        *,
        factor: Factor = "nonlinear_relu",
        use_bias: bool = False,
        rngs: nnx.Rngs,
        **layer: Unpack[LayerOptions],
    ):
        if rank < 1:
            raise ValueError(f"rank is {rank}; it must be at least 1")
        if factor not in get_args(Factor):
            allowed = ", ".join(map(repr, get_args(Factor)))
            raise ValueError(f"factor is {factor!r}; allowed are {allowed}")
        self.factor = factor
        self.u, self.v = _factors(d_in, d_out, rank, layer, rngs)
        self.norm = _batch_norm(rank, layer, rngs) if factor != "linear" else None
        self.bias = _bias(d_out, layer) if use_bias else None

    def __call__(self, x: Float[Array, "*b i"], *, train: bool | None = None) -> Array:
        """The second factor of what is between, `[..., d_out]`."""
        h = self.u(x)
        if self.norm is not None:
            h = _normalised(self.norm, h, train)
        if self.factor == "nonlinear_relu":
            h = jax.nn.relu(h)
        return _biased(self.v(h), self.bias)


class SparseDoped(nnx.Module):
    """A sparse layer and a dense low-rank one, added: `W x + V U x`.

    Args:
      d_in, d_out: of the dense layer.
      rank: `sift_size("doped", ...)`; 0 leaves the low-rank part out.
      **layer: kernel, strides, padding, dtype, param_dtype: see `KernelLayer`; V is 1 x 1.
      use_bias: one bias, after the sum.

    Attributes:
      sparse: layer whose `kernel` is the sparse part.
      dense_u, dense_v: layers with one `kernel` each that must stay dense; None at rank 0.

    Raises:
      ValueError: a negative rank, or as `KernelLayer`.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        *,
        use_bias: bool = False,
        rngs: nnx.Rngs,
        **layer: Unpack[LayerOptions],
    ):
        if rank < 0:
            raise ValueError(f"rank is {rank}; it must not be negative")
        self.sparse = KernelLayer(d_in, d_out, rngs=rngs, **layer)
        factors = _factors(d_in, d_out, rank, layer, rngs) if rank else (None, None)
        self.dense_u, self.dense_v = factors
        self.bias = _bias(d_out, layer) if use_bias else None

    def __call__(self, x: Float[Array, "*b i"], *, train: bool | None = None) -> Array:
        """The sum of both parts, `[..., d_out]`; `train` changes nothing."""
        y = self.sparse(x)
        if self.dense_u is not None and self.dense_v is not None:
            y = y + self.dense_v(self.dense_u(x))
        return _biased(y, self.bias)


class ParallelResidualBlock(nnx.Module):
    """ResNet's basic block with parallel layers: 3 x 3, 3 x 3, shortcut, all with batch norm.

    `relu(conv2(relu(conv1(x))) + shortcut(x))`, where `conv1` has the stride and each branch its
    batch norm. The shortcut is the identity where it can be, else one dense 1 x 1 convolution.

    Args:
      d_in, d_out: channels. k: branches of both layers. strides: of the block.
      dtype, param_dtype: see `KernelLayer`.

    Attributes:
      conv1, conv2: `SparseParallel`. shortcut: 1 x 1 layer or None. shortcut_norm: its norm.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        k: int,
        *,
        strides: int = 1,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kind: LayerOptions = {"dtype": dtype, "param_dtype": param_dtype}
        second: LayerOptions = {"kernel": (3, 3), **kind}
        first: LayerOptions = {**second, "strides": strides}
        self.conv1 = SparseParallel(d_in, d_out, k, rngs=rngs, **first)
        self.conv2 = SparseParallel(d_out, d_out, k, rngs=rngs, **second)
        point: LayerOptions = {"kernel": (1, 1), "strides": strides, **kind}
        plain = strides == 1 and d_in == d_out
        self.shortcut = None if plain else KernelLayer(d_in, d_out, rngs=rngs, **point)
        self.shortcut_norm = None if plain else _batch_norm(d_out, kind, rngs)

    def __call__(self, x: Float[Array, "*b h w i"], *, train: bool | None = None) -> Array:
        """Images `[..., height / strides, width / strides, d_out]`."""
        h = self.conv2(jax.nn.relu(self.conv1(x, train=train)), train=train)
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = _normalised(self.shortcut_norm, self.shortcut(x), train)
        return jax.nn.relu(h + x)


def _factors(
    d_in: int, d_out: int, rank: int, layer: LayerOptions, rngs: nnx.Rngs
) -> tuple[KernelLayer, KernelLayer]:
    point = None if layer.get("kernel") is None else (1, 1)
    second: LayerOptions = {**layer, "kernel": point, "strides": 1, "padding": None}
    return (
        KernelLayer(d_in, rank, rngs=rngs, **layer),
        KernelLayer(rank, d_out, rngs=rngs, **second),
    )


def _batch_norm(channels: int, layer: LayerOptions, rngs: nnx.Rngs) -> nnx.BatchNorm:
    # momentum 0.9 keeps nine tenths of the running value: PyTorch's 0.1
    param_dtype: Any = layer.get("param_dtype", jnp.float32)
    wide: Any = jnp.float32 if jnp.dtype(param_dtype).itemsize < 4 else param_dtype
    kind = {"dtype": wide, "param_dtype": param_dtype}
    return nnx.BatchNorm(channels, epsilon=1e-5, momentum=0.9, rngs=rngs, **kind)


def _normalised(norm: nnx.BatchNorm, x: Array, train: bool | None) -> Array:
    average = None if train is None else not train
    return norm(x, use_running_average=average).astype(x.dtype)


def _bias(d_out: int, layer: LayerOptions) -> nnx.Param:
    return nnx.Param(jnp.zeros((d_out,), layer.get("param_dtype", jnp.float32)))


def _biased(y: Array, bias: nnx.Param | None) -> Array:
    return y if bias is None else y + bias[...].astype(y.dtype)
