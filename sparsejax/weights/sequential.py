"""Pruning a model block by block, with calibration inputs from the pruned prefix.

For each block in order: its linear layers' inputs are collected as the block is, all of them are
pruned, and the block runs again to make the next block's inputs. Only one block's activations, for
one chunk of sequences, are in memory at a time, beside the hidden states between two blocks.
`prune_model` does the same to a whole model.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PyTree

from sparsejax.core.dtypes import widen
from sparsejax.core.patterns import NM
from sparsejax.core.scores import magnitude, wanda_score
from sparsejax.core.selection import map_selected, named_leaves
from sparsejax.weights.dsnot import dsnot_mask
from sparsejax.weights.one_shot import (
    ActivationStats,
    Hessian,
    activation_stats,
    check_choice,
    hessian,
    magnitude_mask,
    merge_hessian,
    merge_stats,
    rank_inputs,
    wanda_mask,
)
from sparsejax.weights.sparsegpt import sparsegpt, sparsegpt_score

Skip = Literal["mlp", "self_attn"] | None
_NAMES = ("magnitude", "wanda", "sparsegpt", "dsnot")
_SKIPPED = {
    "mlp": ("ffn", "mlp", "gate_proj", "up_proj", "down_proj"),
    "self_attn": ("attention", "attn"),
}


@dataclasses.dataclass(frozen=True)
class PruneMethod:
    """How a layer is pruned at once.

    Attributes:
      name: "magnitude", "wanda", "sparsegpt" or "dsnot".
      initial: DSnoT's first mask, ranked for every output by itself: "magnitude", "wanda", or
        "sparsegpt" (by `sparsegpt_score`, the weights unchanged).
      sparsity: share pruned, or
      pattern: N of M inputs stay; exactly one of the two.
      block, damp: see `sparsegpt`.
      update_weights: False ranks SparseGPT's score for every output and changes no weight, which is
        what DSnoT starts from with that initial.
      max_cycles, threshold, var_power, require_same_sign: see `dsnot_mask`, which is given
        variances with 1e-6 added.

    Raises:
      ValueError: an unknown name or initial, not exactly one of sparsity and pattern, a sparsity
        outside [0, 1), a block below 1 or, for SparseGPT, that M does not divide, or a negative
        damp, max_cycles or threshold.
    """

    name: Literal["magnitude", "wanda", "sparsegpt", "dsnot"] = "wanda"
    initial: Literal["magnitude", "wanda", "sparsegpt"] = "wanda"
    sparsity: float | None = None
    pattern: NM | None = None
    block: int = 128
    damp: float = 0.01
    update_weights: bool = True
    max_cycles: int = 50
    threshold: float = 0.1
    var_power: float = 1.0
    require_same_sign: bool = True

    def __post_init__(self) -> None:
        for field, known in (("name", _NAMES), ("initial", _NAMES[:-1])):
            value = getattr(self, field)
            if value not in known:
                raise ValueError(f"{field} is {value!r}; allowed are {', '.join(known)}")
        check_choice(self.sparsity, self.pattern)
        if self.block < 1:
            raise ValueError(f"block is {self.block}; it must be at least 1")
        if self.name == "sparsegpt" and self.pattern is not None and self.block % self.pattern.m:
            raise ValueError(f"block is {self.block}, not a multiple of m = {self.pattern.m}")
        for field in ("damp", "max_cycles", "threshold"):
            value = getattr(self, field)
            if not value >= 0:
                raise ValueError(f"{field} is {value}; it must not be negative")

    @property
    def needs_hessian(self) -> bool:
        """Whether second moments of the inputs are collected."""
        return "sparsegpt" in (self.name, self.initial if self.name == "dsnot" else None)

    @property
    def amount(self) -> dict[str, Any]:
        """`sparsity` and `pattern`, as the functions of a layer take them."""
        return {"sparsity": self.sparsity, "pattern": self.pattern}


class Collected(NamedTuple):
    """What is known of a layer's inputs."""

    stats: ActivationStats
    hessian: Hessian | None


class PrunedBlock(NamedTuple):
    """A block after pruning.

    Attributes:
      state: its parameters. masks: in the structure of `state`. errors: kernel path -> relative
        squared error of the layer's output on the calibration inputs.
    """

    state: PyTree
    masks: PyTree
    errors: dict[str, float]


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
    out, layers = _capture(block, x)
    return out, {name: value for name, (value, _) in layers.items()}


def prune_sequential(
    blocks: Sequence[nnx.Module],
    hidden: Float[Array, "s t d"],
    *,
    method: PruneMethod,
    skip: Skip = None,
    chunk: int = 16,
) -> tuple[list[PyTree], list[dict[str, float]]]:
    """Prunes the linear layers of a chain of blocks, in place.

    Args:
      blocks: each maps `[s, t, d]` to `[s, t, e]`; blocks of one structure share one compilation.
      hidden: inputs of the first block for the calibration sequences.
      method: criterion and amount.
      skip: DSnoT alone: layers that keep the initial mask. "mlp": a path with ffn, mlp, gate_proj,
        up_proj or down_proj; "self_attn": with attention or attn.
      chunk: sequences at a time.

    Returns:
      One mask tree per block, in the structure of its `nnx.state`, and one report per block:
      kernel path -> relative squared error of the layer's output on the calibration inputs.

    Raises:
      ValueError: no sequences, chunk < 1, skip with another method or unknown, a pattern that does
        not fit a layer, or activations that are not finite (naming block and layer).
      FloatingPointError: a layer's Hessian has no Cholesky factorisation (naming both).
    """
    check_skip(method, skip)
    chunks = split_chunks(hidden, chunk, name="hidden")
    masks, reports = [], []
    for number, block in enumerate(blocks):
        graph, state = nnx.split(block)
        pruned = prune_block(graph, state, chunks, method=method, skip=skip, number=number)
        nnx.update(block, pruned.state)
        masks.append(pruned.masks)
        reports.append(pruned.errors)
        chunks = [run_block(graph, pruned.state, part) for part in chunks]
    return masks, reports


def prune_block(
    graph: Any,
    state: PyTree,
    chunks: Sequence[Any],
    *,
    method: PruneMethod,
    skip: Skip,
    number: int,
    place: Callable[[Any], Array] = jnp.asarray,
) -> PrunedBlock:
    """Prunes the linear layers of one block, given its inputs chunk by chunk.

    Args:
      graph, state: of `nnx.split`; blocks of one graph share what is compiled.
      chunks: its inputs, anywhere. place: brings one of them to the devices.
      method, skip: see `prune_sequential`. number: names the block in an error.

    Raises:
      ValueError, FloatingPointError: see `prune_sequential`.
    """
    found = _collect_all(graph, state, [*chunks], method.needs_hessian, place)
    for path, layer in found.items():
        if not bool(jnp.isfinite(layer.stats.sum_sq).all()):
            raise ValueError(f"block {number}: the inputs of {path!r} are not finite")
    kept: dict[str, Array] = {}

    def prune(path: str, w: Array) -> Array:
        skipped = skip is not None and any(word in path for word in _SKIPPED[skip])
        layer = found.pop(path)  # a Hessian may be larger than the rest of the block
        try:
            new, mask = _prune_layer(w, layer, method, skipped=skipped)
        except (ValueError, FloatingPointError) as error:
            raise type(error)(f"block {number}: {path!r}: {error}") from error
        kept[path] = put_like(mask, w)
        return put_like(new, w)

    inside = frozenset(found)
    pruned = map_selected(prune, state, where=lambda path, leaf: path in inside)
    masks = map_selected(
        lambda path, w: kept[path],
        state,
        where=lambda path, leaf: path in inside,
        otherwise=lambda leaf: jnp.asarray(True),
    )
    totals = [_errors(graph, state, pruned, place(part)) for part in chunks]
    errors = {path: _relative([t[path] for t in totals]) for path in kept}
    return PrunedBlock(pruned, masks, errors)


@functools.partial(jax.jit, static_argnums=0)
def run_block(graph: Any, state: PyTree, x: Array) -> Array:
    """The outputs of a block."""
    return nnx.merge(graph, state)(x)


def put_like(x: Array, w: Array) -> Array:
    """`x` laid out over the devices as `w` is."""
    return x if x.sharding == w.sharding else jax.device_put(x, w.sharding)


def split_chunks(x: Any, chunk: int, *, name: str) -> list[Any]:
    """Cuts sequences into chunks, the last of which may be smaller.

    Raises:
      ValueError: chunk < 1, or nothing to cut.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
    if not x.shape[0] or not x.shape[1]:
        raise ValueError(f"{name} has shape {x.shape}: there are no calibration samples")
    return [x[i : i + chunk] for i in range(0, x.shape[0], chunk)]


def check_skip(method: PruneMethod, skip: Skip) -> None:
    """Refuses an unknown `skip`, or one for a method that skips nothing."""
    if skip is not None and skip not in _SKIPPED:
        raise ValueError(f"skip is {skip!r}; allowed are None, {', '.join(_SKIPPED)}")
    if skip is not None and method.name != "dsnot":
        raise ValueError(f"skip is {skip!r} and the method {method.name}: DSnoT alone skips layers")


def _prune_layer(
    w: Array, layer: Collected, method: PruneMethod, *, skipped: bool
) -> tuple[Array, Array]:
    stats, gram = layer.stats, layer.hessian
    if method.name == "sparsegpt" and method.update_weights:
        assert gram is not None
        return sparsegpt(w, gram.value, **method.amount, block=method.block, damp=method.damp)
    if method.name == "magnitude":
        mask = magnitude_mask(w, **method.amount)
    elif method.name == "wanda":
        mask = wanda_mask(w, stats, **method.amount)
    else:
        start = method.initial if method.name == "dsnot" else "sparsegpt"
        score = _score(start, w, layer, method.damp)
        if method.name == "sparsegpt" or skipped:
            mask = rank_inputs(score, method.sparsity, method.pattern)
        else:
            mask = dsnot_mask(
                w,
                stats._replace(var=stats.var + 1e-6),  # of a constant input it is 0
                score,
                **method.amount,
                max_cycles=method.max_cycles,
                threshold=method.threshold,
                var_power=method.var_power,
                require_same_sign=method.require_same_sign,
            )
    return jnp.where(mask, w, jnp.zeros((), w.dtype)), mask


def _score(name: str, w: Array, layer: Collected, damp: float) -> Array:
    if name == "magnitude":
        return magnitude(w)
    if name == "wanda":
        return wanda_score(w, jnp.sqrt(layer.stats.sum_sq))
    assert layer.hessian is not None
    return sparsegpt_score(w, layer.hessian.value, damp=damp)


def _collect_all(
    graph: Any, state: PyTree, chunks: list[Any], needs_hessian: bool, place: Callable[[Any], Array]
) -> dict[str, Collected]:
    collect = functools.partial(_collect, graph, needs_hessian, state)
    x = jax.ShapeDtypeStruct(chunks[0].shape, chunks[0].dtype)
    first = jax.eval_shape(lambda x: _collect_new(graph, needs_hessian, state, x), x)
    # counts stay Python numbers: they are known here and traced there
    total = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype) if leaf.ndim else 0, first)
    for part in chunks:
        total = collect(place(part), total)
    return total


@functools.partial(jax.jit, static_argnums=(0, 1))
def _collect(
    graph: Any, needs_hessian: bool, state: PyTree, x: Array, before: dict[str, Collected]
) -> dict[str, Collected]:
    """Statistics of all sequences before and these."""

    def merge(old: Collected, new: Collected) -> Collected:
        stats = merge_stats(old.stats, new.stats)
        if old.hessian is None or new.hessian is None:
            return Collected(stats, None)
        return Collected(stats, merge_hessian(old.hessian, new.hessian))

    new = _collect_new(graph, needs_hessian, state, x)
    return {path: merge(before[path], layer) for path, layer in new.items()}


def _collect_new(graph: Any, needs_hessian: bool, state: PyTree, x: Array) -> dict[str, Collected]:
    inputs = capture_inputs(nnx.merge(graph, state), x)[1]
    return {
        path: Collected(activation_stats(value), hessian(value) if needs_hessian else None)
        for path, value in inputs.items()
    }


@functools.partial(jax.jit, static_argnums=0)
def _errors(graph: Any, state: PyTree, pruned: PyTree, x: Array) -> dict[str, tuple[Array, Array]]:
    """Squared norms of what each layer's output loses, and of the dense output without bias."""
    layers = _capture(nnx.merge(graph, state), x)[1]
    dense, sparse = dict(named_leaves(state)), dict(named_leaves(pruned))

    def squares(path: str, value: Array, out: Array) -> tuple[Array, Array]:
        lost = value @ (dense[path] - sparse[path]).astype(value.dtype)
        return jnp.sum(jnp.square(widen(lost))), jnp.sum(jnp.square(widen(out)))

    return {path: squares(path, *layer) for path, layer in layers.items()}


def _relative(parts: list[tuple[Array, Array]]) -> float:
    lost, whole = (float(np.sum([float(p[i]) for p in parts])) for i in (0, 1))
    return lost / whole if whole else 0.0


def _capture(block: nnx.Module, x: Array) -> tuple[Array, dict[str, tuple[Array, Array]]]:
    """A block's output, and of each of its linear layers the input and the output without bias."""
    graph, state = nnx.split(block)
    copy = nnx.merge(graph, state)
    layers: dict[str, tuple[Array, Array]] = {}
    for path, module in list(nnx.iter_modules(copy)):
        if isinstance(module, nnx.Linear):
            parent = functools.reduce(_child, path[:-1], copy)
            name = "/".join(map(str, (*path, "kernel")))
            _set_child(parent, path[-1], _Recorder(module, name, layers))
    return copy(x), layers  # type: ignore[operator]


class _Recorder:
    """Stands in for a layer and keeps what it was given and what it gave."""

    def __init__(self, layer: nnx.Linear, name: str, layers: dict[str, tuple[Array, Array]]):
        self._layer, self._name, self._layers = layer, name, layers

    def __call__(self, x: Array) -> Array:
        out = self._layer(x)
        bias = self._layer.bias
        plain = out if bias is None else out - bias[...].astype(out.dtype)
        self._layers[self._name] = (x, plain)
        return out


def _child(module: Any, key: Any) -> Any:
    return module[key] if isinstance(key, int) else getattr(module, key)


def _set_child(module: Any, key: Any, value: Any) -> None:
    if isinstance(key, int):
        module[key] = value
    else:
        setattr(module, key, value)
