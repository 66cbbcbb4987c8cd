"""Which entries matter: trees in, score tree out. Larger scores stay."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from sparsejax.core.dtypes import widen
from sparsejax.core.selection import align, is_array, is_dense, named_leaves


def magnitude(params: PyTree) -> PyTree:
    """Absolute values, in float32 at least (bfloat16 magnitudes would tie massively).

    Args:
      params: any PyTree; leaves that are no floating-point arrays pass through.
    """
    return jax.tree.map(lambda leaf: jnp.abs(widen(leaf)) if _is_float(leaf) else leaf, params)


def gradient_saliency(params: PyTree, grads: PyTree) -> PyTree:
    """`|weight * gradient|`: how much the loss changes, to first order, without an entry.

    Args:
      params: any PyTree. grads: with the same paths.

    Raises:
      ValueError: gradients of another structure.
    """
    return jax.tree.map(
        lambda w, g: jnp.abs(widen(w) * widen(g)) if _is_float(w) else w,
        params,
        align(grads, params, name="grads"),
    )


def movement(
    scores: PyTree, params: PyTree, grads: PyTree, *, learning_rate: float | Float[Array, ""]
) -> PyTree:
    """One step of movement scores, `S - learning_rate * weight * gradient`; signed.

    They start at zero, grow where a weight moves away from zero, and mask the weights straight
    through: gradients are those of `ste(params, pattern, masks=make_masks(scores, density))`.

    Args:
      scores: so far. params, grads: trees with the same paths. learning_rate: of the scores.

    Raises:
      ValueError: trees of another structure.

    Source: Sanh et al., Movement pruning (2020).
    """
    return jax.tree.map(
        lambda s, w, g: s - learning_rate * widen(w) * widen(g) if _is_float(w) else s,
        scores,
        align(params, scores, name="params"),
        align(grads, scores, name="grads"),
    )


def random(key: PRNGKeyArray, params: PyTree) -> PyTree:
    """Uniform noise of every leaf's shape, in float32.

    Args:
      key: PRNG key, split over the leaves in tree order. params: any PyTree.
    """
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, max(len(leaves), 1))
    noise = [
        jax.random.uniform(k, leaf.shape) if _is_float(leaf) else leaf
        for k, leaf in zip(keys, leaves)
    ]
    return jax.tree.unflatten(structure, noise)


def wanda(params: PyTree, input_norms: PyTree) -> PyTree:
    """Weight magnitude times the norm of the input that it multiplies.

    Args:
      params: tree whose scored leaves are kernels `[..., in, out]`.
      input_norms: tree with the same paths: `[..., in]`, the L2 norm of each input over the
        calibration data, for a kernel that is scored; a scalar for any other leaf, whose score is
        then its magnitude.

    Raises:
      ValueError: naming a leaf whose norms do not fit its input axis.

    Source: Sun et al., A simple and effective pruning approach for large language models (2024).
    """
    norms = jax.tree.leaves(align(input_norms, params, name="input_norms"))
    scores = [
        _wanda_leaf(path, leaf, norm) for (path, leaf), norm in zip(named_leaves(params), norms)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), scores)


def wanda_score(
    kernel: Float[Array, "*l i o"], input_norm: Float[Array, "*l i"]
) -> Float[Array, "*l i o"]:
    """`|kernel| * input_norm` along the input axis, in float32 at least."""
    return jnp.abs(widen(kernel)) * widen(input_norm)[..., :, None]


def _wanda_leaf(path: str, leaf: Any, norm: Any) -> Any:
    if not _is_float(leaf):
        return leaf
    if is_dense(norm):
        return jnp.abs(widen(leaf))
    if leaf.ndim < 2 or norm.shape != leaf.shape[:-1]:
        raise ValueError(
            f"leaf {path!r} has shape {leaf.shape}: its input norms must have shape "
            f"{leaf.shape[:-1]}, not {norm.shape}"
        )
    return wanda_score(leaf, norm)


def _is_float(leaf: Any) -> bool:
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
