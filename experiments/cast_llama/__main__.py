"""`python -m experiments.cast_llama`."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

import sparsejax as sj
from experiments.cast_llama.config import PRESETS, PROJECTIONS, SLUG, Config
from experiments.cast_llama.methods import build_methods, magnitude_masks, make_trainer
from experiments.cast_llama.report import (
    draw,
    make_card,
    make_claims,
    print_samples,
    print_table,
    save_models,
)
from experiments.cast_llama.trials import best_rates, one_shot_trials, train_method
from experiments.cast_llama.uses import (
    answer_questions,
    chosen_trial,
    load_questions,
    measure_quantized,
)
from experiments.harness.cli import main
from experiments.harness.config import Experiment, Result
from experiments.harness.data import validation_windows
from experiments.harness.language import is_pretrained, model_config
from experiments.harness.perplexity import make_perplexity
from experiments.harness.pretrained import evaluation_batch, language_model
from experiments.harness.run import Run
from experiments.harness.sharding import check_groups, make_mesh
from sparsejax.models import Llama, parameter_count


def run(config: Config, run: Run) -> Result:
    """Trains the dense model and every method, and compares their perplexities."""
    mesh, questions = make_mesh(config.mesh), load_questions(config)
    model = language_model(run, config, mesh, slug=SLUG)
    if mesh is not None:
        masks = magnitude_masks(model.params, config)
        check_groups(model.shardings(model.params), masks, config.nm, mesh)
    windows = validation_windows(model.text.validation, config.seq_len)
    windows = windows[: config.eval_windows or None]
    batch = evaluation_batch(model, config.seq_len)
    perplexity = make_perplexity(model.logits, batch=batch)
    dense = perplexity(model.params, windows)
    run.show(
        f"dense model {model.tokenizer.name if is_pretrained(config.model) else config.model}: "
        f"{parameter_count(model.config):,} parameters, perplexity {dense:.3f}"
    )
    once = one_shot_trials(config, run, model, perplexity, windows)
    trials = [once[name] for name in config.methods if name in once]
    methods = build_methods(config)
    for name in [n for n in config.methods if n in methods]:
        begin = once.get(methods[name].begin or "")
        trials += train_method(config, run, model, name, methods[name], begin, perplexity, windows)
    best = best_rates(trials)
    table = print_table(run, config, model, dense, trials, best)
    draw(config, run, trials, best)
    chosen = chosen_trial(best)
    files, quantized = {}, {}
    if chosen is not None:
        files = save_models(config, run, model, chosen)
        if jax.process_count() == 1:
            quantized = measure_quantized(config, run, chosen, perplexity, windows)
            print_samples(config, run, model, chosen)
    answers = answer_questions(config, run, model, best, questions)
    claims = make_claims(config, dense, trials, best)
    metrics = {
        "dense_perplexity": dense,
        "perplexity": {n: [t.after for t in found] for n, found in best.items()},
        "learning_rate": {n: found[0].peak for n, found in best.items()},
        "files": files,
        "quantized": quantized,
        "questions": answers,
    }
    return Result(claims, make_card(config), metrics, (table,))


def check(config: Config) -> list[str]:
    """Builds the full setting abstractly: shapes of the model, its state and one step."""
    sizes = model_config(config, 32000)
    built = nnx.eval_shape(lambda: Llama(sizes, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(built)
    init, step = make_trainer(
        config, build_methods(config)["cast"], lambda p, tokens: nnx.merge(graph, p)(tokens)
    )
    masks = jax.eval_shape(lambda p: magnitude_masks(p, config), params)
    state = jax.eval_shape(lambda p, m: init(p, m, 0), params, masks)
    windows = jax.ShapeDtypeStruct((config.batch, config.seq_len + 1), jnp.int32)
    after, metrics = jax.eval_shape(
        step, state, windows, params, jax.ShapeDtypeStruct((), jnp.float32)
    )
    chosen = dict(sj.named_leaves(params))
    inside = [chosen[path] for path in sj.selected_paths(params, PROJECTIONS)]
    scope = sum(math.prod(leaf.shape) for leaf in inside)
    stored = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(after))
    model = (
        f"paper setting: {config.model}, {parameter_count(sizes):,} parameters, "
        f"{sum(leaf.shape[0] for leaf in inside)} tensors in scope with {scope:,} weights"
    )
    cost = (
        f"a step of {config.batch} x {config.seq_len} tokens traces; its metrics are "
        f"{', '.join(metrics)}; weights, moments and masks take {stored / 2**30:,.1f} GiB"
    )
    wanted = f"checked abstractly: a run wants a mesh ({config.mesh}) and pretrained weights"
    return [model, cost, wanted]


EXPERIMENT = Experiment(
    slug=SLUG,
    paper="CAST: Continuous and Differentiable Semi-Structured Sparsity-Aware Training for LLMs",
    presets=PRESETS,
    run=run,
    check=check,
)

if __name__ == "__main__":
    main(EXPERIMENT)
