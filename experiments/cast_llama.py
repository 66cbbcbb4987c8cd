"""CAST: a small LLaMA trained to 2:4 sparsity without ever masking the forward pass.

Paper: CAST, Continuous and differentiable semi-structured sparsity-aware training for large
language models (2025, arXiv 2509.25996); expected there: perplexity within 0.1 of dense at 2:4.

A small LLaMA is trained on real text and kept as the dense teacher; then every method starts from
it with the same steps, batches and schedule, at each of two learning rates. The table shows each
method at its better one. The dense model trained on for the same steps stands beside them.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import sparsejax as sj
from experiments.harness.checkpoints import Checkpoints
from experiments.harness.cli import main
from experiments.harness.config import Claim, Experiment, ExperimentError, Result
from experiments.harness.data import get_tokenizer, validation_windows
from experiments.harness.language import (
    LanguageConfig,
    LanguageModel,
    cross_entropy,
    dense_model,
    model_config,
    warmup_cosine,
)
from experiments.harness.perplexity import Perplexity, make_perplexity
from experiments.harness.plots import COLORS, draw_curves, new_figure, save
from experiments.harness.progress import make_table, mean_and_deviation
from experiments.harness.run import Run
from experiments.harness.sharding import check_groups, make_mesh
from experiments.harness.training import train
from sparsejax import weights
from sparsejax.models import Llama, generate, parameter_count

SLUG = "cast_llama"
MINUTES = {"laptop": "9", "test": "1", "paper": "checked abstractly"}
PROJECTIONS = r"_proj/kernel$"
ONE_SHOT = ("magnitude", "wanda")
TRAINED = ("dense", "naive", "srste", "ast", "cast")
LABELS = {
    "magnitude": "magnitude, one-shot",
    "wanda": "Wanda, one-shot",
    "dense": "dense, trained on",
    "naive": "fixed mask + teacher",
    "srste": "SR-STE",
    "ast": "AST",
    "cast": "CAST",
}


@dataclasses.dataclass(frozen=True)
class Config(LanguageConfig):
    """Settings of `python -m experiments.cast_llama`."""

    methods: tuple[str, ...] = (*ONE_SHOT, *TRAINED)
    """Which methods to run."""
    pattern: str = "2:4"
    """Kept and group size along the inputs of every projection."""
    steps: int = 600
    """Steps of sparse training; part of CAST's algorithm, not a place to stop early."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    """Peak learning rates; every method is shown at its best."""
    l1_decay: float = 5e-3
    """CAST's lambda."""
    eta: float = 1 / 3
    """Share of the distillation term, for CAST and the fixed mask."""
    scale_groups: int = 2
    """CAST's scales for each output."""
    mask_period: int = 10
    """Steps between two refreshes of CAST's and AST's masks."""
    srste_decay: float = 2e-4
    """SR-STE's pull on pruned weights."""
    ast_decay: float = 1e-4
    """AST's pull on pruned weights at its height."""
    calibration: int = 128
    """Training windows that Wanda sees."""
    force: bool = False
    """Run CAST even where its learning rate cannot bring the masked weights to zero."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            sj.NM.parse(self.pattern)
        except ValueError as error:
            raise ExperimentError(str(error)) from error
        unknown = [name for name in self.methods if name not in LABELS]
        if unknown or not self.methods:
            raise ExperimentError(f"methods are {self.methods}; known are {', '.join(LABELS)}")
        if self.steps < 1 or self.calibration < 1:
            raise ExperimentError(
                f"steps is {self.steps} and calibration {self.calibration}; both must be positive"
            )
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ExperimentError(f"learning_rates are {self.learning_rates}; give positive ones")

    @property
    def nm(self) -> sj.NM:
        """The pattern, with CAST's rule for ties."""
        return sj.NM.parse(self.pattern, ties="lowest")


PRESETS = {
    "laptop": Config(),
    "test": Config(
        preset="test",
        seeds=2,
        dense_steps=30,
        steps=20,
        batch=4,
        seq_len=32,
        learning_rates=(3e-3,),
        l1_decay=5e-2,
        calibration=16,
        checkpoint_every=10,
        log_every=5,
        force=True,
    ),
    "paper": Config(
        preset="paper",
        model="llama-2-7b",
        dataset="c4/en",
        seeds=1,
        batch=256,
        seq_len=4096,
        steps=7500,
        learning_rates=(2e-5,),
        l1_decay=4e-7,
        methods=("cast",),
        mesh="data=8,model=8",
    ),
}


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train sparse: all answers that differ between the methods.

    Attributes:
      start: dense params -> trainable tree.
      transform: learning-rate schedule, starting masks -> optax transform.
      view: trainable, optimiser state -> parameters of the forward pass.
      eta, temperature: of the distillation; eta 0 needs no teacher.
    """

    start: Callable[[Any], Any]
    transform: Callable[[optax.Schedule, Any], optax.GradientTransformation]
    view: Callable[[Any, Any], Any]
    eta: float = 0.0
    temperature: float = 1.0


def build_methods(config: Config) -> Mapping[str, Method]:
    """The trained methods under these settings."""
    where = rf"^weights/.*{PROJECTIONS}"

    def only_weights(params: Any) -> Any:
        return {"weights": params}

    def weights_of(trainable: Any, opt: Any) -> Any:
        del opt
        return trainable["weights"]

    def masked_start(params: Any) -> Any:
        return {"weights": sj.apply_masks(params, magnitude_masks(params, config))}

    def with_scales(params: Any) -> Any:
        scales = weights.init_scales(params, groups=config.scale_groups, where=PROJECTIONS)
        return {"weights": params, "scales": scales}

    def adam(rate: optax.Schedule, masks: Any) -> optax.GradientTransformation:
        del masks
        return optax.adam(rate)

    def adams(rate: optax.Schedule, masks: Any) -> optax.GradientTransformation:
        del masks
        return weights.adams(
            rate,
            total_steps=config.steps,
            l1_decay=config.l1_decay,
            mask_period=config.mask_period,
            pattern=config.nm,
            where=where,
        )

    def ast(rate: optax.Schedule, masks: Any) -> optax.GradientTransformation:
        del masks
        ramp = optax.linear_schedule(0.0, config.ast_decay, max(1, config.steps // 4))
        return weights.ast_adamw(
            rate, decay=ramp, pattern=config.nm, mask_period=config.mask_period, where=where
        )

    return {
        "dense": Method(only_weights, adam, weights_of),
        "naive": Method(
            masked_start,
            lambda rate, masks: sj.static_sparsity(optax.adam(rate), {"weights": masks}),
            weights_of,
            eta=config.eta,
        ),
        "srste": Method(
            only_weights,
            adam,
            lambda t, opt: sj.sr_ste(
                t["weights"], config.nm, decay=config.srste_decay, where=PROJECTIONS
            ),
        ),
        "ast": Method(
            only_weights,
            ast,
            lambda t, opt: sj.ste(
                t["weights"], config.nm, masks=sj.get_masks(opt)["weights"], where=PROJECTIONS
            ),
            eta=2 / 3,
            temperature=2.0,
        ),
        "cast": Method(
            with_scales,
            adams,
            lambda t, opt: weights.scale_params(t["weights"], t["scales"]),
            eta=config.eta,
        ),
    }


def magnitude_masks(params: Any, config: Config) -> Any:
    """Masks of the projections by magnitude."""
    return sj.make_masks(sj.magnitude(params), pattern=config.nm, where=PROJECTIONS)


def make_trainer(
    config: Config, method: Method, logits: Callable[[Any, jax.Array], jax.Array]
) -> tuple[Callable[[Any], Any], Callable[..., Any]]:
    """How a method starts and what one of its steps is.

    Args:
      logits: `(params, tokens) -> logits`.

    Returns:
      `init(params) -> state` and `step(state, windows, teacher, peak) -> (state, metrics)`; the
      peak of the learning rate is an argument, so that all rates and seeds share one compilation.
    """
    shape = warmup_cosine(config.steps)

    def transform(peak: Any, masks: Any = None) -> optax.GradientTransformation:
        inner = method.transform(lambda count: peak * shape(count), masks)
        return optax.chain(optax.clip_by_global_norm(1.0), inner)

    def init(params: Any) -> Any:
        trainable = method.start(params)
        tx = transform(0.0, magnitude_masks(params, config))
        return {"trainable": trainable, "opt": tx.init(trainable)}

    def step(state: Any, windows: jax.Array, teacher: Any, peak: jax.Array) -> Any:
        inputs, labels = windows[:, :-1], windows[:, 1:]

        def loss(trainable: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            out = logits(method.view(trainable, state["opt"]), inputs)
            if not method.eta:
                value = cross_entropy(out, labels)
                return value, {"cross_entropy": value}
            return weights.cast_loss(
                out,
                logits(teacher, inputs),
                labels,
                eta=method.eta,
                temperature=method.temperature,
            )

        (value, parts), grads = jax.value_and_grad(loss, has_aux=True)(state["trainable"])
        updates, opt = transform(peak).update(grads, state["opt"], state["trainable"])
        trainable = optax.apply_updates(state["trainable"], updates)
        return {"trainable": trainable, "opt": opt}, {"loss": value, **parts}

    return init, step


@dataclasses.dataclass(frozen=True)
class Trial:
    """One finished run of one method.

    Attributes:
      before, after: perplexity before and after pruning to the pattern.
      kept_ratio: S, the share of the L1 norm inside the pattern, at the end.
      params, masks: the sparse model.
    """

    method: str
    peak: float
    seed: int
    before: float
    after: float
    kept_ratio: float
    params: Any
    masks: Any


def run(config: Config, run: Run) -> Result:
    """Trains the dense model and every method, and compares their perplexities."""
    mesh = make_mesh(config.mesh)
    model = dense_model(run, config, mesh, slug=SLUG)
    if mesh is not None:
        masks = magnitude_masks(model.params, config)
        check_groups(model.shardings(model.params), masks, config.nm, mesh)
    windows = validation_windows(model.text.validation, config.seq_len)
    perplexity = make_perplexity(model.logits)
    dense = perplexity(model.params, windows)
    show(run, f"dense model: {parameter_count(model.config):,} parameters, perplexity {dense:.3f}")
    trials = one_shot_trials(config, run, model, perplexity, windows)
    methods = build_methods(config)
    for name in config.methods:
        if name in methods:
            trials += train_method(config, run, model, name, methods[name], perplexity, windows)
    best = best_rates(trials)
    print_table(run, config, dense, trials, best)
    draw(config, run, trials, best)
    files = save_models(config, run, model, best)
    if run.is_main:
        print_samples(config, run, model, best)
    claims = make_claims(config, dense, trials, best)
    metrics = {
        "dense_perplexity": dense,
        "perplexity": {n: [t.after for t in found] for n, found in best.items()},
        "learning_rate": {n: found[0].peak for n, found in best.items()},
        "files": files,
    }
    return Result(claims, metrics)


def one_shot_trials(
    config: Config, run: Run, model: LanguageModel, perplexity: Perplexity, windows: np.ndarray
) -> list[Trial]:
    """Prunes the dense model at once, layer by layer; one trial for each criterion."""
    trials = []
    for name in [n for n in config.methods if n in ONE_SHOT]:
        # a method of its own beside training: needs whole kernels on one device
        pruned = nnx.merge(model.graph, jax.tree.map(jnp.asarray, jax.device_get(model.params)))
        rng = np.random.default_rng(config.seed)
        starts = rng.integers(0, len(model.text.train) - config.seq_len, config.calibration)
        tokens = np.stack([model.text.train[s : s + config.seq_len] for s in starts])
        hidden = jax.jit(pruned.embedded)(jnp.asarray(tokens, jnp.int32))
        blocks = [pruned.block(i) for i in range(model.config.n_layers)]
        method = weights.PruneMethod(name, pattern=config.nm)  # type: ignore[arg-type]
        weights.prune_sequential(blocks, hidden, method=method, chunk=64)
        for i, block in enumerate(blocks):
            pruned.set_block(i, block)
        params = model.shard(nnx.state(pruned))
        masks = magnitude_masks(params, config)
        after = perplexity(params, windows)
        show(run, f"{LABELS[name]}: perplexity {after:.3f}")
        trials.append(Trial(name, 0.0, config.seed, after, after, 1.0, params, masks))
    return trials


def train_method(
    config: Config,
    run: Run,
    model: LanguageModel,
    name: str,
    method: Method,
    perplexity: Perplexity,
    windows: np.ndarray,
) -> list[Trial]:
    """Trains one method at every learning rate and seed with one compiled step."""
    shape = warmup_cosine(config.steps)
    init, step = make_trainer(config, method, model.logits)
    start = model.shard(init(model.params))
    outputs = None if model.mesh is None else (model.shardings(start), None)
    compiled = jax.jit(step, out_shardings=outputs)
    inspect = jax.jit(lambda state: inspect_weights(config, method, state))
    if name == "cast":
        masks = magnitude_masks(model.params, config)
        for peak in config.learning_rates:
            weights.check_reach(
                model.params,
                masks,
                lambda count, peak=peak: peak * shape(count),
                total_steps=config.steps,
                force=config.force,
            )
    trials = []
    for peak in config.learning_rates:
        for seed in config.seed_list():
            begun = time.time()
            state = train(
                run,
                f"{name}-lr{peak:g}-seed{seed}",
                state=start,
                step=lambda s, b, peak=peak: compiled(s, b, model.params, jnp.float32(peak)),
                batches=model.batches(config, seed=1000 + seed),
                steps=config.steps,
                inspect=inspect,
                mesh=model.mesh,
                slug=SLUG,
            )
            trial = finish_trial(config, method, name, peak, seed, state, perplexity, windows)
            seconds = time.time() - begun
            show(
                run,
                f"{LABELS[name]}, rate {peak:g}, seed {seed}: perplexity {trial.before:.3f}, "
                f"pruned {trial.after:.3f} ({seconds:.0f} s)",
            )
            trials.append(trial)
    return trials


def finish_trial(
    config: Config,
    method: Method,
    name: str,
    peak: float,
    seed: int,
    state: Any,
    perplexity: Perplexity,
    windows: np.ndarray,
) -> Trial:
    """Prunes a trained state to the pattern and measures it on both sides."""
    trainable = state["trainable"]
    before = perplexity(method.view(trainable, state["opt"]), windows)
    if name == "dense":
        masks = sj.dense_masks(trainable["weights"])
        return Trial(name, peak, seed, before, before, 1.0, trainable["weights"], masks)
    params, masks = weights.finish(
        trainable["weights"], trainable.get("scales"), pattern=config.nm, where=PROJECTIONS
    )
    kept = float(weights.sparsity_report(trainable["weights"], masks)["kept_ratio"])
    after = perplexity(params, windows)
    return Trial(name, peak, seed, before, after, kept, params, masks)


def inspect_weights(config: Config, method: Method, state: Any) -> dict[str, jax.Array]:
    """What the curves show of a state: how far the weights are on their way to the pattern."""
    raw = state["trainable"]["weights"]
    masks = magnitude_masks(raw, config)
    report = weights.sparsity_report(raw, masks)
    used = method.view(state["trainable"], state["opt"])
    chosen = [dict(sj.named_leaves(used))[path] for path in sj.selected_paths(used, PROJECTIONS)]
    nonzero = sum(jnp.mean(leaf != 0) * leaf.size for leaf in chosen)
    return {
        "density": nonzero / sum(leaf.size for leaf in chosen),
        "groups_in_pattern": weights.groups_in_pattern(raw, config.nm, where=PROJECTIONS),
        "kept_ratio": report["kept_ratio"],
        "mean_masked": report["mean_masked"],
        "max_masked": report["max_masked"],
    }


def best_rates(trials: list[Trial]) -> dict[str, list[Trial]]:
    """Each method's trials at the learning rate with the lowest mean perplexity."""
    best: dict[str, list[Trial]] = {}
    for name in dict.fromkeys(t.method for t in trials):
        rates = {t.peak: [x for x in trials if (x.method, x.peak) == (name, t.peak)] for t in trials
                 if t.method == name}  # fmt: skip
        best[name] = min(rates.values(), key=mean_after)
    return best


def mean_after(trials: list[Trial]) -> float:
    """Mean perplexity after pruning."""
    return sum(t.after for t in trials) / len(trials)


def print_table(
    run: Run, config: Config, dense: float, trials: list[Trial], best: dict[str, list[Trial]]
) -> None:
    """The table of perplexities: every method at its best rate, and what the other rate gave."""
    rows = [("dense (start)", "", f"{dense:.3f}", "", "", "", "")]
    for name, found in sorted(best.items(), key=lambda item: mean_after(item[1])):
        others = {t.peak for t in trials if t.method == name} - {found[0].peak}
        other = ", ".join(
            f"{mean_after([t for t in trials if (t.method, t.peak) == (name, rate)]):.3f}"
            for rate in sorted(others)
        )
        trained = name not in ONE_SHOT
        rows.append(
            (
                LABELS[name],
                f"{found[0].peak:g}" if trained else "",
                mean_and_deviation([t.after for t in found]),
                f"{mean_after(found) - dense:+.3f}",
                f"{mean_jump(found):+.2%}" if trained and name != "dense" else "",
                f"{sum(t.kept_ratio for t in found) / len(found):.4f}" if name == "cast" else "",
                other,
            )
        )
    header = ("method", "rate", "perplexity", "to dense", "jump at pruning", "S", "other rate")
    title = f"Validation perplexity per token at {config.pattern}, {config.seeds} seed(s)"
    run.console.print(make_table(title, header, rows))


def mean_jump(trials: list[Trial]) -> float:
    """Mean relative change of the perplexity at the final pruning."""
    return sum(t.after / t.before - 1 for t in trials) / len(trials)


def make_claims(
    config: Config, dense: float, trials: list[Trial], best: dict[str, list[Trial]]
) -> tuple[Claim, ...]:
    """The verdicts: at equal learning rate as the paper's page asks, and at everyone's best."""
    if "cast" not in best:
        name, found = min(best.items(), key=lambda item: mean_after(item[1]))
        figure = f"{mean_after(found):.3f} ({LABELS[name]})"
        return (
            Claim("a sparse model matches dense", mean_after(found) <= dense, figure,
                  f"{dense:.3f} (dense)", config.seeds),
        )  # fmt: skip
    claims = []
    rate = config.learning_rates[0]
    equal = {
        name: [t for t in trials if (t.method, t.peak) == (name, rate)]
        for name in ("cast", "naive", "srste")
    }
    cast = equal.pop("cast")
    rivals = {name: mean_after(found) for name, found in equal.items() if found}
    if rivals:
        jump, kept = mean_jump(cast), min(t.kept_ratio for t in cast)
        holds = mean_after(cast) < min(rivals.values()) and abs(jump) < 0.005 and kept >= 0.999
        claims.append(
            Claim(
                f"CAST at {config.pattern} beats the fixed mask and SR-STE at equal learning rate "
                f"{rate:g}, and its final pruning changes nothing",
                holds,
                f"perplexity {mean_after(cast):.3f}, jump {jump:+.2%}, S {kept:.4f}",
                ", ".join(f"{LABELS[n]} {value:.3f}" for n, value in rivals.items()),
                config.seeds,
            )
        )
    sparse = {n: found for n, found in best.items() if n not in ("cast", "dense")}
    if sparse:
        name, found = min(sparse.items(), key=lambda item: mean_after(item[1]))
        claims.append(
            Claim(
                f"CAST at {config.pattern} is the closest to dense when every method has its "
                "better learning rate",
                mean_after(best["cast"]) < mean_after(found),
                f"{mean_and_deviation([t.after for t in best['cast']])}, dense {dense:.3f}",
                f"{mean_and_deviation([t.after for t in found])} ({LABELS[name]})",
                config.seeds,
            )
        )
    return tuple(claims)


def draw(config: Config, run: Run, trials: list[Trial], best: dict[str, list[Trial]]) -> None:
    """Three figures: loss, share of groups in the pattern, weight magnitudes."""
    if not run.is_main:
        return
    trained = {name: found for name, found in best.items() if name in TRAINED}

    def curves(metric: str, skip: tuple[str, ...] = ()) -> dict[str, list[tuple[Any, Any]]]:
        drawn = {}
        for name, found in trained.items():
            if name in skip:
                continue
            logs = [run.metrics(f"{name}-lr{t.peak:g}-seed{t.seed}") for t in found]
            drawn[LABELS[name]] = [
                ([x["step"] for x in log], smooth([x[metric] for x in log])) for log in logs
            ]
        return drawn

    seeds = f"mean of {config.seeds} seeds, band from lowest to highest"
    if trained:
        figure, axes = new_figure(
            f"Training loss on text, {seeds}", "training step", "cross-entropy (nats per token)"
        )
        draw_curves(axes, curves("cross_entropy"))
        axes.legend(frameon=False)
        save(figure, run.folder / "loss.png")
        figure, axes = new_figure(
            f"Groups that obey {config.pattern} before any pruning",
            "training step",
            "share of groups in the pattern",
        )
        draw_curves(axes, curves("groups_in_pattern", skip=("naive",)))
        axes.set_ylim(-0.02, 1.02)
        axes.legend(frameon=False)
        save(figure, run.folder / "groups_in_pattern.png")
    if "cast" in trained:
        draw_magnitudes(config, run, trained["cast"])


def draw_magnitudes(config: Config, run: Run, found: list[Trial]) -> None:
    """Mean and largest magnitude of the weights that CAST's masks remove, over training."""
    figure, axes = new_figure(
        f"CAST: weights outside {config.pattern}", "training step", "magnitude |w|"
    )
    logs = [run.metrics(f"cast-lr{t.peak:g}-seed{t.seed}") for t in found]
    steps = [[x["step"] for x in log] for log in logs]
    for metric, label, color in (
        ("max_masked", "largest", COLORS[1]),
        ("mean_masked", "mean", COLORS[0]),
    ):
        values = np.asarray([[max(x[metric], 1e-12) for x in log] for log in logs])
        axes.plot(steps[0], values.mean(0), color=color, label=label, linewidth=1.6)
        axes.fill_between(steps[0], values.min(0), values.max(0), color=color, alpha=0.18)
    axes.set_yscale("log")
    axes.legend(frameon=False)
    save(figure, run.folder / "weight_magnitudes.png")


def smooth(values: list[float], width: int = 5) -> list[float]:
    """Running mean over the last `width` entries."""
    return [float(np.mean(values[max(0, i - width + 1) : i + 1])) for i in range(len(values))]


def save_models(
    config: Config, run: Run, model: LanguageModel, best: dict[str, list[Trial]]
) -> dict[str, int]:
    """Stores the best sparse model as a checkpoint and compressed; returns sizes in bytes."""
    sparse = {name: found for name, found in best.items() if name != "dense"}
    if not sparse:
        return {}
    found = sparse.get("cast") or min(sparse.values(), key=mean_after)
    chosen = min(found, key=lambda t: t.after)
    folder = run.folder / "sparse_model"
    checkpoints = Checkpoints(folder)
    if checkpoints.latest() is None:
        checkpoints.save(config.steps, chosen.params, {"method": chosen.method})
    checkpoints.close()
    if not run.is_main or jax.process_count() > 1:
        return {}
    path = run.folder / "sparse_model.npz"
    sizes = weights.save_compact(path, chosen.params, chosen.masks)
    card = sj.summarize(chosen.params, chosen.masks)
    show(
        run,
        f"{LABELS[chosen.method]}: {folder.name} (checkpoint, {sizes['dense']:,} bytes of weights) "
        f"and {path.name} (compressed, {sizes['file']:,} bytes); projections at density "
        f"{card.density:.3f}, {1 - card.flops[1] / card.flops[0]:.0%} fewer operations where a "
        "kernel skips zeros (simulated here)",
    )
    return sizes


def print_samples(
    config: Config, run: Run, model: LanguageModel, best: dict[str, list[Trial]]
) -> None:
    """A few greedy continuations of held-out text, dense and sparse side by side."""
    sparse = {name: found for name, found in best.items() if name != "dense"}
    if not sparse or model.mesh is not None:
        return
    found = sparse.get("cast") or min(sparse.values(), key=mean_after)
    tokenizer = get_tokenizer(model.text.tokenizer)
    given = config.seq_len // 2
    starts = np.linspace(0, len(model.text.validation) - given - 1, 5).astype(int)[1:4]
    prompts = np.stack([model.text.validation[s : s + given] for s in starts]).astype(np.int32)
    columns = []
    for params in (model.params, found[0].params):
        lines = generate(nnx.merge(model.graph, params), jnp.asarray(prompts), max_new_tokens=given)
        columns.append([tokenizer.decode(np.asarray(line)[given:]) for line in lines])
    rows = [
        tuple(repr(text)[1:-1] for text in (tokenizer.decode(prompt), *texts))
        for prompt, *texts in zip(prompts, *columns)
    ]
    header = ("held-out text", "dense goes on", f"{LABELS[found[0].method]} goes on")
    run.console.print(make_table("Greedy continuations", header, rows))


def show(run: Run, text: str) -> None:
    """Prints a line as it is."""
    run.console.print(text, soft_wrap=True, markup=False)


def check(config: Config) -> list[str]:
    """Builds the full setting abstractly: shapes of the model, its state and one step."""
    if jax.device_count() >= 8:
        return []
    sizes = model_config(config, 32000)
    built = nnx.eval_shape(lambda: Llama(sizes, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(built)
    init, step = make_trainer(
        config, build_methods(config)["cast"], lambda p, tokens: nnx.merge(graph, p)(tokens)
    )
    state = jax.eval_shape(init, params)
    windows = jax.ShapeDtypeStruct((config.batch, config.seq_len + 1), jnp.int32)
    after, metrics = jax.eval_shape(
        step, state, windows, params, jax.ShapeDtypeStruct((), jnp.float32)
    )
    chosen = dict(sj.named_leaves(params))
    inside = [chosen[path] for path in sj.selected_paths(params, PROJECTIONS)]
    scope = sum(math.prod(leaf.shape) for leaf in inside)
    stored = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(after))
    return [
        f"paper setting: {config.model}, {parameter_count(sizes):,} parameters, "
        f"{sum(leaf.shape[0] for leaf in inside)} tensors in scope with {scope:,} weights",
        f"a step of {config.batch} x {config.seq_len} tokens traces; its metrics are "
        f"{', '.join(metrics)}; weights, moments and masks take {stored / 2**30:,.1f} GiB",
        f"checked abstractly only: this setting wants a mesh ({config.mesh}) and pretrained weights",
    ]


EXPERIMENT = Experiment(
    slug=SLUG,
    paper="CAST: Continuous and Differentiable Semi-Structured Sparsity-Aware Training for LLMs",
    presets=PRESETS,
    run=run,
    check=check,
)

if __name__ == "__main__":
    main(EXPERIMENT)
