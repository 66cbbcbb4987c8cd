"""Core neurons of prompts in a language model: what follows, read with these neurons alone."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from experiments.corematching.config import Config
from experiments.harness.config import ExperimentError
from experiments.harness.data import validation_windows
from experiments.harness.language import LanguageModel
from sparsejax.activations import core_neurons
from sparsejax.core.topk import exact_topk_mask
from sparsejax.models import KVCache, init_cache, rope_tables, unroll

KINDS = ("own", "other", "random", "magnitude")
KIND_LABELS = {
    "own": "core of its prompt",
    "other": "core of another prompt",
    "random": "random neurons",
    "magnitude": "core by |a| of its prompt",
}
MOST = 8  # prompts at a time


@functools.partial(jax.jit, static_argnames=("graph", "rho", "betas"))
def follow(
    graph: Any,
    params: Any,
    tokens: Int[Array, "b t"],
    cache: KVCache,
    masks: Bool[Array, "layers b f"] | None = None,
    *,
    rho: float = 0.2,
    betas: tuple[float, ...] = (),
) -> tuple[Float[Array, "b t v"], KVCache, dict[str, Bool[Array, "layers b f"]]]:
    """`Llama.decode` with some neurons of gated feed-forward networks only, and their core.

    Args:
      masks: the neurons of each layer and sample that are used; None for all.
      betas: shares for which the core neurons over `tokens` are looked for.

    Returns:
      Logits, the cache after them, and masks by `own-<beta>` and `magnitude-<beta>`: core neurons
      by the activations, and by their magnitude.
    """
    model = nnx.merge(graph, params)
    positions = cache.length + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    rope = rope_tables(model.config, positions)
    block_graph, stacked = nnx.split(model.blocks)

    def core(a: Float[Array, "b t f"], beta: float) -> Bool[Array, "b f"]:
        def one(a: Array) -> Array:
            return jnp.zeros(a.shape[1], bool).at[core_neurons(a, rho=rho, beta=beta)[0]].set(True)

        return jax.vmap(one)(a)

    def block_of(carry: Any, layer: tuple[Any, Any]) -> tuple[Any, dict[str, Array]]:
        (x, cache, i), (params, mask) = carry, layer
        block = nnx.merge(block_graph, params)
        attended, cache = block.attention.decode(block.attention_norm(x), rope, cache, i)
        x = x + attended
        h = block.ffn_norm(x)
        a = jax.nn.silu(block.ffn.gate_proj(h)) * block.ffn.up_proj(h)
        found = {f"own-{beta:g}": core(a, beta) for beta in betas}
        found |= {f"magnitude-{beta:g}": core(jnp.abs(a), beta) for beta in betas}
        used = a if mask is None else jnp.where(mask[:, None], a, 0)
        return (x + block.ffn.down_proj(used), cache, i + 1), found

    begin = (model.embedded(tokens), cache, jnp.int32(0))
    (x, cache, _), found = lax.scan(block_of, begin, (stacked, masks))
    cache = cache._replace(length=cache.length + tokens.shape[1])
    return model.logits(model.norm(x)), cache, found


@functools.partial(jax.jit, static_argnames="graph")
def surprise(
    graph: Any,
    params: Any,
    tokens: Int[Array, "b t+1"],
    cache: KVCache,
    masks: Bool[Array, "layers b f"],
) -> Float[Array, " b"]:
    """Mean negative log-likelihood, in nats, of each token behind the first."""
    logits, _, _ = follow(graph, params, tokens[:, :-1], cache, masks)
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0].mean(1)


def prompt_windows(config: Config, tokens: np.ndarray) -> Int[np.ndarray, "seeds prompts length"]:
    """Windows spread evenly over the validation text: a prompt, what follows it, and one more."""
    windows = validation_windows(tokens, config.prompt + config.continuation)
    wanted = config.seeds * config.prompts
    if len(windows) < wanted:
        raise ExperimentError(
            f"prompts is {config.prompts}; the text has {len(windows)} windows of "
            f"{windows.shape[1]} tokens, {config.seeds} draws need {wanted}"
        )
    rows = np.linspace(0, len(windows) - 1, wanted).astype(int)
    return windows[rows].reshape(config.prompts, config.seeds, -1).swapaxes(0, 1)


def prompts_at_once(count: int) -> int:
    """The most, up to 8, that divide the number of prompts."""
    return max(n for n in range(1, MOST + 1) if count % n == 0)


def draw_of(config: Config, seed: int, windows: np.ndarray) -> np.ndarray:
    """The windows of one draw."""
    return windows[config.seed_list().index(seed)]


def measure_neurons(config: Config, model: LanguageModel) -> Callable[[float | None], Any]:
    """Builds the function of one share: losses behind the prompts by kind, one a draw.

    The prompts are read once, densely, when the first share is asked for. None measures the dense
    model.
    """
    windows = prompt_windows(config, model.text.validation)
    at_once, n_layers = prompts_at_once(config.prompts), model.config.n_layers
    first, stop = config.layer_range(n_layers)
    dense_layer = ~((np.arange(n_layers) >= first) & (np.arange(n_layers) < stop))
    shape = (n_layers, config.prompts, model.config.d_ff)
    parts = [slice(i, i + at_once) for i in range(0, config.prompts, at_once)]

    @functools.cache
    def read(seed: int) -> tuple[list[KVCache], dict[str, Array]]:
        caches, masks = [], []
        prompts = draw_of(config, seed, windows)[:, : config.prompt]
        for part in parts:
            empty = init_cache(model.config, at_once, config.prompt + config.continuation)
            _, cache, found = follow(
                model.graph, model.params, jnp.asarray(prompts[part]), empty, rho=config.rho,
                betas=config.beta,
            )  # fmt: skip
            caches.append(cache)
            masks.append(found)
        return caches, jax.tree.map(lambda *each: jnp.concatenate(each, axis=1), *masks)

    def chosen(seed: int, kind: str, beta: float) -> Array:
        found = read(seed)[1]
        if kind == "random":
            drawn = jax.random.uniform(jax.random.key(seed), shape)
            return exact_topk_mask(drawn, int(beta * model.config.d_ff))
        if kind == "other":  # half of the draw away: another article
            return jnp.roll(found[f"own-{beta:g}"], config.prompts // 2, axis=1)
        return found[f"{kind}-{beta:g}"]

    def loss(seed: int, masks: Array) -> float:
        masks = masks | dense_layer[:, None, None]
        behind = draw_of(config, seed, windows)[:, config.prompt :]
        losses = [
            surprise(model.graph, model.params, jnp.asarray(behind[part]), cache, masks[:, part])
            for part, cache in zip(parts, read(seed)[0])
        ]
        return float(np.mean(np.concatenate(losses)))

    def measure(beta: float | None) -> dict[str, list[float]]:
        if beta is None:
            return {"dense": [loss(seed, jnp.ones(shape, bool)) for seed in config.seed_list()]}
        return {
            kind: [loss(seed, chosen(seed, kind, beta)) for seed in config.seed_list()]
            for kind in KINDS
        }

    return measure


def compact_model(
    model: nnx.Module, neurons: Int[np.ndarray, "layers n_core"], layers: tuple[int, int]
) -> nnx.Module:
    """A copy for decoding whose feed-forward networks hold some of their neurons alone.

    Args:
      model: a `Llama`. neurons: which, of every layer; those outside `layers` stay dense.
    """
    small: Any = unroll(model)
    for i in range(*layers):
        ffn = small.blocks[i].ffn
        ffn.gate_proj.kernel = nnx.Param(ffn.gate_proj.kernel[...][:, neurons[i]])
        ffn.up_proj.kernel = nnx.Param(ffn.up_proj.kernel[...][:, neurons[i]])
        ffn.down_proj.kernel = nnx.Param(ffn.down_proj.kernel[...][neurons[i]])
    return small


@functools.partial(jax.jit, static_argnames=("graph", "count"))
def continue_greedily(
    graph: Any, params: Any, token: Int[Array, "1 1"], cache: KVCache, *, count: int
) -> Int[Array, "1 count"]:
    """The likeliest tokens behind a cache, one at a time."""
    model = nnx.merge(graph, params)

    def step(carry: Any, _: None) -> tuple[Any, Array]:
        token, cache = carry
        logits, cache = model.decode(token, cache)
        token = jnp.argmax(logits[:, -1:], axis=-1).astype(token.dtype)
        return (token, cache), token[:, 0]

    return lax.scan(step, (token, cache), None, length=count)[1].T
