"""The linear layers and convolutions of an NNX model, and what a call of it multiplies in them."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from sparsejax.core.selection import is_array


@dataclasses.dataclass(frozen=True)
class LayerProduct:
    """The forward products of one layer: `(P x K) (K x Q)` with the same K and Q.

    Attributes:
      path: of the kernel.
      calls: P of every product, batch included: one for each call and each stacked copy.
      reduction: K; for a convolution kernel size times input channels of a group.
      outputs: Q.
    """

    path: str
    calls: tuple[int, ...]
    reduction: int
    outputs: int

    @property
    def positions(self) -> int:
        """P of all products together."""
        return sum(self.calls)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all products together: P K Q."""
        return self.positions * self.reduction * self.outputs

    @property
    def products(self) -> tuple[tuple[int, int, int], ...]:
        """(P, K, Q) of each product by itself, as a cost model wants them."""
        return tuple((p, self.reduction, self.outputs) for p in self.calls)


def named_layers(model: nnx.Module) -> list[tuple[str, nnx.Linear | nnx.Conv]]:
    """Every `nnx.Linear` and `nnx.Conv` of a model, by the path of its kernel.

    Stacked layers, whose kernels have leading axes, are one layer; so is a shared one.

    >>> named_layers(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))[0][0]
    'kernel'
    """
    return [
        ("/".join(map(str, (*path, "kernel"))), module)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Linear | nnx.Conv)
    ]


def layer_products(model: nnx.Module, *inputs: Any, **kwargs: Any) -> tuple[LayerProduct, ...]:
    """What the linear layers and convolutions multiply in `model(*inputs, **kwargs)`.

    The call is traced on abstract values: nothing is computed, and the model, its batch statistics
    included, stays as it is.

    Args:
      model: layers whose kernels have leading axes, run by `scan` or `vmap`, count once for every
        entry of those. Of a layer called twice, both calls count, unless they are one call of a
        compiled function or of a loop, which is traced once.
      *inputs, **kwargs: arrays or `jax.ShapeDtypeStruct`, and anything else as it is.

    Returns:
      One entry for every layer that was called, in the order of `named_layers`.

    Raises:
      ValueError: no layer was called.

    >>> layer_products(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jax.ShapeDtypeStruct((5, 2), "float32"))
    (LayerProduct(path='kernel', calls=(5,), reduction=2, outputs=3),)
    """
    graph, state = nnx.split(model)
    calls: dict[str, list[int]] = {}
    leaves, structure = jax.tree.flatten((inputs, kwargs))
    arrays = [leaf for leaf in leaves if is_array(leaf)]

    def run(state: Any, arrays: list[Array]) -> None:
        # made here, for its state may be written to under this trace alone
        copy: Any = nnx.merge(graph, state)
        for path, layer in named_layers(copy):
            seen = calls.setdefault(path, [])
            if isinstance(layer, nnx.Linear):
                layer.dot_general = _recording(layer.dot_general, seen)
            else:
                layer.conv_general_dilated = _recording(layer.conv_general_dilated, seen)
        given = iter(arrays)
        merged = [next(given) if is_array(leaf) else leaf for leaf in leaves]
        args, options = jax.tree.unflatten(structure, merged)
        copy(*args, **options)

    jax.eval_shape(run, state, arrays)
    products = []
    for path, layer in named_layers(model):
        *leading, outputs = layer.kernel.get_value().shape
        own = 1 if isinstance(layer, nnx.Linear) else len(layer.kernel_size) + 1
        stacked, reduction = leading[: len(leading) - own], leading[len(leading) - own :]
        if calls[path]:
            each = tuple(calls[path]) * math.prod(stacked)
            products.append(LayerProduct(path, each, math.prod(reduction), outputs))
    if not products:
        raise ValueError(f"the call ran no nnx.Linear and no nnx.Conv; the model has {len(calls)}")
    return tuple(products)


def _recording(function: Callable[..., Array], seen: list[int]) -> Callable[..., Array]:
    """The product of a layer, which also notes how many positions it had."""

    def product(x: Array, kernel: Array, *args: Any, **options: Any) -> Array:
        out = function(x, kernel, *args, **options)
        seen.append(out.size // kernel.shape[-1])
        return out

    return product
