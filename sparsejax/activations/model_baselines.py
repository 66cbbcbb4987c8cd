"""CATS and R-Sparse in the layers of any NNX model, with real skipping in decoding.

As `sparse_inputs` does, they return a copy whose parameters keep their paths. Single tokens read
the rows that are kept alone; a loop over stacked layers copies its weights first, so `unroll` a
model before it decodes.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.sparse_ffn import sparse_ffn
from sparsejax.activations.input_sparsity import (
    InputSetting,
    PerLayer,
    chosen_kernels,
    linear_layers,
    per_layer,
)
from sparsejax.activations.wina import column_norms, product_of_kept, wina_mask
from sparsejax.activations.wina_baselines import cats_activation
from sparsejax.core.selection import Where
from sparsejax.core.statistical import compact_indices

Model = TypeVar("Model", bound=Any)
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class CatsFeedForward(nnx.Module):
    """A gated layer of which a token computes the neurons alone whose gate is above a threshold.

    Args:
      inner: the model's own layer, whose `gate_proj`, `up_proj` and `down_proj` it takes.
      threshold: see `cats_threshold`; one for each of stacked layers.
      decoding: also stores the weights of up neuron by neuron, of which a single token then reads
        those that it needs.
    """

    def __init__(self, inner: Any, threshold: Float[Array, "*stack"], *, decoding: bool):
        self.gate_proj, self.up_proj = inner.gate_proj, inner.up_proj
        self.down_proj = inner.down_proj
        self.threshold = InputSetting(threshold)
        up = inner.up_proj.kernel[...]
        self.up_rows = InputSetting(up.swapaxes(-1, -2)) if decoding else None

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """The block's second residual branch."""
        gates = cats_activation(self.gate_proj(x), self.threshold[...])
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


def cats_model(model: Model, thresholds: PerLayer, *, decoding: bool = False) -> Model:
    """The model with CATS in every gated feed-forward layer.

    Args:
      model: not changed. Its gated layers are the modules with `gate_proj`, `up_proj` and
        `down_proj`, each an `nnx.Linear` without a bias, and SiLU between them.
      thresholds: of |silu(gate)| in each layer, at least 0 and infinite for none, by the path of
        the layer (`blocks/ffn`) or a regular expression searched in it; see `cats_threshold`.
      decoding: single tokens read the rows of up and down that they need, for which up is stored
        once more, neuron by neuron.

    Raises:
      ValueError: no gated layer, one with biases, a threshold that is negative or not a number, of
        another shape than the stacked layers, missing for a layer, or for none.

    Source: CATS (2024, arXiv 2404.08763).

    >>> from sparsejax.models import Llama, llama_config
    >>> model = Llama(llama_config("laptop"), rngs=nnx.Rngs(0))
    >>> cats_model(model, 0.1)(jnp.zeros((1, 4), jnp.int32)).shape
    (1, 4, 128)
    """
    copy = nnx.clone(model)
    layers: dict[str, tuple[Any, Any]] = {
        "/".join(map(str, path)): (path, module)
        for path, module in nnx.iter_modules(copy)
        if all(isinstance(getattr(module, name, None), nnx.Linear) for name in _PROJECTIONS)
    }
    if not layers:
        raise ValueError(f"model has no layer with {', '.join(_PROJECTIONS)}")
    stacks = {name: layer.gate_proj.kernel.shape[:-2] for name, (_, layer) in layers.items()}
    limits = per_layer("thresholds", thresholds, stacks)
    for name, (path, layer) in layers.items():
        biases = [proj for proj in _PROJECTIONS if getattr(layer, proj).bias is not None]
        if biases:
            raise ValueError(f"model has biases in {', '.join(biases)} of {name!r}; CATS has none")
        limit = _checked_limit(name, limits[name])
        _put(copy, path, CatsFeedForward(layer, limit, decoding=decoding))
    return copy


class RSparseProduct(nnx.Module):
    """`r_sparse_linear` in place of a layer's product; a single token reads the kept rows alone."""

    def __init__(self, product: Any, c: Array, threshold: Array, factors: tuple[Array, Array]):
        self.product = product
        self.c, self.threshold = InputSetting(c), InputSetting(threshold)
        self.down, self.up = (InputSetting(factor) for factor in factors)

    def __call__(self, x: Array, kernel: Array, dimension_numbers: Any, **options: Any) -> Array:
        limit = self.threshold[...]
        kept = wina_mask(x, self.c[...], by="threshold", threshold=limit)
        none = jnp.zeros((), x.dtype)
        down, up = (factor[...].astype(x.dtype) for factor in (self.down, self.up))
        rest = (jnp.where(kept, none, x) @ down) @ up
        if x.size == x.shape[-1]:
            row, mask = x.reshape(-1), kept.reshape(-1)
            product = product_of_kept(row, kernel, mask, row.shape[0])
            return product.reshape(rest.shape) + rest
        return self.product(jnp.where(kept, x, none), kernel, dimension_numbers, **options) + rest


def r_sparse_model(
    model: Model,
    thresholds: PerLayer,
    factors: Mapping[str, tuple[Array, Array]],
    *,
    where: Where = None,
) -> Model:
    """The model with R-Sparse in every chosen linear layer.

    Args:
      model: not changed. thresholds: of the scores `|x| * c` in each layer, as `sparse_inputs`
        takes them; see `input_thresholds`.
      factors: by the path of the kernel, `(down [*stack, in, rank], up [*stack, rank, out])`, see
        `low_rank_factors`: what the inputs that are not kept go through.
      where: which kernels, as in `sparse_inputs`.

    Raises:
      ValueError: thresholds as in `sparse_inputs`, or factors that are missing for a chosen layer
        or do not fit it.

    Source: R-Sparse (2025, arXiv 2504.19449).

    >>> from sparsejax.activations.wina_baselines import low_rank_factors
    >>> layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    >>> factors = {"kernel": low_rank_factors(layer.kernel[...], 3)}
    >>> sparse = r_sparse_model(layer, 0.5, factors)
    >>> bool(jnp.allclose(sparse(jnp.ones((2, 4))), layer(jnp.ones((2, 4))), atol=1e-4))
    True
    """
    copy = nnx.clone(model)
    kernels, layers = chosen_kernels(model, where), linear_layers(copy)
    limits = per_layer("thresholds", thresholds, {p: w.shape[:-2] for p, w in kernels.items()})
    for path, kernel in kernels.items():
        limit = _checked_limit(path, limits[path])
        if path not in factors:
            raise ValueError(f"factors has nothing for layer {path!r}")
        down, up = factors[path]
        if down.shape[:-1] != kernel.shape[:-1] or up.shape != (
            *kernel.shape[:-2], down.shape[-1], kernel.shape[-1],
        ):  # fmt: skip
            raise ValueError(
                f"factors has shapes {down.shape} and {up.shape} for {path!r} of shape "
                f"{kernel.shape}; they must be [*stack, in, rank] and [*stack, rank, out]"
            )
        c = column_norms(kernel, where=lambda path, leaf: True)
        layer = layers[path]
        layer.dot_general = nnx.data(RSparseProduct(layer.dot_general, c, limit, (down, up)))
    return copy


def _checked_limit(path: str, limit: np.ndarray) -> Float[Array, "*stack"]:
    if not (limit >= 0).all():
        raise ValueError(f"thresholds has {limit.min()} for {path!r}; at least 0")
    return jnp.asarray(limit, jnp.float32)


def _put(model: Any, path: tuple[Any, ...], module: nnx.Module) -> None:
    """Sets what lies at a path of a model."""
    *above, name = path
    for part in above:
        model = model[part] if isinstance(part, int) else getattr(model, part)
    if isinstance(name, int):
        model[name] = module
    else:
        setattr(model, name, module)
