"""Spark: a predictor inside the layer says which neurons and which keys a token needs.

The input is split by feature. Its first r entries give scores, of which statistical top-k keeps
about k; the others are multiplied with what was kept alone. Training computes everything and masks
it, decoding reads only the rows that are on.

Source: Spark Transformer: Reactivating Sparsity in FFN and Attention (2025, arXiv 2506.06644).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from pallas_kernels import statistical_topk
from pallas_kernels.sparse_ffn import gather_rows_matvec, scatter_rows_vecmat
from sparsejax.core.statistical import compact_indices, gaussian_threshold

Params = Mapping[str, Shaped[Array, "..."]]


def spark_ffn(
    params: Params,
    x: Float[Array, "*b d"],
    *,
    r: int,
    k: int | float,
    sparse_capacity: int | None = None,
) -> tuple[Float[Array, "*b d"], dict[str, Array]]:
    """`(gelu(topk(x1 K1)) * (x2 K2)) V`, where x1 are the first r features of x and x2 the others.

    The soft statistical top-k comes before the GELU (tanh form), so that what is off stays 0. As
    many parameters as a gated FFN of 2/3 of the width.

    Args:
      params: `K1 [r, f]`, `K2 [d - r, f]`, `V [f, d]`. With a capacity those of `neuron_major`, of
        which K2 is not needed, and of any dtype or `bit_patterns` of `pallas_kernels.sparse_ffn`:
        they are widened as they are read.
      x: tokens. k: neurons that are on, in expectation; f or more switches the top-k off.
      sparse_capacity: reads only the rows of neurons that are on, at most so many a token, the
        lowest; `k + 6 * 0.6 * sqrt(k)` hardly ever overflows. None computes all and masks, as
        training does. The gradient of both is exact.

    Returns:
      y, and `threshold [*b]`, `num_active [*b]` and `overflow [*b]` (neurons that were on and found
      no room; 0 without a capacity).

    Raises:
      ValueError: r not inside (0, d), k not positive, a capacity below 1, parameters that do not
        fit or, with a capacity, have no `K2_rows`.

    >>> params = {"K1": jnp.ones((1, 4)), "K2": jnp.ones((1, 4)), "V": jnp.ones((4, 2))}
    >>> y, found = spark_ffn(params, jnp.asarray([2.0, 1.0]), r=1, k=4)
    >>> y.shape, int(found["num_active"])
    ((2,), 4)
    """
    d = x.shape[-1]
    _check_split("r", r, d)
    _check_ffn(params, d, r, sparse_capacity)
    x1, x2 = x[..., :r], x[..., r:]
    scores = _product(x1, params["K1"]) if sparse_capacity is None else _scored(x1, params["K1"])
    gates, threshold = _gates(scores, k)
    on = scores.astype(threshold.dtype) > threshold
    found = {
        "threshold": threshold[..., 0],
        "num_active": jnp.sum(on, axis=-1, dtype=jnp.int32),
        "overflow": jnp.zeros(x.shape[:-1], jnp.int32),
    }
    if sparse_capacity is None:
        return _product(gates * _product(x2, params["K2"]), params["V"]), found
    rows, v, capacity = params["K2_rows"], params["V"], sparse_capacity

    def token(x2: Array, gates: Array, on: Array) -> tuple[Array, Array]:
        idx, count, overflow = compact_indices(on, capacity)
        active = gates[idx] * gather_rows_matvec(rows, idx, x2, count).astype(gates.dtype)
        return scatter_rows_vecmat(v, idx, active, count).astype(x.dtype), overflow

    flat = [a.reshape(-1, a.shape[-1]) for a in (x2, gates, on)]
    # one token after the other: each has a list of its own length
    y, overflow = lax.map(lambda a: token(*a), tuple(flat))
    return y.reshape(x.shape), found | {"overflow": overflow.reshape(x.shape[:-1])}


def statistical_ffn(
    params: Params, x: Float[Array, "*b d"], *, target_sparsity: int | float
) -> Float[Array, "*b d"]:
    """A gated FFN whose gate is cut by statistical top-k: `(gelu(topk(x Wg)) * (x Wu)) Wd`.

    As Gemma 3n uses it, without a split of the input; at a target of 0 the top-k is left out.

    Args:
      params: `gate [d, f]`, `up [d, f]`, `down [f, d]`. target_sparsity: share of neurons off.

    Raises:
      ValueError: a target outside [0, 1), or parameters that do not fit.

    >>> params = {"gate": jnp.ones((2, 4)), "up": jnp.ones((2, 4)), "down": jnp.ones((4, 2))}
    >>> statistical_ffn(params, jnp.ones(2), target_sparsity=0).shape
    (2,)
    """
    d, f = x.shape[-1], params["down"].shape[0]
    _check_shapes(params, {"gate": (d, f), "up": (d, f), "down": (f, d)})
    soft = statistical_topk(_product(x, params["gate"]), target_sparsity=target_sparsity)
    gates = jax.nn.gelu(soft, approximate=True)
    return _product(gates * _product(x, params["up"]), params["down"])


def neuron_major(params: Params) -> dict[str, Array]:
    """Parameters of `spark_ffn` with `K2_rows [f, d - r]` added, each neuron's weights contiguous.

    >>> neuron_major({"K1": jnp.ones((1, 4)), "K2": jnp.ones((2, 4)), "V": jnp.ones((4, 3))})[
    ...     "K2_rows"
    ... ].shape
    (4, 2)
    """
    return {**params, "K2_rows": params["K2"].T}


def spark_attention(
    q: Float[Array, "*h n dh"],
    k: Float[Array, "*h m dh"],
    v: Float[Array, "*h m dv"],
    *,
    r: int,
    top_k: int | float,
    mask: Bool[Array, "n m"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "*h n dv"], dict[str, Array]]:
    """Attention whose first r features choose about `top_k` keys and whose others weigh the values.

        s1 = scale * q1 . k1;  keep = s1 > threshold;  p = softmax over kept keys of s1
        y = sum_j p_j * softplus(scale * q2 . k2_j) * v_j

    The softmax does not change with a shift, so the threshold has no gradient. Statistics are over
    the keys that `mask` allows; of at most `top_k` of them all are kept. The weights are not
    normalised after the softplus. Differentiated in q, k and v.

    Args:
      q, k, v: by heads. mask: True where a key may be seen.
      scale: of both products, by default `dh ** -0.5`.

    Returns:
      y, 0 for a row that sees no key, and `keep [*h n m]`, `threshold [*h n]`, `probs [*h n m]`.

    Raises:
      ValueError: r not inside (0, dh), top_k not positive, shapes that do not fit.

    >>> q = k = v = jnp.ones((1, 3, 4))
    >>> y, found = spark_attention(q, k, v, r=2, top_k=3)
    >>> bool(found["keep"].all())
    True
    """
    dh, n, m = q.shape[-1], q.shape[-2], k.shape[-2]
    _check_split("r", r, dh)
    if k.shape != (*q.shape[:-2], m, dh) or v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"q, k and v have shapes {q.shape}, {k.shape} and {v.shape}; they must be [*h, n, dh], "
            "[*h, m, dh] and [*h, m, dv]"
        )
    if mask is not None and mask.shape != (n, m):
        raise ValueError(f"mask has shape {mask.shape}; it must be ({n}, {m})")
    factor = dh**-0.5 if scale is None else scale
    s1 = _scores(q[..., :r], k[..., :r]) * factor
    valid = jnp.broadcast_to(jnp.ones((n, m), bool) if mask is None else mask, s1.shape)
    keep, threshold, probs = _chosen_keys(s1, valid, top_k)
    weights = probs * jax.nn.softplus(_scores(q[..., r:], k[..., r:]) * factor)
    y = jnp.einsum("...nm,...md->...nd", weights.astype(v.dtype), v)
    return y, {"keep": keep, "threshold": threshold[..., 0], "probs": probs}


def spark_attention_step(
    q: Float[Array, "h dh"],
    k: Float[Array, "m hk dh"],
    v: Float[Array, "m hk dv"],
    *,
    r: int,
    top_k: int | float,
    mask: Bool[Array, "m"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "h dv"], dict[str, Array]]:
    """`spark_attention` of one query a head to a cache, as decoding does it.

    All keys are read up to feature r; beyond it, and of the values, the rows of chosen keys alone.
    No more are read than were chosen, and none is left out. Differentiated in q, k and v.

    Args:
      q: query head h reads key head `h // (h / hk)`. k, v: by position, as a cache holds them.
      mask: True where a key may be seen; the places of a cache that are filled.
      scale: of both products, by default `dh ** -0.5`.

    Returns:
      y, 0 for a head that sees no key, and `keep [h, m]` and `threshold [h]`.

    Raises:
      ValueError: r not inside (0, dh), top_k not positive, shapes that do not fit.

    >>> k = v = jnp.ones((3, 1, 4))
    >>> y, found = spark_attention_step(jnp.ones((2, 4)), k, v, r=2, top_k=3)
    >>> y.shape, int(found["keep"].sum())
    ((2, 4), 6)
    """
    (h, dh), (m, heads) = q.shape, k.shape[:2]
    _check_split("r", r, dh)
    if h % heads or k.shape[2] != dh or v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"q, k and v have shapes {q.shape}, {k.shape} and {v.shape}; they must be [h, dh], "
            "[m, hk, dh] and [m, hk, dv], where hk divides h"
        )
    if mask is not None and mask.shape != (m,):
        raise ValueError(f"mask has shape {mask.shape}; it must be ({m},)")
    factor = dh**-0.5 if scale is None else scale
    grouped = q.reshape(heads, h // heads, dh)
    s1 = _scores(grouped[..., :r], k[..., :r].transpose(1, 0, 2)).reshape(h, m) * factor
    valid = jnp.broadcast_to(True if mask is None else mask, s1.shape)
    keep, threshold, probs = _chosen_keys(s1, valid, top_k)
    k_rows, v_rows = (x.reshape(m * heads, x.shape[2]) for x in (k, v))
    # the first features of a row are read along with the others, and count for nothing
    others = q.at[:, :r].set(0)

    def head(number: Array, q: Array, keep: Array, probs: Array) -> Array:
        keys, count, _ = compact_indices(keep, m)
        rows = keys * heads + number // (h // heads)
        s2 = gather_rows_matvec(k_rows, rows, q.astype(s1.dtype), count) * factor
        weights = (probs[keys] * jax.nn.softplus(s2)).astype(v.dtype)
        return scatter_rows_vecmat(v_rows, rows, weights, count)

    # one head after the other: each has a list of its own length
    y = lax.map(lambda a: head(*a), (jnp.arange(h), others, keep, probs))
    return y, {"keep": keep, "threshold": threshold[..., 0]}


def _chosen_keys(s1: Array, valid: Array, top_k: int | float) -> tuple[Array, Array, Array]:
    """Which keys are kept, the threshold, and the softmax of `s1` over what is kept."""
    threshold = lax.stop_gradient(gaussian_threshold(s1, top_k, where=valid))
    keep = valid & (s1 > threshold)
    logits = jnp.where(keep, s1, -jnp.inf)
    top = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - jnp.where(top == -jnp.inf, 0, top))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return keep, threshold, weights / jnp.where(total > 0, total, 1)


def _gates(scores: Array, k: int | float) -> tuple[Array, Array]:
    """What the predictor gives every neuron, and the threshold `[*b, 1]`."""
    soft, threshold = statistical_topk(scores, k, return_threshold=True)
    return jax.nn.gelu(soft, approximate=True), threshold


def _scored(x1: Array, k1: Array) -> Array:
    """`x1 @ k1`, where k1 may be narrower than x1."""
    if k1.dtype.itemsize >= x1.dtype.itemsize:
        return _product(x1, k1.astype(x1.dtype))
    # by rows, all of them: for a plain product XLA on CPU widens the whole matrix in memory first
    every = jnp.arange(k1.shape[0])
    flat = jax.vmap(lambda a: scatter_rows_vecmat(k1, every, a))(x1.reshape(-1, x1.shape[-1]))
    return flat.reshape(*x1.shape[:-1], k1.shape[1])


def _product(x: Array, w: Array) -> Array:
    return jnp.einsum("...i,io->...o", x, w)


def _scores(q: Array, k: Array) -> Array:
    """Products of queries and keys, float32 at least."""
    wide = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    return jnp.einsum("...nd,...md->...nm", q, k, preferred_element_type=wide)


def _check_split(name: str, r: int, d: int) -> None:
    if not 0 < r < d:
        raise ValueError(f"{name} is {r}; it must be between 1 and {d - 1}, for {d} features")


def _check_ffn(params: Params, d: int, r: int, capacity: int | None) -> None:
    f = params["V"].shape[0]
    if capacity is not None:
        if capacity < 1:
            raise ValueError(f"sparse_capacity is {capacity}; it must be at least 1")
        if "K2_rows" not in params:
            raise ValueError("params has no K2_rows, which a capacity needs: see neuron_major")
    up = {"K2": (d - r, f)} if capacity is None else {"K2_rows": (f, d - r)}
    _check_shapes(params, {"K1": (r, f), **up, "V": (f, d)})


def _check_shapes(params: Params, expected: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in expected.items():
        if params[name].shape != shape:
            raise ValueError(f"params[{name!r}] has shape {params[name].shape}; it must be {shape}")
