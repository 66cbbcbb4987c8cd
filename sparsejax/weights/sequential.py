"""Pruning a model block by block, with calibration inputs from the pruned prefix.

For each block in order: its linear layers' inputs are collected as the block is, all of them are
pruned, and the block runs again to make the next block's inputs. Only one block's activations, for
one chunk of sequences, are in memory at a time, beside the hidden states between two blocks.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PyTree

from sparsejax.core.masks import apply_masks
from sparsejax.core.patterns import NM
from sparsejax.core.selection import map_selected, named_leaves
from sparsejax.weights.one_shot import (
    ActivationStats,
    activation_stats,
    magnitude_mask,
    merge_stats,
    wanda_mask,
)


@dataclasses.dataclass(frozen=True)
class PruneMethod:
    """How a layer is pruned at once.

    Attributes:
      name: "magnitude" or "wanda".
      sparsity: share pruned, or
      pattern: N of M inputs stay; exactly one of the two.

    Raises:
      ValueError: an unknown name, or not exactly one of sparsity and pattern.
    """

    name: Literal["magnitude", "wanda"] = "wanda"
    sparsity: float | None = None
    pattern: NM | None = None

    def __post_init__(self) -> None:
        if self.name not in ("magnitude", "wanda"):
            raise ValueError(f"name is {self.name!r}; allowed are 'magnitude' and 'wanda'")
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError("exactly one of sparsity and pattern is needed")


def capture_inputs(
    block: nnx.Module, x: Float[Array, "s t d"]
) -> tuple[Float[Array, "s t e"], dict[str, Float[Array, "s t i"]]]:
    """Runs a block and returns, beside its output, the input of every `nnx.Linear` in it.

    Args:
      block: called with one argument; not changed.
      x: s sequences of t tokens.

    Returns:
      The output, and inputs by the path of the layer's kernel.
    """
    graph, state = nnx.split(block)
    copy = nnx.merge(graph, state)
    inputs: dict[str, Array] = {}
    for path, module in list(nnx.iter_modules(copy)):
        if isinstance(module, nnx.Linear):
            parent = functools.reduce(_child, path[:-1], copy)
            name = "/".join(map(str, (*path, "kernel")))
            _set_child(parent, path[-1], _Recorder(module, name, inputs))
    return copy(x), inputs  # type: ignore[operator]


def prune_sequential(
    blocks: Sequence[nnx.Module],
    hidden: Float[Array, "s t d"],
    *,
    method: PruneMethod,
    chunk: int = 16,
) -> tuple[list[PyTree], list[dict[str, float]]]:
    """Prunes the linear layers of a chain of blocks, in place.

    Args:
      blocks: each maps `[s, t, d]` to `[s, t, d]`; blocks of one structure share one compilation.
      hidden: inputs of the first block for the calibration sequences.
      method: criterion and amount.
      chunk: sequences at a time.

    Returns:
      One mask tree per block, in the structure of its `nnx.state`, and one report per block:
      kernel path -> relative squared error of the layer's output on the calibration inputs.

    Raises:
      ValueError: no sequences, or activations that are not finite (naming block and layer).
    """
    if not hidden.shape[0]:
        raise ValueError(f"hidden has shape {hidden.shape}: there are no calibration samples")
    chunks = [hidden[i : i + chunk] for i in range(0, hidden.shape[0], chunk)]
    masks, reports = [], []
    for number, block in enumerate(blocks):
        graph, state = nnx.split(block)
        stats: dict[str, ActivationStats] = {}
        for part in chunks:
            for name, new in _collect(graph, state, part).items():
                counted = new._replace(n_seq=part.shape[0], n_tok=part.shape[0] * part.shape[1])
                stats[name] = merge_stats(stats[name], counted) if name in stats else counted
        for name, found in stats.items():
            if not np.isfinite(found.sum_sq).all():
                raise ValueError(f"block {number}: the inputs of {name!r} are not finite")
        kept = map_selected(
            lambda path, w, stats=stats: _layer_mask(w, stats[path], method),
            state,
            where=lambda path, leaf, stats=stats: path in stats,
            otherwise=lambda leaf: jnp.asarray(True),
        )
        pruned = apply_masks(state, kept)
        total = [_errors(graph, state, pruned, part) for part in chunks]
        reports.append({name: _relative([t[name] for t in total]) for name in stats})
        nnx.update(block, pruned)
        masks.append(kept)
        chunks = [_forward(graph, pruned, part) for part in chunks]
    return masks, reports


def _layer_mask(w: Array, stats: ActivationStats, method: PruneMethod) -> Array:
    if method.name == "magnitude":
        return magnitude_mask(w, sparsity=method.sparsity, pattern=method.pattern)
    return wanda_mask(w, stats, sparsity=method.sparsity, pattern=method.pattern)


@functools.partial(jax.jit, static_argnums=0)
def _collect(graph: Any, state: PyTree, x: Array) -> dict[str, ActivationStats]:
    inputs = capture_inputs(nnx.merge(graph, state), x)[1]
    return {name: activation_stats(value) for name, value in inputs.items()}


@functools.partial(jax.jit, static_argnums=0)
def _errors(graph: Any, state: PyTree, pruned: PyTree, x: Array) -> dict[str, tuple[Array, Array]]:
    inputs = capture_inputs(nnx.merge(graph, state), x)[1]
    dense, sparse = dict(named_leaves(state)), dict(named_leaves(pruned))

    def squares(name: str, value: Array) -> tuple[Array, Array]:
        lost = value @ (dense[name] - sparse[name]).astype(value.dtype)
        whole = value @ dense[name].astype(value.dtype)
        return jnp.sum(lost * lost), jnp.sum(whole * whole)

    return {name: squares(name, value) for name, value in inputs.items()}


@functools.partial(jax.jit, static_argnums=0)
def _forward(graph: Any, state: PyTree, x: Array) -> Array:
    return nnx.merge(graph, state)(x)


def _relative(parts: list[tuple[Array, Array]]) -> float:
    lost, whole = (sum(float(p[i]) for p in parts) for i in (0, 1))
    return lost / whole if whole else 0.0


class _Recorder:
    """Stands in for a layer and keeps what it was given."""

    def __init__(self, layer: nnx.Linear, name: str, inputs: dict[str, Array]):
        self._layer, self._name, self._inputs = layer, name, inputs

    def __call__(self, x: Array) -> Array:
        self._inputs[self._name] = x
        return self._layer(x)


def _child(module: Any, key: Any) -> Any:
    return module[key] if isinstance(key, int) else getattr(module, key)


def _set_child(module: Any, key: Any, value: Any) -> None:
    if isinstance(key, int):
        module[key] = value
    else:
        setattr(module, key, value)
