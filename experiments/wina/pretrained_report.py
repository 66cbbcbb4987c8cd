"""What WINA on a pretrained language model shows at its end: one table, a figure, verdicts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.harness.arms import print_table
from experiments.harness.config import Claim, Result, Table
from experiments.harness.language import LanguageModel
from experiments.harness.plots import draw_curves, new_figure, save
from experiments.harness.run import Run
from experiments.wina.config import NORMS, Arm, Config
from experiments.wina.methods import multiply_adds
from experiments.wina.report import make_card


@dataclasses.dataclass(frozen=True)
class Cell:
    """A method at a sparsity.

    Attributes:
      perplexity: of the evaluation windows. kept: the share of projection weights that was used.
      adds: multiply-adds of a token. alpha: of R-Sparse.
      speed, dense_speed: tokens a second, of the method and of the dense model between its turns.
    """

    perplexity: float
    kept: float
    adds: float
    alpha: float
    speed: float | None = None
    dense_speed: float | None = None


Found = dict[Arm, dict[float, Cell]]


def report(
    config: Config, run: Run, model: LanguageModel, dense: Mapping[bool, float], found: Found
) -> Result:
    """Prints and draws what was found."""
    adds = multiply_adds(None, None, model.config)
    table = make_table(config, model.tokenizer.name, dense, adds, found)
    print_table(run, table)
    if run.is_main:
        draw(run, model.tokenizer.name, dense[False], adds, found)
    budget = (
        f"{config.calibration} calibration windows of {config.seq_len + 1} tokens, no training; "
        "perplexities by masks"
    )
    metrics = {
        "dense": dense[False],
        "dense rotated": dense[True],
        "dense multiply-adds": adds,
        "cells": {
            arm.name: {f"{share:g}": dataclasses.asdict(cell) for share, cell in row.items()}
            for arm, row in found.items()
        },
    }
    return Result(make_claims(config, found), make_card(config, budget=budget), metrics, (table,))


def make_table(
    config: Config, name: str, dense: Mapping[bool, float], adds: float, found: Found
) -> Table:
    """A row for every method at every sparsity, the dense model first."""
    speeds = [c.dense_speed for row in found.values() for c in row.values() if c.dense_speed]
    speed = f"{np.median(speeds):.1f}" if speeds else "-"
    by = "calibrated thresholds" if config.mask_by == "threshold" else "exact numbers of inputs"
    rows: list[tuple[str, ...]] = [
        ("dense", "0%", f"{dense[False]:.2f}", "100", f"{adds / 1e6:.1f}", speed, "1.00")
    ]
    for share in config.sparsity:
        for arm, row in found.items():
            if share in row:
                rows.append(_as_row(arm, share, row[share]))
    return Table(
        f"{name}: perplexity on {config.eval_windows or 'all'} windows of {config.seq_len + 1} "
        f"tokens, masks at all positions ({by}, {config.allocation} allocation); share of "
        "projection weights kept in the first window; multiply-adds (MACs) of a token with "
        f"weights; greedy decoding that reads kept weights alone. -T: rotated, perplexity "
        f"{dense[True]:.2f} when dense",
        ("method", "dropped", "perplexity", "kept (%)", "10^6 MACs", "tokens/s", "of dense"),
        tuple(rows),
    )


def _as_row(arm: Arm, share: float, cell: Cell) -> tuple[str, ...]:
    alpha = f" ({cell.alpha:g})" if arm.method == "r-sparse" else ""
    speeds = ("-", "-")
    if cell.speed and cell.dense_speed:
        speeds = f"{cell.speed:.1f}", f"{cell.speed / cell.dense_speed:.2f}"
    figures = f"{cell.perplexity:.4g}", f"{100 * cell.kept:.1f}", f"{cell.adds / 1e6:.1f}"
    return (f"{arm.label}{alpha}", f"{share:.0%}", *figures, *speeds)


def make_claims(config: Config, found: Found) -> tuple[Claim, ...]:
    """WINA, rotated and not, against every rival, and the fastest decoding."""
    pairs = [(Arm("wina-t", norms), rival) for norms in NORMS for rival in ("teal", "teal-t")]
    pairs.append((Arm("wina"), "teal"))
    claims = [
        _lower(ours, Arm(rival), found)
        for ours, rival in pairs
        if ours in found and Arm(rival) in found
    ]
    for rival in (Arm("r-sparse"), Arm("cats", matched=True)):
        if Arm("wina") in found and found.get(rival):
            claims.append(_lower(Arm("wina"), rival, found))
    share = max(config.sparsity)
    timed = [
        (cell.speed / cell.dense_speed, arm, cell)
        for arm, row in found.items()
        if (cell := row.get(share)) and cell.speed and cell.dense_speed
    ]
    if timed:
        ratio, arm, cell = max(timed, key=lambda one: one[0])
        claims.append(
            Claim(
                "reading kept weights alone makes decoding faster than the dense model at "
                f"{share:.0%} (the fastest is {arm.label})",
                ratio > 1,
                f"{cell.speed:.1f} tokens/s",
                f"{cell.dense_speed:.1f} tokens/s",
                1,
            )
        )
    return tuple(claims) or (Claim("nothing is compared: give wina and teal", False, "-", "-", 1),)


def _lower(ours: Arm, rival: Arm, found: Found) -> Claim:
    """At every sparsity that both reach."""
    shares = [share for share in found[ours] if share in found[rival]]
    pairs = [(found[ours][s].perplexity, found[rival][s].perplexity) for s in shares]
    return Claim(
        f"{ours.label} has a lower perplexity than {rival.label} at "
        f"{', '.join(f'{s:.0%}' for s in shares)}",
        all(a < b for a, b in pairs),
        ", ".join(f"{a:.4g}" for a, _ in pairs),
        ", ".join(f"{b:.4g}" for _, b in pairs),
        1,
    )


def draw(run: Run, name: str, dense: float, adds: float, found: Found) -> None:
    """Perplexity against multiply-adds, a line for each method."""
    figure, axes = new_figure(
        f"{name} with dropped inputs", "multiply-adds of a token with weights, of dense (%)",
        "perplexity", size=(7.5, 5.0),
    )  # fmt: skip
    curves: dict[str, Any] = {
        arm.label: [
            (
                [100 * cell.adds / adds for cell in row.values()],
                [cell.perplexity for cell in row.values()],
            )
        ]
        for arm, row in found.items()
        if row
    }
    draw_curves(axes, curves)
    for line in axes.get_lines():
        line.set_marker("o")
        line.set_markersize(4)
    axes.axhline(dense, color="black", linestyle=":", label="dense")
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize="small")
    save(figure, run.folder / "pretrained.png")
