"""Tables, claims and figures of the Sparse-IFT experiment."""

from typing import Any

import numpy as np

from experiments.harness.arms import Found, best_rate, curves_of, mean
from experiments.harness.config import Claim, Table
from experiments.harness.plots import COLORS, draw_curves, new_figure, save
from experiments.harness.progress import mean_and_deviation
from experiments.harness.run import Run
from experiments.sparse_ift.config import NAMES, Arm, Config

Best = dict[str, dict[str, list[Any]]]


def groups(config: Config, found: Found) -> dict[int, Found]:
    """The arms of each width; all backbones are one group, 0."""
    arms = config.arms()
    widths = dict.fromkeys(arm.width for arm in arms.values())
    return {
        width: {name: x for name, x in found.items() if arms[name].width == width}
        for width in widths
    }


def place(config: Config, width: int) -> str:
    """What a group of arms is."""
    network = f"width {width}" if width else config.model
    return f"{network} on {config.dataset}"


def tables(config: Config, found: Found) -> tuple[Table, ...]:
    """Every arm at its best rate: what it learned and what it cost, for each width."""
    labels, made = config.labels(), []
    for width, group in groups(config, found).items():
        learned, spent = [], []
        for name, by_rate in group.items():
            rate, x = best_rate(by_rate)
            accuracies = x["test_accuracy"]
            learned.append((
                labels[name], f"{rate:g}", mean_and_deviation(accuracies, 2),
                f"{np.median(accuracies):.2f}", mean_and_deviation(x["test_loss"], 3),
                f"{mean(x['train_loss']):.3f}",
                f"{sum(x['collapsed']):.0f}" if "collapsed" in x else "-",
            ))  # fmt: skip
            shares = (f"{100 * mean(x[k]):.0f}" if k in x else "-" for k in ("ever", "always"))
            counts = (f"{mean(x[k]):,.0f}" for k in ("nonzeros", "training_flops"))
            spent.append((labels[name], *counts, *shares))
        title = f"{place(config, width)}, {config.epochs} epochs, {config.seeds} seed(s)"
        header = ("network", "rate", "accuracy (%)", "median", "test loss", "train loss", "failed")
        made.append(Table(title, header, tuple(learned)))
        header = ("network", "non-zeros", "training FLOPs", "ever active (%)", "always (%)")
        made.append(Table(f"{place(config, width)}, per example", header, tuple(spent)))
    return tuple(made)


def make_claims(config: Config, found: Found) -> tuple[Claim, ...]:
    """Sparse-Wide against dense, moving against static masks, equal size, and the other widths."""
    best = {name: best_rate(by_rate)[1] for name, by_rate in found.items()}
    first, *others = groups(config, found)
    claims = [*_against_dense(config, best, first), *_against_static(config, best, first),
              *_sizes(config, best)]  # fmt: skip
    for width in others:
        claims += _medians(config, best, width)
    if not claims:
        name, x = next(iter(best.items()))
        text = f"{mean_and_deviation(x['test_accuracy'], 2)} %"
        claims = [Claim("nothing is compared: give wide, and dense or a static mask", False, text,
                        name, config.seeds)]  # fmt: skip
    return tuple(claims)


def _wide(config: Config, width: int, mask: str) -> tuple[str, str]:
    """Name of the widened arm at the sparsity of the settings, and what claims call it."""
    arm = Arm("wide", config.sparsity, mask, width)
    return arm.name, f"Sparse-Wide {config.sparsity:g} with {NAMES[mask]} masks"


def _dense(width: int) -> str:
    return Arm("dense", 0.0, "", width).name


def _against_dense(config: Config, best: Best, width: int) -> list[Claim]:
    (ours, label), dense = _wide(config, width, config.mask), _dense(width)
    if ours not in best or dense not in best:
        return []
    loss, accuracy = (
        [mean(best[name][key]) for name in (ours, dense)] for key in ("test_loss", "test_accuracy")
    )
    texts = [f"{a:.2f} %, loss {x:.3f}" for a, x in zip(accuracy, loss)]
    return [
        Claim(
            f"at the dense network's non-zeros ({place(config, width)}) {label} has at most .9 of "
            "its test loss and no lower accuracy, each at its best rate",
            loss[0] <= 0.9 * loss[1] and accuracy[0] >= accuracy[1],
            texts[0],
            texts[1],
            config.seeds,
        )
    ]


def _against_static(config: Config, best: Best, width: int) -> list[Claim]:
    (ours, label), (static, _) = (_wide(config, width, m) for m in (config.mask, "static"))
    if ours == static or ours not in best or static not in best:
        return []
    moving, fixed = (best[name]["test_accuracy"] for name in (ours, static))
    return [
        Claim(
            f"{label} is more accurate than with static ones",
            mean(moving) > mean(fixed),
            f"{mean_and_deviation(moving, 2)} %",
            f"{mean_and_deviation(fixed, 2)} %",
            config.seeds,
        )
    ]


def _sizes(config: Config, best: Best) -> list[Claim]:
    """Non-zeros of the network on digits, where they are the FLOPs."""
    ratios = [
        mean(best[name]["nonzeros"]) / mean(best[_dense(arm.width)]["nonzeros"])
        for name, arm in config.arms().items()
        if arm.width and arm.family not in ("dense", "narrow") and _dense(arm.width) in best
    ]
    if not ratios:
        return []
    worst = max(abs(ratio - 1) for ratio in ratios)
    return [
        Claim(
            "the non-zeros of every larger network are within 1 % of the dense one's at its width",
            worst <= 0.01,
            f"{min(ratios):.4f} to {max(ratios):.4f}",
            "1",
            config.seeds,
        )
    ]


def _medians(config: Config, best: Best, width: int) -> list[Claim]:
    (ours, label), dense = _wide(config, width, config.mask), _dense(width)
    if ours not in best or dense not in best:
        return []
    medians = [float(np.median(best[name]["test_accuracy"])) for name in (ours, dense)]
    failed = [sum(best[name]["collapsed"]) for name in (ours, dense)]
    texts = [f"{m:.2f} %, {n:.0f} collapsed" for m, n in zip(medians, failed)]
    return [
        Claim(
            f"at width {width} the median accuracy of {label} is above the dense network's",
            medians[0] > medians[1],
            texts[0],
            texts[1],
            config.seeds,
        )
    ]


def draw(config: Config, run: Run, found: Found) -> None:
    """Accuracy against the weights that training reached or its cost, and over training.

    The narrow networks are in the tables alone: they would squeeze all others together.
    """
    if not run.is_main:
        return
    arms, labels = config.arms(), config.labels()
    for width, group in groups(config, found).items():
        shown = {name: x for name, x in group.items() if arms[name].family != "narrow"}
        if not shown:
            continue
        end = f"_w{width}" if width else ""
        title = f"{place(config, width)}, {config.seeds} seeds"
        _draw_points(config, run, f"accuracy_by_cost{end}", title, shown)
        curves = curves_of(shown, "accuracy_curve", labels)
        if not curves:
            continue
        means = {label: [(r[0][0], np.mean([y for _, y in r], 0))] for label, r in curves.items()}
        figure, axes = new_figure(f"{title}, mean", "epoch", "test accuracy (%)", size=(8.5, 4.6))
        draw_curves(axes, means)
        axes.set_ylim(min(runs[0][1][-1] for runs in means.values()) - 6, 100)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        save(figure, run.folder / f"accuracy{end}.png")


def _draw_points(config: Config, run: Run, name: str, title: str, group: Found) -> None:
    """Every arm as a point; weights ever active are known for the network on digits."""
    arms, labels = config.arms(), config.labels()
    best = {arm: best_rate(by_rate)[1] for arm, by_rate in group.items()}
    metric = "reached" if all("reached" in x for x in best.values()) else "training_flops"
    x_label = "weights that were ever active" if metric == "reached" else (
        "floating-point operations of training on an example"
    )  # fmt: skip
    figure, axes = new_figure(f"{title}, mean and deviation", x_label, "test accuracy (%)",
                              size=(8.5, 4.6))  # fmt: skip
    families = list(dict.fromkeys(arms[arm].family for arm in group))
    for i, (arm, x) in enumerate(best.items()):
        axes.errorbar(
            mean(x[metric]), mean(x["test_accuracy"]), float(np.std(x["test_accuracy"])),
            capsize=3, marker="osD^v<>ph"[i % 9], label=labels[arm],
            color=COLORS[families.index(arms[arm].family)],
            markerfacecolor="none" if arms[arm].mask == "static" else None,
        )  # fmt: skip
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, run.folder / f"{name}.png")
