"""BDWP: N:M weights in the forward and in the backward pass, and what an accelerator would save.

Paper: "Efficient N:M sparse DNN training using algorithm, architecture, and dataflow co-design"
(IEEE TCAD 2023). Expected: at 2:8 training needs about half the multiply-accumulates and loses
about half a point of accuracy; on a systolic array that skips zeros that is 1.75 times as fast.
The array is a model here, and masked products on a CPU are dense ones: no seconds are claimed.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, PyTree

import sparsejax as sj
from experiments.harness import digits
from experiments.harness.arms import (
    Found,
    arms_table,
    as_metrics,
    best_rate,
    curves_of,
    mean,
    print_table,
    run_arms,
)
from experiments.harness.cli import main
from experiments.harness.config import Claim, Experiment, ExperimentError, Result, Table
from experiments.harness.data.images import load_images
from experiments.harness.images import (
    ImageConfig,
    Method,
    Trainer,
    backbone_builder,
    build_backbone,
    compile_trainer,
    train_backbone,
)
from experiments.harness.nm_training import check_backbone, check_digits, digits_setup, digits_sgd
from experiments.harness.plots import COLORS, draw_curves, new_figure, save
from experiments.harness.progress import mean_and_deviation
from experiments.harness.run import Run
from experiments.harness.sharding import make_mesh
from sparsejax import weights
from sparsejax.weights.bdwp import METHODS

SLUG = "bdwp"
MINUTES = {"laptop": "2", "test": "0.3", "paper": "checked abstractly"}
LAYERS = 3
LABELS = {"dense": "dense", "srste": "SR-STE", "sdgp": "SDGP", "sdwp": "SDWP", "bdwp": "BDWP"}
PAPER_MODELS = {"resnet9": (512, 32, 10), "vit_small_patch4": (512, 32, 10),
                "vgg19": (512, 32, 100), "resnet18": (512, 224, 1000)}  # fmt: skip
"""Batch, side and classes of the networks whose training the paper speeds up."""


@dataclasses.dataclass(frozen=True)
class Config(ImageConfig):
    """Settings of `python -m experiments.bdwp`."""

    seeds: int = 4
    """How many seeds each arm is run with: initialisation and batches."""
    pattern: tuple[str, ...] = ("2:8", "1:16")
    """Weights kept of a group; the first is that of the claims."""
    method: tuple[str, ...] = ("dense", "srste", "sdgp", "sdwp", "bdwp")
    """Compared: dense; srste (sparse forward), sdgp and sdwp (sparse input gradients, by data or by
    weights), bdwp (both)."""
    decay: float = 2e-4
    """Pull of the weights that the forward pass prunes; srste and bdwp alone."""
    lr: tuple[float, ...] = (0.05, 0.1)
    """Peak learning rates; every method is shown at its best one."""
    epochs: int = 25
    """Passes over the training images."""
    width: int = 128
    """Nodes of the three hidden layers of the digits network."""
    pregenerate_steps: int = 20
    """Steps after which training from pre-generated compact weights is compared with masking on the
    fly, bit for bit; 0 leaves it out."""
    array: str = "32x32"
    """Rows and columns of the modelled systolic array."""
    adder_latency: int = 1
    """Cycles of its pipelined adders."""
    cost_models: tuple[str, ...] = tuple(PAPER_MODELS)
    """Networks whose training is put on the array."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_digits(self)
        digits.check_settings(
            self,
            positive=("width", "adder_latency"),
            known={"method": METHODS, "cost_models": tuple(PAPER_MODELS)},
            examples=10**9,
            one_device=False,
        )
        if not self.lr or any(not rate > 0 for rate in self.lr):
            raise ExperimentError(f"lr is {self.lr}; give positive values, one or several")
        if self.decay < 0 or self.pregenerate_steps < 0:
            raise ExperimentError(
                f"decay is {self.decay} and pregenerate_steps {self.pregenerate_steps}; neither "
                "may be negative"
            )
        if not self.pattern:
            raise ExperimentError("pattern is empty; give one or several, such as 2:8")
        self.patterns()  # their checks
        self.array_size()

    def patterns(self) -> list[sj.NM]:
        """`pattern` as patterns."""
        return [sj.NM.parse(text) for text in self.pattern]

    def array_size(self) -> tuple[int, int]:
        """Rows and columns."""
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", self.array):
            raise ExperimentError(f"array is {self.array!r}; it must look like 32x32")
        rows, cols = map(int, self.array.split("x"))
        return rows, cols

    def arms(self) -> dict[str, tuple[str, sj.NM]]:
        """Method and pattern of every arm, by name; dense training has no pattern."""
        found = {}
        for pattern in self.patterns():
            for method in self.method:
                name = "dense" if method == "dense" else f"{method}-{pattern.n}of{pattern.m}"
                found[name] = (method, pattern)
        return found

    def labels(self) -> dict[str, str]:
        """What tables and figures call the arms."""
        return {
            name: LABELS[method] + ("" if method == "dense" else f" {pattern}")
            for name, (method, pattern) in self.arms().items()
        }


PRESETS = {
    "laptop": Config(),
    "test": Config(preset="test", seeds=2, pattern=("2:8",), lr=(0.1,), epochs=2, width=16,
                   pregenerate_steps=5, cost_models=("resnet9",)),
    "paper": Config(preset="paper", seeds=3, dataset="imagenet2012", model="resnet18",
                    pattern=("2:8",), lr=(0.1,), epochs=90, batch=256, warmup_epochs=5,
                    weight_decay=1e-4, dtype="bfloat16", log_every=100, checkpoint_every=5000),
}  # fmt: skip


def network(
    params: PyTree, x: Array, *, method: str, pattern: sj.NM, decay: float, pairs: Any = None
) -> Array:
    """The digits network: hidden layers multiply as the method says, the head is dense.

    pairs: pre-generated weights of the hidden layers, or None to mask them here.
    """
    for i in range(len(params)):
        w, bias = params[f"layer{i}"]["kernel"], params[f"layer{i}"]["bias"]
        x = jax.nn.relu(x) if i else x
        if i == len(params) - 1:
            x = x @ w + bias
        elif pairs is None:
            x = weights.bdwp_dot(x, w, pattern.n, pattern.m, decay=decay, method=method) + bias  # type: ignore[arg-type]
        else:
            x = weights.bdwp_dot_compact(x, w, pairs[i], decay=decay) + bias
    return x


@functools.partial(jax.jit, static_argnames=("method", "pattern", "config"))
def train_digits(params: PyTree, order: Array, data: digits.Digits, peak: Array, *, method: str,
                 pattern: sj.NM, config: Config) -> dict[str, Array]:  # fmt: skip
    """One training of the digits network."""
    forward = functools.partial(network, method=method, pattern=pattern, decay=config.decay)

    def observe(before: PyTree, after: PyTree) -> Array:
        return digits.accuracy(after, (data.test_x, data.test_y), forward)

    trained = digits.train(
        digits_sgd(config, peak), params, order, data, network=forward, observe=observe
    )
    return {
        "test_accuracy": trained.test_accuracy,
        "test_loss": trained.test_loss,
        "train_loss": trained.train_loss,
        "accuracy_curve": trained.observed,
    }


@functools.partial(jax.jit, static_argnames=("pattern", "config"))
def pregenerated_training(params: PyTree, order: Array, data: digits.Digits, *, pattern: sj.NM,
                          config: Config) -> PyTree:  # fmt: skip
    """The parameters after BDWP steps that read compact weights made at the end of the last one."""
    tx = digits_sgd(config, config.lr[0])

    def generate(params: PyTree) -> list[weights.NMPair]:
        kernels = [params[f"layer{i}"]["kernel"] for i in range(LAYERS)]
        return [weights.pregenerate(w, pattern.n, pattern.m) for w in kernels]

    def step(carry: Any, rows: Array) -> tuple[Any, None]:
        params, state, pairs = carry
        forward = functools.partial(
            network, method="bdwp", pattern=pattern, decay=config.decay, pairs=pairs
        )
        batch = (data.train_x[rows], data.train_y[rows])
        grads = jax.grad(digits.cross_entropy)(params, batch, forward)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state, generate(params)), None

    return lax.scan(step, (params, tx.init(params), generate(params)), order)[0][0]


def pregeneration_is_exact(config: Config) -> bool:
    """Whether some steps of both kinds give the same weights, bit for bit."""
    params, order, data = digits_setup(config, config.seed, layers=LAYERS, hidden=config.width)
    rows = order.reshape(-1, config.batch)[: config.pregenerate_steps]
    pattern, static = config.patterns()[0], digits.static_settings(config)
    forward = functools.partial(network, method="bdwp", pattern=pattern, decay=config.decay)
    on_the_fly = jax.jit(
        lambda p: digits.train(digits_sgd(config, config.lr[0]), p, rows, data, network=forward)
    )(params).params
    made = pregenerated_training(params, rows, data, pattern=pattern, config=static)
    pairs = zip(jax.tree.leaves(on_the_fly), jax.tree.leaves(made), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def mlp_products(config: Config) -> tuple[list[tuple[int, int, int]], tuple[int, int, int]]:
    """(P, K, Q) of the hidden layers of the digits network, and of its head."""
    sizes = (digits.INPUTS, *[config.width] * LAYERS)
    hidden = [(config.batch, k, q) for k, q in itertools.pairwise(sizes)]
    return hidden, (config.batch, config.width, digits.CLASSES)


def mac_ratio(config: Config, method: str, pattern: sj.NM) -> float:
    """Multiply-accumulates of a training step of the digits network over the dense ones."""
    hidden, head = mlp_products(config)
    sparse = weights.training_macs(hidden, pattern.n, pattern.m, method=method)["total"]  # type: ignore[arg-type]
    dense = [weights.training_macs(x, 1, 1, method="dense")["total"] for x in (hidden, [head])]
    return (sparse + dense[1]) / sum(dense)


def array_costs(config: Config, name: str, pattern: sj.NM) -> dict[str, tuple[float, float]]:
    """MAC ratio and speed-up on the array of every method, for a network of the paper.

    Layers that are dense in training count as such: the first, and the classifier.
    """
    batch, side, classes = PAPER_MODELS[name]
    shaped = dataclasses.replace(config, model=name, dataset="cifar10", dtype="float32")
    model = nnx.eval_shape(
        lambda: build_backbone(shaped, classes=classes, side=side, channels=3, rngs=nnx.Rngs(0))
    )
    images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)
    options = {} if name.startswith("vit") else {"train": True}
    layers = weights.layer_products(model, images, **options)
    rows, cols = config.array_size()

    def total(method: str) -> tuple[int, int]:
        chosen: Sequence[str] = ()
        if method != "dense":
            chosen = weights.bdwp_layers(model, pattern, method=method)  # type: ignore[arg-type]
        macs = cycles = 0
        for layer in layers:
            how: Any = method if layer.path in chosen else "dense"
            products = layer.products
            macs += weights.training_macs(products, pattern.n, pattern.m, method=how)["total"]
            cycles += sum(
                stage.cycles
                for stage in weights.schedule_offline(
                    products, pattern.n, pattern.m, method=how, rows=rows, cols=cols,
                    adder_latency=config.adder_latency,
                )
            )  # fmt: skip
        return macs, cycles

    macs, cycles = total("dense")
    found = {method: total(method) for method in config.method}
    return {method: (m / macs, cycles / c) for method, (m, c) in found.items()}


def run(config: Config, run: Run) -> Result:
    """Trains every arm, checks pre-generation, and puts networks on the modelled array."""
    arms, labels = config.arms(), config.labels()
    train = digits_arm if config.is_mlp else backbone_arm(config, run)
    found = run_arms(run, SLUG, config, functools.partial(train, config), list(arms), config.lr)
    columns: dict[str, Any] = {
        "test_accuracy": ("test accuracy (%)", 2),
        "test_loss": ("test loss", 3),
        "macs": ("MACs a step", "{:.3f}".format),
    }
    title = f"{config.model} on {config.dataset}, {config.epochs} epochs, {config.seeds} seed(s)"
    accuracy = arms_table(title, found, labels, columns)
    pattern = config.patterns()[0]
    costs = {name: array_costs(config, name, pattern) for name in config.cost_models}
    cost = Table(
        f"Training on a {config.array} array that skips zeros at {pattern}: MACs over dense, and "
        "speed-up of the modelled cycles",
        ("network", *(LABELS[method] for method in config.method)),
        tuple(
            (name, *(f"{macs:.3f}, {speed:.2f}x" for macs, speed in by_method.values()))
            for name, by_method in costs.items()
        ),
    )
    for table in (accuracy, cost):
        print_table(run, table)
    exact = None
    if config.is_mlp and config.pregenerate_steps:
        exact = pregeneration_is_exact(config)
    show_traffic(run, config)
    draw(config, run, found, costs)
    card = sj.SparsityCard(
        what=sj.WhatIsSparse.WEIGHTS,
        granularity=sj.Granularity.N_M,
        timing=sj.Timing.DURING,
        path=sj.TrainingPath.DENSE_TO_SPARSE,
        dynamics=sj.MaskDynamics.DYNAMIC,
        allocation=sj.Allocation.UNIFORM,
        criterion=sj.Criterion.MAGNITUDE,
        gradient=sj.GradientRule.STRAIGHT_THROUGH,
        seeds=config.seeds,
        budget=f"{config.epochs} epochs for every arm, each at its best of {len(config.lr)} "
        "learning rates",
        simulated=True,
    )
    metrics = {**as_metrics(found, curves=("accuracy_curve",)), "array": costs}
    return Result(make_claims(config, found, costs, exact), card, metrics, (accuracy, cost))


def digits_arm(config: Config, arm: str, rate: float, seed: int) -> dict[str, Any]:
    """One training on the digits."""
    method, pattern = config.arms()[arm]
    params, order, data = digits_setup(config, seed, layers=LAYERS, hidden=config.width)
    found = train_digits(params, order, data, jnp.float32(rate), method=method, pattern=pattern,
                         config=digits.static_settings(config))  # fmt: skip
    result = {k: [float(v) for v in x] if x.ndim else float(x) for k, x in found.items()}
    return result | {"macs": mac_ratio(config, method, pattern)}


def plan(config: Config, method: str, pattern: sj.NM, build: Any) -> Method:
    """How a backbone is trained by a method: its layers multiply in another way, no more."""

    def sparse(rngs: nnx.Rngs) -> nnx.Module:
        model = build(rngs)
        if method == "dense":
            return model
        return weights.bdwp_model(model, pattern, decay=config.decay, method=method)  # type: ignore[arg-type]

    return Method(sparse)


def backbone_arm(config: Config, run: Run) -> Any:
    """Trains a backbone of these settings; reads the images once."""
    data, mesh = load_images(config.dataset, side=config.image_size), make_mesh(config.mesh)
    build = backbone_builder(config, data)

    @functools.cache
    def trainer(arm: str) -> Trainer:
        return compile_trainer(config, data, plan(config, *config.arms()[arm], build), mesh)

    def train(config: Config, arm: str, rate: float, seed: int) -> dict[str, Any]:
        return train_backbone(run, f"{arm}-lr{rate:g}-seed{seed}", config, data, trainer(arm),
                              seed=seed, peak=rate, mesh=mesh, slug=SLUG)  # fmt: skip

    return train


def show_traffic(run: Run, config: Config) -> None:
    """Bytes of weights that a step moves, with and without pre-generation."""
    for pattern in dict.fromkeys((*config.patterns(), sj.NM(2, 4))):
        made, fly = (
            weights.weight_traffic(pattern.n, pattern.m, pregenerated=p) for p in (True, False)
        )
        run.show(
            f"weights at {pattern}: {made:.3g} bytes an entry and step pre-generated, {fly:.3g} "
            f"masked on the fly"
        )


def make_claims(
    config: Config, found: Found, costs: dict[str, dict[str, tuple[float, float]]],
    exact: bool | None,
) -> tuple[Claim, ...]:  # fmt: skip
    """Accuracy lost, arithmetic saved, the modelled speed-up, and exact pre-generation."""
    best = {name: best_rate(by_rate)[1] for name, by_rate in found.items()}
    pattern = config.patterns()[0]
    ours = f"bdwp-{pattern.n}of{pattern.m}"
    claims = []

    def against(name: str, points: float, sentence: str) -> None:
        if ours in best and name in best:
            mine, theirs = (best[n]["test_accuracy"] for n in (ours, name))
            claims.append(
                Claim(sentence, mean(mine) >= mean(theirs) - points,
                      f"{mean_and_deviation(mine, 2)} %", f"{mean_and_deviation(theirs, 2)} %",
                      config.seeds)
            )  # fmt: skip

    against("dense", 1.5, f"BDWP at {pattern} loses at most 1.5 points to dense training")
    sentence = f"and at most 1 point to SR-STE, whose backward pass is dense, at {pattern}"
    against(f"srste-{pattern.n}of{pattern.m}", 1.0, sentence)
    if ours in best and "macs" in best[ours]:
        share = mean(best[ours]["macs"])
        claims.append(
            Claim("BDWP needs little more than half the multiply-accumulates of a dense step "
                  "(at most .55)", share <= 0.55, f"{share:.3f}", "1", config.seeds)
        )  # fmt: skip
    speeds = [by_method["bdwp"][1] for by_method in costs.values() if "bdwp" in by_method]
    if speeds:
        claims.append(
            Claim(
                f"on the modelled array training with BDWP at {pattern} is at least 1.75 times as "
                f"fast as dense training, mean of {', '.join(costs)}",
                mean(speeds) >= 1.75,
                f"{mean(speeds):.2f}x ({', '.join(f'{s:.2f}' for s in speeds)})",
                "1",
                1,
            )
        )
    if exact is not None:
        claims.append(
            Claim(
                f"pre-generated weights give the same training bit for bit after "
                f"{config.pregenerate_steps} steps",
                exact,
                "equal" if exact else "different",
                "masked on the fly",
                1,
            )
        )
    return tuple(claims)


def draw(
    config: Config, run: Run, found: Found, costs: dict[str, dict[str, tuple[float, float]]]
) -> None:
    """Accuracy over training, accuracy against arithmetic, and the speed-ups of the array."""
    if not run.is_main:
        return
    labels = config.labels()
    curves = curves_of(found, "accuracy_curve", labels)
    if curves:
        figure, axes = new_figure(f"{config.seeds} seeds", "epoch", "test accuracy (%)",
                                  size=(8.5, 4.6))  # fmt: skip
        draw_curves(axes, curves, order=list(labels.values()))
        final = [v[-1] for runs in curves.values() for _, v in runs]
        axes.set_ylim(min(final) - 6, 100)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        save(figure, run.folder / "accuracy.png")
        figure, axes = new_figure(f"{config.seeds} seeds, mean and deviation",
                                  "multiply-accumulates of a step, over dense", "test accuracy (%)",
                                  size=(8.5, 4.6))  # fmt: skip
        for i, (arm, by_rate) in enumerate(found.items()):
            values = best_rate(by_rate)[1]
            axes.errorbar(
                mean(values["macs"]), mean(values["test_accuracy"]),
                float(np.std(values["test_accuracy"])), label=labels[arm], capsize=3,
                marker="osD^v<>ph"[i % 9], color=COLORS[i % len(COLORS)],
            )  # fmt: skip
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        save(figure, run.folder / "accuracy_by_macs.png")
    figure, axes = new_figure(f"Modelled training on a {config.array} array at {config.pattern[0]}",
                              "", "speed-up over dense")  # fmt: skip
    methods = [m for m in config.method if m != "dense"]
    for i, method in enumerate(methods):
        places = np.arange(len(costs)) + (i - (len(methods) - 1) / 2) * 0.8 / len(methods)
        speeds = [by_method[method][1] for by_method in costs.values()]
        axes.bar(places, speeds, 0.75 / len(methods), label=LABELS[method], color=COLORS[i])
    axes.axhline(1, color="black", linestyle=":")
    axes.set_xticks(range(len(costs)), labels=list(costs))
    axes.legend(frameon=False, ncols=len(methods))
    save(figure, run.folder / "speed_up.png")


def check(config: Config) -> list[str]:
    """Builds the paper's setting and traces a step with BDWP in its layers."""
    pattern = config.patterns()[0]

    def describe(model: nnx.Module, images: Any) -> list[str]:
        del images
        chosen = weights.bdwp_layers(model, pattern)
        return [f"{len(chosen)} layers are {pattern} in both passes; first and last stay dense"]

    return check_backbone(
        config, lambda build: plan(config, "bdwp", pattern, build), describe=describe
    )


EXPERIMENT = Experiment(
    slug=SLUG,
    paper="Efficient N:M sparse DNN training using algorithm, architecture, and dataflow co-design",
    presets=PRESETS,
    run=run,
    check=check,
)

if __name__ == "__main__":
    main(EXPERIMENT)
