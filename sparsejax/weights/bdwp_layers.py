"""BDWP in the layers of Flax: products that nnx.Linear and nnx.Conv take, and whole models."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from flax import nnx
from jax import lax
from jaxtyping import Array

from sparsejax.core.patterns import NM
from sparsejax.core.selection import Where, default_where, is_concrete, selected_paths
from sparsejax.weights.bdwp import Method, check_method, convolution, matmul, misfit
from sparsejax.weights.bdwp_products import channels_last
from sparsejax.weights.layers import named_layers

Model = TypeVar("Model", bound=nnx.Module)


def bdwp_dot_general(
    pattern: NM, *, decay: float = 2e-4, method: Method = "bdwp"
) -> Callable[..., Array]:
    """A stand-in for `jax.lax.dot_general` in `nnx.Linear(..., dot_general=...)`: see `bdwp_dot`.

    Two of the same settings are equal, so that models built twice share what is compiled.

    Args:
      pattern: n and m. decay: a number, as a setting of a layer has to be. method: see `bdwp_dot`.

    Raises:
      TypeError: a traced decay.
      ValueError: an unknown method, a negative decay, or a pattern with another axis, stride or
        ties than BDWP's; from the product: any other contraction than that of `x @ kernel`, or an
        `out_sharding`.
    """
    return _DotGeneral(*_settings(pattern, decay, method))


def bdwp_conv_general_dilated(
    pattern: NM, *, decay: float = 2e-4, method: Method = "bdwp"
) -> Callable[..., Array]:
    """A stand-in for `jax.lax.conv_general_dilated` in `nnx.Conv(...)`: see `bdwp_conv`.

    Strides and padding are free, over any number of axes.

    Args:
      pattern, decay, method: see `bdwp_dot_general`.

    Raises:
      TypeError, ValueError: as `bdwp_dot_general`; from the convolution: dilation, groups, another
        layout than Flax's, or an `out_sharding`.
    """
    return _ConvGeneralDilated(*_settings(pattern, decay, method))


def bdwp_layers(
    model: nnx.Module, pattern: NM, *, method: Method = "bdwp", where: Where = None
) -> tuple[str, ...]:
    """Paths of the kernels that `bdwp_model` makes sparse.

    Args:
      model: its `nnx.Linear` and `nnx.Conv` are asked.
      pattern, method: see `bdwp_dot_general`.
      where: chooses by the path of the kernel, see `selected_paths`. None: the default there
        without the classifier (`head/kernel` at the end of a path), and without the layers that
        cannot be pruned: m divides not their inputs (the first convolution of an image) or, if the
        method prunes along them, not their outputs; or groups or dilation.

    Raises:
      ValueError: nothing is chosen, or `where` chose a layer that cannot be pruned (with why).
    """
    check_method(method)
    layers = dict(named_layers(model))
    kernels = {path: layer.kernel.get_value() for path, layer in layers.items()}

    def standard(path: str, kernel: Any) -> bool:  # abstract in an abstract model
        inner = default_where(path, kernel) and not path.endswith("head/kernel")
        return inner and _problem(layers[path], pattern, method) is None

    chosen = selected_paths(kernels, standard if where is None else where)
    for path in chosen:
        problem = _problem(layers[path], pattern, method)
        if problem:
            raise ValueError(f"layer {path!r} cannot be pruned: its {problem}")
    return chosen


def bdwp_model(
    model: Model,
    pattern: NM,
    *,
    decay: float = 2e-4,
    method: Method = "bdwp",
    where: Where = None,
) -> Model:
    """A copy of a model whose chosen layers multiply as the method says.

    The parameters keep their paths and stay dense, so optimisers, checkpoints and `nnx.split` do
    not notice. Layers that compute in bfloat16 are masked by their float32 kernels, and these get
    float32 gradients. Stacked layers work under `scan` and `vmap`. What inference uses is the
    forward weight alone: `sj.prune(params, pattern=NM(n, m, axis=-2, ties="last"), where=...)` with
    the same layers, or `sj.ste` of them for the view.

    Args:
      model: not changed, nor by what happens to its copy, which starts from the same arrays.
      pattern, decay, method: see `bdwp_dot_general`. where: see `bdwp_layers`.

    Raises:
      TypeError, ValueError: as `bdwp_dot_general` and `bdwp_layers`.

    >>> import jax
    >>> layer = bdwp_model(nnx.Linear(8, 16, rngs=nnx.Rngs(0)), NM(2, 8))
    >>> jax.grad(lambda x: layer(x).sum())(jax.numpy.ones(8)).shape
    (8,)
    """
    dot = bdwp_dot_general(pattern, decay=decay, method=method)
    conv = bdwp_conv_general_dilated(pattern, decay=decay, method=method)
    chosen = set(bdwp_layers(model, pattern, method=method, where=where))
    copy = nnx.clone(model)
    for path, layer in named_layers(copy):
        if path not in chosen:
            continue
        if isinstance(layer, nnx.Linear):
            layer.dot_general = dot
        else:
            layer.conv_general_dilated = conv
        layer.promote_dtype = _KeepKernel(layer.promote_dtype)
    return copy


def _settings(pattern: NM, decay: float, method: Method) -> tuple[NM, float, Method]:
    if pattern.axis != -2 or pattern.stride != 1 or pattern.ties != "last":
        raise ValueError(
            f"pattern is {pattern!r}; BDWP has its own axes: axis=-2, stride=1, ties='last'"
        )
    check_method(method)
    if not is_concrete(decay):
        raise TypeError("decay is traced; a layer keeps it as a number, bdwp_dot takes either")
    if not decay >= 0:
        raise ValueError(f"decay is {decay}; it must not be negative")
    return pattern, float(decay), method


def _problem(layer: nnx.Linear | nnx.Conv, pattern: NM, method: Method) -> str | None:
    if isinstance(layer, nnx.Conv):
        if layer.feature_group_count != 1:
            return f"feature_group_count is {layer.feature_group_count}, not 1"
        for name in ("input_dilation", "kernel_dilation"):
            if not _ones(getattr(layer, name)):
                return f"{name} is {getattr(layer, name)}, not 1"
    return misfit(layer.kernel.get_value().shape, pattern, method)


@dataclasses.dataclass(frozen=True)
class _DotGeneral:
    pattern: NM
    decay: float
    method: Method

    def __call__(
        self,
        x: Array,
        kernel: Array,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        *,
        out_sharding: Any = None,
    ) -> Array:
        (left, right), batch = dimension_numbers
        contracted = tuple(left), tuple(right), *map(tuple, batch)
        if kernel.ndim != 2 or contracted != ((x.ndim - 1,), (0,), (), ()):
            raise ValueError(
                f"dimension_numbers is {dimension_numbers} for shapes {x.shape} and "
                f"{kernel.shape}; BDWP contracts the last axis of x with the first of two"
            )
        _refuse_sharding(out_sharding)
        return matmul(
            x,
            kernel,
            self.pattern.n,
            self.pattern.m,
            decay=self.decay,
            method=self.method,
            precision=precision,
            dtype=preferred_element_type,
        )


@dataclasses.dataclass(frozen=True)
class _ConvGeneralDilated:
    pattern: NM
    decay: float
    method: Method

    def __call__(
        self,
        x: Array,
        kernel: Array,
        window_strides: Sequence[int],
        padding: str | Sequence[tuple[int, int]],
        lhs_dilation: Sequence[int] | None = None,
        rhs_dilation: Sequence[int] | None = None,
        dimension_numbers: Any = None,
        feature_group_count: int = 1,
        batch_group_count: int = 1,
        precision: Any = None,
        preferred_element_type: Any = None,
        *,
        out_sharding: Any = None,
    ) -> Array:
        for name, value in (
            ("lhs_dilation", lhs_dilation),
            ("rhs_dilation", rhs_dilation),
            ("feature_group_count", feature_group_count),
            ("batch_group_count", batch_group_count),
        ):
            if not _ones(value):
                raise ValueError(f"{name} is {value}; BDWP's convolution has 1 alone")
        layout = lax.conv_dimension_numbers(x.shape, kernel.shape, dimension_numbers)
        if layout != channels_last(x.ndim):
            raise ValueError(
                f"dimension_numbers is {dimension_numbers}; BDWP's convolution has channels last "
                "and kernels [..., in, out], as Flax has"
            )
        _refuse_sharding(out_sharding)
        return convolution(
            x,
            kernel,
            self.pattern.n,
            self.pattern.m,
            strides=window_strides,
            padding=padding,
            decay=self.decay,
            method=self.method,
            precision=precision,
            dtype=preferred_element_type,
        )


@dataclasses.dataclass(frozen=True)
class _KeepKernel:
    """A layer's `promote_dtype` that leaves the kernel in the dtype of its parameters.

    A kernel rounded to bfloat16 has ties that the parameters have not, and its gradient would lose
    the pull, which is thousands of times smaller than the rest.
    """

    promote: Callable[..., Any]

    def __call__(self, args: Any, /, *, dtype: Any = None, inexact: bool = True) -> Any:
        x, _, bias = self.promote(args, dtype=dtype, inexact=inexact)
        return x, args[1], bias


def _ones(value: int | Sequence[int] | None) -> bool:
    return value is None or set([value] if isinstance(value, int) else value) <= {1}


def _refuse_sharding(out_sharding: Any) -> None:
    if out_sharding is not None:
        raise ValueError(f"out_sharding is {out_sharding}; BDWP leaves the layout to the compiler")
