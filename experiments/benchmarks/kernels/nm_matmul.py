"""Products with compressed N:M weights against those with the dense weight."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import lax

from experiments.benchmarks.kernels.common import Config, call, fastest
from experiments.benchmarks.suite import Group
from experiments.harness.timing import Goal
from pallas_kernels.nm_matmul import nm_matmul
from pallas_kernels.nm_matmul.shapes import RAGGED, SHAPES, Shape
from sparsejax.core.patterns import NM
from sparsejax.weights.compact import NMCompact, compress_nm

AGAINST_DENSE = Goal(1.0)
DECODING = {"laptop": SHAPES["llama_7b_attention_decode"], "test": RAGGED["ragged_2_8"]}
PREFILL = {"laptop": SHAPES["llama_7b_attention_prefill"], "test": RAGGED["ragged_2_8"]}


def nm_decode_groups(config: Config) -> Iterator[Group]:
    """One row of x, weights in bfloat16, against the fastest dense product of the same weight."""
    shape = DECODING[config.preset]
    size = f"[1, {shape.inputs}] x [{shape.inputs}, {shape.outputs}]"
    w = _weight(shape)
    x = jax.random.normal(jax.random.key(1), (1, shape.inputs))
    half, row = w.astype(jnp.bfloat16), x.astype(jnp.bfloat16)
    dense = {
        f"{size}: dense float32": call(jnp.dot, x, w),
        f"{size}: dense float32, outputs first": call(jnp.dot, w.T, x[0]),
        f"{size}: dense bfloat16": call(jnp.dot, row, half),
        f"{size}: dense bfloat16, outputs first": call(jnp.dot, half.T, row[0]),
        f"{size}: dense bfloat16, summed in float32": call(_summed_wide, row, half),
    }
    baseline = fastest(dense)
    ours = f"{size}, nm_matmul 2:4 bfloat16"
    functions = {
        baseline: dense[baseline],
        **dense,
        ours: _compact(row, compress_nm(_pruned(half, NM(2, 4)), NM(2, 4))),
        f"{size}, nm_matmul 2:8 bfloat16": _compact(
            row, compress_nm(_pruned(half, NM(2, 8)), NM(2, 8))
        ),
    }
    yield Group(functions, baseline, config.rounds, {ours: AGAINST_DENSE})


def nm_prefill_groups(config: Config) -> Iterator[Group]:
    """Many rows of x: what a dense weight that is made anew in every call costs."""
    shape = PREFILL[config.preset]
    size = f"[{shape.rows}, {shape.inputs}] x [{shape.inputs}, {shape.outputs}]"
    for dtype in (jnp.float32, jnp.bfloat16):
        w = _weight(shape).astype(dtype)
        x = jax.random.normal(jax.random.key(1), (shape.rows, shape.inputs)).astype(dtype)
        label = f"{size} {jnp.dtype(dtype).name}"
        dense = {
            f"{label}: dense": call(jnp.dot, x, w),
            f"{label}: dense, summed in float32": call(_summed_wide, x, w),
        }
        baseline = fastest(dense)
        compact = _compact(x, compress_nm(_pruned(w, NM(2, 4)), NM(2, 4)))
        functions = {baseline: dense[baseline], **dense, f"{label}, nm_matmul 2:4": compact}
        yield Group(functions, baseline, config.slow_rounds)


def _weight(shape: Shape) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (shape.inputs, shape.outputs))


def _pruned(w: jax.Array, pattern: NM) -> jax.Array:
    return jnp.where(pattern.mask(jnp.abs(w)), w, 0)


def _summed_wide(x: jax.Array, w: jax.Array) -> jax.Array:
    return lax.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def _compact(x: jax.Array, weight: NMCompact) -> Callable[[], jax.Array]:
    n, m = weight.n, weight.m
    return call(lambda x, v, p: nm_matmul(x, v, p, n=n, m=m), x, weight.values, weight.packed)
