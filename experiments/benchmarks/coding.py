"""Speed of sparse coding: our solvers against scikit-learn's and SPORCO's, at equal quality.

`python -m experiments.benchmarks.coding`. Patches of whitened photographs; the dictionary's atoms
are patches too. An iterative solver takes as many steps as it needs to reach the objective (or the
residual) of the library it is compared with. scikit-learn uses two processes. SPORCO is timed where
it is installed. The last part is a training step of CRATE against one of a vision transformer.
"""

import dataclasses
import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.decomposition import sparse_encode

from experiments.benchmarks.suite import Group, run_suite
from experiments.harness.natural_images import load_photos
from experiments.harness.timing import Goal
from sparsejax import coding
from sparsejax.models import CrateClassifier, ViT, crate_config, vit_config

_TWICE = Goal(0.5)
_STEPS = (5, 10, 15, 20, 30, 40, 60, 80, 120, 160, 240, 320, 500, 800, 1200, 2000)
_FEW = 500  # patches that the number of steps is first sought on
_PROCESSES = 2


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes: patches and atoms, non-zeros of a pursuit, a photo's crop, and images in a step."""

    patches: int
    patch: int
    atoms: int
    nonzeros: int
    crop: int
    iterations: int
    batch: int
    image: int
    layers: int
    rounds: int
    min_seconds: float
    lam: float = 0.2


PRESETS = {
    "laptop": Config(10_000, 10, 200, 10, 64, 100, 8, 224, 12, rounds=3, min_seconds=0.01),
    "test": Config(60, 6, 40, 3, 16, 5, 2, 32, 1, rounds=1, min_seconds=1e-4),
}


@functools.cache
def problem(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Patches `[b, n]` of one standard deviation, and a dictionary `[n, k]` of other patches."""
    rng, side, photos = np.random.default_rng(0), config.patch, load_photos("sklearn")
    photos = [np.asarray(coding.whiten(jnp.asarray(photo))) for photo in photos]
    found: list[np.ndarray] = []
    while len(found) < config.patches + config.atoms:
        image = photos[rng.integers(len(photos))]
        top, left = (rng.integers(extent - side + 1) for extent in image.shape)
        patch = image[top : top + side, left : left + side].ravel()
        patch = patch - patch.mean()
        if patch.std() > 0.01:
            found.append(patch)
    values = np.stack(found).astype(np.float32)
    atoms, data = values[: config.atoms].T, values[config.atoms :]
    return data / data.std(), np.asarray(coding.normalise(jnp.asarray(atoms), axis=0))


def objective(config: Config, codes: np.ndarray) -> np.ndarray:
    """Of the lasso, of each of the first patches; float64."""
    return 0.5 * residual(config, codes) + config.lam * np.abs(codes).sum(1)


def residual(config: Config, codes: np.ndarray) -> np.ndarray:
    """Sum of squares that the codes leave of each of the first patches; float64."""
    x, dictionary = problem(config)
    errors = x[: len(codes)].astype(np.float64) - codes.astype(np.float64) @ dictionary.T
    return np.sum(errors**2, axis=1)


def library_codes(config: Config, **options: Any) -> np.ndarray:
    """scikit-learn's, which warns where it has not converged."""
    x, dictionary = problem(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sparse_encode(x, dictionary.T, n_jobs=_PROCESSES, **options)


def enough_steps(
    config: Config,
    solve: Callable[[jax.Array, jax.Array, int], jax.Array],
    measure: Callable[[Config, np.ndarray], np.ndarray],
    wanted: np.ndarray,
) -> int:
    """The fewest steps of a ladder whose codes are as good as the library's, or the last.

    Args:
      solve: patches, dictionary, steps -> codes. measure: codes -> what shall be small, by patch.
      wanted: that of the library, which one part in 10,000 is added to.
    """
    x, dictionary = (jnp.asarray(a) for a in problem(config))

    def reached(steps: int, count: int) -> bool:
        found = measure(config, np.asarray(solve(x[:count], dictionary, steps)))
        return bool(found.sum() <= wanted[:count].sum() * (1 + 1e-4))

    least = next((steps for steps in _STEPS if reached(steps, _FEW)), _STEPS[-1])
    rest = _STEPS[_STEPS.index(least) :]
    return next((steps for steps in rest if reached(steps, len(x))), _STEPS[-1])


def fista_groups(config: Config) -> Iterator[Group]:
    """Lasso codes: FISTA and coordinate descent against scikit-learn's two solvers."""
    x, dictionary = problem(config)
    device = jnp.asarray(x), jnp.asarray(dictionary)
    ours = jax.jit(coding.fista, static_argnames="num_steps")
    descent = jax.jit(coding.coordinate_descent, static_argnames="num_sweeps")
    for algorithm in ("lasso_lars", "lasso_cd"):
        theirs = functools.partial(
            library_codes, config, algorithm=algorithm, alpha=config.lam, max_iter=1000
        )
        wanted = objective(config, theirs())
        steps, sweeps = (
            enough_steps(config, solve, objective, wanted)
            for solve in (
                lambda x, d, n: ours(x, d, lam=config.lam, num_steps=n),
                lambda x, d, n: descent(x, d, lam=config.lam, num_sweeps=n),
            )
        )
        label = f"{config.patches:,} patches: scikit-learn {algorithm}"
        fista, descended = f"  FISTA, {steps} steps", f"  coordinate descent, {sweeps} sweeps"
        fista, descended = f"{fista} ({algorithm})", f"{descended} ({algorithm})"
        yield Group(
            {
                label: theirs,
                fista: functools.partial(ours, *device, lam=config.lam, num_steps=steps),
                descended: functools.partial(descent, *device, lam=config.lam, num_sweeps=sweeps),
            },
            label,
            config.rounds,
            {fista: _TWICE},
        )


def pursuit_groups(config: Config) -> Iterator[Group]:
    """Greedy codes of as many non-zeros, or of as small a residual."""
    x, dictionary = problem(config)
    device = jnp.asarray(x), jnp.asarray(dictionary)
    theirs = functools.partial(
        library_codes, config, algorithm="omp", n_nonzero_coefs=config.nonzeros
    )
    wanted = residual(config, theirs())
    omp = jax.jit(functools.partial(coding.orthogonal_matching_pursuit, num_atoms=config.nonzeros))
    plain = jax.jit(coding.matching_pursuit, static_argnames="num_steps")
    steps = enough_steps(config, lambda x, d, n: plain(x, d, num_steps=n), residual, wanted)
    label = f"{config.patches:,} patches: scikit-learn OMP, {config.nonzeros} atoms"
    ours, greedy = f"  OMP, {config.nonzeros} atoms", f"  matching pursuit, {steps} steps"
    yield Group(
        {
            label: theirs,
            ours: functools.partial(omp, *device),
            greedy: functools.partial(plain, *device, num_steps=steps),
        },
        label,
        config.rounds,
        {ours: _TWICE, greedy: _TWICE},
    )


def convolutional_groups(config: Config) -> Iterator[Group]:
    """ADMM with the same fixed penalty and iterations as SPORCO's, where it is installed."""
    side = config.crop
    image = jnp.asarray(load_photos("sklearn")[0][:side, :side])
    image, _, _ = coding.local_contrast_normalise(image)
    angles = np.arange(12) * np.pi / 12
    filters = coding.log_gabor_dictionary(
        angles, np.pi / 36 * np.arange(1, 7), np.asarray([0, np.pi / 2]), size=12
    )
    count = config.iterations
    solve = jax.jit(
        functools.partial(coding.csc_admm, lam=1e-2, rho=1.5, relax=1.8, num_iters=count)
    )
    ours = f"  ADMM, {side} x {side}, 144 kernels, {count} iterations"
    functions: dict[str, Callable[[], Any]] = {ours: functools.partial(solve, image, filters)}
    baseline = ours
    if importlib.util.find_spec("sporco") is not None:
        from sporco.admm import cbpdn  # type: ignore[import-not-found]

        options = cbpdn.ConvBPDN.Options({
            "MaxMainIter": count, "RelStopTol": 0.0, "rho": 1.5, "RelaxParam": 1.8,
            "AutoRho": {"Enabled": False}, "Verbose": False, "DataType": np.float32,
        })  # fmt: skip
        kernels, signal = np.asarray(filters), np.asarray(image)
        baseline = f"SPORCO, {side} x {side}, 144 kernels, {count} iterations"
        functions = {
            baseline: lambda: cbpdn.ConvBPDN(kernels, signal, 1e-2, options, dimK=0).solve(),
            **functions,
        }
    yield Group(functions, baseline, config.rounds, {} if baseline == ours else {ours: _TWICE})


def crate_groups(config: Config) -> Iterator[Group]:
    """A training step of CRATE-Tiny against one of ViT-Tiny, on images of the same size."""
    images = jax.random.normal(jax.random.key(0), (config.batch, config.image, config.image, 3))
    labels = jnp.arange(config.batch)
    sizes = {"image_size": config.image, "n_layers": config.layers}
    models = {
        "a training step of ViT-Tiny": ViT(vit_config("tiny", **sizes), rngs=nnx.Rngs(0)),
        "  CRATE-Tiny": CrateClassifier(crate_config("tiny", **sizes), rngs=nnx.Rngs(0)),
    }
    functions = {}
    for name, model in models.items():
        graph, params = nnx.split(model)
        tx = optax.adamw(1e-3)

        @jax.jit
        def step(params: Any, opt: Any, graph: Any = graph, tx: Any = tx) -> Any:
            def loss(params: Any) -> jax.Array:
                logits = nnx.merge(graph, params)(images)
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

            updates, opt = tx.update(jax.grad(loss)(params), opt, params)
            return optax.apply_updates(params, updates), opt

        functions[name] = functools.partial(step, params, tx.init(params))
    yield Group(functions, next(iter(functions)), config.rounds)


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints the table and writes `<out>/benchmarks/coding.json`."""
    builders = (fista_groups, pursuit_groups, convolutional_groups, crate_groups)
    run_suite("coding", __doc__, PRESETS, builders, lambda config: "sparse coding", arguments)


if __name__ == "__main__":
    main()
