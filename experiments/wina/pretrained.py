"""WINA and its rivals on a pretrained language model: perplexity, and real decoding."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.harness.config import Result
from experiments.harness.data import validation_windows
from experiments.harness.digits import kept_arm
from experiments.harness.perplexity import Perplexity, make_perplexity
from experiments.harness.pretrained import evaluation_batch, pretrained_model
from experiments.harness.run import Run
from experiments.harness.timing import compare
from experiments.wina.config import SLUG, Arm, Config, list_arms
from experiments.wina.greedy import allocate
from experiments.wina.methods import (
    Setting,
    Workshop,
    count_gates,
    gate_sparsity,
    multiply_adds,
    projection_sizes,
)
from experiments.wina.pretrained_report import Cell, Found, report
from experiments.wina.products import kept_weights
from sparsejax import activations as act
from sparsejax.models import generate, parameter_count


def run_pretrained(config: Config, run: Run) -> Result:
    """Fills the table, a cell at a time; what is done is kept for a resumed run."""
    model = pretrained_model(config, None)
    windows = validation_windows(model.text.validation, config.seq_len)
    windows = windows[: config.eval_windows or None]
    workshop = Workshop(config, nnx.merge(model.graph, model.params), model.text)
    keep = functools.partial(kept_arm, run, SLUG)
    batch = evaluation_batch(model, config.seq_len)
    judge = Judge(batch)
    dense = {
        rotated: keep(
            f"dense{'-rotated' * rotated}",
            lambda rotated=rotated: {"perplexity": judge(workshop.base(rotated), windows)},
        )["perplexity"]
        for rotated in (False, True)
    }
    run.show(
        f"{model.tokenizer.name}: {parameter_count(model.config):,} parameters, perplexity "
        f"{dense[False]:.2f} (rotated {dense[True]:.2f}) on {len(windows)} windows of "
        f"{windows.shape[1]} tokens"
    )
    found: Found = {}
    settings: dict[Arm, dict[float, Setting]] = {}
    for arm in list_arms(config):
        found[arm], settings[arm] = {}, make_settings(arm, config, run, workshop, judge)
        for share, setting in settings[arm].items():
            once = functools.partial(measure, arm, setting, workshop, judge, windows)
            kept = keep(f"{arm.name}-{share:g}", once)
            adds = multiply_adds(arm, setting, model.config)
            found[arm][share] = Cell(kept["perplexity"], kept["kept"], adds, setting.alpha)
            run.show(f"{arm.label} at {share:.0%}: perplexity {kept['perplexity']:.2f}")
    for arm in found if config.decode_tokens else ():
        if not found[arm]:
            continue
        once = functools.partial(time_decoding, arm, settings[arm], config, workshop)
        times = keep(f"decoding-{arm.name}", once)["timings"]
        for share, cell in found[arm].items():
            timing = {"speed": times[f"{share:g}"], "dense_speed": times["dense"]}
            found[arm][share] = dataclasses.replace(cell, **timing)
            run.show(f"{arm.label} at {share:.0%}: {timing['speed']:.1f} tokens/s")
    return report(config, run, model, dense, found)


class Judge:
    """Perplexities of models, those of one kind by one compiled function."""

    def __init__(self, batch: int):
        self.batch = batch
        self._graph: Any = None
        self._perplexity: Perplexity

    def __call__(self, model: nnx.Module, windows: np.ndarray) -> float:
        """Of windows that stand each by itself."""
        graph, state = nnx.split(model)
        if graph != self._graph:
            self._graph = graph
            self._perplexity = make_perplexity(
                lambda params, tokens: nnx.merge(graph, params)(tokens), batch=self.batch
            )
        return self._perplexity(state, windows)


def make_settings(
    arm: Arm, config: Config, run: Run, workshop: Workshop, judge: Judge
) -> dict[float, Setting]:
    """The setting of an arm at every sparsity that it can reach, kept for a resumed run."""
    compute = {"cats": _cats_settings, "r-sparse": _r_sparse_settings}.get(
        arm.method, _input_settings
    )

    def all_of_them() -> dict[str, Any]:
        settings = compute(arm, config, run, workshop, judge)
        plain = {f"{share:g}": dataclasses.asdict(s) for share, s in settings.items()}
        return {"settings": jax.tree.map(_as_list, plain, is_leaf=lambda x: isinstance(x, list))}

    kept = kept_arm(run, SLUG, f"setting-{arm.name}", all_of_them)["settings"]
    return {s: Setting(**kept[f"{s:g}"]) for s in config.sparsity if f"{s:g}" in kept}


def _as_list(value: Any) -> Any:
    return np.asarray(value, np.float64).tolist()


def _input_settings(
    arm: Arm, config: Config, run: Run, workshop: Workshop, judge: Judge
) -> dict[float, Setting]:
    """Of TEAL and WINA: the sparsity of every projection, and thresholds that give it."""
    del judge
    model = workshop.model.config
    if config.allocation == "greedy":
        allocated = allocate(config, run, workshop, arm)
    else:
        allocated = {share: _uniform(share, model) for share in config.sparsity}
    settings = {}
    for share, sparsity in allocated.items():
        limits: Any = {}
        if config.mask_by == "threshold":
            limits = act.input_thresholds(workshop.scores(arm), sparsity)
        settings[share] = Setting(sparsity, limits)
    return settings


def _cats_settings(
    arm: Arm, config: Config, run: Run, workshop: Workshop, judge: Judge
) -> dict[float, Setting]:
    """Of CATS: thresholds of every layer's gates."""
    del run, judge
    sizes = workshop.model.config
    shares = {s: gate_sparsity(arm, s, sizes) for s in config.sparsity}
    reached = {s: share for s, share in shares.items() if share is not None}
    windows = workshop.windows(config.calibration)
    limits = count_gates(workshop.model, windows, list(reached.values()))
    return {
        s: Setting({"ffn": [share] * sizes.n_layers}, {"ffn": limits[share]})
        for s, share in reached.items()
    }


def _r_sparse_settings(
    arm: Arm, config: Config, run: Run, workshop: Workshop, judge: Judge
) -> dict[float, Setting]:
    """Of R-Sparse: the division of the budget that is best on training windows."""
    del run
    windows, settings = workshop.windows(config.tuning), {}
    for share in config.sparsity:
        tried = {}
        for alpha in config.alphas:
            limits = act.input_thresholds(workshop.scores(arm), 1 - (1 - share) * alpha)
            setting = Setting(_uniform(share, workshop.model.config), limits, alpha)
            tried[judge(workshop.build(arm, setting), windows)] = setting
        settings[share] = tried[min(tried)]
    return settings


def _uniform(share: float, sizes: Any) -> dict[str, list[float]]:
    return {path: [share] * sizes.n_layers for path in projection_sizes(sizes)}


def measure(
    arm: Arm, setting: Setting, workshop: Workshop, judge: Judge, windows: np.ndarray
) -> dict[str, float]:
    """Perplexity, and the share of projection weights whose inputs the first window kept.

    All positions are sparsified, the first ones too.
    """
    perplexity = judge(workshop.build(arm, setting), windows)
    counted = workshop.build(arm, setting, counted=True)
    shares = kept_weights(counted, jnp.asarray(windows[:1, :-1]))
    if arm.method == "cats":  # up is spared what down is, on its other side
        shares["blocks/ffn/up_proj/kernel"] = shares["blocks/ffn/down_proj/kernel"]
    sizes = projection_sizes(workshop.model.config)
    kept = sum(sizes[path] * share for path, share in shares.items()) / sum(sizes.values())
    return {"perplexity": perplexity, "kept": kept}


def time_decoding(
    arm: Arm, settings: dict[float, Setting], config: Config, workshop: Workshop
) -> dict[str, Any]:
    """Tokens a second of greedy generation from one token, in turns with the dense model."""
    first = jnp.asarray(workshop.text.validation[None, :1].astype(np.int32))
    models = {"dense": workshop.base(False, decoding=True)} | {
        f"{share:g}": workshop.build(arm, setting, decoding=True)
        for share, setting in settings.items()
    }
    calls = {
        name: functools.partial(generate, model, first, max_new_tokens=config.decode_tokens)
        for name, model in models.items()
    }
    timings = compare(calls, baseline="dense", rounds=config.rounds)
    return {"timings": {name: config.decode_tokens / t.median for name, t in timings.items()}}
