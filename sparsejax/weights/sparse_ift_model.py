"""Sparse-IFT for whole models: linear layers and convolutions replaced by larger sparse ones.

Source: Thangarasa et al., Sparse-IFT (2024, arXiv 2303.11525).
"""

from typing import Any, Literal, cast

import numpy as np
from flax import nnx

from sparsejax.core.selection import Where, selected_paths
from sparsejax.weights.layers import named_layers
from sparsejax.weights.sparse_ift import sift_size
from sparsejax.weights.sparse_ift_modules import (
    Factor,
    LayerOptions,
    Padding,
    SparseDoped,
    SparseFactorized,
    SparseParallel,
)

LocalKind = Literal["parallel", "factorized", "doped"]
_MUST_BE_UNSET = ("mask", "precision", "preferred_element_type")
_MUST_BE_ONE = ("feature_group_count", "input_dilation", "kernel_dilation")


def sparse_ift_model(
    model: nnx.Module,
    kind: LocalKind,
    sparsity: float,
    *,
    where: Where = None,
    norm: bool = True,
    factor: Factor = "nonlinear_relu",
    allow_rounding: bool = False,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Replaces chosen `nnx.Linear` and `nnx.Conv` layers by layers of Sparse-IFT.

    The new layers have the inputs, outputs, kernel, strides, padding and dtypes of the old ones and
    new random kernels (the method trains from scratch). A bias is kept, after the new layer. Stem
    and head should stay dense: leave them out by `where`. The new kernels are dense as yet; make
    masks with `random_masks(key, params, 1 - sparsity, where=sparse_parts(kind))`.

    New layers with batch norm are called by the model as the old ones were, without `train`: say
    `model.train()` or `model.eval()`, and take their averages along as any `nnx.BatchStat`.

    Args:
      model: a layer that it uses in several places is replaced in all of them.
      kind: "parallel", "factorized" or "doped". Sparse-Wide is a width and no layer: build the
        model with `widened(...)`.
      sparsity: of the sparse parts, in [0, 1).
      where: which layers, by the path of their kernel, see `selected_paths`.
      norm: of "parallel", see `SparseParallel`. factor: of "factorized".
      allow_rounding: see `sift_size`.
      rngs: draws the kernels.

    Returns:
      A model of the same class; it shares biases and all other layers' variables with the one
      given, which stays as it is.

    Raises:
      ValueError: another kind, `where` that chooses no layer, or as `sift_size`; naming a layer
        that is stacked, grouped, dilated or masked, has another padding than zeros, not two axes or
        a precision of its own, or is held by a tuple.
    """
    if kind == "wide":
        raise ValueError(
            "kind is 'wide', which is no layer: build the model with widened(width, sparsity)"
        )
    if kind not in ("parallel", "factorized", "doped"):
        raise ValueError(f"kind is {kind!r}; allowed are 'parallel', 'factorized' and 'doped'")
    # a subclass may do anything with its kernel
    layers = {path: x for path, x in named_layers(model) if type(x) in (nnx.Linear, nnx.Conv)}
    if not layers:
        raise ValueError("model has no nnx.Linear or nnx.Conv: there is nothing to replace")
    chosen = selected_paths({path: layer.kernel[...] for path, layer in layers.items()}, where)

    nodes = {"/".join(map(str, path)): node for path, node in nnx.iter_graph(model)}
    for path in chosen:
        holder = path.rpartition("/")[0].rpartition("/")[0]
        if isinstance(nodes[holder], tuple):
            raise ValueError(f"layer {path!r} is held by a tuple; hold it by an nnx.List")

    def build(path: str, layer: Any) -> nnx.Module:
        options = _options(path, layer)
        sizes = layer.in_features, layer.out_features
        kernel = options.get("kernel") or (1, 1)
        try:
            size = sift_size(kind, *sizes, sparsity, kernel=kernel, allow_rounding=allow_rounding)
        except ValueError as error:
            raise ValueError(f"layer {path!r}: {error}") from error
        count, biased = int(size), layer.bias is not None
        new: SparseParallel | SparseFactorized | SparseDoped
        if kind == "parallel":
            new = SparseParallel(*sizes, count, norm=norm, use_bias=biased, rngs=rngs, **options)
        elif kind == "factorized":
            new = SparseFactorized(
                *sizes, count, factor=factor, use_bias=biased, rngs=rngs, **options
            )
        else:
            new = SparseDoped(*sizes, count, use_bias=biased, rngs=rngs, **options)
        if biased:
            new.bias = layer.bias
        return new

    replaced = {path: build(path, layers[path]) for path in chosen}
    return nnx.recursive_map(
        lambda path, node: replaced.get("/".join(map(str, (*path, "kernel"))), node),
        model,
        graph=True,
    )


def _options(path: str, layer: Any) -> LayerOptions:
    """The options of the new layer, or an error that says why there is none."""
    axes = 2 if isinstance(layer, nnx.Linear) else 2 + len(layer.kernel_size)
    if layer.kernel.ndim != axes:
        raise ValueError(
            f"layer {path!r} is stacked: its kernel has shape {layer.kernel.shape}; replace the "
            "layers of a model that holds each by itself"
        )
    for name in _MUST_BE_UNSET:
        if getattr(layer, name, None) is not None:
            raise ValueError(f"layer {path!r} has a {name}, which the new layer would not keep")
    options: LayerOptions = {"dtype": layer.dtype, "param_dtype": layer.param_dtype}
    if isinstance(layer, nnx.Linear):
        return options
    if axes != 4:
        raise ValueError(f"layer {path!r} has kernel_size {layer.kernel_size}; it needs two axes")
    for name in _MUST_BE_ONE:
        value = getattr(layer, name)
        if value is not None and np.any(np.asarray(value) != 1):
            raise ValueError(f"layer {path!r} has {name} {value}; the new layer allows 1 only")
    kernel, strides = (cast(tuple[int, int], _pair(x)) for x in (layer.kernel_size, layer.strides))
    return {**options, "kernel": kernel, "strides": strides, "padding": _padding(path, layer)}


def _padding(path: str, layer: nnx.Conv) -> Padding:
    padding: Any = layer.padding
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(f"layer {path!r} has padding {padding!r}; the new layer pads zeros")
        return cast(Padding, padding)
    return cast(Padding, tuple(_pair(side) for side in _pair(padding)))


def _pair(value: Any) -> tuple[Any, Any]:
    """What Flax makes of a number, or of None, for two axes or two sides."""
    first, second = (value, value) if isinstance(value, int) else value or (1, 1)
    return first, second
