"""SR-STE: N:M sparse networks trained from scratch, against STE, ASP and the dense network.

Paper: Zhou, Ma, Zhu, Liu, Zhang, Yuan, Sun and Li, "Learning N:M fine-grained structured sparse
neural networks from scratch" (ICLR 2021). Expected: a pull of the pruned weights towards zero keeps
the pattern steadier than plain straight-through training (a lower SAD), and accuracy does not
suffer; both beat pruning a dense network once and retraining it (ASP).
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

import sparsejax as sj
from experiments.harness import digits
from experiments.harness.abstract_training import check_backbone
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
from experiments.harness.backbone_arms import backbone_runner, nm_card
from experiments.harness.cli import main
from experiments.harness.config import Claim, Experiment, ExperimentError, Result
from experiments.harness.data.images import ImageData
from experiments.harness.images import ImageConfig, Method, backbone_builder
from experiments.harness.nm_training import (
    backbone_scope,
    check_arms,
    digits_setup,
    digits_sgd,
    hidden_layers,
    nm_masks,
)
from experiments.harness.plots import draw_curves, new_figure, save
from experiments.harness.progress import mean_and_deviation
from experiments.harness.run import Run
from sparsejax.core.selection import default_where

SLUG = "sr_ste"
MINUTES = {"laptop": "1", "test": "0.2", "paper": "checked abstractly"}
METHODS = ("dense", "asp", "ste", "srste")
LAYERS = 2


@dataclasses.dataclass(frozen=True)
class OutputMajor:
    """N of every M consecutive entries of a kernel stored output by output, across pixels.

    The code of the paper cuts the flattened weight into groups; this takes input channels that M
    does not divide, such as the three of a first layer.
    """

    n: int
    m: int

    def mask(self, scores: Float[Array, "*s"], density: Any = None) -> Bool[Array, "*s"]:
        """`nm_mask` of the flattened scores."""
        del density
        rows = jnp.moveaxis(scores, -1, 0)
        return jnp.moveaxis(sj.nm_mask(rows, self.n, self.m, axis=None), 0, -1)


@dataclasses.dataclass(frozen=True)
class Config(ImageConfig):
    """Settings of `python -m experiments.sr_ste`."""

    seeds: int = 4
    """How many seeds each arm is run with: initialisation and batches."""
    n: int = 1
    """Weights kept in a group."""
    m: int = 32
    """Size of a group of inputs."""
    method: tuple[str, ...] = METHODS
    """Compared: dense, asp (pruned once half way, then retrained), ste, srste."""
    lambda_w: tuple[float, ...] = (2e-3, 6e-3, 2e-2)
    """Pulls of SR-STE. A run of 600 steps wants ten times that of one on ImageNet (2e-4)."""
    lr: tuple[float, ...] = (0.2, 0.1)
    """Peak learning rates; every method is shown at its best one."""
    layout: Literal["channels", "flat"] = "channels"
    """Groups of input channels at one pixel, or of the flattened kernel of an output."""
    sparse_stem: bool = False
    """Prune a backbone's first layer too."""
    width: int = 128
    """Nodes of both hidden layers of the digits network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_arms(self, positive=("width",), known={"method": METHODS})
        if not self.lambda_w or any(not pull > 0 for pull in self.lambda_w):
            raise ExperimentError(f"lambda_w is {self.lambda_w}; give some, all must be positive")
        sj.NM(self.n, self.m)  # its checks

    @property
    def pattern(self) -> Any:
        """Which zeros are allowed."""
        kind = sj.NM if self.layout == "channels" else OutputMajor
        return kind(self.n, self.m)

    def arms(self) -> dict[str, tuple[str, float]]:
        """Method and pull of every arm, by name."""
        found: dict[str, tuple[str, float]] = {}
        for method in self.method:
            if method == "srste":
                found |= {f"srste-{value:g}": ("srste", value) for value in self.lambda_w}
            else:
                found[method] = (method, 0.0)
        return found

    def labels(self) -> dict[str, str]:
        """What tables and figures call the arms."""
        plain = {"dense": "dense", "asp": "ASP", "ste": "STE"}
        return {
            name: plain.get(method, f"SR-STE {pull:g}")
            for name, (method, pull) in self.arms().items()
        }


PRESETS = {
    "laptop": Config(),
    "test": Config(preset="test", seeds=2, n=1, m=8, lambda_w=(2e-3, 2e-2), lr=(0.1,), epochs=2,
                   width=16),
    "paper": Config(preset="paper", seeds=3, dataset="imagenet2012", model="resnet50", n=2, m=4,
                    lambda_w=(2e-4,), lr=(0.1,), epochs=120, batch=256, warmup_epochs=5,
                    color_jitter=0.4, dtype="bfloat16", log_every=100, checkpoint_every=5000),
}  # fmt: skip


def sparse_view(
    params: PyTree, method: str, pull: float | Array, pattern: Any, where: sj.Where
) -> PyTree:
    """The parameters of the forward pass."""
    if method in ("ste", "srste"):
        return sj.sr_ste(params, pattern, decay=pull, where=where)
    return params


def sparse_optimizer(
    inner: optax.GradientTransformation, method: str, config: Config, steps: int, where: sj.Where
) -> optax.GradientTransformation:
    """ASP prunes half way and holds the mask: gradients, weights and momentum."""
    if method != "asp":
        return inner
    return sj.gradual_pruning(inner, pattern=config.pattern, allocation=config.n / config.m,
                              schedule=sj.one_shot(steps // 2), where=where)  # fmt: skip


@functools.partial(jax.jit, static_argnames=("method", "config"))
def train_digits(params: PyTree, order: Array, data: digits.Digits, peak: Array, pull: Array, *,
                 method: str, config: Config) -> dict[str, Array]:  # fmt: skip
    """One training of the digits network; pulls and rates of a method share the compilation."""
    where, steps = hidden_layers(LAYERS), order.shape[0] * order.shape[1]
    view = lambda p, step: sparse_view(p, method, pull, config.pattern, where)  # noqa: E731
    test = (data.test_x, data.test_y)

    def observe(before: PyTree, after: PyTree) -> dict[str, Array]:
        changed = sj.flips(*(nm_masks(p, config.pattern, where) for p in (before, after)))
        return {"flips": changed, "accuracy": digits.accuracy(view(after, 0), test)}

    tx = sparse_optimizer(digits_sgd(config, peak), method, config, steps, where)
    trained = digits.train(tx, params, order, data, view=view, observe=observe)
    return {
        "test_accuracy": trained.test_accuracy,
        "test_loss": trained.test_loss,
        "train_loss": trained.train_loss,
        "accuracy_curve": trained.observed["accuracy"],
        "flips_curve": trained.observed["flips"],
    }


def run(config: Config, run: Run) -> Result:
    """Trains every arm and compares accuracy and SAD."""
    arms, labels = config.arms(), config.labels()
    if config.is_mlp:
        train = functools.partial(digits_arm, config)
    else:

        def backbone_plan(arm: str, data: ImageData) -> Method:
            steps = config.epochs * (data.examples // config.batch)
            return plan(config, *arms[arm], steps, backbone_builder(config, data))

        train = backbone_runner(run, config, SLUG, backbone_plan, scope=default_scope(config))
    found = run_arms(run, SLUG, config, train, list(arms), config.lr)
    table = arms_table(
        f"{config.model} on {config.dataset}, {config.n}:{config.m}, {config.epochs} epochs, "
        f"{config.seeds} seed(s)",
        found,
        labels,
        {
            "test_accuracy": ("test accuracy (%)", 2),
            "test_loss": ("test loss", 3),
            "sad": ("SAD", 3),
        },
    )
    print_table(run, table)
    draw(config, run, found)
    card = nm_card(config, len(config.lr), sj.GradientRule.STRAIGHT_THROUGH)
    curves = ("accuracy_curve", "sad_curve")
    return Result(make_claims(config, found), card, as_metrics(found, curves=curves), (table,))


def digits_arm(config: Config, arm: str, rate: float, seed: int) -> dict[str, Any]:
    """One training on the digits; SAD is a share of the sparse weights."""
    method, pull = config.arms()[arm]
    params, order, data = digits_setup(config, seed, layers=LAYERS, hidden=config.width)
    found = train_digits(params, order, data, jnp.float32(rate), jnp.float32(pull),
                         method=method, config=digits.static_settings(config))  # fmt: skip
    result: dict[str, Any] = {
        name: float(found[name]) for name in ("test_accuracy", "test_loss", "train_loss")
    }
    result["accuracy_curve"] = [float(v) for v in found["accuracy_curve"]]
    if method in ("ste", "srste"):
        weights = sum(params[f"layer{i}"]["kernel"].size for i in range(LAYERS))
        shares = [int(v) / weights for v in found["flips_curve"]]
        result |= {"sad": sum(shares), "sad_curve": shares}
    return result


def plan(config: Config, method: str, pull: float, steps: int, build: Any) -> Method:
    """How a backbone is trained by a method."""
    where = default_scope(config)
    return Method(
        build,
        view=lambda params, step: sparse_view(params, method, pull, config.pattern, where),
        transform=lambda params, inner: sparse_optimizer(inner, method, config, steps, where),
        masks=(lambda params: nm_masks(params, config.pattern, where))
        if method in ("ste", "srste") else None,
    )  # fmt: skip


def default_scope(config: Config) -> Any:
    """Which kernels of a backbone are N:M."""
    if not config.sparse_stem:
        return backbone_scope
    return lambda path, leaf: default_where(path, leaf) and not path.startswith("head")


def make_claims(config: Config, found: Found) -> tuple[Claim, ...]:
    """Accuracy against STE and ASP, and SAD against STE and along the pull."""
    best = {name: best_rate(by_rate)[1] for name, by_rate in found.items()}
    pulls = [name for name, (method, _) in config.arms().items() if method == "srste"]
    claims = []
    if pulls and "ste" in best:
        first = pulls[0]
        label = config.labels()[first]
        ours, theirs = best[first], best["ste"]
        claims.append(
            Claim(
                f"at {config.n}:{config.m} {label} is as accurate as STE (no more than 0.3 points "
                "below), each at its best rate",
                mean(ours["test_accuracy"]) >= mean(theirs["test_accuracy"]) - 0.3,
                f"{mean_and_deviation(ours['test_accuracy'], 2)} %",
                f"{mean_and_deviation(theirs['test_accuracy'], 2)} %",
                config.seeds,
            )
        )
        # at one rate: SAD depends on the rate more than on the pull
        rate = max(config.lr)
        sads = [mean(found[name][rate]["sad"]) for name in ("ste", *pulls)]
        claims.append(
            Claim(
                f"the SAD of {label} is less than half of STE's and falls further as the pull "
                f"grows, all at rate {rate:g}",
                sads[1] < 0.5 * sads[0] and all(a > b for a, b in zip(sads, sads[1:])),  # noqa: RUF007
                ", ".join(f"{s:.3f}" for s in sads[1:]),
                f"{sads[0]:.3f}",
                config.seeds,
            )
        )
    if pulls and "asp" in best:
        ours, theirs = best[pulls[0]]["test_accuracy"], best["asp"]["test_accuracy"]
        claims.append(
            Claim(
                f"{config.labels()[pulls[0]]} beats ASP by more than 1 point",
                mean(ours) > mean(theirs) + 1,
                f"{mean_and_deviation(ours, 2)} %",
                f"{mean_and_deviation(theirs, 2)} %",
                config.seeds,
            )
        )
    if not claims:
        name, metrics = next(iter(best.items()))
        text = f"{mean_and_deviation(metrics['test_accuracy'], 2)} %"
        claims.append(Claim("nothing is compared: give srste and ste or asp", False, text, name,
                            config.seeds))  # fmt: skip
    return tuple(claims)


def draw(config: Config, run: Run, found: Found) -> None:
    """Accuracy and mask changes over training, where they were followed."""
    if not run.is_main:
        return
    labels = config.labels()
    for metric, name, text in (
        ("accuracy_curve", "accuracy", "test accuracy (%)"),
        ("sad_curve", "sad", "share of mask bits changed in the epoch"),
    ):
        curves = curves_of(found, metric, labels)
        if curves:
            figure, axes = new_figure(
                f"{config.n}:{config.m} on {config.dataset}, {config.seeds} seeds", "epoch", text
            )
            draw_curves(axes, curves, order=list(labels.values()))
            if metric == "sad_curve":
                axes.set_yscale("symlog", linthresh=1e-4)
            axes.legend(frameon=False)
            save(figure, run.folder / f"{name}.png")


def check(config: Config) -> list[str]:
    """Builds the paper's setting: groups that fit, and a traced step."""
    method, pull = list(config.arms().values())[-1]
    return check_backbone(config, lambda build: plan(config, method, pull, config.epochs, build))


EXPERIMENT = Experiment(
    slug=SLUG,
    paper="Learning N:M fine-grained structured sparse neural networks from scratch",
    presets=PRESETS,
    run=run,
    check=check,
)

if __name__ == "__main__":
    main(EXPERIMENT)
