"""The layers of CRATE as pure functions, and what its masked autoencoder needs beside them.

A layer lowers the coding rate of its tokens within subspaces (attention whose queries, keys and
values are one projection), then makes them sparse in a dictionary (`sparsejax.coding.ista_step`).

Source: White-Box Transformers via Sparse Rate Reduction (2023, arXiv 2306.01129, 2311.13110), as
its published code computes it.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from sparsejax.core.dtypes import widen
from sparsejax.core.selection import is_concrete


def mssa(
    x: Float[Array, "b n d"],
    w_qkv: Float[Array, "kp d"],
    w_out: Float[Array, "d kp"] | None,
    b_out: Float[Array, "d"] | None,
    *,
    heads: int,
    mask: Bool[Array, "#b #k #n #n"] | None = None,
    use_softmax: bool = True,
) -> Float[Array, "b n d"]:
    """Multi-head subspace self-attention: one projection is query, key and value.

        W = x w_qkv^T by heads;  A = softmax(W W^T / sqrt(p));  y = concat(A W) w_out^T + b_out

    Logits and softmax are float32 at least. Differentiated in x and the weights.

    Args:
      x: tokens, normalised. w_qkv: rows are the bases of head after head. w_out: None leaves the
        output projection out, for a single head as wide as the tokens.
      mask: True where a token may attend; every row needs one.
      use_softmax: False weighs by the scaled products themselves.

    Raises:
      ValueError: rows of w_qkv that heads do not divide, shapes that do not match, or a mask
        without softmax.

    Source: CRATE, section on MSSA.

    >>> mssa(jnp.ones((1, 3, 2)), jnp.eye(2), None, None, heads=1).shape
    (1, 3, 2)
    """
    (b, n, d), rows = x.shape, w_qkv.shape[0]
    width = d if w_out is None else w_out.shape[1]
    if w_qkv.shape[1] != d or width != rows:
        shape = None if w_out is None else w_out.shape
        raise ValueError(
            f"w_qkv has shape {w_qkv.shape} and w_out {shape} for {d} features; they must be "
            f"[k p, {d}] and [{d}, k p], or w_out None for k p = {d}"
        )
    if mask is not None and not use_softmax:
        raise ValueError("mask is given with use_softmax False, which masks nothing")
    w = _projected(x, w_qkv, heads)
    logits = _logits(w)
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1) if use_softmax else logits
    y = jnp.einsum("bknm,bmkp->bnkp", weights.astype(x.dtype), w).reshape(b, n, rows)
    if w_out is not None:
        y = jnp.einsum("bne,de->bnd", y, w_out)
    return y if b_out is None else y + b_out


def attention_maps(
    x: Float[Array, "b n d"], w_qkv: Float[Array, "kp d"], *, heads: int
) -> Float[Array, "b k n n"]:
    """The weights with which `mssa` mixes tokens; float32 at least.

    Raises:
      ValueError: rows of w_qkv that heads do not divide.

    >>> attention_maps(jnp.ones((1, 2, 2)), jnp.eye(2), heads=1)[0, 0].tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """
    return jax.nn.softmax(_logits(_projected(x, w_qkv, heads)), axis=-1)


def _projected(x: Array, w_qkv: Array, heads: int) -> Array:
    """Tokens in the subspace of each head, `[b, n, k, p]`."""
    rows = w_qkv.shape[0]
    if heads < 1 or rows % heads:
        raise ValueError(f"w_qkv has {rows} rows; heads, which is {heads}, must divide them")
    return jnp.einsum("bnd,ed->bne", x, w_qkv).reshape(*x.shape[:2], heads, -1)


def _logits(w: Array) -> Array:
    """Scaled products of all pairs of tokens, `[b, k, n, n]`."""
    w = widen(w)
    return jnp.einsum("bnkp,bmkp->bknm", w, w) * w.shape[-1] ** -0.5


def patchify(images: Float[Array, "b h w c"], patch: int) -> Float[Array, "b n ppc"]:
    """Patches in raster order, each flattened row by row, channels last.

    Raises:
      ValueError: a side that is no multiple of patch.

    >>> patchify(jnp.arange(16.0).reshape(1, 4, 4, 1), 2)[0, 1].tolist()
    [2.0, 3.0, 6.0, 7.0]
    """
    b, h, w, c = images.shape
    if patch < 1 or h % patch or w % patch:
        raise ValueError(f"images are {h} x {w}; patch, which is {patch}, must divide both sides")
    cut = images.reshape(b, h // patch, patch, w // patch, patch, c)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, patch * patch * c)


def sincos_positions(dim: int, side: int) -> Float[np.ndarray, "tokens dim"]:
    """Fixed embeddings of the class token (zeros) and of `side * side` patches in raster order.

    The first half of the channels encodes the column and the second the row, each as the sines and
    then the cosines of `place / 10000^(i / (dim / 4))`.

    Raises:
      ValueError: dim is no multiple of 4, or side below 1.

    >>> sincos_positions(4, 2).shape
    (5, 4)
    """
    if dim < 4 or dim % 4:
        raise ValueError(f"dim is {dim}; it must be a multiple of 4")
    if side < 1:
        raise ValueError(f"side is {side}; it must be at least 1")
    frequencies = 10_000.0 ** -(np.arange(dim // 4) / (dim // 4))
    row, column = np.mgrid[:side, :side].reshape(2, -1)
    angles = [place[:, None] * frequencies for place in (column, row)]
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)
    return np.concatenate([np.zeros((1, dim)), table])


def random_keep(noise: Float[Array, "b l"], ratio: float) -> Bool[Array, "b l"]:
    """The `int(l * (1 - ratio))` places of a row with the least noise stay visible: True.

    Raises:
      ValueError: ratio outside [0, 1).

    >>> random_keep(jnp.asarray([[0.3, 0.1, 0.2, 0.9]]), 0.5).tolist()
    [[False, True, True, False]]
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio is {ratio}; it must be in [0, 1)")
    kept = int(noise.shape[1] * (1 - ratio))
    order = jnp.argsort(noise, axis=1, stable=True)
    rank = jnp.argsort(order, axis=1, stable=True)
    return rank < kept


def masked_patch_loss(
    prediction: Float[Array, "b n ppc"],
    images: Float[Array, "b h w c"],
    keep: Bool[Array, "b n"],
    *,
    patch: int,
    normalise: bool = False,
) -> Float[Array, ""]:
    """Mean squared error of the patches that were removed. Differentiated in prediction.

    normalise: targets are patches less their mean, over the root of their unbiased variance + 1e-6.

    Raises:
      ValueError: a side that is no multiple of patch, shapes that do not match, or a known keep
        that removes no patch.

    Source: CRATE-MAE; He et al., Masked autoencoders are scalable vision learners (2022).

    >>> image, keep = jnp.ones((1, 2, 2, 1)), jnp.zeros((1, 1), bool)
    >>> float(masked_patch_loss(jnp.zeros((1, 1, 4)), image, keep, patch=2))
    1.0
    """
    target = widen(patchify(images, patch))
    if prediction.shape != target.shape or keep.shape != target.shape[:2]:
        raise ValueError(
            f"prediction and keep have shapes {prediction.shape} and {keep.shape}; they must be "
            f"{target.shape} and {target.shape[:2]}"
        )
    if is_concrete(keep) and np.asarray(keep).all():
        raise ValueError("keep removes no patch, so that there is nothing to predict")
    if normalise:
        mean = jnp.mean(target, axis=-1, keepdims=True)
        variance = jnp.var(target, axis=-1, ddof=1, keepdims=True)
        target = (target - mean) / jnp.sqrt(variance + 1e-6)
    errors = jnp.mean(jnp.square(widen(prediction) - target), axis=-1)
    removed = ~keep
    return jnp.sum(jnp.where(removed, errors, 0)) / jnp.sum(removed).astype(errors.dtype)


def dictionary_init(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> Float[Array, "..."]:
    """Uniform in `[-sqrt(6 / d), sqrt(6 / d)]` with d the last axis, as the published code's."""
    bound = math.sqrt(6 / shape[-1])
    return jax.random.uniform(key, shape, dtype, -bound, bound)
