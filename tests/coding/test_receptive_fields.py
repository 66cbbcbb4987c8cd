"""Images made ready, metrics of codes, selectivity and Gabor fits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import coding


@pytest.mark.vectors
def test_whitening_vector(reference):
    case = reference("beyond_l1").whole()
    for name in case.names():
        if not name.startswith("whiten"):
            case.ignore(name, reason="tests/coding/test_solvers.py")
    got = coding.whiten(jnp.asarray(case["whiten_image"]), f0=case["whiten_f0"])
    np.testing.assert_allclose(got, case["whiten_out"], rtol=1e-9, atol=1e-12)


def test_whitening_flattens_a_falling_spectrum():
    """An image whose spectrum falls as 1 / f, as photographs' do, comes out flat up to f0."""
    rng = np.random.default_rng(0)
    f = np.hypot(*np.meshgrid(*2 * [np.fft.fftfreq(64)], indexing="ij"))
    phases = np.fft.fft2(rng.normal(size=(64, 64)))
    phases /= np.abs(phases)
    pink = np.real(np.fft.ifft2(phases / np.maximum(f, 1 / 64)))
    for out in (coding.whiten(jnp.asarray(pink, jnp.float32)),
                coding.spectral_whiten(jnp.asarray(pink, jnp.float32), alpha=1.0)):  # fmt: skip
        power = np.abs(np.fft.fft2(np.asarray(out)))
        low, middle, high = (power[(f > a) & (f < b)].mean()
                             for a, b in ((0.05, 0.1), (0.15, 0.2), (0.6, 0.8)))  # fmt: skip
        assert 0.8 < low / middle < 1.2
        assert high < 0.1 * middle


def test_contrast_does_not_change_a_normalised_image():
    image = jax.random.uniform(jax.random.key(0), (20, 24))
    out, mean, norm = coding.local_contrast_normalise(image, n=3)
    scaled, _, _ = coding.local_contrast_normalise(5 * image + 2, n=3)
    np.testing.assert_allclose(out, scaled, atol=1e-4)
    np.testing.assert_allclose(out * norm + mean, image, atol=1e-5)
    flat, _, _ = coding.local_contrast_normalise(jnp.ones((8, 8)), n=2)
    assert float(jnp.abs(flat).max()) < 1.1


def test_metrics():
    codes = jnp.zeros((2000, 3)).at[0, 0].set(1.0).at[:5, 1].set(-2.0)
    assert int(coding.pool_size(codes)) == 1
    np.testing.assert_allclose(coding.density(codes), 6 / 6000)
    assert float(coding.excess_kurtosis(codes)) > 100
    normal = jax.random.normal(jax.random.key(0), (400, 100))
    assert abs(float(coding.excess_kurtosis(normal))) < 0.1
    assert float(coding.relative_error(normal, jnp.eye(100), 0 * normal)) == 1.0


def test_selectivity_of_gratings():
    """A cell tuned to one orientation against one that answers all."""
    angles = np.arange(18) * np.pi / 18
    images = coding.gratings(12, angles, np.arange(8) * np.pi / 4, np.asarray([0.1, 0.2]))
    np.testing.assert_allclose(np.linalg.norm(images, axis=-1), 1)
    tuned = images[5, 0, 1]
    responses = np.abs(images @ tuned).max(axis=(1, 2))
    assert int(responses.argmax()) == 5
    pair = jnp.asarray(np.stack([responses, np.ones(18), np.zeros(18)]), jnp.float32)
    found = coding.orientation_selectivity(pair, angles)
    assert float(found[0]) > 0.3
    np.testing.assert_allclose(found[1:], 0, atol=1e-6)


@pytest.mark.parametrize("phase", [0.0, 1.0, np.pi / 2])
def test_a_gabor_function_is_found_again(phase):
    rows, columns = np.mgrid[:12, :12].astype(float)
    angle, frequency, along, across = 2.1, 0.17, 1.9, 2.6
    dx, dy = columns - 5.2, rows - 6.1
    a, b = dx * np.cos(angle) + dy * np.sin(angle), -dx * np.sin(angle) + dy * np.cos(angle)
    atom = np.exp(-(a**2) / (2 * along**2) - b**2 / (2 * across**2))
    atom *= np.cos(2 * np.pi * frequency * a + phase)
    found = coding.gabor_fit(atom)
    assert found.r2 > 0.999
    assert found.angle == pytest.approx(angle, abs=0.02)
    assert found.frequency == pytest.approx(frequency, abs=0.005)
    assert found.phase == pytest.approx(phase, abs=0.05)
    assert (found.row, found.column) == pytest.approx((6.1, 5.2), abs=0.1)
    assert found.widths == pytest.approx((along * frequency, across * frequency), abs=0.02)


def test_noise_is_no_gabor_function():
    assert coding.gabor_fit(np.random.default_rng(0).normal(size=(10, 10))).r2 < 0.8


@pytest.mark.usefixtures("unchecked")
def test_errors():
    with pytest.raises(ValueError, match="f0 is 0; it must be positive"):
        coding.whiten(jnp.ones((4, 4)), f0=0)
    with pytest.raises(ValueError, match=r"alpha is -1 and f0 is 0.4; both must be positive"):
        coding.spectral_whiten(jnp.ones((4, 4)), alpha=-1)
    with pytest.raises(ValueError, match=r"n is 9; it must be from 1 to the side of the image"):
        coding.local_contrast_normalise(jnp.ones((8, 8)), n=9)
    with pytest.raises(ValueError, match="side is 1; it must be at least 2"):
        coding.gratings(1, np.zeros(1), np.zeros(1), np.ones(1))
    with pytest.raises(ValueError, match="responses are at 3 angles; angles has 4"):
        coding.orientation_selectivity(jnp.ones((2, 3)), np.zeros(4))
    with pytest.raises(ValueError, match=r"atom has shape \(4, 5\); it must be square"):
        coding.gabor_fit(np.ones((4, 5)))
    with pytest.raises(ValueError, match="atom is constant or not finite"):
        coding.gabor_fit(np.ones((5, 5)))
