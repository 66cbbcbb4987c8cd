"""Log-Gabor kernels of controlled bandwidth, and dictionaries of them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsejax.coding.checks import Scalar
from sparsejax.core.selection import is_concrete


def log_gabor(
    theta: Scalar,
    b_theta: Scalar,
    phase: Scalar,
    *,
    size: int,
    sf0: Scalar = 0.4,
    b_sf: Scalar = 0.4,
) -> Float[Array, "n n"]:
    """An oriented band-pass kernel whose spectrum is a Gaussian over the logarithm of frequency.

    One-sided (no mirrored lobe), windowed to a disc, of zero median and largest entry 1 in size.
    Differentiated in all but size; `vmap` over the parameters.

    Args:
      theta: orientation in radians. b_theta: bandwidth of the orientation, a von Mises density's.
      phase: 0 is even, pi / 2 odd. size: side in pixels, even.
      sf0: centre in cycles per pixel. b_sf: width in the logarithm of frequency.

    Raises:
      ValueError: size not positive and even, or a known b_theta, sf0 or b_sf that is not positive.

    Source: Fischer et al., Self-invertible 2D log-Gabor wavelets (2007), and the library LogGabor.

    >>> log_gabor(0.0, 0.3, 0.0, size=12).shape
    (12, 12)
    """
    if size < 2 or size % 2:
        raise ValueError(f"size is {size}; it must be even and at least 2")
    for name, value in (("b_theta", b_theta), ("sf0", sf0), ("b_sf", b_sf)):
        if is_concrete(value) and not float(value) > 0:
            raise ValueError(f"{name} is {value}; it must be positive")
    dtype = jnp.result_type(*(jnp.asarray(v, float) for v in (theta, b_theta, phase)))
    places = (np.arange(size) - size // 2) / size
    fx, fy = np.meshgrid(places, places, indexing="ij")
    square = fx**2 + fy**2
    f = np.sqrt(np.where(square == 0, 1e-12, square))
    angle = np.arctan2(fy, fx)
    low, high = 1 - np.exp(-(f**2) / (2 * (0.5 / size) ** 2)), 1 - np.exp((f - 0.5) / 0.035)
    mask = jnp.asarray(low * high * (f < 0.5) / f, dtype)
    radial = jnp.exp(-(jnp.log(jnp.asarray(f, dtype) / sf0) ** 2) / (2 * b_sf**2))
    # the largest exponent is taken off: it reaches 131 at 5 degrees, and the scale cancels
    oriented = jnp.exp((jnp.cos(jnp.asarray(angle, dtype) - theta) - 1) / b_theta**2)
    envelope = mask * radial * oriented
    envelope = envelope / jnp.sqrt(jnp.mean(jnp.square(envelope))) * math.sqrt(2)
    # translation to the centre: its exponents are whole multiples of pi
    signs = jnp.asarray(np.where((np.add.outer(*2 * [np.arange(size)])) % 2, -1.0, 1.0), dtype)
    turned = [envelope * signs * part(jnp.asarray(phase, dtype)) for part in (jnp.cos, jnp.sin)]
    spectrum = jax.lax.complex(turned[0], -turned[1])
    kernel = jnp.real(jnp.fft.ifft2(jnp.fft.ifftshift(spectrum)))
    kernel = kernel * jnp.asarray(circular_window(size), dtype)
    kernel = kernel - jnp.median(kernel)
    return kernel / jnp.max(jnp.abs(kernel))


def circular_window(size: int) -> Float[np.ndarray, "n n"]:
    """1 at the centre of a square, falling to 0 on its inscribed circle and beyond.

    Raises:
      ValueError: size below 2.

    >>> circular_window(3).tolist()
    [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    if size < 2:
        raise ValueError(f"size is {size}; it must be at least 2")
    radius = np.hypot(*np.meshgrid(*2 * [np.linspace(-1, 1, size)]))
    return np.where(radius < 1, ((np.cos(np.pi * radius) + 1) / 2).clip(0) ** (1 / 3), 0)


def log_gabor_dictionary(
    thetas: Float[Array, "t"] | np.ndarray,
    b_thetas: Float[Array, "b"] | np.ndarray,
    phases: Float[Array, "p"] | np.ndarray,
    *,
    size: int,
) -> Float[Array, "h w m"]:
    """Kernels of all combinations; the phase changes fastest, the orientation slowest.

    Kernels are not of equal norm; `normalise(..., axis=(0, 1))` makes them so.

    Raises:
      ValueError: as `log_gabor`.

    >>> log_gabor_dictionary(np.zeros(3), np.ones(2), np.zeros(2), size=8).shape
    (8, 8, 12)
    """
    grid = np.meshgrid(thetas, b_thetas, phases, indexing="ij")
    theta, b_theta, phase = (jnp.asarray(g.reshape(-1), float) for g in grid)
    if not (np.asarray(b_thetas) > 0).all():
        raise ValueError(f"b_thetas are {b_thetas}; all must be positive")
    build = jax.vmap(lambda *each: log_gabor(*each, size=size), out_axes=-1)
    return build(theta, b_theta, phase)
