"""WINA: which inputs of a linear layer a token may drop, without training.

An input is kept for its magnitude times the norm of the weights that it multiplies, or for its
magnitude alone (TEAL, see `wina_baselines`): a number of inputs, or all above a calibrated
threshold. Kernels are `[in, out]`; input i multiplies row i.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num, PyTree

from pallas_kernels.sparse_ffn import scatter_rows_vecmat
from sparsejax.core.dtypes import widen
from sparsejax.core.selection import Where, is_concrete, map_selected
from sparsejax.core.statistical import compact_indices
from sparsejax.core.topk import exact_topk_mask

MaskBy = Literal["topk", "threshold"]


def column_norms(params: PyTree, *, where: Where = None) -> PyTree:
    """The norm of the weights of every input, for every chosen kernel.

    Compute them after folding and rotating (`column_orthogonal_transform`), not before. Not
    differentiated.

    Args:
      params: any PyTree. where: which leaves, see `selected_paths`.

    Returns:
      A tree of the same structure: for a kernel `[*stack, in, out]` norms `[*stack, in]`, in
      float32 at least; for other leaves the scalar 1, which makes the criterion TEAL's.

    Raises:
      ValueError: where matches nothing.

    Source: WINA (2025, arXiv 2505.19427), where they are the norms of the columns of `[out, in]`.

    >>> column_norms({"kernel": jnp.asarray([[3.0, 4.0], [0.0, 1.0]])})["kernel"]
    Array([5., 1.], dtype=float32)
    """

    def norms(path: str, kernel: Array) -> Array:
        del path
        return jnp.sqrt(jnp.sum(jnp.square(widen(lax.stop_gradient(kernel))), axis=-1))

    return map_selected(
        norms, params, where=where, otherwise=lambda leaf: jnp.ones((), jnp.float32)
    )


def input_scores(
    x: Float[Array, "*b i"], c: Float[Array, "i"] | Float[Array, ""]
) -> Float[Array, "*b i"]:
    """`|x| * c`, what decides which inputs are kept; in float32 at least, without gradient.

    Infinite where that is not a number: what went wrong is kept, and seen.

    Args:
      x: inputs of a layer. c: a norm for each, or a scalar.

    Raises:
      ValueError: c of another length, or (where it can be looked at) negative or NaN.

    >>> input_scores(jnp.asarray([-2.0, 1.0]), jnp.asarray([1.0, 3.0]))
    Array([2., 3.], dtype=float32)
    """
    if c.shape not in ((), x.shape[-1:]):
        raise ValueError(f"c has shape {c.shape}; x has {x.shape[-1]} inputs: a norm each, or ()")
    if is_concrete(c) and c.is_fully_addressable and not (known := np.asarray(c) >= 0).all():
        wrong = np.asarray(c)[~known].ravel()[0]
        raise ValueError(f"c has a norm of {wrong}; norms must be at least 0")
    x, c = _in_one_dtype(lax.stop_gradient(x), lax.stop_gradient(c))
    scores = jnp.abs(x) * c
    return jnp.where(jnp.isnan(scores), jnp.inf, scores)


def kept_inputs(width: int, sparsity: int | float) -> int:
    """How many of `width` inputs are kept: `int(width * (1 - sparsity))`, in Python's floats.

    Raises:
      ValueError: sparsity outside [0, 1].

    >>> kept_inputs(10, 0.2), kept_inputs(10, 0.2 + 4e-17)
    (8, 7)
    """
    check_share("sparsity", sparsity)
    return int(width * (1 - sparsity))


def wina_mask(
    x: Float[Array, "*b i"],
    c: Float[Array, "i"] | Float[Array, ""],
    sparsity: int | float | None = None,
    *,
    by: MaskBy = "topk",
    threshold: int | float | Float[Array, ""] | None = None,
) -> Bool[Array, "*b i"]:
    """The inputs that every token keeps, by `|x| * c`; not differentiated.

    Args:
      x: inputs of a layer.
      c: norms of `column_norms`; a scalar 1 gives TEAL.
      sparsity: of by="topk", a Python number: exactly `kept_inputs(in, sparsity)` are kept. Among
        equal scores the lowest index wins.
      threshold: of by="threshold": scores above it are kept, so that 0 drops exact zeros alone.

    Raises:
      ValueError: as `input_scores` and `kept_inputs`, an unknown `by`, or one without its number.

    Source: WINA (2025, arXiv 2505.19427), section on the criterion; TEAL (2024, arXiv 2408.14690).

    >>> wina_mask(jnp.asarray([1.0, -2.0, 3.0, 0.5]), jnp.asarray([9.0, 1.0, 1.0, 1.0]), 0.5)
    Array([ True, False,  True, False], dtype=bool)
    """
    if by not in ("topk", "threshold"):
        raise ValueError(f"by is {by!r}; allowed are 'topk' and 'threshold'")
    needed = {"topk": ("sparsity", sparsity), "threshold": ("threshold", threshold)}
    name, value = needed[by]
    if value is None:
        raise ValueError(f"{name} is None; by={by!r} needs it")
    scores = input_scores(x, c)
    if by == "threshold":
        return scores > jnp.asarray(threshold).astype(scores.dtype)
    assert sparsity is not None
    return exact_topk_mask(scores, kept_inputs(x.shape[-1], sparsity))


def prefill_positions(length: int, *, fraction: int | float = 0.99) -> Bool[Array, "t"]:
    """The positions of a sequence that are sparsified: the last `int(fraction * length)`.

    Of a mask that means `mask | ~positions[:, None]`. Where that number is 0, as for the one token
    of a decoding step, all are.

    Args:
      length: of the sequence. fraction: 0.99 is WINA's, 0.5 TEAL's.

    Raises:
      ValueError: fraction outside (0, 1].

    Source: the published code of both.

    >>> prefill_positions(4, fraction=0.5)
    Array([False, False,  True,  True], dtype=bool)
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; it must be in (0, 1]")
    last = int(fraction * length) or length
    return jnp.arange(length) >= length - last


def sparse_linear(
    x: Float[Array, "*b i"],
    kernel: Float[Array, "i o"],
    c: Float[Array, "i"] | Float[Array, ""],
    sparsity: int | float,
    *,
    bias: Float[Array, "o"] | None = None,
    gather: bool = False,
) -> Float[Array, "*b o"]:
    """A linear layer that sees the inputs of `wina_mask` alone.

    Differentiated by x, kernel and bias, the mask being constant.

    Args:
      c, sparsity: see `wina_mask`.
      gather: reads the kept rows of the kernel and no others, token by token; otherwise the dropped
        inputs are zeros of a dense product.

    Raises:
      ValueError: as `wina_mask`.

    >>> x, kernel = jnp.asarray([1.0, -2.0, 3.0]), jnp.ones((3, 2))
    >>> sparse_linear(x, kernel, jnp.ones(()), 0.5, gather=True)
    Array([3., 3.], dtype=float32)
    """
    mask = wina_mask(x, c, sparsity)
    if gather:
        capacity = max(1, kept_inputs(x.shape[-1], sparsity))
        rows, kept = x.reshape(-1, x.shape[-1]), mask.reshape(-1, x.shape[-1])
        y = jax.vmap(lambda x, kept: product_of_kept(x, kernel, kept, capacity))(rows, kept)
        y = y.reshape(*x.shape[:-1], kernel.shape[1])
    else:
        y = product(jnp.where(mask, x, jnp.zeros((), x.dtype)), kernel)
    return y if bias is None else y + bias.astype(y.dtype)


def product_of_kept(
    x: Float[Array, "i"],
    kernel: Float[Array, "rows o"],
    kept: Bool[Array, "i"],
    capacity: int,
    *,
    first: int | Int[Array, ""] = 0,
) -> Float[Array, "o"]:
    """`(kept * x) @ kernel` for one token, from the kept rows of the kernel alone.

    Differentiated by x and kernel.

    Args:
      capacity: at least the number of kept inputs, and at least 1; those beyond it are lost.
      first: the row of input 0, where the kernel holds the rows of several layers.

    Raises:
      ValueError: a capacity below 1.

    >>> kernel, kept = jnp.asarray([[1.0], [2.0], [4.0]]), jnp.asarray([True, False, True])
    >>> product_of_kept(jnp.ones(3), kernel, kept, 2)
    Array([5.], dtype=float32)
    """
    inputs, count, _ = compact_indices(kept, capacity)
    return scatter_rows_vecmat(kernel, inputs + first, x[inputs], count)


def empirical_icdf(
    values: Float[Array | np.ndarray, "n"],
    q: int | float,
    *,
    counts: Num[Array | np.ndarray, "n"] | None = None,
) -> float:
    """The value that a share q of all values does not exceed, by linear interpolation; on the host.

    With sums n_j of the counts over ascending values v_j, `target = q * n_last` and the first j
    whose n_j reaches it: `v_{j-1} + (target - n_{j-1}) / (n_j - n_{j-1}) * (v_j - v_{j-1})`, and
    v_0 for j = 0. The threshold of WINA for a sparsity is this of scores rounded to float16.

    Args:
      values: with counts ascending, and of any number; without, as they come.
      counts: how often each occurs.

    Raises:
      ValueError: q outside [0, 1], no values, or counts that sum to nothing.

    Source: the code of TEAL (2024, arXiv 2408.14690), which WINA uses.

    >>> empirical_icdf(jnp.asarray([3.0, 1.0, 2.0, 2.0]), 0.5)
    1.5
    """
    check_share("q", q)
    v = np.asarray(values, np.float64)
    if counts is None:
        v, counts = np.unique(v, return_counts=True)
    reached = np.cumsum(np.asarray(counts, np.float64))
    if not reached.size or not reached[-1] > 0:
        raise ValueError(f"values and counts hold {reached.size} values and no observation")
    target = q * reached[-1]
    j = int(np.searchsorted(reached, target))
    if j == 0:
        return float(v[0])
    if j == len(v):
        return float(v[-1])
    return float(v[j - 1] + (target - reached[j - 1]) / np.diff(reached)[j - 1] * (v[j] - v[j - 1]))


def check_share(name: str, value: int | float) -> None:
    """Refuses what is no share of a whole.

    Raises:
      ValueError: value outside [0, 1].

    >>> check_share("sparsity", 0.5)
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it must be in [0, 1]")


def product(x: Float[Array, "*b i"], kernel: Float[Array, "i o"]) -> Float[Array, "*b o"]:
    """`x @ kernel` in the dtype of x, computed in the wider of the two.

    >>> product(jnp.ones((1, 2), jnp.bfloat16), jnp.ones((2, 1)))
    Array([[2]], dtype=bfloat16)
    """
    if x.dtype == kernel.dtype:
        return x @ kernel
    wide, other = _in_one_dtype(x, kernel)
    return (wide @ other).astype(x.dtype)


def _in_one_dtype(a: Array, b: Array) -> tuple[Array, Array]:
    """Both in the wider of their dtypes, which is float32 at least."""
    wide = max((widen(a).dtype, widen(b).dtype), key=lambda dtype: dtype.itemsize)
    return a.astype(wide), b.astype(wide)
