"""Dynamic sparse training: weights are exchanged while any optimiser trains them."""

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
from sparsejax.core.selection import align, is_concrete, is_dense, named_leaves
from sparsejax.core.topk import exact_topk_mask
from sparsejax.core.transforms.fractions import ExactFraction, floor_product
from sparsejax.core.transforms.slots import mask_optimizer_slots, reset_optimizer_slots
from sparsejax.core.transforms.static import keep_sparse

Fraction = int | float | Float[Array, ""] | ExactFraction


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
    target: int | None = None,
) -> tuple[Bool[Array, "*s"], Bool[Array, "*s"]]:
    """Drops the weakest active weights and activates as many others; the count stays.

    Counts are int32 (fewer than 2^31 entries).

    Args:
      mask: active weights.
      drop_score: the largest of the active ones stay.
      grow_score: the largest among all that did not stay become active (one just dropped may).
      drop_fraction: share of the active weights to exchange, in [0, 1]; may be traced. Multiplied
        in float32, an `ExactFraction` as in float64.
      count: how many stay: "floor" drops `floor(fraction * active)`, "nearest" keeps
        `round(active * (1 - fraction))`.
      target: how many are active afterwards, if no more than that stayed; None: as many as before.

    Returns:
      The new mask, and what is active now and was not before; ties go to the lowest index.

    Raises:
      ValueError: arrays of several shapes or of 2^31 entries and more, a concrete fraction outside
        [0, 1], an unknown count, an `ExactFraction` with "nearest".

    Source: Evci et al., Rigging the lottery (2020), algorithm 1.
    """
    if not mask.shape == drop_score.shape == grow_score.shape:
        raise ValueError(
            f"mask, drop_score and grow_score have shapes {mask.shape}, {drop_score.shape} and "
            f"{grow_score.shape}; they must be equal"
        )
    if mask.size >= 2**31:
        raise ValueError(f"mask has {mask.size} entries; counts are exact below 2**31")
    exact = isinstance(drop_fraction, ExactFraction)
    if not exact and is_concrete(drop_fraction) and not 0 <= drop_fraction <= 1:
        raise ValueError(f"drop_fraction is {drop_fraction}; it must be in [0, 1]")
    if count not in ("floor", "nearest"):
        raise ValueError(f"count is {count!r}; allowed are 'floor' and 'nearest'")
    if exact and count == "nearest":
        raise ValueError("count is 'nearest'; an ExactFraction is for 'floor'")
    active = jnp.sum(mask, dtype=jnp.int32)
    kept = active - _dropped(active, drop_fraction, count)
    wanted = active if target is None else target
    low = jnp.finfo(drop_score.dtype).min
    survivors = jnp.where(mask, jnp.maximum(jnp.nan_to_num(drop_score, nan=low), low), -jnp.inf)
    stay = exact_topk_mask(survivors, kept, axis=None) & mask
    low = jnp.finfo(grow_score.dtype).min
    candidates = jnp.where(stay, -jnp.inf, jnp.maximum(jnp.nan_to_num(grow_score, nan=low), low))
    grown = exact_topk_mask(candidates, jnp.maximum(wanted - kept, 0), axis=None) & ~stay
    new = stay | grown
    return new, new & ~mask


def _dropped(active: Array, fraction: Fraction, count: str) -> Array:
    if isinstance(fraction, ExactFraction):
        return floor_product(fraction, active)
    share, number = jnp.asarray(fraction, jnp.float32), active.astype(jnp.float32)
    if count == "floor":
        return jnp.floor(share * number).astype(jnp.int32)
    return active - jnp.round(number * (1 - share)).astype(jnp.int32)


def dynamic_sparsity(
    inner: optax.GradientTransformation,
    *,
    masks: PyTree,
    grow: Literal["gradient", "random"] | None,
    drop: Callable[[Any], Fraction],
    freq: int,
    begin: int | None = None,
    end: int,
    key: PRNGKeyArray | None = None,
    count: Literal["floor", "nearest"] = "floor",
    on_update: Literal["skip", "step"] = "skip",
    sparsity: float | PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Exchanges weights every `freq` steps while `inner` trains the active ones.

    Parameters are stored masked (multiply them by the masks before the first step), so the gradient
    of `loss(params)` is dense, as growing needs. Weights that become active start at zero with zero
    slots. Masks change inside `lax.cond`: other steps cost nothing (under `vmap` a cond becomes a
    select, and masks are made at every step).

    Args:
      inner: the optimiser to wrap.
      masks: starting masks, for example `random_masks(key, params, erk(...))`.
      grow: by the magnitude of the dense "gradient" (RigL) or at "random" (SET); None: masks never
        change, and nothing that changes them is compiled.
      drop: step -> share of the active weights that are exchanged.
      freq, begin, end: exchanges happen at the multiples of `freq` in [begin, end]; begin is `freq`
        by default, so that nothing happens at step 0.
      key: for random growth; folded with the step.
      count: see `prune_and_regrow`.
      on_update: "skip": an update step exchanges weights and takes no optimiser step; steps count
        from 0. "step": it takes the optimiser step too, and weights are then ranked as stepped; one
        that is dropped and grown at once keeps its value and slots, and slots of pruned weights are
        zero after every step; steps count from 1.
      sparsity: None: as many weights grow in a leaf as were dropped. A share in [0, 1), or a tree
        of them with the paths of the parameters: so many that `int((1 - sparsity) * size)` (in
        float64) are active, if no more than that stayed.

    Returns:
      A transform with extra arguments, which go to `inner`; `update` needs `params`.

    Raises:
      ValueError: an unknown grow, count or on_update, random growth without a key, freq < 1,
        `end < begin`, a sparsity outside [0, 1); in `init`, masks or sparsities of another
        structure; in `update`, without params.

    Source: Evci et al., Rigging the lottery (2020); Mocanu et al., Scalable training of artificial
    neural networks with adaptive sparse connectivity (2018) for random growth.
    """
    if grow not in ("gradient", "random", None):
        raise ValueError(f"grow is {grow!r}; allowed are 'gradient', 'random' and None")
    if grow == "random" and key is None:
        raise ValueError("key is None; grow='random' draws positions")
    if count not in ("floor", "nearest"):
        raise ValueError(f"count is {count!r}; allowed are 'floor' and 'nearest'")
    if on_update not in ("skip", "step"):
        raise ValueError(f"on_update is {on_update!r}; allowed are 'skip' and 'step'")
    for path, share in named_leaves(sparsity):
        if not 0 <= share < 1:
            name = f"sparsity of {path!r}" if path else "sparsity"
            raise ValueError(f"{name} is {share}; it must be in [0, 1)")
    first = freq if begin is None else begin
    is_update_step(0, begin=first, end=end, freq=freq)  # its checks
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> Any:
        start = jax.tree.map(jnp.array, check_masks(masks, params))  # copies: states are donated
        _targets(sparsity, params)  # its checks
        data = jax.random.key_data(key) if key is not None and grow == "random" else None
        return DynamicSparsityState(jnp.zeros((), jnp.int32), start, inner.init(params), data)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError("params is None; dynamic_sparsity exchanges parameters: pass them")

        masks = state.masks
        step = state.count if on_update == "skip" else state.count + 1
        # The optimiser's step is taken always and, with "skip", dropped where masks change: a
        # choice entry by entry is part of its pass over the state, a cond would copy the state.
        stepped, after = inner.update(apply_masks(updates, masks), state.inner, params, **extra)

        def exchange() -> PyTree:
            fraction = drop(step)
            if grow == "gradient":
                growth = jax.tree.map(jnp.abs, updates)
            else:
                step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), step)
                growth = random(step_key, params)
            weights = params if on_update == "skip" else optax.apply_updates(params, stepped)

            def one(mask: Array, weight: Array, score: Array, target: Any) -> Array:
                if is_dense(mask):
                    return mask
                rank = {"count": count, "target": None if target < 0 else target}
                return prune_and_regrow(mask, jnp.abs(weight), score, fraction, **rank)[0]

            return jax.tree.map(one, masks, weights, growth, _targets(sparsity, params))

        due = is_update_step(step, begin=first, end=end, freq=freq, phase="absolute")
        due = due if grow else jnp.zeros((), bool)
        new = lax.cond(due, exchange, lambda: masks) if grow else masks
        if on_update == "skip":
            grown = jax.tree.map(lambda now, before: now & ~before, new, masks)
            reset = reset_optimizer_slots(state.inner, params, grown)
            slots = jax.tree.map(lambda old, fresh: jnp.where(due, old, fresh), reset, after)
            held = jax.tree.map(lambda u: jnp.where(due, jnp.zeros((), u.dtype), u), stepped)
            out = keep_sparse(held, params, new)
        else:
            stayed = jax.tree.map(jnp.logical_and, new, masks)
            slots = mask_optimizer_slots(after, params, stayed)
            out = keep_sparse(stepped, params, stayed)
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


def _targets(sparsity: float | PyTree | None, params: PyTree) -> PyTree:
    """Active entries wanted in every leaf, in the structure of the parameters; -1 for any."""
    if sparsity is None:
        return jax.tree.map(lambda leaf: -1, params)
    if isinstance(sparsity, int | float):
        shares = jax.tree.map(lambda leaf: sparsity, params)
    else:
        shares = align(sparsity, params, name="sparsity")
    return jax.tree.map(lambda leaf, share: int((1 - share) * jnp.size(leaf)), params, shares)
