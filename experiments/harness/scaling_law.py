"""The scaling law L(P, D) = E + a P^-alpha + b D^-beta, fitted to losses of several runs.

P counts parameters, D tokens; E is the loss that neither can remove.
"""

import dataclasses
import itertools

import numpy as np
import scipy.optimize
from jaxtyping import Float
from scipy.special import logsumexp, softmax

HUBER = 1e-3  # residuals of log L beyond it count linearly: an outlier bends the law little
FEWEST = 3  # sizes, and budgets: with two, an exponent and E cannot be told apart

LARGEST_LOG_EXPONENT = 5  # far beyond any law; larger ones overflow on the way of a search


@dataclasses.dataclass(frozen=True)
class ScalingLaw:
    """A fitted law.

    Attributes:
      E, a, alpha, b, beta: its constants, all positive.
      residual: root mean square of log L's residuals over the points of the fit.
    """

    E: float
    a: float
    alpha: float
    b: float
    beta: float
    residual: float

    def predict(
        self, P: Float[np.ndarray, "*n"] | float, D: Float[np.ndarray, "*n"] | float
    ) -> Float[np.ndarray, "*n"]:
        """The loss of P parameters after D tokens."""
        P, D = np.asarray(P, np.float64), np.asarray(D, np.float64)
        return self.E + self.a * P**-self.alpha + self.b * D**-self.beta

    def __str__(self) -> str:
        return (
            f"L = {self.E:.3g} + {self.a:.3g} P^-{self.alpha:.3g} + {self.b:.3g} D^-{self.beta:.3g}"
        )


def fit_scaling_law(
    P: Float[np.ndarray, "*runs"], D: Float[np.ndarray, "*runs"], L: Float[np.ndarray, "*runs"]
) -> ScalingLaw:
    """Fits the law by robust least squares from several starts; the best end is kept.

    All five constants are exponentials of what is optimised, so they are positive; the sum of Huber
    losses of log L's residuals is minimised. Deterministic.

    Args:
      P: parameters, D: tokens, L: loss of each run; several seeds are several runs.

    Raises:
      ValueError: arrays of other lengths, values that are not positive and finite, fewer than
        three sizes or three budgets, or fewer runs than constants.

    Source: Hoffmann et al., Training compute-optimal large language models (2022), the third
    approach, with a trust-region solver instead of L-BFGS.
    """
    P, D, L = (np.asarray(x, np.float64) for x in (P, D, L))
    if P.ndim != 1 or not P.shape == D.shape == L.shape:
        raise ValueError(f"P, D and L have shapes {P.shape}, {D.shape} and {L.shape}")
    for name, x in (("P", P), ("D", D), ("L", L)):
        if not np.all(np.isfinite(x) & (x > 0)):
            raise ValueError(f"{name} must be positive and finite")
    for name, x in (("P", P), ("D", D)):
        if len(np.unique(x)) < FEWEST:
            raise ValueError(f"{name} has {len(np.unique(x))} values; the fit needs {FEWEST}")
    if len(L) < 5:
        raise ValueError(f"there are {len(L)} runs for 5 constants")
    # centred, so that amplitudes and exponents are nearly independent
    centre_p, centre_d = np.log(P).mean(), np.log(D).mean()
    x, y, target = np.log(P) - centre_p, np.log(D) - centre_d, np.log(L)
    ends = [
        scipy.optimize.least_squares(
            _residuals, start, _jacobian,  # type: ignore[arg-type]
            args=(x, y, target), loss="huber", f_scale=HUBER,
            xtol=1e-12, ftol=1e-12, gtol=1e-15, max_nfev=100,
        )
        for start in _starts(L)
    ]  # fmt: skip
    best = min(ends, key=lambda end: end.cost).x
    E, a, b, alpha, beta = np.exp(best)
    rms = float(np.sqrt(np.mean(_residuals(best, x, y, target) ** 2)))
    a, b = a * np.exp(alpha * centre_p), b * np.exp(beta * centre_d)
    return ScalingLaw(float(E), float(a), float(alpha), float(b), float(beta), rms)


def _starts(L: np.ndarray) -> list[np.ndarray]:
    """Logs of E, of both terms at the centre, and of both exponents."""
    starts = []
    for share, alpha, beta in itertools.product((0.3, 0.9), (0.1, 0.4, 1.0), (0.1, 0.4, 1.0)):
        floor = share * L.min()
        half = (L.mean() - floor) / 2
        starts.append(np.log([floor, half, half, alpha, beta]))
    return starts


def _log_terms(log_constants: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    log_e, log_a, log_b, log_alpha, log_beta = log_constants
    alpha, beta = np.exp(np.minimum([log_alpha, log_beta], LARGEST_LOG_EXPONENT))
    return np.stack([np.full_like(x, log_e), log_a - alpha * x, log_b - beta * y])


def _residuals(
    log_constants: np.ndarray, x: np.ndarray, y: np.ndarray, target: np.ndarray
) -> np.ndarray:
    return logsumexp(_log_terms(log_constants, x, y), axis=0) - target


def _jacobian(
    log_constants: np.ndarray, x: np.ndarray, y: np.ndarray, target: np.ndarray
) -> np.ndarray:
    e, a, b = softmax(_log_terms(log_constants, x, y), axis=0)
    alpha, beta = np.exp(np.minimum(log_constants[3:], LARGEST_LOG_EXPONENT))
    return np.stack([e, a, b, -alpha * x * a, -beta * y * b], axis=1)
