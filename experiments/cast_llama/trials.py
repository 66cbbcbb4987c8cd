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
from experiments.cast_llama.methods import Method, magnitude_masks, make_trainer
from experiments.harness.language import LanguageModel, warmup_cosine
from experiments.harness.perplexity import Perplexity
from experiments.harness.run import Run
from experiments.harness.training import train
from sparsejax import weights


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
) -> list[Trial]:
    """Prunes the dense model at once, layer by layer; one trial for each criterion."""
    trials = []
    for name in [n for n in config.methods if n in ONE_SHOT]:
        pruned = nnx.merge(model.graph, on_one_device(model.params))
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
        run.show(f"{LABELS[name]}: perplexity {after:.3f}")
        trials.append(Trial(name, 0.0, config.seed, after, after, 1.0, params, masks))
    return trials


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


def inspect_weights(config: Config, method: Method, state: Any) -> dict[str, Any]:
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
