"""What atoms look like and do: images made ready, selectivity for orientation, Gabor fits.

Sources: Olshausen and Field (1996); Beyond l1 sparse coding in V1 (2023, arXiv 2301.10002); Kernel
Heterogeneity Improves Sparseness of Natural Images Representations (2023).
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsejax.core.dtypes import widen


def whiten(image: Float[Array, "h w"], *, f0: float = 0.4) -> Float[Array, "h w"]:
    """Flattens the spectrum of a photograph: `|f| exp(-(|f| / f0)^4)` in the Fourier domain.

    Circular, f in cycles per pixel. Differentiated.

    Raises:
      ValueError: f0 is not positive.

    >>> float(jnp.abs(whiten(jnp.ones((4, 4)))).max())
    0.0
    """
    if not f0 > 0:
        raise ValueError(f"f0 is {f0}; it must be positive")
    f = _frequencies(image.shape)
    return _filtered(image, f * np.exp(-((f / f0) ** 4)))


def spectral_whiten(
    image: Float[Array, "h w"], *, alpha: float = 1.4, f0: float = 0.4
) -> Float[Array, "h w"]:
    """As `whiten` with `f^alpha`, the filter divided by its mean over all frequencies.

    Raises:
      ValueError: alpha or f0 is not positive.

    >>> float(jnp.abs(spectral_whiten(jnp.ones((4, 4)))).max())
    0.0
    """
    if not (alpha > 0 and f0 > 0):
        raise ValueError(f"alpha is {alpha} and f0 is {f0}; both must be positive")
    f = _frequencies(image.shape)
    response = f**alpha * np.exp(-((f / f0) ** 4))
    return _filtered(image, response / response.mean())


def local_contrast_normalise(
    image: Float[Array, "h w"], *, n: int = 7
) -> tuple[Float[Array, "h w"], Float[Array, "h w"], Float[Array, "h w"]]:
    """Subtracts the local mean and divides by the local norm, floored by its mean over the frame.

    The surround is a Gaussian of `2 n + 1` pixels a side, out to 3 standard deviations; the edge of
    the image is mirrored. Differentiated.

    Returns:
      The result, the local mean, and the floored norm.

    Raises:
      ValueError: n below 1, or above a side of the image.

    >>> out, mean, norm = local_contrast_normalise(jnp.eye(8), n=2)
    >>> out.shape, round(float(mean[0, 0]), 2)
    ((8, 8), 0.67)
    """
    if not 1 <= n <= min(image.shape):
        raise ValueError(f"n is {n}; it must be from 1 to the side of the image {image.shape}")
    padded = jnp.pad(widen(image), n, mode="symmetric")
    line = np.exp(-(np.linspace(-3, 3, 2 * n + 1) ** 2) / 2)
    surround = np.zeros(padded.shape)
    surround[: 2 * n + 1, : 2 * n + 1] = np.outer(line, line) / line.sum() ** 2
    response = np.fft.rfft2(np.roll(surround, (-n, -n), axis=(0, 1)))

    def blurred(a: Array) -> Array:
        spectrum = jnp.fft.rfft2(a)
        return jnp.fft.irfft2(spectrum * jnp.asarray(response, spectrum.dtype), s=a.shape)

    mean = blurred(padded)
    centred = padded - mean
    # rounding may leave a sum of squares a little below zero
    norm = jnp.sqrt(jnp.maximum(blurred(jnp.square(centred)), 0))
    norm = jnp.maximum(norm, jnp.mean(norm))
    inner = (slice(n, -n), slice(n, -n))
    out = jnp.where(norm > 0, centred / jnp.where(norm > 0, norm, 1), 0)
    return tuple(a[inner].astype(image.dtype) for a in (out, mean, norm))  # type: ignore[return-value]


def relative_error(
    x: Float[Array, "b n"], dictionary: Float[Array, "n k"], codes: Float[Array, "b k"]
) -> Float[Array, ""]:
    """`sum ||x - a D^T||^2 / sum ||x||^2` over all rows.

    >>> relative_error(jnp.ones((1, 2)), jnp.eye(2), jnp.asarray([[1.0, 0.0]]))
    Array(0.5, dtype=float32)
    """
    return jnp.sum(jnp.square(x - codes @ dictionary.T)) / jnp.sum(jnp.square(x))


def density(codes: Float[Array, "b k"]) -> Float[Array, ""]:
    """The share of codes that are not 0.

    >>> density(jnp.asarray([[0.0, 1.0]]))
    Array(0.5, dtype=float32)
    """
    return jnp.mean((codes != 0).astype(widen(codes).dtype))


def pool_size(codes: Float[Array, "b k"], *, share: float = 1e-3) -> Int[Array, ""]:
    """How many atoms are in use: active on more than this share of the rows.

    >>> int(pool_size(jnp.asarray([[0.0, 1.0], [0.0, 0.5]])))
    1
    """
    used = jnp.mean((codes != 0).astype(jnp.float32), axis=0)
    return jnp.sum(used > share, dtype=jnp.int32)


def excess_kurtosis(codes: Float[Array, "b k"]) -> Float[Array, ""]:
    """The fourth standardised moment of all codes less that of a normal density, 3.

    >>> float(excess_kurtosis(jnp.asarray([[-1.0, 1.0]])))
    -2.0
    """
    centred = widen(codes) - jnp.mean(widen(codes))
    return jnp.mean(centred**4) / jnp.mean(centred**2) ** 2 - 3


def gratings(
    side: int,
    angles: Float[np.ndarray, "a"],
    phases: Float[np.ndarray, "p"],
    frequencies: Float[np.ndarray, "f"],
) -> Float[np.ndarray, "a p f n"]:
    """Sinusoids over a square patch of `side * side = n` pixels, of unit norm.

    Args:
      angles, phases: in radians; an angle is that of the direction in which the grating changes,
        from the axis of columns towards that of rows. frequencies: in cycles per pixel.

    Raises:
      ValueError: side below 2.

    >>> gratings(4, np.zeros(2), np.zeros(3), np.ones(1) / 4).shape
    (2, 3, 1, 16)
    """
    if side < 2:
        raise ValueError(f"side is {side}; it must be at least 2")
    row, column = np.mgrid[:side, :side].reshape(2, -1) - (side - 1) / 2
    along = np.cos(angles)[:, None] * column + np.sin(angles)[:, None] * row
    waves = 2 * np.pi * frequencies[:, None] * along[:, None, None]
    images = np.cos(waves + phases[:, None, None])
    return images / np.linalg.norm(images, axis=-1, keepdims=True)


def orientation_selectivity(
    responses: Float[Array, "*k a"], angles: Float[Array, "a"] | np.ndarray
) -> Float[Array, "*k"]:
    """`|sum R exp(2 i angle)| / sum R`, one less the circular variance; 0 where nothing responds.

    Args:
      responses: at least 0, at each angle, of each neuron. angles: in radians, over half a turn.

    Raises:
      ValueError: another number of angles than of responses.

    >>> orientation_selectivity(jnp.asarray([1.0, 0.0]), jnp.asarray([0.0, math.pi / 2]))
    Array(1., dtype=float32)
    """
    if responses.shape[-1] != len(angles):
        raise ValueError(f"responses are at {responses.shape[-1]} angles; angles has {len(angles)}")
    responses = widen(responses)
    twice = 2 * jnp.asarray(angles, responses.dtype)
    x, y = (jnp.sum(responses * f(twice), axis=-1) for f in (jnp.cos, jnp.sin))
    total = jnp.sum(responses, axis=-1)
    return jnp.where(total > 0, jnp.hypot(x, y) / jnp.where(total > 0, total, 1), 0)


@dataclasses.dataclass(frozen=True)
class GaborFit:
    """A Gabor function fitted to an atom.

    Attributes:
      row, column: the centre in pixels. angle: direction in which it changes, radians, in [0, pi).
      frequency: cycles per pixel. phase: radians. along, across: standard deviations in pixels, in
        that direction and across it. r2: the share of the atom's energy about its mean that it
        explains.
    """

    row: float
    column: float
    angle: float
    frequency: float
    phase: float
    along: float
    across: float
    r2: float

    @property
    def widths(self) -> tuple[float, float]:
        """`(along * frequency, across * frequency)`: the shape whatever the scale."""
        return self.along * self.frequency, self.across * self.frequency


def gabor_fit(atom: Float[np.ndarray, "s s"], *, starts: int = 4) -> GaborFit:
    """Fits `c exp(-a^2 / 2 along^2 - b^2 / 2 across^2) cos(2 pi f a + phase)` by least squares.

    On the host. Starts from the strongest frequencies of the spectrum, at the centre of the energy.

    Raises:
      ValueError: an atom that is not square, has a side below 4, is constant or not finite.

    >>> side = np.arange(8) - 3.5
    >>> atom = np.exp(-(side**2) / 8) * np.cos(np.pi / 2 * side)
    >>> round(gabor_fit(np.outer(np.exp(-(side**2) / 8), atom)).r2, 3)
    1.0
    """
    from scipy.optimize import least_squares

    if atom.ndim != 2 or atom.shape[0] != atom.shape[1] or len(atom) < 4:
        raise ValueError(f"atom has shape {atom.shape}; it must be square, of a side of 4 or more")
    values = np.asarray(atom, np.float64)
    spread = float(np.sum((values - values.mean()) ** 2))
    if not np.isfinite(spread) or not spread > 0:
        raise ValueError("atom is constant or not finite; there is nothing to fit")
    side = len(values)
    rows, columns = np.mgrid[:side, :side].astype(np.float64)
    scale = np.abs(values).max()

    def shape_of(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The even and the odd Gabor function; their amplitudes are solved for."""
        row, column, angle, frequency, along, across = p
        dx, dy = columns - column, rows - row
        a = dx * np.cos(angle) + dy * np.sin(angle)
        b = -dx * np.sin(angle) + dy * np.cos(angle)
        window = np.exp(-(a**2) / (2 * along**2) - b**2 / (2 * across**2))
        wave = 2 * np.pi * frequency * a
        return window * np.cos(wave), window * np.sin(wave)

    def solved(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        basis = np.stack([part.ravel() for part in shape_of(p)], axis=1)
        weights = np.linalg.lstsq(basis, values.ravel(), rcond=None)[0]
        return weights, basis @ weights - values.ravel()

    energy = values**2
    centre = [float(np.sum(energy * g) / energy.sum()) for g in (rows, columns)]
    spectrum = np.abs(np.fft.rfft2(values - values.mean(), s=(4 * side, 4 * side)))
    fy, fx = np.meshgrid(np.fft.fftfreq(4 * side), np.fft.rfftfreq(4 * side), indexing="ij")
    best = None
    lower = [-1.0, -1.0, -np.inf, 1 / (4 * side), 0.4, 0.4]
    upper = [side, side, np.inf, 0.5, 2.0 * side, 2.0 * side]
    for peak in _peaks(spectrum, starts, gap=2):
        frequency = float(np.clip(np.hypot(fx.flat[peak], fy.flat[peak]), 0.05, 0.45))
        angle = math.atan2(fy.flat[peak], fx.flat[peak])
        start = [*centre, angle, frequency, side / 5, side / 5]
        found = least_squares(lambda p: solved(p)[1] / scale, start, bounds=(lower, upper))
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    weights, residual = solved(best.x)
    row, column, angle, frequency, along, across = (float(v) for v in best.x)
    phase = math.atan2(-weights[1], weights[0])
    turns, angle = divmod(angle, math.pi)
    if turns % 2:
        phase = -phase
    r2 = 1 - float(np.sum(residual**2)) / spread
    return GaborFit(row, column, angle, frequency, phase, along, across, r2)


def _peaks(spectrum: np.ndarray, count: int, *, gap: int) -> list[int]:
    """Flat places of the strongest entries, none near another."""
    left, found = spectrum.copy(), []
    for _ in range(count):
        place = int(left.argmax())
        found.append(place)
        i, j = np.unravel_index(place, left.shape)
        left[max(0, i - gap) : i + gap + 1, max(0, j - gap) : j + gap + 1] = -1
    return found


def _frequencies(shape: tuple[int, ...]) -> np.ndarray:
    """Size of the frequency at each place of a full transform, cycles per pixel."""
    return np.hypot(*np.meshgrid(*(np.fft.fftfreq(side) for side in shape), indexing="ij"))


def _filtered(image: Array, response: np.ndarray) -> Array:
    spectrum = jnp.fft.fft2(widen(image))
    return jnp.real(jnp.fft.ifft2(spectrum * jnp.asarray(response, spectrum.dtype))).astype(
        image.dtype
    )
