"""`python -m experiments.beyond_l1`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import sparsejax as sj
from experiments.beyond_l1.config import LABELS, PRESETS, SLUG, Config
from experiments.beyond_l1.report import as_table, draw, make_claims
from experiments.harness.arms import print_table
from experiments.harness.cli import main
from experiments.harness.config import Experiment, ExperimentError, Result
from experiments.harness.digits import kept_arm, static_settings
from experiments.harness.natural_images import load_photos
from experiments.harness.progress import training_bar
from experiments.harness.run import Run
from sparsejax import coding

_ANGLES, _PHASES = np.arange(18) * np.pi / 18, np.arange(8) * np.pi / 4
_FREQUENCIES = np.asarray([0.08, 0.12, 0.18, 0.25, 0.32, 0.4])
_CHUNK = 512


def load_patches(
    config: Config, photos: list[np.ndarray], seed: int
) -> tuple[Float[np.ndarray, "train n"], Float[np.ndarray, "test n"]]:
    """Whitened patches without their mean, over one standard deviation; flat ones are dropped."""
    rng, side = np.random.default_rng(seed), config.patch
    drawn = []
    for count in (config.train_patches, config.test_patches):
        patches = np.empty((count, side, side), np.float32)
        for patch in patches:
            image = photos[rng.integers(len(photos))]
            top, left = (rng.integers(extent - side + 1) for extent in image.shape)
            patch[:] = image[top : top + side, left : left + side]
        flat = patches.reshape(count, -1)
        drawn.append(flat - flat.mean(axis=1, keepdims=True))
    scale = drawn[0].std()
    found = [part / scale for part in drawn]
    train, test = (part[part.std(axis=1) > config.flat] for part in found)
    if len(train) < config.batch or not len(test):
        raise ExperimentError(
            f"flat is {config.flat}; it leaves {len(train)} patches for batches of {config.batch}, "
            f"and {len(test)} to test on"
        )
    return train, test


@functools.partial(jax.jit, static_argnames=("prox", "config"))
def learn(
    dictionary: Float[Array, "n k"],
    batches: Float[Array, "t b n"],
    lam: Float[Array, ""],
    *,
    prox: str,
    config: Config,
) -> Float[Array, "n k"]:
    """The dictionary after all batches; its rate falls in a line from 1 to 0."""
    coder = functools.partial(coding.ista, prox=prox, lam=lam, num_steps=config.inference_steps)

    def update(dictionary: Array, inputs: tuple[Array, Array]) -> tuple[Array, None]:
        x, rate = inputs
        codes = coder(x, dictionary)
        return coding.dictionary_step(dictionary, x, codes, learning_rate=rate), None

    rates = 1 - jnp.arange(len(batches), dtype=jnp.float32) / len(batches)
    return jax.lax.scan(update, dictionary, (batches, rates))[0]


@functools.partial(jax.jit, static_argnames=("prox", "config"))
def encode(
    x: Float[Array, "b n"],
    dictionary: Float[Array, "n k"],
    lam: Float[Array, ""],
    *,
    prox: str,
    config: Config,
) -> Float[Array, "b k"]:
    """The codes of the same inference."""
    return coding.ista(x, dictionary, prox=prox, lam=lam, num_steps=config.inference_steps)


def code_all(x: np.ndarray, dictionary: Array, lam: float, prox: str, config: Config) -> np.ndarray:
    """Codes of many rows, a chunk at a time; the last is padded, so that one shape is compiled."""
    size = min(_CHUNK, len(x))
    parts = []
    for start in range(0, len(x), size):
        part = x[start : start + size]
        padded = np.zeros((size, x.shape[1]), np.float32)
        padded[: len(part)] = part
        codes = encode(padded, dictionary, jnp.float32(lam), prox=prox, config=config)
        parts.append(np.asarray(codes)[: len(part)])
    return np.concatenate(parts)


def measure(config: Config, test: np.ndarray, dictionary: Array, lam: float, prox: str) -> Any:
    """Error, activity and selectivity of a trained dictionary, as JSON values."""
    codes = jnp.asarray(code_all(test, dictionary, lam, prox, config))
    stimuli = coding.gratings(config.patch, _ANGLES, _PHASES, _FREQUENCIES).astype(np.float32)
    scale = np.linalg.norm(test, axis=1).mean()
    flat = (scale * stimuli).reshape(-1, stimuli.shape[-1])
    answers = np.abs(code_all(flat, dictionary, lam, prox, config))
    tuning = answers.reshape(*stimuli.shape[:3], -1).max(axis=(1, 2)).T  # [atoms, angles]
    selective = coding.orientation_selectivity(jnp.asarray(tuning), _ANGLES)
    return {
        "error": float(coding.relative_error(jnp.asarray(test), dictionary, codes)),
        "active": float(coding.density(codes)) * config.atoms,
        "pool": int(coding.pool_size(codes)),
        "kurtosis": float(coding.excess_kurtosis(codes)),
        "selective": float(jnp.mean((selective > 0.3).astype(jnp.float32))),
        "osi": [round(float(v), 4) for v in selective],
    }


def fit_atoms(config: Config, dictionary: np.ndarray) -> list[list[float]]:
    """`[n_x, n_y, r^2]` of Gabor functions fitted to the first atoms."""
    side, found = config.patch, []
    for atom in dictionary.T[: config.gabor_fits]:
        fit = coding.gabor_fit(np.asarray(atom, np.float64).reshape(side, side))
        found.append([*fit.widths, fit.r2])
    return found


def run(config: Config, run: Run) -> Result:
    """Learns a dictionary for every penalty, weight and seed, and compares their codes."""
    photos = load_photos(config.photos, most=config.most_photos)
    for image in photos:
        if min(image.shape) < config.patch:
            raise ExperimentError(f"patch is {config.patch}; an image has {image.shape} pixels")
    photos = [np.asarray(coding.whiten(jnp.asarray(image), f0=config.f0)) for image in photos]
    patches = {seed: load_patches(config, photos, seed) for seed in config.seed_list()}
    static = static_settings(config)
    arms = [(name, lam) for name in config.penalty for lam in config.lams(name)]
    found: dict[str, dict[float, Any]] = {name: {} for name in config.penalty}
    with training_bar(run.console, "dictionaries", total=len(arms)) as bar:
        for done, (name, lam) in enumerate(arms, 1):

            def compute(name: str = name, lam: float = lam) -> dict[str, list[Any]]:
                each = [train_one(static, *patches[s], s, name, lam) for s in config.seed_list()]
                return {key: [values[key] for values in each] for key in each[0]}

            kept = kept_arm(run, SLUG, f"{name.replace('/', 'over')}-lam{lam:g}", compute)
            found[name][lam] = kept
            bar(done, 0.0, {"loss": float(np.mean(kept["error"]))})
    table = as_table(config, found)
    print_table(run, table)
    draw(config, run, found)
    card = sj.SparsityCard(
        what=sj.WhatIsSparse.ACTIVATIONS,
        granularity=sj.Granularity.UNSTRUCTURED,
        timing=sj.Timing.DURING,
        path=sj.TrainingPath.SPARSE_TO_SPARSE,
        dynamics=sj.MaskDynamics.DYNAMIC,
        allocation=sj.Allocation.GLOBAL,
        criterion=sj.Criterion.MAGNITUDE,
        gradient=sj.GradientRule.MASKED,
        seeds=config.seeds,
        budget=f"{config.updates} batches of {config.batch} patches, the same for every penalty",
        simulated=True,
    )
    drawn = ("dictionary", "osi", "gabor")
    metrics = {
        name: {f"{lam:g}": {k: v for k, v in arm.items() if k not in drawn}
               for lam, arm in by_lam.items()}
        for name, by_lam in found.items()
    }  # fmt: skip
    return Result(make_claims(config, found), card, metrics, (table,))


def train_one(
    config: Config, train: np.ndarray, test: np.ndarray, seed: int, prox: str, lam: float
) -> dict[str, Any]:
    """One dictionary: the same start and batches for every penalty and weight of a seed."""
    key, order = jax.random.split(jax.random.key(seed))
    start = coding.init_dictionary(key, train.shape[1], config.atoms).dictionary
    rows = jax.random.randint(order, (config.updates, config.batch), 0, len(train))
    batches = jnp.asarray(train)[rows]
    dictionary = learn(start, batches, jnp.float32(lam), prox=prox, config=config)
    values = np.asarray(dictionary)
    return {
        **measure(config, test, dictionary, lam, prox),
        "dictionary": [[round(float(v), 4) for v in atom] for atom in values.T],
        "gabor": fit_atoms(config, values) if seed == 0 else [],
    }


def check(config: Config) -> list[str]:
    """Builds the learning of the paper's size abstractly."""
    n = config.patch**2
    lines = []
    for prox in config.penalty:
        out = jax.eval_shape(
            functools.partial(learn, prox=prox, config=static_settings(config)),
            jax.ShapeDtypeStruct((n, config.atoms), jnp.float32),
            jax.ShapeDtypeStruct((config.updates, config.batch, n), jnp.float32),
            jax.ShapeDtypeStruct((), jnp.float32),
        )
        lines.append(f"{LABELS[prox]}: {config.updates} updates of a dictionary {out.shape} trace")
    return [*lines, f"checked abstractly: {config.photos} must be prepared to run it"]


EXPERIMENT = Experiment(
    slug=SLUG,
    paper="Beyond l1 sparse coding in V1",
    presets=PRESETS,
    run=run,
    check=check,
)

if __name__ == "__main__":
    main(EXPERIMENT)
