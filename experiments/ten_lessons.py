"""Ten lessons of sparsity: what coarser zeros cost in bits, and what zeros cost to train.

Paper: Liu & Wang, Ten lessons we have learned in the new "Sparseland": a short handbook for sparse
neural network researchers (2023, arXiv 2302.02596), which has no figures of its own. The division
into numbered lessons is this project's. Expected: at equal density, unstructured zeros keep more
accuracy than any structure (L3); masks multiplied into dense kernels save no time (L9).

`--lesson L3` prunes one network at 87.5 % in six granularities and compares bits per character.
`--lesson L5` and `--lesson L9` count the operations and bytes of every way to train, beside the
measured time of a step. L2 is `python -m experiments.gradual_pruning`.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

import sparsejax as sj
from experiments.gradual_pruning import PRUNABLE, resnet50_shapes
from experiments.harness.characters import (
    CharacterConfig,
    Optimizer,
    RandomWindows,
    Trial,
    at_rate,
    best_rate,
    bits_claim,
    draw_training,
    init_params,
    kernel_entries,
    load_characters,
    losses,
    make_bits,
    make_card,
    make_step,
    mean_bits,
    print_table,
    train_arm,
)
from experiments.harness.cli import main
from experiments.harness.config import Claim, Experiment, ExperimentError, Result
from experiments.harness.plots import COLORS, new_figure, save
from experiments.harness.progress import make_table, mean_and_deviation
from experiments.harness.run import Run
from experiments.harness.timing import compare

MINUTES = {"laptop": "4", "test": "1", "paper": "checked abstractly"}
SLUG = "ten_lessons"
LESSONS = ("L3", "L5", "L9")
GROUP = 8  # of the arm n:8
POSITIONS = {"hidden/kernel": 1, "output/kernel": 1}


@dataclasses.dataclass(frozen=True)
class Config(CharacterConfig):
    """Settings of `python -m experiments.ten_lessons`."""

    lesson: str = "L3"
    """L3: granularities; L5 or L9: operations, bytes and times of training."""
    sparsity: float = 0.875
    """Final sparsity, the same in every arm; a multiple of 1/8, so that n:8 has it too."""
    steps: int = 2000
    """Training steps of every network."""
    begin: int = 200
    """Step at which pruning begins."""
    end: int = 1400
    """Step of the last mask update."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lesson not in LESSONS:
            known = ", ".join(LESSONS)
            raise ExperimentError(
                f"lesson is {self.lesson!r}; known are {known} (L2 is experiments.gradual_pruning)"
            )
        if not 0 < self.sparsity < 1 or (self.sparsity * GROUP) % 1:
            raise ExperimentError(
                f"sparsity is {self.sparsity}; it must be a multiple of 1/{GROUP} between 0 and 1"
            )
        if self.hidden % 16:
            raise ExperimentError(
                f"hidden is {self.hidden}; it must be a multiple of 16, the widest block"
            )

    @property
    def schedule(self) -> sj.Schedule:
        """Sparsity as a function of the step."""
        return sj.cubic(begin=self.begin, end=self.end, freq=self.freq, power=self.power)


@dataclasses.dataclass(frozen=True)
class GradualNM:
    """n of every group of inputs stay, where n follows the density."""

    group: int

    def mask(self, scores: Float[Array, "*s"], density: Any = None) -> Bool[Array, "*s"]:
        """Keeps `max(1, round(group * density))` in every group along axis -2."""
        groups = scores.reshape(-1, self.group, scores.shape[-1])
        kept = sj.exact_topk_mask(groups, sj.keep_count(self.group, density), axis=1)
        return kept.reshape(scores.shape)


@dataclasses.dataclass(frozen=True)
class Units:
    """Whole hidden units stay, in a leaf whose entries all have the score of their unit."""

    count: int

    def mask(self, scores: Float[Array, "*s"], density: Any = None) -> Bool[Array, "*s"]:
        """Keeps all entries of `max(1, round(count * density))` units."""
        kept = sj.keep_count(self.count, density) * (scores.size // self.count)
        return sj.exact_topk_mask(scores, kept, axis=None)


def unit_scores(params: Any) -> Any:
    """Gives every weight the magnitude of all that enters and leaves its hidden unit."""
    scores = sj.magnitude(params)
    into, out = scores["hidden"]["kernel"], scores["output"]["kernel"]
    units = into.sum(0) + out.sum(1)
    return scores | {
        "hidden": scores["hidden"] | {"kernel": jnp.broadcast_to(units, into.shape)},
        "output": scores["output"] | {"kernel": jnp.broadcast_to(units[:, None], out.shape)},
    }


def patterns(hidden: int) -> dict[str, sj.Pattern]:
    """The granularities by name; kernels are `[in, out]`."""
    return {
        "unstructured": sj.Unstructured(),
        "hidden units": Units(hidden),
        "4 outputs": sj.Block((1, 4)),
        "16 outputs": sj.Block((1, 16)),
        "8 x 8 blocks": sj.Block((8, 8)),
        "n:8 of inputs": GradualNM(GROUP),
    }


def pruning(config: Config, name: str) -> Optimizer:
    """Adam that prunes along the cubic schedule in a granularity."""
    return lambda rate: sj.gradual_pruning(
        optax.adam(rate),
        pattern=patterns(config.hidden)[name],
        allocation=1 - config.sparsity,
        schedule=config.schedule,
        scores=unit_scores if name == "hidden units" else sj.magnitude,
    )


PRESETS = {
    "laptop": Config(checkpoint_every=1000),
    "test": Config(
        preset="test",
        seeds=2,
        hidden=32,
        steps=40,
        batch=32,
        begin=5,
        end=30,
        freq=5,
        learning_rates=(2e-3,),
        checkpoint_every=40,
        log_every=5,
    ),
    "paper": Config(preset="paper", steps=125_000, begin=5_000, end=100_000, freq=100),
}


def run(config: Config, run: Run) -> Result:
    """The cell of one lesson."""
    return granularities(config, run) if config.lesson == "L3" else costs(config, run)


def granularities(config: Config, run: Run) -> Result:
    """L3: bits per character and time of a forward pass at equal density."""
    text = load_characters()
    bits = make_bits(text.test)
    arms: dict[str, list[Trial]] = {}
    for label in patterns(config.hidden):
        optimizer = pruning(config, label)
        name = label.replace(" ", "-").replace(":", "-of-")
        arms[label] = train_arm(
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
            f"at {config.sparsity:g} sparsity unstructured zeros beat every structure, {when} "
            f"(the closest: {closest})",
            ours,
            found[closest],
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
    units = params["hidden units"]
    alive = jnp.flatnonzero((units["hidden"]["kernel"] != 0).any(0))
    params["  units removed"] = units | {
        "hidden": jax.tree.map(lambda x: x[..., alive], units["hidden"]),
        "output": units["output"] | {"kernel": units["output"]["kernel"][alive]},
    }
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
    for seed in config.seed_list():
        params = init_params(jax.random.key(seed), config.hidden)
        masks = sj.make_masks(sj.magnitude(params), 1 - config.sparsity)
        flops = sj.flops_report(masks, POSITIONS, shapes=params)
        width = sj.match_dense_width(kernel_entries, flops.sparse / 2)
        windows = next(RandomWindows(text.train, batch=config.batch, seed=seed))
        for name, timing in time_steps(config, params, masks, width, seed, windows).items():
            seconds.setdefault(name, []).append(timing)
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
    return Result(claims, make_card(config, sj.Granularity.UNSTRUCTURED), metrics)


def time_steps(
    config: Config, params: Any, masks: Any, width: int, seed: int, windows: Any
) -> dict[str, float]:
    """Median seconds of a training step that leaves the masks as they are."""
    small = init_params(jax.random.key(seed), width)
    ways: dict[str, tuple[Optimizer, Any]] = {
        "dense": (optax.adam, params),
        "gradual": (pruning(config, "unstructured"), params),
        "rigl": (
            lambda rate: sj.rigl(optax.adam(rate), masks=masks, freq=config.freq, end=config.end),
            sj.apply_masks(params, masks),
        ),
        "static": (
            lambda rate: sj.static_sparsity(optax.adam(rate), masks),
            sj.apply_masks(params, masks),
        ),
        "small dense": (optax.adam, small),
    }
    peak = jnp.float32(config.learning_rates[0])
    calls = {}
    for name, (optimizer, start) in ways.items():
        step = make_step(config, optimizer)
        state = {"params": start, "opt": optimizer(config.learning_rate(peak)).init(start)}
        state, _ = step(state, windows, peak)
        calls[name] = lambda step=step, state=state: step(state, windows, peak)
    timings = compare(calls, baseline="dense", rounds=9)
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
        starts_dense = name in ("dense", "gradual", "ste")
        peak = 12 * (entries if starts_dense else kept)  # weights and two moments, float32
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


def check(config: Config) -> list[str]:
    """Prunes the kernels of a ResNet-50 as matrices in every granularity, abstractly."""
    whole = dict(sj.named_leaves(resnet50_shapes()))
    chosen = sj.selected_paths(whole, PRUNABLE)
    matrices = {
        path: jax.ShapeDtypeStruct((math.prod(whole[path].shape[:-1]), whole[path].shape[-1]), "f4")
        for path in chosen
    }
    scope = sum(math.prod(leaf.shape) for leaf in matrices.values())
    lines = [
        f"paper setting: the granularities of L3 on a ResNet-50, {len(chosen)} kernels as "
        f"[in, out] matrices with {scope:,} weights, {config.sparsity:g} sparsity"
    ]
    for name, pattern in patterns(config.hidden).items():
        if name == "hidden units":
            continue
        transform = sj.gradual_pruning(
            optax.adam(1e-3),
            pattern=pattern,
            allocation=1 - config.sparsity,
            schedule=config.schedule,
            where=PRUNABLE,
        )
        state = jax.eval_shape(transform.init, matrices)
        after = jax.eval_shape(transform.update, matrices, state, matrices)[1]
        size = sum(math.prod(m.shape) for m in jax.tree.leaves(after.masks))
        lines.append(f"{name}: one step of gradual pruning traces, masks of {size:,} entries")
    lines.append(
        "checked abstractly: the article has no setting of its own; a run wants a ResNet-50 and "
        "its residual units tied for whole channels, neither of which is there yet"
    )
    return lines


EXPERIMENT = Experiment(
    slug=SLUG,
    paper='Ten lessons we have learned in the new "Sparseland"',
    presets=PRESETS,
    run=run,
    check=check,
)

if __name__ == "__main__":
    main(EXPERIMENT)
