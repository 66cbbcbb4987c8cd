"""`python -m experiments.corematching`."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.corematching.cells import make_step, optimizer, train_decoders
from experiments.corematching.config import (
    PRESETS,
    SLUG,
    SYSTEM,
    Config,
    selection,
    vision_model,
)
from experiments.corematching.neurons import measure_neurons
from experiments.corematching.overlap import measure_layer
from experiments.corematching.report import (
    decoder_table,
    draw_kept,
    draw_neurons,
    draw_overlap,
    draw_speed,
    make_card,
    neuron_claims,
    neuron_table,
    speed_table,
    token_claims,
    token_tables,
)
from experiments.corematching.times import time_decoder, time_language_model
from experiments.harness.arms import print_table
from experiments.harness.cli import main
from experiments.harness.config import Experiment, Result
from experiments.harness.digits import kept_arm
from experiments.harness.language import LanguageModel, dense_model, is_pretrained
from experiments.harness.pretrained import pretrained_model
from experiments.harness.progress import training_bar
from experiments.harness.run import Run
from sparsejax.models.vision_language import VisionLanguage


def run(config: Config, run: Run) -> Result:
    """Decoders of images and a small language model; or a pretrained one."""
    if is_pretrained(config.model):
        return run_pretrained(config, run)
    graph, trained = train_decoders(config, run)
    found = {
        layer: kept_arm(
            run,
            SLUG,
            f"layer{layer}",
            functools.partial(measure_layer, config, graph, trained, layer),
        )
        for layer in config.select_layer
    }
    neurons = neuron_arms(config, run, dense_model(run, config, None, slug=SLUG))
    times = {}
    if config.decode_tokens:
        times = kept_arm(run, SLUG, "times", functools.partial(time_decoder, config))
    label = "a small byte model"
    tables = (*token_tables(config, found), neuron_table(config, label, neurons))
    tables += (decoder_table(config, times),) if times else ()
    for table in tables:
        print_table(run, table)
    if run.is_main:
        draw_kept(config, run, found)
        draw_overlap(config, run, graph, trained[0])
        draw_neurons(config, run, label, neurons)
    metrics = {
        "tokens": {f"layer{layer}": values for layer, values in found.items()},
        "neurons": neurons,
        "times": times,
    }
    budget = f"{config.vision_steps} steps for every decoder, trained dense; nothing after"
    return Result(token_claims(config, found), make_card(config, budget), metrics, tables)


def run_pretrained(config: Config, run: Run) -> Result:
    """Core neurons of prompts in a pretrained language model."""
    model = pretrained_model(config, None)
    label = model.tokenizer.name
    neurons, times = neuron_arms(config, run, model), {}
    if config.decode_tokens:
        compute = functools.partial(time_language_model, config, model)
        times = kept_arm(run, SLUG, "speed", compute)
    tables = (neuron_table(config, label, neurons),)
    tables += (speed_table(label, times),) if times else ()
    for table in tables:
        print_table(run, table)
    if run.is_main:
        draw_neurons(config, run, label, neurons)
        if times:
            draw_speed(run, label, times)
    metrics = {"neurons": neurons, "speed": times}
    card = make_card(config, f"prompts of {config.prompt} tokens, no training")
    return Result(neuron_claims(config, neurons, times), card, metrics, tables)


def neuron_arms(config: Config, run: Run, model: LanguageModel) -> dict[str, Any]:
    """Losses behind prompts, dense and at every share, kept as they are found."""
    measure, found = measure_neurons(config, model), {}
    shares = [None, *config.beta]
    with training_bar(run.console, "core neurons", total=len(shares)) as bar:
        for done, beta in enumerate(shares, 1):
            share = "dense" if beta is None else f"{beta:g}"
            compute = functools.partial(measure, beta)
            found[share] = kept_arm(run, SLUG, f"neurons-{share}", compute)
            bar(done, 0.0, {})
    return found


def check(config: Config) -> list[str]:
    """Builds the decoder at full size: a training step, a pruned prompt, a token behind it."""
    sizes = vision_model(config)
    batch = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    graph, params = nnx.split(nnx.eval_shape(lambda: VisionLanguage(sizes, rngs=nnx.Rngs(0))))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    text = sizes.max_seq_len - max(config.decode_tokens, 1) - sizes.vision_tokens
    b = config.vision_batch
    patches = jax.ShapeDtypeStruct((b, sizes.vision_tokens, sizes.patch_inputs), config.dtype)
    tokens = batch((b, text))
    setting = (
        f"paper setting: {count:,} parameters, {sizes.n_layers} layers of width {sizes.d_model} "
        f"with {sizes.d_ff} neurons; {sizes.vision_tokens} image tokens behind {SYSTEM} of text "
        f"and before {text - SYSTEM}"
    )
    tx = optimizer(config)
    state = {"params": params, "opt": jax.eval_shape(tx.init, params)}
    _, metrics = jax.eval_shape(make_step(graph, tx), state, patches, tokens, None, batch((b,)))
    training = f"one training step traced, {metrics['loss'].dtype} loss"
    select = selection(config, sizes.n_layers, config.select_layer[0])

    def decode(params: Any, patches: jax.Array, tokens: jax.Array) -> Any:
        model = nnx.merge(graph, params)
        prompt = model.prefill(patches, tokens, select=select, room=config.decode_tokens)
        core = model.compact(prompt.neurons)
        return prompt, core, model.decode(tokens[:, :1], prompt.cache, core=core)[0]

    prompt, core, logits = jax.eval_shape(decode, params, patches, tokens)
    places = prompt.cache[0].k.shape[1]
    dense = sizes.n_layers * 3 * sizes.d_ff
    rows = dense + sum(3 * (one["gate"].shape[0] - sizes.d_ff) for one in core.values())
    reading = (
        f"a prompt pruned behind layer {select.select_layer} traced: caches of {places} places, "
        f"{config.decode_tokens} of them for what follows, where dense ones have "
        f"{text + sizes.vision_tokens + config.decode_tokens}"
    )
    writing = (
        f"a token decoded with {config.vision_beta:.0%} of the neurons of layers "
        f"{config.core_layers} traced, logits {logits.shape}: it reads {rows / dense:.0%} of the "
        "rows of the feed-forward networks"
    )
    missing = (
        "checked abstractly: a run wants LLaVA's weights and its image encoder; the method on a "
        "decoder trained here is the laptop preset, its neurons in a pretrained language model "
        "are --model smollm2"
    )
    return [setting, training, reading, writing, missing]


EXPERIMENT = Experiment(
    slug=SLUG,
    paper="CoreMatching: Co-adaptive Sparse Inference with Token and Neuron Pruning for "
    "Vision-Language Models",
    presets=PRESETS,
    run=run,
    check=check,
)

if __name__ == "__main__":
    main(EXPERIMENT)
