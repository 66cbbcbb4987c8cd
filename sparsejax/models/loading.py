"""What every checkpoint loader shares: one error for all that is wrong, and filling a model."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparsejax.core.selection import named_leaves
from sparsejax.models.gpt import Gpt
from sparsejax.models.gpt_config import GptConfig
from sparsejax.models.llama import DEFAULT_RULES, Llama, param_specs
from sparsejax.models.llama_config import LlamaConfig

Rules = Mapping[str, str | tuple[str, ...] | None]
Fetch = Callable[[str, int | None], np.ndarray]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; `problems` has a line for all that is wrong."""

    def __init__(self, where: object, problems: Sequence[str]):
        self.problems = tuple(problems)
        count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        super().__init__(f"{where} has {count}: " + "; ".join(problems))


def build_llama(
    config: LlamaConfig, fetch: Fetch, *, mesh: Mesh | None = None, rules: Rules = DEFAULT_RULES
) -> Llama:
    """A `Llama` whose parameters come from `fetch`, one tensor at a time onto its shard.

    No parameter is initialised first: beside the model only one tensor is in memory.

    fetch: from the path of a parameter and the number of its layer (None outside the blocks) to
        the tensor without its layer axis, in our layout (`[in, out]` kernels), of any float dtype.
    mesh, rules: where the parameters go, as in `param_specs`; None puts all on the first device.
    """
    return _build(Llama, config, fetch, mesh, rules)


def build_gpt(
    config: GptConfig, fetch: Fetch, *, mesh: Mesh | None = None, rules: Rules = DEFAULT_RULES
) -> Gpt:
    """As `build_llama`, for a `Gpt`."""
    return _build(Gpt, config, fetch, mesh, rules)


def _build(kind: Any, config: Any, fetch: Fetch, mesh: Mesh | None, rules: Rules) -> Any:
    graph, abstract = _abstract(kind, config)
    specs = jax.tree.leaves(param_specs(abstract, rules), is_leaf=_is_spec)
    leaves = []
    for (path, leaf), spec in zip(named_leaves(abstract), specs):
        sharding = None if mesh is None else NamedSharding(mesh, spec)
        if path.startswith("blocks/"):
            inner = None if mesh is None else NamedSharding(mesh, PartitionSpec(*spec[1:]))
            stack = _empty(leaf.shape, leaf.dtype, sharding)
            for i in range(config.n_layers):
                tensor = jax.device_put(np.asarray(fetch(path, i), leaf.dtype), inner)
                stack = _write(stack, tensor, jnp.int32(i))
            leaves.append(stack)
        else:
            leaves.append(jax.device_put(np.asarray(fetch(path, None), leaf.dtype), sharding))
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(abstract), leaves))


@functools.lru_cache(maxsize=8)
def _abstract(kind: Any, config: Any) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))))


def _is_spec(node: object) -> bool:
    return isinstance(node, PartitionSpec)


@functools.lru_cache(maxsize=64)
def _zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding | None) -> Any:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


def _empty(shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding | None) -> jax.Array:
    return _zeros(shape, dtype, sharding)()


@functools.partial(jax.jit, donate_argnums=0)
def _write(stack: jax.Array, tensor: jax.Array, layer: jax.Array) -> jax.Array:
    return stack.at[layer].set(tensor)
