"""Layers that read only active neurons or experts, against the dense products that they equal."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.kernels.common import Config, call, fastest
from experiments.benchmarks.suite import Group
from experiments.harness.timing import Goal
from pallas_kernels.sparse_ffn import bit_patterns, expert_union_ffn, sparse_ffn
from pallas_kernels.sparse_ffn.rows import reference
from pallas_kernels.sparse_ffn.shapes import EXPERTS, RAGGED, RAGGED_EXPERTS, SHAPES, Experts, Shape

AGAINST_DENSE = Goal(1 / 4)
BITS_AGAINST_DENSE = Goal(1 / 7)
OF_THE_BOUND = 0.85
TOKENS = 8
"""Lists that take turns: one alone would leave its rows in the cache."""
SIZES = {
    "laptop": (SHAPES["spark_gemma2_2b"], SHAPES["gated_gemma2_2b"]),
    "test": (RAGGED["ragged"],),
}
EXPERT_SIZES = {
    "laptop": tuple(EXPERTS.values()),
    "test": (RAGGED_EXPERTS["ragged"],),
}


def sparse_ffn_groups(config: Config) -> Iterator[Group]:
    """One token through active neurons whose gates are known; a predictor is on neither side."""
    for shape in SIZES[config.preset]:
        x, up, down, gate, lists = _layer(shape)
        full = jnp.zeros(shape.neurons).at[lists[0][: shape.active]].set(gate[: shape.active])
        size = f"{shape.inputs} -> {shape.active} of {shape.neurons} -> {shape.outputs}"
        dense = {
            f"{size}: dense [f, d]": call(
                lambda x, up, down, gate: (gate * (up @ x)) @ down, x, up, down, full
            ),
            f"{size}: dense [d, f]": call(
                lambda x, up, down, gate: down @ (gate * (x @ up)), x, up.T, down.T, full
            ),
        }
        stored = {
            "float32": (up, down),
            "bfloat16": (up.astype(jnp.bfloat16), down.astype(jnp.bfloat16)),
            "bit patterns": (bit_patterns(up), bit_patterns(down)),
        }
        sparse = {
            f"{size}, sparse_ffn, {name}": _in_turns(
                lambda idx, x, up, down, gate, count=shape.active: sparse_ffn(
                    x, up, down, idx, count, gate=gate
                ),
                lists,
                (x, *weights, gate),
            )
            for name, weights in stored.items()
        }
        gathered = _in_turns(
            lambda idx, x, up, down, gate, count=shape.active: _gathered(
                x, up, down, gate, idx, jnp.int32(count)
            ),
            lists,
            (x, up, down, gate),
        )
        baseline = fastest(dense)
        functions = {
            baseline: dense[baseline],
            **dense,
            f"{size}, gather of all entries": gathered,
            **sparse,
        }
        goals = {
            f"{size}, sparse_ffn, float32": AGAINST_DENSE,
            f"{size}, sparse_ffn, bit patterns": BITS_AGAINST_DENSE,
        }
        yield Group(functions, baseline, config.rounds, goals)


def expert_union_groups(config: Config) -> Iterator[Group]:
    """A chunk of tokens through the union of their experts; the bound is its share of all."""
    for shape in EXPERT_SIZES[config.preset]:
        x, gates, up, down, idx = _chunk(shape)
        size = f"{shape.tokens} x {shape.width}, {shape.experts} experts of {shape.size}"
        baseline = f"{size}: dense"
        bound = shape.experts / shape.union
        ours = f"{size}, union of {shape.union}, bound 1/{bound:.3g}"
        union = call(
            lambda x, gates, up, down, idx, count=shape.union: expert_union_ffn(
                x, gates, up, down, idx, jnp.int32(count)
            ),
            *(x, gates, up, down, idx),
        )
        functions = {baseline: call(_dense_experts, x, gates, up, down), ours: union}
        # the loop runs on one core, where large dense products take all
        goals = {ours: Goal(1.0, cpu_limit=1 / (OF_THE_BOUND * bound))}
        yield Group(functions, baseline, config.rounds, goals)


def _layer(shape: Shape) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, list[jax.Array]]:
    """A token, weights, gates, and lists of active neurons in ascending order."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (shape.inputs,))
    up = jax.random.normal(keys[1], (shape.neurons, shape.inputs)) * shape.inputs**-0.5
    down = jax.random.normal(keys[2], (shape.neurons, shape.outputs)) * shape.active**-0.5
    gate = jax.random.normal(keys[3], (shape.capacity,))
    rng = np.random.default_rng(0)
    lists = []
    for _ in range(TOKENS):
        idx = np.zeros(shape.capacity, np.int32)
        idx[: shape.active] = np.sort(rng.permutation(shape.neurons)[: shape.active])
        lists.append(jnp.asarray(idx))
    return x, up, down, gate, lists


def _in_turns(f: Callable[..., Any], lists: list[jax.Array], arrays: Any) -> Callable[[], Any]:
    compiled, turns = jax.jit(f), itertools.cycle(lists)
    return lambda: compiled(next(turns), *arrays)


def _gathered(
    x: jax.Array,
    up: jax.Array,
    down: jax.Array,
    gate: jax.Array,
    idx: jax.Array,
    count: jax.Array,
) -> jax.Array:
    hidden = gate * reference.gather_rows_matvec(up, idx, x, count)
    return reference.scatter_rows_vecmat(down, idx, hidden, count)


def _chunk(shape: Experts) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Tokens that each choose half of a union of experts, and the list of these."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (shape.tokens, shape.width))
    weights = (shape.experts, shape.size, shape.width)
    up = jax.random.normal(keys[1], weights) * shape.width**-0.5
    down = jax.random.normal(keys[2], weights) * shape.size**-0.5
    rng = np.random.default_rng(0)
    union = np.sort(rng.permutation(shape.experts)[: shape.union])
    gates = np.zeros((shape.tokens, shape.experts), np.float32)
    gates[:, union] = np.abs(rng.normal(size=(shape.tokens, shape.union)))
    gates[:, union] *= rng.random((shape.tokens, shape.union)) < 0.5
    idx = np.zeros(shape.experts, np.int32)
    idx[: shape.union] = union
    return x, jnp.asarray(gates), up, down, jnp.asarray(idx)


def _dense_experts(x: jax.Array, gates: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """All experts as one layer: two products, the fastest dense form."""
    _, size, width = up.shape
    hidden = jax.nn.silu(x @ up.reshape(-1, width).T) * jnp.repeat(gates, size, axis=1)
    return hidden @ down.reshape(-1, width)
