"""What the lazy neuron experiment shows at its end: tables, figures and verdicts."""

from typing import Any

import numpy as np

import sparsejax as sj
from experiments.harness.arms import Found, Metrics, best_rate, mean
from experiments.harness.config import Claim, Table
from experiments.harness.plots import COLORS, DASHES, draw_curves, new_figure, save
from experiments.harness.progress import mean_and_deviation
from experiments.harness.run import Run
from experiments.lazy_neuron.config import Config, arm_label, arm_name
from experiments.lazy_neuron.lemma import ERRORS, LOSSES

FALL, AGREE, NATS = 0.10, 0.01, 0.04
Noise = dict[int, dict[float, Metrics]]  # by k and share of wrong labels


def make_tables(config: Config, found: Found, signs: Any, noise: Noise) -> tuple[Table, ...]:
    """Shares of neurons over training, their rates, the sign of the gradient, wrong labels."""
    best = {name: best_rate(by_rate)[1] for name, by_rate in found.items()}
    return (
        _shares_table(config, best),
        _rates_table(config, best),
        Table(
            f"Mean gradient of {config.lemma_draws:,} random last layers, in standard errors: the "
            "least of the neurons that fire",
            ("loss", "least", "largest of the silent"),
            tuple(
                (loss, mean_and_deviation(signs[loss]["least"], 1),
                 f"{max(signs[loss]['most_silent']):.0e}")
                for loss in LOSSES
            ),
        ),
        Table(
            f"Digits, {config.digits_steps} steps, {config.seeds} seed(s): clean test images "
            "(the gain of top-k is a claim of full scale)",
            ("labels drawn anew", "kept", "accuracy (%)", "ECE", "training loss", "neurons on"),
            tuple(
                (f"{share:.0%}", str(k or "ReLU"), mean_and_deviation(m["test_accuracy"], 1),
                 mean_and_deviation(m["ece"]), mean_and_deviation(m["train_loss"]),
                 f"{mean(m['share']):.1%}")
                for share in config.label_noise
                for k, m in ((k, noise[k][share]) for k in config.digits_topk)
            ),
        ),
    )  # fmt: skip


def _shares_table(config: Config, best: dict[str, Metrics]) -> Table:
    """Shares at the begin, after an eighth, a quarter, half and all of the steps."""
    at = [config.steps * part // 8 for part in (1, 2, 4, 8)]
    rows = []
    for name, metrics in best.items():
        path = [mean(metrics["initial_share"])]
        for step in at:
            lines = [np.flatnonzero(np.asarray(seed["step"]) <= step) for seed in metrics["curves"]]
            path.append(float(np.mean([
                seed["share"][line[-1] if len(line) else 0]
                for seed, line in zip(metrics["curves"], lines)
            ])))  # fmt: skip
        train, test = (mean_and_deviation([100 * v for v in metrics[f"{part}_share"]], 1)
                       for part in ("train", "test"))  # fmt: skip
        cells = [f"{100 * share:.1f}" for share in path]
        loss = mean_and_deviation(metrics["test_loss"])
        rows.append((arm_label(name), *cells, train, test, loss))
    heading = ("", "start", *(f"step {step}" for step in at), "train, end", "validation", "nats")
    title = f"Neurons that fire for a token (%), mean of {config.layers} layers"
    return Table(f"{title}, {config.seeds} seed(s)", heading, tuple(rows))


def _rates_table(config: Config, best: dict[str, Metrics]) -> Table:
    rows = []
    for name, metrics in best.items():
        rates = np.asarray(metrics["neuron_rate"])  # seeds, layers, neurons
        count = rates.sum(-1).mean()
        for layer in range(config.layers):
            r = rates[:, layer]
            start = np.mean(np.asarray(metrics["initial_layers"])[:, layer])
            rows.append((
                f"{arm_label(name)}, layer {layer}", f"{start:.1%}", f"{r.mean():.1%}",
                f"{r.sum(-1).mean():.1f}", f"{(r < 0.1).mean():.1%}", f"{(r > 0.01).mean():.1%}",
                f"{(r == 0).mean():.1%}",
            ))  # fmt: skip
        rows.append((f"{arm_label(name)}, mean", "", f"{rates.mean():.1%}", f"{count:.1f}",
                     "", "", ""))  # fmt: skip
    heading = ("", "at the start", "fire", "neurons a token", "on < 10 % of tokens",
               "on > 1 %", "never")  # fmt: skip
    return Table("Neurons by layer, validation", heading, tuple(rows))


def make_claims(config: Config, found: Found, signs: Any) -> tuple[Claim, ...]:
    """Emergence with width, the same on new text, more neurons in all, top-k, and the sign."""
    best = {name: best_rate(by_rate)[1] for name, by_rate in found.items()}
    widths = config.d_ff
    ends = {w: mean(best[arm_name(w)]["test_share"]) for w in widths}
    starts = {w: mean(best[arm_name(w)]["initial_share"]) for w in widths}
    train = {w: mean(best[arm_name(w)]["train_share"]) for w in widths}
    falls = all(starts[w] - ends[w] >= FALL for w in widths)
    wider = all(ends[a] > ends[b] for a, b in zip(widths, widths[1:]))  # noqa: RUF007
    first = (
        f"nothing asks for it, yet the share of ReLU neurons that fire falls by at least "
        f"{100 * FALL:g} points at d_ff {' and '.join(map(str, widths))}"
    )
    claims = [
        Claim(
            first + (", to less in the wider network" if len(widths) > 1 else ""),
            falls and wider,
            " and ".join(f"{end:.1%}" for end in ends.values()),
            "at the start " + " and ".join(f"{start:.1%}" for start in starts.values()),
            config.seeds,
        ),
        Claim(
            f"it is the same on training and validation text within {100 * AGREE:g} point",
            all(abs(train[w] - ends[w]) < AGREE for w in widths),
            " and ".join(f"{share:.1%}" for share in train.values()),
            "validation " + " and ".join(f"{end:.1%}" for end in ends.values()),
            config.seeds,
        ),
    ]
    if len(widths) > 1:
        counts = [w * ends[w] for w in widths]
        claims.append(
            Claim(
                "though sparser, the wider network has more neurons that fire for a token",
                all(a < b for a, b in zip(counts, counts[1:])),  # noqa: RUF007
                f"{counts[-1]:.1f}",
                ", ".join(f"{count:.1f}" for count in counts[:-1]),
                config.seeds,
            )
        )
    for k in config.topk:
        ours, plain = (best[arm_name(config.d_ff[-1], kept)]["test_loss"] for kept in (k, 0))
        claims.append(
            Claim(
                f"keeping the {k} largest of {config.d_ff[-1]} activations alone costs less than "
                f"{NATS} nats",
                mean(ours) - mean(plain) < NATS,
                f"{mean_and_deviation(ours)} nats",
                f"ReLU {mean_and_deviation(plain)} nats",
                config.seeds,
            )
        )
    least, silent = signs[LOSSES[0]]["least"], signs[LOSSES[0]]["most_silent"]
    claims.append(
        Claim(
            f"with random last layers the mean gradient of every neuron that fires is at least "
            f"{ERRORS:g} standard errors above 0, and 0 of the others",
            min(least) >= ERRORS and max(silent) == 0,
            f"{min(least):.1f} standard errors",
            "0",
            config.seeds,
        )
    )
    return tuple(claims)


def make_card(config: Config) -> sj.SparsityCard:
    """The card of activations that are zero by their ReLU, and in top-k arms by choice."""
    return sj.SparsityCard(
        what=sj.WhatIsSparse.ACTIVATIONS,
        granularity=sj.Granularity.UNSTRUCTURED,
        timing=sj.Timing.DURING,
        path=sj.TrainingPath.DENSE_TO_SPARSE,
        dynamics=sj.MaskDynamics.DYNAMIC,
        allocation=sj.Allocation.LEARNED,
        criterion=sj.Criterion.MAGNITUDE,
        gradient=sj.GradientRule.MASKED,
        seeds=config.seeds,
        budget=f"{config.steps} steps for every arm, no loss or schedule that asks for sparsity",
        simulated=True,
    )


def draw(run: Run, config: Config, found: Found, noise: Noise) -> None:
    """Shares over training by width and layer, rates of the neurons, robustness against k."""
    best = {name: best_rate(by_rate)[1] for name, by_rate in found.items()}
    _draw_shares(run, config, best)
    figure, axes = new_figure(
        f"How often each neuron fires ({config.seeds} seed(s), all layers, validation)",
        "share of the tokens",
        "share of the neurons",
    )
    edges = np.linspace(0, 1, 41)
    for i, (name, metrics) in enumerate(best.items()):
        rates = np.ravel(metrics["neuron_rate"])
        weights = np.full(rates.size, 1 / rates.size)
        axes.hist(rates, edges, weights=weights, histtype="step", lw=1.6, color=COLORS[i],
                  label=f"{arm_label(name)}, {(rates < 0.1).mean():.0%} below 10 %")  # fmt: skip
    axes.legend(frameon=False)
    save(figure, run.folder / "neurons.png")
    figure, axes = new_figure(
        f"Digits with wrong labels ({config.seeds} seed(s), band: range)",
        "activations that are kept",
        "test accuracy (%)",
    )
    places = np.arange(len(config.digits_topk))
    curves = {
        f"{share:.0%} of the labels drawn anew": [
            (places, values)
            for values in zip(*(noise[k][share]["test_accuracy"] for k in config.digits_topk))
        ]
        for share in config.label_noise
    }
    draw_curves(axes, curves)
    axes.set_xticks(places, labels=[str(k or f"ReLU ({config.width})") for k in config.digits_topk])
    axes.legend(frameon=False)
    save(figure, run.folder / "label_noise.png")


def _draw_shares(run: Run, config: Config, best: dict[str, Metrics]) -> None:
    figure, axes = new_figure(
        f"Neurons that fire for a token of the batch ({config.seeds} seed(s), mean)",
        "training step",
        "share of neurons",
    )
    for i, (name, metrics) in enumerate(best.items()):
        seeds = metrics["curves"]
        for layer in range(config.layers):
            start = np.mean(np.asarray(metrics["initial_layers"])[:, layer])
            values = np.mean([seed[f"share_layer{layer}"] for seed in seeds], axis=0)
            axes.plot([0, *seeds[0]["step"]], [start, *values], color=COLORS[i % len(COLORS)],
                      linestyle=DASHES[layer % len(DASHES)], lw=1.5,
                      label=f"{arm_label(name)}, layer {layer}")  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    save(figure, run.folder / "shares.png")
