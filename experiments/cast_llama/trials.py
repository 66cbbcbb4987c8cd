"""Runs of the methods: pruned at once, or trained at every learning rate and seed."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

import sparsejax as sj
from experiments.cast_llama.config import LABELS, ONE_SHOT, PROJECTIONS, SLUG, Config
from experiments.cast_llama.methods import (
    Method,
    build_methods,
    magnitude_masks,
    make_trainer,
)
from experiments.harness.language import LanguageModel, is_pretrained, rate_shape
from experiments.harness.perplexity import Perplexity
from experiments.harness.pretrained import calibration_windows
from experiments.harness.progress import layer_bar
from experiments.harness.run import Run
from experiments.harness.training import train
from sparsejax import weights
from sparsejax.core.selection import map_selected


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


def one_shot_trials(
    config: Config, run: Run, model: LanguageModel, perplexity: Perplexity, windows: np.ndarray
) -> dict[str, Trial]:
    """Prunes the dense model at once, layer by layer, by every criterion that is wanted.

    That is those of `config.methods`, and those that a trained method starts from.
    """
    methods = build_methods(config)
    wanted = [methods[name].begin for name in config.methods if name in methods]
    trials = {}
    for name in [n for n in ONE_SHOT if n in (*config.methods, *wanted)]:
        params, masks = prune_once(config, run, model, name)
        after = perplexity(params, windows)
        run.show(f"{LABELS[name]}: perplexity {after:.3f}")
        trials[name] = Trial(name, 0.0, config.seed, after, after, 1.0, params, masks)
    return trials


def prune_once(config: Config, run: Run, model: LanguageModel, name: str) -> tuple[Any, Any]:
    """The dense model pruned by one criterion, and its masks; magnitude needs no calibration."""
    if name == "magnitude":
        masks = magnitude_masks(model.params, config)
        return sj.apply_masks(model.params, masks), masks
    pruned = nnx.merge(model.graph, on_one_device(model.params))
    if is_pretrained(config.model):
        length = config.seq_len + 1
        tokens = calibration_windows(model.text, length=length, count=config.calibration)
    else:
        length = config.seq_len
        rng = np.random.default_rng(config.seed)
        starts = rng.integers(0, len(model.text.train) - length, config.calibration)
        tokens = np.stack([model.text.train[s : s + length] for s in starts]).astype(np.int32)
    method = weights.PruneMethod(name, pattern=config.nm)  # type: ignore[arg-type]
    with layer_bar(run.console, LABELS[name], total=7 * model.config.n_layers) as on_layer:
        found, _ = weights.prune_model(
            pruned,
            jnp.asarray(tokens),
            method=method,
            chunk=max(1, min(64, 2**13 // length)),
            folder=run.folder / "one_shot" / name if jax.process_count() == 1 else None,
            on_layer=on_layer,
        )
    masks = stack_masks(model.params, found)
    return model.shard(nnx.state(pruned)), model.shard(masks)


def stack_masks(params: Any, blocks: list[Any]) -> Any:
    """The masks of all blocks in the structure of the whole model's parameters."""
    by_path = [dict(sj.named_leaves(block)) for block in blocks]

    def one(path: str, leaf: Any) -> jax.Array:
        del leaf
        return jnp.stack([masks[path.removeprefix("blocks/")] for masks in by_path])

    return map_selected(one, params, where=PROJECTIONS, otherwise=lambda leaf: jnp.asarray(True))


def on_one_device(params: Any) -> Any:
    """Whole copies of sharded parameters on the first device of each process."""
    if jax.process_count() > 1:
        params = multihost_utils.process_allgather(params, tiled=True)
    return jax.tree.map(jnp.asarray, jax.device_get(params))


def train_method(
    config: Config,
    run: Run,
    model: LanguageModel,
    name: str,
    method: Method,
    begin: Trial | None,
    perplexity: Perplexity,
    windows: np.ndarray,
) -> list[Trial]:
    """Trains one method at every learning rate and seed with one compiled step.

    Args:
      begin: the one-shot model that it starts from; None starts from the dense one.
    """
    init, step = make_trainer(config, method, model.logits)
    if begin is None:
        params, masks = model.params, magnitude_masks(model.params, config)
    else:
        params, masks = begin.params, begin.masks

    def start(seed: int) -> Any:
        state = init(params, masks, seed)
        # The step takes its state over, and the dense model must outlive it.
        return model.shard(jax.tree.map(jnp.copy, state))

    outputs = None if model.mesh is None else (model.shardings(start(0)), None)
    compiled = jax.jit(step, out_shardings=outputs, donate_argnums=0)
    inspect = jax.jit(lambda state: inspect_weights(config, method, state, model.params))
    if name == "cast":
        for peak in config.learning_rates:
            shape = rate_shape(config.steps, config.schedule)
            weights.check_reach(
                params,
                masks,
                lambda count, peak=peak, shape=shape: peak * shape(count),
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
                state=start(seed),
                step=lambda s, b, peak=peak: compiled(s, b, model.params, jnp.float32(peak)),
                batches=model.batches(config, seed=1000 + seed),
                steps=config.steps,
                inspect=inspect,
                mesh=model.mesh,
                slug=SLUG,
            )
            trial = finish_trial(
                config, method, name, peak, seed, state, model.params, perplexity, windows
            )
            seconds = time.time() - begun
            run.show(
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
    dense: Any,
    perplexity: Perplexity,
    windows: np.ndarray,
) -> Trial:
    """Prunes a trained state to the pattern and measures it on both sides."""
    before = perplexity(method.view(state, dense), windows)
    params, masks = method.finish(state, dense)
    if name == "dense":
        return Trial(name, peak, seed, before, before, 1.0, params, masks)
    raw = state["trainable"].get("weights", dense)
    kept = float(weights.sparsity_report(raw, masks)["kept_ratio"])
    after = perplexity(params, windows)
    return Trial(name, peak, seed, before, after, kept, params, masks)


def inspect_weights(config: Config, method: Method, state: Any, dense: Any) -> dict[str, Any]:
    """What the curves show of a state: how far the weights are on their way to the pattern."""
    used = method.view(state, dense)
    raw = state["trainable"].get("weights", used)
    masks = magnitude_masks(raw, config)
    report = weights.sparsity_report(raw, masks)
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
