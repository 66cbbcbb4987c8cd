"""Dynamic sparse training: weights are exchanged at constant density, around any optimiser."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, UInt32

from sparsejax.core.masks import apply_masks, check_masks
from sparsejax.core.schedules import cosine_drop, is_update_step
from sparsejax.core.scores import random
from sparsejax.core.selection import is_concrete, is_dense
from sparsejax.core.topk import exact_topk_mask
from sparsejax.core.transforms.slots import reset_optimizer_slots
from sparsejax.core.transforms.static import keep_sparse

Fraction = int | float | Float[Array, ""]


class DynamicSparsityState(NamedTuple):
    """State of `dynamic_sparsity`."""

    count: Int[Array, ""]  # steps done
    masks: PyTree  # structure of the parameters, bool
    inner: PyTree  # state of the wrapped optimiser
    key: UInt32[Array, "words"] | None  # key data for random growth


def prune_and_regrow(
    mask: Bool[Array, "*s"],
    drop_score: Float[Array, "*s"],
    grow_score: Float[Array, "*s"],
    drop_fraction: Fraction,
    *,
    count: Literal["floor", "nearest"] = "floor",
) -> tuple[Bool[Array, "*s"], Bool[Array, "*s"]]:
    """Drops the weakest active weights and activates as many others; the count stays.

    Args:
      mask: active weights.
      drop_score: the largest of the active ones stay.
      grow_score: the largest among all that did not stay become active (one just dropped may).
      drop_fraction: share of the active weights to exchange, in [0, 1]; may be traced.
      count: how many stay: "floor" drops `floor(fraction * active)`, "nearest" keeps
        `round(active * (1 - fraction))`.

    Returns:
      The new mask, and what is active now and was not before; ties go to the lowest index.

    Raises:
      ValueError: arrays of several shapes, a concrete fraction outside [0, 1], an unknown count.

    Source: Evci et al., Rigging the lottery (2020), algorithm 1.
    """
    if not mask.shape == drop_score.shape == grow_score.shape:
        raise ValueError(
            f"mask, drop_score and grow_score have shapes {mask.shape}, {drop_score.shape} and "
            f"{grow_score.shape}; they must be equal"
        )
    if is_concrete(drop_fraction) and not 0 <= drop_fraction <= 1:
        raise ValueError(f"drop_fraction is {drop_fraction}; it must be in [0, 1]")
    if count not in ("floor", "nearest"):
        raise ValueError(f"count is {count!r}; allowed are 'floor' and 'nearest'")
    active = jnp.sum(mask, dtype=jnp.int32)
    fraction = jnp.asarray(drop_fraction, jnp.float32)
    exact = active.astype(jnp.float32)
    if count == "floor":
        kept = active - jnp.floor(fraction * exact).astype(jnp.int32)
    else:
        kept = jnp.round(exact * (1 - fraction)).astype(jnp.int32)
    low = jnp.finfo(drop_score.dtype).min
    survivors = jnp.where(mask, jnp.maximum(jnp.nan_to_num(drop_score, nan=low), low), -jnp.inf)
    stay = exact_topk_mask(survivors, kept, axis=None) & mask
    low = jnp.finfo(grow_score.dtype).min
    candidates = jnp.where(stay, -jnp.inf, jnp.maximum(jnp.nan_to_num(grow_score, nan=low), low))
    grown = exact_topk_mask(candidates, active - kept, axis=None) & ~stay
    new = stay | grown
    return new, new & ~mask


def dynamic_sparsity(
    inner: optax.GradientTransformation,
    *,
    masks: PyTree,
    grow: Literal["gradient", "random"],
    drop: Callable[[Any], Fraction],
    freq: int,
    begin: int | None = None,
    end: int,
    key: PRNGKeyArray | None = None,
    count: Literal["floor", "nearest"] = "floor",
) -> optax.GradientTransformationExtraArgs:
    """Exchanges weights every `freq` steps while `inner` trains the active ones.

    Parameters are stored masked (multiply them by the masks before the first step), so the gradient
    of `loss(params)` is dense, as growing needs. An update step exchanges weights and takes no
    optimiser step; weights that become active start at zero with zero slots. Masks change inside
    `lax.cond`: other steps cost nothing (under `vmap` a cond becomes a select, and masks are made
    at every step).

    Args:
      inner: the optimiser to wrap.
      masks: starting masks, for example `random_masks(key, params, erk(...))`.
      grow: by the magnitude of the dense "gradient" (RigL) or at "random" (SET).
      drop: step -> share of the active weights that are exchanged.
      freq, begin, end: exchanges happen at the multiples of `freq` in [begin, end]; begin is `freq`
        by default, so that nothing happens at step 0.
      key: for random growth; folded with the step.
      count: see `prune_and_regrow`.

    Returns:
      A transform with extra arguments, which go to `inner`; `update` needs `params`.

    Raises:
      ValueError: an unknown grow or count, random growth without a key, freq < 1, `end < begin`; in
        `init`, masks of another structure; in `update`, without params.

    Source: Evci et al., Rigging the lottery (2020); Mocanu et al., Scalable training of artificial
    neural networks with adaptive sparse connectivity (2018) for random growth.
    """
    if grow not in ("gradient", "random"):
        raise ValueError(f"grow is {grow!r}; allowed are 'gradient' and 'random'")
    if grow == "random" and key is None:
        raise ValueError("key is None; grow='random' draws positions")
    if count not in ("floor", "nearest"):
        raise ValueError(f"count is {count!r}; allowed are 'floor' and 'nearest'")
    first = freq if begin is None else begin
    is_update_step(0, begin=first, end=end, freq=freq)  # its checks
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> Any:
        start = jax.tree.map(jnp.array, check_masks(masks, params))  # copies: states are donated
        data = jax.random.key_data(key) if key is not None and grow == "random" else None
        return DynamicSparsityState(jnp.zeros((), jnp.int32), start, inner.init(params), data)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError("params is None; dynamic_sparsity exchanges parameters: pass them")

        masks = state.masks

        def exchange() -> PyTree:
            fraction = drop(state.count)
            if grow == "gradient":
                growth = jax.tree.map(jnp.abs, updates)
            else:
                step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.count)
                growth = random(step_key, params)

            def one(mask: Array, param: Array, score: Array) -> Array:
                if is_dense(mask):
                    return mask
                return prune_and_regrow(mask, jnp.abs(param), score, fraction, count=count)[0]

            return jax.tree.map(one, masks, params, growth)

        due = is_update_step(state.count, begin=first, end=end, freq=freq, phase="absolute")
        new = lax.cond(due, exchange, lambda: masks)
        # The optimiser's step is taken always and dropped where masks change: a choice entry by
        # entry is part of its pass over the state, a cond around it would copy the state.
        stepped, after = inner.update(apply_masks(updates, masks), state.inner, params, **extra)
        grown = jax.tree.map(lambda now, before: now & ~before, new, masks)
        reset = reset_optimizer_slots(state.inner, params, grown)
        slots = jax.tree.map(lambda old, fresh: jnp.where(due, old, fresh), reset, after)
        held = jax.tree.map(lambda u: jnp.where(due, jnp.zeros((), u.dtype), u), stepped)
        out = keep_sparse(held, params, new)
        return out, DynamicSparsityState(state.count + 1, new, slots, state.key)

    return optax.GradientTransformationExtraArgs(init, update)


def rigl(
    inner: optax.GradientTransformation,
    *,
    masks: PyTree,
    freq: int = 100,
    begin: int | None = None,
    end: int,
    alpha: float = 0.3,
    count: Literal["floor", "nearest"] = "floor",
) -> optax.GradientTransformationExtraArgs:
    """RigL: grows by gradient, exchanging a share that falls from alpha to 0 along a cosine.

    Args:
      inner, masks, freq, begin, count: see `dynamic_sparsity`.
      end: where the share reaches 0 (three quarters of training in the paper); if it is a multiple
        of `freq`, that step still counts as an exchange, of nothing. alpha: share at step 0.

    Source: Evci et al., Rigging the lottery (2020).
    """
    return dynamic_sparsity(
        inner,
        masks=masks,
        grow="gradient",
        drop=lambda step: cosine_drop(step, end=end, alpha=alpha),
        freq=freq,
        begin=begin,
        end=end,
        count=count,
    )


def sparse_evolution(
    inner: optax.GradientTransformation,
    *,
    masks: PyTree,
    key: PRNGKeyArray,
    freq: int = 100,
    begin: int | None = None,
    end: int,
    drop: float | Callable[[Any], Fraction] = 0.3,
    count: Literal["floor", "nearest"] = "floor",
) -> optax.GradientTransformationExtraArgs:
    """SET: grows at random, exchanging a constant share (or one that is a function of the step).

    Args:
      inner, masks, key, freq, begin, end, count: see `dynamic_sparsity`.
      drop: share of the active weights, in [0, 1].

    Raises:
      ValueError: a share outside [0, 1], or as `dynamic_sparsity`.

    Source: Mocanu et al. (2018).
    """
    if not callable(drop) and not 0 <= drop <= 1:
        raise ValueError(f"drop is {drop}; it must be in [0, 1]")
    return dynamic_sparsity(
        inner,
        masks=masks,
        grow="random",
        drop=drop if callable(drop) else lambda step: jnp.float32(drop),
        freq=freq,
        begin=begin,
        end=end,
        key=key,
        count=count,
    )
