"""`python -m experiments.wina`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from experiments.harness.arms import print_table
from experiments.harness.cli import main
from experiments.harness.config import Experiment, Result
from experiments.harness.digits import kept_arm
from experiments.harness.language import is_pretrained, model_config
from experiments.harness.run import Run
from experiments.wina.config import PRESETS, SLUG, Arm, Config
from experiments.wina.laptop import best_masks, random_layers, sparsify_networks, time_layer
from experiments.wina.methods import Setting, multiply_adds, projection_sizes
from experiments.wina.pretrained import run_pretrained
from experiments.wina.report import draw, make_card, make_claims, make_tables
from sparsejax.activations import sparse_inputs
from sparsejax.models import LlamaConfig, init_cache, parameter_count
from sparsejax.models.transformed import TransformedLlama


def run(config: Config, run: Run) -> Result:
    """Random layers, networks on digits and the time of a layer; or a pretrained model."""
    if is_pretrained(config.model):
        return run_pretrained(config, run)
    parts = {
        "layers": random_layers,
        "masks": best_masks,
        "networks": sparsify_networks,
        "times": lambda config: {"layer": time_layer(config)},
    }
    found = {
        name: kept_arm(run, SLUG, name, functools.partial(compute, config))
        for name, compute in parts.items()
    }
    results = found["layers"], found["masks"], found["networks"], found["times"]["layer"]
    tables = make_tables(config, *results)
    for table in tables:
        print_table(run, table)
    if run.is_main:
        draw(run, config, found["layers"], found["networks"])
    card = make_card(config, budget="trained densely; no training after, no calibration but of "
                     "R-Sparse")  # fmt: skip
    return Result(make_claims(config, *results), card, found, tables)


def check(config: Config) -> list[str]:
    """Builds the full model in rotated form and traces it, sparsified, whole and token by token."""
    sizes = model_config(config, 32000)
    setting = (
        f"paper setting: {config.model}, {parameter_count(sizes):,} parameters, methods "
        f"{', '.join(config.methods)} at {', '.join(f'{s:.0%}' for s in config.sparsity)}, "
        f"{config.calibration} calibration windows of {config.seq_len} tokens of {config.dataset}, "
        f"{config.allocation} allocation"
    )
    lines = [setting]
    tokens = jax.ShapeDtypeStruct((1, config.seq_len), jnp.int32)
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    dense = multiply_adds(None, None, sizes)
    for share in config.sparsity:
        build = functools.partial(_sparse_model, config, share)
        graph, state = nnx.split(nnx.eval_shape(build))

        def whole(state: Any, tokens: Array, graph: Any = graph) -> Array:
            return nnx.merge(graph, state)(tokens)

        def step(state: Any, token: Array, graph: Any = graph) -> Array:
            cache = init_cache(sizes, 1, config.seq_len)
            return nnx.merge(graph, state).decode(token, cache)[0]

        logits, next_logits = jax.eval_shape(whole, state, tokens), jax.eval_shape(step, state, one)
        plain, turned = (_multiply_adds(method, share, sizes) for method in ("wina", "wina-t"))
        lines.append(
            f"{share:.0%}: logits {logits.shape} and {next_logits.shape} of a decoded token trace; "
            f"{1 - plain / dense:.1%} of {dense / 1e9:.2f} G multiply-adds a token are dropped, "
            f"{1 - turned / dense:.1%} with the shortcuts of the rotation counted"
        )
    lines.append(
        f"checked abstractly: a run wants pretrained weights (--model PATH) and {config.dataset}"
    )
    return lines


def _sparse_model(config: Config, share: float) -> Any:
    sizes = model_config(config, 32000)
    return sparse_inputs(TransformedLlama(sizes, rngs=nnx.Rngs(0)), share)


def _multiply_adds(method: str, share: float, sizes: LlamaConfig) -> float:
    sparsity = {path: [share] * sizes.n_layers for path in projection_sizes(sizes)}
    return multiply_adds(Arm(method), Setting(sparsity, {}), sizes)


EXPERIMENT = Experiment(
    slug=SLUG,
    paper="WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference",
    presets=PRESETS,
    run=run,
    check=check,
)

if __name__ == "__main__":
    main(EXPERIMENT)
