"""What statistical top-k costs beside a ReLU and beside finding the k largest entries by rank."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import lax

from experiments.benchmarks.kernels.common import call, trained
from experiments.harness.timing import compare
from experiments.spark_transformer.config import DTYPES, Config, Rows
from sparsejax.activations import top_k_activation
from sparsejax.core.statistical import statistical_topk
from sparsejax.core.topk import exact_topk_threshold

SHARE = 0.08  # of the entries, as in the paper
OURS, RELU = "statistical top-k", "ReLU"
# what is asked of it decides how XLA computes it on a CPU: its best use is the baseline
LAX_TOP_K = tuple(f"lax.top_k, {use}" for use in ("values and indices", "values", "k-th index"))
Ratios = Mapping[str, Mapping[str, Mapping[str, float]]]


def time_operators(rows: Rows, config: Config) -> dict[str, Any]:
    """CPU milliseconds of a call, the least of all rounds, and ratios to statistical top-k.

    Returns:
      `{"forward" | "trained": {operator: {"cpu_ms", "ratio"}}}`; "trained" is the output with the
      gradient.
    """
    x = jax.random.normal(jax.random.key(config.seed), (rows.rows, rows.width))
    x, k = x.astype(DTYPES[rows.dtype]), round(SHARE * rows.width)
    ours = functools.partial(statistical_topk, k=k)

    def values(x: jax.Array) -> jax.Array:
        return lax.top_k(x, k)[0]

    def approximate(x: jax.Array) -> jax.Array:
        return lax.approx_max_k(x, k)[0]

    ranked: dict[str, Callable[[jax.Array], Any]] = {
        LAX_TOP_K[0]: lambda x: lax.top_k(x, k),
        LAX_TOP_K[1]: values,
        LAX_TOP_K[2]: lambda x: lax.top_k(x, k)[1][..., -1],
        "lax.approx_max_k": approximate,
        "k-th value by bisection": lambda x: exact_topk_threshold(x, k),
    }
    # gradients of values; the operators that give an array of x's shape are the layers
    learned: dict[str, Callable[[jax.Array], jax.Array]] = {
        "lax.top_k, values": values,
        "lax.approx_max_k": approximate,
        "exact k largest, by bisection": functools.partial(top_k_activation, k=k),
    }
    found = {}
    for name, wrap, slow in (("forward", call, ranked), ("trained", trained, learned)):
        # apart, so that what is fast is measured as often as it takes
        beside = {OURS: wrap(ours, x), **{n: wrap(f, x) for n, f in slow.items()}}
        fast = {OURS: wrap(ours, x), RELU: wrap(jax.nn.relu, x)}
        found[name] = {}
        for functions, rounds in ((beside, config.rounds), (fast, 2 * config.rounds)):
            timings = compare(functions, baseline=OURS, rounds=rounds)
            least = {operator: min(timing.cpu) for operator, timing in timings.items()}
            found[name] |= {
                operator: {"cpu_ms": 1e3 * cpu, "ratio": cpu / least[OURS]}
                for operator, cpu in least.items()
            }
    return found


def best_top_k(ratios: Ratios) -> float:
    """Cost of the cheapest use of `lax.top_k`, in calls of statistical top-k, forward."""
    return min(ratios["forward"][use]["ratio"] for use in LAX_TOP_K)


def against_relu(ratios: Ratios, what: str) -> float:
    """Cost of statistical top-k in calls of ReLU."""
    return 1 / ratios[what][RELU]["ratio"]
