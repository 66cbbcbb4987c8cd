"""What WINA is compared with: the thresholds of TEAL and CATS, and R-Sparse's layer.

TEAL keeps inputs by their magnitude, CATS neurons by that of their gate, and R-Sparse gives what it
drops to a product of low rank.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsejax.activations.wina import (
    check_share,
    column_norms,
    empirical_icdf,
    product,
    wina_mask,
)
from sparsejax.core.dtypes import widen


def teal_histogram(
    values: Float[Array | np.ndarray, "..."], *, num_bins: int = 10_000, outlier: int | float = 0.01
) -> tuple[Float[np.ndarray, "{num_bins}"], Int[np.ndarray, "{num_bins}"]]:
    """TEAL's histogram of signed activations, on the host: equal bins and two for the outliers.

    Args:
      values: of any shape. num_bins: at least 3.
      outlier: share of the values in the first bin, and in the last.

    Returns:
      Centers of the bins, in the dtype of values, and counts.

    Raises:
      ValueError: num_bins or outlier out of range, or no values.

    Source: the code of TEAL (2024, arXiv 2408.14690).

    >>> teal_histogram(jnp.asarray([0.0, 1.0, 2.0, 3.0]), num_bins=3, outlier=0.25)[1].tolist()
    [1, 2, 1]
    """
    if num_bins < 3:
        raise ValueError(f"num_bins is {num_bins}; it must be at least 3")
    if not 0 <= outlier < 0.5:
        raise ValueError(f"outlier is {outlier}; it must be in [0, 0.5)")
    v = np.sort(np.asarray(values), axis=None)
    if not v.size:
        raise ValueError("values is empty: there is nothing to count")
    low, high = int(v.size * outlier), min(int(v.size * (1 - outlier)), v.size - 1)
    inner = np.linspace(v[low], v[high], num_bins - 1, dtype=v.dtype)
    edges = np.concatenate([v[:1], inner, v[-1:]])
    return (edges[1:] + edges[:-1]) / 2, np.histogram(v, edges)[0]


def teal_threshold(
    values: Float[Array | np.ndarray, "..."],
    sparsity: int | float,
    *,
    num_bins: int = 10_000,
    outlier: int | float = 0.01,
) -> float:
    """TEAL's threshold on |x|, which takes x to be symmetric about 0: the quantile `(1 + s) / 2`.

    Args:
      values, num_bins, outlier: see `teal_histogram`. sparsity: s, in [0, 1].

    Raises:
      ValueError: as `teal_histogram`, or sparsity outside [0, 1].

    Source: the code of TEAL (2024, arXiv 2408.14690).

    >>> round(teal_threshold(jnp.linspace(-1, 1, 2001), 0.5), 2)
    0.5
    """
    check_share("sparsity", sparsity)
    centers, counts = teal_histogram(values, num_bins=num_bins, outlier=outlier)
    return empirical_icdf(centers, 0.5 + sparsity / 2, counts=counts)


def cats_activation(
    z: Float[Array, "*s"], threshold: int | float | Float[Array, ""]
) -> Float[Array, "*s"]:
    """`silu(z)` where its magnitude is above the threshold, 0 elsewhere.

    Differentiated by z, the mask being constant. A negative threshold, which `cats_threshold` gives
    where the bin about 0 is enough, doubles what is nearer to 0 than it, as published code does.

    Source: CATS (2024, arXiv 2404.08763) and its code.

    >>> cats_activation(jnp.asarray([-1.0, 0.1, 2.0]), 0.2) != 0
    Array([ True, False,  True], dtype=bool)
    """
    a = jax.nn.silu(z)
    limit = jnp.asarray(threshold).astype(a.dtype)
    return a * (a > limit).astype(a.dtype) + a * (-a > limit).astype(a.dtype)


def cats_threshold(values: Float[Array | np.ndarray, "..."], sparsity: int | float) -> float:
    """The threshold of `cats_activation` for a sparsity, on the host.

    Of 999 bins (998 edges from -1 to 1, and two infinite ones) it is the lower edge of the first
    whose cumulative share is above the sparsity; infinite if none is.

    Args:
      values: activated gates. sparsity: in [0, 1].

    Raises:
      ValueError: sparsity outside [0, 1], or no values.

    Source: the code of CATS (2024, arXiv 2404.08763); shares and their sums are in float32.

    >>> round(cats_threshold(jnp.linspace(0, 1, 1001), 0.5), 2)
    0.5
    """
    check_share("sparsity", sparsity)
    a = np.abs(np.asarray(values, np.float32)).ravel()
    if not a.size:
        raise ValueError("values is empty: there is nothing to count")
    ends = np.asarray([-np.inf]), np.linspace(-1, 1, 998), np.asarray([np.inf])
    edges = np.concatenate(ends).astype(np.float32)
    counts = np.bincount(np.searchsorted(edges, a, side="right") - 1, minlength=len(edges) - 1)
    shares = counts[: len(edges) - 1].astype(np.float32) / np.float32(a.size)
    above = np.flatnonzero(np.cumsum(shares, dtype=np.float32) > sparsity)
    return float(edges[above[0]]) if above.size else float("inf")


def r_sparse_budget(
    width: int, outputs: int, sparsity: int | float, alpha: int | float
) -> tuple[int, int]:
    """How R-Sparse divides what it keeps of a kernel: the inputs kept, and the rank of the rest.

    Args:
      width, outputs: of the kernel.
      sparsity: share of its numbers that are not read, in [0, 1].
      alpha: share of those read that go to kept inputs, in [0, 1]; 1 has no low rank. The threshold
        is the `1 - (1 - sparsity) * alpha` quantile of the scores.

    Raises:
      ValueError: sparsity or alpha outside [0, 1].

    Source: R-Sparse (2025, arXiv 2504.19449) and its code.

    >>> r_sparse_budget(64, 32, 0.5, 0.75)
    (24, 2)
    """
    check_share("sparsity", sparsity)
    check_share("alpha", alpha)
    channels = int(width * (1 - sparsity) * alpha)
    rest = width * outputs * (1 - sparsity) - channels * outputs
    return channels, int(rest / (width + outputs))


def low_rank_factors(
    kernel: Float[Array, "i o"], rank: int
) -> tuple[Float[Array, "i {rank}"], Float[Array, "{rank} o"]]:
    """The best product of a rank for a kernel, by its singular values; in float32 at least.

    Raises:
      ValueError: rank outside [0, min(in, out)].

    >>> down, up = low_rank_factors(jnp.ones((3, 2)), 1)
    >>> jnp.allclose(down @ up, 1.0, atol=1e-5)
    Array(True, dtype=bool)
    """
    if not 0 <= rank <= min(kernel.shape):
        raise ValueError(f"rank is {rank}; it must be in [0, {min(kernel.shape)}]")
    left, values, right = jnp.linalg.svd(widen(kernel), full_matrices=False)
    return left[:, :rank] * values[:rank], right[:rank]


def r_sparse_linear(
    x: Float[Array, "*b t i"],
    kernel: Float[Array, "i o"],
    *,
    rank: int | None = None,
    factors: Sequence[Float[Array, "_ _"]] | None = None,
    threshold: int | float | Float[Array, ""],
    prefill_ratio: int | float,
) -> Float[Array, "*b t o"]:
    """R-Sparse: the inputs with a high score through the kernel, the others through a low rank.

    Differentiated by x and kernel, the mask being constant.

    Args:
      rank: of the factors, found here, or
      factors: those of `low_rank_factors`, found once; exactly one of the two.
      threshold: inputs whose `|x| * c` is above it are kept.
      prefill_ratio: the first `int(t * (1 - prefill_ratio))` tokens keep all.

    Raises:
      ValueError: not exactly one of rank and factors, rank as in `low_rank_factors`, or
        prefill_ratio outside [0, 1].

    Source: R-Sparse (2025, arXiv 2504.19449) and its code.

    >>> r_sparse_linear(jnp.eye(2), jnp.eye(2), rank=0, threshold=0.0, prefill_ratio=1.0)
    Array([[1., 0.],
           [0., 1.]], dtype=float32)
    """
    if (rank is None) == (factors is None):
        raise ValueError(f"rank is {rank}; exactly one of rank and factors must be given")
    check_share("prefill_ratio", prefill_ratio)
    down, up = factors if rank is None else low_rank_factors(kernel, rank)  # type: ignore[misc]
    kept = wina_mask(
        x, column_norms(kernel, where=lambda path, leaf: True), by="threshold", threshold=threshold
    )
    dense = int(x.shape[-2] * (1 - prefill_ratio))
    kept |= (jnp.arange(x.shape[-2]) < dense)[:, None]
    none = jnp.zeros((), x.dtype)
    rest = product(product(jnp.where(kept, none, x), down), up)
    return product(jnp.where(kept, x, none), kernel) + rest
