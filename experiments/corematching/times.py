"""Times of decoding: with both prunings in a decoder of LLaVA's form, and in a language model."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from experiments.corematching.config import QUESTION, SYSTEM, Config, selection, timed_model
from experiments.corematching.neurons import (
    compact_model,
    continue_greedily,
    follow,
    prompt_windows,
)
from experiments.harness.language import LanguageModel
from experiments.harness.timing import Timing, compare
from sparsejax.models import init_cache
from sparsejax.models.vision_language import Prefilled, VisionLanguage
from sparsejax.models.vision_language_config import CoreMatching

WAYS = ("dense", "neurons", "tokens", "both")
WAY_LABELS = {
    "dense": "dense",
    "neurons": "core neurons",
    "tokens": "core tokens",
    "both": "both",
}
Figures = dict[str, dict[str, float]]


@functools.partial(jax.jit, static_argnames=("graph", "select", "room"))
def read_prompt(
    graph: Any, params: Any, patches: jax.Array, tokens: jax.Array, *, select: CoreMatching | None,
    room: int,
) -> Prefilled:  # fmt: skip
    """The prompt of one sample, pruned."""
    return nnx.merge(graph, params).prefill(patches, tokens, select=select, room=room)


@functools.partial(jax.jit, static_argnames=("graph", "count"))
def write_on(graph: Any, params: Any, cache: Any, core: Any, *, count: int) -> jax.Array:
    """The likeliest tokens behind a pruned prompt, one at a time."""
    model = nnx.merge(graph, params)

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        token, cache = carry
        logits, cache = model.decode(token, cache, core=core)
        token = jnp.argmax(logits[:, -1:], axis=-1).astype(jnp.int32)
        return (token, cache), token[0, 0]

    return lax.scan(step, (jnp.zeros((1, 1), jnp.int32), cache), None, length=count)[1]


def time_decoder(config: Config) -> dict[str, Figures]:
    """Milliseconds of a prompt and of a token behind it, in a random decoder of LLaVA's form."""
    sizes = timed_model(config)
    graph, params = nnx.split(VisionLanguage(sizes, rngs=nnx.Rngs(config.seed)))
    keys = jax.random.split(jax.random.key(config.seed))
    shape = (1, sizes.vision_tokens, sizes.patch_inputs)
    patches = jax.random.normal(keys[0], shape, sizes.dtype)
    tokens = jax.random.randint(keys[1], (1, SYSTEM + QUESTION), 0, sizes.vocab_size)
    # tokens are dropped behind the first layer: of few layers the later ones are most
    prompts = {
        way: functools.partial(
            read_prompt, graph, params, patches, tokens, select=select, room=config.decode_tokens
        )
        for way, select in {"dense": None, "tokens": selection(config, sizes.n_layers, 0)}.items()
    }
    read = {way: prompt() for way, prompt in prompts.items()}
    core = nnx.merge(graph, params).compact(read["tokens"].neurons)
    writes = {
        way: functools.partial(
            write_on,
            graph,
            params,
            read["tokens" if way in ("tokens", "both") else "dense"].cache,
            core if way in ("neurons", "both") else {},
            count=config.decode_tokens,
        )
        for way in WAYS
    }
    return {
        "prompt": figures(compare(prompts, baseline="dense", rounds=config.rounds), 1),
        "token": figures(
            compare(writes, baseline="dense", rounds=config.rounds), config.decode_tokens
        ),
    }


def time_language_model(config: Config, model: LanguageModel) -> Figures:
    """Tokens a second behind a prompt, dense and with its core neurons gathered once."""
    window = prompt_windows(config, model.text.validation)[0, 0]
    prompt, token = jnp.asarray(window[None, : config.prompt]), jnp.asarray(window[None, None, -1])
    cache = init_cache(model.config, 1, config.prompt + config.decode_tokens)
    _, cache, masks = follow(
        model.graph, model.params, prompt, cache, rho=config.rho, betas=config.beta
    )
    whole, layers = nnx.merge(model.graph, model.params), config.layer_range(model.config.n_layers)
    ways = {}
    for name in ("dense", *(f"{beta:g}" for beta in config.beta)):
        used = layers if name != "dense" else (0, 0)
        kept = np.asarray(masks[f"own-{config.beta[0] if name == 'dense' else float(name):g}"])
        neurons = np.stack([np.flatnonzero(mask) for mask in kept[:, 0]])
        graph, params = nnx.split(compact_model(whole, neurons, used))
        ways[name] = functools.partial(
            continue_greedily, graph, params, token, cache, count=config.decode_tokens
        )
    return figures(compare(ways, baseline="dense", rounds=config.rounds), config.decode_tokens)


def figures(timings: dict[str, Timing], count: int) -> Figures:
    """Milliseconds of one of `count`, and the ratios of the medians."""
    return {
        name: {
            "ms": 1e3 * timing.median / count,
            "cpu_ms": 1e3 * timing.cpu_median / count,
            "ratio": timing.ratio,
            "cpu_ratio": timing.cpu_ratio,
        }
        for name, timing in timings.items()
    }
