"""The lazy neuron phenomenon: ReLU MLPs, their top-k form, and how sparse their activations are.

A ReLU MLP inside a trained transformer fires a few percent of its neurons for a token, although
nothing asks for it. The top-k transformer keeps the k largest of a token's activations alone.
"""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from sparsejax.core.dtypes import widen
from sparsejax.core.statistical import statistical_topk
from sparsejax.core.topk import exact_topk_mask

Selector = Literal["exact", "approx", "statistical"]
_SELECTORS = ("exact", "approx", "statistical")


def top_k_activation(
    a: Float[Array, "*b f"], k: int, *, selector: Selector = "exact", recall: float = 0.95
) -> Float[Array, "*b f"]:
    """Keeps the k largest activations of every token; the others are 0.

    Args:
      a: activations after the nonlinearity, so that what is negative is never kept. Differentiated:
        the gradient passes where an entry is kept, the choice has none.
      k: from 1 to f; f returns `a`. Zeros among the k largest stay zeros: of a ReLU's activations
        `min(k, positives)` are not 0.
      selector: "exact", k of every token, among equals the lowest index; "approx", what
        `jax.lax.approx_max_k` finds, made for TPUs; "statistical", those above the mean and normal
        quantile of `statistical_topk`, whose number varies: activations of a ReLU are not normal.
      recall: share of the k largest that "approx" shall find, in (0, 1].

    Raises:
      ValueError: k outside [1, f], an unknown selector, or recall outside (0, 1].

    Source: Lazy Neuron (2023, arXiv 2210.06313), section on top-k transformers.

    >>> top_k_activation(jnp.asarray([3.0, 0.0, 5.0, 5.0, 1.0]), 2)
    Array([0., 0., 5., 5., 0.], dtype=float32)
    """
    f = a.shape[-1]
    if not 1 <= k <= f:
        raise ValueError(f"k is {k}; it must be in [1, {f}]")
    if selector not in _SELECTORS:
        raise ValueError(f"selector is {selector!r}; allowed are {', '.join(_SELECTORS)}")
    if not 0 < recall <= 1:
        raise ValueError(f"recall is {recall}; it must be in (0, 1]")
    if k == f:
        return a
    fixed = lax.stop_gradient(a)
    if selector == "exact":
        keep = exact_topk_mask(fixed, k)
    elif selector == "approx":
        _, idx = lax.approx_max_k(fixed, k, recall_target=recall)
        keep = jnp.put_along_axis(jnp.zeros(a.shape, bool), idx, True, axis=-1, inplace=False)
    else:
        keep = statistical_topk(fixed, k, mode="mask")
    return jnp.where(keep, a, jnp.zeros((), a.dtype))


def relu_mlp(
    params: Mapping[str, Array],
    x: Float[Array, "*b d"],
    *,
    k: int | None = None,
    selector: Selector = "exact",
) -> tuple[Float[Array, "*b o"], dict[str, Float[Array, "*b f"]]]:
    """`topk(relu(x K)) V`, with what it computes on the way.

    Args:
      params: `K` `[d, f]` and `V` `[f, o]`, in a transformer o = d, and optionally the biases `bK`
        `[f]` and `bV` `[o]`. Differentiated.
      x: tokens, in the dtype of the parameters. Differentiated.
      k: activations that a token keeps; None or f is the plain ReLU MLP.
      selector: see `top_k_activation`.

    Returns:
      The output, and `pre_activation` and `activation` (after top-k).

    Raises:
      ValueError: as `top_k_activation`, or leaves of other names.

    Source: Lazy Neuron, section on top-k transformers.

    >>> y, inside = relu_mlp({"K": jnp.eye(3), "V": jnp.eye(3)}, jnp.asarray([2.0, -1.0, 1.0]), k=1)
    >>> y
    Array([2., 0., 0.], dtype=float32)
    """
    if not {"K", "V"} <= set(params) <= {"K", "V", "bK", "bV"}:
        raise ValueError(f"params has {sorted(params)}; it must have K and V, and may have bK, bV")
    h = x @ params["K"]
    if "bK" in params:
        h = h + params["bK"]
    a = jax.nn.relu(h)
    a = top_k_activation(a, a.shape[-1] if k is None else k, selector=selector)
    y = a @ params["V"]
    if "bV" in params:
        y = y + params["bV"]
    return y, {"pre_activation": h, "activation": a}


def activation_stats(
    a: Float[Array, "*b f"],
    *,
    where: Bool[Array, "*b"] | None = None,
    threshold: float | None = None,
) -> dict[str, Array]:
    """How often neurons fire. Nothing is differentiated.

    Args:
      a: activations.
      where: the tokens that are no padding; None for all.
      threshold: None counts `a > 0`, which tells active from inactive after a ReLU; a number, at
        least 0, counts `|a| > threshold`, for activations that are never exactly 0.

    Returns:
      `fired` `[f]`, on how many tokens each neuron fires, and `tokens`, how many there are, both
      int32 and to be summed by `merge_activation_stats` or `psum`; and what follows from them, in
      float32 (float64 for such an a): `neuron_rate` `[f]`, fired / tokens; `nonzero_fraction`, its
      mean; `count`, its sum: active neurons of a token. Without tokens all are 0.

    Raises:
      ValueError: a negative threshold.

    Source: Lazy Neuron, section on the measured object; percent nonzero is 100 times the fraction.

    >>> stats = activation_stats(jnp.asarray([[1.0, 0.0], [2.0, -1.0]]))
    >>> stats["fired"], stats["nonzero_fraction"]
    (Array([2, 0], dtype=int32), Array(0.5, dtype=float32))
    """
    return stats_of_counts(*count_fired(a, where, threshold), dtype=widen(a).dtype)


def merge_activation_stats(*stats: Mapping[str, Array]) -> dict[str, Array]:
    """The statistics of all tokens together, of a layer or of layers stacked in front.

    Args:
      *stats: at least one, from `activation_stats` or of a layer of `measure_activations`. Counts
        are int32: exact up to 2^31 - 1 tokens.

    Raises:
      ValueError: none, or of layers of different shape.

    Source: Lazy Neuron, section on the measured object.

    >>> one, two = (activation_stats(jnp.asarray([[1.0, v]])) for v in (-1.0, 1.0))
    >>> merge_activation_stats(one, two)["neuron_rate"]
    Array([1. , 0.5], dtype=float32)
    """
    if not stats:
        raise ValueError("stats is empty: there is nothing to merge")
    shapes = {part["fired"].shape for part in stats}
    if len(shapes) > 1:
        raise ValueError(f"stats are of layers of shapes {sorted(shapes)}; they must be equal")
    dtypes = [part["neuron_rate"].dtype for part in stats]
    fired, tokens = (sum((part[n] for part in stats[1:]), stats[0][n]) for n in ("fired", "tokens"))
    return stats_of_counts(fired, tokens, dtype=max(dtypes, key=lambda dtype: dtype.itemsize))


def count_fired(
    a: Float[Array, "*b f"], where: Bool[Array, "*b"] | None, threshold: float | None
) -> tuple[Int[Array, "f"], Int[Array, ""]]:
    """`fired` and `tokens` of `activation_stats`, which has the arguments and errors.

    >>> count_fired(jnp.asarray([[1.0, 0.0], [2.0, -1.0]]), None, 0.5)
    (Array([2, 1], dtype=int32), Array(2, dtype=int32))
    """
    if threshold is not None and not threshold >= 0:
        raise ValueError(f"threshold is {threshold}; it must not be negative")
    a = lax.stop_gradient(a)
    on = a > 0 if threshold is None else widen(jnp.abs(a)) > threshold
    axes = tuple(range(a.ndim - 1))
    if where is None:
        tokens = jnp.full((), a.size // max(a.shape[-1], 1), jnp.int32)
    else:
        on = on & where[..., None]
        tokens = jnp.sum(where, dtype=jnp.int32)
    return jnp.sum(on, axis=axes, dtype=jnp.int32), tokens


def stats_of_counts(
    fired: Int[Array, "*l f"], tokens: Int[Array, "*l"], *, dtype: jnp.dtype
) -> dict[str, Array]:
    """The dictionary of `activation_stats` from its two counts, for layers in front as well.

    >>> fired, tokens = jnp.asarray([[2, 0]]), jnp.asarray([2])
    >>> stats_of_counts(fired, tokens, dtype=jnp.dtype("float32"))["count"]
    Array([1.], dtype=float32)
    """
    rate = fired.astype(dtype) / jnp.maximum(tokens, 1).astype(dtype)[..., None]
    return {
        "fired": fired,
        "tokens": tokens,
        "nonzero_fraction": jnp.mean(rate, axis=-1),
        "neuron_rate": rate,
        "count": jnp.sum(rate, axis=-1),
    }
