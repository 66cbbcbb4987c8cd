"""CAST's weight scaling: learnable factors for blocks of inputs, and folding them in at the end.

Source: CAST: Continuous and differentiable semi-structured sparsity-aware training for large
language models (2025, arXiv 2509.25996).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PyTree

from sparsejax.core.masks import apply_masks, make_masks
from sparsejax.core.patterns import NM, Pattern
from sparsejax.core.scores import magnitude
from sparsejax.core.selection import Where, is_dense, map_selected

CAST_PATTERN = NM(2, 4, ties="lowest")


def scaled_kernel(
    kernel: Float[Array, "*l i o"], scale: Float[Array, "*l n o"]
) -> Float[Array, "*l i o"]:
    """Multiplies n contiguous blocks of input rows by their scale: `W[r, c] * A[r // (i/n), c]`.

    Args:
      kernel: `[in, out]`, with leading axes at will. scale: one number per block and output.

    Raises:
      ValueError: n does not divide the input axis.

    Source: CAST, weight scaling (in PyTorch's layout the blocks are of columns).
    """
    inputs, groups = kernel.shape[-2], scale.shape[-2]
    if groups < 1 or inputs % groups:
        raise ValueError(f"scale has {groups} groups, which do not divide {inputs} inputs")
    blocks = kernel.reshape(*kernel.shape[:-2], groups, inputs // groups, kernel.shape[-1])
    return (blocks * scale[..., :, None, :]).reshape(kernel.shape)


def fold_and_prune(
    kernel: Float[Array, "*l i o"],
    scale: Float[Array, "*l n o"],
    mask: Bool[Array, "*l i o"],
) -> Float[Array, "*l i o"]:
    """The kernel to ship: scale folded in, pruned entries exactly zero."""
    return jnp.where(mask, scaled_kernel(kernel, scale), jnp.zeros((), kernel.dtype))


def init_scales(params: PyTree, *, groups: int = 2, where: Where = None) -> PyTree:
    """Scales of one for every kernel in scope, in the structure of the parameters.

    Args:
      params: tree whose chosen leaves are kernels `[..., in, out]`.
      groups: n, blocks of inputs; 2 for LLaMA.
      where: which leaves, see `selected_paths`.

    Returns:
      `[..., n, out]` for a chosen leaf, the scalar 1 for any other.

    Raises:
      ValueError: naming the leaf whose input axis `groups` does not divide.
    """

    def one(path: str, leaf: Array) -> Array:
        if groups < 1 or leaf.shape[-2] % groups:
            raise ValueError(
                f"groups is {groups}; it must divide axis -2 of {path!r}, of length "
                f"{leaf.shape[-2]}"
            )
        return jnp.ones((*leaf.shape[:-2], groups, leaf.shape[-1]), leaf.dtype)

    return map_selected(one, params, where=where, otherwise=lambda leaf: jnp.ones((), jnp.float32))


def scale_params(params: PyTree, scales: PyTree) -> PyTree:
    """View of the parameters with the scales multiplied in; differentiable in both.

    Args:
      params: any PyTree. scales: from `init_scales`; scalars leave their parameter alone.
    """
    return jax.tree.map(
        lambda leaf, scale: leaf if is_dense(scale) else scaled_kernel(leaf, scale), params, scales
    )


def finish(
    params: PyTree,
    scales: PyTree | None = None,
    *,
    pattern: Pattern = CAST_PATTERN,
    where: Where = None,
) -> tuple[PyTree, PyTree]:
    """The end of CAST: masks from the raw weights, then scales folded in and zeros put in.

    Args:
      params: raw weights. scales: from `init_scales`, or None.
      pattern, where: as in training.

    Returns:
      The sparse parameters (scales folded in, so all of them are 1 from here on) and their masks.
    """
    masks = make_masks(magnitude(params), pattern=pattern, where=where)
    folded = params if scales is None else scale_params(params, scales)
    return apply_masks(folded, masks), masks


class ScaledLinear(nnx.Module):
    """Linear layer whose kernel carries CAST's learnable scales.

    Attributes:
      kernel: `[in, out]`. scale: `[n, out]`, ones at the start. bias: `[out]` or None.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        scale_groups: int = 2,
        use_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        if scale_groups < 1 or d_in % scale_groups:
            raise ValueError(f"scale_groups is {scale_groups}; it must divide d_in = {d_in}")
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (d_in, d_out)))
        self.scale = nnx.Param(jnp.ones((scale_groups, d_out)))
        self.bias = nnx.Param(jnp.zeros((d_out,))) if use_bias else None

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        """`x @ scaled_kernel + bias`."""
        y = x @ scaled_kernel(self.kernel[...], self.scale[...])
        return y if self.bias is None else y + self.bias[...]
