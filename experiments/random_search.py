"""Random search for sparse sub-networks at initialisation against plain random ones.

Paper: Farahani, "Random search as a baseline for sparse neural network architecture search" (2024).
Expected: networks stay good at high sparsity, and the sub-network with the lowest loss before
training ends no better than a random one of the same counts.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import sparsejax as sj
from experiments.harness import digits
from experiments.harness.cli import main
from experiments.harness.config import Claim, Experiment, ExperimentError, Result, RunConfig
from experiments.harness.plots import COLORS, new_figure, save
from experiments.harness.progress import make_table, mean_and_deviation, training_bar
from experiments.harness.run import Run
from sparsejax.weights import SearchResult, node_sampler, paired_comparison, random_search
from sparsejax.weights import sample_edge_masks as edge_masks

SLUG = "random_search"
MINUTES = {"laptop": "3", "test": "0.3", "paper": "checked abstractly"}
SPACES, PROXIES, ARMS = ("node", "edge"), ("loss", "acc", "snip"), ("searched", "random")
WINDOW = 10  # batches in a running mean of the loss
HIGHEST = 0.9  # sparser networks are not trained to the end in so few steps


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings of `python -m experiments.random_search`."""

    seeds: int = 10
    """How many seeds each arm is run with: initialisation, candidates and batches."""
    space: tuple[str, ...] = SPACES
    """What is dropped: hidden nodes (node) or single weights (edge)."""
    sparsity: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95)
    """Shares that are dropped."""
    trials: int = 100
    """Candidates of a search."""
    chunk: int = 20
    """Candidates scored at once."""
    proxy: str = "loss"
    """What a search minimises before training: loss, acc (error rate) or snip (the negative sum of
    weight times gradient over the sub-network)."""
    search_examples: int = 512
    """Training examples that candidates are scored on."""
    hidden: tuple[int, ...] = (128, 128)
    """Nodes of the hidden layers."""
    steps: int = 300
    """Training steps."""
    batch: int = 64
    """Examples a step."""
    learning_rate: float = 0.1
    """Constant."""
    momentum: float = 0.9
    """Of SGD."""
    threshold: float = 0.3
    """Converged: the mean loss of the last 10 batches (nats) is below it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        digits.check_settings(
            self,
            positive=("trials", "chunk", "steps", "hidden"),
            known={"space": SPACES, "proxy": PROXIES},
        )
        if self.seeds < 2:
            raise ExperimentError(f"seeds is {self.seeds}; a paired comparison needs two")
        if not 1 <= self.search_examples <= digits.TRAIN:
            raise ExperimentError(
                f"search_examples is {self.search_examples}; allowed are 1 to {digits.TRAIN}"
            )
        for value in self.sparsity or (math.nan,):
            if not 0 <= value < 1:
                raise ExperimentError(f"sparsity is {value}; it must be in [0, 1)")

    def rows(self) -> list[tuple[str, float]]:
        """`(space, sparsity)` of every comparison."""
        return [(space, s) for space in self.space for s in self.sparsity]

    def sizes(self, inputs: int = digits.INPUTS) -> tuple[int, ...]:
        """Nodes of all layers."""
        return (inputs, *self.hidden, digits.CLASSES)


PRESETS = {
    "laptop": Config(),
    "test": Config(
        preset="test", seeds=3, sparsity=(0.5,), trials=8, chunk=4, hidden=(16, 16), steps=40
    ),
    "paper": Config(
        preset="paper", hidden=(1024, 1024), steps=9370, batch=128, space=("node",), trials=1000
    ),
}


@functools.partial(jax.jit, static_argnames=("space", "sparsity", "config"))
def search(key: Array, params: PyTree, batch: tuple[Array, Array], *, space: str, sparsity: float,
           config: Config) -> tuple[SearchResult, PyTree, Array]:  # fmt: skip
    """The search, its first candidate, and the losses of the best and the first at the start."""
    if space == "node":
        kernels = [f"layer{i}/kernel" for i in range(len(params))]
        sampler = node_sampler(params, kernels=kernels, sparsity=sparsity)
    else:
        sampler = functools.partial(edge_masks, params=params, sparsity=sparsity)

    def score(params: PyTree, masks: PyTree) -> Array:
        sparse = sj.apply_masks(params, masks)
        if config.proxy == "loss":
            return digits.cross_entropy(sparse, batch)
        if config.proxy == "acc":
            return 100 - digits.accuracy(sparse, batch)
        saliency = sj.gradient_saliency(sparse, jax.grad(digits.cross_entropy)(sparse, batch))
        return -sum((jnp.sum(leaf) for leaf in jax.tree.leaves(saliency)), jnp.float32(0))

    found = random_search(
        key, params, sampler=sampler, score_fn=score, trials=config.trials, chunk=config.chunk
    )
    first = sampler(jax.random.split(key, config.trials)[0])
    losses = [
        digits.cross_entropy(sj.apply_masks(params, m), batch) for m in (found.best_masks, first)
    ]
    return found, first, jnp.stack(losses)


@functools.partial(jax.jit, static_argnames=("config",))
def train_arm(params: PyTree, masks: PyTree, order: Array, data: digits.Digits, *,
              config: Config) -> digits.Trained:  # fmt: skip
    """Trains a sub-network; only the masks differ between arms, which share the compilation."""
    tx = sj.static_sparsity(optax.sgd(config.learning_rate, config.momentum), masks)
    return digits.train(tx, sj.apply_masks(params, masks), order, data)


def converged_at(losses: np.ndarray, threshold: float) -> int | None:
    """The first step at which the mean of the last 10 losses is below the threshold."""
    means = np.convolve(losses, np.ones(WINDOW) / WINDOW, "valid")
    below = np.flatnonzero(means < threshold)
    return int(below[0]) + WINDOW if len(below) else None


def training_figures(name: str, trained: digits.Trained, config: Config) -> dict[str, Any]:
    """What is kept of a training, under names that end with the arm's."""
    losses = np.asarray(trained.losses, np.float64)
    whole = losses[: len(losses) // WINDOW * WINDOW].reshape(-1, WINDOW)
    return {
        f"test_accuracy_{name}": float(trained.test_accuracy),
        f"train_loss_{name}": float(trained.train_loss),
        f"area_{name}": float(losses.sum()),
        f"steps_{name}": converged_at(losses, config.threshold),
        f"curve_{name}": [round(float(value), 4) for value in whole.mean(1)],
    }


def train_seeds(
    space: str, sparsity: float, config: Config, data: digits.Digits
) -> dict[str, list[Any]]:
    """Searched and random sub-network of every seed; the space "dense" trains the whole network."""
    batch = (data.train_x[: config.search_examples], data.train_y[: config.search_examples])
    config = digits.static_settings(config)
    figures = []
    for seed in config.seed_list():
        init, draw_key = jax.random.split(jax.random.key(seed))
        params = digits.init_mlp(init, config.sizes())
        order = digits.batch_order(seed, steps=config.steps, batch=config.batch)
        if space == "dense":
            # full masks, not scalars: the shapes of the other arms
            masks = jax.tree.map(lambda w: jnp.ones(w.shape if w.ndim == 2 else (), bool), params)
            trained = train_arm(params, masks, order, data, config=config)
            figures.append(training_figures("dense", trained, config))
            continue
        found, first, losses = search(
            draw_key, params, batch, space=space, sparsity=sparsity, config=config
        )
        one: dict[str, Any] = {
            "score_best": float(found.scores[found.best_index]),
            "score_mean": float(found.scores.mean()),
            "weight_sparsity": 1 - sj.count_masks(found.best_masks).density,
        }
        for name, masks, loss in zip(ARMS, (found.best_masks, first), losses):
            trained = train_arm(params, masks, order, data, config=config)
            one |= {f"initial_loss_{name}": float(loss)}
            one |= training_figures(name, trained, config)
        figures.append(one)
    return {name: [one[name] for one in figures] for name in figures[0]}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Searched minus random over the seeds, in points of accuracy and in steps to the threshold.

    Attributes:
      mean, error, p: of the accuracies, by a paired t-test. steps_p: of the steps, None where an
      arm of some seed did not converge.
    """

    mean: float
    error: float
    p: float
    steps_p: float | None


def compare(values: dict[str, list[Any]]) -> Comparison:
    """The paired tests of one row."""

    def paired(name: str) -> list[float]:
        arms = [jnp.asarray(values[f"{name}_{arm}"], jnp.float32) for arm in ARMS]
        return [float(x) for x in paired_comparison(*arms)]

    steps = [*values["steps_searched"], *values["steps_random"]]
    mean, error, p = paired("test_accuracy")
    return Comparison(mean, error, p, None if None in steps else paired("steps")[2])


def run(config: Config, run: Run) -> Result:
    """Searches and trains, and compares what was found with random sub-networks."""
    data = digits.load_digits()
    arms = [("dense", 0.0), *config.rows()]
    found: dict[tuple[str, float], dict[str, list[Any]]] = {}
    with training_bar(run.console, "rows", total=len(arms)) as bar:
        for done, (space, sparsity) in enumerate(arms, 1):
            compute = functools.partial(train_seeds, space, sparsity, config, data)
            name = f"{space}-s{sparsity:g}"
            found[space, sparsity] = digits.kept_arm(run, SLUG, name, compute)
            bar(done, 0.0, {})
    dense = found.pop(("dense", 0.0))
    tests = {row: compare(values) for row, values in found.items()}
    print_tables(run, config, dense, found, tests)
    draw(run, config, dense, found, tests)
    metrics = {
        "dense": dense,
        "rows": {f"{space}-s{s:g}": values for (space, s), values in found.items()},
        "paired": {f"{space}-s{s:g}": dataclasses.asdict(t) for (space, s), t in tests.items()},
    }
    card = sj.SparsityCard(
        what=sj.WhatIsSparse.WEIGHTS,
        granularity=sj.Granularity.CHANNEL if "node" in config.space else
        sj.Granularity.UNSTRUCTURED,
        timing=sj.Timing.BEFORE,
        path=sj.TrainingPath.SPARSE_TO_SPARSE,
        dynamics=sj.MaskDynamics.STATIC,
        allocation=sj.Allocation.UNIFORM,
        criterion=sj.Criterion.SCORE,
        gradient=sj.GradientRule.MASKED,
        seeds=config.seeds,
        budget=f"best of {config.trials} before training, then {config.steps} steps for every arm",
        simulated=True,
    )  # fmt: skip
    return Result(make_claims(config, dense, found, tests), card, metrics)


def mean_steps(values: list[int | None]) -> str:
    """Mean number of steps, or how many seeds got there."""
    there = [value for value in values if value is not None]
    if len(there) < len(values):
        return f"{len(there)} of {len(values)} got there"
    return f"{np.mean(there):.0f}"


def print_tables(run: Run, config: Config, dense: Any, found: Any, tests: Any) -> None:
    """Accuracies with their paired tests, and what happens before and while training."""
    whole = mean_and_deviation(dense["test_accuracy_dense"], 2)
    accuracies = [["dense", "0", whole, "", "", ""]]
    progress = [["dense", "", "", mean_steps(dense["steps_dense"]), "", ""]]
    for (space, s), values in found.items():
        test = tests[space, s]
        arms = [mean_and_deviation(values[f"test_accuracy_{a}"], 2) for a in ARMS]
        sparse = f"{np.mean(values['weight_sparsity']):.3f}"
        gain = f"{test.mean:+.2f} ± {test.error:.2f}"
        accuracies.append([f"{space} {s:g}", sparse, *arms, gain, f"{test.p:.2f}"])
        scores = [f"{np.mean(values[f'score_{kind}']):.3f}" for kind in ("best", "mean")]
        steps = [mean_steps(values[f"steps_{a}"]) for a in ARMS]
        p = "" if test.steps_p is None else f"{test.steps_p:.2f}"
        progress.append([f"{space} {s:g}", *scores, *steps, p])
    title = f"Test accuracy (%) of {config.seeds} seeds; difference ± standard error, paired t-test"
    header = ("dropped", "of weights", *ARMS, "difference", "p")
    run.console.print(make_table(title, header, accuracies))
    title = f"{config.proxy} of {config.trials} candidates; steps to loss {config.threshold:g}"
    header = ("dropped", "best", "mean", *(f"steps, {a}" for a in ARMS), "p")
    run.console.print(make_table(title, header, progress))


def make_claims(config: Config, dense: Any, found: Any, tests: Any) -> tuple[Claim, ...]:
    """Verdicts: no gain from the search, and what high sparsity costs."""
    rows = [row for row in tests if row[1] <= HIGHEST] or list(tests)
    gain = float(np.mean([tests[row].mean for row in rows]))
    level = 0.05 / len(rows)
    winners = [row for row in rows if tests[row].mean > 0 and tests[row].p < level]
    accuracies = [np.mean([found[row][f"test_accuracy_{arm}"] for row in rows])
                  for arm in ARMS]  # fmt: skip
    claims = [
        Claim(
            f"the best of {config.trials} sub-networks by {config.proxy} before training trains no "
            f"better than a random one (mean gain below 0.4 points over {len(rows)} rows up to "
            f"{max(s for _, s in rows):.0%} sparsity, none with p < {level:.4f})",
            gain < 0.4 and not winners,
            f"mean difference {gain:+.2f} points, searched {accuracies[0]:.2f} %",
            f"random {accuracies[1]:.2f} %",
            config.seeds,
        )
    ]
    if ("node", HIGHEST) in found:
        whole = float(np.mean(dense["test_accuracy_dense"]))
        random = float(np.mean(found["node", HIGHEST]["test_accuracy_random"]))
        claims.append(
            Claim(
                f"a random {1 - HIGHEST:.0%} of the hidden nodes lose only 1 to 4 points",
                1 <= whole - random <= 4,
                f"{random:.2f} %",
                f"dense {whole:.2f} %",
                config.seeds,
            )
        )
    return tuple(claims)


def draw(run: Run, config: Config, dense: Any, found: Any, tests: Any) -> None:
    """Paired differences with their errors, and training losses."""
    figure, axes = new_figure(
        f"Accuracy that the search gains ({config.seeds} seeds; bars: mean ± 2 standard errors)",
        "", "searched minus random (points)", size=(7.6, 4.2),
    )  # fmt: skip
    labels = [f"{space}\n{s:g}" for space, s in tests]
    for i, (row, test) in enumerate(tests.items()):
        arms = [np.asarray(found[row][f"test_accuracy_{a}"]) for a in ARMS]
        color = COLORS[SPACES.index(row[0])]
        axes.scatter([i + 0.16] * config.seeds, arms[0] - arms[1], s=12, color=color, alpha=0.45)
        axes.errorbar(i - 0.08, test.mean, 2 * test.error, color=color, fmt="o", capsize=4, lw=2)
    axes.axhline(0, color="#222222", lw=0.8)
    axes.set_yscale("symlog", linthresh=2)
    low, high = axes.get_ylim()
    ticks = [t for t in (-30, -10, -5, -2, -1, 0, 1, 2, 5, 10, 30) if low <= t <= high]
    axes.set_yticks(ticks, labels=[f"{t:+d}" if t else "0" for t in ticks])
    axes.set_xticks(range(len(labels)), labels=labels)
    save(figure, run.folder / "difference.png")
    space = config.space[0]
    figure, axes = new_figure(
        f"Share of {space}s dropped, searched and random (mean of {config.seeds} seeds)",
        "training step", "training loss (nats)",
    )  # fmt: skip
    curves = {"dense": dense["curve_dense"]}
    for s in config.sparsity:
        for arm in ARMS:
            curves[f"{arm}, {s:g}"] = found[space, s][f"curve_{arm}"]
    for i, (label, values) in enumerate(curves.items()):
        color = COLORS[-1] if i == 0 else COLORS[(i - 1) // 2 % (len(COLORS) - 1)]
        mean = np.mean(values, axis=0)
        axes.plot((np.arange(len(mean)) + 0.5) * WINDOW, mean, color=color, lw=1.5, label=label,
                  linestyle="--" if label.startswith("random") else "-")  # fmt: skip
    axes.set_yscale("log")
    axes.legend(frameon=False, ncols=2, fontsize=8)
    save(figure, run.folder / "training_loss.png")


def check(config: Config) -> list[str]:
    """Builds the search and a training step of a large network on MNIST's shapes, abstractly."""
    sizes = config.sizes(inputs=28 * 28)

    def whole(key: Array, pixels: Array, labels: Array, *, space: str, sparsity: float) -> Any:
        data, params = digits.Digits(pixels, labels, pixels, labels), digits.init_mlp(key, sizes)
        found, first, _ = search(
            key, params, (pixels, labels), space=space, sparsity=sparsity, config=config
        )
        order = jnp.zeros((1, config.batch), jnp.int32)
        return found, train_arm(params, first, order, data, config=config)

    lines = []
    for space, s in config.rows():
        found, trained = jax.eval_shape(
            functools.partial(whole, space=space, sparsity=s),
            jax.eval_shape(lambda: jax.random.key(0)),
            jax.ShapeDtypeStruct((config.search_examples, sizes[0]), jnp.float32),
            jax.ShapeDtypeStruct((config.search_examples,), jnp.int32),
        )
        weights = sum(w.size for w in jax.tree.leaves(trained.params) if w.ndim == 2)
        lines.append(
            f"{space} sparsity {s:g} of {'-'.join(map(str, sizes))}, {weights:,} weights: a search "
            f"of {found.scores.shape[0]:,} candidates and a step of {config.batch} trace; "
            f"{config.chunk} candidates at once take {config.chunk * weights / 2**20:,.0f} MiB of "
            "masks"
        )
    missing = (
        "checked abstractly: the paper's own sizes and datasets are not known; MNIST from TFDS is "
        "not wired to this experiment, and ResNet-20 needs a ResNet in sparsejax.models, which is "
        "not there yet"
    )
    return [*lines, missing]


EXPERIMENT = Experiment(
    slug=SLUG,
    paper="Random Search as a Baseline for Sparse Neural Network Architecture Search",
    presets=PRESETS,
    run=run,
    check=check,
)

if __name__ == "__main__":
    main(EXPERIMENT)
