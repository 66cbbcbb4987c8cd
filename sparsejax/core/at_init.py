"""Scores at initialisation: SNIP, GraSP and SynFlow, from one batch or none.

Turn them into masks with `masks_from_scores`. Biases and other leaves outside `where` score 0 and
are left to it too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from sparsejax.core.masks import apply_masks
from sparsejax.core.scores import gradient_saliency
from sparsejax.core.selection import Where, is_array, named_leaves, selected_paths
from sparsejax.core.topk import global_topk_masks

Loss = Callable[[PyTree, Any], Float[Array, ""]]


def snip_scores(loss_fn: Loss, params: PyTree, batch: Any, *, where: Where = None) -> PyTree:
    """`|weight * gradient|` divided by its sum over all chosen leaves.

    Args:
      loss_fn: `(params, batch) -> scalar`.
      params: at initialisation. batch: whatever `loss_fn` takes.
      where: which leaves are scored, see `selected_paths`.

    Raises:
      ValueError: `where` matches nothing.

    Source: Lee et al., SNIP: single-shot network pruning (2019).
    """
    grads = jax.grad(loss_fn)(params, batch)
    scores = _only(gradient_saliency(params, grads), where)
    total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(scores))
    return jax.tree.map(lambda leaf: leaf / total, scores)


def grasp_scores(
    loss_fn: Loss, params: PyTree, batches: Sequence[Any], *, where: Where = None
) -> PyTree:
    """`-weight * (H g)` over the absolute sum of it plus 1e-10; **prune the largest**.

    With the sum over the batches of the gradients as g and of the Hessians as H. Keep the smallest:
    `masks_from_scores(scores, density, largest=False)`.

    Args:
      loss_fn: `(params, batch) -> scalar`; it divides the logits by the temperature (200).
      params: at initialisation. batches: one or several.
      where: which leaves are scored, and make up g, see `selected_paths`.

    Raises:
      ValueError: no batches, or `where` matches nothing.

    Source: Wang et al., Picking winning tickets before training by preserving gradient flow (2020).
    """
    if not batches:
        raise ValueError("batches is empty; GraSP needs at least one")
    gradients = [jax.grad(loss_fn)(params, batch) for batch in batches]
    g = _only(jax.tree.map(lambda *parts: sum(parts), *gradients), where)

    def curvature(batch: Any) -> PyTree:
        return jax.jvp(lambda p: jax.grad(loss_fn)(p, batch), (params,), (g,))[1]

    products = jax.tree.map(lambda *parts: sum(parts), *[curvature(batch) for batch in batches])
    scores = _only(jax.tree.map(lambda w, h: -w * h, params, products), where)
    total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(scores))
    return jax.tree.map(lambda leaf: leaf / (jnp.abs(total) + 1e-10), scores)


def synflow_scores(
    apply_fn: Callable[[PyTree, Array], Array],
    params: PyTree,
    input_shape: tuple[int, ...],
    *,
    masks: PyTree | None = None,
    where: Where = None,
) -> PyTree:
    """`|weight * dR/dweight|` with R the summed output for an all-ones input; needs no data.

    Every parameter, biases too, is replaced by its absolute value first.

    Args:
      apply_fn: `(params, x) -> outputs`. What it normalises with, beside the parameters, has to be
        absolute already.
      params: any PyTree of arrays.
      input_shape: of one example, without the batch axis.
      masks: scores are taken at `params * masks`; None for none.
      where: which leaves are scored, see `selected_paths`.

    Raises:
      ValueError: masks of another structure, or `where` matches nothing.

    Source: Tanaka et al., Pruning neural networks without any data by iteratively conserving
    synaptic flow (2020).
    """
    positive = jax.tree.map(jnp.abs, params if masks is None else apply_masks(params, masks))
    x = jnp.ones((1, *input_shape), jax.tree.leaves(positive)[0].dtype)
    grads = jax.grad(lambda p: jnp.sum(apply_fn(p, x)))(positive)
    return _only(gradient_saliency(positive, grads), where)


def synflow_masks(
    apply_fn: Callable[[PyTree, Array], Array],
    params: PyTree,
    input_shape: tuple[int, ...],
    density: float,
    *,
    rounds: int = 100,
    where: Where = None,
) -> PyTree:
    """SynFlow's iterative pruning: after round r of n the density is `density ** (r / n)`.

    Args:
      apply_fn, params, input_shape, where: see `synflow_scores`.
      density: share of the chosen entries that stays, in (0, 1].
      rounds: n, at least 1.

    Returns:
      The mask tree; a pruned weight stays pruned.

    Raises:
      ValueError: a density outside (0, 1], rounds < 1, or `where` matches nothing.

    Source: Tanaka et al. (2020), algorithm 1; counts as in its code, `N - int((1 - rho) * N)`.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}; it must be in (0, 1]")
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; it must be at least 1")
    chosen = set(selected_paths(params, where))
    inside = [path in chosen for path, _ in named_leaves(params)]
    size = sum(leaf.size for path, leaf in named_leaves(params) if path in chosen)
    structure = jax.tree.structure(params)

    @jax.jit
    def prune(masks: PyTree, k: Array) -> PyTree:
        scores = synflow_scores(apply_fn, params, input_shape, masks=masks, where=where)
        # a pruned weight scores 0, as a living one may: it must stay out
        ranked = [
            jnp.where(m, s, -1.0)
            for s, m, take in zip(jax.tree.leaves(scores), jax.tree.leaves(masks), inside)
            if take
        ]
        kept = iter(global_topk_masks(ranked, k))
        new = [next(kept) if take else m for m, take in zip(jax.tree.leaves(masks), inside)]
        return jax.tree.unflatten(structure, new)

    masks = jax.tree.unflatten(
        structure,
        [
            jnp.ones(leaf.shape, bool) if take else jnp.asarray(True)
            for leaf, take in zip(jax.tree.leaves(params), inside)
        ],
    )
    for r in range(1, rounds + 1):
        masks = prune(masks, jnp.int32(size - int((1 - density ** (r / rounds)) * size)))
    return masks


def _only(tree: PyTree, where: Where) -> PyTree:
    """Zeros in every leaf that is not chosen."""
    chosen = set(selected_paths(tree, where))
    leaves = [
        leaf if path in chosen or not is_array(leaf) else jnp.zeros_like(leaf)
        for path, leaf in named_leaves(tree)
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)
