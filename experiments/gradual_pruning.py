"""Gradual pruning: a large sparse network against a small dense one with as many non-zeros.

Paper: Zhu & Gupta, To prune, or not to prune: exploring the efficacy of pruning for model
compression (2017, arXiv 1710.01878); expected there: large-sparse beats small-dense at every size,
for example a medium LSTM at 80 % sparsity (perplexity 83.9 with 4.0M non-zeros) against a small
dense one (115.3 with 4.6M).

A network that predicts the next character is pruned along the cubic schedule to several
sparsities. Beside it, with the same steps, batches and learning rates: dense networks of as many
weights, the same large network pruned at one stroke where the schedule ends, and left dense.
"""

import dataclasses
import math
from typing import Any, Literal

import optax

import sparsejax as sj
from experiments.harness.abstract_training import PRUNABLE, abstract_params, trace_step
from experiments.harness.characters import (
    CharacterConfig,
    Optimizer,
    Trial,
    at_rate,
    best_rate,
    bits_claim,
    draw_training,
    kernel_entries,
    load_characters,
    make_bits,
    make_card,
    make_step,
    mean_bits,
    print_table,
    train_arm,
)
from experiments.harness.cli import main
from experiments.harness.config import Claim, Experiment, ExperimentError, Result
from experiments.harness.images import ImageConfig
from experiments.harness.plots import COLORS, new_figure, save
from experiments.harness.run import Run

MINUTES = {"laptop": "6", "test": "1", "paper": "checked abstractly"}
SLUG = "gradual_pruning"
MARGINS = {"small dense": 0.05, "one-shot": 0.3}  # bits per character that the claims ask for


@dataclasses.dataclass(frozen=True)
class Config(CharacterConfig):
    """Settings of `python -m experiments.gradual_pruning`."""

    task: Literal["characters", "imagenet2012"] = "characters"
    """What is learned; imagenet2012 with a ResNet-50 is checked abstractly (--preset paper)."""
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95)
    """Final sparsities of the large network."""
    claim_sparsity: float = 0.9
    """The one of the claim line, and of the network pruned at one stroke."""
    order: Literal["zhu_gupta", "jaxpruner"] = "zhu_gupta"
    """Where in a step the masks change, and which schedule goes with it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for sparsity in self.sparsities:
            if not 0 < sparsity < 1:
                raise ExperimentError(f"sparsities has {sparsity}; each must be between 0 and 1")
        if len(set(self.sparsities)) < len(self.sparsities):
            raise ExperimentError(f"sparsities are {self.sparsities}; they must differ")
        if self.claim_sparsity not in self.sparsities:
            raise ExperimentError(
                f"claim_sparsity is {self.claim_sparsity}; it must be one of {self.sparsities}"
            )
        if self.order == "jaxpruner" and self.end % self.freq:
            raise ExperimentError(
                f"end is {self.end}; with the order jaxpruner freq = {self.freq} must divide it, "
                "or the final sparsity is never reached"
            )

    @property
    def schedule(self) -> sj.Schedule:
        """Sparsity as a function of the step."""
        return sj.cubic(
            begin=self.begin, end=self.end, freq=self.freq, power=self.power, convention=self.order
        )

    def pruning(self, sparsity: float, schedule: sj.Schedule | None = None) -> Optimizer:
        """Adam that prunes on the way, along the cubic schedule unless another one is given."""
        along = schedule or self.schedule
        return lambda rate: sj.gradual_pruning(
            optax.adam(rate), allocation=1 - sparsity, schedule=along, order=self.order
        )


PRESETS = {
    "laptop": Config(checkpoint_every=1250),
    "test": Config(
        preset="test",
        seeds=2,
        hidden=24,
        steps=40,
        batch=32,
        begin=5,
        end=30,
        freq=5,
        sparsities=(0.9,),
        learning_rates=(2e-3,),
        checkpoint_every=20,
        log_every=5,
    ),
    "paper": Config(
        preset="paper",
        task="imagenet2012",
        seeds=1,
        batch=1024,
        steps=125_000,
        begin=5_000,
        end=100_000,
        freq=100,
        sparsities=(0.5, 0.75, 0.875, 0.9, 0.95),
        learning_rates=(0.4,),
        mesh="data=8",
    ),
}


def run(config: Config, run: Run) -> Result:
    """Trains every arm and compares bits per character at equal non-zeros."""
    if config.task != "characters":
        raise ExperimentError(f"task is {config.task!r}; only --preset paper checks it, abstractly")
    text = load_characters()
    bits = make_bits(text.test)
    gradual = make_step(config, config.pruning(config.claim_sparsity))
    dense = make_step(config, optax.adam)
    stroke = sj.one_shot(config.end)
    at_once = make_step(config, config.pruning(config.claim_sparsity, stroke))
    arms: dict[str, list[Trial]] = {}

    def add(label: str, hidden: int, optimizer: Any, step: Any) -> None:
        arms[label] = train_arm(
            config, run, text, label.replace(" ", "-"), hidden=hidden, optimizer=optimizer,
            step=step, bits=bits, slug=SLUG,
        )  # fmt: skip

    add("dense", config.hidden, optax.adam, dense)
    for s in config.sparsities:
        add(f"large sparse {s:.3g}", config.hidden, config.pruning(s), gradual)
        width = sj.match_dense_width(kernel_entries, arms[f"large sparse {s:.3g}"][0].nonzeros)
        add(f"small dense {s:.3g}", width, optax.adam, dense)
    s = config.claim_sparsity
    add(f"one-shot {s:.3g}", config.hidden, config.pruning(s, stroke), at_once)

    print_table(run, config, arms)
    if run.is_main:
        draw(config, run, arms)
    best = {name: best_rate(found) for name, found in arms.items()}
    metrics = {
        "bits": {n: [t.bits for t in found] for n, found in arms.items()},
        "bits_at_best_rate": {n: [t.bits for t in found] for n, found in best.items()},
        "best_rate": {n: found[0].peak for n, found in best.items()},
        "nonzeros": {n: found[0].nonzeros for n, found in best.items()},
    }
    card = make_card(config, sj.Granularity.UNSTRUCTURED)
    return Result(make_claims(config, arms), card, metrics)


def make_claims(config: Config, arms: dict[str, list[Trial]]) -> tuple[Claim, ...]:
    """The verdicts: at the first learning rate, and with every arm at its best."""
    names = {
        "small dense": "a small dense one of as many non-zeros",
        "one-shot": "the same network pruned at one stroke",
    }

    def compare(baseline: str, sparsity: float, choose: Any, when: str) -> Claim:
        return bits_claim(
            f"at {sparsity:.3g} sparsity a gradually pruned network beats {names[baseline]} by "
            f"more than {MARGINS[baseline]} bits per character, {when}",
            choose(arms[f"large sparse {sparsity:.3g}"]),
            choose(arms[f"{baseline} {sparsity:.3g}"]),
            margin=MARGINS[baseline],
        )

    rate, sparsity = config.learning_rates[0], config.claim_sparsity

    def first(found: list[Trial]) -> list[Trial]:
        return at_rate(found, rate)

    at = f"all at learning rate {rate:g}"
    order = [sparsity, *(s for s in config.sparsities if s != sparsity)]
    claims = [compare("small dense", s, first, at) for s in order]
    claims.append(compare("one-shot", sparsity, first, at))
    if len(config.learning_rates) > 1:
        claims += [compare(n, sparsity, best_rate, "each at its best learning rate") for n in names]
    return tuple(claims)


def draw(config: Config, run: Run, arms: dict[str, list[Trial]]) -> None:
    """Bits against non-zeros, and the training losses at the sparsity of the claim."""
    figure, axes = new_figure(
        f"Next character, mean of {config.seeds} seeds with lowest and highest",
        "non-zeros of the kernels",
        "test bits per character",
    )
    families = ("large sparse", "small dense", "one-shot")
    for family, color, marker in zip(families, COLORS, "osD"):
        points = sorted((f[0].nonzeros, best_rate(f)) for n, f in arms.items() if family in n)
        x = [nonzeros for nonzeros, _ in points]
        y = [mean_bits(found) for _, found in points]
        low = [m - min(t.bits for t in found) for m, (_, found) in zip(y, points)]
        high = [max(t.bits for t in found) - m for m, (_, found) in zip(y, points)]
        axes.errorbar(x, y, (low, high), label=family, color=color, marker=marker, capsize=4)
    dense = mean_bits(best_rate(arms["dense"]))
    label = f"large dense ({kernel_entries(config.hidden):,})"
    axes.axhline(dense, color=COLORS[-1], linestyle=":", label=label)
    axes.set_xscale("log")
    ticks = sorted({f[0].nonzeros for n, f in arms.items() if "large sparse" in n})
    axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False)
    save(figure, run.folder / "bits_by_nonzeros.png")
    ending = f" {config.claim_sparsity:.3g}"
    shown = {n: best_rate(f) for n, f in arms.items() if n == "dense" or n.endswith(ending)}
    draw_training(run, shown, "Training, mean over seeds, band from lowest to highest")


def check(config: Config) -> list[str]:
    """Prunes a ResNet-50 abstractly: densities reached, a training step, bytes of its state."""
    if config.task == "characters":
        return []
    images = ImageConfig(
        dataset=config.task, model="resnet50", batch=config.batch, weight_decay=0.0
    )
    shapes = abstract_params(images)
    sizes = {path: math.prod(leaf.shape) for path, leaf in sj.named_leaves(shapes)}
    chosen = sj.selected_paths(shapes, PRUNABLE)
    scope = sum(sizes[path] for path in chosen)
    total = sum(sizes.values())
    setting = (
        f"paper setting: {config.task} with a ResNet-50, {total:,} parameters, {len(chosen)} "
        f"kernels in scope with {scope:,} weights (the first convolution stays dense)"
    )
    lines = [setting]
    for sparsity in config.sparsities:
        final = 1 - float(config.schedule(config.end, sparsity))
        kept = sum(int(sj.keep_count(sizes[path], final)) for path in chosen)
        lines.append(
            f"sparsity {sparsity:g} at step {config.end:,}: {kept:,} of {scope:,} weights stay, "
            f"{kept + total - scope:,} non-zeros in all"
        )
    traced = trace_step(
        images,
        lambda params, inner: sj.gradual_pruning(
            inner,
            allocation=1 - config.claim_sparsity,
            schedule=config.schedule,
            where=PRUNABLE,
            order=config.order,
        ),
    )
    step = (
        f"forward, backward and one step of gradual pruning around SGD traced for {config.batch:,} "
        f"images of {traced.side} x {traced.side}; parameters, momentum and masks take "
        f"{traced.mebibytes:,.1f} MiB"
    )
    missing = (
        f"checked abstractly: a run wants {config.task} prepared by TFDS, and a training loop of "
        "this experiment on images"
    )
    return [*lines, step, missing]


EXPERIMENT = Experiment(
    slug=SLUG,
    paper="To prune, or not to prune: exploring the efficacy of pruning for model compression",
    presets=PRESETS,
    run=run,
    check=check,
)

if __name__ == "__main__":
    main(EXPERIMENT)
