"""CAST: continuous adaptive sparse training of N:M language models.

The forward pass stays dense all along. AdamS pushes the weights that the current mask would remove
towards zero, weakly at first and fully at the end; a small learnable scale per group of rows
offsets the shrinkage, and the frozen dense model teaches the sparse one.

Source: CAST: Continuous and differentiable semi-structured sparsity-aware training for large
language models (2025, arXiv 2509.25996). The authors published no code; where the paper is silent
the docstrings say what was chosen.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from sparsejax.core.accounting import flips as count_flips
from sparsejax.core.dtypes import widen
from sparsejax.core.masks import check_masks, make_masks
from sparsejax.core.patterns import NM, Pattern
from sparsejax.core.scores import magnitude
from sparsejax.core.selection import (
    Where,
    is_array,
    is_concrete,
    is_dense,
    map_selected,
    named_leaves,
    selected_paths,
)
from sparsejax.weights.scaling import CAST_PATTERN

LearningRate: TypeAlias = float | Float[Array, ""] | Callable[[Any], Any]


class AdamSState(NamedTuple):
    """State of `adams`."""

    count: Int[Array, ""]  # steps done
    mu: PyTree  # momentum of the raw gradients, float32 at least, structure of the parameters
    nu: PyTree  # second moment of what was applied, likewise
    masks: PyTree  # bool; scalar True out of scope
    flips: Int[Array, ""]  # bits changed at the latest refresh, 0 at the first


def adams(
    learning_rate: LearningRate,
    *,
    total_steps: int,
    l1_decay: float | Float[Array, ""],
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    mask_period: int = 10,
    pattern: Pattern = CAST_PATTERN,
    where: Where = None,
) -> optax.GradientTransformation:
    r"""Adam that drives the weights outside an N:M mask to zero while the rest trains.

    For a weight theta with mask bit m at step t of T, with a = t / T:

    $$\mu_t = b_1 \mu_{t-1} + (1 - b_1) g_t, \quad
      u_t = \mu_t \text{ if } m \text{ else } (1 - a) \mu_t + a \lambda\, sign(\theta_{t-1})$$
    $$\nu_t = b_2 \nu_{t-1} + (1 - b_2) u_t^2, \quad
      \theta_t = \theta_{t-1} - lr_t \frac{u_t / (1 - b_1^{t+1})}
      {\sqrt{\nu_t / (1 - b_2^{t+1})} + \epsilon}$$

    Every `mask_period` steps, the first included, the masks are made anew from the magnitudes of
    the parameters, before they are used. Leaves out of scope get ordinary Adam. Chain
    `optax.clip_by_global_norm` before it. `optax.apply_updates` adds the update; find the masks
    with `get_masks`. The forward pass is not masked.

    Args:
      learning_rate: a number, traced or not, or a schedule of the step.
      total_steps: T. It is part of the algorithm: stopping early is not a smaller T.
      l1_decay: lambda, of the order of the gradients; may be traced.
      b1, b2, eps: Adam's.
      mask_period: steps between two refreshes.
      pattern: what the masks obey. Groups run along the input axis of a kernel.
      where: which leaves are in scope, see `selected_paths`.

    Raises:
      ValueError: total_steps < 1, l1_decay < 0 or mask_period < 1; in `init`, an in-scope leaf that
        is not float32 (or float64), a pattern that does not fit one, or `where` that matches
        nothing; in `update`, without params or with a mask that is missing or mis-shaped.

    Source: CAST, algorithm 1 as quoted by a public re-implementation; b1, b2, eps and Adam for the
    leaves out of scope are our choice.

    >>> params = {"kernel": jnp.asarray([[0.1], [1.0], [0.2], [2.0]])}
    >>> tx = adams(1e-2, total_steps=100, l1_decay=1e-2)
    >>> state = tx.init(params)
    >>> update = jax.jit(tx.update)
    >>> for _ in range(100):
    ...     updates, state = update({"kernel": jnp.zeros((4, 1))}, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> jnp.abs(params["kernel"][:, 0]).round(1)
    Array([0., 1., 0., 2.], dtype=float32)
    """
    _at_least("total_steps", total_steps, 1)
    _at_least("mask_period", mask_period, 1)
    _at_least("l1_decay", l1_decay, 0)

    def fresh_masks(params: PyTree) -> PyTree:
        return make_masks(magnitude(params), pattern=pattern, where=where)

    def init(params: PyTree) -> AdamSState:
        masks = fresh_masks(params)
        _check_wide(params, masks)
        # no buffer twice: a donated state must not hold one
        none, also_none = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        return AdamSState(none, wide_zeros(params), wide_zeros(params), masks, also_none)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, AdamSState]:
        if params is None:
            raise ValueError("params is None; adams decays the parameters: pass them to update")
        _check_scope(params, state.masks, where)

        def refresh() -> tuple[PyTree, Int[Array, ""]]:
            masks = fresh_masks(params)
            changed = count_flips(state.masks, masks)
            return masks, jnp.where(state.count == 0, 0, changed)

        masks, flipped = lax.cond(
            state.count % mask_period == 0, refresh, lambda: (state.masks, state.flips)
        )
        grads = jax.tree.map(widen, updates)
        mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, grads, state.mu)

        def push(momentum: Array, param: Array, mask: Array) -> Array:
            if is_dense(mask):
                return momentum
            a = state.count.astype(momentum.dtype) / total_steps
            rate = jnp.asarray(l1_decay).astype(momentum.dtype)
            decayed = (1 - a) * momentum + a * rate * jnp.sign(param)
            return jnp.where(mask, momentum, decayed)

        pushes = jax.tree.map(push, mu, params, masks)
        # out of scope nu is Adam's own, from the gradient; in scope it is from what is applied
        squared = jax.tree.map(lambda u, g, m: g if is_dense(m) else u, pushes, grads, masks)
        nu = jax.tree.map(lambda s, n: b2 * n + (1 - b2) * s * s, squared, state.nu)
        rate = learning_rate_at(learning_rate, state.count)
        steps = jax.tree.map(
            lambda w, u, n: (
                -adam_step(u, n, state.count, rate, b1=b1, b2=b2, eps=eps).astype(w.dtype)
            ),
            params,
            pushes,
            nu,
        )
        return steps, AdamSState(state.count + 1, mu, nu, masks, flipped)

    return optax.GradientTransformation(init, update)


def adam_step(
    push: Float[Array, "*s"],
    nu: Float[Array, "*s"],
    count: Int[Array, ""],
    learning_rate: float | Float[Array, ""],
    *,
    b1: float,
    b2: float,
    eps: float,
) -> Float[Array, "*s"]:
    """Adam's step for a first moment `push` and a second moment `nu`, both bias-corrected.

    Args:
      push: the numerator before bias correction.
      count: steps done before this one.
    """
    done = (count + 1).astype(push.dtype)
    rate = jnp.asarray(learning_rate).astype(push.dtype)
    # powers in the moments' dtype: in float32 1 - b2^t is good to 1e-4 at t = 1
    numerator = push / (1 - jnp.asarray(b1, push.dtype) ** done)
    return rate * numerator / (jnp.sqrt(nu / (1 - jnp.asarray(b2, push.dtype) ** done)) + eps)


def wide_zeros(params: PyTree) -> PyTree:
    """Zeros for the moments: in bfloat16 a second moment could not decay."""
    return jax.tree.map(lambda w: jnp.zeros_like(widen(w)), params)


def learning_rate_at(learning_rate: LearningRate, count: Any) -> Any:
    """The learning rate of a step, from a number or a schedule."""
    return learning_rate(count) if callable(learning_rate) else learning_rate


def decay_budget(learning_rate: LearningRate, *, total_steps: int) -> float:
    """About how far AdamS can move a masked weight: the sum over t of `lr_t * t / T`.

    Args:
      learning_rate: a number or a schedule of the step.
      total_steps: T.

    Raises:
      ValueError: total_steps < 1.
    """
    _at_least("total_steps", total_steps, 1)
    steps = np.arange(total_steps)
    if callable(learning_rate):
        rates = np.asarray(jax.vmap(learning_rate)(jnp.asarray(steps)), np.float64)
    else:
        rates = np.full(total_steps, float(learning_rate))
    return float(np.sum(rates * steps / total_steps))


def check_reach(
    params: PyTree,
    masks: PyTree,
    learning_rate: LearningRate,
    *,
    total_steps: int,
    margin: float = 1.5,
    force: bool = False,
) -> tuple[float, float]:
    """Refuses a run whose learning rate cannot bring the masked weights to zero.

    Args:
      params, masks: the start of the run.
      learning_rate, total_steps: see `decay_budget`.
      margin: how many times the mean masked magnitude must be within reach.
      force: report only.

    Returns:
      The reach and the mean magnitude of the masked weights.

    Raises:
      ValueError: with both figures, when the reach is too short and not `force`.
    """
    reach = decay_budget(learning_rate, total_steps=total_steps)
    mean = float(sparsity_report(params, masks)["mean_masked"])
    if reach < margin * mean and not force:
        raise ValueError(
            f"learning_rate and total_steps let a masked weight travel {reach:.3g}, and the masked "
            f"weights' mean magnitude is {mean:.3g}: at least {margin} times that is needed (raise "
            "the learning rate or the number of steps, or force it)"
        )
    return reach, mean


def cast_loss(
    student_logits: Float[Array, "*b v"],
    teacher_logits: Float[Array, "*b v"],
    labels: Int[Array, "*b"],
    *,
    eta: float = 1 / 3,
    temperature: float = 1.0,
    ignore: int = -100,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """`eta * KL(teacher || student) + (1 - eta) * cross-entropy`, means over the labels in use.

    Args:
      student_logits: differentiated. teacher_logits: not (stop-gradient).
      labels: class of each position; `ignore` leaves a position out.
      eta: share of the distillation term, in [0, 1].
      temperature: divides both logits in the KL, which is then multiplied by its square.

    Returns:
      The loss and its parts `cross_entropy` and `kl` (with temperature squared), in nats.

    Raises:
      ValueError: logits of two shapes, eta outside [0, 1], or a temperature that is not positive.

    Source: CAST, equation of the training loss; eta = 1/3 for LLaMA.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits has shape {student_logits.shape}, "
            f"teacher_logits {teacher_logits.shape}; they must be equal"
        )
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must be in [0, 1]")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    student = widen(student_logits)
    wide = student.dtype
    teacher = lax.stop_gradient(teacher_logits).astype(wide)
    used = labels != ignore
    log_p = jax.nn.log_softmax(student)
    picked = jnp.take_along_axis(log_p, jnp.where(used, labels, 0)[..., None], axis=-1)[..., 0]
    log_q = jax.nn.log_softmax(teacher / temperature)
    log_r = log_p if temperature == 1 else jax.nn.log_softmax(student / temperature)
    q = jnp.exp(log_q)
    # a class that the teacher rules out adds nothing, not 0 * (inf - inf)
    terms = jnp.where(q > 0, q * (log_q - log_r), jnp.zeros((), wide))
    divergence = jnp.sum(terms, axis=-1) * temperature**2
    count = jnp.maximum(jnp.sum(used, dtype=jnp.int32), 1).astype(wide)
    zero = jnp.zeros((), wide)
    cross_entropy = -jnp.sum(jnp.where(used, picked, zero)) / count
    kl = jnp.sum(jnp.where(used, divergence, zero)) / count
    loss = eta * kl + (1 - eta) * cross_entropy
    return loss, {"cross_entropy": cross_entropy, "kl": kl}


def sparsity_report(params: PyTree, masks: PyTree) -> dict[str, Any]:
    """How close the weights in scope are to their masks; works under `jit`.

    Args:
      params, masks: trees with the same paths.

    Returns:
      `kept_ratio` (S: L1 norm of the kept weights over that of all; 1 at the end of CAST),
      `mean_masked` and `max_masked` (magnitudes of the pruned weights) as float scalars, and
      `nonzeros`, `{path: Int}` of the leaves in scope.

    Raises:
      ValueError: masks of another structure, or no sparse leaf.
    """
    masks = check_masks(masks, params)
    pairs = [
        (path, leaf, mask)
        for (path, leaf), mask in zip(named_leaves(params), jax.tree.leaves(masks))
        if not is_dense(mask)
    ]
    if not pairs:
        raise ValueError("masks have no sparse leaf: there is nothing to report")
    sizes = [widen(jnp.abs(leaf)) for _, leaf, _ in pairs]
    dtype = max((size.dtype for size in sizes), key=lambda d: d.itemsize)
    outside = [jnp.where(mask, 0, size).astype(dtype) for size, (_, _, mask) in zip(sizes, pairs)]
    total = sum(jnp.sum(size.astype(dtype)) for size in sizes)
    pruned = sum(jnp.sum(leaf) for leaf in outside)
    count = sum(jnp.sum(~mask, dtype=jnp.int32).astype(dtype) for _, _, mask in pairs)
    return {
        "kept_ratio": (total - pruned) / jnp.maximum(total, jnp.finfo(dtype).tiny),
        "mean_masked": pruned / jnp.maximum(count, 1),
        "max_masked": jnp.max(jnp.stack([jnp.max(leaf) for leaf in outside])),
        "nonzeros": {path: jnp.sum(leaf != 0, dtype=jnp.int32) for path, leaf, _ in pairs},
    }


def groups_in_pattern(
    params: PyTree, pattern: NM, *, where: Where = None, tolerance: float = 0.01
) -> Float[Array, ""]:
    """Share of N:M groups that already obey the pattern; works under `jit`.

    A group does when the entries that its mask would remove hold at most `tolerance` of its L1
    norm.

    Args:
      params: any PyTree. pattern: with an axis. where: which leaves, see `selected_paths`.
      tolerance: share of the L1 norm, at least 0.
    """
    inside: list[Array] = []
    total = 0

    def count(path: str, leaf: Array) -> Array:
        nonlocal total
        del path
        size = widen(jnp.abs(leaf))
        axis = (0 if pattern.axis is None else pattern.axis) % leaf.ndim
        if pattern.axis is None:
            size = size.reshape(-1)
        kept = jnp.where(pattern.mask(size), size, jnp.zeros((), size.dtype))
        shape = (*size.shape[:axis], -1, pattern.m, pattern.stride, *size.shape[axis + 1 :])
        all_of_group = jnp.sum(size.reshape(shape), axis=axis + 1)
        kept_of_group = jnp.sum(kept.reshape(shape), axis=axis + 1)
        total += all_of_group.size
        inside.append(
            jnp.sum(all_of_group - kept_of_group <= tolerance * all_of_group, dtype=jnp.int32)
        )
        return leaf

    map_selected(count, params, where=where)
    return sum(i.astype(jnp.float32) for i in inside) / total  # type: ignore[return-value]


def _check_wide(params: PyTree, masks: PyTree) -> None:
    for (path, leaf), mask in zip(named_leaves(params), jax.tree.leaves(masks)):
        if is_array(leaf) and not is_dense(mask) and leaf.dtype not in (jnp.float32, jnp.float64):
            raise ValueError(
                f"leaf {path!r} is {leaf.dtype}; CAST needs float32 weights in scope, because its "
                "steps are smaller than the spacing of narrower floats"
            )


def _check_scope(params: PyTree, masks: PyTree, where: Where) -> None:
    masks = check_masks(masks, params)
    chosen = set(selected_paths(params, where))
    for (path, _), mask in zip(named_leaves(params), jax.tree.leaves(masks)):
        if is_dense(mask) == (path in chosen):
            state = "is in scope and has no mask" if is_dense(mask) else "has a mask out of scope"
            raise ValueError(f"leaf {path!r} {state}: the state's masks do not fit where")


def _at_least(name: str, value: Any, lowest: int) -> None:
    if is_concrete(value) and not value >= lowest:
        raise ValueError(f"{name} is {value}; it must be at least {lowest}")
