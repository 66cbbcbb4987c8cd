"""Activation sparsity of every layer of a Flax NNX model, by one call.

What a feed-forward network's last projection reads are its activations, gated or not, so modules
are watched at their input. Counts leave loops over stacked blocks through references that the
function makes and reads itself (`jax.new_ref`): from outside it is pure, and blocks that run under
`lax.scan`, `nnx.scan`, `jax.checkpoint` or `jit` need no change.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ref import freeze, new_ref
from jaxtyping import Array, Bool

from sparsejax.activations.topk_mlp import count_fired, stats_of_counts
from sparsejax.core.dtypes import widen
from sparsejax.core.selection import Where, is_array, selected_paths

_Record = Callable[[Array, Any], None]
_Path = tuple[Any, ...]


class _Seen(NamedTuple):
    """What the abstract run sees at a place: width, whether in a loop over layers, and dtype."""

    width: int
    stacked: bool
    dtype: Any


def measure_activations(
    model: nnx.Module,
    *inputs: Any,
    where: Where = r"down_proj$",
    threshold: float | None = None,
    valid: Bool[Array, "*b"] | None = None,
    **options: Any,
) -> dict[str, dict[str, Array]]:
    """Runs `model(*inputs, **options)` and returns the `activation_stats` of what it watches.

    Call it under `jit`, with the state as an argument, where a model runs often. Nothing is
    differentiated, and the model stays as it is. For more data than one batch, add up the entries
    by `merge_activation_stats`.

    Args:
      model: any NNX module that is called.
      *inputs, **options: for the call.
      where: chooses by path, see `selected_paths`: a module, watched at its first input, or a
        function that a module has as an attribute (`self.act = jax.nn.relu`), watched at its
        output. The default is the last projection of the feed-forward networks of
        `sparsejax.models`.
      threshold: see `activation_stats`; None counts positive entries.
      valid: the tokens that are no padding; of the shape of the activations without their last
        axis. None for all.

    Returns:
      `{path: statistics}` of what was called. Blocks that are stacked have one path and statistics
      with their axes in front: `fired` `[layers, f]`, `nonzero_fraction` `[layers]`. Of something
      called several times all calls are counted together.

    Which modules are stacked is read from the kernels of Flax's layers in them, or else in the
    nearest module around them that has some.

    Raises:
      TypeError: what is watched is not floating point.
      ValueError: `where` chooses nothing, or nothing that is called; what is watched has not the
        shape of `valid`, or another width in another call; a negative threshold; or it runs under a
        `vmap` inside the model (a `vmap` of this whole function is fine).

    Source: Lazy Neuron (2023, arXiv 2210.06313), section on the measured object.

    >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu,
    ...                        nnx.Linear(8, 4, rngs=nnx.Rngs(1)))
    >>> stats = measure_activations(model, jnp.ones((5, 4)), where=r"layers/2$")
    >>> stats["layers/2"]["fired"].shape, int(stats["layers/2"]["tokens"])
    ((8,), 5)
    """
    graph, state = nnx.split(model)
    places = _places(model)
    numbers = {path: places[path] for path in selected_paths(places, where)}
    leaves, structure = jax.tree.flatten((inputs, options))
    arrays = [leaf for leaf in leaves if is_array(leaf)]

    def run(state: Any, arrays: list[Array], record: Callable[[str], _Record]) -> None:
        # made here, for its state may be written to under this trace alone
        copy: Any = nnx.merge(graph, jax.tree.map(_constant, state))
        _watch(copy, numbers, record)
        given = iter(arrays)
        merged = [_constant(next(given) if is_array(leaf) else leaf) for leaf in leaves]
        args, keywords = jax.tree.unflatten(structure, merged)
        copy(*args, **keywords)

    seen: dict[str, _Seen] = {}

    def look(path: str) -> _Record:
        def note(index: Array, a: Any) -> None:
            _check(path, a, valid)
            now = _Seen(a.shape[-1], index.ndim == 0, widen(a).dtype)
            if seen.setdefault(path, now) != now:
                first = seen[path]
                raise ValueError(
                    f"{path!r} is called with {first.width} {first.dtype} and {now.width} "
                    f"{now.dtype} entries; they must be equal to be counted together"
                )

        return note

    jax.eval_shape(lambda state, arrays: run(state, arrays, look), state, arrays)
    if not seen:
        raise ValueError(f"the call ran nothing that where chooses: {', '.join([*numbers][:8])}")
    copies = {p: numbers[p].size if seen[p].stacked else 1 for p in seen}
    fired = {p: new_ref(jnp.zeros((copies[p], seen[p].width), jnp.int32)) for p in seen}
    tokens = {p: new_ref(jnp.zeros(copies[p], jnp.int32)) for p in seen}

    def count(path: str) -> _Record:
        def add(index: Array, a: Any) -> None:
            layer = index if index.ndim == 0 else 0
            found = count_fired(a, valid, threshold)
            try:
                for ref, new in zip((fired[path], tokens[path]), found):
                    ref[layer] = ref[layer] + new
            except Exception as error:  # of no kind of its own
                raise ValueError(
                    f"{path!r} runs under a vmap inside the model, which cannot be watched: "
                    "run it by scan, or vmap measure_activations"
                ) from error

        return add

    run(state, arrays, count)
    result = {}
    for path, what in seen.items():
        shape = numbers[path].shape if what.stacked else ()
        counts = (freeze(refs[path]) for refs in (fired, tokens))
        by_layer = [c.reshape(*shape, *c.shape[1:]) for c in counts]
        result[path] = stats_of_counts(*by_layer, dtype=what.dtype)
    return result


def _constant(leaf: Any) -> Any:
    """Without derivatives: references do not take part in them."""
    inexact = is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)
    return lax.stop_gradient(leaf) if inexact else leaf


def _check(path: str, a: Any, valid: Array | None) -> None:
    if not is_array(a) or not jnp.issubdtype(a.dtype, jnp.floating) or not a.ndim:
        given = f"{a.dtype}{list(a.shape)}" if is_array(a) else type(a).__name__
        raise TypeError(f"{path!r} has {given} to watch; it must be floating point, [..., f]")
    if valid is not None and valid.shape != a.shape[:-1]:
        raise ValueError(f"valid has shape {valid.shape}; {path!r} has tokens {a.shape[:-1]}")


def _places(model: nnx.Module) -> dict[str, Array]:
    """Modules and functions that may be watched, with the numbers of their stacked copies."""
    modules: list[tuple[_Path, Any]] = list(nnx.iter_modules(model))
    leading = [
        (path, module.kernel.get_value().shape[:-own])
        for path, module in modules
        if (own := _own_axes(module))
    ]

    def numbers(path: _Path) -> Array:
        shape: tuple[int, ...] = ()
        for depth in range(len(path), -1, -1):
            inside = [stack for p, stack in leading if p[:depth] == path[:depth]]
            if inside:
                common = itertools.takewhile(lambda sizes: len(set(sizes)) == 1, zip(*inside))
                shape = tuple(sizes[0] for sizes in common)
                break
        return jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(shape)

    places = {_name(path): numbers(path) for path, _ in modules}
    for path, module in modules:
        places |= {_name((*path, key)): numbers(path) for key in _functions(module)}
    return places


def _own_axes(module: nnx.Module) -> int:
    """Axes of the kernel of one layer of Flax; 0 for other modules."""
    if isinstance(module, nnx.Linear):
        return 2
    if isinstance(module, nnx.LinearGeneral):
        return len(module.in_features) + len(module.out_features)
    if isinstance(module, nnx.Conv | nnx.ConvTranspose | nnx.Einsum):
        return len(module.kernel_shape)
    return 0


def _functions(module: nnx.Module) -> list[str]:
    """Names of the functions that a module of the model's author has as attributes."""
    if type(module).__module__.startswith("flax."):
        return []
    return [
        key
        for key, value in vars(module).items()
        if callable(value) and not isinstance(value, nnx.Module | nnx.Variable)
    ]


def _name(path: _Path) -> str:
    return "/".join(map(str, path))


def _watch(
    model: nnx.Module, numbers: Mapping[str, Array], record: Callable[[str], _Record]
) -> None:
    """Makes modules and functions of a model record what they are given or give."""
    modules: list[tuple[_Path, Any]] = list(nnx.iter_modules(model))
    for path, module in modules:
        for key in _functions(module):
            name = _name((*path, key))
            if name in numbers:
                watched = _WatchedFunction(getattr(module, key), numbers[name], record(name))
                setattr(module, key, nnx.data(watched))
        name = _name(path)
        if name in numbers:
            # of another class instead of in another module, so that a module that the model has at
            # several places, or is, is watched as well
            object.__setattr__(module, "__class__", _watched_class(type(module)))
            # a Param, to go through the loops that the kernel goes through
            module.watch_number = nnx.Param(numbers[name])
            module.watch_record = record(name)


@functools.cache
def _watched_class(base: type[nnx.Module]) -> type[nnx.Module]:
    class WatchedModule(base):
        watch_number: nnx.Param
        watch_record: _Record

        def __call__(self, *args: Any, **options: Any) -> Any:
            first = args[0] if args else next(iter(options.values()), None)
            self.watch_record(self.watch_number[...], first)
            return super().__call__(*args, **options)

    return WatchedModule


class _WatchedFunction(nnx.Module):
    """Stands in for a function: a module, for only those have a number in a stack."""

    def __init__(self, function: Callable[..., Any], number: Array, record: _Record):
        self.function = function
        self.watch_number = nnx.Param(number)
        self.watch_record = record

    def __call__(self, *args: Any, **options: Any) -> Any:
        out = self.function(*args, **options)
        self.watch_record(self.watch_number[...], out)
        return out
