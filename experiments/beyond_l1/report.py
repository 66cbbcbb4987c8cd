"""Claims, table and figures of `experiments.beyond_l1`."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.beyond_l1.config import BASELINE, LABELS, Config
from experiments.harness.config import Claim, Table
from experiments.harness.plots import COLORS, new_figure, save
from experiments.harness.progress import mean_and_deviation
from experiments.harness.run import Run

Found = Mapping[str, Mapping[float, Any]]  # by penalty and weight: a list over seeds by metric


def l1_active(config: Config, found: Found, seed: int, error: float) -> float | None:
    """Active atoms of l1 at an error, linear in its logarithm; None outside its range."""
    of_l1 = found[BASELINE]
    points = sorted((of_l1[lam]["error"][seed], of_l1[lam]["active"][seed]) for lam in of_l1)
    errors, active = (np.asarray(column) for column in zip(*points, strict=True))
    if not errors[0] <= error <= errors[-1]:
        return None
    return float(np.interp(np.log(error), np.log(errors), active))


def matched(config: Config, found: Found, penalty: str) -> list[tuple[float, float, float]] | None:
    """`(weight, error, ratio to l1)` of each seed, at the weight whose error is nearest the target.

    None if l1 reaches none of a seed's errors.
    """
    best = []
    for seed in range(config.seeds):
        options = []
        for lam, arm in found[penalty].items():
            error = arm["error"][seed]
            l1 = l1_active(config, found, seed, error)
            if l1 is not None:
                distance = abs(np.log(error / config.target_error))
                options.append((distance, lam, error, arm["active"][seed] / l1))
        if not options:
            return None
        best.append(min(options)[1:])
    return best


def as_table(config: Config, found: Found) -> Table:
    """Every penalty at every weight, with its activity over that of l1 at the same error."""
    rows = []
    for name, by_lam in found.items():
        for lam, arm in by_lam.items():
            ratios = []
            for seed in range(config.seeds):
                l1 = l1_active(config, found, seed, arm["error"][seed])
                ratios.append(None if l1 is None else arm["active"][seed] / l1)
            known = [ratio for ratio in ratios if ratio is not None]
            ratio = "outside l1's range"
            if len(known) == config.seeds:
                ratio = "1" if name == BASELINE else mean_and_deviation(known, 2)
            rows.append((
                LABELS[name], f"{lam:g}", mean_and_deviation(arm["error"], 4),
                mean_and_deviation(arm["active"], 1), ratio, f"{np.mean(arm['pool']):.0f}",
                mean_and_deviation(arm["kurtosis"], 1), mean_and_deviation(arm["selective"], 2),
            ))  # fmt: skip
    header = ("penalty", "lam", "relative error", f"active of {config.atoms}", "over l1",
              "in use", "excess kurtosis", "selective (OSI > .3)")  # fmt: skip
    title = f"natural images, patches of {config.patch} x {config.patch}, {config.seeds} seeds"
    return Table(title, header, tuple(rows))


def make_claims(config: Config, found: Found) -> tuple[Claim, ...]:
    """Density at matched error, and selectivity."""
    others = [name for name in found if name != BASELINE]
    ratios = {name: matched(config, found, name) for name in others}
    known = {name: float(np.mean([r for _, _, r in best])) for name, best in ratios.items() if best}
    bounds = {name: 1.0 if name == "l0" else 0.8 for name in others}
    shown = ", ".join(
        f"{LABELS[n]} {known[n]:.2f}" if n in known else f"{LABELS[n]} outside l1's errors"
        for n in others
    )
    holds = len(known) == len(others) > 0 and all(known[n] <= bounds[n] for n in known)
    shares = {name: float(np.mean([arm["selective"] for arm in by.values()]))
              for name, by in found.items()}  # fmt: skip
    return (
        Claim(
            f"at the error nearest {config.target_error:g} the penalties beyond l1 need at most .8 "
            "of its active atoms, hard thresholding fewer than l1",
            holds,
            shown or "none",
            "1 (l1)",
            config.seeds,
        ),
        Claim(
            "under every penalty most atoms are selective for orientation (OSI above .3)",
            all(share > 0.5 for share in shares.values()),
            ", ".join(f"{LABELS[name]} {share:.2f}" for name, share in shares.items()),
            "more than .5 of the atoms",
            config.seeds,
        ),
    )


def draw(config: Config, run: Run, found: Found) -> None:
    """Density against error, dictionaries, selectivity, and shapes of the fitted atoms."""
    if not run.is_main:
        return
    figure, axes = new_figure(
        f"Activity at equal error, {config.seeds} seeds", "relative error", "active atoms"
    )
    for color, (name, by_lam) in zip(COLORS, found.items(), strict=False):
        points = sorted((np.mean(a["error"]), np.mean(a["active"])) for a in by_lam.values())
        axes.plot(*zip(*points, strict=True), "o-", color=color, label=LABELS[name], lw=1.5)
        for arm in by_lam.values():
            axes.scatter(arm["error"], arm["active"], s=8, color=color, alpha=0.4)
    axes.set_xscale("log")
    axes.legend(frameon=False)
    save(figure, run.folder / "activity.png")
    _draw_dictionaries(config, run, found)
    figure, axes = new_figure("Selectivity of the atoms", "OSI", "share of atoms below")
    for color, name in zip(COLORS, found, strict=False):
        values = np.sort(np.ravel(_shown(config, found, name)["osi"]))
        axes.plot(values, np.arange(1, len(values) + 1) / len(values), color=color,
                  label=LABELS[name], lw=1.5)  # fmt: skip
    axes.axvline(0.3, color="#222222", lw=0.7, ls=":")
    axes.legend(frameon=False)
    save(figure, run.folder / "selectivity.png")
    if config.gabor_fits:
        figure, axes = new_figure(
            "Shapes of fitted Gabor functions (r² > .5)", "n_x = width along x frequency",
            "n_y = width across x frequency",
        )  # fmt: skip
        for color, name in zip(COLORS, found, strict=False):
            fits = np.asarray([f for seed in _shown(config, found, name)["gabor"] for f in seed])
            good = fits[fits[:, 2] > 0.5] if len(fits) else np.zeros((0, 3))
            axes.scatter(good[:, 0], good[:, 1], s=14, color=color, alpha=0.6,
                         label=f"{LABELS[name]} ({len(good)} of {len(fits)})")  # fmt: skip
        axes.set_xlim(0, 1.5)
        axes.set_ylim(0, 1.5)
        axes.legend(frameon=False, fontsize=8)
        save(figure, run.folder / "gabor_shapes.png")


def _shown(config: Config, found: Found, name: str) -> Any:
    """The arm whose error is nearest the target."""
    arms = found[name].values()
    return min(arms, key=lambda a: abs(np.log(np.mean(a["error"]) / config.target_error)))


def _draw_dictionaries(config: Config, run: Run, found: Found) -> None:
    across, down = 10, 6
    figure, grid = plt.subplots(
        1, len(found), figsize=(2.4 * len(found), 2.1), dpi=130, layout="constrained", squeeze=False
    )
    for axes, name in zip(grid[0], found, strict=True):
        atoms = np.asarray(_shown(config, found, name)["dictionary"][0])[: across * down]
        side = config.patch
        canvas = np.full((down * (side + 1), across * (side + 1)), np.nan)
        for i, atom in enumerate(atoms):
            top, left = (i // across) * (side + 1), (i % across) * (side + 1)
            canvas[top : top + side, left : left + side] = (
                atom.reshape(side, side) / np.abs(atom).max()
            )
        axes.imshow(canvas, cmap="gray", vmin=-1, vmax=1)
        axes.set_title(LABELS[name], fontsize=10)
        axes.axis("off")
    save(figure, run.folder / "dictionaries.png")
