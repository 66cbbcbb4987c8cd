"""Products with the rows of a matrix that a list names, reading those and nothing else.

The two are each other's transposes, and so the gradients of each other.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, UInt16

from pallas_kernels import dispatch
from pallas_kernels.sparse_ffn.checks import (
    check_floating,
    check_shape,
    check_weights,
    checked_list,
)
from pallas_kernels.sparse_ffn.rows import tpu, triton, xla
from pallas_kernels.sparse_ffn.weights import active, wide_dtype

__all__ = ["Blocks", "check_rows", "gather_rows_matvec", "scatter_rows_vecmat"]

Blocks = tpu.Blocks | triton.Blocks
_IMPLEMENTATIONS: dict[str, Any] = {"tpu": tpu, "triton": triton, "xla": xla}


def gather_rows_matvec(
    w: Float[Array, "f d"] | UInt16[Array, "f d"],
    idx: Int[Array, "c"],
    x: Float[Array, "d"],
    count: int | Int[Array, ""] | None = None,
    *,
    implementation: dispatch.Implementation | None = None,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> Float[Array, "c"]:
    """`w[idx] @ x`: the products of one vector with the listed rows.

    Entries of idx beyond the first `count` are ignored, whatever they hold; their products are 0.
    A row that is listed twice is used twice. The list is not looked at while tracing: see
    `check_rows`.

    Differentiated by w (a dense `[f, d]` array: the listed rows, zero elsewhere; none for bit
    patterns) and x. Only reverse mode is defined. Under `vmap` the CPU goes through the batch one
    by one, each as long as its own list.

    Args:
      w: neuron-major weights, of any float dtype or `bit_patterns`; products are summed in float32,
        in float64 where w or x is.
      idx: numbers of rows, in [0, f).
      count: entries of idx that count, by default all.
      implementation: "xla", "tpu" or "triton"; None takes the best that can run.
      blocks: of the named kernel, and of its gradient; None chooses by shape.
      interpret: for tests: runs the named kernel on any device, as `pallas_call` takes it.

    Returns:
      Of the dtype of x.

    Raises:
      TypeError: w or x is not floating point, idx or count not of integers.
      ValueError: shapes that do not fit, a known count outside [0, c], blocks of another
        implementation, or an implementation that cannot run here (with the reasons).

    Source: Spark Transformer (2025, arXiv 2506.06644), "vector-masked matmul".

    >>> w = jnp.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    >>> gather_rows_matvec(w, jnp.asarray([2, 0, 0]), jnp.asarray([1.0, 10.0]), 2)
    Array([65., 21.,  0.], dtype=float32)
    """
    idx, count = checked_list(idx, count)
    check_weights("w", w, "f d")
    check_floating("x", x)
    check_shape("x", x, w.shape[1:], "the rows of w")
    v = x.astype(wide_dtype(w, x))
    rule = _rule(w, idx, v, implementation, blocks, interpret)
    found: Array = _matvec(rule, w, idx, count, v)
    return found.astype(x.dtype)


def scatter_rows_vecmat(
    w: Float[Array, "f d"] | UInt16[Array, "f d"],
    idx: Int[Array, "c"],
    a: Float[Array, "c"],
    count: int | Int[Array, ""] | None = None,
    *,
    implementation: dispatch.Implementation | None = None,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> Float[Array, "d"]:
    """`a @ w[idx]`: the sum of the listed rows, times a number each.

    The lists and arguments are those of `gather_rows_matvec`; numbers beyond the first `count` are
    ignored too. With `a = x[idx]` it is a linear layer of the kernel `w [in, out]` that reads the
    rows of the inputs that are kept (WINA, TEAL).

    Differentiated by w (as there) and a.

    Returns:
      Of the dtype of a.

    Raises:
      TypeError, ValueError: as `gather_rows_matvec`, for a instead of x.

    Source: Spark Transformer (2025, arXiv 2506.06644), "sparse-vector matmul".

    >>> w = jnp.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    >>> scatter_rows_vecmat(w, jnp.asarray([2, 0, 0]), jnp.asarray([1.0, 10.0, 9.0]), 2)
    Array([15., 26.], dtype=float32)
    """
    idx, count = checked_list(idx, count)
    check_weights("w", w, "f d")
    check_floating("a", a)
    check_shape("a", a, idx.shape, "idx")
    v = a.astype(wide_dtype(w, a))
    rule = _rule(w, idx, v, implementation, blocks, interpret)
    found: Array = _vecmat(rule, w, idx, count, v)
    return found.astype(a.dtype)


def check_rows(idx: Int[Array, "c"], count: int | Int[Array, ""] | None, rows: int) -> None:
    """Looks at a list, outside `jit`: the ops cannot.

    Args:
      idx, count: as the ops take them. rows: f of `w [f, d]`, or the number of experts.

    Raises:
      TypeError: one of them is not of integers.
      ValueError: count outside [0, c], or one of the first `count` entries outside [0, rows).

    >>> check_rows(jnp.asarray([0, 2, 7]), 2, 3)
    """
    if any(isinstance(value, jax.core.Tracer) for value in (idx, count)):
        raise TypeError("idx and count must be known: check_rows runs outside of jit")
    checked_list(idx, count)
    capacity = idx.shape[0]
    number = capacity if count is None else int(count)
    if not 0 <= number <= capacity:
        raise ValueError(f"count is {number}; it must be in [0, {capacity}], the entries of idx")
    listed = np.asarray(idx)[:number]
    wrong = np.flatnonzero((listed < 0) | (listed >= rows))
    if wrong.size:
        raise ValueError(f"idx[{wrong[0]}] is {listed[wrong[0]]}; it must be in [0, {rows})")


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What is static; `implementation` is the one that runs."""

    implementation: str
    blocks: Blocks | None
    interpret: Any

    def run(self, name: str, *arrays: Array) -> Array:
        op = getattr(_IMPLEMENTATIONS[self.implementation], name)
        return op(*arrays, blocks=self.blocks, interpret=self.interpret)


def _rule(
    w: Array,
    idx: Array,
    v: Array,
    implementation: str | None,
    blocks: Blocks | None,
    interpret: Any,
) -> _Rule:
    against = {
        name: module.reasons(w, idx, v, interpret=interpret)
        for name, module in _IMPLEMENTATIONS.items()
    }
    chosen = dispatch.choose(implementation, against, interpret=interpret)
    dispatch.check_blocks(blocks, chosen, _IMPLEMENTATIONS[chosen].Blocks)
    return _Rule(chosen, blocks, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matvec(rule: _Rule, w: Array, idx: Array, count: Array, x: Array) -> Array:
    return rule.run("matvec", w, idx, count, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _vecmat(rule: _Rule, w: Array, idx: Array, count: Array, a: Array) -> Array:
    return rule.run("vecmat", w, idx, count, a)


def _matvec_backward(rule: _Rule, residuals: Any, dy: Array) -> tuple[Any, None, None, Array]:
    w, idx, count, x = residuals
    return _outer(w, idx, count, dy, x), None, None, _vecmat(rule, w, idx, count, dy)


def _vecmat_backward(rule: _Rule, residuals: Any, dy: Array) -> tuple[Any, None, None, Array]:
    w, idx, count, a = residuals
    return _outer(w, idx, count, a, dy), None, None, _matvec(rule, w, idx, count, dy)


_matvec.defvjp(lambda *args: (_matvec(*args), args[1:]), _matvec_backward)
_vecmat.defvjp(lambda *args: (_vecmat(*args), args[1:]), _vecmat_backward)


def _outer(w: Array, idx: Array, count: ArrayLike, a: Array, x: Array) -> Array | None:
    """The gradient of w: `a_c x` is added to the row of every entry c."""
    if w.dtype == jnp.uint16:
        return None
    rows = jnp.where(active(idx, count), idx, w.shape[0])
    dw = jnp.zeros(w.shape, a.dtype).at[rows].add(a[:, None] * x[None, :], mode="drop")
    return dw.astype(w.dtype)
