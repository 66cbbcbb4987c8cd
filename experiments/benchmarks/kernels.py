"""What the ops of pallas_kernels cost, against what plain JAX offers for the same work.

`python -m experiments.benchmarks.kernels` times each in turns with its alternatives, in the
implementation that the device gets by default, and prints one table.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from experiments.benchmarks.suite import Group, run_suite
from experiments.harness.timing import Goal
from pallas_kernels import statistical_topk
from pallas_kernels.statistical_topk.shapes import RAGGED, SHAPES, Shape

AGAINST_SORTS = Goal(1 / 50)
AGAINST_RELU = Goal(2.5)
AGAINST_RELU_TRAINED = Goal(4.0)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a run.

    Attributes:
      topk: rows for statistical top-k.
      rounds, slow_rounds: measurements of each alternative, and of those that sort.
      min_seconds: what one measurement lasts at least.
    """

    topk: tuple[Shape, ...] = (SHAPES["gemma2_2b_ffn"], SHAPES["wide"])
    rounds: int = 31
    slow_rounds: int = 15
    min_seconds: float = 0.01


PRESETS = {
    "laptop": Config(),
    "test": Config(topk=(RAGGED["ragged_rows"],), rounds=2, slow_rounds=2, min_seconds=1e-4),
}


def topk_sort_groups(config: Config) -> Iterator[Group]:
    """Statistical top-k against the fastest of what finds the k largest entries by rank."""
    for shape in config.topk:
        x, size, k = _rows(shape), _size(shape), round(shape.k)
        ranked = {
            f"{size}: lax.top_k": _call(lambda x, k=k: lax.top_k(x, k), x),
            f"{size}: approx_max_k": _call(lambda x, k=k: lax.approx_max_k(x, k), x),
            f"{size}: jnp.sort": _call(jnp.sort, x),
        }
        ours = f"{size}, statistical_topk"
        baseline = _fastest(ranked)
        functions = {
            baseline: ranked[baseline],
            **ranked,
            ours: _call(lambda x, k=shape.k: statistical_topk(x, k), x),
            # what reads and writes x once, under the same load: no threshold is faster
            f"{size}, ReLU as the bound": _call(jax.nn.relu, x),
        }
        yield Group(functions, baseline, config.slow_rounds, {ours: AGAINST_SORTS})


def topk_relu_groups(config: Config) -> Iterator[Group]:
    """Statistical top-k against ReLU, forward and with its gradient."""
    for shape in config.topk:
        size = _size(shape)
        ops = {f"statistical_topk, {mode}": _op(shape, mode) for mode in ("soft", "hard")}
        if jax.default_backend() != "cpu":
            ops["statistical_topk in plain XLA"] = _op(shape, "soft", implementation="xla")
        passes = (("forward", _call, AGAINST_RELU), ("trained", _trained, AGAINST_RELU_TRAINED))
        for name, call, goal in passes:
            for dtype in (jnp.float32, jnp.bfloat16):
                x = _rows(shape).astype(dtype)
                label = f"{size} {jnp.dtype(dtype).name} {name}"
                relu = f"{label}: ReLU"
                functions = {f"{label}, {op}": call(f, x) for op, f in ops.items()}
                goals = {f"{label}, statistical_topk, soft": goal} if dtype == jnp.float32 else {}
                yield Group({relu: call(jax.nn.relu, x), **functions}, relu, config.rounds, goals)


def sizes(config: Config) -> str:
    """What is measured."""
    return "kernels; statistical top-k of " + ", ".join(_size(shape) for shape in config.topk)


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints the table and writes `<out>/benchmarks/kernels.json`."""
    builders = (topk_sort_groups, topk_relu_groups)
    run_suite("kernels", __doc__, PRESETS, builders, sizes, arguments)


def _size(shape: Shape) -> str:
    return f"[{shape.rows}, {shape.width}]"


def _rows(shape: Shape) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (shape.rows, shape.width))


def _op(shape: Shape, mode: Any, **options: Any) -> Callable[[jax.Array], jax.Array]:
    return lambda x: statistical_topk(x, shape.k, mode=mode, **options)


def _call(f: Callable[[jax.Array], Any], x: jax.Array) -> Callable[[], Any]:
    """All outputs of `f` leave the compiled function, so that none is optimised away."""
    compiled = jax.jit(f)
    return lambda: compiled(x)


def _trained(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> Callable[[], Any]:
    """Output and input gradient."""

    @jax.jit
    def both(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, pull = jax.vjp(f, x)
        return y, pull(dy)[0]

    dy = jnp.cos(100 * x)
    return lambda: both(x, dy)


def _fastest(functions: Mapping[str, Callable[[], Any]]) -> str:
    """The name of the one whose second-best call is the shortest; the first call compiles."""

    def seconds(call: Callable[[], Any]) -> float:
        jax.block_until_ready(call())
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            jax.block_until_ready(call())
            taken.append(time.perf_counter() - start)
        return sorted(taken)[1]

    return min(functions, key=lambda name: seconds(functions[name]))


if __name__ == "__main__":
    main()
