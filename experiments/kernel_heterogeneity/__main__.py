"""`python -m experiments.kernel_heterogeneity`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sparsejax as sj
from experiments.harness.arms import print_table
from experiments.harness.cli import main
from experiments.harness.config import Experiment, Result
from experiments.harness.digits import kept_arm, static_settings
from experiments.harness.natural_images import load_photos
from experiments.harness.progress import training_bar
from experiments.harness.run import Run
from experiments.kernel_heterogeneity.coding import (
    describe,
    dictionaries,
    draw_crops,
    encode,
    fitted_bandwidths,
    learn,
    normalised,
)
from experiments.kernel_heterogeneity.config import (
    MINIMUM,
    PRESETS,
    SLUG,
    STUDY,
    VARIANTS,
    Config,
    DownstreamConfig,
)
from experiments.kernel_heterogeneity.downstream import check_downstream, run_downstream
from experiments.kernel_heterogeneity.report import as_table, draw, make_card, make_claims


def run(config: Config | DownstreamConfig, run: Run) -> Result:
    """Codes of photographs, or classifiers of codes."""
    if isinstance(config, DownstreamConfig):
        return run_downstream(config, run)
    return run_codes(config, run)


def run_codes(config: Config, run: Run) -> Result:
    """Codes the crops of every seed with every dictionary, generated and learned."""
    photos = load_photos(config.photos, most=config.most_photos)
    static, made = static_settings(config), dictionaries(config)
    seeds = config.seed_list()
    images = {
        seed: normalised(draw_crops(config, photos, np.random.default_rng(seed), config.crops))
        for seed in seeds
    }
    arms = [(solver, name) for solver in (STUDY, MINIMUM) for name in made]
    if config.learn_steps:
        arms += [(MINIMUM, "full_learned"), (MINIMUM, "thin_learned")]
    found: dict[str, dict[str, Any]] = {STUDY: {}, MINIMUM: {}}
    shown = {name: np.asarray(made[name]) for name in ("full", "thin")}
    with training_bar(run.console, "dictionaries", total=len(arms)) as bar:
        for done, (solver, name) in enumerate(arms, 1):

            def compute(solver: str = solver, name: str = name) -> dict[str, list[Any]]:
                each = [one(static, photos, images[s], made, s, solver, name) for s in seeds]
                return {key: [values[key] for values in each] for key in each[0]}

            kept = kept_arm(run, SLUG, f"{solver}-{name}", compute)
            found[solver][name] = kept
            if "filters" in kept:
                shown[name] = np.asarray(kept["filters"][0])
            bar(done, 0.0, {"loss": float(np.mean([np.mean(o) for o in kept["objective"]]))})
    table = as_table(config, found)
    print_table(run, table)
    draw(config, run, found, shown)
    budget = (
        f"{config.kernels} kernels, {config.iterations} or {config.minimum_iterations} iterations "
        "for every dictionary"
    )
    card = make_card(config, sj.Timing.AFTER, budget)
    large = ("filters", "dropped_psnr", "dropped_sparseness", "bandwidths")
    metrics = {
        solver: {n: {k: v for k, v in arm.items() if k not in large} for n, arm in by.items()}
        for solver, by in found.items()
    }
    return Result(make_claims(config, found), card, metrics, (table,))


def one(
    config: Config, photos: list[np.ndarray], images: np.ndarray, made: dict[str, Any], seed: int,
    solver: str, name: str,
) -> dict[str, Any]:  # fmt: skip
    """The codes of a seed's crops with one dictionary, which is learned first where its name says.

    Near the minimum every other crop comes first, so that each photo has its turn.
    """
    extra: dict[str, Any] = {}
    if solver == MINIMUM:
        order = np.argsort(np.arange(len(images)) % config.crops, kind="stable")
        images = images[order[: config.minimum_crops]]
    if name.endswith("_learned"):
        filters = learn(config, made[name.removesuffix("_learned")], photos, seed)
        extra = {"filters": np.asarray(filters, np.float64).round(4).tolist()}
    else:
        filters = made[name]
    if solver == MINIMUM and not name.endswith("_unit"):
        extra["bandwidths"] = fitted_bandwidths(config, filters)
    return {**describe(config, images, filters, solver), **extra}


def check(config: Config | DownstreamConfig) -> list[str]:
    """What the preset of the paper would do, as far as it can be built without its images."""
    return check_downstream(config) if isinstance(config, DownstreamConfig) else check_codes(config)


def check_codes(config: Config) -> list[str]:
    """Builds the coding and a learning step at the paper's size abstractly."""
    side = config.crop
    filters = jax.ShapeDtypeStruct((config.size, config.size, config.kernels), jnp.float32)
    images = jax.ShapeDtypeStruct((1, side, side), jnp.float32)
    lines = []
    for solver in (STUDY, MINIMUM):
        solve = functools.partial(encode, solver=solver, config=static_settings(config))
        codes = jax.eval_shape(solve, images, filters)
        lines.append(
            f"{solver}: codes {codes.shape} trace, {codes.size * 4 / 2**20:.0f} MiB a copy"
        )
    return [*lines, f"checked abstractly: {config.photos} must be prepared to run it"]


EXPERIMENT = Experiment(
    slug=SLUG,
    paper="Kernel Heterogeneity Improves Sparseness of Natural Images Representations",
    presets=PRESETS,
    run=run,
    check=check,
    variants=VARIANTS,
)

if __name__ == "__main__":
    main(EXPERIMENT)
