"""The projections that methods sparsify, their factors, and how much of a model is really kept."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sparsejax import activations as act
from sparsejax.core.selection import named_leaves

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def projections(model: nnx.Module) -> dict[str, nnx.Linear]:
    """The layers that methods sparsify, by the path of their kernel; not the head."""
    return {
        "/".join(map(str, (*path, "kernel"))): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Linear) and path[-1] in PROJECTIONS
    }


@jax.jit
def stacked_factors(kernel: Float[Array, "layers i o"]) -> tuple[Array, Array]:
    """All singular triplets of every layer's kernel; the first columns and rows are those of a
    lower rank."""
    rank = min(kernel.shape[1:])
    return jax.lax.map(lambda w: act.low_rank_factors(w, rank), kernel)


class _Kept(nnx.Variable):
    """Zero, whose gradient is how many inputs a product got that are not zero."""


class CountedProduct(nnx.Module):
    """A product that lets the number of its inputs out through a gradient.

    A loop over stacked layers lets nothing else out. It goes into the layers before they are
    sparsified, so that it sees what is left.
    """

    def __init__(self, product: Any, stack: tuple[int, ...]):
        self.product, self.kept = product, _Kept(jnp.zeros(stack))

    def __call__(self, x: Array, kernel: Array, dimension_numbers: Any, **options: Any) -> Array:
        return self.product(_counted(x, self.kept[...]), kernel, dimension_numbers, **options)


@jax.custom_vjp
def _counted(x: Array, kept: Array) -> Array:
    return x


_counted.defvjp(
    lambda x, kept: (x, jnp.count_nonzero(x)), lambda n, dx: (dx, n.astype(jnp.float32))
)


def with_counts(model: Any) -> Any:
    """The model with products that count their inputs."""
    copy = nnx.clone(model)
    for layer in projections(copy).values():
        stack = layer.kernel[...].shape[:-2]
        layer.dot_general = nnx.data(CountedProduct(layer.dot_general, stack))
    return copy


def kept_weights(model: nnx.Module, tokens: Array) -> dict[str, float]:
    """The share of every projection's weights whose inputs are not zero, mean over tokens.

    Args:
      model: made from one of `with_counts`. tokens: `[b, t]`.
    """
    graph, counts, rest = nnx.split(model, _Kept, ...)
    found = {
        path.removeprefix("model/").split("dot_general")[0]: float(np.sum(n))
        for path, n in named_leaves(_count(graph, counts, rest, tokens))
    }
    shapes = {
        path.removeprefix("model/"): layer.kernel.shape
        for path, layer in projections(model).items()
    }
    return {
        path: found[path.removesuffix("kernel")] / (tokens.size * math.prod(shape[:-1]))
        for path, shape in shapes.items()
    }


@functools.partial(jax.jit, static_argnames="graph")
def _count(graph: Any, counts: Any, rest: Any, tokens: Array) -> Any:
    def total(counts: Any) -> Array:
        run: Any = nnx.merge(graph, counts, rest)
        return jnp.sum(run(tokens))

    return jax.grad(total)(counts)
