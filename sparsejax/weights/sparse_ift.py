"""Sparse iso-FLOP transformations: larger sparse layers at the cost of a dense one, and training.

Sizes are computed on the host in float64, in the order of the published code: `1 - s` is inexact,
and ceilings and floors of it differ by one in another order.

Source: Thangarasa et al., Sparse-IFT: sparse iso-FLOP transformations for maximizing training
efficiency (2024, arXiv 2303.11525) and its code.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from sparsejax.core.dtypes import widen
from sparsejax.core.selection import Where, default_where, is_concrete
from sparsejax.core.transforms.dynamic import (
    DynamicSparsityState,
    dynamic_sparsity,
    prune_and_regrow,
)
from sparsejax.core.transforms.fractions import exact_fraction, fraction_table

Kind = Literal["wide", "parallel", "factorized", "doped"]
Update = Literal["rigl", "set", "static"]
SparseIFTState: TypeAlias = DynamicSparsityState
"""State of `masked_optimizer`: count, masks, inner, key."""


def sift_size(
    kind: Kind,
    d_in: int,
    d_out: int,
    sparsity: float,
    *,
    kernel: tuple[int, int] = (1, 1),
    sparse_u_only: bool = False,
    allow_rounding: bool = False,
) -> int | float:
    """How large the sparse layer is that costs as much as a dense one.

    Args:
      kind: "wide", "parallel", "factorized" or "doped".
      d_in, d_out, kernel: of the dense layer; (1, 1) for a linear one.
      sparsity: share of zeros of the sparse parts, in [0, 1).
      sparse_u_only: "factorized" with a dense second factor.
      allow_rounding: "parallel" takes the nearest whole number of branches even where
        `1 / (1 - sparsity)` is further than 0.05 from it.

    Returns:
      "wide": the factor of both widths, `sqrt(1 / (1 - sparsity))`, not rounded (see `widened`).
      "parallel": the number of branches. "factorized", "doped": the rank.

    Raises:
      ValueError: an unknown kind, a sparsity outside [0, 1) or far from a whole number of branches,
        a size below 1, `sparse_u_only` for another kind, or a doped rank of 0 although
        `sparsity > 0`.

    Source: Sparse-IFT, section 3; the rounding is the code's.

    >>> sift_size("parallel", 64, 64, 0.75), sift_size("factorized", 64, 64, 0.75, kernel=(3, 3))
    (4, 231)
    """
    _check_sparsity(sparsity)
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}; allowed are {', '.join(get_args(Kind))}")
    if min(d_in, d_out, *kernel) < 1:
        raise ValueError(f"d_in is {d_in}, d_out {d_out} and kernel {kernel}; none may be below 1")
    if sparse_u_only and kind != "factorized":
        raise ValueError(f"sparse_u_only is True; {kind!r} has no dense second factor to choose")
    area = math.prod(kernel)
    if kind == "wide":
        return math.sqrt(1 / (1 - sparsity))
    if kind == "parallel":
        return _branches(sparsity, allow_rounding)
    if kind == "factorized":
        cost = area * d_in * d_out
        if sparse_u_only:
            return math.ceil(cost / ((1 - sparsity) * area * d_in + d_out))
        return math.ceil(cost / ((1 - sparsity) * (area * d_in + d_out)))
    rank = math.floor(sparsity * area * d_in * d_out / (area * d_in + d_out))
    if rank == 0 and sparsity > 0:
        raise ValueError(
            f"sparsity is {sparsity}: it leaves no rank for a doped layer of {d_in} inputs and "
            f"{d_out} outputs; take a higher one or a larger layer"
        )
    return rank


def widened(width: int, sparsity: float, *, allow_rounding: bool = False) -> int:
    """The width of a Sparse-Wide layer, `int(width * sqrt(K))` with `K = round(1 / (1 - s))`.

    Sparse-Wide is no layer but a width: build the network with every hidden width (not inputs and
    classes) widened, and make all layers but stem and head sparse.

    Args:
      width: of the dense network. sparsity, allow_rounding: see `sift_size`.

    Raises:
      ValueError: as `sift_size`.

    >>> [widened(64, s) for s in (0.5, 0.75, 0.9)]
    [90, 128, 202]
    """
    _check_sparsity(sparsity)
    if width < 1:
        raise ValueError(f"width is {width}; it must be at least 1")
    return int(width * math.sqrt(_branches(sparsity, allow_rounding)))


def match_flops_sparsity(
    layers: Sequence[tuple[int | float, bool]], budget: int | float, *, tol: float = 1e-3
) -> float:
    """The sparsity, the same in every sparse layer, at which a network costs a given budget.

    Whole widths, and a stem and head that stay dense, break the equality of Sparse-Wide: with this
    sparsity it is exact.

    Args:
      layers: (multiply-accumulates when dense, whether it is sparse) of every layer.
      budget: multiply-accumulates of the dense network that is to be matched.
      tol: a budget above the dense cost of `layers` by no more than this share of it is met by 0.

    Raises:
      ValueError: no sparse layer, or a budget that no sparsity in [0, 1) meets.

    Source: Sparse-IFT; the code bisects for it.

    >>> match_flops_sparsity([(10, False), (160, True)], 50)
    0.75
    """
    sparse = sum(macs for macs, is_sparse in layers if is_sparse)
    dense = sum(macs for macs, is_sparse in layers if not is_sparse)
    if sparse <= 0:
        raise ValueError("layers has no sparse one: there is nothing to match with")
    if budget <= dense:
        raise ValueError(f"budget is {budget}; the dense layers alone cost {dense}")
    if budget > (dense + sparse) * (1 + tol):
        raise ValueError(f"budget is {budget}; all layers without zeros cost {dense + sparse}")
    return max(1 - (budget - dense) / sparse, 0.0)


def sparse_parts(kind: Kind, *, sparse_u_only: bool = False) -> Where:
    """Which leaves a transformation makes sparse, as the `where` of `random_masks` and others.

    Every kernel of "wide" (see `default_where`), the branches of "parallel", both factors of
    "factorized" or the first only, and of "doped" the sparse kernel but never its factors.

    Args:
      kind, sparse_u_only: see `sift_size`.

    Raises:
      ValueError: an unknown kind.

    >>> import re
    >>> [bool(re.search(sparse_parts("doped"), f"fc/{n}/kernel")) for n in ("sparse", "dense_u")]
    [True, False]
    """
    if kind == "wide":
        return default_where
    names = {
        "parallel": r"branches/\d+",
        "factorized": "u" if sparse_u_only else "[uv]",
        "doped": "sparse",
    }
    if kind not in names:
        raise ValueError(f"kind is {kind!r}; allowed are {', '.join(get_args(Kind))}")
    return rf"(^|/){names[kind]}/kernel$"


def rigl_update(
    w: Float[Array, "*s"],
    mask: Bool[Array, "*s"],
    dense_grad: Float[Array, "*s"],
    drop_fraction: float | Float[Array, ""],
    *,
    sparsity: float,
) -> Bool[Array, "*s"]:
    """New mask of one weight: the weakest are dropped, those with the largest gradients grow.

    `int(drop_fraction * active)` are dropped, and as many grow as bring the count to
    `int((1 - sparsity) * size)`; one that has just been dropped may grow again.

    Args:
      w: weights, ranked by magnitude. mask: active ones.
      dense_grad: the gradient that no mask has touched, ranked by magnitude.
      drop_fraction: a Python number in [0, 1), exact as in float64; a traced one is multiplied in
        float32, which may drop one weight more or less.
      sparsity: in [0, 1).

    Returns:
      The mask; ties go to the lowest index.

    Raises:
      ValueError: a share or a sparsity outside [0, 1), or as `prune_and_regrow`.

    Source: Evci et al. (2020); counts as in the code of Sparse-IFT.
    """
    return _exchange(w, mask, jnp.abs(dense_grad), drop_fraction, sparsity)


def set_update(
    key: PRNGKeyArray,
    w: Float[Array, "*s"],
    mask: Bool[Array, "*s"],
    drop_fraction: float | Float[Array, ""],
    *,
    sparsity: float,
) -> Bool[Array, "*s"]:
    """New mask of one weight: the weakest are dropped, others grow at random.

    Args:
      key: PRNG key of the positions.
      w, mask, drop_fraction, sparsity: see `rigl_update`, as are counts and errors.

    Source: Mocanu et al. (2018).
    """
    noise = jax.random.uniform(key, w.shape, jnp.float32)
    return _exchange(w, mask, noise, drop_fraction, sparsity)


def _exchange(
    w: Array, mask: Array, growth: Array, drop_fraction: float | Array, sparsity: float
) -> Array:
    _check_sparsity(sparsity)
    if is_concrete(drop_fraction) and not 0 <= drop_fraction < 1:
        raise ValueError(f"drop_fraction is {drop_fraction}; it must be in [0, 1)")
    share = exact_fraction(drop_fraction) if isinstance(drop_fraction, float) else drop_fraction
    target = int((1 - sparsity) * w.size)
    return prune_and_regrow(mask, jnp.abs(w), growth, share, target=target)[0]


def drop_schedule(
    initial: float = 0.3,
    *,
    begin: int = 0,
    end: int,
    kind: Literal["cosine", "constant", "exponential"] = "cosine",
    rate: float = 1.0,
) -> Callable[[int], float]:
    """Share of the active weights to drop at a step, on the host in float64.

    With `p = (t - begin) / (end - begin)`: "cosine" is `initial * (1 + cos(pi * p)) / 2`,
    "exponential" is `initial * exp(-rate * p)`.

    Args:
      initial: in [0, 1). begin, end: as in `masked_optimizer`. kind, rate: the shape.

    Raises:
      ValueError: `initial` outside [0, 1), `end <= begin`, a negative rate or an unknown kind.

    >>> round(drop_schedule(end=100)(50), 6)
    0.15
    """
    if not 0 <= initial < 1:
        raise ValueError(f"initial is {initial}; it must be in [0, 1)")
    _check_steps(begin, end)
    if rate < 0:
        raise ValueError(f"rate is {rate}; it must not be negative")

    def progress(step: int) -> float:
        return (step - begin) / (end - begin)

    shapes: dict[str, Callable[[int], float]] = {
        "cosine": lambda t: initial * (0.5 * (1 + math.cos(math.pi * progress(t)))),
        "constant": lambda t: initial,
        "exponential": lambda t: initial * math.exp(-rate * progress(t)),
    }
    if kind not in shapes:
        raise ValueError(f"kind is {kind!r}; allowed are {', '.join(shapes)}")
    return shapes[kind]


def masked_optimizer(
    inner: optax.GradientTransformation,
    *,
    masks: PyTree,
    sparsity: float | PyTree,
    drop: Callable[[int], float],
    update: Update = "rigl",
    every: int = 100,
    begin: int = 0,
    end: int,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains the active weights with `inner` and moves the masks as Sparse-IFT does.

    `update` takes the dense gradient: store parameters masked, and that of `loss(params)` is. A
    step is: `inner` on the masked gradients; if due, new masks from the stepped weights and the
    dense gradient; updates that leave pruned weights at zero; slots of pruned weights zeroed. Steps
    count from 1, and t is due when `begin < t < end` and `every` divides t. With gradient
    accumulation put `optax.MultiSteps` around it: then the gradient is the average of the step.

    Args:
      inner: the optimiser to wrap; decoupled decay does not move pruned weights.
      masks: starting masks, for example `random_masks(key, params, 1 - s, where=...)`.
      sparsity: the one the masks were made with, in [0, 1), or a tree of them with the paths of the
        parameters (entries of dense leaves are not read).
      drop: Python step -> share in [0, 1), see `drop_schedule`; called here for every due step, so
        that counts are those of float64.
      update: grows by gradient ("rigl"), at random ("set"), or never changes masks ("static").
      every, begin, end: when masks change.
      key: for "set".

    Returns:
      A transform with state `SparseIFTState`, whose masks `sj.get_masks` finds; extra arguments go
      to `inner`, and `update` needs `params`.

    Raises:
      ValueError: an unknown update, every < 1, `end <= begin`, a share or a sparsity outside
        [0, 1), "set" without a key; in `init`, masks or sparsities of another structure.

    Source: Sparse-IFT, section 4 and code.
    """
    if update not in get_args(Update):
        raise ValueError(f"update is {update!r}; allowed are 'rigl', 'set' and 'static'")
    if update == "set" and key is None:
        raise ValueError("key is None; update='set' draws positions")
    if every < 1:
        raise ValueError(f"every is {every}; it must be at least 1")
    _check_steps(begin, end)
    due = range((begin // every + 1) * every, end, every)
    growth: dict[str, Literal["gradient", "random"]] = {"rigl": "gradient", "set": "random"}
    return dynamic_sparsity(
        inner,
        masks=masks,
        grow=growth.get(update) if due else None,
        drop=fraction_table(drop, due) if due else drop,
        freq=every,
        begin=due[0] if due else begin,
        end=due[-1] if due else end,
        key=key,
        on_update="step",
        sparsity=sparsity,
    )


def joint_weight_decay(
    u: Float[Array, "*k i d"],
    v: Float[Array, "*l d o"],
    weight_decay: float | Float[Array, ""],
    *,
    w: Float[Array, "*k i o"] | None = None,
) -> Float[Array, ""]:
    """Decay of a factorised layer's product: `weight_decay / 2 * ||V U||^2`, added to the loss.

    Args:
      u, v: kernels of the factors, `[in, rank]` and `[rank, out]` or those of convolutions, of
        which the second is 1 x 1; masked factors are what is decayed.
      weight_decay: instead of the optimiser's for these leaves.
      w: kernel of a doped layer, which is decayed together with its factors: `||W + V U||^2`.

    Returns:
      A scalar in float32 at least.

    Raises:
      ValueError: factors whose ranks differ, a second factor that is not 1 x 1, or a w of another
        shape than the product.

    Source: Sparse-IFT, appendix.
    """
    if u.shape[-1] != v.shape[-2]:
        raise ValueError(f"u has shape {u.shape} and v {v.shape}; their ranks must be equal")
    if math.prod(v.shape[:-2]) != 1:
        raise ValueError(f"v has shape {v.shape}; the second factor must be a 1 x 1 kernel")
    product = widen(u) @ widen(v).reshape(v.shape[-2:])
    if w is not None:
        if w.shape != product.shape:
            raise ValueError(f"w has shape {w.shape}; the product of u and v has {product.shape}")
        product = product + widen(w)
    return jnp.asarray(weight_decay, product.dtype) / 2 * jnp.sum(product**2)


def _check_sparsity(sparsity: Any) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; it must be in [0, 1)")


def _check_steps(begin: int, end: int) -> None:
    if begin < 0:
        raise ValueError(f"begin is {begin}; it must not be negative")
    if end <= begin:
        raise ValueError(f"end is {end}; it must come after begin = {begin}")


def _branches(sparsity: float, allow_rounding: bool) -> int:
    exact = 1 / (1 - sparsity)
    whole = round(exact)
    if abs(exact - whole) > 0.05 and not allow_rounding:
        raise ValueError(
            f"sparsity is {sparsity}: 1 / (1 - sparsity) is {exact:.4g}, further than 0.05 from a "
            "whole number; allow_rounding takes the nearest, at another cost than the dense layer's"
        )
    return whole
