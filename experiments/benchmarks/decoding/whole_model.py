"""A whole decoder: one token after a context that lies in the cache."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from experiments.benchmarks.decoding.config import Config
from experiments.benchmarks.decoding.feed_forward import FLOAT32
from experiments.benchmarks.decoding.reading import Notes, details, note, shifted_router
from experiments.benchmarks.kernels.common import fastest
from experiments.benchmarks.suite import Group
from experiments.harness.timing import Goal
from sparsejax.activations import kept_inputs, sparse_inputs, token_level_sparsity
from sparsejax.models import KVCache, Llama, LlamaConfig, init_cache, unroll
from sparsejax.models.llama_layers import rope_tables

SPARK = Goal(1 / 1.6)
ROW = "model: "
"""How the names of these rows begin."""
Model = tuple[Any, Any]
"""Graph and parameters."""


def whole_model_rows(config: Config, notes: Notes) -> Iterator[Group]:
    """All rows; what each reads goes to `notes`. Sparse models have separate blocks."""
    dense, tokens = config.dense, _token_ids(config)
    outside, attention, ffn = _weights_read(config)
    whole = outside + dense.n_layers * (attention + ffn)

    separate = _built(dense)
    forms = {
        f"{ROW}dense, separate blocks": decoder(config, separate, tokens),
        f"{ROW}dense, stacked blocks": decoder(config, _built(dense, separate=False), tokens),
    }
    for name in (*forms, f"{ROW}dense"):
        note(notes, name, FLOAT32 * whole, FLOAT32 * whole)
    faster = forms[fastest(forms)]
    yield Group(forms, f"{ROW}dense, separate blocks", config.rounds)
    # by themselves: what follows the copies of stacked blocks in turn takes 1.4 times as long
    forms.clear()

    functions, goals = {f"{ROW}dense": faster}, {}
    for name, model, layer, goal in _sparse_models(config, separate, tokens):
        functions[ROW + name] = decoder(config, model, tokens)
        size = outside + dense.n_layers * layer
        note(notes, ROW + name, FLOAT32 * size, FLOAT32 * whole)
        if goal is not None:
            goals[ROW + name] = goal
    yield Group(functions, f"{ROW}dense", config.rounds, goals)


def _weights_read(config: Config) -> tuple[float, float, float]:
    """Numbers that a token reads: outside of the layers, and of each dense attention and FFN."""
    dense = config.dense
    d, wide, narrow = dense.d_model, *_widths(dense)
    cache = 2 * config.context * narrow * dense.n_layers
    # the head is the embedding, transposed
    outside = dense.vocab_size * d + cache
    return outside, 2 * d * (wide + narrow), 3 * d * dense.d_ff


def _widths(config: LlamaConfig) -> tuple[int, int]:
    """Of all queries, and of all keys."""
    return config.n_heads * config.head_width, config.kv_heads * config.head_width


def _sparse_models(
    config: Config, dense: Model, tokens: Int[Array, "n t"]
) -> Iterator[tuple[str, Model, float, Goal | None]]:
    """Name with the share that is on, model, numbers that a token reads of a layer, goal."""
    d, (_, attention, _) = config.dense.d_model, _weights_read(config)
    spark = config.model("spark")
    graph, params = _built(spark)
    active = float(jnp.mean(details(graph, params, tokens)["num_active"][..., -1]))
    layer = attention + spark.ffn_split * spark.d_ff + active * (2 * d - spark.ffn_split)
    name = f"Spark FFN, {active / spark.d_ff:.1%}"
    yield name, (graph, params), layer, SPARK
    both = nnx.split(nnx.eval_shape(lambda: _model(config.model("spark_both"), True)))[0]
    kept = float(jnp.mean(details(both, params, tokens)["keys_kept"][..., -1]))
    # so short a cache is nothing beside the weights, whatever of it is left out
    yield f"{name}, keys {kept / tokens.shape[1]:.0%}", (both, params), layer, None

    (wide, narrow), f = _widths(config.dense), config.dense.d_ff
    of_d, of_wide, of_f = (kept_inputs(n, config.input_sparsity) for n in (d, wide, f))
    layer = of_d * (wide + 2 * narrow + 2 * f) + of_wide * d + of_f * d
    sparse = nnx.split(sparse_inputs(nnx.merge(*dense), config.input_sparsity))
    yield f"WINA, {1 - config.input_sparsity:.1%}", sparse, layer, None

    routed = _routed(config, *_built(config.model("block")), tokens)
    logits = details(*routed, tokens)["logits"][:, :, -1]
    on = 1 - float(token_level_sparsity(logits.reshape(-1, logits.shape[-1]) > 0))
    layer = attention + config.block["n_experts"] * d + 2 * d * config.model("block").d_ff * on
    yield f"BlockFFN, {on:.1%}", routed, layer, None


def decoder(config: Config, model: Model, tokens: Int[Array, "n t"]) -> Callable[[], Array]:
    """A call that decodes the next of the last tokens after the context, in place in one cache."""
    graph, params = model

    @functools.partial(jax.jit, donate_argnames=("k", "v"))
    def step(params: Any, token: Array, k: Array, v: Array) -> tuple[Array, KVCache]:
        cache = KVCache(k, v, jnp.int32(config.context))
        return nnx.merge(graph, params).decode(token[None, None], cache)

    @jax.jit
    def prefill(params: Any, context: Array) -> KVCache:
        cache = init_cache(config.dense, 1, config.context + 1)
        return nnx.merge(graph, params).decode(context[None], cache, last_only=True)[1]

    cache = prefill(params, tokens[0, :-1])
    turns = itertools.cycle(list(tokens[:, -1]))

    def call() -> Array:
        nonlocal cache
        logits, cache = step(params, next(turns), cache.k, cache.v)
        return logits

    return call


def _token_ids(config: Config) -> Int[Array, "n t"]:
    """Texts that share a context and differ in the token after it."""
    size = config.dense.vocab_size
    context = jax.random.randint(jax.random.key(2), (config.context,), 0, size)
    last = jax.random.choice(jax.random.key(3), size, (config.tokens, 1), replace=False)
    return jnp.concatenate([jnp.tile(context, (config.tokens, 1)), last], axis=1)


def _model(config: LlamaConfig, separate: bool) -> Llama:
    model = Llama(config, rngs=nnx.Rngs(0))
    return unroll(model) if separate else model


def _built(config: LlamaConfig, separate: bool = True) -> Model:
    """Graph and random parameters."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: _model(config, separate)))
    return graph, jax.jit(lambda: nnx.state(_model(config, separate), nnx.Param))()


def _routed(config: Config, graph: Any, params: Any, tokens: Array) -> Model:
    """The model with routers that leave off their share of experts for the last tokens."""

    @jax.jit
    def shift(params: Any, tokens: Array) -> Any:
        model: Any = nnx.merge(graph, params)
        x = model.embedded(tokens)
        rope = rope_tables(model.config, jnp.arange(tokens.shape[1])[None])
        for block in model.blocks:
            x = x + block.attention(block.attention_norm(x), rope)
            inputs = block.ffn_norm(x)
            router = block.ffn.router
            router[...] = shifted_router(router[...], inputs[:, -1], config.token_sparsity)
            x = x + block.ffn(inputs)
        return nnx.state(model)

    return graph, shift(params, tokens)
