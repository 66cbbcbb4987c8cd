"""Progressive gradient flow: masks and patterns that decay, against SR-STE at high N:M sparsity.

Paper: Bambhaniya, Yazdanbakhsh, Subramanian, Kao, Agrawal, Evci and Krishna, "Progressive gradient
flow for robust N:M sparsity training in transformers" (2024). Expected: where few weights of a
group stay, letting the pruned ones fade out makes gradients less noisy and accuracy higher than
SR-STE's; against SR-STE with a tuned pull the gain in accuracy is small or none.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

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
from experiments.harness.plots import COLORS, draw_curves, new_figure, save
from experiments.harness.progress import mean_and_deviation
from experiments.harness.run import Run
from sparsejax.weights import ProgressiveConfig, gradient_noise, progressive_view
from sparsejax.weights.progressive_gradient_flow import Recipe

SLUG = "progressive_gradient_flow"
MINUTES = {"laptop": "4", "test": "0.3", "paper": "checked abstractly"}
LAYERS = 2
NOISY = "layer1"  # whose gradient is measured
LABELS = {
    "dense": "dense",
    "ste": "STE",
    "mdgf_exp": "MdGf-Exp",
    "mdgf_linear": "MdGf-Linear",
    "sdgf_stepwise": "SdGf-Stepwise",
    "sdgf_geometric": "SdGf-Geometric",
    "sdgf_densify": "SdGf-Densify",
}


@dataclasses.dataclass(frozen=True)
class Config(ImageConfig):
    """Settings of `python -m experiments.progressive_gradient_flow`."""

    seeds: int = 5
    """How many seeds each arm is run with: initialisation and batches."""
    n: int = 1
    """Weights kept in a group."""
    m: int = 32
    """Size of a group of inputs."""
    epochs: int = 60
    """Passes over the training images."""
    recipe: tuple[str, ...] = (
        "srste=2e-4", "srste=2e-3", "srste=6e-3", "ste", "mdgf_exp", "mdgf_exp,fine=0.3",
        "mdgf_exp,fine=0.3,straight_through", "mdgf_linear,dense=0.05,fine=0.5",
        "sdgf_geometric,fine=0.3,frames=2", "sdgf_stepwise,fine=0.3",
    )  # fmt: skip
    """Compared: a recipe (dense, ste, mdgf_exp, mdgf_linear, sdgf_stepwise, sdgf_geometric,
    sdgf_densify), with dense=SHARE, fine=SHARE, frames=COUNT, coef=NUMBER and straight_through
    after commas where they differ from the settings; or srste=PULL."""
    lr: tuple[float, ...] = (0.2, 0.1)
    """Peak learning rates; every recipe is shown at its best one."""
    dense_fraction: float = 0.1
    """Share of the epochs in which nothing is pruned."""
    fine_tune_fraction: float = 0.1
    """Share of the epochs, at the end, with the binary mask."""
    update_every: int = 1
    """Steps between two changes of a decaying mask."""
    sparsity_loc: Literal["FF", "FFQKV", "all"] = "FF"
    """Of a vision transformer: feed-forward kernels, also the queries', keys' and values', or all
    but the first and the last layer; convolutional backbones are pruned all."""
    noise_m: tuple[int, ...] = (4, 8, 16, 32)
    """Group sizes, one weight kept, at which the noise of gradients is measured on the digits, for
    `noise_recipe` at the largest learning rate; 0 for none."""
    noise_recipe: tuple[str, ...] = ("srste=2e-4", "ste", "mdgf_exp")
    """Recipes whose noise is measured."""
    width: int = 128
    """Nodes of both hidden layers of the digits network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_arms(self, positive=("width",))
        if any(m < 2 for m in self.noise_m if self.noise_m != (0,)):
            raise ExperimentError(f"noise_m is {self.noise_m}; give sizes of 2 or more, or 0")
        self.arms(steps_per_epoch=1)  # their checks

    def arms(self, *, steps_per_epoch: int) -> dict[str, ProgressiveConfig]:
        """The recipes by name, `recipe@M` for those at one of M whose noise is measured."""
        if not self.recipe:
            raise ExperimentError("recipe is empty; give one or several")
        found = {text: self._parse(text, steps_per_epoch) for text in self.recipe}
        for text, m in self.noise_arms().values():
            parsed = self._parse(text, steps_per_epoch)
            found[f"{text}@{m}"] = dataclasses.replace(parsed, n=1, m=m)
        return found

    def noise_arms(self) -> dict[str, tuple[str, int]]:
        """Recipe and group size of the arms whose noise is measured, by name."""
        if not self.is_mlp or self.noise_m == (0,):
            return {}
        return {f"{text}@{m}": (text, m) for text in self.noise_recipe for m in self.noise_m}

    def _parse(self, text: str, steps_per_epoch: int) -> ProgressiveConfig:
        name, *options = text.split(",")
        name, _, pull = name.partition("=")
        values: dict[str, Any] = {"recipe": name}
        keys = {"dense": ("dense_fraction", float), "fine": ("fine_tune_fraction", float),
                "frames": ("frames", int), "coef": ("decay_coef", float)}  # fmt: skip
        try:
            if pull:
                if name != "srste":
                    raise ValueError("a pull is for srste")
                values["srste_decay"] = float(pull)
            for option in options:
                if option == "straight_through":
                    values["gradient"] = option
                    continue
                key, _, value = option.partition("=")
                if key not in keys:
                    raise ValueError(f"{option!r} is none of {', '.join(keys)}, straight_through")
                field, kind = keys[key]
                values[field] = kind(value)
            base: dict[str, Any] = {
                "dense_fraction": self.dense_fraction,
                "fine_tune_fraction": self.fine_tune_fraction,
                "update_every": self.update_every,
            }
            if name in ("srste", "ste"):
                base["dense_fraction"] = 0.0  # sparse from the first step, as published
            base |= {"n": self.n, "m": self.m, "epochs": self.epochs}
            return ProgressiveConfig(**(base | values), steps_per_epoch=steps_per_epoch)
        except ValueError as error:
            known = ", ".join(get_args(Recipe))
            raise ExperimentError(f"recipe {text!r}: {error} (recipes are {known})") from error


def label_of(text: str) -> str:
    """A recipe in words."""
    name, *options = text.split(",")
    name, _, pull = name.partition("=")
    title = f"SR-STE {pull}" if name == "srste" else LABELS.get(name, name)
    words = [o.replace("straight_through", "straight-through").replace("=", " ") for o in options]
    return ", ".join([title, *words])


PRESETS = {
    "laptop": Config(),
    "test": Config(preset="test", seeds=2, n=1, m=8, epochs=10, width=16, batch=100, lr=(0.1,),
                   noise_m=(4,), noise_recipe=("mdgf_exp",),
                   recipe=("srste=2e-4", "srste=2e-3", "mdgf_exp", "mdgf_exp,straight_through",
                           "sdgf_stepwise,fine=0.3")),
    "paper": Config(preset="paper", seeds=3, dataset="imagenet2012", model="vit_base_patch16", n=1,
                    m=16, epochs=300, batch=1024, lr=(1e-3,), warmup_epochs=5, label_smoothing=0.1,
                    optimizer="adamw", weight_decay=0.05,
                    recipe=("srste=2e-4", "mdgf_exp", "mdgf_linear", "sdgf_stepwise"),
                    color_jitter=0.4, dtype="bfloat16", log_every=100, checkpoint_every=5000),
}  # fmt: skip


@functools.partial(jax.jit, static_argnames=("recipe", "config"))
def train_digits(params: PyTree, order: Array, data: digits.Digits, peak: Array, *,
                 recipe: ProgressiveConfig, config: Config) -> dict[str, Array]:  # fmt: skip
    """One training of the digits network."""
    where, pattern = hidden_layers(LAYERS), sj.NM(recipe.n, recipe.m)
    view = progressive_view(recipe, where=where)
    last, test = order.shape[0] * order.shape[1] - 1, (data.test_x, data.test_y)

    def observe(before: PyTree, after: PyTree) -> dict[str, Array]:
        changed = sj.flips(*(nm_masks(p, pattern, where) for p in (before, after)))
        binary = view(after, jnp.int32(last))
        return {"flips": changed, "accuracy": digits.accuracy(binary, test)}

    def measure(grads: PyTree) -> Array:
        return gradient_noise(grads)[NOISY]["kernel"]

    trained = digits.train(
        digits_sgd(config, peak), params, order, data, view=view, measure=measure, observe=observe
    )
    by_epoch = trained.measured.reshape(order.shape[:2]).mean(1)
    return {
        "test_accuracy": trained.test_accuracy,
        "test_loss": trained.test_loss,
        "train_loss": trained.train_loss,
        "grad_variance": trained.measured[trained.measured.size // 2 :].mean(),
        "accuracy_curve": trained.observed["accuracy"],
        "noise_curve": by_epoch,
        "flips": trained.observed["flips"].sum(),
    }


def run(config: Config, run: Run) -> Result:
    """Trains every recipe and compares accuracy and the noise of gradients."""
    labels = {text: label_of(text) for text in config.recipe}
    if config.is_mlp:
        train = functools.partial(digits_arm, config)
    else:

        def backbone_plan(arm: str, data: ImageData) -> Method:
            recipes = config.arms(steps_per_epoch=max(1, data.examples // config.batch))
            return plan(config, recipes[arm], backbone_builder(config, data))

        train = backbone_runner(run, config, SLUG, backbone_plan, scope=scope(config))
    found = run_arms(run, SLUG, config, train, list(labels), config.lr)
    table = arms_table(
        f"{config.model} on {config.dataset}, {config.n}:{config.m}, {config.epochs} epochs, "
        f"{config.seeds} seed(s)",
        found,
        labels,
        {
            "test_accuracy": ("test accuracy (%)", 2),
            "test_loss": ("test loss", 3),
            "grad_variance": ("gradient variance", "{:.1e}".format),
            "sad": ("SAD", 3),
        },
    )
    print_table(run, table)
    noise = run_arms(run, SLUG, config, train, list(config.noise_arms()), [max(config.lr)])
    draw(config, run, found, labels)
    draw_noise(config, run, noise)
    card = nm_card(config, len(config.lr), sj.GradientRule.MASKED)
    metrics = as_metrics({**found, **noise}, curves=("accuracy_curve", "noise_curve"))
    return Result(make_claims(config, found), card, metrics, (table,))


def digits_arm(config: Config, arm: str, rate: float, seed: int) -> dict[str, Any]:
    """One training on the digits; SAD is a share of the sparse weights."""
    params, order, data = digits_setup(config, seed, layers=LAYERS, hidden=config.width)
    recipe = config.arms(steps_per_epoch=order.shape[1])[arm]
    found = train_digits(params, order, data, jnp.float32(rate), recipe=recipe,
                         config=digits.static_settings(config))  # fmt: skip
    weights = sum(params[f"layer{i}"]["kernel"].size for i in range(LAYERS))
    result: dict[str, Any] = {
        name: [float(v) for v in value] if value.ndim else float(value)
        for name, value in found.items()
    }
    if recipe.recipe == "dense":
        del result["flips"]
        return result
    return result | {"sad": result.pop("flips") / weights}


def scope(config: Config) -> Callable[[str, Any], bool]:
    """Which kernels of a backbone are N:M."""
    if not config.model.startswith("vit") or config.sparsity_loc == "all":
        return backbone_scope
    words = ["ffn/"] if config.sparsity_loc == "FF" else ["ffn/", "q_proj", "k_proj", "v_proj"]
    return lambda path, leaf: backbone_scope(path, leaf) and any(w in path for w in words)


def plan(config: Config, recipe: ProgressiveConfig, build: Any) -> Method:
    """How a backbone is trained by a recipe."""
    pattern = sj.NM(config.n, config.m)

    def measure(grads: PyTree) -> dict[str, Array]:
        noise = dict(sj.named_leaves(gradient_noise(grads)))
        chosen = [noise[path] for path in sj.selected_paths(grads, scope(config))]
        return {"grad_variance": jnp.mean(jnp.stack(chosen))}

    return Method(
        build,
        view=progressive_view(recipe, where=scope(config)),
        masks=lambda params: nm_masks(params, pattern, scope(config)),
        measure=measure,
    )


def make_claims(config: Config, found: Found) -> tuple[Claim, ...]:
    """MdGf-Exp against every SR-STE of the run, in accuracy and in the noise of gradients."""
    best = {name: best_rate(by_rate)[1] for name, by_rate in found.items()}
    ours = next((name for name in best if name.startswith("mdgf") and "straight" not in name), None)
    pulls = [name for name in best if name.startswith("srste")]
    claims = []
    rate = max(config.lr)  # noise depends on the rate, and the paper compares at one
    for name in pulls if ours else []:
        compared = {"each at its best rate": (best[str(ours)], best[name])}
        if name == pulls[0] and len(config.lr) > 1:
            compared[f"both at rate {rate:g}"] = (found[str(ours)][rate], found[name][rate])
        for how, pair in compared.items():
            mine, theirs = (metrics["test_accuracy"] for metrics in pair)
            claims.append(
                Claim(
                    f"at {config.n}:{config.m} {label_of(str(ours))} beats {label_of(name)} by at "
                    f"least 0.5 points, {how}",
                    mean(mine) >= mean(theirs) + 0.5,
                    f"{mean_and_deviation(mine, 2)} %",
                    f"{mean_and_deviation(theirs, 2)} %",
                    config.seeds,
                )
            )
    if ours and pulls and "grad_variance" in best[ours]:
        noise = [mean(found[n][rate]["grad_variance"]) for n in (ours, pulls[0])]
        claims.append(
            Claim(
                f"its gradients have less than a tenth of the variance of {label_of(pulls[0])}'s "
                f"in the second half of training, both at rate {rate:g}",
                noise[0] < noise[1] / 10,
                f"{noise[0]:.1e}",
                f"{noise[1]:.1e}",
                config.seeds,
            )
        )
    through = next((name for name in best if "straight_through" in name), None)
    if through and pulls and "grad_variance" in best[through]:
        noise = [mean(found[n][rate]["grad_variance"]) for n in (through, pulls[0])]
        claims.append(
            Claim(
                f"straight through, a decaying mask keeps at least a tenth of {label_of(pulls[0])}"
                f"'s variance: the masked gradient is what calms training, both at rate {rate:g}",
                noise[0] >= noise[1] / 10,
                f"{noise[0]:.1e}",
                f"{noise[1]:.1e}",
                config.seeds,
            )
        )
    if not claims:
        name, metrics = next(iter(best.items()))
        text = f"{mean_and_deviation(metrics['test_accuracy'], 2)} %"
        claims.append(Claim("nothing is compared: give an mdgf recipe and srste", False, text,
                            label_of(name), config.seeds))  # fmt: skip
    return tuple(claims)


def draw(config: Config, run: Run, found: Found, labels: dict[str, str]) -> None:
    """Accuracy and gradient variance over training, and one against the other."""
    if not run.is_main:
        return
    title = f"{config.n}:{config.m} on {config.dataset}, {config.seeds} seeds"
    shown = list(labels.values())
    for metric, name, text in (
        ("accuracy_curve", "accuracy", "test accuracy with the binary mask (%)"),
        ("noise_curve", "gradient_variance", "variance of the second layer's gradient"),
    ):
        curves = curves_of(found, metric, labels)
        if curves:
            figure, axes = new_figure(title, "epoch", text, size=(8.5, 4.6))
            draw_curves(axes, curves, order=shown)
            if metric == "noise_curve":
                axes.set_yscale("log")
            axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
            save(figure, run.folder / f"{name}.png")
    figure, axes = new_figure(title, "gradient variance", "test accuracy (%)",
                              size=(8.5, 4.6))  # fmt: skip
    for i, (arm, by_rate) in enumerate(found.items()):
        metrics = best_rate(by_rate)[1]
        if "grad_variance" in metrics:
            axes.errorbar(
                mean(metrics["grad_variance"]),
                mean(metrics["test_accuracy"]),
                float(jnp.std(jnp.asarray(metrics["test_accuracy"]))),
                marker="osD^v<>phX"[i % 10],
                capsize=3,
                color=COLORS[i % len(COLORS)],
                label=labels[arm],
            )
    axes.set_xscale("log")
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, run.folder / "accuracy_by_noise.png")


def draw_noise(config: Config, run: Run, noise: Found) -> None:
    """The variance of gradients against sparsity."""
    if not noise or not run.is_main:
        return
    figure, axes = new_figure(
        f"One weight of a group, rate {max(config.lr):g}, {config.seeds} seeds",
        "sparsity (1 - 1/M)",
        "variance of the second layer's gradient, second half",
    )
    for i, recipe in enumerate(config.noise_recipe):
        points = [noise[f"{recipe}@{m}"][max(config.lr)]["grad_variance"] for m in config.noise_m]
        middle = [mean(values) for values in points]
        spread = [[mid - min(v) for mid, v in zip(middle, points)],
                  [max(v) - mid for mid, v in zip(middle, points)]]  # fmt: skip
        axes.errorbar(
            range(len(points)), middle, spread, label=label_of(recipe), capsize=3,
            marker="osD^"[i % 4], color=COLORS[i % len(COLORS)],
        )  # fmt: skip
    ticks = [f"1:{m}\n{1 - 1 / m:.3g}" for m in config.noise_m]
    axes.set_xticks(range(len(ticks)), labels=ticks)
    axes.set_yscale("log")
    axes.legend(frameon=False)
    save(figure, run.folder / "noise_by_sparsity.png")


def check(config: Config) -> list[str]:
    """Builds the paper's setting: groups that fit at every stage, and a traced step."""
    recipe = config.arms(steps_per_epoch=1251)[config.recipe[-1]]
    return check_backbone(config, lambda build: plan(config, recipe, build))


EXPERIMENT = Experiment(
    slug=SLUG,
    paper="Progressive gradient flow for robust N:M sparsity training in transformers",
    presets=PRESETS,
    run=run,
    check=check,
)

if __name__ == "__main__":
    main(EXPERIMENT)
