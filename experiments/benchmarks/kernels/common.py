"""What the groups of all kernels share: their settings and how a call is made."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Config:
    """How a run measures.

    Attributes:
      preset: the sizes, by their name in each group's `SIZES`.
      rounds, slow_rounds: measurements of each alternative, and of those that take long.
      min_seconds: what one measurement lasts at least.
    """

    preset: str
    rounds: int
    slow_rounds: int
    min_seconds: float


def call(f: Callable[..., Any], *arrays: Any) -> Callable[[], Any]:
    """All outputs of `f` leave the compiled function, so that none is optimised away."""
    compiled = jax.jit(f)
    return lambda: compiled(*arrays)


def trained(f: Callable[..., jax.Array], *arrays: jax.Array) -> Callable[[], Any]:
    """Output and the gradients of all arrays, which are floating."""

    @jax.jit
    def both(dy: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        y, pull = jax.vjp(f, *arrays)
        return y, pull(dy)

    y = jax.eval_shape(f, *arrays)
    dy = jnp.cos(100 * jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype)
    return lambda: both(dy, *arrays)


def fastest(functions: Mapping[str, Callable[[], Any]]) -> str:
    """The name of the one whose second-best call is the shortest; the first call compiles."""

    def seconds(run: Callable[[], Any]) -> float:
        jax.block_until_ready(run())
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            jax.block_until_ready(run())
            taken.append(time.perf_counter() - start)
        return sorted(taken)[1]

    return min(functions, key=lambda name: seconds(functions[name]))
