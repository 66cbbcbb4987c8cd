"""The scaling law: constants found again, predictions beyond the fit, bad data refused."""

import numpy as np
import pytest

from experiments.harness import scaling_law
from experiments.harness.scaling_law import ScalingLaw, fit_scaling_law

TRUTH = ScalingLaw(E=1.7, a=400.0, alpha=0.34, b=410.0, beta=0.28, residual=0.0)
P, D = (x.ravel() for x in np.meshgrid(np.geomspace(1e7, 1e10, 6), np.geomspace(1e9, 1e12, 5)))


def test_constants_are_found_again():
    law = fit_scaling_law(P, D, TRUTH.predict(P, D))
    for name in ("E", "a", "alpha", "b", "beta"):
        assert getattr(law, name) == pytest.approx(getattr(TRUTH, name), rel=0.01)
    assert law.residual < 1e-5
    assert str(TRUTH) == "L = 1.7 + 400 P^-0.34 + 410 D^-0.28"
    assert TRUTH.predict(1e8, 1e10) == pytest.approx(1.7 + 400 * 1e8**-0.34 + 410 * 1e10**-0.28)


def test_noise_and_an_outlier_leave_the_prediction_beyond_the_fit_good():
    rng = np.random.default_rng(0)
    fitted = ~((P > 1e9) & (D > 1e11))
    L = TRUTH.predict(P, D) * np.exp(rng.normal(0, 0.003, P.shape))
    L[np.flatnonzero(fitted)[3]] *= 1.3  # a run that went wrong
    law = fit_scaling_law(P[fitted], D[fitted], L[fitted])
    held_out = law.predict(P[~fitted], D[~fitted]) / TRUTH.predict(P[~fitted], D[~fitted])
    assert (~fitted).sum() == 4
    assert np.abs(held_out - 1).max() < 0.01
    assert 0.003 < law.residual < 0.1


def test_a_small_grid_as_a_laptop_has_it():
    p, d = (x.ravel() for x in np.meshgrid([3e4, 1e5, 2.5e5, 4e5], [5e4, 1.3e5, 3e5]))
    truth = ScalingLaw(E=0.9, a=40.0, alpha=0.4, b=20.0, beta=0.35, residual=0.0)
    law = fit_scaling_law(p, d, truth.predict(p, d))
    np.testing.assert_allclose(law.predict(8e5, 6e5), truth.predict(8e5, 6e5), rtol=1e-3)
    same = fit_scaling_law(p, d, truth.predict(p, d))
    assert law == same


def test_the_jacobian_is_that_of_the_residuals():
    rng = np.random.default_rng(1)
    x, y, target = rng.normal(size=(3, 12))
    for point in rng.normal(size=(4, 5)):
        for k in range(5):
            step = 1e-6 * np.eye(5)[k]
            up, down = (scaling_law._residuals(point + s, x, y, target) for s in (step, -step))
            column = scaling_law._jacobian(point, x, y, target)[:, k]
            np.testing.assert_allclose(column, (up - down) / 2e-6, rtol=1e-5, atol=1e-8)


def test_data_that_cannot_be_fitted_is_refused(unchecked):
    good = TRUTH.predict(P, D)
    for arguments, message in (
        ((P, D[:-1], good), r"shapes \(30,\), \(29,\) and \(30,\)"),
        ((P, -D, good), "D must be positive and finite"),
        ((P, D, np.where(P > 1e9, np.nan, good)), "L must be positive and finite"),
        ((np.minimum(P, P.min() * 1.1), D, good), "P has 2 values; the fit needs 3"),
        ((P, D * 0 + 5, good), "D has 1 values; the fit needs 3"),
        ((P[:4], np.geomspace(1, 2, 4), good[:4]), "there are 4 runs for 5 constants"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_scaling_law(*arguments)
