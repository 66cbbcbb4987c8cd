"""Claims and figures of the BDWP experiment."""

import numpy as np

from experiments.bdwp.array import Costs
from experiments.bdwp.config import LABELS, Config
from experiments.harness.arms import (
    Found,
    best_rate,
    curves_of,
    mean,
)
from experiments.harness.config import Claim
from experiments.harness.plots import COLORS, draw_curves, new_figure, save
from experiments.harness.progress import mean_and_deviation
from experiments.harness.run import Run


def make_claims(
    config: Config, found: Found, costs: Costs,
    exact: bool | None,
) -> tuple[Claim, ...]:  # fmt: skip
    """Accuracy lost, arithmetic saved, the modelled speed-up, and exact pre-generation."""
    best = {name: best_rate(by_rate)[1] for name, by_rate in found.items()}
    pattern = config.patterns()[0]
    ours = f"bdwp-{pattern.n}of{pattern.m}"
    claims = []

    def against(name: str, points: float, sentence: str) -> None:
        if ours in best and name in best:
            mine, theirs = (best[n]["test_accuracy"] for n in (ours, name))
            claims.append(
                Claim(sentence, mean(mine) >= mean(theirs) - points,
                      f"{mean_and_deviation(mine, 2)} %", f"{mean_and_deviation(theirs, 2)} %",
                      config.seeds)
            )  # fmt: skip

    against("dense", 1.5, f"BDWP at {pattern} loses at most 1.5 points to dense training")
    sentence = f"and at most 1 point to SR-STE, whose backward pass is dense, at {pattern}"
    against(f"srste-{pattern.n}of{pattern.m}", 1.0, sentence)
    if ours in best and "macs" in best[ours]:
        share = mean(best[ours]["macs"])
        claims.append(
            Claim("BDWP needs little more than half the multiply-accumulates of a dense step "
                  "(at most .55)", share <= 0.55, f"{share:.3f}", "1", config.seeds)
        )  # fmt: skip
    speeds = [by_method["bdwp"][1] for by_method in costs.values() if "bdwp" in by_method]
    if speeds:
        claims.append(
            Claim(
                f"on the modelled array training with BDWP at {pattern} is at least 1.75 times as "
                f"fast as dense training, mean of {', '.join(costs)}",
                mean(speeds) >= 1.75,
                f"{mean(speeds):.2f}x ({', '.join(f'{s:.2f}' for s in speeds)})",
                "1",
                1,
            )
        )
    if exact is not None:
        claims.append(
            Claim(
                f"pre-generated weights give the same training bit for bit after "
                f"{config.pregenerate_steps} steps",
                exact,
                "equal" if exact else "different",
                "masked on the fly",
                1,
            )
        )
    return tuple(claims)


def draw(config: Config, run: Run, found: Found, costs: Costs) -> None:
    """Accuracy over training, accuracy against arithmetic, and the speed-ups of the array."""
    if not run.is_main:
        return
    labels = config.labels()
    curves = curves_of(found, "accuracy_curve", labels)
    if curves:
        figure, axes = new_figure(f"{config.seeds} seeds", "epoch", "test accuracy (%)",
                                  size=(8.5, 4.6))  # fmt: skip
        draw_curves(axes, curves, order=list(labels.values()))
        final = [v[-1] for runs in curves.values() for _, v in runs]
        axes.set_ylim(min(final) - 6, 100)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        save(figure, run.folder / "accuracy.png")
        figure, axes = new_figure(f"{config.seeds} seeds, mean and deviation",
                                  "multiply-accumulates of a step, over dense", "test accuracy (%)",
                                  size=(8.5, 4.6))  # fmt: skip
        for i, (arm, by_rate) in enumerate(found.items()):
            values = best_rate(by_rate)[1]
            axes.errorbar(
                mean(values["macs"]), mean(values["test_accuracy"]),
                float(np.std(values["test_accuracy"])), label=labels[arm], capsize=3,
                marker="osD^v<>ph"[i % 9], color=COLORS[i % len(COLORS)],
            )  # fmt: skip
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        save(figure, run.folder / "accuracy_by_macs.png")
    figure, axes = new_figure(f"Modelled training on a {config.array} array at {config.pattern[0]}",
                              "", "speed-up over dense")  # fmt: skip
    methods = [m for m in config.method if m != "dense"]
    for i, method in enumerate(methods):
        places = np.arange(len(costs)) + (i - (len(methods) - 1) / 2) * 0.8 / len(methods)
        speeds = [by_method[method][1] for by_method in costs.values()]
        axes.bar(places, speeds, 0.75 / len(methods), label=LABELS[method], color=COLORS[i])
    axes.axhline(1, color="black", linestyle=":")
    axes.set_xticks(range(len(costs)), labels=list(costs))
    axes.legend(frameon=False, ncols=len(methods))
    save(figure, run.folder / "speed_up.png")
