"""Shares of a count: every product is that of float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax as sj
from sparsejax.core.transforms import floor_product

products = jax.jit(jax.vmap(floor_product))


def assert_equals_float64(shares, counts):
    shares, counts = np.asarray(shares, float), np.asarray(counts)
    made = [sj.exact_fraction(float(share)).digits for share in shares]
    got = products(sj.ExactFraction(jnp.stack(made)), jnp.asarray(counts, jnp.int32))
    wanted = [int(share * count) for share, count in zip(shares, counts)]
    np.testing.assert_array_equal(got, wanted)


def test_random_shares_of_random_counts():
    rng = np.random.default_rng(0)
    shares = rng.random(300) ** rng.choice([1, 4, 40], 300)
    assert_equals_float64(shares, (2 ** (31 * rng.random(300))).astype(int))


def test_products_that_are_whole_up_to_rounding():
    """Where the exact product is below a whole number and its float64 may not be."""
    rng = np.random.default_rng(1)
    below = rng.choice([10, 1000, 10**6, 2**31 - 1], 500)
    shares = rng.integers(0, below) / below
    shares = np.where(rng.random(500) < 0.5, np.nextafter(shares, rng.integers(0, 2, 500)), shares)
    shares = np.clip(shares, 0, np.nextafter(1, 0))
    counts = below * rng.integers(1, (2**31 - 1) // below + 1)
    exact = [p * int(n) // q for (p, q), n in zip(map(float.as_integer_ratio, shares), counts)]
    rounded = sum(e != int(s * n) for e, s, n in zip(exact, shares, counts))
    assert rounded > 20
    assert_equals_float64(shares, counts)


def test_the_ends_of_the_range():
    largest = 2**31 - 1
    assert_equals_float64(
        [0.0, 0.0, 0.3, np.nextafter(1, 0), np.nextafter(1, 0), 5e-324, 2.0**-31, 2.0**-30],
        [0, largest, 10, 1, largest, largest, largest, largest],
    )


def test_a_table_is_the_schedule_at_its_steps():
    table = sj.fraction_table(lambda t: t / 40, range(6, 31, 6))
    for step in range(6, 31, 6):
        wanted = sj.exact_fraction(step / 40).digits
        np.testing.assert_array_equal(jax.jit(table)(step).digits, wanted)
    alone = sj.fraction_table(lambda t: 0.25, range(3, 4, 9))
    np.testing.assert_array_equal(alone(jnp.int32(3)).digits, sj.exact_fraction(0.25).digits)


def test_errors_name_argument_and_range():
    for value in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=rf"share is {value}; it must be in \[0, 1\)"):
            sj.exact_fraction(value)
    with pytest.raises(ValueError, match=r"drop at step 4: the share is 1\.0; it must be in"):
        sj.fraction_table(lambda t: t / 4, range(0, 9, 4))
    with pytest.raises(ValueError, match="steps is empty"):
        sj.fraction_table(lambda t: 0.5, range(0))
