"""What the Spark Transformer experiment shows at its end: tables, figures and verdicts."""

from collections.abc import Mapping

import numpy as np

import sparsejax as sj
from experiments.harness.arms import Found, arms_table, best_rate, mean
from experiments.harness.config import Claim, Table
from experiments.harness.plots import COLORS, draw_curves, new_figure, save
from experiments.harness.progress import mean_and_deviation
from experiments.harness.run import Run
from experiments.spark_transformer.config import Config, Rows, ffn_multiply_adds, label
from experiments.spark_transformer.operator_cost import OURS, Ratios, against_relu, best_top_k

TOP_K, RELU_FORWARD, RELU_TRAINED = 40, 3.0, 3.5
NATS, POINTS = 0.04, 1.5
PARTS = {"forward": "forward", "trained": "with the gradient"}
Costs = Mapping[str, Ratios]  # by what was timed


def make_tables(config: Config, costs: Costs, found: Found) -> tuple[Table, ...]:
    """Operators, then trained models."""
    timed = tuple(
        Table(
            f"{title.capitalize()}: CPU time over that of statistical top-k, least of the rounds",
            ("operator", *(str(Rows.parse(text)) for text in costs)),
            tuple(
                (name, *(_cost(ratios[part][name]) for ratios in costs.values()))
                for name in next(iter(costs.values()))[part]
            ),
        )
        for part, title in PARTS.items()
    )
    arms = config.arms()
    multiplied = {
        name: {rate: {**metrics, "adds": multiply_adds(config, name, metrics["test_active"])}
               for rate, metrics in by_rate.items()}
        for name, by_rate in found.items()
    }  # fmt: skip
    trained = arms_table(
        f"Byte models, {config.steps} steps of {config.batch} x {config.seq_len}, {config.seeds} "
        "seed(s); adds: multiply-adds of the feed-forward layers for a token",
        multiplied,
        {name: f"{label(name)}, {arm.model.d_ff}" for name, arm in arms.items()},
        {
            "test_loss": ("nats/byte", 4),
            "train_active": ("neurons on", lambda share: f"{share:.1%}"),
            "test_keys": ("keys kept", lambda share: f"{share:.1%}"),
            "adds": ("adds", lambda adds: f"{adds:,.0f}"),
        },
    )
    return *timed, trained


def _cost(row: Mapping[str, float]) -> str:
    return f"{row['ratio']:.3g} ({row['cpu_ms']:.3g} ms)"


def multiply_adds(config: Config, arm: str, active: list[float]) -> list[float]:
    """`ffn_multiply_adds` of an arm at the measured shares."""
    return [ffn_multiply_adds(config.arms()[arm].model, share) for share in active]


def make_claims(config: Config, costs: Costs, found: Found) -> tuple[Claim, ...]:
    """Cost of the operator, quality of equal parameters, share of neurons, and equal work."""
    text, ratios = next(iter(costs.items()))
    best = {name: best_rate(by_rate)[1] for name, by_rate in found.items()}
    times = best_top_k(ratios)
    cheap = f"statistical top-k costs at most 1/{TOP_K} of lax.top_k's best use on "
    cheap += str(Rows.parse(text))
    share = config.ffn_k / config.wide

    def nats(arm: str) -> str:
        return f"{mean_and_deviation(best[arm]['test_loss'], 4)} nats"

    def loss(arm: str) -> float:
        return mean(best[arm]["test_loss"])

    if {"gated", "spark"} <= set(best):
        pairs = zip(best["spark"]["test_loss"], best["gated"]["test_loss"])
        gaps = " ".join(f"{ours - dense:+.3f}" for ours, dense in pairs)
        first = Claim(
            f"{cheap}, and a Spark FFN with {share:.0%} active neurons stays within {NATS} nats of "
            "a gated FFN of equal parameters, each at its best rate",
            times >= TOP_K and loss("spark") - loss("gated") < NATS,
            f"1/{times:.0f}, {nats('spark')}, by seed {gaps}",
            f"gated {nats('gated')}",
            config.seeds,
        )
    else:
        first = Claim(cheap, times >= TOP_K, f"1/{times:.0f}", "lax.top_k 1", 1)
    forward, trained = (against_relu(ratios, part) for part in ("forward", "trained"))
    claims = [
        first,
        Claim(
            f"statistical top-k costs at most {RELU_FORWARD:g} times a ReLU, and with its gradient "
            f"at most {RELU_TRAINED:g} times, on {Rows.parse(text)}",
            forward <= RELU_FORWARD and trained <= RELU_TRAINED,
            f"{forward:.2f} and {trained:.2f}",
            "ReLU 1",
            1,
        ),
    ]
    if "spark" in best:
        active = mean(best["spark"]["train_active"])
        claims.append(
            Claim(
                f"the share of neurons that are on stays within {POINTS} points of what k asks for",
                abs(active - share) < POINTS / 100,
                f"{active:.1%}",
                f"k / f {share:.1%}",
                config.seeds,
            )
        )
    if {"narrow", "spark"} <= set(best):
        claims.append(
            Claim(
                "with as many multiply-adds as a gated FFN of fewer neurons, the Spark FFN has the "
                "lower validation loss",
                loss("spark") < loss("narrow"),
                nats("spark"),
                f"narrow gated {nats('narrow')}",
                config.seeds,
            )
        )
    return tuple(claims)


def make_card(config: Config) -> sj.SparsityCard:
    """The card of activations that are chosen token by token, from the first step on."""
    return sj.SparsityCard(
        what=sj.WhatIsSparse.ACTIVATIONS,
        granularity=sj.Granularity.UNSTRUCTURED,
        timing=sj.Timing.DURING,
        path=sj.TrainingPath.SPARSE_TO_SPARSE,
        dynamics=sj.MaskDynamics.DYNAMIC,
        allocation=sj.Allocation.UNIFORM,
        criterion=sj.Criterion.MAGNITUDE,
        gradient=sj.GradientRule.DENSE,
        seeds=config.seeds,
        budget=f"{config.steps} steps for every arm, best of {len(config.learning_rates)} rate(s)",
        simulated=True,
    )


def draw(run: Run, config: Config, costs: Costs, found: Found) -> None:
    """Cost of the operators, loss against multiply-adds, and active shares over training."""
    if not run.is_main:
        return
    _draw_costs(run, costs)
    _draw_losses(run, config, found)
    figure, axes = new_figure(
        f"Neurons that are on, mean of the layers ({config.seeds} seed(s), band: range)",
        "training step",
        "share of neurons",
    )
    curves = {}
    for name, by_rate in found.items():
        seeds = best_rate(by_rate)[1]["curves"]
        if min(seeds[0]["active"]) < 1:
            curves[label(name)] = [(seed["step"], seed["active"]) for seed in seeds]
    draw_curves(axes, curves, order=[label(name) for name in found])
    axes.axhline(config.ffn_k / config.wide, color=COLORS[-1], lw=0.8, ls=":", label="k / f")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    save(figure, run.folder / "active.png")


def _draw_costs(run: Run, costs: Costs) -> None:
    text, ratios = next(iter(costs.items()))
    bars = [
        (f"{operator}, {title}", row["cpu_ms"], i)
        for i, (part, title) in enumerate(PARTS.items())
        for operator, row in sorted(ratios[part].items(), key=lambda item: item[1]["cpu_ms"])
    ]
    figure, axes = new_figure(
        f"CPU time of a call on {Rows.parse(text)}, 8 % of the entries", "milliseconds", "",
        size=(7.6, 4.6),
    )  # fmt: skip
    for y, (name, time, part) in enumerate(bars):
        ours = name.startswith(OURS)
        axes.barh(y, time, color=COLORS[1 if ours else 0], alpha=1.0 if ours else 0.45 + 0.3 * part)
    axes.set_yticks(range(len(bars)), labels=[name for name, _, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    save(figure, run.folder / "operator_cost.png")


def _draw_losses(run: Run, config: Config, found: Found) -> None:
    figure, axes = new_figure(
        f"Quality against work, {config.steps} steps (dots: {config.seeds} seed(s), bar: mean)",
        "multiply-adds of the feed-forward layers for a token",
        "validation loss (nats/byte)",
    )
    for i, (name, by_rate) in enumerate(found.items()):
        metrics = best_rate(by_rate)[1]
        adds = float(np.mean(multiply_adds(config, name, metrics["test_active"])))
        losses, color = metrics["test_loss"], COLORS[i % len(COLORS)]
        axes.scatter([adds] * len(losses), losses, s=16, color=color, alpha=0.5)
        axes.scatter(adds, np.mean(losses), s=300, marker="_", color=color, lw=2, label=label(name))
    axes.set_xscale("log")
    axes.legend(frameon=False, fontsize=8)
    save(figure, run.folder / "loss.png")
