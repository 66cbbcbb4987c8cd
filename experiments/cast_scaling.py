"""CAST's scaling law: the loss of 2:4 models from their size and their tokens, predicted ahead.

Paper: CAST (2025, arXiv 2509.25996), whose scaling law for sparse training has a form that is not
known here; ours is that of dense pre-training, L(P, D) = E + a P^-alpha + b D^-beta.

A few sizes of LLaMA are trained dense, once each. From there CAST trains every size to 2:4 for
several token budgets, and the dense model is trained on for as long. A law is fitted to each
family without its largest budgets of the largest sizes, whose losses it must then predict.
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import sparsejax as sj
from experiments.cast_llama.config import Config as CastConfig
from experiments.cast_llama.methods import build_methods, magnitude_masks, make_trainer
from experiments.harness.cli import main
from experiments.harness.config import Claim, Experiment, ExperimentError, Result, RunConfig
from experiments.harness.data import TokenizedText, validation_windows, window_batches
from experiments.harness.language import load_text, rate_shape
from experiments.harness.perplexity import make_perplexity
from experiments.harness.plots import COLORS, new_figure, save
from experiments.harness.progress import make_table, mean_and_deviation
from experiments.harness.run import Run
from experiments.harness.scaling_law import ScalingLaw, fit_scaling_law
from experiments.harness.training import train
from sparsejax.models import LLAMA_SIZES, Llama, LlamaConfig, llama_config, parameter_count

MINUTES = {"laptop": "9", "test": "1", "paper": "checked abstractly"}
SLUG = "cast_scaling"
FAMILIES = {"cast": "CAST at 2:4", "dense": "dense, trained on"}


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings of `python -m experiments.cast_scaling`."""

    sizes: tuple[str, ...] = ("32", "64", "96", "128")
    """Widths of small LLaMAs, or names of sizes, from the smallest to the largest."""
    budgets: tuple[int, ...] = (100, 250, 600)
    """Training steps after the dense model, ascending."""
    held_out: int = 2
    """How many of the largest sizes are predicted at the largest budget."""
    bound: float = 0.03
    """Relative error that a prediction may have."""
    dataset: str = "python_text"
    """A text dataset of this project or of TFDS, by name."""
    layers: int = 2
    """Blocks of a LLaMA that is given by its width."""
    batch: int = 8
    """Sequences in a batch."""
    seq_len: int = 64
    """Tokens that a sequence predicts."""
    dense_steps: int = 1000
    """Steps of dense pre-training."""
    learning_rate: float = 3e-3
    """Peak learning rate of every run."""
    l1_decay: float = 2e-2
    """CAST's lambda."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mesh or self.multihost:
            raise ExperimentError("cast_scaling runs on one device: leave mesh and multihost out")
        unknown = [s for s in self.sizes if not s.isdecimal() and s not in LLAMA_SIZES]
        if unknown:
            raise ExperimentError(
                f"sizes has {unknown[0]!r}: give widths or {', '.join(LLAMA_SIZES)}"
            )
        if len(set(self.sizes)) < max(3, len(self.sizes)):
            raise ExperimentError(f"sizes are {self.sizes}; give three or more different ones")
        if len(self.budgets) < 3 or sorted(set(self.budgets)) != list(self.budgets):
            raise ExperimentError(f"budgets are {self.budgets}; give three or more, ascending")
        if not 0 < self.held_out < len(self.sizes):
            raise ExperimentError(
                f"held_out is {self.held_out}; it must be at least 1 and below {len(self.sizes)}"
            )
        for name in ("layers", "batch", "seq_len", "dense_steps", "bound", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ExperimentError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.budgets[0] < 1 or self.l1_decay < 0:
            raise ExperimentError("budgets must be positive and l1_decay not negative")

    def training(self, steps: int, **changes: Any) -> CastConfig:
        """The settings of a run of so many steps, as the CAST experiment has them."""
        return CastConfig(
            methods=tuple(FAMILIES),
            dataset=self.dataset,
            batch=self.batch,
            seq_len=self.seq_len,
            steps=steps,
            l1_decay=self.l1_decay,
            **changes,
        )

    def recipe(self, family: str, steps: int) -> tuple[CastConfig, np.ndarray]:
        """Settings of a run, and its peak learning rate at every step.

        The number of steps is part of CAST, but not of dense training: there the whole schedule
        lies in the peaks, so that runs of any length share one compilation.
        """
        if family == "cast":
            return self.training(steps), np.full(steps, self.learning_rate, np.float32)
        shape = jax.vmap(rate_shape(steps))(jnp.arange(steps))
        rates = np.zeros(max(self.dense_steps, *self.budgets), np.float32)
        rates[:steps] = self.learning_rate * shape
        return self.training(1, schedule="constant"), rates

    def tokens(self, steps: int) -> int:
        """Tokens that a run of so many steps sees."""
        return steps * self.batch * self.seq_len


PRESETS = {
    "laptop": Config(log_every=50, checkpoint_every=1000),
    "test": Config(
        preset="test",
        sizes=("16", "24", "32"),
        budgets=(4, 8, 16),
        held_out=1,
        seeds=1,
        layers=1,
        batch=4,
        seq_len=16,
        dense_steps=20,
    ),
    "paper": Config(
        preset="paper",
        sizes=("60m", "135m", "350m", "tinyllama-1.1b", "llama-2-7b"),
        budgets=(500, 1000, 2000, 4000, 7500),
        dataset="c4/en",
        seeds=1,
        batch=256,
        seq_len=1024,
        dense_steps=100_000,
        learning_rate=2e-5,
        l1_decay=4e-7,
    ),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A family's runs at one size and budget, with one loss a seed."""

    size: str
    parameters: int
    tokens: int
    losses: tuple[float, ...]
    held_out: bool

    @property
    def mean(self) -> float:
        """Mean loss over seeds."""
        return sum(self.losses) / len(self.losses)


def size_config(config: Config, size: str, vocab_size: int) -> LlamaConfig:
    """The LLaMA of a width, or of a name."""
    if not size.isdecimal():
        room = max(config.seq_len, LLAMA_SIZES[size].max_seq_len)
        return llama_config(size, vocab_size=vocab_size, max_seq_len=room)
    width = int(size)
    inner = 16 * max(1, round(width / 6))  # 8/3 of the width, in whole groups for every scale
    return LlamaConfig(vocab_size, width, config.layers, 4, inner, config.seq_len)


def run(config: Config, run: Run) -> Result:
    """Trains every size at every budget, fits both laws and looks at what they predict."""
    text = load_text(config.training(1))
    cells: dict[str, list[Cell]] = {name: [] for name in FAMILIES}
    for size in config.sizes:
        for name, found in train_size(config, run, text, size).items():
            cells[name] += found
    laws = {name: fit(found) for name, found in cells.items()}
    for name, label in FAMILIES.items():
        show(config, run, label, laws[name], cells[name])
        if run.is_main:
            draw(config, run, name, laws[name], cells[name])
    metrics = {
        name: {
            "law": dataclasses.asdict(laws[name]),
            "cells": [dataclasses.asdict(cell) for cell in found],
            "errors": {c.size: error(laws[name], c) for c in found if c.held_out},
        }
        for name, found in cells.items()
    }
    claims = tuple(make_claim(config, name, laws[name], cells[name]) for name in FAMILIES)
    card = sj.SparsityCard(
        what=sj.WhatIsSparse.WEIGHTS,
        granularity=sj.Granularity.N_M,
        timing=sj.Timing.DURING,
        path=sj.TrainingPath.DENSE_TO_SPARSE,
        dynamics=sj.MaskDynamics.DYNAMIC,
        allocation=sj.Allocation.UNIFORM,
        criterion=sj.Criterion.MAGNITUDE,
        gradient=sj.GradientRule.DENSE,
        seeds=config.seeds,
        budget=f"{config.budgets[0]} to {config.budgets[-1]} steps from one dense model a size",
        simulated=True,
    )
    return Result(claims, card, metrics)


def train_size(config: Config, run: Run, text: TokenizedText, size: str) -> dict[str, list[Cell]]:
    """One size: its dense model, then every budget and seed of both families."""
    sizes = size_config(config, size, text.vocab_size)
    graph, params = nnx.split(Llama(sizes, rngs=nnx.Rngs(config.seed)))

    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(tokens)

    compiled: dict[CastConfig, Any] = {}

    def trained(family: str, trial: str, start: Any, steps: int, seeds: list[int]) -> list[Any]:
        settings, rates = config.recipe(family, steps)
        method = build_methods(settings)[family]
        init, step = make_trainer(settings, method, logits)
        if settings not in compiled:
            compiled[settings] = jax.jit(
                lambda s, b, dense, peaks: step(s, b, dense, peaks[s["step"]])
            )
        masks, ends = magnitude_masks(start, settings), []
        for seed in seeds:
            state = train(
                run,
                f"{trial}-seed{seed}",
                state=init(start, masks, seed),
                step=lambda s, b: compiled[settings](s, b, start, rates),
                batches=window_batches(
                    text.train, seq_len=config.seq_len, batch=config.batch, seed=seed
                ),
                steps=steps,
                slug=SLUG,
            )
            ends.append(method.finish(state, start)[0])
        return ends

    [dense] = trained("dense", f"teacher-{size}", params, config.dense_steps, [config.seed])
    windows = validation_windows(text.validation, config.seq_len)
    perplexity = make_perplexity(logits)
    count = parameter_count(sizes)
    run.show(f"{size}: {count:,} parameters, dense loss {math.log(perplexity(dense, windows)):.3f}")
    cells: dict[str, list[Cell]] = {name: [] for name in FAMILIES}
    seeds = [1000 + seed for seed in config.seed_list()]
    for name, steps in itertools.product(FAMILIES, config.budgets):
        ends = trained(name, f"{name}-{size}-{steps}", dense, steps, seeds)
        losses = tuple(math.log(perplexity(end, windows)) for end in ends)
        held_out = steps == config.budgets[-1] and size in config.sizes[-config.held_out :]
        cells[name].append(Cell(size, count, config.tokens(steps), losses, held_out))
        run.show(f"{size}, {FAMILIES[name]}, {steps} steps: loss {mean_and_deviation(losses)}")
    return cells


def fit(cells: list[Cell]) -> ScalingLaw:
    """The law of the runs that are not held out, every seed a point."""
    points = [(c.parameters, c.tokens, loss) for c in cells if not c.held_out for loss in c.losses]
    return fit_scaling_law(*np.asarray(points, np.float64).T)


def error(law: ScalingLaw, cell: Cell) -> float:
    """Relative error of a prediction."""
    return float(law.predict(cell.parameters, cell.tokens)) / cell.mean - 1


def last_loss(cells: list[Cell], cell: Cell) -> float:
    """The loss of the same size at the budget before: what is predicted without a law."""
    return max((c for c in cells if c.size == cell.size and c.tokens < cell.tokens),
               key=lambda c: c.tokens).mean  # fmt: skip


def make_claim(config: Config, name: str, law: ScalingLaw, cells: list[Cell]) -> Claim:
    """Whether the law predicts what it has not seen: close enough, and better than no law."""
    held_out = [cell for cell in cells if cell.held_out]
    ours = max(abs(error(law, cell)) for cell in held_out)
    without = max(abs(last_loss(cells, cell) / cell.mean - 1) for cell in held_out)
    return Claim(
        f"a law fitted on the smaller runs predicts the held-out losses of {FAMILIES[name]} within "
        f"{config.bound:.0%}, and closer than the loss at the budget before",
        ours <= config.bound and ours < without,
        f"largest error {ours:.2%} of {len(held_out)}",
        f"{without:.2%}",
        config.seeds,
    )


def show(config: Config, run: Run, label: str, law: ScalingLaw, cells: list[Cell]) -> None:
    """The table of a family: every loss beside the law's."""
    rows = [
        (
            cell.size + (" (held out)" if cell.held_out else ""),
            f"{cell.parameters:,}",
            f"{cell.tokens:,}",
            mean_and_deviation(cell.losses),
            f"{float(law.predict(cell.parameters, cell.tokens)):.3f}",
            f"{error(law, cell):+.2%}",
        )
        for cell in cells
    ]
    title = f"{label}: {law}, {config.seeds} seed(s)"
    header = ("size", "parameters", "tokens", "loss", "law", "error")
    run.console.print(make_table(title, header, rows))


def draw(config: Config, run: Run, name: str, law: ScalingLaw, cells: list[Cell]) -> None:
    """Losses over tokens for each size, with the law; held-out runs are hollow."""
    figure, axes = new_figure(
        f"{FAMILIES[name]}: {law}\nhollow: not in the fit; bars from lowest to highest seed",
        "tokens after dense training",
        "validation loss (nats per token)",
    )
    tokens = np.geomspace(min(c.tokens for c in cells), max(c.tokens for c in cells), 100)
    for size, color in zip(config.sizes, itertools.cycle(COLORS)):
        found = [cell for cell in cells if cell.size == size]
        label = f"{found[0].parameters:,} parameters"
        axes.plot(tokens, law.predict(found[0].parameters, tokens), color=color, label=label)
        for cell in found:
            low, high = cell.mean - min(cell.losses), max(cell.losses) - cell.mean
            axes.errorbar(
                [cell.tokens], [cell.mean], [[low], [high]], color=color, marker="o", capsize=3,
                markerfacecolor="white" if cell.held_out else color, markersize=7,
            )  # fmt: skip
    axes.set_xscale("log")
    ticks = sorted({cell.tokens for cell in cells})
    axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False)
    save(figure, run.folder / f"{name}_law.png")


def check(config: Config) -> list[str]:
    """Builds the full setting abstractly: parameters and tokens, and a step of the largest size."""
    lines = []
    for size in config.sizes:
        sizes = size_config(config, size, 32000)
        lines.append(f"{size}: {parameter_count(sizes):,} parameters")
    largest = size_config(config, config.sizes[-1], 32000)
    graph, params = nnx.split(nnx.eval_shape(lambda: Llama(largest, rngs=nnx.Rngs(0))))
    settings = config.training(config.budgets[-1])
    init, step = make_trainer(
        settings, build_methods(settings)["cast"], lambda p, tokens: nnx.merge(graph, p)(tokens)
    )
    masks = jax.eval_shape(lambda p: magnitude_masks(p, settings), params)
    state = jax.eval_shape(lambda p, m: init(p, m, 0), params, masks)
    windows = jax.ShapeDtypeStruct((config.batch, config.seq_len + 1), jnp.int32)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    _, metrics = jax.eval_shape(step, state, windows, params, rate)
    budgets = ", ".join(f"{config.tokens(steps):,}" for steps in config.budgets)
    cost = (
        f"token budgets {budgets}; a step of {config.sizes[-1]} traces, its metrics are "
        f"{', '.join(metrics)}"
    )
    wanted = (
        f"{config.held_out} sizes are held out at the largest budget; checked abstractly: a run "
        f"wants {config.dataset} and accelerators, and trains the dense models first"
    )
    return [*lines, cost, wanted]


EXPERIMENT = Experiment(
    slug=SLUG,
    paper="CAST: Continuous and Differentiable Semi-Structured Sparsity-Aware Training for LLMs",
    presets=PRESETS,
    run=run,
    check=check,
)

if __name__ == "__main__":
    main(EXPERIMENT)
