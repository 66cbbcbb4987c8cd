"""What the ops refuse, by the name of the argument."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int


def checked_list(idx: Any, count: Any) -> tuple[Int[Array, "c"], Int[Array, ""]]:
    """An index list and its length as int32.

    Raises:
      TypeError: one of them is not of integers.
      ValueError: idx is not a list, count not a scalar, or a count that is known is out of range.
    """
    for name, value in (("idx", idx), ("count", count)):
        if value is not None and not jnp.issubdtype(jnp.result_type(value), jnp.integer):
            raise TypeError(f"{name} must be of integers, not {jnp.result_type(value)}")
    if idx.ndim != 1:
        raise ValueError(f"idx has shape {idx.shape}; it must have one axis")
    capacity = idx.shape[0]
    if count is None:
        count = capacity
    if isinstance(count, int) and not 0 <= count <= capacity:
        raise ValueError(f"count is {count}; it must be in [0, {capacity}], the entries of idx")
    if jnp.ndim(count):
        raise ValueError(f"count has shape {jnp.shape(count)}; it must be a scalar")
    return idx.astype(jnp.int32), jnp.asarray(count).astype(jnp.int32)


def check_weights(name: str, w: Array, axes: str) -> None:
    """Refuses what is no array of weights with these axes.

    Raises:
      TypeError: neither floating point nor uint16.
      ValueError: another number of axes.
    """
    if not (jnp.issubdtype(w.dtype, jnp.floating) or w.dtype == jnp.uint16):
        raise TypeError(f"{name} must be floating point or uint16 bit patterns, not {w.dtype}")
    if w.ndim != len(axes.split()):
        raise ValueError(f"{name} has shape {w.shape}; it must be [{axes.replace(' ', ', ')}]")


def check_floating(name: str, value: Array) -> None:
    """Refuses what is not floating point.

    Raises:
      TypeError: it is not.
    """
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point, not {value.dtype}")


def check_shape(name: str, value: Array, shape: tuple[int, ...], of: str) -> None:
    """Refuses an array of another shape.

    Args:
      of: what the shape follows from.

    Raises:
      ValueError: it has another one.
    """
    if value.shape != shape:
        raise ValueError(f"{name} has shape {value.shape}; it must be {shape}, by {of}")
