"""Coding rates: the vectors, gradients, both sides of the Gram matrix, and what a layer does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import coding

rates = jax.jit(coding.coding_rate, static_argnums=1)
subspace_rates = jax.jit(coding.subspace_coding_rate, static_argnums=2)


@pytest.mark.vectors
def test_vectors(reference):
    file = reference("crate")
    for case in file.cases("rr"):
        z, bases = jnp.asarray(case["z"]), jnp.asarray(case["bases"])
        eps2 = case["eps2"]
        np.testing.assert_allclose(coding.coding_rate(z, eps2), case["R"], rtol=1e-9)
        np.testing.assert_allclose(
            coding.subspace_coding_rate(z, bases, eps2), case["Rc"], rtol=1e-9
        )
        exact, first = case["grad_Rc"], case["grad_Rc_neumann1"]
        closed = coding.coding_rate_gradient(z, bases, eps2)
        np.testing.assert_allclose(closed, exact, rtol=1e-9, atol=1e-12)
        taken = jax.grad(coding.subspace_coding_rate)(z, bases, eps2)
        np.testing.assert_allclose(taken, exact, rtol=1e-9, atol=1e-12)
        series = coding.coding_rate_gradient(z, bases, eps2, order=1)
        np.testing.assert_allclose(series, first, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(
            jax.grad(coding.coding_rate)(z, eps2), case["grad_R"], rtol=1e-9, atol=1e-12
        )
    for case in file.cases("rate"):
        found = coding.projected_coding_rate(jnp.asarray(case["x_bhnd"]), case["eps"])
        np.testing.assert_allclose(found.mean(), case["mean"], rtol=1e-9)
        np.testing.assert_allclose(found.std(ddof=1), case["std"], rtol=1e-7)


def mixture(seed):
    """64 noisy unit tokens on four subspaces of six dimensions."""
    rng = np.random.default_rng(seed)
    d, heads, p = 48, 4, 6
    q, _ = np.linalg.qr(rng.normal(size=(d, heads * p)))
    bases = q.reshape(d, heads, p).transpose(1, 0, 2)
    tokens = np.concatenate([rng.normal(size=(16, p)) @ u.T for u in bases])
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    tokens += 0.05 * rng.normal(size=tokens.shape)
    return jnp.asarray(tokens / np.linalg.norm(tokens, axis=1, keepdims=True)), jnp.asarray(bases)


def descent(z, bases, direction):
    """The rate along eight steps."""
    seen = [float(coding.subspace_coding_rate(z, bases, 0.05))]
    for _ in range(8):
        z = direction(z)
        seen.append(float(coding.subspace_coding_rate(z, bases, 0.05)))
    return np.asarray(seen)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_exact_gradient_lowers_the_rate_and_its_first_order_series_does_not(x64, seed):
    z, bases = mixture(seed)
    alpha = 6 / (64 * 0.05)

    def by(order):
        gradient = lambda z: coding.coding_rate_gradient(z, bases, 0.05, order=order)  # noqa: E731
        return descent(z, bases, lambda z: z - 0.5 / alpha * gradient(z))

    exact, series = by(None), by(1)
    assert (np.diff(exact) < 0).all()
    assert 18 < exact[0] < 21
    assert exact[-1] < 5
    assert series[1] > series[0]

    def softmax_form(z):
        w = jnp.einsum("nd,kdp->knp", z, bases)
        weights = jax.nn.softmax(jnp.einsum("knp,kmp->knm", w, w), axis=-1)
        return 0.5 * z + 0.5 * jnp.einsum("knm,kmp,kdp->nd", weights, w, bases)

    attention = descent(z, bases, softmax_form)
    assert (np.diff(attention) < 0).all()
    assert attention[-1] < 1


def test_the_smaller_side_gives_the_same(x64):
    """More tokens than features and the reverse, against the plain determinant."""
    for n, d in ((7, 3), (3, 7)):
        z = jax.random.normal(jax.random.key(n), (2, n, d))
        expected = [
            0.5 * np.linalg.slogdet(np.eye(n) + d / (n * 0.3) * np.asarray(t) @ np.asarray(t).T)[1]
            for t in z
        ]
        np.testing.assert_allclose(rates(z, 0.3), expected, rtol=1e-9)


def test_more_terms_of_the_series_come_closer(x64):
    z = 0.03 * jax.random.normal(jax.random.key(0), (5, 8))
    bases = jax.random.normal(jax.random.key(1), (2, 8, 3)) / 3
    exact = coding.coding_rate_gradient(z, bases, 1.0)
    gaps = [
        float(jnp.abs(coding.coding_rate_gradient(z, bases, 1.0, order=k) - exact).max())
        for k in (0, 1, 2, 4)
    ]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-6


def test_bfloat16_is_measured_in_float32():
    z = jax.random.normal(jax.random.key(0), (4, 6)).astype(jnp.bfloat16)
    found = rates(z, 0.1)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, rates(z.astype(jnp.float32), 0.1), rtol=1e-6)
    assert coding.coding_rate_gradient(z, jnp.ones((1, 6, 2)), 0.1).dtype == jnp.bfloat16


def test_a_row_of_zeros_costs_nothing_and_has_a_gradient():
    w = jax.random.normal(jax.random.key(0), (2, 3, 4)).at[:, 0].set(0)
    rate, slope = jax.value_and_grad(coding.projected_coding_rate)(w, 0.01)
    others = coding.projected_coding_rate(w[:, 1:], 0.015)  # the same p / (n eps)
    np.testing.assert_allclose(rate, others, rtol=1e-5)
    assert bool(jnp.isfinite(slope).all())


def test_sparse_rate_reduction():
    z, bases = jax.random.normal(jax.random.key(0), (2, 5, 4)), jnp.eye(4)[None]
    z = z.at[:, :, 1].set(0)
    gain = rates(z, 0.5) - subspace_rates(z, bases, 0.5)
    l0 = coding.sparse_rate_reduction(z, bases, 0.5, 0.1)
    np.testing.assert_allclose(l0, gain - 0.1 * 15, rtol=1e-5)
    l1 = coding.sparse_rate_reduction(z, bases, 0.5, 0.1, norm="l1")
    np.testing.assert_allclose(l1, gain - 0.1 * jnp.abs(z).sum((1, 2)), rtol=1e-5)
    mapped = jax.vmap(lambda z: coding.sparse_rate_reduction(z, bases, 0.5, 0.1))(z)
    np.testing.assert_allclose(mapped, l0, rtol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_errors():
    z, bases = jnp.ones((3, 4)), jnp.ones((2, 4, 2))
    with pytest.raises(ValueError, match="eps2 is 0; it must be positive"):
        coding.coding_rate(z, 0)
    with pytest.raises(ValueError, match="eps is -1; it must be positive"):
        coding.projected_coding_rate(bases, -1)
    with pytest.raises(ValueError, match=r"bases has shape \(2, 3, 2\) for 4 features"):
        coding.subspace_coding_rate(z, bases[:, :3], 1.0)
    with pytest.raises(ValueError, match="norm is 'l2'; allowed are 'l0' and 'l1'"):
        coding.sparse_rate_reduction(z, bases, 1.0, 0.1, norm="l2")
    with pytest.raises(ValueError, match="order is -1; it must be at least 0, or None"):
        coding.coding_rate_gradient(z, bases, 1.0, order=-1)
