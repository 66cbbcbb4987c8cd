"""L3: the same number of zeros in finer and coarser pieces."""

from typing import Any

import jax
import jax.numpy as jnp

import sparsejax as sj
from experiments.harness.characters import (
    Params,
    RandomWindows,
    Trial,
    at_rate,
    best_rate,
    bits_claim,
    draw_training,
    load_characters,
    losses,
    make_bits,
    make_card,
    make_step,
    mean_bits,
    print_table,
    train_arm,
)
from experiments.harness.config import Claim, Result
from experiments.harness.plots import COLORS, new_figure, save
from experiments.harness.progress import make_table
from experiments.harness.run import Run
from experiments.harness.timing import compare
from experiments.ten_lessons.config import GRANULARITIES, SLUG, Config, pruning


def granularities(config: Config, run: Run) -> Result:
    """L3: bits per character and time of a forward pass at equal density."""
    text = load_characters()
    bits = make_bits(text.test)
    arms: dict[str, list[Trial]] = {}
    for name in config.arms:
        optimizer = pruning(config, name)
        arms[GRANULARITIES[name]] = train_arm(
            config, run, text, name, hidden=config.hidden, optimizer=optimizer,
            step=make_step(config, optimizer), bits=bits, slug=SLUG,
        )  # fmt: skip
    print_table(run, config, arms)
    windows = next(RandomWindows(text.test, batch=config.batch, seed=0))
    print_structure(run, arms, windows)
    if run.is_main:
        draw_bits(config, run, arms)
        title = "Training at equal density, mean over seeds, band from lowest to highest"
        draw_training(run, {n: best_rate(found) for n, found in arms.items()}, title)

    def claim(choose: Any, when: str) -> Claim:
        found = {name: choose(trials) for name, trials in arms.items()}
        ours = found.pop("unstructured")
        closest = min(found, key=lambda n: mean_bits(found[n]))
        return bits_claim(
            f"at {config.sparsity:g} sparsity unstructured zeros beat every structure, {when}",
            ours,
            found[closest],
            name=closest,
        )

    rate = config.learning_rates[0]
    claims = [claim(lambda found: at_rate(found, rate), f"all at learning rate {rate:g}")]
    if len(config.learning_rates) > 1:
        claims.append(claim(best_rate, "each at its best learning rate"))
    metrics = {
        "bits": {n: [t.bits for t in found] for n, found in arms.items()},
        "best_rate": {n: best_rate(found)[0].peak for n, found in arms.items()},
        "nonzeros": {n: found[0].nonzeros for n, found in arms.items()},
    }
    return Result(tuple(claims), make_card(config, sj.Granularity.UNSTRUCTURED), metrics)


def print_structure(run: Run, arms: dict[str, list[Trial]], windows: Any) -> None:
    """What the masks of the first kernel would allow, and how long a forward pass takes."""
    best = {name: best_rate(found)[0] for name, found in arms.items()}
    params = {name: trial.params for name, trial in best.items()}
    if "hidden units" in params:
        params["  units removed"] = without_dead_units(params["hidden units"])
    forward = jax.jit(losses)
    calls = {name: lambda p=p: forward(p, windows) for name, p in params.items()}
    rows = []
    for name, timing in compare(calls, baseline="unstructured", rounds=9).items():
        time = f"{1e3 * timing.median:.2f}"
        if name not in best:
            rows.append((name, "", "", "", time, "real"))
            continue
        mask = best[name].masks["hidden"]["kernel"]
        shares = (
            sj.fraction_groups_2_of_4(mask, axis=-2),
            sj.block_occupancy(mask, (1, 4)),
            sj.block_occupancy(mask, (8, 8)),
        )
        rows.append((name, *(f"{float(x):.3f}" for x in shares), time, "simulated"))
    header = ("granularity", "2:4 groups", "1x4 in use", "8x8 in use", "ms", "zeros")
    table = make_table("Masks of the hidden kernel, and a forward pass of a batch", header, rows)
    table.caption = "simulated: zeros are multiplied like any number, in dense kernels"
    table.caption_justify = "left"
    run.console.print(table)


def without_dead_units(params: Params) -> Params:
    """The smaller dense network that is left when whole units are zero."""
    alive = jnp.flatnonzero((params["hidden"]["kernel"] != 0).any(0))
    return params | {
        "hidden": jax.tree.map(lambda x: x[..., alive], params["hidden"]),
        "output": params["output"] | {"kernel": params["output"]["kernel"][alive]},
    }


def draw_bits(config: Config, run: Run, arms: dict[str, list[Trial]]) -> None:
    """Bits for each granularity, every seed as a point."""
    figure, axes = new_figure(
        f"{config.sparsity:.1%} sparsity, {config.seeds} seeds (points) and their mean (bar)",
        "test bits per character",
        "",
    )
    for i, found in enumerate(arms.values()):
        best = best_rate(found)
        color = COLORS[i % len(COLORS)]
        axes.plot([t.bits for t in best], [i] * len(best), "o", color=color, alpha=0.7)
        axes.plot([mean_bits(best)] * 2, [i - 0.25, i + 0.25], color=color, linewidth=2)
        axes.annotate(f"{mean_bits(best):.3f}", (mean_bits(best), i - 0.3), ha="center", fontsize=9)
    axes.set_yticks(range(len(arms)), list(arms))
    axes.set_ylim(len(arms) - 0.4, -0.7)
    save(figure, run.folder / "bits_by_granularity.png")
