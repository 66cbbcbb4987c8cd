"""`python -m experiments.dsnot`."""

import functools
import math

import jax
import jax.numpy as jnp

from experiments.dsnot.config import PRESETS, SLUG, Config, list_arms
from experiments.dsnot.laptop import (
    evaluate,
    language_methods,
    prune_language_model,
    prune_networks,
    train_networks,
)
from experiments.dsnot.pretrained import run_pretrained
from experiments.dsnot.report import (
    Found,
    arms_as_metrics,
    draw,
    make_card,
    make_claims,
    print_tables,
)
from experiments.harness import digits
from experiments.harness.cli import main
from experiments.harness.config import Experiment, Result
from experiments.harness.language import is_pretrained, model_config
from experiments.harness.progress import training_bar
from experiments.harness.run import Run
from sparsejax import weights
from sparsejax.core.scores import wanda_score
from sparsejax.models import parameter_count


def run(config: Config, run: Run) -> Result:
    """Prunes the networks by every arm, and the language model at once; or a pretrained one."""
    if is_pretrained(config.model):
        return run_pretrained(config, run)
    # no mean is taken off: mean outputs are what the swaps bring back
    data, arms = digits.load_digits(digits.SPLIT, digits.SHIFT), list_arms(config)
    networks = train_networks(config, data)
    measured = [evaluate(params, data) for params in networks]
    dense = {key: [float(values[key]) for values in measured] for key in ("accuracy", "loss")}
    found: Found = {}
    with training_bar(run.console, "arms", total=len(arms)) as bar:
        for done, arm in enumerate(arms, 1):
            prune = functools.partial(prune_networks, arm, config, networks, data)
            found[arm] = digits.kept_arm(run, SLUG, arm.name, prune)
            bar(done, 0.0, {})
    language = digits.kept_arm(
        run, SLUG, "language", functools.partial(prune_language_model, config, run)
    )
    print_tables(run, config, dense, found, language)
    if run.is_main:
        draw(run, config, found, language)
    metrics = {"dense": dense, "arms": arms_as_metrics(config, found), "perplexity": language}
    budget = f"{config.images} calibration images for every arm, no training"
    card = make_card(seeds=config.seeds, budget=budget)
    return Result(make_claims(config, found, language), card, metrics)


def check(config: Config) -> list[str]:
    """Prunes the projections of the full model abstractly, one of each shape."""
    sizes = model_config(config, 32000)
    narrow, wide = sizes.d_model, sizes.d_ff
    shapes = {(narrow, narrow): 4, (narrow, wide): 2, (wide, narrow): 1}
    scope = sizes.n_layers * sum(count * math.prod(shape) for shape, count in shapes.items())
    setting = (
        f"paper setting: {config.model}, {parameter_count(sizes):,} parameters, "
        f"{7 * sizes.n_layers} projections with {scope:,} weights, {config.sparsity[0]:.0%} "
        f"pruned; {config.calibration} windows of {config.seq_len} tokens of {config.dataset}"
    )
    lines = [setting]

    def swap(w: jax.Array, stats: weights.ActivationStats) -> jax.Array:
        score = wanda_score(w, jnp.sqrt(stats.sum_sq))
        options = {"sparsity": config.sparsity[0], "max_cycles": max(config.cycles)}
        return weights.dsnot_mask(w, stats, score, **options)

    for shape in shapes:
        w = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        x = jax.ShapeDtypeStruct((1, config.seq_len, shape[0]), jnp.bfloat16)
        stats = jax.eval_shape(weights.activation_stats, x)
        gram = jax.eval_shape(weights.hessian, x).value
        mask = jax.eval_shape(swap, w, stats)
        new, _ = jax.eval_shape(
            functools.partial(weights.sparsegpt, sparsity=config.sparsity[0]), w, gram
        )
        lines.append(
            f"{shape[0]} x {shape[1]}: DSnoT on Wanda ({mask.dtype} mask) and SparseGPT "
            f"({new.dtype} weights, Hessian of {gram.size * 4 / 2**20:,.0f} MiB) trace"
        )
    lines.append(
        f"checked abstractly: a run wants pretrained weights and {config.dataset}; the language "
        f"model of the laptop preset is pruned by {', '.join(language_methods(config))}"
    )
    return lines


EXPERIMENT = Experiment(
    slug=SLUG,
    paper="Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs",
    presets=PRESETS,
    run=run,
    check=check,
)

if __name__ == "__main__":
    main(EXPERIMENT)
