"""Gradual pruning: masks that grow sparser along a schedule, around any optimiser."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from sparsejax.core.masks import apply_masks, leaf_mask
from sparsejax.core.patterns import Pattern, Unstructured
from sparsejax.core.scores import magnitude
from sparsejax.core.selection import Where, is_dense, map_selected, named_leaves, selected_paths
from sparsejax.core.transforms.slots import mask_optimizer_slots
from sparsejax.core.transforms.static import keep_sparse

Allocation = int | float | PyTree | Callable[[Mapping[str, Array]], PyTree]


@runtime_checkable
class PruningSchedule(Protocol):
    """Sparsity at a step, and whether the masks change there."""

    def __call__(self, step: Any, final: Any) -> Float[Array, ""]:
        """Sparsity at `step` on the way to `final`."""
        ...

    def is_update(self, step: Any) -> Bool[Array, ""]:
        """True where the masks are made anew."""
        ...


class SparsityState(NamedTuple):
    """State of `gradual_pruning`."""

    count: Int[Array, ""]  # steps done
    masks: PyTree  # structure of the parameters, bool
    densities: PyTree  # final density of each leaf, float32; 1 where dense
    inner: PyTree  # state of the wrapped optimiser


def gradual_pruning(
    inner: optax.GradientTransformation,
    *,
    pattern: Pattern = Unstructured(),  # noqa: B008 (frozen)
    allocation: Allocation,
    schedule: PruningSchedule,
    where: Where = None,
    scores: Callable[[PyTree], PyTree] = magnitude,
    order: Literal["zhu_gupta", "jaxpruner"] = "zhu_gupta",
    mask_gradients: bool = True,
    skip_on_update: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Prunes little by little while `inner` trains; `optax.apply_updates` gives sparse parameters.

    In the order "zhu_gupta" a step masks the gradients, updates, and, when the *next* step is an
    update step, makes new masks from the updated parameters, so that the next forward pass is
    already sparser; the slots of pruned weights are zero after the step that follows. Multiply the
    parameters by the masks of `init` if the schedule prunes at step 0. In the order "jaxpruner" an
    update step first makes new masks from the parameters as they are. Masks change inside
    `lax.cond`: other steps cost nothing (under `vmap` a cond becomes a select, and masks are made
    at every step).

    Args:
      inner: the optimiser to wrap.
      pattern: which zeros are allowed.
      allocation: final density of every chosen leaf: one number, a tree of them (by path; chosen
        leaves only, or with 1 for the others), or a function of `{path: leaf}` of the chosen leaves
        that returns one, for example `lambda leaves: erk(leaves, 0.1)`.
      schedule: `cubic(...)`, `one_shot(...)` or `Periodic(...)`.
      where: which leaves are pruned, see `selected_paths`.
      scores: params -> score tree.
      order: see above.
      mask_gradients: gradients of pruned weights are zero for `inner`.
      skip_on_update: only in the order "jaxpruner": no optimiser step where masks change.

    Returns:
      A transform with extra arguments, which go to `inner`; `update` needs `params`.

    Raises:
      ValueError: an unknown order, `skip_on_update` in the other order; in `init`, a density
        outside (0, 1], a leaf that the pattern does not fit, or `where` that matches nothing; in
        `update`, without params.

    Source: Zhu & Gupta, To prune, or not to prune (2017); jaxpruner's order is that of its code.
    """
    if order not in ("zhu_gupta", "jaxpruner"):
        raise ValueError(f"order is {order!r}; allowed are 'zhu_gupta' and 'jaxpruner'")
    if skip_on_update and order != "jaxpruner":
        raise ValueError("skip_on_update is for the order 'jaxpruner' alone")
    inner = optax.with_extra_args_support(inner)

    def masks_at(step: Any, params: PyTree, masks: PyTree, densities: PyTree) -> PyTree:
        def one(path: str, score: Array, mask: Array, density: Array) -> Array:
            if is_dense(mask):
                return mask
            return leaf_mask(path, score, 1 - schedule(step, 1 - density), pattern)

        return map_selected(
            one,
            scores(params),
            masks,
            densities,
            where=where,
            otherwise=lambda _: jnp.asarray(True),
        )

    def init(params: PyTree) -> SparsityState:
        densities = _final_densities(params, allocation, where)
        masks = jax.tree.map(
            lambda leaf, d: jnp.asarray(True) if d == 1 else jnp.ones(leaf.shape, bool),
            params,
            densities,
        )
        densities = jax.tree.map(jnp.float32, densities)
        zero = jnp.zeros((), jnp.int32)
        jax.eval_shape(masks_at, zero, params, masks, densities)  # does the pattern fit?
        with jax.ensure_compile_time_eval():
            prunes_at_once = order == "zhu_gupta" and bool(schedule.is_update(0))
        if prunes_at_once:
            masks = masks_at(zero, params, masks, densities)
        return SparsityState(zero, masks, densities, inner.init(params))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, SparsityState]:
        if params is None:
            raise ValueError("params is None; gradual_pruning prunes the parameters: pass them")
        count, masks, densities, inner_state = state
        if order == "jaxpruner":
            due = schedule.is_update(count)
            masks = lax.cond(due, lambda: masks_at(count, params, masks, densities), lambda: masks)
        if mask_gradients:
            updates = apply_masks(updates, masks)
            # here, where it is part of the optimiser's own pass, and not where masks change
            inner_state = mask_optimizer_slots(inner_state, params, masks)
        after, after_state = inner.update(updates, inner_state, params, **extra)
        if skip_on_update:
            due = schedule.is_update(count)
            after = _select(due, jax.tree.map(jnp.zeros_like, after), after)
            after_state = _select(due, inner_state, after_state)
        if order == "zhu_gupta":

            def prune() -> PyTree:
                new = optax.apply_updates(params, keep_sparse(after, params, masks))
                return masks_at(count + 1, new, masks, densities)

            masks = lax.cond(schedule.is_update(count + 1), prune, lambda: masks)
        sparse = keep_sparse(after, params, masks)
        return sparse, SparsityState(count + 1, masks, densities, after_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _final_densities(params: PyTree, allocation: Allocation, where: Where) -> PyTree:
    chosen = selected_paths(params, where)
    leaves = {path: leaf for path, leaf in named_leaves(params) if path in set(chosen)}
    given = allocation(leaves) if callable(allocation) else allocation
    if isinstance(given, int | float):
        shares = dict.fromkeys(chosen, float(given))
    else:
        shares = {path: float(d) for path, d in named_leaves(given)}
        missing = [path for path in chosen if path not in shares]
        if missing:
            raise ValueError(f"allocation gives no density for {missing[:4]}")
    for path in chosen:
        if not 0 < shares[path] <= 1:
            raise ValueError(f"leaf {path!r}: its density is {shares[path]}; it must be in (0, 1]")
    out = [shares[path] if path in leaves else 1.0 for path, _ in named_leaves(params)]
    return jax.tree.unflatten(jax.tree.structure(params), out)


def _select(condition: Any, first: PyTree, second: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), first, second)
