"""CATS and R-Sparse in the layers of a decoder, and how much of a sparsified model is really kept.

A product takes the place of `lax.dot_general` in an `nnx.Linear`, as Flax allows; a feed-forward
layer that of the decoder's own. Parameters keep their paths.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.sparse_ffn import sparse_ffn
from sparsejax import activations as act
from sparsejax.core.selection import named_leaves
from sparsejax.core.statistical import compact_indices

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def projections(model: nnx.Module) -> dict[str, nnx.Linear]:
    """The layers that methods sparsify, by the path of their kernel; not the head."""
    return {
        "/".join(map(str, (*path, "kernel"))): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Linear) and path[-1] in PROJECTIONS
    }


class CatsFeedForward(nnx.Module):
    """A gated layer of which a token computes the neurons alone whose gate is above a threshold.

    Args:
      inner: the decoder's own layer, whose projections it takes. threshold: see `cats_threshold`.
      decoding: also stores the weights of up neuron by neuron, of which a single token then reads
        those that it needs.
    """

    def __init__(self, inner: Any, threshold: Float[Array, "*stack"], *, decoding: bool):
        self.gate_proj, self.up_proj = inner.gate_proj, inner.up_proj
        self.down_proj = inner.down_proj
        self.threshold = act.InputSetting(threshold)
        up = inner.up_proj.kernel[...]
        self.up_rows = act.InputSetting(up.swapaxes(-1, -2)) if decoding else None

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """The block's second residual branch."""
        gates = act.cats_activation(self.gate_proj(x), self.threshold[...])
        if self.up_rows is None or x.size != x.shape[-1]:
            return self.down_proj(gates * self.up_proj(x))
        gates = gates.reshape(-1)
        idx, count, _ = compact_indices(gates != 0, gates.shape[0])
        rows, down = self.up_rows[...], self.down_proj.kernel[...]
        return sparse_ffn(x.reshape(-1), rows, down, idx, count, gate=gates[idx]).reshape(x.shape)

    def detailed(self, x: Float[Array, "*b d"]) -> tuple[Float[Array, "*b d"], dict[str, Array]]:
        """As `__call__`, with nothing beside it."""
        return self(x), {}

    def decode(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """As `__call__`."""
        return self(x)


class RSparseProduct(nnx.Module):
    """`r_sparse_linear` in place of a product; a single token reads the kept rows alone."""

    def __init__(self, product: Any, c: Array, threshold: Array, factors: tuple[Array, Array]):
        self.product = product
        self.c, self.threshold = act.InputSetting(c), act.InputSetting(threshold)
        self.down, self.up = (act.InputSetting(factor) for factor in factors)

    def __call__(self, x: Array, kernel: Array, dimension_numbers: Any, **options: Any) -> Array:
        limit = self.threshold[...]
        kept = act.wina_mask(x, self.c[...], by="threshold", threshold=limit)
        rest = (jnp.where(kept, 0, x) @ self.down[...]) @ self.up[...]
        if x.size == x.shape[-1]:
            row, mask = x.reshape(-1), kept.reshape(-1)
            product = act.product_of_kept(row, kernel, mask, row.shape[0])
            return product.reshape(rest.shape) + rest
        return self.product(jnp.where(kept, x, 0), kernel, dimension_numbers, **options) + rest


def with_cats(
    model: Any, thresholds: Float[np.ndarray, " layers"], *, decoding: bool = False
) -> Any:
    """The model with CATS in every feed-forward layer.

    Args:
      model: with stacked blocks or separate ones; not changed. thresholds: of each layer.
    """
    copy, limits = nnx.clone(model), jnp.asarray(thresholds, jnp.float32)
    if not isinstance(copy.blocks, nnx.List):
        copy.blocks.ffn = CatsFeedForward(copy.blocks.ffn, limits, decoding=decoding)
        return copy
    for block, limit in zip(copy.blocks, limits):
        block.ffn = CatsFeedForward(block.ffn, limit, decoding=decoding)
    return copy


def with_r_sparse(
    model: Any,
    thresholds: Mapping[str, Float[np.ndarray, "*stack"]],
    factors: Mapping[str, tuple[Array, Array]],
) -> Any:
    """The model with R-Sparse in every projection.

    Args:
      model: with stacked blocks or separate ones; not changed.
      thresholds, factors: by the path of the kernel, for each of stacked layers.
    """
    copy = nnx.clone(model)
    for path, layer in projections(copy).items():
        c = act.column_norms(layer.kernel[...], where=lambda path, leaf: True)
        limit = jnp.asarray(thresholds[path], jnp.float32)
        layer.dot_general = nnx.data(RSparseProduct(layer.dot_general, c, limit, factors[path]))
    return copy


@jax.jit
def stacked_factors(kernel: Float[Array, "layers i o"]) -> tuple[Array, Array]:
    """All singular triplets of every layer's kernel; the first columns and rows are those of a
    lower rank."""
    rank = min(kernel.shape[1:])
    return jax.lax.map(lambda w: act.low_rank_factors(w, rank), kernel)


# what is kept


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
