"""The feed-forward layer alone: one token, in layers and with tokens that take turns."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from experiments.benchmarks.decoding.config import Config
from experiments.benchmarks.decoding.reading import Notes, details, note, shifted_router
from experiments.benchmarks.kernels.common import fastest
from experiments.benchmarks.suite import Group
from experiments.harness.timing import Goal
from pallas_kernels.sparse_ffn import bit_patterns, sparse_ffn
from sparsejax.activations import (
    compact_ffn,
    gated_ffn,
    kept_inputs,
    spark_ffn,
    sparse_inputs,
    token_level_sparsity,
)
from sparsejax.models.llama_layers import FeedForward
from sparsejax.models.sparse_layers import BlockFeedForward, SparkFeedForward

SPARK, SPARK_BITS, OF_THE_BOUND = Goal(1 / 2.5), Goal(1 / 6), 0.85
FLOAT32, BITS = 4, 2
ROW = "FFN: "
"""How the names of these rows begin."""


def feed_forward_rows(config: Config, notes: Notes) -> Iterator[Group]:
    """All rows; what each reads goes to `notes`."""
    d, f = config.dense.d_model, config.dense.d_ff
    tokens = jax.random.normal(jax.random.key(1), (config.tokens, d))
    dense_bytes = FLOAT32 * 3 * d * f
    graph, gated = _layers(FeedForward, config, "dense")
    major = [_neuron_major(params) for params in gated]
    dense = {
        f"{ROW}dense (d, f)": _in_turns(partial(_run, graph), gated, tokens),
        f"{ROW}dense (f, d)": _in_turns(gated_ffn, major, tokens),
    }
    baseline = fastest(dense)
    functions, goals = {baseline: dense[baseline], **dense}, {}
    for name in dense:
        note(notes, name, dense_bytes, dense_bytes)
    rows = (
        _spark_rows(config, tokens),
        _input_rows(config, tokens, graph, gated),
        _block_rows(config, tokens),
        _known_rows(config, tokens, major),
    )
    for name, function, size, goal in itertools.chain(*rows):
        functions[ROW + name] = function
        note(notes, ROW + name, size, dense_bytes)
        if goal is not None:
            goals[ROW + name] = goal
    yield Group(functions, baseline, config.rounds, goals)
    functions.clear()  # whoever holds the group no longer holds its weights


Row = tuple[str, Callable[[], Any], float, Goal | None]
"""Name with the share that is on, call, bytes a token, goal."""


def _spark_rows(config: Config, tokens: Array) -> Iterator[Row]:
    model = config.model("spark")
    d, f, r, k = model.d_model, model.d_ff, model.ffn_split, config.spark["ffn_k"]
    graph, layers = _layers(SparkFeedForward, config, "spark")
    found = [details(graph, params, tokens)["num_active"] for params in layers]
    active = float(np.mean(found))
    numbers, name = r * f + active * (2 * d - r), f"Spark, {active / f:.1%}"
    yield name, _in_turns(partial(_run, graph), layers, tokens), FLOAT32 * numbers, SPARK
    bits = [
        {
            "K1": bit_patterns(params["predictor_proj"]["kernel"][...]),
            "K2_rows": bit_patterns(params["up_rows"][...]),
            "V": bit_patterns(params["down_proj"]["kernel"][...]),
        }
        for params in layers
    ]
    run = partial(_spark_of_bits, r=r, k=k)
    yield f"{name}, bit patterns", _in_turns(run, bits, tokens), BITS * numbers, SPARK_BITS


def _input_rows(config: Config, tokens: Array, graph: Any, gated: list[Any]) -> Iterator[Row]:
    d, f, sparsity = config.dense.d_model, config.dense.d_ff, config.input_sparsity
    made = [nnx.split(sparse_inputs(nnx.merge(graph, params), sparsity)) for params in gated]
    run = _in_turns(partial(_call, made[0][0]), [state for _, state in made], tokens)
    numbers = 2 * kept_inputs(d, sparsity) * f + kept_inputs(f, sparsity) * d
    yield f"WINA, {1 - sparsity:.1%}", run, FLOAT32 * numbers, None


def _block_rows(config: Config, tokens: Array) -> Iterator[Row]:
    model = config.model("block")
    d, f, experts = model.d_model, model.d_ff, config.block["n_experts"]
    graph, layers = _layers(BlockFeedForward, config, "block")
    for params in layers:
        router = params["router"]
        router[...] = shifted_router(router[...], tokens, config.token_sparsity)
    found = [details(graph, params, tokens)["logits"] > 0 for params in layers]
    share = 1 - float(np.mean([token_level_sparsity(on) for on in found]))
    size = FLOAT32 * (experts * d + 2 * d * f * share)
    # of the CPU time: a loop over rows keeps to one core, and dense products take all
    goal = Goal(1.0, cpu_limit=share / OF_THE_BOUND)
    run = _in_turns(partial(_run, graph), layers, tokens)
    yield f"BlockFFN, {share:.1%}", run, size, goal


def _known_rows(config: Config, tokens: Array, major: list[dict[str, Array]]) -> Iterator[Row]:
    """Some neurons of the gated layer, which are known before the token comes."""
    d, f = config.dense.d_model, config.dense.d_ff
    active = max(1, int(f * config.core))
    rng = np.random.default_rng(0)
    lists = [
        jnp.asarray(np.sort(rng.permutation(f)[:active]), jnp.int32) for _ in range(config.tokens)
    ]
    size, share = FLOAT32 * 3 * d * active, f"{active / f:.1%}"

    def listed(params: dict[str, Array], given: tuple[Array, Array]) -> Array:
        x, idx = given
        gate, up, down = (params[name] for name in ("gate", "up", "down"))
        return sparse_ffn(x, up, down, idx, gate=gate, activation=jax.nn.silu)

    given = list(zip(tokens, lists))
    yield f"neurons known, {share}", _in_turns(listed, major, given), size, None
    core = [compact_ffn(params, idx) for params, idx in zip(major, lists)]
    yield f"core neurons, {share}", _in_turns(gated_ffn, core, tokens), size, None


def _layers(kind: Any, config: Config, name: str) -> tuple[Any, list[Any]]:
    """Graph of a layer, and as many random ones as the model is deep."""

    def build(key: Array) -> Any:
        return kind(config.model(name), rngs=nnx.Rngs(key))

    keys = jax.random.split(jax.random.key(0), config.dense.n_layers)
    graph, _ = nnx.split(nnx.eval_shape(lambda: build(keys[0])))
    init = jax.jit(lambda key: nnx.state(build(key), nnx.Param))
    return graph, [init(key) for key in keys]


def _neuron_major(params: Any) -> dict[str, Array]:
    kernels = {name: params[f"{name}_proj"]["kernel"][...] for name in ("gate", "up", "down")}
    return {"gate": kernels["gate"].T, "up": kernels["up"].T, "down": kernels["down"]}


def _run(graph: Any, params: Any, x: Array) -> Array:
    return nnx.merge(graph, params).decode(x[None, None])[0, 0]


def _spark_of_bits(params: dict[str, Array], x: Array, *, r: int, k: int) -> Array:
    return spark_ffn(params, x, r=r, k=k, sparse_capacity=len(params["V"]))[0]


def _call(graph: Any, params: Any, x: Array) -> Array:
    return nnx.merge(graph, params)(x)


def _in_turns(
    f: Callable[..., Array], layers: Sequence[Any], tokens: Array | Sequence[Any]
) -> Callable[[], Array]:
    """Each call takes the next layer and the next token: nothing that it reads is in a cache."""
    compiled = jax.jit(f)
    turns = itertools.cycle([(layers[i % len(layers)], token) for i, token in enumerate(tokens)])
    return lambda: compiled(*next(turns))
