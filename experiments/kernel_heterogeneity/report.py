"""Claims, tables and figures of `experiments.kernel_heterogeneity`."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import mannwhitneyu

import sparsejax as sj
from experiments.harness.config import Claim, Table
from experiments.harness.plots import COLORS, DASHES, new_figure, save
from experiments.harness.progress import mean_and_deviation
from experiments.harness.run import Run
from experiments.kernel_heterogeneity.config import (
    LABELS,
    MINIMUM,
    SOLVERS,
    STUDY,
    CodingConfig,
    Config,
)

Found = Mapping[str, Mapping[str, Any]]  # by solver and dictionary: a list over seeds by metric


def make_card(config: CodingConfig, timing: sj.Timing, budget: str) -> sj.SparsityCard:
    """The card of sparse codes, which are what is sparse in both variants."""
    return sj.SparsityCard(
        what=sj.WhatIsSparse.ACTIVATIONS,
        granularity=sj.Granularity.UNSTRUCTURED,
        timing=timing,
        path=sj.TrainingPath.SPARSE_TO_SPARSE,
        dynamics=sj.MaskDynamics.DYNAMIC,
        allocation=sj.Allocation.GLOBAL,
        criterion=sj.Criterion.MAGNITUDE,
        gradient=sj.GradientRule.MASKED,
        seeds=config.seeds,
        budget=budget,
        simulated=True,
    )


def as_table(config: Config, found: Found) -> Table:
    """Every dictionary under both solvers; means over seeds of means over crops."""
    rows = []
    for solver, by_name in found.items():
        for name, arm in by_name.items():
            values = [[float(np.mean(crops)) for crops in arm[metric]]
                      for metric in ("psnr", "sparseness", "active", "objective")]  # fmt: skip
            cells = (mean_and_deviation(v, d) for v, d in zip(values, (2, 4, 2, 1), strict=True))
            rows.append((f"{LABELS[name]}, {SOLVERS[solver]}", *cells))
    header = ("dictionary and solver", "PSNR (dB)", "sparseness", "active per pixel", "objective")
    side = config.crop
    return Table(
        f"{config.kernels} kernels on crops of {side} x {side}, lam {config.lam:g}, "
        f"{config.seeds} seeds", header, tuple(rows),
    )  # fmt: skip


def make_claims(config: Config, found: Found) -> tuple[Claim, ...]:
    """Sparseness under both solvers, the price in quality, and learning."""
    seeds, claims = config.seeds, []

    def mean(solver: str, name: str, metric: str) -> float:
        return float(np.mean([np.mean(crops) for crops in found[solver][name][metric]]))

    ratios = [mean(s, "full", "active") / mean(s, "thin", "active") for s in (STUDY, MINIMUM)]
    quality = [mean(STUDY, name, "psnr") for name in ("full", "thin")]
    claims.append(
        Claim(
            "heterogeneous kernels need less than .7 of the active coefficients of homogeneous "
            "ones under both solvers, at a loss of PSNR under the study's",
            max(ratios) < 0.7 and quality[0] < quality[1],
            f"ratios {ratios[0]:.2f} and {ratios[1]:.2f}, {quality[0]:.2f} dB",
            f"1, {quality[1]:.2f} dB (homogeneous)",
            seeds,
        )
    )
    near = [mean(MINIMUM, name, "psnr") for name in ("full", "thin")]
    claims.append(
        Claim(
            "the loss of PSNR belongs to the solver: near the minimum heterogeneous kernels gain",
            near[0] > near[1],
            f"{near[0]:.2f} dB",
            f"{near[1]:.2f} dB",
            seeds,
        )
    )
    full, thin = (np.ravel(found[STUDY][name]["sparseness"]) for name in ("full", "thin"))
    if len(full) > 1:
        test = mannwhitneyu(full, thin, alternative="greater")
        medians = [float(np.median(sample)) for sample in (full, thin)]
        claims.append(
            Claim(
                f"over {len(full)} crops heterogeneous codes are sparser (Mann-Whitney, p < .05)",
                bool(test.pvalue < 0.05),
                f"median {medians[0]:.4f}, p {test.pvalue:.1g}",
                f"{medians[1]:.4f}",
                seeds,
            )
        )
    if "full_learned" in found[MINIMUM]:
        active = [mean(MINIMUM, f"{name}_learned", "active") for name in ("full", "thin")]
        claims.append(
            Claim(
                "after learning the heterogeneous start is still the sparser one",
                active[0] < active[1],
                f"{active[0]:.2f} active per pixel",
                f"{active[1]:.2f}",
                seeds,
            )
        )
    return tuple(claims)


def draw(config: Config, run: Run, found: Found, shown: Mapping[str, np.ndarray]) -> None:
    """Resilience, quality against activity, bandwidths, and the kernels themselves."""
    if not run.is_main:
        return
    figure, axes = new_figure(
        "Small coefficients dropped", "sparseness", "PSNR (dB)", size=(7.0, 4.4)
    )
    for place, (solver, by_name) in enumerate(found.items()):
        for color, name in zip(COLORS, LABELS, strict=False):
            if name not in by_name:
                continue
            arm = by_name[name]
            x, y = (np.mean([np.mean(v, axis=1) for v in arm[f"dropped_{m}"]], axis=0)
                    for m in ("sparseness", "psnr"))  # fmt: skip
            axes.plot(x, y, "o", linestyle=DASHES[place], color=color, ms=3, lw=1.4,
                      label=f"{LABELS[name]}, {SOLVERS[solver]}")  # fmt: skip
    axes.legend(frameon=False, fontsize=7, loc="lower left")
    save(figure, run.folder / "resilience.png")
    figure, axes = new_figure("Each crop", "active coefficients per pixel", "PSNR (dB)")
    for marker, (solver, by_name) in zip("os", found.items(), strict=True):
        for color, name in zip(COLORS, LABELS, strict=False):
            if name in by_name:
                arm = by_name[name]
                axes.scatter(np.ravel(arm["active"]), np.ravel(arm["psnr"]), s=22, marker=marker,
                             color=color, alpha=0.7,
                             label=f"{LABELS[name]}, {SOLVERS[solver]}")  # fmt: skip
    axes.legend(frameon=False, fontsize=7)
    save(figure, run.folder / "crops.png")
    _draw_kernels(config, run, shown)
    widths = {n: arm["bandwidths"] for n, arm in found[MINIMUM].items() if "bandwidths" in arm}
    if widths:
        figure, axes = new_figure("Fitted orientation bandwidths", "degrees", "kernels")
        edges = np.arange(2.5, 65, 5)
        for color, (name, values) in zip(COLORS, widths.items(), strict=False):
            share = np.full(np.size(values), 1 / len(values))
            axes.hist(np.ravel(values), edges, histtype="step", color=color, lw=1.6,
                      label=LABELS[name], weights=share)  # fmt: skip
        axes.legend(frameon=False)
        save(figure, run.folder / "bandwidths.png")


def _draw_kernels(config: Config, run: Run, shown: Mapping[str, np.ndarray]) -> None:
    across = 12
    down = -(-min(config.kernels, 144) // across)
    figure, grid = plt.subplots(1, len(shown), figsize=(3.2 * len(shown), 3.4), dpi=130,
                                layout="constrained", squeeze=False)  # fmt: skip
    step = config.size + 1
    for axes, (name, filters) in zip(grid[0], shown.items(), strict=True):
        canvas = np.full((down * step, across * step), np.nan)
        for i, kernel in enumerate(np.moveaxis(filters, -1, 0)[: across * down]):
            top, left = (i // across) * step, (i % across) * step
            scaled = kernel / np.abs(kernel).max()
            canvas[top : top + config.size, left : left + config.size] = scaled
        axes.imshow(canvas, cmap="gray", vmin=-1, vmax=1)
        axes.set_title(LABELS[name], fontsize=9)
        axes.axis("off")
    save(figure, run.folder / "kernels.png")
