"""What the CAST experiment shows at its end: table, figures, models, continuations, claims."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import sparsejax as sj
from experiments.cast_llama.config import HELD, LABELS, ONE_SHOT, TRAINED, Config
from experiments.cast_llama.trials import Trial, mean_after
from experiments.harness.checkpoints import Checkpoints
from experiments.harness.config import Claim, Table
from experiments.harness.language import LanguageModel, is_pretrained
from experiments.harness.plots import COLORS, draw_curves, new_figure, save
from experiments.harness.pretrained import export
from experiments.harness.progress import make_table, mean_and_deviation
from experiments.harness.run import Run
from sparsejax import weights
from sparsejax.models import generate


def print_table(
    run: Run,
    config: Config,
    model: LanguageModel,
    dense: float,
    trials: list[Trial],
    best: dict[str, list[Trial]],
) -> Table:
    """The table of perplexities: every method at its best rate, and what the others gave."""
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
    header = ("method", "rate", "perplexity", "to dense", "jump at pruning", "S", "other rates")
    name = model.tokenizer.name if is_pretrained(config.model) else f"a LLaMA ({config.model})"
    tokens = config.steps * config.batch * config.seq_len
    title = (
        f"Validation perplexity per token of {name} at {config.pattern}, {config.seeds} seed(s), "
        f"{tokens:,} tokens of training"
    )
    run.console.print(make_table(title, header, rows))
    return Table(title, header, tuple(rows))


def mean_jump(trials: list[Trial]) -> float:
    """Mean relative change of the perplexity at the final pruning."""
    return sum(t.after / t.before - 1 for t in trials) / len(trials)


def make_claims(
    config: Config, dense: float, trials: list[Trial], best: dict[str, list[Trial]]
) -> tuple[Claim, ...]:
    """The verdicts: at equal learning rate as the paper asks, and at everyone's best."""
    claims = []
    rate = config.learning_rates[0]
    equal = {
        name: [t for t in trials if (t.method, t.peak) == (name, rate)]
        for name in ("cast", "naive", "srste")
    }
    cast = equal.pop("cast")
    rivals = {name: mean_after(found) for name, found in equal.items() if found}
    if cast and rivals:
        jump, kept = mean_jump(cast), min(t.kept_ratio for t in cast)
        holds = mean_after(cast) < min(rivals.values()) and abs(jump) < 0.005 and kept >= 0.999
        claims.append(
            Claim(
                f"CAST at {config.pattern} beats {' and '.join(LABELS[n] for n in rivals)} at "
                f"equal learning rate {rate:g}, and its final pruning changes nothing",
                holds,
                f"perplexity {mean_after(cast):.3f}, jump {jump:+.2%}, S {kept:.4f}",
                ", ".join(f"{LABELS[n]} {value:.3f}" for n, value in rivals.items()),
                config.seeds,
            )
        )
    others = {n: found for n, found in best.items() if n not in ("cast", "dense")}
    if cast and others:
        name, found = min(others.items(), key=lambda item: mean_after(item[1]))
        trained = any(n not in ONE_SHOT for n in others)
        claims.append(
            Claim(
                f"CAST at {config.pattern} has a lower perplexity than every other sparse method, "
                "in every seed, each at its best learning rate"
                if trained
                else f"CAST at {config.pattern} is closer to dense than pruning at once, which "
                "trains nothing",
                all(is_lower(best["cast"], theirs) for theirs in others.values()),
                f"{mean_and_deviation([t.after for t in best['cast']])}, dense {dense:.3f}",
                f"{mean_and_deviation([t.after for t in found])} ({LABELS[name]})",
                config.seeds,
            )
        )
    held = {n: mean_after(best[n]) for n in HELD if n in best and n != "naive"}
    if held and "naive" in best and not cast:
        criteria = [LABELS[HELD[n]].removesuffix(", one-shot") for n in held]
        claims.append(
            Claim(
                f"masks of {' and of '.join(criteria)} at {config.pattern}, held while the weights "
                "are trained with the teacher, end at a lower perplexity than magnitude's",
                max(held.values()) < mean_after(best["naive"]),
                f"{', '.join(f'{value:.3f}' for value in held.values())}, the dense model before "
                f"training {dense:.3f}",
                mean_and_deviation([t.after for t in best["naive"]]),
                config.seeds,
            )
        )
    if not claims:  # a run of a few methods only
        name, found = min(best.items(), key=lambda item: mean_after(item[1]))
        claims.append(
            Claim(
                f"{LABELS[name]} at {config.pattern} stays within 0.1 of the perplexity of the "
                "dense model before training",
                mean_after(found) <= dense + 0.1,
                mean_and_deviation([t.after for t in found]),
                f"{dense:.3f} (dense)",
                config.seeds,
            )
        )
    return tuple(claims)


def is_lower(ours: list[Trial], theirs: list[Trial]) -> bool:
    """Whether a method is ahead in every seed; pruning at once has one trial for all of them."""
    by_seed = {t.seed: t.after for t in theirs}
    return all(t.after < by_seed.get(t.seed, theirs[0].after) for t in ours)


def make_card(config: Config) -> sj.SparsityCard:
    """The card of CAST; where it is left out, of masks that are found once and held."""
    cast = "cast" in config.methods
    return sj.SparsityCard(
        what=sj.WhatIsSparse.WEIGHTS,
        granularity=sj.Granularity.N_M,
        timing=sj.Timing.DURING if cast else sj.Timing.AFTER,
        path=sj.TrainingPath.DENSE_TO_SPARSE,
        dynamics=sj.MaskDynamics.DYNAMIC if cast else sj.MaskDynamics.STATIC,
        allocation=sj.Allocation.UNIFORM,
        criterion=sj.Criterion.MAGNITUDE if cast else sj.Criterion.SALIENCY,
        gradient=sj.GradientRule.DENSE if cast else sj.GradientRule.MASKED,
        seeds=config.seeds,
        budget=f"{config.steps} steps from one dense model, each at its best of "
        f"{len(config.learning_rates)} learning rate(s)",
        simulated=True,
    )


def draw(config: Config, run: Run, trials: list[Trial], best: dict[str, list[Trial]]) -> None:
    """Three figures: loss, share of groups in the pattern, weight magnitudes."""
    if not run.is_main:
        return
    trained = {name: found for name, found in best.items() if name not in ONE_SHOT}

    def curves(metric: str) -> dict[str, list[tuple[Any, Any]]]:
        drawn = {}
        for name, found in trained.items():
            logs = [run.metrics(f"{name}-lr{t.peak:g}-seed{t.seed}") for t in found]
            drawn[LABELS[name]] = [
                ([x["step"] for x in log], smooth([x[metric] for x in log])) for log in logs
            ]
        return drawn

    names = [LABELS[name] for name in reversed(TRAINED)]
    seeds = f"mean of {config.seeds} seed(s), band from lowest to highest"
    if trained:
        figure, axes = new_figure(
            f"Training loss on text, {seeds}", "training step", "cross-entropy (nats per token)"
        )
        draw_curves(axes, curves("cross_entropy"), order=names)
        axes.legend(frameon=False)
        save(figure, run.folder / "loss.png")
        figure, axes = new_figure(
            f"Groups that obey {config.pattern} before any pruning",
            "training step",
            "share of groups in the pattern",
        )
        draw_curves(axes, curves("groups_in_pattern"), order=names)
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


def save_models(config: Config, run: Run, model: LanguageModel, chosen: Trial) -> dict[str, int]:
    """Stores a sparse model as a checkpoint and compressed; returns sizes in bytes.

    A model that was loaded becomes a Hugging Face directory too.
    """
    folder = run.folder / "sparse_model"
    checkpoints = Checkpoints(folder)
    if checkpoints.latest() is None:
        checkpoints.save(config.steps, chosen.params, {"method": chosen.method})
    checkpoints.close()
    if not run.is_main or jax.process_count() > 1:
        return {}
    if is_pretrained(config.model):
        export(run.folder / "hf_model", nnx.merge(model.graph, chosen.params), model.tokenizer)
    path = run.folder / "sparse_model.safetensors"
    sizes = weights.save_compact(path, chosen.params, chosen.masks)
    card = sj.summarize(chosen.params, chosen.masks)
    run.show(
        f"{LABELS[chosen.method]}: {folder.name} (checkpoint, {sizes['dense']:,} bytes of weights) "
        f"and {path.name} (compressed, {sizes['file']:,} bytes); projections at density "
        f"{card.density:.3f}, {1 - card.flops[1] / card.flops[0]:.0%} fewer operations where a "
        "kernel skips zeros (simulated here)",
    )
    return sizes


def print_samples(config: Config, run: Run, model: LanguageModel, chosen: Trial) -> None:
    """A few greedy continuations of held-out text, dense and sparse side by side."""
    if model.mesh is not None:
        return
    tokenizer = model.tokenizer
    given = min(32, config.seq_len // 2)
    starts = np.linspace(0, len(model.text.validation) - given - 1, 5).astype(int)[1:4]
    prompts = np.stack([model.text.validation[s : s + given] for s in starts]).astype(np.int32)
    columns = []
    for params in (model.params, chosen.params):
        lines = generate(nnx.merge(model.graph, params), jnp.asarray(prompts), max_new_tokens=given)
        columns.append([tokenizer.decode(np.asarray(line)[given:]) for line in lines])
    rows = [
        tuple(repr(text)[1:-1] for text in (tokenizer.decode(prompt), *texts))
        for prompt, *texts in zip(prompts, *columns)
    ]
    header = ("held-out text", "dense goes on", f"{LABELS[chosen.method]} goes on")
    run.console.print(make_table("Greedy continuations", header, rows))
