"""The character task: which character comes next in the source of four modules of Python.

Eight characters are embedded, one hidden layer follows, and two kernels hold nearly all weights.
The task is far from saturated at the sizes that a laptop trains, so that methods differ.
"""

import collections
import dataclasses
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import sparsejax as sj
from experiments.harness.config import Claim, ExperimentError, RunConfig
from experiments.harness.plots import draw_curves, new_figure, save
from experiments.harness.progress import make_table, mean_and_deviation
from experiments.harness.run import Run
from experiments.harness.sharding import host_batch, make_mesh
from experiments.harness.training import train

MODULES = ("argparse", "subprocess", "typing", "inspect")
VOCABULARY = 64  # the commonest characters, and one for all others
CONTEXT, EMBEDDING = 8, 16
TRAIN_SHARE = 0.9

Params = dict[str, Any]
Optimizer = Callable[[optax.Schedule], optax.GradientTransformation]
Step = Callable[..., tuple[Any, Mapping[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class CharacterConfig(RunConfig):
    """Settings of an experiment on the character task."""

    hidden: int = 512
    """Hidden units of the network that is pruned."""
    steps: int = 2500
    """Training steps of every network."""
    batch: int = 256
    """Windows in a batch, over all devices, drawn with replacement."""
    learning_rates: tuple[float, ...] = (2e-3, 4e-3)
    """Peak learning rates of Adam, a cosine from there down to a twentieth; the first is that of
    the claim line, and another claim compares every arm at its best."""
    begin: int = 250
    """Step at which pruning begins."""
    end: int = 1750
    """Step of the last mask update."""
    freq: int = 50
    """Steps between two mask updates; it must divide end - begin."""
    power: float = 3.0
    """Power of the polynomial that the sparsity follows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ExperimentError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ExperimentError(f"learning_rates are {self.learning_rates}; give positive ones")
        if len(set(self.learning_rates)) < len(self.learning_rates):
            raise ExperimentError(f"learning_rates are {self.learning_rates}; they must differ")
        if self.power <= 0:
            raise ExperimentError(f"power is {self.power}; it must be positive")
        if self.end >= self.steps:
            raise ExperimentError(f"end is {self.end}; it must come before steps = {self.steps}")
        try:
            sj.cubic(begin=self.begin, end=self.end, freq=self.freq, power=self.power)
        except ValueError as error:
            raise ExperimentError(str(error)) from error

    def learning_rate(self, peak: float | jax.Array) -> optax.Schedule:
        """A cosine from `peak` at the first step to a twentieth of it at the last."""
        shape = optax.cosine_decay_schedule(1.0, max(1, self.steps - 1), alpha=0.05)
        return lambda count: peak * shape(count)


@dataclasses.dataclass(frozen=True)
class Characters:
    """The text as numbers: `train` and `test` are uint8 rows below `VOCABULARY`."""

    train: np.ndarray
    test: np.ndarray


def load_characters() -> Characters:
    """Reads the sources; the first nine tenths are for training.

    Raises:
      ExperimentError: this Python comes without them.
    """
    try:
        text = "".join(inspect.getsource(importlib.import_module(name)) for name in MODULES)
    except OSError as error:
        raise ExperimentError(f"this Python comes without the source of {MODULES}") from error
    counts = collections.Counter(text)
    common = sorted(counts, key=lambda c: (-counts[c], c))[: VOCABULARY - 1]
    index = {character: i for i, character in enumerate(common)}
    tokens = np.asarray([index.get(c, VOCABULARY - 1) for c in text], np.uint8)
    cut = int(len(tokens) * TRAIN_SHARE)
    return Characters(tokens[:cut], tokens[cut:])


class RandomWindows:
    """Endless batches of windows `[batch, CONTEXT + 1]`, uint8, drawn with replacement.

    A batch depends on the seed and its number alone, which is the whole state.
    """

    def __init__(self, text: np.ndarray, *, batch: int, seed: int):
        self._windows = all_windows(text)
        self._batch, self._seed, self._number = batch, seed, 0
        part = host_batch(batch)
        self._rows = slice(jax.process_index() * part, (jax.process_index() + 1) * part)

    def __next__(self) -> np.ndarray:
        rng = np.random.default_rng((self._seed, self._number))
        self._number += 1
        starts = rng.integers(0, len(self._windows), self._batch)
        return self._windows[starts[self._rows]]

    def get_state(self) -> dict[str, int]:
        """The number of the next batch."""
        return {"number": self._number}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Goes on from a state."""
        self._number = int(state["number"])


def all_windows(text: np.ndarray) -> np.ndarray:
    """Every window of `CONTEXT` characters and the one that follows."""
    return np.lib.stride_tricks.sliding_window_view(text, CONTEXT + 1)


@functools.partial(jax.jit, static_argnums=1)
def init_params(key: jax.Array, hidden: int) -> Params:
    """Embedding N(0, 1), He-normal hidden kernel, output kernel N(0, 1/hidden), zero biases."""
    inputs = CONTEXT * EMBEDDING
    first, second, third = jax.random.split(key, 3)
    return {
        "embedding": jax.random.normal(first, (VOCABULARY, EMBEDDING)),
        "hidden": {
            "kernel": jax.random.normal(second, (inputs, hidden)) * math.sqrt(2 / inputs),
            "bias": jnp.zeros(hidden),
        },
        "output": {
            "kernel": jax.random.normal(third, (hidden, VOCABULARY)) * math.sqrt(1 / hidden),
            "bias": jnp.zeros(VOCABULARY),
        },
    }


def kernel_entries(hidden: int) -> int:
    """Entries of the two kernels of a network, the ones that are pruned."""
    return hidden * (CONTEXT * EMBEDDING + VOCABULARY)


def losses(params: Params, windows: jax.Array) -> jax.Array:
    """Cross-entropy of the last character of every window, in nats."""
    embedded = params["embedding"][windows[:, :CONTEXT].astype(jnp.int32)]
    x = embedded.reshape(windows.shape[0], CONTEXT * EMBEDDING)
    x = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    logits = x @ params["output"]["kernel"] + params["output"]["bias"]
    labels = windows[:, CONTEXT].astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def make_bits(text: np.ndarray, *, chunk: int = 4096) -> Callable[[Params], float]:
    """Bits per character over every window of a text, as a function of the parameters."""
    windows = all_windows(text)
    count = len(windows)
    padded = np.pad(windows, [(0, -count % chunk), (0, 0)]).reshape(-1, chunk, CONTEXT + 1)
    real = (np.arange(padded.shape[0] * chunk) < count).reshape(-1, chunk)

    @jax.jit
    def total(params: Params, windows: jax.Array, real: jax.Array) -> jax.Array:
        def part(x: tuple[jax.Array, jax.Array]) -> jax.Array:
            return jnp.sum(jnp.where(x[1], losses(params, x[0]), 0.0))

        return jnp.sum(lax.map(part, (windows, real)))

    return lambda params: float(total(params, padded, real)) / count / math.log(2)


def make_step(config: CharacterConfig, optimizer: Optimizer) -> Step:
    """A compiled step `(state, windows, peak) -> state, metrics`; the peak rate is traced."""
    mesh = make_mesh(config.mesh)
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())

    def step(
        state: Any, windows: jax.Array, peak: jax.Array
    ) -> tuple[Any, Mapping[str, jax.Array]]:
        def mean_loss(params: Params) -> jax.Array:
            return losses(params, windows).mean()

        loss, grads = jax.value_and_grad(mean_loss)(state["params"])
        transform = optimizer(config.learning_rate(peak))
        updates, opt = transform.update(grads, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, {"loss": loss}

    return jax.jit(step, out_shardings=whole)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One trained network.

    Attributes:
      name: of its folder. peak, seed: its learning rate and seed.
      bits: per character of the test text. params, masks: what it ended with.
      nonzeros: kept entries of its kernels, counted from the masks.
    """

    name: str
    peak: float
    seed: int
    bits: float
    params: Params
    masks: Any
    nonzeros: int


def train_arm(
    config: CharacterConfig,
    run: Run,
    text: Characters,
    name: str,
    *,
    hidden: int,
    optimizer: Optimizer,
    step: Step,
    bits: Callable[[Params], float],
    slug: str,
) -> list[Trial]:
    """Trains an arm at every learning rate and seed.

    Args:
      config, run, text: settings, folder and data.
      name: of the arm. hidden: its width.
      optimizer: makes the first state.
      step: from `make_step` of this optimizer, or of one whose state looks the same: sparsities
        are part of the state, so one compiled step serves all of them.
      bits: from `make_bits` of the test text.
      slug: the experiment.

    Returns:
      The trials, rate by rate.
    """
    mesh = make_mesh(config.mesh)
    found: list[Trial] = []
    for peak in config.learning_rates:
        for seed in config.seed_list():
            params = init_params(jax.random.key(seed), hidden)
            state = {"params": params, "opt": optimizer(config.learning_rate(peak)).init(params)}
            if mesh is not None:
                state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
            trial = f"{name}-lr{peak:g}-seed{seed}"
            state = train(
                run,
                trial,
                state=state,
                step=lambda s, windows, peak=peak: step(s, windows, jnp.float32(peak)),
                batches=RandomWindows(text.train, batch=config.batch, seed=seed),
                steps=config.steps,
                inspect=_density if _is_sparse(state["opt"]) else None,
                mesh=mesh,
                slug=slug,
            )
            params, masks = state["params"], sj.dense_masks(state["params"])
            if _is_sparse(state["opt"]):
                masks = sj.get_masks(state["opt"])
            layers = sj.density_report(params, masks).layers
            kept = sum(count for count, _, _ in layers.values())
            found.append(Trial(trial, peak, seed, bits(params), params, masks, kept))
        shown = mean_and_deviation([t.bits for t in at_rate(found, peak)])
        run.show(f"{name}, rate {peak:g}: {found[-1].nonzeros:,} non-zeros, {shown} bits")
    return found


def at_rate(trials: Sequence[Trial], peak: float) -> list[Trial]:
    """The trials of one learning rate."""
    return [t for t in trials if t.peak == peak]


def best_rate(trials: Sequence[Trial]) -> list[Trial]:
    """The trials at the learning rate with the lowest mean."""
    return min(
        (at_rate(trials, peak) for peak in dict.fromkeys(t.peak for t in trials)), key=mean_bits
    )


def mean_bits(trials: Sequence[Trial]) -> float:
    """Mean bits per character of several trials."""
    return sum(t.bits for t in trials) / len(trials)


def bits_claim(
    sentence: str,
    ours: Sequence[Trial],
    theirs: Sequence[Trial],
    *,
    margin: float = 0.0,
    name: str | None = None,
) -> Claim:
    """Whether ours needs fewer bits than theirs (`name`) by more than a margin, in the mean."""
    return Claim(
        sentence,
        mean_bits(theirs) - mean_bits(ours) > margin,
        mean_and_deviation([t.bits for t in ours]),
        mean_and_deviation([t.bits for t in theirs]) + (f", {name}" if name else ""),
        min(len(ours), len(theirs)),
    )


def make_card(config: CharacterConfig, granularity: sj.Granularity) -> sj.SparsityCard:
    """The card of magnitude pruning during training."""
    return sj.SparsityCard(
        what=sj.WhatIsSparse.WEIGHTS,
        granularity=granularity,
        timing=sj.Timing.DURING,
        path=sj.TrainingPath.DENSE_TO_SPARSE,
        dynamics=sj.MaskDynamics.DYNAMIC,
        allocation=sj.Allocation.UNIFORM,
        criterion=sj.Criterion.MAGNITUDE,
        gradient=sj.GradientRule.MASKED,
        seeds=config.seeds,
        budget=f"{config.steps} steps of {config.batch} windows, "
        f"{len(config.learning_rates)} learning rate(s) each",
        simulated=True,
    )


def print_table(run: Run, config: CharacterConfig, arms: Mapping[str, Sequence[Trial]]) -> None:
    """One row an arm: size, and bits at every learning rate."""
    rows = [
        (
            label,
            str(found[0].params["hidden"]["kernel"].shape[1]),
            f"{found[0].nonzeros:,}",
            f"{sj.storage_bytes(found[0].masks, 'bitmask', shapes=found[0].params) / 1024:.3g}",
            *(
                mean_and_deviation([t.bits for t in at_rate(found, rate)])
                for rate in config.learning_rates
            ),
        )
        for label, found in arms.items()
    ]
    rates = [f"rate {rate:g}" for rate in config.learning_rates]
    title = f"Bits per character of the test text, {config.seeds} seed(s)"
    table = make_table(title, ("network", "units", "non-zeros", "KiB", *rates), rows)
    table.caption = "KiB: all parameters in float32, and one bit an entry where there is a mask"
    table.caption_justify = "left"
    run.console.print(table)


def draw_training(run: Run, arms: Mapping[str, Sequence[Trial]], title: str) -> None:
    """Writes `training.png`: training loss of each arm, averaged over ten lines of metrics."""
    curves = {}
    for label, trials in arms.items():
        logs = [run.metrics(t.name) for t in trials]
        curves[label] = [
            (_blocks([x["step"] for x in log]), _blocks([x["loss"] / math.log(2) for x in log]))
            for log in logs
        ]
    figure, axes = new_figure(title, "training step", "training loss (bits per character)")
    draw_curves(axes, curves)
    highest = max(np.max(y[len(y) // 20 :]) for runs in curves.values() for _, y in runs)
    lowest = min(np.min(y) for runs in curves.values() for _, y in runs)
    axes.set_ylim(lowest - 0.1, highest + 0.35)  # room for the legend
    axes.legend(frameon=False, loc="upper right", ncols=2)
    save(figure, run.folder / "training.png")


def _blocks(values: Sequence[float], size: int = 10) -> np.ndarray:
    size = min(size, max(1, len(values) // 4))
    whole = len(values) // size * size
    return np.asarray(values[:whole]).reshape(-1, size).mean(1)


def _is_sparse(opt_state: Any) -> bool:
    return hasattr(opt_state, "masks")


@jax.jit
def _density(state: Any) -> dict[str, Any]:
    masks = [m for m in jax.tree.leaves(sj.get_masks(state["opt"])) if m.ndim]
    return {"density": sum(jnp.sum(m) for m in masks) / sum(m.size for m in masks)}
