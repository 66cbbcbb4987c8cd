"""Crops, dictionaries, and what their codes are like."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.harness.config import ExperimentError
from experiments.kernel_heterogeneity.config import MINIMUM, STUDY, CodingConfig, Config
from sparsejax import coding

THIN_WIDTH = (np.pi / 6) / 2.5
_PHASES = np.asarray([0, np.pi / 2])


def dictionaries(config: CodingConfig) -> dict[str, Float[Array, "h w m"]]:
    """The heterogeneous and the homogeneous dictionary, as generated and at unit norm."""
    few, many = config.orientations, config.orientations * config.bandwidths
    made = {
        "full": (np.arange(few) * np.pi / few, np.pi / 36 * np.arange(1, config.bandwidths + 1)),
        "thin": (np.arange(many) * np.pi / many, np.asarray([THIN_WIDTH])),
    }
    found = {}
    for name, (thetas, widths) in made.items():
        filters = coding.log_gabor_dictionary(thetas, widths, _PHASES, size=config.size)
        found[name] = filters
        found[f"{name}_unit"] = coding.normalise(filters, axis=(0, 1))
    return found


def draw_crops(
    config: Config, photos: list[np.ndarray], rng: np.random.Generator, count: int
) -> list[Float[np.ndarray, "h w"]]:
    """`count` uniform crops of each photo."""
    side, found = config.crop, []
    for image in photos:
        if min(image.shape) < side:
            raise ExperimentError(f"crop is {side}; an image has {image.shape} pixels")
        for _ in range(count):
            top, left = (int(rng.integers(extent - side + 1)) for extent in image.shape)
            found.append(image[top : top + side, left : left + side])
    return found


def normalised(crops: list[np.ndarray]) -> Float[np.ndarray, "n h w"]:
    """Crops with their local contrast normalised."""
    normalise = jax.jit(lambda x: coding.local_contrast_normalise(x)[0])
    return np.stack([np.asarray(normalise(crop)) for crop in crops])


@functools.partial(jax.jit, static_argnames=("solver", "config"))
def encode(
    images: Float[Array, "n h w"], filters: Float[Array, "kh kw m"], *, solver: str, config: Config
) -> Float[Array, "n h w m"]:
    """Sparse maps of every image."""
    if solver == STUDY:
        return encode_as_studied(images, filters, config)
    assert solver == MINIMUM
    return coding.csc_admm(
        images, filters, config.lam, rho=config.minimum_rho, relax=config.relax,
        num_iters=config.minimum_iterations,
    ).y  # fmt: skip


def encode_as_studied(
    images: Float[Array, "n h w"], filters: Float[Array, "kh kw m"], config: CodingConfig
) -> Float[Array, "n h w m"]:
    """Sparse maps by the study's solver."""
    return coding.csc_admm(
        images, filters, config.lam, relax=config.relax, num_iters=config.iterations,
        tol=config.tol, adapt_rho="relative",
    ).y  # fmt: skip


@jax.jit
def measure(
    images: Float[Array, "n h w"],
    codes: Float[Array, "n h w m"],
    filters: Float[Array, "kh kw m"],
    lam: Array,
    cutoffs: Float[Array, " cuts"],
) -> dict[str, Array]:
    """Quality and sparseness of every image, also with small coefficients dropped `[cuts, n]`."""

    def quality(codes: Array) -> tuple[Array, Array]:
        made = coding.csc_reconstruct(codes, filters)
        return coding.psnr(images, made), coding.sparseness(codes)

    psnr, sparseness = quality(codes)
    dropped = jax.lax.map(lambda c: quality(jnp.where(jnp.abs(codes) < c, 0, codes)), cutoffs)
    return {
        "psnr": psnr,
        "sparseness": sparseness,
        "active": (1 - sparseness) * codes.shape[-1],
        "objective": coding.csc_objective(images, codes, filters, lam)[2],
        "dropped_psnr": dropped[0],
        "dropped_sparseness": dropped[1],
    }


def describe(
    config: Config, images: np.ndarray, filters: Array, solver: str
) -> dict[str, list[Any]]:
    """What `measure` finds, as JSON values."""
    codes = encode(jnp.asarray(images), filters, solver=solver, config=config)
    lam, cutoffs = jnp.float32(config.lam), jnp.asarray(config.cutoffs, jnp.float32)
    found = measure(jnp.asarray(images), codes, filters, lam, cutoffs)
    return {name: np.asarray(value, np.float64).round(6).tolist() for name, value in found.items()}


def learn(
    config: Config, filters: Float[Array, "h w m"], photos: list[np.ndarray], seed: int
) -> Float[Array, "h w m"]:
    """Kernels after online learning from random crops, whitened and contrast-normalised."""
    step = jax.jit(functools.partial(
        coding.online_dictionary_step, lam=config.lam, rho=config.learn_rho, relax=config.relax,
        num_iters=config.learn_iterations, tol=1e-2,
    ))  # fmt: skip
    rng = np.random.default_rng([seed, 1])
    window = jnp.asarray(coding.circular_window(config.crop), jnp.float32)

    @jax.jit
    def ready(crop: Array) -> Array:
        return window * coding.local_contrast_normalise(coding.spectral_whiten(crop))[0]

    filters = coding.normalise(filters, axis=(0, 1))
    for number in range(config.learn_steps):
        (crop,) = draw_crops(config, [photos[rng.integers(len(photos))]], rng, 1)
        filters = step(filters, ready(jnp.asarray(crop)), jnp.float32(number))
    return filters


def fitted_bandwidths(config: Config, filters: Float[Array, "h w m"]) -> list[float]:
    """The orientation bandwidth of the log-Gabor kernel that each kernel is most like, degrees."""
    widths = np.pi / 36 * np.arange(1, 13)
    thetas, phases = np.arange(36) * np.pi / 36, np.arange(8) * np.pi / 4
    grid = coding.log_gabor_dictionary(thetas, widths, phases, size=config.size)
    flat = coding.normalise(grid, axis=(0, 1)).reshape(config.size**2, len(thetas), len(widths), -1)
    unit = coding.normalise(filters, axis=(0, 1)).reshape(config.size**2, -1)
    likeness = jnp.abs(jnp.einsum("pm,ptwf->mtwf", unit, flat)).max(axis=(1, 3))
    return np.degrees(widths[np.asarray(likeness.argmax(axis=1))]).tolist()
