"""What a token reads of memory, and the settings of random layers that decide it."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Notes = dict[str, dict[str, str]]
MEGABYTE = 1e6


def note(notes: Notes, name: str, size: float, baseline: float) -> None:
    """Writes beside a row what it reads.

    Args:
      notes: row -> columns. size, baseline: bytes a token, of the row and of the dense form.
    """
    bound = f"1/{baseline / size:.3g}" if size < baseline else ""
    notes[name] = {"MB": f"{size / MEGABYTE:.3g}", "bound": bound}


@partial(jax.jit, static_argnums=0)
def details(graph: Any, params: Any, inputs: Array) -> dict[str, Array]:
    """What a layer or a model tells of its sparsity beside its output."""
    return nnx.merge(graph, params).detailed(inputs)[1]


@partial(jax.jit, static_argnames="sparsity")
def shifted_router(
    router: Float[Array, "e d"], inputs: Float[Array, "n d"], sparsity: float
) -> Float[Array, "e d"]:
    """A router under which the share `sparsity` of these tokens' logits is not positive.

    All logits of the n <= d tokens are moved by the same number: the shortest vector whose product
    with every token is 1 is taken from each row as often as it needs.
    """
    limit = jnp.quantile(inputs @ router.T, sparsity)
    common = inputs.T @ jnp.linalg.solve(inputs @ inputs.T, jnp.ones(len(inputs)))
    return router - limit * common
