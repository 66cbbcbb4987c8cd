"""Sparsified inputs for the linear layers of any NNX model, with real skipping in decoding.

The product of a chosen `nnx.Linear` is replaced, as Flax allows; the parameters stay what they
were. Calibration runs the model with products that count their scores instead.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from sparsejax.activations.wina import (
    check_share,
    column_norms,
    empirical_icdf,
    input_scores,
    kept_inputs,
    prefill_positions,
    product_of_kept,
)
from sparsejax.core.selection import Where, default_where, named_leaves, selected_paths
from sparsejax.core.topk import exact_topk_mask

Criterion = Literal["wina", "teal"]
PerLayer: TypeAlias = int | float | Sequence[float] | np.ndarray | Array | Mapping[str, Any]
"""A number for every chosen layer, or a mapping from a kernel's path (or a regular expression
searched in it; of several the first) to a number, or to one for each of stacked layers."""

_FINITE = 0x7C00  # float16 numbers that are finite and not negative, by their bits


class InputSetting(nnx.Variable):
    """What a sparsified layer knows beside its parameters: norms, and numbers or thresholds."""


class SparseInputs(nnx.Module):
    """A model with sparsified inputs, called (or decoded) as the model is; see `sparse_inputs`.

    Variables that a call writes, such as batch statistics, are not kept: it is for inference.

    Attributes:
      model: the model with its products replaced, which has the parameters' paths. Called by
        itself it multiplies by zeros and skips nothing.
      gather: whether a single token reads the kept rows alone.
    """

    def __init__(self, model: nnx.Module, *, gather: bool):
        self.model = model
        self.gather = gather

    @property
    def config(self) -> Any:
        """That of the model, which generation asks for."""
        return self.model.config  # type: ignore[attr-defined]

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """What the model gives; differentiated as it is, the masks being constant."""
        return self._with_rows()(*inputs, **options)

    def decode(self, *inputs: Any, **options: Any) -> Any:
        """The model's own `decode`, which continues a cache."""
        return self._with_rows().decode(*inputs, **options)

    def _with_rows(self) -> Any:
        """A copy whose products know all rows of their kernels, those of stacked layers in one.

        A loop over stacked layers hands each layer its slice, which costs the copy of a whole
        kernel; what a closure holds is not sliced.
        """
        copy: Any = nnx.merge(*nnx.split(self.model))
        if self.gather:
            for layer in linear_layers(copy).values():
                if isinstance(layer.dot_general, _SparseProduct):
                    kernel = layer.kernel[...]
                    layer.dot_general.rows = _Rows(kernel.reshape(-1, kernel.shape[-1]))
        return copy


def sparse_inputs(
    model: nnx.Module,
    sparsity: PerLayer | None = None,
    *,
    thresholds: PerLayer | None = None,
    criterion: Criterion = "wina",
    where: Where = None,
    norms: Where = None,
    fraction: int | float = 1.0,
    gather: bool = True,
) -> SparseInputs:
    """A model whose chosen linear layers see the inputs with the highest scores alone.

    The result is called with the model's arguments, is itself an NNX model (`nnx.split`, `jit`,
    `vmap`) and can be handed to `generate`. Its state has, beside the model's, the norms and the
    numbers of kept inputs (or the thresholds), one for each of stacked layers: other thresholds, or
    other numbers with the same maximum, do not compile again. Masks are not differentiated.

    Args:
      model: not changed; `nnx.merge(graph, params)` where that is what you have.
      sparsity: of each layer, in [0, 1]: `kept_inputs(in, sparsity)` are kept, or
      thresholds: of each layer: scores above it are kept; see `input_thresholds`. One of the two.
      criterion: "wina" scores by `|x| * c`, "teal" by `|x|`.
      where: chooses among the kernels of `nnx.Linear` layers by their path, see `selected_paths`;
        None: the default there without the classifier (`head/kernel` at the end of a path).
      norms: which of the chosen have norms, the others c = 1; None: all. The published code has
        `"(k|gate)_proj"`.
      fraction: of the positions (the axis before the last) that are sparsified, at the end, see
        `prefill_positions`; 0.99 in the published code.
      gather: single tokens read the kept rows of the kernels, as they are stored, and no others.
        For kernels that are spread over devices False may be faster.

    Raises:
      ValueError: not exactly one of sparsity and thresholds, or one of them with a number out of
        range, of another shape than the stacked layers, for a layer that is not chosen, or missing
        for one that is; an unknown criterion, norms for "teal", fraction outside (0, 1], or where
        or norms that chooses nothing.

    Source: WINA (2025, arXiv 2505.19427); TEAL (2024, arXiv 2408.14690).

    >>> layer = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    >>> sparse = sparse_inputs(layer, 0.75)
    >>> x = jnp.arange(8.0)
    >>> sparse(x).shape, float(jnp.abs(sparse(x) - layer(x)).max()) > 0
    ((4,), True)
    """
    if (sparsity is None) == (thresholds is None):
        given = "neither" if sparsity is None else "both"
        raise ValueError(f"exactly one of sparsity and thresholds is needed, {given} given")
    prefill_positions(1, fraction=fraction)
    layers = chosen_kernels(model, where)
    c = _norms(layers, criterion, norms)
    name, setting = ("sparsity", sparsity) if thresholds is None else ("thresholds", thresholds)
    numbers = per_layer(name, setting, {path: _stack(w) for path, w in layers.items()})
    copy = nnx.clone(model)
    for path, layer in linear_layers(copy).items():
        if path not in layers:
            continue
        stack, width = _stack(layers[path]), layers[path].shape[-2]
        capacity, limit = width, jnp.asarray(numbers[path])
        if thresholds is None:
            kept = [kept_inputs(width, float(s)) for s in numbers[path].ravel()]
            capacity = max(1, *kept)
            limit = jnp.asarray(kept, jnp.int32).reshape(stack)
        elif not (numbers[path] >= 0).all():
            raise ValueError(f"thresholds has {numbers[path].min()} for {path!r}; at least 0")
        product = _SparseProduct(layer.dot_general, c[path], limit, capacity, fraction)
        layer.dot_general = nnx.data(product)
    return SparseInputs(copy, gather=gather)


def input_histograms(
    model: nnx.Module,
    *inputs: Any,
    criterion: Criterion = "wina",
    where: Where = None,
    norms: Where = None,
    **options: Any,
) -> dict[str, Float[Array, "*stack bins"]]:
    """How often each score occurs among the inputs of the chosen layers, in `model(*inputs)`.

    A bin for each float16 number that is not negative, to which scores are rounded, and one for all
    that is not finite: the size is fixed, and thresholds are those of the full list of scores. Run
    it under `jit`, and add the results of batches with `jax.tree.map(jnp.add, ...)`.

    The counts come out of a backward pass, because a loop over stacked layers lets nothing else
    out: the model's output must depend on each layer differentiably.

    Args:
      *inputs, **options: what the model is called with.
      criterion, where, norms: as `sparse_inputs` gets them.

    Returns:
      By the path of the kernel, `[*stack, bins]`, float32 (good to 6e-8 above 2^24).

    Raises:
      ValueError: as `sparse_inputs`, or an output without floating-point numbers.

    Source: WINA (2025, arXiv 2505.19427), code of the calibration.

    >>> counts = input_histograms(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((5, 3)))
    >>> {path: int(n.sum()) for path, n in counts.items()}
    {'kernel': 15}
    """
    layers = chosen_kernels(model, where)
    c = _norms(layers, criterion, norms)
    copy = nnx.clone(model)
    for path, layer in linear_layers(copy).items():
        if path in layers:
            counts = jnp.zeros((*_stack(layers[path]), _FINITE + 1), jnp.float32)
            layer.dot_general = nnx.data(_CountingProduct(layer.dot_general, c[path], counts))
    graph, counts, rest = nnx.split(copy, _Counts, ...)

    def total(counts: Any) -> Array:
        run: Any = nnx.merge(graph, counts, rest)
        parts = [
            jnp.sum(leaf.astype(jnp.float32))
            for leaf in jax.tree.leaves(run(*inputs, **options))
            if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        ]
        if not parts:
            raise ValueError("the model's output holds no floating-point numbers")
        return sum(parts[1:], start=parts[0])

    found = dict(named_leaves(jax.grad(total)(counts)))
    return {path: found[f"{path[: -len('kernel')]}dot_general/counts"] for path in layers}


def input_thresholds(
    histograms: Mapping[str, Float[Array, "*stack bins"]], sparsity: PerLayer
) -> dict[str, Float[np.ndarray, "*stack"]]:
    """Thresholds that drop a share of the counted scores, on the host; 0 for sparsity 0.

    Args:
      histograms: the sum of those of `input_histograms`. sparsity: of each layer.

    Raises:
      ValueError: sparsity as in `sparse_inputs`, or scores that are not finite (naming the layer).

    Source: WINA (2025, arXiv 2505.19427), code of the calibration; see `empirical_icdf`.

    >>> layer = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    >>> counts = input_histograms(layer, jnp.asarray([1.0, -2.0, 3.0, 4.0]), criterion="teal")
    >>> input_thresholds(counts, 0.5)
    {'kernel': array(2.)}
    """
    wide = {path: np.asarray(counts, np.float64) for path, counts in histograms.items()}
    shares = per_layer("sparsity", sparsity, {path: n.shape[:-1] for path, n in wide.items()})
    scores = np.arange(_FINITE, dtype=np.uint16).view(np.float16)
    thresholds = {}
    for path, counts in wide.items():
        if counts[..., -1].any():
            raise ValueError(f"the inputs of {path!r} are not finite, or its norms are not")
        found = np.zeros(counts.shape[:-1])
        for at in np.ndindex(found.shape):
            share = float(shares[path][at])
            check_share("sparsity", share)
            seen = np.flatnonzero(counts[at])
            if share:
                found[at] = empirical_icdf(scores[seen], share, counts=counts[at][seen])
        thresholds[path] = found
    return thresholds


class _Rows:
    """The rows of a kernel, hidden from Flax so that no transformation slices them."""

    def __init__(self, kernel: Float[Array, "rows o"]):
        self.kernel = kernel


class _SparseProduct(nnx.Module):
    """Takes the place of `lax.dot_general` in a layer."""

    def __init__(self, product: Any, c: Array, limit: Array, capacity: int, fraction: float):
        stack = limit.shape
        self.product, self.capacity, self.fraction = product, capacity, fraction
        self.c, self.limit = InputSetting(c), InputSetting(limit)
        index = np.arange(limit.size, dtype=np.int32).reshape(stack)
        self.index = InputSetting(jnp.asarray(index))
        self.rows: _Rows | None = None

    def __call__(self, x: Array, kernel: Array, dimension_numbers: Any, **options: Any) -> Array:
        _check_contraction(x, kernel, dimension_numbers)
        scores, limit = input_scores(x, self.c[...]), self.limit[...]
        if jnp.issubdtype(limit.dtype, jnp.integer):
            kept = exact_topk_mask(scores, limit)
        else:
            kept = scores > limit.astype(scores.dtype)
        one_token = x.size == x.shape[-1] and options.get("out_sharding") is None
        if self.rows is not None and one_token:
            first: Int[Array, ""] = self.index[...] * kernel.shape[0]
            x = x.astype(options.get("preferred_element_type") or x.dtype)
            y = product_of_kept(
                x.reshape(-1), self.rows.kernel, kept.reshape(-1), self.capacity, first=first
            )
            return y.reshape(*x.shape[:-1], kernel.shape[1])
        if self.fraction < 1 and x.ndim > 1:
            kept |= ~prefill_positions(x.shape[-2], fraction=self.fraction)[:, None]
        x = jnp.where(kept, x, jnp.zeros((), x.dtype))
        return self.product(x, kernel, dimension_numbers, **options)


class _Counts(nnx.Variable):
    """Zeros whose gradient is a histogram."""


class _CountingProduct(nnx.Module):
    """The product of a layer, which lets its scores out through the gradient of `counts`."""

    def __init__(self, product: Any, c: Array, counts: Array):
        self.product, self.c, self.counts = product, InputSetting(c), _Counts(counts)

    def __call__(self, x: Array, kernel: Array, dimension_numbers: Any, **options: Any) -> Array:
        _check_contraction(x, kernel, dimension_numbers)
        x = _counted(x, input_scores(x, self.c[...]), self.counts[...])
        return self.product(x, kernel, dimension_numbers, **options)


@jax.custom_vjp
def _counted(x: Array, scores: Array, counts: Array) -> Array:
    return x


def _counted_backward(scores: Array, dx: Array) -> tuple[Array, None, Array]:
    largest = jnp.asarray(jnp.finfo(jnp.float16).max, scores.dtype)
    rounded = jnp.minimum(scores, largest).astype(jnp.float16)
    bits = lax.bitcast_convert_type(rounded, jnp.uint16).astype(jnp.int32)
    bins = jnp.where(jnp.isfinite(scores), bits, _FINITE).reshape(-1)
    counts = jnp.zeros(_FINITE + 1, jnp.int32).at[bins].add(1)
    return dx, None, counts.astype(jnp.float32)


_counted.defvjp(lambda x, scores, counts: (x, scores), _counted_backward)


def _check_contraction(x: Array, kernel: Array, dimension_numbers: Any) -> None:
    (left, right), batch = dimension_numbers
    contracted = tuple(left), tuple(right), *map(tuple, batch)
    if kernel.ndim != 2 or contracted != ((x.ndim - 1,), (0,), (), ()):
        raise ValueError(
            f"dimension_numbers is {dimension_numbers} for shapes {x.shape} and {kernel.shape}; "
            "the last axis of x is contracted with the first of two"
        )


def linear_layers(model: nnx.Module) -> dict[str, nnx.Linear]:
    """Every `nnx.Linear`, by the path of its kernel.

    >>> list(linear_layers(nnx.Linear(2, 2, rngs=nnx.Rngs(0))))
    ['kernel']
    """
    return {
        "/".join(map(str, (*path, "kernel"))): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Linear)
    }


def chosen_kernels(model: nnx.Module, where: Where) -> dict[str, Float[Array, "*stack i o"]]:
    """The kernels of the layers that `where` chooses, as `sparse_inputs` takes it.

    Raises:
      ValueError: where chooses nothing.

    >>> chosen_kernels(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), None)["kernel"].shape
    (2, 3)
    """
    kernels = {path: layer.kernel[...] for path, layer in linear_layers(model).items()}

    def standard(path: str, kernel: Array) -> bool:
        return default_where(path, kernel) and not path.endswith("head/kernel")

    return {path: kernels[path] for path in selected_paths(kernels, where or standard)}


def _stack(kernel: Array) -> tuple[int, ...]:
    return kernel.shape[:-2]


def _norms(kernels: dict[str, Array], criterion: str, norms: Where) -> dict[str, Array]:
    """Norms of every chosen kernel, or a scalar 1 for each of its stacked layers."""
    if criterion not in ("wina", "teal"):
        raise ValueError(f"criterion is {criterion!r}; allowed are 'wina' and 'teal'")
    if criterion == "teal" and norms is not None:
        raise ValueError(f"norms is {norms!r}; the criterion 'teal' has none")
    ones = {path: jnp.ones(_stack(w), jnp.float32) for path, w in kernels.items()}
    if criterion == "teal":
        return ones
    found = column_norms(kernels, where=(lambda path, w: True) if norms is None else norms)
    return {path: c if c.ndim else ones[path] for path, c in found.items()}


def per_layer(
    name: str, setting: PerLayer | None, stacks: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """The numbers of every layer, in the shape of its stack.

    Args:
      name: of the setting, for errors. stacks: the shape of the stack of every layer, by its path.

    Raises:
      ValueError: a number of another shape, missing for a layer, or for no layer.

    >>> per_layer("sparsity", {"up": 0.5}, {"ffn/up_proj/kernel": (2,)})
    {'ffn/up_proj/kernel': array([0.5, 0.5])}
    """
    if not isinstance(setting, Mapping):
        setting = {"": setting}
    used, numbers = set(), {}
    for path, stack in stacks.items():
        keys = [path] if path in setting else [key for key in setting if re.search(key, path)]
        if not keys:
            raise ValueError(f"{name} has nothing for layer {path!r}; it has {', '.join(setting)}")
        used.add(keys[0])
        given = np.asarray(setting[keys[0]], np.float64)
        if given.shape not in ((), stack):
            raise ValueError(
                f"{name} has shape {given.shape} for {path!r}; it must be one number or {stack}"
            )
        numbers[path] = np.broadcast_to(given, stack)
    unused = [key for key in setting if key not in used]
    if unused:
        raise ValueError(f"{name} has {', '.join(unused)}, which is no chosen layer")
    return numbers
