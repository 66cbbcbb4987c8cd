"""CoreMatching: core neurons and core tokens of a prompt, for a model that sees images.

During pre-fill the neurons that fire most over the prompt are its core neurons, and the image
tokens whose active neurons overlap most with a reference set are its core tokens. Later layers and
the cache hold core tokens alone, decoding reads the core neurons alone. Nothing is trained, and no
selection is differentiated. Everything is of one sample: batch by `vmap`.
"""

import fractions
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from sparsejax.core.dtypes import widen
from sparsejax.core.selection import is_concrete
from sparsejax.core.statistical import compact_indices
from sparsejax.core.topk import exact_topk_mask

_LEAVES = ("gate", "up", "down")
_QUESTION_END = 5  # from the end: the template's closing words in the released code


def core_neurons(
    a: Float[Array, "m f"],
    *,
    rho: float = 0.2,
    beta: float = 0.4,
    where: Bool[Array, "m"] | None = None,
) -> tuple[Int[Array, "n_core"], Int[Array, "f"]]:
    """The neurons that are among the largest of a token most often.

    A token's largest are its first `lim`, where lim is rho times the mean number of positive
    entries of a token, rounded down and at least 1: one limit for all tokens.

    Args:
      a: activations of the m tokens of a prompt, `silu(gate) * up`.
      rho: share of the mean positive count, in (0, 1]; read as the decimal that it prints as, and
        multiplied in integers.
      beta: share of the neurons that are core, in (0, 1].
      where: the tokens that are no padding; None for all.

    Returns:
      `idx`, `int(beta * f)` neurons with the largest counts, ascending, int32, among equals the
      lowest index; and `counts`, of how many tokens each neuron is among the largest. A neuron of
      `idx` that never is has `counts[idx] == 0`.

    Raises:
      ValueError: rho or beta outside (0, 1], f below 1/beta, no tokens, or sizes whose products do
        not fit 31 bits.

    Source: CoreMatching (2025, arXiv 2505.19235), section on core neurons; the code of CoreInfer.

    >>> a = jnp.asarray([[3.0, 2.0, -1.0, 1.0], [0.5, 4.0, -2.0, 1.0]])
    >>> core_neurons(a, rho=0.5, beta=0.5)
    (Array([0, 1], dtype=int32), Array([1, 1, 0, 0], dtype=int32))
    """
    for name, value in (("rho", rho), ("beta", beta)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} is {value}; it must be in (0, 1]")
    m, f = a.shape
    n_core = int(beta * f)
    if n_core < 1:
        raise ValueError(f"a has {f} neurons; beta = {beta} of them is none")
    if m < 1:
        raise ValueError(f"a has shape {a.shape}: there are no tokens")
    share = fractions.Fraction(str(float(rho))).limit_denominator(10_000)
    top, bottom = share.numerator, share.denominator
    if max(m * f, m * bottom, f * top) >= 2**31:
        raise ValueError(
            f"a has shape {a.shape}; counts are int32, so that m * f, m * {bottom} and f * {top} "
            "must be below 2^31"
        )
    a = lax.stop_gradient(a)
    used = jnp.ones(m, bool) if where is None else where
    tokens = jnp.maximum(jnp.sum(used, dtype=jnp.int32), 1)
    positive = jnp.sum((a > 0) & used[:, None], dtype=jnp.int32)
    # floor(top * positive / (bottom * tokens)) from parts that stay below 2^31
    whole, rest = positive // tokens, positive % tokens
    limit, over = (top * whole) // bottom, (top * whole) % bottom
    limit += (top * rest >= (bottom - over) * tokens).astype(jnp.int32)
    largest = exact_topk_mask(a, jnp.maximum(limit, 1)) & used[:, None]
    counts = jnp.sum(largest, axis=0, dtype=jnp.int32)
    return compact_indices(exact_topk_mask(_in_order(counts), n_core), n_core)[0], counts


def neuron_overlap(a: Float[Array, "m f"], reference: Bool[Array, "f"]) -> Int[Array, "m"]:
    """How many neurons of a set each token activates, int32.

    Args:
      a: activations; a neuron is active where it is above 0.
      reference: the set, from `reference_set`.

    Source: CoreMatching, section on core tokens.

    >>> neuron_overlap(jnp.asarray([[1.0, -1.0, 2.0], [0.0, 3.0, 1.0]]), jnp.asarray([1, 1, 0]) > 0)
    Array([1, 1], dtype=int32)
    """
    return jnp.sum((a > 0) & reference, axis=-1, dtype=jnp.int32)


def reference_set(
    a: Float[Array, "m f"],
    *,
    reference: Literal["token", "core_neurons"] = "token",
    token: int | Int[Array, ""] | None = None,
    core: Int[Array, "n_core"] | None = None,
) -> Bool[Array, "f"]:
    """The neurons with which the tokens' are compared.

    Args:
      a: activations.
      reference: "token", those that one token activates, as the released code has it;
        "core_neurons", the core neurons, as the paper has it.
      token: which; may be traced, negative counts from the end. None for the fifth from the end,
        which is in the closing words of LLaVA's prompt.
      core: indices of the core neurons.

    Raises:
      ValueError: an unknown reference, a concrete token that is not there, core missing, or a token
        or core that the reference has no use for.

    Source: CoreMatching, section on core tokens, and its code.

    >>> reference_set(jnp.asarray([[1.0, -1.0, 2.0], [0.0, 3.0, 1.0]]), token=-1)
    Array([False,  True,  True], dtype=bool)
    """
    m, f = a.shape
    if reference == "token":
        if core is not None:
            raise ValueError("core is given with reference 'token'; it goes with 'core_neurons'")
        token = -_QUESTION_END if token is None else token
        if is_concrete(token) and not -m <= int(token) < m:
            raise ValueError(f"token is {int(token)}; a has {m} tokens")
        return a[token] > 0
    if reference == "core_neurons":
        if token is not None:
            raise ValueError("token is given with reference 'core_neurons'; it goes with 'token'")
        if core is None:
            raise ValueError("core is None; reference 'core_neurons' needs their indices")
        return jnp.zeros(f, bool).at[core].set(True)
    raise ValueError(f"reference is {reference!r}; allowed are 'token' and 'core_neurons'")


def elbow_threshold(
    scores: Num[Array, "n"], *, where: Bool[Array, "n"] | None = None
) -> tuple[Num[Array, ""], Int[Array, ""]]:
    """The score at the elbow of the sorted curve: the point farthest from the line of its ends.

    Distances are unsigned and the axes unscaled, so that a plateau with a cliff has its elbow near
    the end. Of equal distances the last wins. A straight line has none: then it is the first point,
    with the highest score, and so it is below three scores.

    Args:
      scores: integers, exact while n times their range fits 31 bits, or floats, whose distances
        are rounded. A NaN or an infinity does not count.
      where: the scores that count; None for all.

    Returns:
      The threshold, in the dtype of the scores (int32 at least), and its position in the descending
      list of the scores that count, int32; 0 means that there is no elbow. Without any score that
      counts the threshold is the lowest number of its dtype.

    Source: CoreMatching, maximum geometric distance; ties and flat curves are this module's.

    >>> elbow_threshold(jnp.asarray([9, 1, 8, 2, 1]))
    (Array(2, dtype=int32), Array(2, dtype=int32))
    """
    if jnp.issubdtype(scores.dtype, jnp.floating):
        scores = widen(lax.stop_gradient(scores))
        finite = jnp.isfinite(scores)
        where = finite if where is None else where & finite
        lowest = jnp.finfo(scores.dtype).min
    else:
        scores = scores.astype(jnp.int64 if scores.dtype.itemsize == 8 else jnp.int32)
        lowest = jnp.iinfo(scores.dtype).min
    n = scores.size
    low = jnp.asarray(lowest, scores.dtype)
    if n == 0:
        return low, jnp.int32(0)
    if where is None:
        count, listed = jnp.int32(n), scores
    else:
        count, listed = jnp.sum(where, dtype=jnp.int32), jnp.where(where, scores, low)
    listed = jnp.sort(listed, descending=True)
    last = jnp.maximum(count - 1, 0)
    place = jnp.arange(n, dtype=jnp.int32)
    # the distance times the length of the line: integers for integer scores
    first, rank = listed[0], place.astype(listed.dtype)
    away = last.astype(listed.dtype) * (listed - first) - rank * (listed[last] - first)
    away = jnp.where(place < count, jnp.abs(away), jnp.zeros_like(away))
    farthest = n - 1 - jnp.argmax(away[::-1]).astype(jnp.int32)
    index = jnp.where(jnp.max(away) > 0, farthest, 0)
    return listed[index], index


def core_tokens(
    scores: Num[Array, "m"],
    image_mask: Bool[Array, "m"],
    *,
    capacity: int | None = None,
    on_flat: Literal["none", "all"] = "none",
    where: Bool[Array, "m"] | None = None,
) -> tuple[Bool[Array, "m"], Int[Array, "c"], Int[Array, ""]]:
    """The tokens that stay: all text, and image tokens that score above the elbow.

    Args:
      scores: from `neuron_overlap`; those of text do not matter.
      image_mask: the image tokens. Without any, all tokens stay.
      capacity: length of the list, at least 1; None for m. Where more tokens would stay, those of
        text do, then the highest scores, among equals the lowest index.
      on_flat: image tokens of a curve without an elbow: "none" stays, as no score is above the
        highest, or "all" stay.
      where: the tokens that are no padding, which never stays; None for all.

    Returns:
      `keep`, at most `capacity` tokens; `idx`, their positions, ascending, int32, and 0 in places
      that are not used; `count`, how many would stay without a capacity.

    Raises:
      ValueError: capacity below 1, or an unknown on_flat.

    Source: CoreMatching, section on core tokens.

    >>> keep, idx, count = core_tokens(jnp.asarray([0, 9, 1, 8, 2, 1]), jnp.arange(6) > 0)
    >>> idx[:int(count)]
    Array([0, 1, 3], dtype=int32)
    """
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity is {capacity}; it must be at least 1")
    if on_flat not in ("none", "all"):
        raise ValueError(f"on_flat is {on_flat!r}; allowed are 'none' and 'all'")
    m = scores.size
    scores = lax.stop_gradient(scores)
    image = image_mask if where is None else image_mask & where
    text = ~image_mask if where is None else ~image_mask & where
    threshold, index = elbow_threshold(scores, where=image)
    above = scores.astype(threshold.dtype) - threshold
    chosen = above > 0
    if on_flat == "all":
        chosen = chosen | (index == 0)
    keep = text | (image & chosen)
    count = jnp.sum(keep, dtype=jnp.int32)
    if capacity is not None and capacity < m:
        rank = jnp.where(text, jnp.inf, _in_order(above))
        keep = exact_topk_mask(jnp.where(keep, rank, -jnp.inf), capacity) & keep
    return keep, compact_indices(keep, m if capacity is None else capacity)[0], count


def gated_ffn(
    params: Mapping[str, Float[Array, "f d"]], x: Float[Array, "*b d"]
) -> Float[Array, "*b d"]:
    """`(silu(x gate^T) * (x up^T)) down`, of all neurons or of those of `compact_ffn`.

    Args:
      params: `gate`, `up` and `down`, each `[f, d]`: a row a neuron. Differentiated.
      x: tokens, in the dtype of the parameters. Differentiated.

    Raises:
      ValueError: leaves of other names or shapes.

    Source: CoreMatching, decoding; Shazeer, GLU Variants (2020).

    >>> params = {name: jnp.ones((3, 2)) for name in ("gate", "up", "down")}
    >>> gated_ffn(params, jnp.ones(2)).round(2)
    Array([10.57, 10.57], dtype=float32)
    """
    _check_ffn(params)
    active = jax.nn.silu(x @ params["gate"].T) * (x @ params["up"].T)
    return active @ params["down"]


def compact_ffn(
    params: Mapping[str, Float[Array, "f d"]], idx: Int[Array, "n_core"]
) -> dict[str, Float[Array, "n_core d"]]:
    """The rows of some neurons, gathered once after pre-fill, for `gated_ffn` of every token.

    Args:
      params: see `gated_ffn`. Differentiated.
      idx: the neurons, from `core_neurons`.

    Raises:
      ValueError: leaves of other names or shapes, or a concrete idx that is not a neuron.

    Source: CoreMatching, decoding.

    >>> params = {name: jnp.ones((3, 2)) for name in ("gate", "up", "down")}
    >>> compact_ffn(params, jnp.asarray([0, 2]))["down"].shape
    (2, 2)
    """
    _check_ffn(params)
    neurons = params["gate"].shape[0]
    if is_concrete(idx) and bool(jnp.any((idx < 0) | (idx >= neurons))):
        raise ValueError(f"idx is {idx}; there are {neurons} neurons")
    return {name: params[name][idx] for name in _LEAVES}


def prune_cache(
    k: Float[Array, "h m d"],
    v: Float[Array, "h m dv"],
    keep: Bool[Array, "m"],
    *,
    capacity: int | None = None,
) -> tuple[Float[Array, "h c d"], Float[Array, "h c dv"], Int[Array, "c"], Bool[Array, "c"]]:
    """The keys and values of the tokens that stay, with the positions that they had.

    Without a capacity nothing moves, and attention has to mask what is not valid: a key of zeros,
    as in the released code, would still receive weight. With one, the rows are gathered in order.

    Args:
      k, v: of one layer, whole positions of all heads. Differentiated.
      keep: from `core_tokens`.
      capacity: length of the new cache, at least 1; None for m.

    Returns:
      `(k, v, kv_pos, valid)`: with c = m or the capacity, `kv_pos` the original positions (for
      rotary embeddings and causal masks), int32, and 0 in places that are not valid.

    Raises:
      ValueError: capacity below 1, or below the number of tokens of a concrete keep. Of a traced
        one that has more, the first stay: `core_tokens` of the same capacity never has more, but
        for text alone.

    Source: CoreMatching, where the selection is applied.

    >>> k = jnp.arange(4.0)[None, :, None]
    >>> keep = jnp.asarray([True, False, False, True])
    >>> [x.ravel().tolist() for x in prune_cache(k, k, keep, capacity=3)]
    [[0.0, 3.0, 0.0], [0.0, 3.0, 0.0], [0, 3, 0], [True, True, False]]
    """
    if capacity is None:
        positions = jnp.arange(keep.size, dtype=jnp.int32)
        return k, v, positions, keep
    idx, count, overflow = compact_indices(keep, capacity)
    if is_concrete(overflow) and int(overflow):
        raise ValueError(f"keep has {int(count + overflow)} tokens; capacity is {capacity}")
    valid = jnp.arange(capacity, dtype=jnp.int32) < count
    return k[:, idx], v[:, idx], idx, valid


def _in_order(x: Array) -> Array:
    """Floats in the order of integers that are not negative: those of the same bits."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return lax.bitcast_convert_type(x, jnp.float64 if x.dtype.itemsize == 8 else jnp.float32)


def _check_ffn(params: Mapping[str, Array]) -> None:
    shapes = {name: leaf.shape for name, leaf in params.items()}
    if sorted(shapes) != sorted(_LEAVES) or len(set(shapes.values())) != 1:
        raise ValueError(f"params has {shapes}; it must have gate, up and down of one shape [f, d]")
