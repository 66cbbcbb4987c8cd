"""`python -m experiments.sparse_ift`."""

import functools

import sparsejax as sj
from experiments.harness.arms import as_metrics, print_table, run_arms
from experiments.harness.cli import main
from experiments.harness.config import Experiment, Result
from experiments.harness.run import Run
from experiments.sparse_ift.backbones import backbone_arm, check
from experiments.sparse_ift.config import PRESETS, SLUG, Config
from experiments.sparse_ift.laptop import digits_arm
from experiments.sparse_ift.report import draw, make_claims, tables


def run(config: Config, run: Run) -> Result:
    """Trains every arm and compares them at equal FLOPs."""
    digits = functools.partial(digits_arm, config)
    train = digits if config.is_mlp else backbone_arm(config, run)
    arms = list(config.arms())
    found = run_arms(run, SLUG, config, train, arms, config.lr)
    made = tables(config, found)
    for table in made:
        print_table(run, table)
    draw(config, run, found)
    card = sj.SparsityCard(
        what=sj.WhatIsSparse.WEIGHTS,
        granularity=sj.Granularity.UNSTRUCTURED,
        timing=sj.Timing.DURING,
        path=sj.TrainingPath.SPARSE_TO_SPARSE,
        dynamics=sj.MaskDynamics.STATIC if config.mask == "static" else sj.MaskDynamics.DYNAMIC,
        allocation=sj.Allocation.ERK if config.distribution == "erk" else sj.Allocation.UNIFORM,
        criterion=sj.Criterion.GRADIENT if config.mask == "rigl" else sj.Criterion.RANDOM,
        gradient=sj.GradientRule.DENSE if config.mask == "rigl" else sj.GradientRule.MASKED,
        seeds=config.seeds,
        budget=f"{config.epochs} epochs for every arm, each at its best of {len(config.lr)} "
        "learning rate(s)",
        simulated=True,
    )
    metrics = as_metrics(found, curves=("accuracy_curve",))
    return Result(make_claims(config, found), card, metrics, made)


EXPERIMENT = Experiment(
    slug=SLUG,
    paper="Sparse-IFT: sparse iso-FLOP transformations for maximizing training efficiency",
    presets=PRESETS,
    run=run,
    check=check,
)

if __name__ == "__main__":
    main(EXPERIMENT)
