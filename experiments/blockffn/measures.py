"""What is measured of a trained model beside its loss: shared experts, and the union path."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from experiments.blockffn.training import chunk_sparsity, over_sequences
from sparsejax.activations import reuse_ratio
from sparsejax.models import Llama, LlamaConfig, init_cache

WINDOWS = 64  # at a time


@functools.partial(jax.jit, static_argnames="config")
def active_experts(
    config: LlamaConfig, params: PyTree, tokens: Int[Array, "b t"]
) -> Bool[Array, "layers b t e"]:
    """Which experts each token has on."""
    return restored(config, params).detailed(tokens)[1]["logits"] > 0


def measure_experts(
    config: LlamaConfig, params: PyTree, windows: Int[np.ndarray, "w t"], chunks: tuple[int, ...]
) -> dict[str, Any]:
    """How experts are shared on these windows.

    Returns:
      `reuse`, the share of its experts that a token hands on; `sets` and `used`, how many sets of
      experts and how many experts occur in a layer; `cls`, CLS at every length of `chunks`.
    """
    parts = [windows[i : i + WINDOWS] for i in range(0, len(windows), WINDOWS)]
    active = np.concatenate([active_experts(config, params, part) for part in parts], axis=1)
    sets = [distinct_sets(layer.reshape(-1, active.shape[-1])) for layer in active]
    reuse, cls = shared_experts(active, chunks=chunks)
    return {
        "reuse": float(reuse),
        "sets": float(np.mean(sets)),
        "used": float(np.mean(active.any((1, 2)).sum(-1))),
        "cls": np.asarray(cls).tolist(),
    }


@functools.partial(jax.jit, static_argnames="chunks")
def shared_experts(
    active: Bool[Array, "layers b t e"], *, chunks: tuple[int, ...]
) -> tuple[Float[Array, ""], Float[Array, " c"]]:
    """The reuse ratio, and CLS at every length of a chunk."""
    cls = jnp.stack([chunk_sparsity(active, chunk) for chunk in chunks])
    return over_sequences(reuse_ratio, active), cls


def distinct_sets(active: Bool[np.ndarray, "n e"]) -> int:
    """How many different rows there are."""
    return len(np.unique(np.packbits(active, axis=1), axis=0))


@functools.partial(jax.jit, static_argnames=("config", "chunk"))
def union_difference(
    config: LlamaConfig, params: PyTree, windows: Int[Array, "w t"], *, chunk: int
) -> Float[Array, ""]:
    """The largest difference in a logit between all experts and the union of every chunk's.

    The union path reads one window after the other by chunks, from a cache of keys and values.
    """
    model = restored(config, params)

    def read(cache: Any, tokens: Array) -> tuple[Any, Array]:
        logits, cache = model.decode(tokens[None], cache)
        return cache, logits[0]

    def differ(tokens: Array) -> Array:
        _, read_logits = jax.lax.scan(read, init_cache(config, 1), tokens.reshape(-1, chunk))
        dense = model(tokens[None])[0]
        return jnp.max(jnp.abs(read_logits.reshape(dense.shape) - dense))

    return jnp.max(jax.lax.map(differ, windows))


def restored(config: LlamaConfig, params: PyTree) -> Llama:
    """The model with these parameters."""
    return nnx.merge(_graph(config), params)


@functools.cache
def _graph(config: LlamaConfig) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))[0]
