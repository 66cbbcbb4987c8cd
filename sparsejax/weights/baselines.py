"""What CAST is compared with: AST's optimiser and MaskLLM's learnable masks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from sparsejax.core.dtypes import widen
from sparsejax.core.masks import check_masks, make_masks
from sparsejax.core.patterns import Pattern
from sparsejax.core.scores import magnitude
from sparsejax.core.selection import Where, is_concrete, is_dense
from sparsejax.weights.cast import LearningRate, adam_step, learning_rate_at, wide_zeros

_PATTERNS_2TO4 = np.array(
    [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]],
    np.float32,
)


class AstState(NamedTuple):
    """State of `ast_adamw`."""

    count: Int[Array, ""]  # steps done
    mu: PyTree  # momentum of the raw gradients, float32 at least
    nu: PyTree  # second moment of what was applied, likewise
    masks: PyTree  # bool; scalar True out of scope


def ast_adamw(
    learning_rate: LearningRate,
    *,
    decay: LearningRate,
    weight_decay: float = 0.1,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    pattern: Pattern,
    mask_period: int = 10,
    where: Where = None,
    masks: PyTree | None = None,
) -> optax.GradientTransformation:
    """The optimiser of the Adaptive Sparse Trainer: AdamW with a growing pull on pruned weights.

    Each step first shrinks the weights in scope by `1 - lr * weight_decay`, then applies Adam to
    `momentum + decay * W * (1 - mask)`, whose square also feeds the second moment. The forward
    pass is straight-through on the masks: `ste(params, pattern, masks=get_masks(opt_state))`. The
    masks are refreshed after every `mask_period`-th update, from the new weights.

    Args:
      learning_rate: a number, traced or not, or a schedule of the step.
      decay: strength of the pull (AST ramps it linearly over the first quarter), number or
        schedule.
      weight_decay: decoupled; on the leaves in scope only.
      b1, b2, eps: Adam's.
      pattern, where: what is sparse, and how.
      mask_period: updates between two refreshes.
      masks: fixed masks instead, never refreshed.

    Raises:
      ValueError: mask_period < 1 or a negative weight_decay; in `init`, a pattern that does not fit
        a leaf or masks of another structure; in `update`, without params.

    Source: Huang et al., Pruning large language models with semi-structural adaptive sparse
    training (2025), and its optimiser.
    """
    if mask_period < 1:
        raise ValueError(f"mask_period is {mask_period}; it must be at least 1")
    if is_concrete(weight_decay) and weight_decay < 0:
        raise ValueError(f"weight_decay is {weight_decay}; it must not be negative")

    def init(params: PyTree) -> AstState:
        if masks is None:
            first = make_masks(magnitude(params), pattern=pattern, where=where)
        else:
            first = jax.tree.map(jnp.asarray, check_masks(masks, params))
        zeros = wide_zeros(params)
        return AstState(jnp.zeros((), jnp.int32), zeros, zeros, first)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, AstState]:
        if params is None:
            raise ValueError("params is None; ast_adamw decays the parameters: pass them to update")
        check_masks(state.masks, params)
        rate = learning_rate_at(learning_rate, state.count)
        pull = learning_rate_at(decay, state.count)

        def shrink(param: Array, mask: Array) -> Array:
            wide = widen(param)
            if is_dense(mask):
                return wide
            return wide * (1 - jnp.asarray(rate * weight_decay).astype(wide.dtype))

        shrunk = jax.tree.map(shrink, params, state.masks)
        grads = jax.tree.map(widen, updates)
        mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, grads, state.mu)

        def push(momentum: Array, param: Array, mask: Array) -> Array:
            if is_dense(mask):
                return momentum
            strength = jnp.asarray(pull).astype(param.dtype)
            return momentum + jnp.where(mask, jnp.zeros((), param.dtype), strength * param)

        pushes = jax.tree.map(push, mu, shrunk, state.masks)
        squared = jax.tree.map(lambda u, g, m: g if is_dense(m) else u, pushes, grads, state.masks)
        nu = jax.tree.map(lambda s, n: b2 * n + (1 - b2) * s * s, squared, state.nu)

        def move(before: Array, after: Array, push: Array, moment: Array) -> Array:
            step = adam_step(push, moment, state.count, rate, b1=b1, b2=b2, eps=eps)
            return (after - step).astype(before.dtype)

        new = jax.tree.map(move, params, shrunk, pushes, nu)
        count = state.count + 1
        next_masks = state.masks
        if masks is None:
            next_masks = lax.cond(
                count % mask_period == 0,
                lambda: make_masks(magnitude(new), pattern=pattern, where=where),
                lambda: state.masks,
            )
        steps = jax.tree.map(lambda after, before: after - before, new, params)
        return steps, AstState(count, mu, nu, next_masks)

    return optax.GradientTransformation(init, update)


def maskllm_init(
    key: PRNGKeyArray, mask: Bool[Array, "g 4"], *, std: float = 0.01, prior: float = 3.0
) -> Float[Array, "g 6"]:
    """Logits over the six 2:4 patterns of every group, leaning towards a mask already known.

    Args:
      key: PRNG key.
      mask: the prior's mask, a group a row (for a kernel `[in, out]` and groups along the inputs:
        `mask.T.reshape(-1, 4)`).
      std: of the normal start. prior: strength of the lean, in standard deviations.

    Raises:
      ValueError: std or prior is negative.

    Source: Fang et al., MaskLLM (2024), code.
    """
    if std < 0 or prior < 0:
        raise ValueError(f"std is {std} and prior {prior}; neither may be negative")
    logits = std * jax.random.normal(key, (mask.shape[0], 6), jnp.float32)
    agreement = mask.astype(jnp.float32) @ _PATTERNS_2TO4.T
    return logits + (agreement - 1) * jnp.std(logits) * prior


def maskllm_mask(
    key: PRNGKeyArray,
    logits: Float[Array, "g 6"],
    *,
    kappa: float | Float[Array, ""],
    tau: float | Float[Array, ""],
) -> Float[Array, "g 4"]:
    """A soft mask: Gumbel-softmax over the six patterns, mixed; differentiable in the logits.

    Args:
      key: PRNG key. logits: from `maskllm_init`.
      kappa: multiplies the logits (100 to 500 over training); may be traced.
      tau: temperature (4 to 0.05); may be traced.

    Raises:
      ValueError: a concrete tau that is not positive.
    """
    if is_concrete(tau) and not tau > 0:
        raise ValueError(f"tau is {tau}; it must be positive")
    noise = jax.random.gumbel(key, logits.shape, logits.dtype)
    kappa, tau = (jnp.asarray(v).astype(logits.dtype) for v in (kappa, tau))
    shares = jax.nn.softmax((kappa * logits + noise) / tau)
    return shares @ _PATTERNS_2TO4.astype(logits.dtype)


def maskllm_hard_mask(logits: Float[Array, "g 6"]) -> Bool[Array, "g 4"]:
    """The mask of the likeliest pattern of every group."""
    return jnp.asarray(_PATTERNS_2TO4 > 0)[jnp.argmax(logits, axis=-1)]


def maskllm_logits(
    key: PRNGKeyArray, masks: PyTree, *, std: float = 0.01, prior: float = 3.0
) -> PyTree:
    """`maskllm_init` for a tree of masks: what MaskLLM trains, instead of any weight.

    Args:
      key: PRNG key. masks: the prior's 2:4 masks, groups along axis -2; std, prior: of every leaf.

    Returns:
      Logits `[g, 6]` for every sparse leaf, the scalar 0 for a dense one.
    """
    leaves, structure = jax.tree.flatten(masks)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        structure,
        [
            jnp.zeros(())
            if is_dense(mask)
            else maskllm_init(k, mask.swapaxes(-1, -2).reshape(-1, 4), std=std, prior=prior)
            for k, mask in zip(keys, leaves)
        ],
    )


def maskllm_params(
    key: PRNGKeyArray,
    params: PyTree,
    logits: PyTree,
    *,
    kappa: float | Float[Array, ""],
    tau: float | Float[Array, ""],
) -> PyTree:
    """View of frozen weights under soft masks drawn from the logits; differentiable in the logits.

    Args:
      key, kappa, tau: see `maskllm_mask`. params: weights. logits: from `maskllm_logits`.
    """
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))

    def one(k: PRNGKeyArray, w: Array, logit: Array) -> Array:
        if is_dense(logit):
            return w
        return w * _as_kernel(maskllm_mask(k, logit, kappa=kappa, tau=tau), w).astype(w.dtype)

    viewed = [one(*x) for x in zip(keys, leaves, jax.tree.leaves(logits))]
    return jax.tree.unflatten(structure, viewed)


def maskllm_masks(params: PyTree, logits: PyTree) -> PyTree:
    """The masks that MaskLLM ends with, in the structure of `params`."""

    def one(w: Array, logit: Array) -> Array:
        return jnp.asarray(True) if is_dense(logit) else _as_kernel(maskllm_hard_mask(logit), w)

    return jax.tree.map(one, params, logits)


def _as_kernel(groups: Array, w: Array) -> Array:
    """Groups `[g, 4]` of a kernel's outputs, in order, as an array of the kernel's shape."""
    return groups.reshape(*w.shape[:-2], w.shape[-1], w.shape[-2]).swapaxes(-1, -2)
