"""Convolutional sparse coding: the vectors, the minimum by two ways, batches and bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import coding
from sparsejax.core import hard_threshold

admm = jax.jit(coding.csc_admm, static_argnames=("num_iters", "adapt_rho", "prox"))
fista = jax.jit(coding.csc_fista, static_argnames="num_iters")


def problem(side=10, width=11, kernels=3):
    filters = coding.normalise(jax.random.normal(jax.random.key(0), (3, 4, kernels)), axis=(0, 1))
    return jax.random.normal(jax.random.key(1), (side, width)), filters


@pytest.mark.vectors
def test_vectors(reference):
    case = reference("kernel_heterogeneity").whole()
    size = case["loggabor_size"]
    for kernel, (theta, b_theta, phase) in zip(
        np.moveaxis(case["loggabor_filters"], -1, 0),
        case["loggabor_theta_btheta_phase"],
        strict=True,
    ):
        got = coding.log_gabor(theta, b_theta, phase, size=size)
        np.testing.assert_allclose(got, kernel, rtol=1e-9, atol=1e-10)
    out, mean, norm = coding.local_contrast_normalise(
        jnp.asarray(case["lcn_image"]), n=case["lcn_n"]
    )
    np.testing.assert_allclose(out, case["lcn_out"], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(mean, case["lcn_mean"], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(norm, case["lcn_norm"], rtol=1e-9, atol=1e-10)
    image, filters = jnp.asarray(case["csc_image"]), jnp.asarray(case["filters"])
    lam = case["csc_lam"]
    fixed = {"rho": case["admm_rho"], "relax": case["admm_relax"], "num_iters": case["admm_iters"]}
    state = admm(image, filters, lam, **fixed)
    for got, name in ((state.x, "primal_x"), (state.y, "sparse_y"), (state.u, "scaled_dual_u")):
        np.testing.assert_allclose(got, case[f"admm_{name}"], rtol=1e-9, atol=1e-11)
    made = coding.csc_reconstruct(state.y, filters)
    np.testing.assert_allclose(made, case["admm_recon"], rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(coding.psnr(image, made), case["admm_psnr"], rtol=1e-9)
    np.testing.assert_allclose(coding.sparseness(state.y), case["admm_sparseness"], rtol=1e-9)
    state = admm(image, filters, lam, num_iters=1500, adapt_rho="relative")
    terms = coding.csc_objective(image, state.y, filters, lam)
    for got, name in zip(terms, ("data_term", "l1", "objective"), strict=True):
        np.testing.assert_allclose(got, case[f"optimal_{name}"], rtol=1e-7)
    state = admm(image, filters, lam, num_iters=case["port_iters"], adapt_rho="decreasing")
    np.testing.assert_allclose(state.x, case["port_primal_x"], rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(state.y, case["port_sparse_y"], rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(state.rho, case["port_final_rho"], rtol=1e-8)
    np.testing.assert_allclose(50 * lam + 1, case["port_initial_rho"])
    np.testing.assert_allclose(1 + 18.3 ** (np.log10(lam) + 1), case["port_rho_xi"], rtol=1e-9)
    learn = functools.partial(coding.online_dictionary_step, lam=lam, **fixed)
    once = learn(filters, image, 0)
    np.testing.assert_allclose(once, case["online_dictionary_after_1"], rtol=1e-9, atol=1e-11)
    twice = learn(once, jnp.roll(image, 3, axis=0), 1)
    np.testing.assert_allclose(twice, case["online_dictionary_after_2"], rtol=1e-9, atol=1e-11)
    assert case["online_eta"] == 100 / 1000


@pytest.mark.vectors
def test_the_minimum_by_two_ways(reference):
    """The published figure of 1500 adaptive iterations is above it."""
    case = reference("kernel_heterogeneity").whole()
    for name in case.names():
        case.ignore(name, reason="compared in test_vectors")
    image, filters = jnp.asarray(case["csc_image"]), jnp.asarray(case["filters"])
    for codes in (
        admm(image, filters, case["csc_lam"], rho=1.0, num_iters=3000).y,
        fista(image, filters, case["csc_lam"], num_iters=3000),
    ):
        terms = coding.csc_objective(image, codes, filters, case["csc_lam"])
        np.testing.assert_allclose(terms[2], 13.674905595, rtol=1e-7)
        assert float(terms[2]) < case["optimal_objective"]


def test_reconstruction_is_a_circular_convolution():
    _, filters = problem()
    codes = jax.random.normal(jax.random.key(2), (10, 11, 3))
    expected = sum(
        np.asarray(filters)[i, j] @ np.roll(np.asarray(codes), (i, j), axis=(0, 1))[..., None]
        for i in range(3)
        for j in range(4)
    )[..., 0]
    np.testing.assert_allclose(coding.csc_reconstruct(codes, filters), expected, atol=1e-4)


def test_images_of_a_batch_stop_by_themselves():
    image, filters = problem()
    batch = jnp.stack([image, 0.1 * image])
    settings = {"rho": 2.0, "num_iters": 300, "tol": 2e-3}
    state = admm(batch, filters, 0.3, **settings)
    assert int(state.num_iters_used.max()) < 300
    assert state.rho.shape == (2,)
    for i in (0, 1):
        alone = admm(batch[i], filters, 0.3, **settings)
        assert int(alone.num_iters_used) == int(state.num_iters_used[i])
        np.testing.assert_allclose(alone.y, state.y[i], atol=1e-4)
    full = admm(batch[0], filters, 0.3, num_iters=300, rho=2.0)
    np.testing.assert_allclose(full.y, state.y[0], atol=5e-2)
    assert int(full.num_iters_used) == 300


def test_other_penalties_and_gradients():
    image, filters = problem()
    state = admm(image, filters, 0.3, num_iters=20, prox=hard_threshold)
    assert 0 < float(coding.sparseness(state.y)) < 1
    assert bool(((jnp.abs(state.y) == 0) | (jnp.abs(state.y) > 0.05)).all())

    def loss(filters, lam):
        codes = coding.csc_admm(image, filters, lam, num_iters=5).y
        return jnp.sum(jnp.square(coding.csc_reconstruct(codes, filters) - image))

    slopes = jax.jit(jax.grad(loss, argnums=(0, 1)))(filters, 0.3)
    step = 1e-3
    numeric = (loss(filters, 0.3 + step) - loss(filters, 0.3 - step)) / (2 * step)
    np.testing.assert_allclose(slopes[1], numeric, rtol=2e-2)
    assert float(jnp.abs(slopes[0]).max()) > 0


def test_bfloat16_is_computed_in_float32():
    image, filters = problem()
    state = admm(image.astype(jnp.bfloat16), filters, 0.3, num_iters=10)
    assert state.y.dtype == jnp.bfloat16
    close = admm(image, filters, 0.3, num_iters=10).y
    np.testing.assert_allclose(state.y.astype(jnp.float32), close, atol=0.05)


def test_sharded_images(mesh):
    image, filters = problem()
    batch = jnp.stack([image * (i + 1) for i in range(4)])
    placed = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))
    got = admm(placed, filters, 0.3, num_iters=10)
    np.testing.assert_allclose(got.y, admm(batch, filters, 0.3, num_iters=10).y, atol=1e-5)


def test_learning_lowers_the_objective():
    image, filters = problem(16, 16)
    learn = jax.jit(functools.partial(coding.online_dictionary_step, lam=0.1, num_iters=30))
    learned = filters
    for step in range(8):
        learned = learn(learned, image, step)
    norms = jnp.linalg.norm(learned.reshape(12, -1), axis=0)
    np.testing.assert_allclose(norms, 1, rtol=1e-5)
    before, after = (
        coding.csc_objective(image, admm(image, d, 0.1, num_iters=200, rho=1.0).y, d, 0.1)[2]
        for d in (filters, learned)
    )
    assert float(after) < 0.95 * float(before)


def test_log_gabor_properties():
    """Zero median, largest entry 1, oriented; the narrow ones do not overflow."""
    angles = np.arange(4) * np.pi / 4
    filters = coding.log_gabor_dictionary(
        angles, np.asarray([np.pi / 36, 0.5]), np.asarray([0.0, np.pi / 2]), size=12
    )
    assert filters.shape == (12, 12, 16)
    assert bool(jnp.isfinite(filters).all())
    np.testing.assert_allclose(jnp.abs(filters).max((0, 1)), 1, rtol=1e-5)
    first = coding.log_gabor(angles[1], 0.5, 0.0, size=12)
    np.testing.assert_allclose(filters[..., 4 + 2], first, atol=1e-5)  # theta, bandwidth, phase
    spectrum = np.abs(np.fft.fft2(np.asarray(coding.log_gabor(0.0, 0.2, 0.0, size=12))))
    fx, fy = np.unravel_index(spectrum.argmax(), spectrum.shape)
    assert fy == 0
    assert fx in (4, 5, 7, 8)
    slope = jax.grad(lambda t: coding.log_gabor(t, 0.3, 0.0, size=12)[2, 3])(0.4)
    assert bool(jnp.isfinite(slope))


@pytest.mark.usefixtures("unchecked")
def test_errors():
    image, filters = problem()
    solve = functools.partial(coding.csc_admm, image, filters)
    with pytest.raises(ValueError, match=r"filters has shape \(3, 4, 3\) for images of 2 x 11"):
        coding.csc_admm(image[:2], filters, 0.1, num_iters=1)
    with pytest.raises(ValueError, match="lam is -1; it must not be negative"):
        solve(-1, num_iters=1)
    with pytest.raises(ValueError, match="rho is 0; it must be positive"):
        solve(0.1, num_iters=1, rho=0)
    with pytest.raises(ValueError, match=r"relax is 2; it must be in \(0, 2\)"):
        solve(0.1, num_iters=1, relax=2)
    with pytest.raises(ValueError, match="num_iters is 0; it must be at least 1"):
        solve(0.1, num_iters=0)
    with pytest.raises(ValueError, match="adapt_rho is 'auto'; allowed are None, relative"):
        solve(0.1, num_iters=1, adapt_rho="auto")
    with pytest.raises(ValueError, match="filters has a kernel of zeros, number 1"):
        coding.csc_admm(image, filters.at[..., 1].set(0), 0.1, num_iters=1)
    with pytest.raises(ValueError, match="image holds values that are not finite"):
        coding.csc_fista(image.at[0, 0].set(jnp.inf), filters, 0.1, num_iters=1)
    with pytest.raises(ValueError, match=r"codes have 2 maps for filters of shape \(3, 4, 3\)"):
        coding.csc_reconstruct(jnp.zeros((10, 11, 2)), filters)
    with pytest.raises(ValueError, match="size is 11; it must be even and at least 2"):
        coding.log_gabor(0.0, 0.3, 0.0, size=11)
    with pytest.raises(ValueError, match="b_theta is 0; it must be positive"):
        coding.log_gabor(0.0, 0, 0.0, size=12)
    with pytest.raises(ValueError, match="all must be positive"):
        coding.log_gabor_dictionary(np.zeros(1), np.zeros(1), np.zeros(1), size=12)
