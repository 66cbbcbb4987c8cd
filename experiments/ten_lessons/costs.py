"""L5 and L9: operations, bytes and time of every way to train, which are three numbers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

import sparsejax as sj
from experiments.harness.characters import (
    Optimizer,
    Params,
    RandomWindows,
    Step,
    init_params,
    kernel_entries,
    load_characters,
    make_card,
    make_step,
)
from experiments.harness.config import Claim, Result
from experiments.harness.plots import COLORS, new_figure, save
from experiments.harness.progress import make_table, mean_and_deviation
from experiments.harness.run import Run
from experiments.harness.timing import compare
from experiments.ten_lessons.config import UNSTRUCTURED, Config, pruning

POSITIONS = {"hidden/kernel": 1, "output/kernel": 1}


def training_costs(config: Config, sparse: float, dense: float) -> dict[str, float]:
    """Operations of one step for one example, by the way to train."""
    along = jax.vmap(lambda step: config.schedule(step, config.sparsity))
    sparsities = along(jnp.arange(config.steps)).tolist()
    counts: dict[str, float] = {
        name: sj.training_flops(name, sparse=sparse, dense=dense)
        for name in ("dense", "ste", "snfs", "static")
    }
    counts["gradual"] = sj.training_flops(
        "gradual", sparse=sparse, dense=dense, sparsities=sparsities
    )
    counts["rigl"] = sj.training_flops("rigl", sparse=sparse, dense=dense, interval=config.freq)
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def costs(config: Config, run: Run) -> Result:
    """L5 and L9: operations and bytes from the formulas beside measured steps."""
    seconds: dict[str, list[float]] = {}
    text = load_characters()
    width = sj.match_dense_width(
        kernel_entries, kernel_entries(config.hidden) * (1 - config.sparsity)
    )
    steps: dict[str, Step] = {}
    for seed in config.seed_list():
        params = init_params(jax.random.key(seed), config.hidden)
        masks = sj.make_masks(sj.magnitude(params), 1 - config.sparsity)
        small = init_params(jax.random.key(seed), width)
        windows = next(RandomWindows(text.train, batch=config.batch, seed=seed))
        for name, time in time_steps(config, params, masks, small, windows, steps).items():
            seconds.setdefault(name, []).append(time)
    flops = sj.flops_report(masks, POSITIONS, shapes=params)
    counts = training_costs(config, flops.sparse, flops.dense)
    counts["small dense"] = 3 * 2.0 * kernel_entries(width)
    print_costs(config, run, params, masks, counts, seconds)
    ratios = {
        name: [t / dense for t, dense in zip(times, seconds["dense"])]
        for name, times in seconds.items()
    }
    if run.is_main:
        draw_costs(run, {n: c / counts["dense"] for n, c in counts.items()}, ratios)
    share = {name: count / counts["dense"] for name, count in counts.items()}
    saves = Claim(
        "masks multiplied into dense kernels save no time: a masked step takes at least 0.9 of "
        "the dense one's",
        sum(ratios["static"]) / config.seeds >= 0.9,
        f"{mean_and_deviation(ratios['static'], 2)} of its time for {share['static']:.3f} of its "
        "operations",
        f"{mean_and_deviation([1e3 * t for t in seconds['dense']], 2)} ms, dense",
        config.seeds,
    )
    order = Claim(
        "from dense to sparse costs fewer operations than dense training and more than from "
        "sparse to sparse (by the formulas)",
        share["static"] <= share["rigl"] < share["gradual"] < 1,
        f"{share['gradual']:.3f} of dense, gradual",
        f"{share['rigl']:.3f}, RigL; {share['static']:.3f}, static",
        1,
    )
    claims = (saves, order) if config.lesson == "L9" else (order, saves)
    metrics = {"operations": counts, "seconds": seconds, "time_ratio": ratios}
    card = dataclasses.replace(
        make_card(config, sj.Granularity.UNSTRUCTURED),
        budget=f"one training step on {config.batch} windows, each way to train",
    )
    return Result(claims, card, metrics)


def time_steps(
    config: Config, params: Params, masks: Any, small: Params, windows: Any, steps: dict[str, Step]
) -> dict[str, float]:
    """Median seconds of a training step that leaves the masks as they are.

    `steps` keeps what is compiled: the masks are in the state, so other seeds use it again.
    """
    sparse = sj.apply_masks(params, masks)
    ways: dict[str, tuple[Optimizer, Params]] = {
        "dense": (optax.adam, params),
        "gradual": (pruning(config, UNSTRUCTURED), params),
        "rigl": (
            lambda rate: sj.rigl(optax.adam(rate), masks=masks, freq=config.freq, end=config.end),
            sparse,
        ),
        "static": (lambda rate: sj.static_sparsity(optax.adam(rate), masks), sparse),
        "small dense": (optax.adam, small),
    }
    peak = jnp.float32(config.learning_rates[0])
    calls = {}
    for name, (optimizer, start) in ways.items():
        step = steps.setdefault(name, make_step(config, optimizer))
        state = {"params": start, "opt": optimizer(config.learning_rate(peak)).init(start)}
        state, _ = step(state, windows, peak)
        calls[name] = lambda step=step, state=state: step(state, windows, peak)
    timings = compare(calls, baseline="dense", rounds=25)
    return {name: timing.median for name, timing in timings.items()}


def print_costs(
    config: Config,
    run: Run,
    params: Any,
    masks: Any,
    counts: dict[str, float],
    seconds: dict[str, list[float]],
) -> None:
    """Operations, bytes and milliseconds of every way to train."""
    entries, kept = (sum(n[i] for n in sj.density_report(params, masks).layers.values())
                     for i in (1, 0))  # fmt: skip
    rows = []
    for name, count in counts.items():
        weights = entries if name in ("dense", "gradual", "ste") else kept
        moments = entries if name == "snfs" else weights  # it follows the gradient of every weight
        peak = 4 * weights + 8 * moments
        rows.append(
            (
                name,
                f"{count / 1e3:,.1f}",
                f"{count / counts['dense']:.3f}",
                f"{peak / 1024:,.1f}",
                mean_and_deviation([1e3 * t for t in seconds[name]], 2) if name in seconds else "",
                "real" if "dense" in name else "simulated",
            )
        )
    header = ("training", "kFLOP", "of dense", "peak KiB", "ms a step", "zeros")
    title = f"One step, {config.sparsity:.1%} sparsity ({jax.devices()[0].device_kind}, float32)"
    table = make_table(title, header, rows)
    stored = ", ".join(
        f"{form} {sj.storage_bytes(masks, form, shapes=params) / 1024:,.1f}"
        for form in ("dense", "bitmask", "csr")
    )
    table.caption = (
        "kFLOP: for one example, from the formulas; peak: kernels and Adam's moments, without "
        f"gradients and masks; the trained weights take KiB: {stored}"
    )
    table.caption_justify = "left"
    run.console.print(table)


def draw_costs(run: Run, counts: dict[str, float], ratios: dict[str, list[float]]) -> None:
    """Operations beside time, as shares of dense training."""
    figure, axes = new_figure("A training step, as a share of a dense one", "share", "")
    for i, (name, count) in enumerate(counts.items()):
        axes.barh(i - 0.2, count, 0.36, color=COLORS[0], label="" if i else "operations (formula)")
        if name in ratios:
            mean = sum(ratios[name]) / len(ratios[name])
            axes.barh(i + 0.2, mean, 0.36, color=COLORS[1], label="" if i else "time (measured)")
            axes.plot(ratios[name], [i + 0.2] * len(ratios[name]), "k.", markersize=4)
    axes.set_yticks(range(len(counts)), list(counts))
    axes.invert_yaxis()
    axes.legend(frameon=False)
    save(figure, run.folder / "costs.png")
