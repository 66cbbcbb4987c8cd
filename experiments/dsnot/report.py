"""What the DSnoT experiment shows at its end: tables, figures and verdicts."""

from typing import Any

import numpy as np

import sparsejax as sj
from experiments.dsnot.config import LABELS, Arm, Config, list_arms
from experiments.harness.config import Claim
from experiments.harness.plots import COLORS, draw_curves, new_figure, save
from experiments.harness.progress import make_table, mean_and_deviation
from experiments.harness.run import Run

Found = dict[Arm, dict[str, list[float]]]
MSE_RATIO, MEAN_RATIO = 0.75, 0.2


def print_tables(run: Run, config: Config, dense: Any, found: Found, language: Any) -> None:
    """Every arm at every sparsity, and the perplexities of the language model."""
    header = ("mask", "accuracy (%)", "test loss", "relMSE", "relMean")
    most, places = max(config.cycles), {"accuracy": 1, "loss": 3, "rel_mse": 3, "rel_mean": 4}

    def cells(values: Any) -> list[str]:
        return [mean_and_deviation(values[k], d) if k in values else "" for k, d in places.items()]

    for sparsity in config.sparsity:
        rows = [["dense", *cells(dense)]]
        for arm, values in found.items():
            if arm.sparsity == sparsity and (arm.same_sign or arm.cycles == most):
                rows.append([arm.label, *cells(values)])
        title = f"Digits, {sparsity:.0%} of the hidden layers pruned, {config.seeds} network(s)"
        run.console.print(make_table(title, header, rows))
    rows = [[LABELS.get(name, name), mean_and_deviation(v)] for name, v in language.items()]
    title = f"Small LLaMA pruned to {config.pattern} at once, {config.seeds} calibration draw(s)"
    run.console.print(make_table(title, ("method", "validation perplexity"), rows))


def make_claims(config: Config, found: Found, language: Any) -> tuple[Claim, ...]:
    """The verdicts at the first sparsity, with the most cycles and the sign rule on."""
    sparsity, most = config.sparsity[0], max(config.cycles)
    starts = {i: found[Arm(i, sparsity)] for i in config.initial}
    swapped = {i: found[Arm(i, sparsity, most)] for i in config.initial}
    where = f"at {sparsity:.0%} sparsity on digits, same sign, {most} cycles"

    def claim(sentence: str, key: str, most: float, digits: int) -> Claim:
        pairs = {i: (np.mean(swapped[i][key]), np.mean(starts[i][key])) for i in config.initial}
        return Claim(
            f"{sentence}, {where}",
            all(bool(ours <= most * start) for ours, start in pairs.values()),
            ", ".join(f"{LABELS[i]} {ours:.{digits}f}" for i, (ours, _) in pairs.items()),
            ", ".join(f"{start:.{digits}f}" for _, start in pairs.values()),
            config.seeds,
        )

    means = {name: float(np.mean(values)) for name, values in language.items()}
    one_shot = ("sparsegpt", "wanda", "magnitude")
    ordered = means["sparsegpt"] < means["wanda"] < means["magnitude"]
    return (
        claim(
            f"swaps bring the relative error of layer outputs to at most {MSE_RATIO} of that of "
            "the initial mask",
            "rel_mse", MSE_RATIO, 4,
        ),
        claim(
            f"swaps bring the relative error of mean outputs to at most {MEAN_RATIO} of that of "
            "the initial mask",
            "rel_mean", MEAN_RATIO, 5,
        ),
        claim("swaps do not raise the test loss above that of the initial mask", "loss", 1.0, 4),
        Claim(
            f"pruned to {config.pattern} at once, SparseGPT has a lower perplexity than Wanda, and "
            "Wanda than magnitude",
            ordered,
            f"SparseGPT {means['sparsegpt']:.3f}",
            ", ".join(f"{LABELS[name]} {means[name]:.3f}" for name in one_shot[1:]),
            config.seeds,
        ),
    )  # fmt: skip


def make_card(*, seeds: int, budget: str, patterns: bool = False) -> sj.SparsityCard:
    """The card of pruning after training, by share or, with `patterns`, to N:M."""
    return sj.SparsityCard(
        what=sj.WhatIsSparse.WEIGHTS,
        granularity=sj.Granularity.N_M if patterns else sj.Granularity.UNSTRUCTURED,
        timing=sj.Timing.AFTER,
        path=sj.TrainingPath.DENSE,
        dynamics=sj.MaskDynamics.DYNAMIC,
        allocation=sj.Allocation.UNIFORM,
        criterion=sj.Criterion.SCORE,
        gradient=sj.GradientRule.MASKED,
        seeds=seeds,
        budget=budget,
        simulated=True,
    )


def draw(run: Run, config: Config, found: Found, language: Any) -> None:
    """Errors and loss against the number of swaps, and a bar for each way to prune at once."""
    sparsity = config.sparsity[0]
    cycles = [0, *sorted(config.cycles)]
    for key, title in (
        ("rel_mean", "relative squared error of the mean output"),
        ("rel_mse", "relative squared error of the output"),
        ("loss", "test loss (nats)"),
    ):
        figure, axes = new_figure(
            f"DSnoT on digit networks at {sparsity:.0%} ({config.seeds} networks, band: range)",
            "swaps that an output may have",
            title,
        )
        curves = {}
        for initial in config.initial:
            for same_sign in (True, False):
                arms = [Arm(initial, sparsity, c, same_sign or not c) for c in cycles]
                values = np.asarray([found[arm][key] for arm in arms])
                rule = "same sign" if same_sign else "any sign"
                curves[f"{LABELS[initial]}, {rule}"] = [(cycles, one) for one in values.T]
        draw_curves(axes, curves)
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xticks(cycles, labels=map(str, cycles))
        axes.minorticks_off()
        axes.set_yscale("linear" if key == "loss" else "log")
        axes.legend(frameon=False)
        save(figure, run.folder / f"{key}.png")
    figure, axes = new_figure(
        f"Small LLaMA pruned to {config.pattern} (dots: draws of calibration text)",
        "validation perplexity",
        "",
    )
    names = [name for name in language if name != "dense"]
    for y, name in enumerate(names):
        color = COLORS[y % len(COLORS)]
        axes.barh(y, np.mean(language[name]), color=color, alpha=0.55, height=0.6)
        axes.scatter(language[name], [y] * len(language[name]), color=color, s=16, zorder=3)
    axes.axvline(np.mean(language["dense"]), color=COLORS[-1], linestyle=":", label="dense")
    axes.set_yticks(range(len(names)), labels=[LABELS.get(name, name) for name in names])
    axes.invert_yaxis()
    axes.legend(frameon=False, loc="lower right")
    save(figure, run.folder / "perplexity.png")


def arms_as_metrics(config: Config, found: Found) -> dict[str, Any]:
    """Figures of all arms by name, in the order of the tables."""
    return {arm.name: found[arm] for arm in list_arms(config)}
