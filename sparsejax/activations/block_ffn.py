"""BlockFFN: small experts behind a differentiable router, and neighbours that share experts.

The router is a ReLU and a norm: as many experts as a token likes, no top-k. Training computes all
experts; inference reads the union of the experts that the tokens of a chunk chose.

Source: BlockFFN (2025, arXiv 2507.08771) and its code.
"""

from collections.abc import Mapping
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.sparse_ffn import expert_union_ffn
from sparsejax.core.dtypes import widen
from sparsejax.core.statistical import compact_indices

RouterNorm = Literal["rms", "sum", "none"]
ExpertPath = Literal["dense", "union", "capacity"]
SUM_EPS = 1e-5
"""Added to a sum of gates before it divides, as in the published code."""


def relu_rms_router(
    x: Float[Array, "n d"],
    R: Float[Array, "e d"],
    w: Float[Array, "e"] | None = None,
    *,
    norm: RouterNorm = "rms",
    eps: float = 1e-6,
    norm_scale: float = 1.0,
) -> tuple[Float[Array, "n e"], Float[Array, "n e"]]:
    """Gates of every token and expert: `RMSNorm(relu(x R^T)) * w`.

    The mean square is over all e experts, not over the active ones. An expert is active for a token
    where its logit is positive; the gate says nothing about it, because w may be negative and a
    gate may underflow. A token without an active expert has gates 0 and finite gradients.
    Differentiated in x, R and w.

    Args:
      x: tokens. R: router, one row an expert.
      w: scale of each expert's gate, for norm "rms" alone; None leaves it out.
      norm: "sum" divides by `norm_scale * sum + 1e-5` instead, "none" by nothing.
      eps: of the root mean square, above 0; the published configurations of inference have 1e-5.
      norm_scale: of norm "sum", above 0.

    Returns:
      `(gates, logits)`, the logits before the ReLU: both float32, or float64 where an input is.

    Raises:
      ValueError: shapes that disagree, an unknown norm, w with another norm than "rms", or an eps
        or norm_scale that is not positive.

    Source: BlockFFN, section on the router. The published code takes the mean square in float32
    even of float64 inputs.

    >>> gates, logits = relu_rms_router(jnp.asarray([[3.0, -1.0]]), jnp.eye(2))
    >>> gates.round(3), logits
    (Array([[1.414, 0.   ]], dtype=float32), Array([[ 3., -1.]], dtype=float32))
    """
    _check_router(x, R, w, norm, norm_scale)
    dtype = _wide_dtype(x, R)
    logits = _product("nd,ed->ne", x, R, dtype)
    if norm == "rms":
        gates = rms_pattern(logits, eps=eps)
        return gates if w is None else gates * w.astype(dtype), logits
    gates = jax.nn.relu(logits)
    if norm == "sum":
        gates /= norm_scale * jnp.sum(gates, axis=1, keepdims=True) + SUM_EPS
    return gates, logits


def rms_pattern(logits: Float[Array, "n e"], *, eps: float = 1e-6) -> Float[Array, "n e"]:
    """`relu(logits)` over the root mean square of each row: the gates before their scale.

    In float32 at least. Differentiated.

    Args:
      eps: added to the mean square; above 0.

    Raises:
      ValueError: eps is not positive.

    >>> rms_pattern(jnp.asarray([[2.0, 2.0, -1.0, -1.0]])).round(3)
    Array([[1.414, 1.414, 0.   , 0.   ]], dtype=float32)
    """
    if not eps > 0:
        raise ValueError(f"eps is {eps}; it must be positive")
    on = jax.nn.relu(widen(logits))
    return on * jax.lax.rsqrt(jnp.mean(jnp.square(on), axis=1, keepdims=True) + eps)


def block_ffn(
    params: Mapping[str, Float[Array, "..."]],
    x: Float[Array, "n d"],
    *,
    norm: RouterNorm = "rms",
    eps: float = 1e-6,
    norm_scale: float = 1.0,
    path: ExpertPath = "dense",
    chunk: int | None = None,
    capacity: int | None = None,
) -> tuple[Float[Array, "n d"], dict[str, Float[Array, "n e"] | Int[Array, ""]]]:
    """The layer: the sum over experts e of `gates[:, e] * silu(x @ up[e].T) @ down[e]`.

    Paths differ in what they compute and agree in the result, and in all gradients:

        "dense"     every expert for every token; for training
        "union"     for each chunk the experts that any of its tokens chose, in a loop of that
                    length: no others are read, none is left out; for inference
        "capacity"  for each chunk a fixed number of gathered experts, those with the lowest
                    numbers of its union; for devices and batches that a loop does not suit

    Differentiated in params and x. Batches of sequences: `vmap`.

    Args:
      params: `router [e, d]`, `router_norm [e]` (with norm "rms" alone), `up [e, k, d]` and
        `down [e, k, d]`, where k is the width of an expert: an expert is one block of memory.
      x: tokens in their order. Where x and weights are of one dtype, so are the factors of all
        products (their sums are wide); otherwise the narrower ones are widened.
      norm, eps, norm_scale: see `relu_rms_router`.
      chunk: consecutive tokens that share a union; all n by default. Must divide n.
      capacity: of path "capacity": experts computed for each chunk, at least 1; 1.25 times the
        usual union leaves few out.

    Returns:
      y, of the dtype of x, and `logits` and `gates` of the router with `overflow`: how many experts
      the chunks left out in all. It is 0 except for path "capacity", where 0 means equal to dense.

    Raises:
      ValueError: params that are missing or too many, shapes that disagree on e, k or d, an unknown
        path, a chunk below 1 or that does not divide n, path "capacity" without a capacity or one
        below 1; and as `relu_rms_router`.

    Source: BlockFFN, sections on the architecture and on acceleration kernels.

    >>> params = {"router": jnp.eye(2), "up": jnp.ones((2, 3, 2)), "down": jnp.ones((2, 3, 2))}
    >>> x = jnp.asarray([[1.0, -1.0], [2.0, 0.0]])
    >>> y, aux = block_ffn(params, x, norm="none", path="union")
    >>> y.round(2), int(aux["overflow"])
    (Array([[ 0.  ,  0.  ],
           [10.57, 10.57]], dtype=float32), 0)
    """
    up, down = _checked_layer(params, x, norm, path, chunk, capacity)
    gates, logits = relu_rms_router(
        x, params["router"], params.get("router_norm"), norm=norm, eps=eps, norm_scale=norm_scale
    )
    overflow = jnp.zeros((), jnp.int32)
    if path == "dense":
        y = _all_experts(x, gates, up, down)
    else:
        # an expert whose logit is NaN is listed, so that it shows
        pieces = [_chunks(v, chunk) for v in (x, gates, ~(logits <= 0))]
        most = capacity if path == "capacity" else None
        run = partial(_chosen_experts, up=up, down=down, capacity=most)
        y, left_out = jax.vmap(run)(*pieces)
        y, overflow = y.reshape(x.shape), jnp.sum(left_out, dtype=jnp.int32)
    return y, {"logits": logits, "gates": gates, "overflow": overflow}


def _chunks(rows: Array, chunk: int | None) -> Array:
    return rows[None] if chunk is None else rows.reshape(-1, chunk, rows.shape[1])


def _all_experts(x: Array, gates: Array, up: Array, down: Array) -> Array:
    dtype = _wide_dtype(x, up, down)
    hidden = jax.nn.silu(_product("nd,ekd->nek", x, up, dtype)) * gates[:, :, None].astype(dtype)
    if x.dtype == down.dtype:
        hidden = hidden.astype(x.dtype)
    return _product("nek,ekd->nd", hidden, down, dtype).astype(x.dtype)


def _chosen_experts(
    x: Array, gates: Array, active: Array, *, up: Array, down: Array, capacity: int | None
) -> tuple[Array, Array]:
    """One chunk through its union, or `capacity` experts of it, and how many were left out."""
    union = jnp.any(active, axis=0)
    idx, count, overflow = compact_indices(union, capacity or union.size)
    if capacity is None:
        return expert_union_ffn(x, gates, up, down, idx, count), overflow
    used = jnp.arange(capacity, dtype=jnp.int32) < count
    gates = jnp.where(used, jnp.take(gates, idx, axis=1), jnp.zeros((), gates.dtype))
    up, down = (jnp.take(w, idx, axis=0) for w in (up, down))
    return _all_experts(x, gates, up, down), overflow


def _product(formula: str, a: Array, b: Array, dtype: jnp.dtype) -> Array:
    """An einsum summed in `dtype`; factors of one narrow dtype stay narrow."""
    if a.dtype != b.dtype:
        a, b = a.astype(dtype), b.astype(dtype)
    return jnp.einsum(formula, a, b, preferred_element_type=dtype)


def _wide_dtype(*arrays: Array) -> jnp.dtype:
    double = any(v.dtype == jnp.float64 for v in arrays)
    return jnp.dtype(jnp.float64 if double else jnp.float32)


def _check_router(x: Array, R: Array, w: Array | None, norm: RouterNorm, norm_scale: float) -> None:
    if norm not in ("rms", "sum", "none"):
        raise ValueError(f"norm is {norm!r}; allowed are 'rms', 'sum' and 'none'")
    if not norm_scale > 0:
        raise ValueError(f"norm_scale is {norm_scale}; it must be positive")
    if x.ndim != 2 or R.ndim != 2 or x.shape[1] != R.shape[1]:
        raise ValueError(
            f"x has shape {x.shape} and R {R.shape}; they must be [n, d] and [e, d] with one d"
        )
    if w is not None and norm != "rms":
        raise ValueError(f"w goes with norm 'rms' alone; norm is {norm!r}")
    if w is not None and w.shape != R.shape[:1]:
        raise ValueError(f"w has shape {w.shape}; it must be {R.shape[:1]}, a number an expert")


def _checked_layer(
    params: Mapping[str, Array],
    x: Array,
    norm: RouterNorm,
    path: ExpertPath,
    chunk: int | None,
    capacity: int | None,
) -> tuple[Array, Array]:
    """The weights of the experts, if all fits."""
    wanted = {"router", "up", "down"} | ({"router_norm"} if norm == "rms" else set())
    if set(params) != wanted:
        raise ValueError(
            f"params has {sorted(params)}; norm {norm!r} needs exactly {sorted(wanted)}"
        )
    router, up, down = params["router"], params["up"], params["down"]
    if up.ndim != 3 or up.shape != down.shape:
        raise ValueError(
            f"up has shape {up.shape} and down {down.shape}; both must be one [e, k, d]"
        )
    if router.shape != (up.shape[0], up.shape[2]):
        raise ValueError(
            f"router has shape {router.shape}; it must be {(up.shape[0], up.shape[2])}, by up"
        )
    if path not in ("dense", "union", "capacity"):
        raise ValueError(f"path is {path!r}; allowed are 'dense', 'union' and 'capacity'")
    if chunk is not None and (chunk < 1 or x.shape[0] % chunk):
        raise ValueError(
            f"chunk is {chunk}; it must be at least 1 and divide the {x.shape[0]} tokens"
        )
    if path == "capacity" and capacity is None:
        raise ValueError("capacity is None; path 'capacity' needs the number of experts a chunk")
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity is {capacity}; it must be at least 1")
    return up, down
