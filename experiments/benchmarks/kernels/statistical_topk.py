"""Statistical top-k against what ranks its entries, and against ReLU."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from experiments.benchmarks.kernels.common import Config, call, fastest, trained
from experiments.benchmarks.suite import Group
from experiments.harness.timing import Goal
from pallas_kernels import statistical_topk
from pallas_kernels.statistical_topk.shapes import RAGGED, SHAPES, Shape

AGAINST_SORTS = Goal(1 / 50)
AGAINST_RELU = Goal(2.5)
AGAINST_RELU_TRAINED = Goal(4.0)
SIZES = {
    "laptop": (SHAPES["gemma2_2b_ffn"], SHAPES["wide"]),
    "test": (RAGGED["ragged_rows"],),
}


def topk_sort_groups(config: Config) -> Iterator[Group]:
    """Statistical top-k against the fastest of what finds the k largest entries by rank."""
    for shape in SIZES[config.preset]:
        x, size, k = _rows(shape), _size(shape), round(shape.k)
        ranked = {
            f"{size}: lax.top_k": call(lambda x, k=k: lax.top_k(x, k), x),
            f"{size}: approx_max_k": call(lambda x, k=k: lax.approx_max_k(x, k), x),
            f"{size}: jnp.sort": call(jnp.sort, x),
        }
        ours = f"{size}, statistical_topk"
        baseline = fastest(ranked)
        functions = {
            baseline: ranked[baseline],
            **ranked,
            ours: call(lambda x, k=shape.k: statistical_topk(x, k), x),
            # what reads and writes x once, under the same load: no threshold is faster
            f"{size}, ReLU as the bound": call(jax.nn.relu, x),
        }
        yield Group(functions, baseline, config.slow_rounds, {ours: AGAINST_SORTS})


def topk_relu_groups(config: Config) -> Iterator[Group]:
    """Statistical top-k against ReLU, forward and with its gradient."""
    for shape in SIZES[config.preset]:
        size = _size(shape)
        ops = {f"statistical_topk, {mode}": _op(shape, mode) for mode in ("soft", "hard")}
        if jax.default_backend() != "cpu":
            ops["statistical_topk in plain XLA"] = _op(shape, "soft", implementation="xla")
        passes = (("forward", call, AGAINST_RELU), ("trained", trained, AGAINST_RELU_TRAINED))
        for name, run, goal in passes:
            for dtype in (jnp.float32, jnp.bfloat16):
                x = _rows(shape).astype(dtype)
                label = f"{size} {jnp.dtype(dtype).name} {name}"
                relu = f"{label}: ReLU"
                functions = {f"{label}, {op}": run(f, x) for op, f in ops.items()}
                goals = {f"{label}, statistical_topk, soft": goal} if dtype == jnp.float32 else {}
                yield Group({relu: run(jax.nn.relu, x), **functions}, relu, config.rounds, goals)


def _size(shape: Shape) -> str:
    return f"[{shape.rows}, {shape.width}]"


def _rows(shape: Shape) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (shape.rows, shape.width))


def _op(shape: Shape, mode: Any, **options: Any) -> Callable[[jax.Array], jax.Array]:
    return lambda x: statistical_topk(x, shape.k, mode=mode, **options)
