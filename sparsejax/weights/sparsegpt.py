"""SparseGPT: one-shot pruning that makes up for every removed weight with those still to come.

Inputs are eliminated in order. When a weight goes, its error is spread over the weights of later
inputs, so that the layer's squared error on the calibration inputs grows least. Kernels are
`[in, out]`: an input is a row.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from sparsejax.core.dtypes import widen
from sparsejax.core.patterns import NM, nm_mask
from sparsejax.core.selection import is_concrete
from sparsejax.core.topk import exact_topk_threshold
from sparsejax.weights.one_shot import check_choice, check_groups


class _Block(NamedTuple):
    """Consecutive inputs while they are eliminated, one after the other."""

    w: Array  # rows below the current one are final
    errors: Array
    mask: Array


def sparsegpt(
    w: Float[Array, "i o"],
    hessian: Float[Array, "i i"],
    *,
    sparsity: float | None = None,
    pattern: NM | None = None,
    block: int = 128,
    damp: float = 0.01,
) -> tuple[Float[Array, "i o"], Bool[Array, "i o"]]:
    """Prunes a kernel and updates the weights that stay.

    Args:
      w: kernel.
      hessian: of its inputs, `hessian(x).value`; computed with in float32 at least.
      sparsity: in every block of inputs, all outputs together, everything at or below the
        `int(size * sparsity)`-th smallest score goes: at least one weight more than that share.
        At 0 nothing is changed.
      pattern: or N of every M consecutive inputs stay; among equals the lowest index goes first,
        whatever the pattern's own tie rule.
      block: inputs that are pruned together; the weights beyond them are updated once a block.
      damp: share of the mean diagonal that is added to the diagonal.

    Returns:
      The weights in the dtype of `w`, exactly 0 where pruned, and the mask of those that stay.
      An input that is always 0 gets weights 0. Under `jit`, a Hessian without a Cholesky
      factorisation gives NaN weights.

    Raises:
      ValueError: not exactly one of sparsity and pattern, a sparsity outside [0, 1), a Hessian of
        another width, inputs or a block that M does not divide, groups that are not consecutive
        inputs, block < 1 or damp < 0.
      FloatingPointError: outside `jit`, a Hessian that is not positive definite or not finite.

    Source: Frantar & Alistarh, SparseGPT (2023), algorithm 1 and code.

    >>> gram = jnp.asarray([[2.0, 1.9], [1.9, 2.0]])  # two inputs that nearly repeat each other
    >>> sparsegpt(jnp.asarray([[1.0], [1.1]]), gram, pattern=NM(1, 2))[1][:, 0]
    Array([False,  True], dtype=bool)
    """
    check_choice(sparsity, pattern)
    _check_hessian(w, hessian, damp)
    check_groups(w, pattern)
    if block < 1:
        raise ValueError(f"block is {block}; it must be at least 1")
    if pattern is not None and block % pattern.m:
        raise ValueError(f"block is {block}, not a multiple of m = {pattern.m}")
    if sparsity == 0:
        return w, jnp.ones(w.shape, bool)
    factor = _checked_factor(w, hessian, damp)
    return _eliminate(w, jnp.diagonal(hessian) == 0, factor, sparsity, pattern, block)


def sparsegpt_score(
    w: Float[Array, "i o"], hessian: Float[Array, "i i"], *, damp: float = 0.01
) -> Float[Array, "i o"]:
    """SparseGPT's score of every weight before any is updated: `w^2 / diag(U)^2`.

    U is the upper Cholesky factor of the inverse of the damped Hessian. An input that is always 0
    scores 0. Arguments and errors are those of `sparsegpt`.
    """
    _check_hessian(w, hessian, damp)
    diagonal = jnp.diagonal(_checked_factor(w, hessian, damp))
    wide = _without_dead(w, jnp.diagonal(hessian) == 0, diagonal.dtype)
    return jnp.square(wide / diagonal[:, None])


@jax.jit
def _inverse_factor(hessian: Array, damp: float | Array) -> Array:
    """Upper triangular U with `U^T U` the inverse of the damped Hessian.

    With R R^T = H, R upper triangular, U is the inverse of R; and R is the Cholesky factor of H
    with its rows and columns in reverse, so that H itself is never inverted.
    """
    diagonal = jnp.diagonal(hessian)
    filled = jnp.where(diagonal == 0, jnp.ones_like(diagonal), diagonal)
    raised = filled + jnp.asarray(damp).astype(filled.dtype) * jnp.mean(filled)
    index = jnp.arange(hessian.shape[0])
    damped = hessian.at[index, index].set(raised)
    lower = lax.linalg.cholesky(damped[::-1, ::-1], symmetrize_input=False)
    identity = jnp.eye(hessian.shape[0], dtype=hessian.dtype)
    inverse = lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)
    return jnp.triu(inverse[::-1, ::-1])


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _eliminate(
    w: Array, dead: Array, factor: Array, sparsity: float | None, pattern: NM | None, block: int
) -> tuple[Array, Array]:
    wide = _without_dead(w, dead, factor.dtype)
    block = min(block, w.shape[0])

    def step(start: int | Array, width: int, wide: Array, mask: Array) -> tuple[Array, Array]:
        across = lax.dynamic_slice_in_dim(factor, start, width)
        inside = lax.dynamic_slice_in_dim(across, start, width, axis=1)
        rows = lax.dynamic_slice_in_dim(wide, start, width)
        done = _eliminate_block(rows, inside, sparsity, pattern)
        # left of the block the factor is 0, and the block itself is written over
        wide = wide - across.T @ done.errors
        wide = lax.dynamic_update_slice_in_dim(wide, done.w, start, 0)
        return wide, lax.dynamic_update_slice_in_dim(mask, done.mask, start, 0)

    whole, rest = divmod(w.shape[0], block)
    carry = (wide, jnp.ones(w.shape, bool))
    carry = lax.fori_loop(0, whole, lambda i, c: step(i * block, block, *c), carry)
    if rest:  # padding it would change its threshold
        carry = step(whole * block, rest, *carry)
    wide, mask = carry
    # where nobody could look at the factor, its failure must be seen in the weights
    pruned = jnp.where(jnp.isfinite(jnp.diagonal(factor)).all(), 0.0, jnp.nan).astype(wide.dtype)
    return jnp.where(mask, wide, pruned).astype(w.dtype), mask


def _eliminate_block(w: Array, u: Array, sparsity: float | None, pattern: NM | None) -> _Block:
    """Eliminates the inputs of a block; u is the factor's square on its diagonal."""
    diagonal = jnp.diagonal(u)
    group = w.shape[0] if pattern is None else pattern.m

    def choose(w: Array, diagonal: Array) -> Array:
        score = jnp.square(w / diagonal[:, None])
        if pattern is not None:
            return nm_mask(score, pattern.n, pattern.m, ties="last")
        smaller = int(score.size * sparsity)  # type: ignore[operator]
        threshold = -exact_topk_threshold(-score.reshape(-1), smaller + 1)
        return score > threshold

    def prune_row(i: Array, state: _Block) -> _Block:
        row, kept, reach = (lax.dynamic_slice_in_dim(a, i, 1) for a in (state.w, state.mask, u))
        new = jnp.where(kept, row, jnp.zeros_like(row))
        error = (row - new) / lax.dynamic_slice_in_dim(diagonal, i, 1)
        after = state.w - reach.T * error
        return _Block(
            lax.dynamic_update_slice_in_dim(after, new, i, 0),
            lax.dynamic_update_slice_in_dim(state.errors, error, i, 0),
            state.mask,
        )

    def prune_group(g: int | Array, state: _Block) -> _Block:
        start = g * group
        rows = lax.dynamic_slice_in_dim(state.w, start, group)
        kept = choose(rows, lax.dynamic_slice_in_dim(diagonal, start, group))
        state = state._replace(mask=lax.dynamic_update_slice_in_dim(state.mask, kept, start, 0))
        return lax.fori_loop(start, start + group, prune_row, state)

    state = _Block(w, jnp.zeros_like(w), jnp.ones(w.shape, bool))
    return lax.fori_loop(0, w.shape[0] // group, prune_group, state)


def _without_dead(w: Array, dead: Array, dtype: jnp.dtype) -> Array:
    return jnp.where(dead[:, None], jnp.zeros((), dtype), w.astype(dtype))


def _checked_factor(w: Array, hessian: Array, damp: float) -> Array:
    dtype = jnp.promote_types(widen(w).dtype, widen(hessian).dtype)
    factor = _inverse_factor(hessian.astype(dtype), damp)
    if is_concrete(factor) and not bool(jnp.isfinite(jnp.diagonal(factor)).all()):
        raise FloatingPointError(
            "hessian has no Cholesky factorisation: it is not positive definite or not finite; "
            "more calibration samples or a larger damp may help"
        )
    return factor


def _check_hessian(w: Array, hessian: Array, damp: float) -> None:
    if hessian.shape != (w.shape[0], w.shape[0]):
        raise ValueError(f"hessian has shape {hessian.shape}; w has {w.shape[0]} inputs")
    if not damp >= 0:
        raise ValueError(f"damp is {damp}; it must not be negative")
