"""The loop over the blocks of a decoder, which are one module with a leading layer axis.

`jax.lax.scan` runs them, so that tracing and compilation cost the same at any depth.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from sparsejax.models.decoding import KVCache
from sparsejax.models.llama_config import require

Block = TypeVar("Block", bound=nnx.Module)


def run_blocks(
    blocks: nnx.Module, x: Float[Array, "b t d"], *inputs: Any, remat: bool
) -> Float[Array, "b t d"]:
    """The residual stream after all blocks, each called as `block(x, *inputs)`.

    remat: the backward pass recomputes whole blocks; without it, all but the outputs of the
        projections.
    """
    graphdef, stacked = nnx.split(blocks)

    def body(x, params):
        return nnx.merge(graphdef, params)(x, *inputs), None

    # Stacking every residual makes a training step on CPU 1.6 times as slow, and takes memory
    # anywhere; without `remat` the outputs of the projections alone are kept.
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    # The loop's boundary already keeps XLA from merging the two forward passes.
    body = jax.checkpoint(body, prevent_cse=False, policy=None if remat else keep)
    return lax.scan(body, x, stacked)[0]


def decode_blocks(
    blocks: Any, x: Float[Array, "b t d"], cache: KVCache, *inputs: Any
) -> tuple[Float[Array, "b t d"], KVCache]:
    """As `run_blocks`, each block called as `block.decode(x, *inputs, cache, layer)`.

    The cache comes back with the tokens of `x` written in, its length as it was.
    """
    graphdef, stacked = nnx.split(blocks)

    def body(carry, params):
        # The caches are carried, not scanned over, so that XLA updates them in place.
        x, cache, layer = carry
        x, cache = nnx.merge(graphdef, params).decode(x, *inputs, cache, layer)
        return (x, cache, layer + 1), None

    (x, cache, _), _ = lax.scan(body, (x, cache, jnp.zeros((), jnp.int32)), stacked)
    return x, cache


def take_block(blocks: Block, i: int, n_layers: int) -> Block:
    """A standalone copy of block `i` of `n_layers`. Raises ValueError if there is none."""
    _check_layer(i, n_layers)
    graphdef, stacked = nnx.split(blocks)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[i], stacked))


def put_block(blocks: nnx.Module, i: int, block: nnx.Module, n_layers: int) -> None:
    """Writes the parameters of `block` into block `i`. Raises ValueError if there is none."""
    _check_layer(i, n_layers)
    stacks = dict(nnx.to_flat_state(nnx.state(blocks)))
    for path, value in nnx.to_flat_state(nnx.state(block)):
        # One stack after the other, so that only one is there twice at a time.
        stack = stacks.pop(path)
        written = stack.replace(stack[...].at[i].set(value[...]))
        del stack
        nnx.update(blocks, nnx.from_flat_state([(path, written)]))


def matrix_dot_general(
    x: Float[Array, "*b i"], kernel: Float[Array, "i o"], dimensions: Any = None, **options: Any
) -> Float[Array, "*b o"]:
    """`x @ kernel` over a flattened batch; `dimensions` is what nnx.Linear passes, always the same.

    XLA's CPU backend takes three times as long over the kernel's gradient if tokens span two axes.
    """
    flat = lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **options)
    return flat.reshape(*x.shape[:-1], kernel.shape[1])


def _check_layer(i: int, n_layers: int) -> None:
    last = n_layers - 1
    require(0 <= i <= last, f"i is {i}; this model has blocks 0 to {last}.")
