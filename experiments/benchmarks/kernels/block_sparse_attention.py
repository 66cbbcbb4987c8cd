"""Block-sparse attention against dense attention, over densities: the limit is the density."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import lax

from experiments.benchmarks.kernels.common import Config, call, fastest, trained
from experiments.benchmarks.suite import Group
from experiments.harness.timing import Goal
from pallas_kernels.block_sparse_attention import KVSource, block_sparse_attention
from pallas_kernels.block_sparse_attention.shapes import Shape, long_context, random_source

OF_LIMIT, OF_LIMIT_CPU = 0.45, 0.75  # shares of the speed-up that the density allows
CPU_BLOCK = 128  # the block that the second one is asked of
SIZES = {
    "laptop": tuple(
        tuple(long_context(t, b, share) for b in (128, 64) for share in (0.25, 0.125, 0.0625))
        for t in (8192, 16384)
    ),
    "test": ((long_context(64, 16, 0.25, width=8),),),
}


def attention_groups(config: Config) -> Iterator[Group]:
    """For each length, all blocks and densities beside the fastest dense attention."""
    for shapes in SIZES[config.preset]:
        tokens = shapes[0].queries
        q, source = random_source(shapes[0], full=True)
        for name, run in (("forward", call), ("trained", trained)):
            label = f"{tokens} tokens {name}"
            dense = {
                f"{label}: dense, {how}": run(f, q, source.k, source.v)
                for how, f in _dense(tokens).items()
            }
            baseline = fastest(dense)
            sparse, goals = {}, {}
            for shape in shapes:
                row = f"{label}, blocks of {shape.block_k}, {shape.density:.2%}"
                lists = random_source(shape, full=True)[1]
                sparse[row] = run(_sparse(shape, lists), q, source.k, source.v)
                cpu = OF_LIMIT_CPU if shape.block_k == CPU_BLOCK else None
                limit = shape.density / OF_LIMIT
                goals[row] = Goal(limit) if cpu is None else Goal(limit, shape.density / cpu)
            yield Group({baseline: dense[baseline], **sparse}, baseline, config.slow_rounds, goals)


def _sparse(shape: Shape, lists: KVSource) -> Callable[..., jax.Array]:
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        source = KVSource(k, v, lists.starts, lists.counts, width=shape.block_k)
        return block_sparse_attention(q, [source], block_q=shape.block_q)[0]

    return run


def _dense(tokens: int) -> dict[str, Callable[..., jax.Array]]:
    def library(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k, v = (x.swapaxes(0, 1) for x in (q, k, v))
        return jax.nn.dot_product_attention(q, k, v).swapaxes(0, 1)

    def chunked(size: int) -> Callable[..., jax.Array]:
        @jax.checkpoint
        def one(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            s = jnp.einsum("hqd,hkd->hqk", q, k) * q.shape[-1] ** -0.5
            p = jnp.exp(s - lax.stop_gradient(s.max(-1, keepdims=True)))
            return jnp.einsum("hqk,hkd->hqd", p, v) / p.sum(-1, keepdims=True)

        def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            tiles = q.reshape(q.shape[0], -1, size, q.shape[2]).swapaxes(0, 1)
            out = lax.map(lambda tile: one(tile, k, v), tiles)
            return out.swapaxes(0, 1).reshape(*q.shape[:2], -1)

        return run

    sizes = [size for size in (128, 512) if tokens % size == 0] or [tokens]
    return {"jax.nn": library} | {f"{size} rows at a time": chunked(size) for size in sizes}
