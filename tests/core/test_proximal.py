"""Thresholding functions: they minimise what they say, and their gradients are finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax as sj

Z = jnp.concatenate([jnp.linspace(-4, 4, 81), jnp.asarray([0.0, 1e-9, 100.0])])
PENALTIES = {
    "soft_threshold": jnp.abs,
    "hard_threshold": lambda y: (y != 0).astype(y.dtype),
    "half_threshold": lambda y: jnp.sqrt(jnp.abs(y)),
    "two_thirds_threshold": lambda y: jnp.cbrt(y * y),
}


@pytest.mark.parametrize("t", [0.05, 0.5, 1.7])
@pytest.mark.parametrize("name", PENALTIES)
def test_it_minimises_its_objective(name, t, x64):
    z = jnp.asarray(np.linspace(-4, 4, 81))
    y = getattr(sj, name)(z, t)
    grid = jnp.asarray(np.linspace(-4.5, 4.5, 18001))
    penalty = PENALTIES[name]
    ours = 0.5 * (y - z) ** 2 + t * penalty(y)
    best = jnp.min(0.5 * (grid - z[:, None]) ** 2 + t * penalty(grid), axis=1)
    np.testing.assert_array_less(np.asarray(ours), np.asarray(best) + 1e-6)


@pytest.mark.parametrize("name", PENALTIES)
def test_laws(name):
    function = getattr(sj, name)
    np.testing.assert_allclose(function(Z, 0.0), Z, rtol=1e-6)
    np.testing.assert_allclose(function(-Z, 0.7), -function(Z, 0.7), rtol=1e-6)
    assert bool((jnp.abs(function(Z, 0.7)) <= jnp.abs(Z) + 1e-6).all())
    assert bool(jnp.isfinite(jax.vmap(jax.grad(lambda z: function(z, 0.7)))(Z)).all())
    assert function(Z.astype(jnp.bfloat16), 0.7).dtype == jnp.bfloat16
    np.testing.assert_allclose(jax.jit(function)(Z, jnp.float32(0.7)), function(Z, 0.7), rtol=1e-5)


def test_cel0_has_both_branches():
    norms = jnp.asarray([0.5, 2.0])
    z = jnp.stack([Z, Z], -1)
    y = sj.cel0_threshold(z, lam=0.3, step=0.5, norms=norms)
    hard = sj.hard_threshold(Z, 0.15)
    np.testing.assert_allclose(y[:, 1], hard)  # norm^2 * step >= 1
    shrunk = jnp.maximum(jnp.abs(Z) - jnp.sqrt(0.6) * 0.25, 0) / (1 - 0.125)
    wanted = jnp.sign(Z) * jnp.minimum(jnp.abs(Z), shrunk)
    np.testing.assert_allclose(y[:, 0], wanted, rtol=1e-6)


def test_groups_shrink_together():
    z = jax.random.normal(jax.random.key(0), (4, 6)).at[1].set(0.0)
    y = sj.group_soft_threshold(z, 1.0)
    norms = jnp.linalg.norm(z, axis=1)
    np.testing.assert_allclose(
        jnp.linalg.norm(y, axis=1), jnp.maximum(norms - 1, 0), rtol=1e-5, atol=1e-6
    )
    grads = jax.grad(lambda z: jnp.sum(sj.group_soft_threshold(z, 1.0) ** 2))(z)
    assert bool(jnp.isfinite(grads).all())
    np.testing.assert_array_equal(sj.nonnegative_soft_threshold(z, 0.5), jnp.maximum(z - 0.5, 0))


def test_negative_weights_are_refused():
    for name in (*PENALTIES, "nonnegative_soft_threshold", "group_soft_threshold"):
        with pytest.raises(ValueError, match=r"weight is -0\.5; it must not be negative"):
            getattr(sj, name)(Z, -0.5)
    with pytest.raises(ValueError, match="must not be negative"):
        sj.cel0_threshold(Z, lam=-1.0, step=1.0, norms=jnp.ones(Z.shape))
