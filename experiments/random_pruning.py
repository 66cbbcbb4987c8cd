"""Random pruning at initialisation against dense networks, SET, RigL and pruning criteria.

Paper: Liu, Chen, Chen, Shen, Mocanu, Wang and Pechenizkiy, "The unreasonable effectiveness of
random pruning: return of the most naive baseline for sparse training" (ICLR 2022). Expected: masks
drawn at random before training, with densities by layer (ERK), come close to the dense network
once it is wide; ERK beats uniform densities at high sparsity; masks that change beat fixed ones.
"""

import dataclasses
import functools
import re
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import sparsejax as sj
from experiments.harness import digits
from experiments.harness.abstract_training import abstract_params, trace_step
from experiments.harness.cli import main
from experiments.harness.config import Claim, Experiment, ExperimentError, Result, RunConfig
from experiments.harness.images import ImageConfig
from experiments.harness.plots import COLORS, draw_curves, new_figure, save
from experiments.harness.progress import make_table, mean_and_deviation, training_bar
from experiments.harness.run import Run
from sparsejax.core.allocation import Kind

SLUG = "random_pruning"
MINUTES = {"laptop": "3", "test": "0.3", "paper": "checked abstractly"}
CRITERIA = ("snip", "grasp", "synflow")
METHODS = ("static", "set", "rigl", *CRITERIA)
RATIOS = (*get_args(Kind), *CRITERIA)
LABELS = {"set": "SET", "rigl": "RigL", "snip": "SNIP", "grasp": "GraSP", "synflow": "SynFlow",
          "erk": "ERK", "er": "ER"}  # fmt: skip
GRASP_TEMPERATURE, PER_CLASS = 200.0, 25


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings of `python -m experiments.random_pruning`."""

    seeds: int = 5
    """How many seeds each arm is run with: initialisation, masks and batches."""
    width: tuple[int, ...] = (16, 32, 64, 128, 256)
    """Nodes of both hidden layers, from narrow to wide."""
    density: tuple[float, ...] = (0.1, 0.05)
    """Shares of the weights that stay, at every width."""
    ratio: tuple[str, ...] = ("uniform", "erk")
    """How density is shared among the layers: uniform, uniform_plus, er, erk, erk_plus, snip, grasp
    or synflow (the shares that the criterion leaves, at random positions)."""
    at: tuple[str, ...] = ("128:0.03", "64:0.05")
    """WIDTH:DENSITY where the methods are compared."""
    method: tuple[str, ...] = METHODS
    """Compared there: static, set and rigl from random ERK masks; snip, grasp and synflow with
    their own masks and with random ones of the same layer densities."""
    synflow_rounds: int = 100
    """Rounds of SynFlow's iterative pruning."""
    steps: int = 500
    """Training steps."""
    batch: int = 64
    """Examples a step."""
    learning_rate: float = 0.1
    """At the start; it falls to 0 along a cosine."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 5e-4
    """Added to the gradient, of biases too."""
    freq: int = 25
    """SET and RigL: steps between two exchanges."""
    alpha: float = 0.3
    """SET and RigL: share of the weights exchanged at the start; it falls along a cosine."""
    t_end: float = 0.75
    """SET and RigL: share of training after which masks stay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        digits.check_settings(
            self,
            positive=("width", "steps", "freq", "synflow_rounds"),
            shares=("alpha", "t_end", "momentum"),
            known={"method": METHODS, "ratio": RATIOS},
        )
        for value in (*self.density, *(density for _, density in self.points())):
            if not 0 < value < 1:
                raise ExperimentError(f"density is {value}; it must be between 0 and 1")
        if not self.density:
            raise ExperimentError("density is empty; give one value or several")

    def points(self) -> list[tuple[int, float]]:
        """`at` as numbers."""
        for text in self.at:
            if not re.fullmatch(r"[1-9]\d*:[01]?\.\d+", text):
                raise ExperimentError(f"at is {text!r}; it must look like 128:0.03")
        return [(int(w), float(d)) for w, d in (text.split(":") for text in self.at)]


PRESETS = {
    "laptop": Config(),
    "test": Config(preset="test", seeds=2, width=(8, 16), density=(0.2,), at=("16:0.2",), steps=30,
                   freq=5, synflow_rounds=5, method=("static", "set", "rigl", "snip")),
    "paper": Config(preset="paper", seeds=3, width=(16,), steps=56250, batch=128, freq=100, at=()),
}  # fmt: skip


def optimizer(config: Config) -> optax.GradientTransformation:
    """SGD with momentum, coupled weight decay and a cosine."""
    rate = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    return digits.sgd(rate, momentum=config.momentum, weight_decay=config.weight_decay)


@functools.partial(jax.jit, static_argnames=("method", "config"))
def train_arm(params: PyTree, masks: PyTree, key: Array, order: Array, data: digits.Digits, *,
              method: str, config: Config) -> tuple[digits.Trained, Array]:  # fmt: skip
    """Trains with fixed or changing masks; all masks of one shape share the compilation."""
    if method == "static":
        tx = sj.static_sparsity(optimizer(config), masks)
    else:
        end = max(1, round(config.t_end * config.steps))
        tx = sj.dynamic_sparsity(
            optimizer(config),
            masks=masks,
            grow="gradient" if method == "rigl" else "random",
            drop=lambda step: sj.cosine_drop(step, end=end, alpha=config.alpha),
            freq=config.freq,
            end=max(end - 1, config.freq),
            key=key,
        )
    trained = digits.train(tx, sj.apply_masks(params, masks), order, data)
    kernels = [layer["kernel"].ravel() for layer in trained.state.masks.values()]
    return trained, jnp.concatenate(kernels).mean()


@jax.jit
def draw_masks(key: Array, params: PyTree, shares: list[Array]) -> PyTree:
    """Random masks of exact counts; a share of 1 gives a full mask, so that shapes stay alike."""
    shares_by_leaf = {name: {"kernel": s, "bias": 1} for name, s in zip(sorted(params), shares)}
    return sj.random_masks(key, params, shares_by_leaf)


@functools.partial(jax.jit, static_argnames=("criterion", "density"))
def scored_masks(params: PyTree, batch: tuple[Array, Array], *, criterion: str,
                 density: float) -> PyTree:  # fmt: skip
    """Masks of SNIP or GraSP, ranked over the whole network."""
    if criterion == "snip":
        return sj.masks_from_scores(sj.snip_scores(digits.cross_entropy, params, batch), density)

    def loss(p: PyTree, part: tuple[Array, Array]) -> Array:
        logits = digits.mlp_logits(p, part[0]) / GRASP_TEMPERATURE
        return optax.softmax_cross_entropy_with_integer_labels(logits, part[1]).mean()

    half = len(batch[1]) // 2
    halves = [tuple(a[:half] for a in batch), tuple(a[half:] for a in batch)]
    return sj.masks_from_scores(sj.grasp_scores(loss, params, halves), density, largest=False)


def initialise(width: int, seed: int) -> tuple[PyTree, Array, Array]:
    """Parameters, and keys for random masks and random growth; every arm of a seed has the same."""
    init, noise, grow = jax.random.split(jax.random.key(seed), 3)
    sizes = (digits.INPUTS, width, width, digits.CLASSES)
    return digits.init_mlp(init, sizes), noise, grow


@functools.cache
def criterion_masks(criterion: str, width: int, density: float, seed: int, rounds: int) -> PyTree:
    """The criterion's own masks at initialisation, from 25 training examples a class."""
    params, data = initialise(width, seed)[0], digits.load_digits()
    if criterion == "synflow":
        shape = (digits.INPUTS,)
        return sj.synflow_masks(digits.mlp_logits, params, shape, density, rounds=rounds)
    labels = np.asarray(data.train_y)
    rows = np.concatenate([np.flatnonzero(labels == c)[:PER_CLASS] for c in range(digits.CLASSES)])
    batch = (data.train_x[rows], data.train_y[rows])
    return scored_masks(params, batch, criterion=criterion, density=density)


def arm_masks(arm: "Arm", seed: int, rounds: int) -> PyTree:
    """The masks that an arm starts from."""
    params, noise, _ = initialise(arm.width, seed)
    criterion = arm.ratio or arm.method
    if criterion in CRITERIA:
        own = criterion_masks(criterion, arm.width, arm.density, seed, rounds)
        if arm.ratio is None:
            return own
        return draw_masks(noise, params, [own[name]["kernel"].mean() for name in sorted(params)])
    kernels = {name: params[name]["kernel"] for name in sorted(params)}
    solved = {} if arm.density == 1 else sj.layer_densities(kernels, arm.density, arm.ratio)  # type: ignore
    return draw_masks(noise, params, [jnp.float32(solved.get(name, 1.0)) for name in kernels])


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to choose and change masks; `ratio` None takes the criterion's own masks."""

    width: int
    density: float
    method: str
    ratio: str | None

    @property
    def name(self) -> str:
        """Unique in a run."""
        return f"{self.method}-{self.ratio or 'own'}-w{self.width}-d{self.density:g}"


def list_arms(config: Config) -> list[Arm]:
    """Everything the run trains, each arm once."""
    arms = []
    for width in config.width:
        arms.append(Arm(width, 1.0, "static", "dense"))
        arms += [Arm(width, d, "static", r) for d in config.density for r in config.ratio]
    for width, density in config.points():
        arms.append(Arm(width, 1.0, "static", "dense"))
        for method in config.method:
            own = method in CRITERIA
            arms.append(Arm(width, density, "static" if own else method, method if own else "erk"))
            arms += [Arm(width, density, method, None)] if own else []
    return list(dict.fromkeys(arms))


def train_seeds(arm: Arm, config: Config, data: digits.Digits) -> dict[str, Any]:
    """The arm with every seed; all arms of a seed share initialisation, noise and batches."""
    config = digits.static_settings(config)
    result: dict[str, list[Any]] = {"test_accuracy": [], "train_loss": [], "density": []}
    for seed in config.seed_list():
        params, _, grow = initialise(arm.width, seed)
        masks = arm_masks(arm, seed, config.synflow_rounds)
        order = digits.batch_order(seed, steps=config.steps, batch=config.batch)
        method = "static" if arm.method in CRITERIA else arm.method
        trained, density = train_arm(params, masks, grow, order, data, method=method, config=config)
        result["test_accuracy"].append(float(trained.test_accuracy))
        result["train_loss"].append(float(trained.train_loss))
        result["density"].append(float(density))
    return result


Accuracies = dict[Arm, list[float]]


def run(config: Config, run: Run) -> Result:
    """Trains every arm and compares test accuracies."""
    data, arms = digits.load_digits(), list_arms(config)
    found: dict[Arm, dict[str, Any]] = {}
    with training_bar(run.console, "arms", total=len(arms)) as bar:
        for done, arm in enumerate(arms, 1):
            found[arm] = digits.kept_arm(
                run, SLUG, arm.name, functools.partial(train_seeds, arm, config, data)
            )
            bar(done, 0.0, {"loss": float(np.mean(found[arm]["train_loss"]))})
    accuracies = {arm: values["test_accuracy"] for arm, values in found.items()}
    print_tables(run, config, accuracies)
    draw(run, config, accuracies)
    card = sj.SparsityCard(
        what=sj.WhatIsSparse.WEIGHTS,
        granularity=sj.Granularity.UNSTRUCTURED,
        timing=sj.Timing.BEFORE,
        path=sj.TrainingPath.SPARSE_TO_SPARSE,
        dynamics=sj.MaskDynamics.STATIC,
        allocation=sj.Allocation.ERK if "erk" in config.ratio else sj.Allocation.UNIFORM,
        criterion=sj.Criterion.RANDOM,
        gradient=sj.GradientRule.MASKED,
        seeds=config.seeds,
        budget=f"{config.steps} steps of {config.batch} examples for every arm",
        simulated=True,
    )
    metrics = {"arms": {arm.name: values for arm, values in found.items()}}
    return Result(make_claims(config, accuracies), card, metrics)


def grid_columns(config: Config) -> list[tuple[str, str, float]]:
    """`(label, ratio, density)` of the table over widths."""
    sparse = [
        (f"{LABELS.get(r, r)} {1 - d:.0%}", r, d) for d in config.density for r in config.ratio
    ]
    return [("dense", "dense", 1.0), *sparse]


def point_rows(config: Config, width: int, density: float) -> list[tuple[str, str, Arm]]:
    """`(method, positions and densities, arm)` of the comparison at one point."""
    rows = [("dense", "all", Arm(width, 1.0, "static", "dense"))]
    for method in config.method:
        label = LABELS.get(method, method)
        if method in CRITERIA:
            rows.append((label, "own mask", Arm(width, density, method, None)))
            rows.append(
                (f"random, {label} ratios", "re-drawn", Arm(width, density, "static", method))
            )
        else:
            rows.append((label, "random ERK start", Arm(width, density, method, "erk")))
    return rows


def print_tables(run: Run, config: Config, accuracies: Accuracies) -> None:
    """Accuracy against width, and the methods at each point."""
    columns = grid_columns(config)
    rows = [
        [
            str(w),
            *(mean_and_deviation(accuracies[Arm(w, d, "static", r)], 1) for _, r, d in columns),
        ]
        for w in config.width
    ]
    title = f"Test accuracy (%), random masks fixed before training, {config.seeds} seed(s)"
    run.console.print(make_table(title, ["width", *(label for label, _, _ in columns)], rows))
    for width, density in config.points():
        rows = [
            [label, how, mean_and_deviation(accuracies[arm], 2)]
            for label, how, arm in point_rows(config, width, density)
        ]
        title = f"Test accuracy (%) at width {width}, {1 - density:.0%} sparse"
        run.console.print(make_table(title, ["method", "mask", "accuracy"], rows))


def mean(values: list[float]) -> float:
    """Mean of a list."""
    return sum(values) / len(values)


def make_claims(config: Config, accuracies: Accuracies) -> tuple[Claim, ...]:
    """Verdicts on the paper's sentence, on the ratios and on changing masks."""
    ratio = "erk" if "erk" in config.ratio else config.ratio[0]
    high, widths = max(config.density), sorted(config.width)
    dense = {w: accuracies[Arm(w, 1.0, "static", "dense")] for w in widths}
    sparse = {w: accuracies[Arm(w, high, "static", ratio)] for w in widths}
    gaps = [mean(dense[w]) - mean(sparse[w]) for w in widths]
    shrinks = all(narrow > wide for narrow, wide in zip(gaps, gaps[1:]))  # noqa: RUF007
    label = LABELS.get(ratio, ratio)
    claims = [
        Claim(
            f"a random {label} mask at {1 - high:.0%} sparsity comes within 3 points of the dense "
            f"network at width {widths[-1]}"
            + (", and the gap shrinks with width" if len(widths) > 1 else ""),
            gaps[-1] < 3 and shrinks,
            f"{mean_and_deviation(sparse[widths[-1]], 2)} %, gaps "
            + ", ".join(f"{gap:.1f}" for gap in gaps),
            f"{mean_and_deviation(dense[widths[-1]], 2)} %",
            config.seeds,
        )
    ]
    low = min(config.density)
    middle = [w for w in widths if w in {width for width, _ in config.points()}]
    if {"erk", "uniform"} <= set(config.ratio) and middle:
        erk, uniform = (
            [mean(accuracies[Arm(w, low, "static", r)]) for w in middle] for r in ("erk", "uniform")
        )
        claims.append(
            Claim(
                f"ERK beats uniform densities by more than 5 points at {1 - low:.0%} sparsity, "
                f"width {' and '.join(map(str, middle))}",
                all(e - u > 5 for e, u in zip(erk, uniform)),
                " and ".join(f"{value:.1f} %" for value in erk),
                " and ".join(f"{value:.1f} %" for value in uniform),
                config.seeds,
            )
        )
    if config.at and {"static", "set", "rigl"} <= set(config.method):
        width, density = config.points()[0]
        static, evolved, rigged = (
            mean(accuracies[Arm(width, density, m, "erk")]) for m in ("static", "set", "rigl")
        )
        claims.append(
            Claim(
                f"RigL beats SET and SET a fixed random mask, each by more than 5 points, at "
                f"{1 - density:.0%} sparsity, width {width}",
                rigged - evolved > 5 and evolved - static > 5,
                f"RigL {rigged:.1f} %, SET {evolved:.1f} %",
                f"fixed {static:.1f} %",
                config.seeds,
            )
        )
    return tuple(claims)


def draw(run: Run, config: Config, accuracies: Accuracies) -> None:
    """Accuracy against width, and a row of dots for each method."""
    figure, axes = new_figure(
        f"Fixed random masks of several sparsities ({config.seeds} seeds, band: range)",
        "width of both hidden layers",
        "test accuracy (%)",
    )
    widths = sorted(config.width)
    curves = {}
    for label, ratio, density in grid_columns(config):
        values = np.asarray([accuracies[Arm(w, density, "static", ratio)] for w in widths])
        curves[label] = [(widths, one) for one in values.T]
    draw_curves(axes, curves)
    axes.set_xscale("log", base=2)
    axes.set_xticks(widths, labels=map(str, widths))
    axes.legend(frameon=False)
    save(figure, run.folder / "accuracy.png")
    if not config.at:
        return
    figure, axes = new_figure(
        "Methods at one width and sparsity (dots: seeds, bar: mean)", "test accuracy (%)", ""
    )
    points = config.points()
    labels = [label for label, _, _ in point_rows(config, *points[0])]
    for i, (width, density) in enumerate(points):
        color, shift = COLORS[i % len(COLORS)], (i - (len(points) - 1) / 2) * 0.6 / len(points)
        for y, (_, _, arm) in enumerate(point_rows(config, width, density)):
            values = accuracies[arm]
            axes.scatter(values, [y + shift] * len(values), color=color, s=14, alpha=0.6, lw=0)
            axes.plot([mean(values)] * 2, [y + shift - 0.14, y + shift + 0.14], color=color, lw=2.5)
        axes.plot([], [], color=color, lw=2.5, label=f"width {width}, {1 - density:.0%} sparse")
    axes.set_yticks(range(len(labels)), labels=labels)
    axes.invert_yaxis()
    axes.legend(frameon=False, loc="upper left")
    save(figure, run.folder / "methods.png")


def check(config: Config) -> list[str]:
    """What can be built of the paper's CIFAR setting: densities, masks and a training step.

    The paper's ResNet-20 has 1 x 1 convolutions where its shape changes, He's has none.
    """
    images = ImageConfig(
        dataset="cifar10", model="resnet20", batch=config.batch, momentum=config.momentum,
        weight_decay=config.weight_decay,
    )  # fmt: skip
    lines = []
    for width, density in ((w, d) for w in config.width for d in config.density):
        changes = {"base_width": width, "shortcut": "projection"}
        params = dict(sj.named_leaves(abstract_params(images, **changes)))
        kernels = {path: params[path] for path in sj.selected_paths(params)}
        shares = sj.erk(kernels, density)
        every = {path: shares.get(path, 1) for path in params}
        scope = sum(kernel.size for kernel in kernels.values())
        kept = sum(kernels[path].size * share for path, share in shares.items())
        traced = trace_step(
            images,
            lambda params, inner, every=every: sj.static_sparsity(
                inner, sj.random_masks(jax.random.key(config.seed), params, every)
            ),
            **changes,
        )
        lines.append(
            f"ResNet-20 kernels at width {width}: {scope:,} weights in {len(kernels)} tensors; ERK "
            f"at density {density:g} keeps {kept:,.0f} of them, the sparsest tensor at "
            f"{min(shares.values()):.4f}; a training step on {config.batch} images of "
            f"{traced.side} x {traced.side} traces, and parameters, masks and momentum take "
            f"{traced.mebibytes:,.1f} MiB"
        )
    missing = (
        f"checked abstractly: {config.steps:,} steps of {config.batch} need {images.dataset} "
        "prepared by TFDS, and a training loop of this experiment on images"
    )
    return [*lines, missing]


EXPERIMENT = Experiment(
    slug=SLUG,
    paper="The Unreasonable Effectiveness of Random Pruning (Liu et al., ICLR 2022)",
    presets=PRESETS,
    run=run,
    check=check,
)

if __name__ == "__main__":
    main(EXPERIMENT)
