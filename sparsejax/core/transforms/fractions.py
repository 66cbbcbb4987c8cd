"""Shares of a count in double precision, without double precision on the device.

`int(share * count)` in float32 can differ by one from the float64 of the published code. Here the
share is a fixed-point number made on the host and the product is made of integers, so that the
result is that of float64, its rounding included.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, UInt32

_DIGITS, _BASE = 6, 16  # 96 bits hold any double in [2^-44, 1); counts below 2^31 turn less into 0


class ExactFraction(NamedTuple):
    """A float64 in [0, 1) as digits of 16 bits, the least significant first."""

    digits: UInt32[Array, "6"]


def exact_fraction(value: float) -> ExactFraction:
    """Turns a Python number into an `ExactFraction`.

    Raises:
      ValueError: a value outside [0, 1).
    """
    return ExactFraction(jnp.asarray(_digits(value)))


def fraction_table(
    drop: Callable[[int], Any], steps: Sequence[int]
) -> Callable[[Any], ExactFraction]:
    """Evaluates a schedule on the host, in float64, at equally spaced steps.

    Args:
      drop: Python step -> share in [0, 1).
      steps: where it is needed, a range.

    Returns:
      Traced step -> share at that step, for `dynamic_sparsity`; steps must be those of the range.

    Raises:
      ValueError: an empty range, or naming the step whose share is outside [0, 1).
    """
    if not steps:
        raise ValueError("steps is empty: there is no share to tabulate")
    first, every = steps[0], steps[1] - steps[0] if len(steps) > 1 else 1
    rows = []
    for step in steps:
        try:
            rows.append(_digits(float(drop(step))))
        except ValueError as error:
            raise ValueError(f"drop at step {step}: {error}") from error
    table = np.stack(rows)

    def at(step: Any) -> ExactFraction:
        row = (jnp.asarray(step, jnp.int32) - first) // every
        return ExactFraction(jnp.take(jnp.asarray(table), row, axis=0, mode="clip"))

    return at


def floor_product(fraction: ExactFraction, count: Int[Array, ""]) -> Int[Array, ""]:
    """`int(fraction * count)` as float64 gives it.

    Args:
      fraction: of a float64 in [0, 1).
      count: in [0, 2^31); may be traced.

    >>> floor_product(exact_fraction(0.3), jnp.int32(10))  # 2.9999999999999999 rounds to 3
    Array(3, dtype=int32)
    """
    low_half = jnp.uint32(0xFFFF)
    digits = [fraction.digits[i] for i in range(_DIGITS)]
    n = count.astype(jnp.uint32)
    product = [jnp.zeros((), jnp.uint32)] * (_DIGITS + 2)
    for shift, factor in enumerate((n & low_half, n >> _BASE)):
        carry = jnp.zeros((), jnp.uint32)
        for i, digit in enumerate(digits):  # at most (2^16 - 1)^2 + 2 (2^16 - 1) = 2^32 - 1
            total = digit * factor + product[i + shift] + carry
            product[i + shift], carry = total & low_half, total >> _BASE
        product[_DIGITS + shift] = product[_DIGITS + shift] + carry
    whole = product[_DIGITS] | (product[_DIGITS + 1] << _BASE)
    # Float64 rounds up to whole + 1 what is nearer to it than half a unit in its last place, which
    # is 2^(bits of whole - 54): the complement of the fraction has no bit from there on.
    # (Ties go up too: whole + 1 is even in units of the last place.)
    free = (_DIGITS * _BASE - 54) + (32 - lax.clz(whole).astype(jnp.int32))
    short = jnp.zeros((), jnp.uint32)
    for i in range(_DIGITS):
        shift = jnp.clip(free - i * _BASE, 0, _BASE).astype(jnp.uint32)
        short = short | ((low_half - product[i]) >> shift)
    return (whole + (short == 0).astype(jnp.uint32)).astype(jnp.int32)


def _digits(value: float) -> np.ndarray:
    if not 0 <= value < 1:
        raise ValueError(f"the share is {value}; it must be in [0, 1)")
    numerator, denominator = float(value).as_integer_ratio()
    fixed = (numerator << (_DIGITS * _BASE)) // denominator
    digits = [(fixed >> (_BASE * i)) & 0xFFFF for i in range(_DIGITS)]
    return np.asarray(digits, np.uint32)
