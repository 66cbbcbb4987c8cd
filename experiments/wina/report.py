"""What the laptop preset of the WINA experiment shows at its end: tables, figures and verdicts."""

from collections.abc import Mapping, Sequence
from typing import Any

import sparsejax as sj
from experiments.harness.arms import mean
from experiments.harness.config import Claim, Table
from experiments.harness.plots import draw_curves, new_figure, save
from experiments.harness.progress import mean_and_deviation
from experiments.harness.run import Run
from experiments.wina.config import LABELS, Config
from experiments.wina.laptop import CASES, LAYER_SPARSITY, OUTPUTS, SMALL, WIDTH

Lists = Mapping[str, Sequence[float]]


def make_tables(
    config: Config, layers: Lists, best: Lists, networks: Lists, times: Mapping[str, Any]
) -> tuple[Table, ...]:
    """Digits first; then the random layer, all masks, and times."""
    seeds = f"{config.seeds} seed(s)"
    accuracy = Table(
        f"Test accuracy on digits (%), dense {mean_and_deviation(networks['dense accuracy'], 1)}, "
        f"every layer's inputs dropped, {seeds}",
        ("method", *(f"{share:.0%}" for share in config.sparsity)),
        tuple(
            (
                LABELS[method],
                *(
                    mean_and_deviation(networks[f"{method}-{share:g} accuracy"], 1)
                    for share in config.sparsity
                ),
            )
            for method in config.methods
        ),
    )
    errors = Table(
        f"What a random layer {WIDTH} -> {OUTPUTS} loses of its output at {LAYER_SPARSITY:.0%}, "
        f"{seeds}",
        ("deviation of log norm", "TEAL", "WINA", "ratio"),
        tuple(
            (
                f"{spread:g}",
                mean_and_deviation(layers[f"teal-{spread:g}"]),
                mean_and_deviation(layers[f"wina-{spread:g}"]),
                f"{_ratio(layers, spread):.3f}",
            )
            for spread in config.spreads
        ),
    )
    masks = Table(
        f"How often WINA's mask is the best of all of its size (%), {SMALL} inputs, {CASES} random "
        f"layers, {seeds}",
        ("rows of the kernel", "best"),
        (
            ("orthogonal", mean_and_deviation(best["orthogonal"], 1)),
            ("any", mean_and_deviation(best["any"], 1)),
        ),
    )
    width, outputs = config.timed
    timing = Table(
        f"One token through a layer {width} -> {outputs} that reads its kept rows alone",
        ("dropped", "ms", "of dense", "CPU time of dense"),
        tuple(
            (name, f"{t['ms']:.3f}", f"{t['ratio']:.2f}", f"{t['cpu_ratio']:.2f}")
            for name, t in times.items()
        ),
    )
    return accuracy, errors, masks, timing


def make_claims(
    config: Config, layers: Lists, best: Lists, networks: Lists, times: Mapping[str, Any]
) -> tuple[Claim, ...]:
    """The claim of the paper on digits, and what theory says of single layers."""
    claims = []
    rivals = [method for method in ("teal", "teal-t") if method in config.methods]
    if "wina-t" in config.methods and rivals:
        claims.append(_beats(config, networks, rivals))
    claims.append(
        Claim(
            f"no mask of its size loses less than WINA's where rows are orthogonal ({CASES} random "
            f"layers of {SMALL} inputs, all masks tried)",
            min(best["orthogonal"]) == 100,
            f"{mean(best['orthogonal']):.0f} %",
            f"{mean(best['any']):.0f} % with any rows",
            config.seeds,
        )
    )
    high = max(config.spreads)
    if min(config.spreads) == 0 < high:
        claims.append(
            Claim(
                f"on a random layer at {LAYER_SPARSITY:.0%} WINA loses as much as TEAL (within 2 "
                f"%) where norms are equal, and at most half where they are not (spread {high:g})",
                abs(_ratio(layers, 0) - 1) <= 0.02 and _ratio(layers, high) <= 0.5,
                ", ".join(f"{mean(layers[f'wina-{s:g}']):.3f}" for s in (0, high)),
                ", ".join(f"{mean(layers[f'teal-{s:g}']):.3f}" for s in (0, high)),
                config.seeds,
            )
        )
    width, outputs = config.timed
    sparse = {name: t for name, t in times.items() if name in ("80%", "90%")}
    claims.append(
        Claim(
            f"reading kept rows alone makes a layer {width} -> {outputs} faster than the dense one "
            f"at {' and '.join(sparse)}",
            all(t["ratio"] < 1 for t in sparse.values()),
            ", ".join(f"{t['ms']:.3f} ms" for t in sparse.values()),
            f"{times['dense']['ms']:.3f} ms",
            1,
        )
    )
    return tuple(claims)


def _beats(config: Config, networks: Lists, rivals: Sequence[str]) -> Claim:
    """WINA in rotated bases against other methods where much is dropped."""
    shares = [s for s in config.sparsity if s >= 0.8] or [max(config.sparsity)]

    def accuracies(method: str) -> list[Sequence[float]]:
        return [networks[f"{method}-{share:g} accuracy"] for share in shares]

    ours, theirs = accuracies("wina-t"), {LABELS[rival]: accuracies(rival) for rival in rivals}
    return Claim(
        f"on digits WINA in rotated bases is more accurate than {' and '.join(theirs)} at "
        f"{' and '.join(f'{share:.0%}' for share in shares)}",
        all(mean(a) > mean(b) for other in theirs.values() for a, b in zip(ours, other)),
        ", ".join(f"{mean_and_deviation(each, 1)} %" for each in ours),
        "; ".join(
            f"{name} {', '.join(f'{mean_and_deviation(each, 1)} %' for each in other)}"
            for name, other in theirs.items()
        ),
        config.seeds,
    )


def _ratio(layers: Lists, spread: float) -> float:
    """WINA's error over TEAL's."""
    return mean(layers[f"wina-{spread:g}"]) / mean(layers[f"teal-{spread:g}"])


def make_card(config: Config, *, budget: str) -> sj.SparsityCard:
    """The card of dropping inputs of a trained network."""
    return sj.SparsityCard(
        what=sj.WhatIsSparse.ACTIVATIONS,
        granularity=sj.Granularity.UNSTRUCTURED,
        timing=sj.Timing.AFTER,
        path=sj.TrainingPath.DENSE,
        dynamics=sj.MaskDynamics.DYNAMIC,
        allocation=sj.Allocation.UNIFORM
        if config.allocation == "uniform"
        else sj.Allocation.LEARNED,
        criterion=sj.Criterion.SCORE,
        gradient=sj.GradientRule.MASKED,
        seeds=config.seeds,
        budget=budget,
        simulated=True,
    )


def draw(run: Run, config: Config, layers: Lists, networks: Lists) -> None:
    """Accuracy against the share of inputs that is kept; errors against the spread of norms."""
    labels = [LABELS[method] for method in config.methods]
    kept = [1 - share for share in config.sparsity]
    figure, axes = new_figure(
        f"Inputs dropped in a network on digits ({config.seeds} networks, band: range)",
        "share of the inputs that is kept",
        "test accuracy (%)",
    )
    curves = {}
    for method in config.methods:
        rows = zip(*(networks[f"{method}-{share:g} accuracy"] for share in config.sparsity))
        curves[LABELS[method]] = [(kept, row) for row in rows]
    draw_curves(axes, curves, order=labels)
    axes.axhline(mean(networks["dense accuracy"]), color="black", linestyle=":", label="dense")
    axes.legend(frameon=False, loc="lower right")
    save(figure, run.folder / "accuracy.png")
    figure, axes = new_figure(
        f"A random layer {WIDTH} -> {OUTPUTS} at {LAYER_SPARSITY:.0%} ({config.seeds} layers)",
        "deviation of the logarithm of norms",
        "relative error of the output",
    )
    curves = {
        LABELS[criterion]: [
            (config.spreads, row)
            for row in zip(*(layers[f"{criterion}-{spread:g}"] for spread in config.spreads))
        ]
        for criterion in ("teal", "wina")
    }
    draw_curves(axes, curves)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    save(figure, run.folder / "layer.png")
