"""The loop over the blocks of a decoder, which are one module with a leading layer axis.

`jax.lax.scan` runs them, so that tracing and compilation cost the same at any depth; `unroll` makes
separate modules of them, which decode faster.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from sparsejax.models.decoding import KVCache
from sparsejax.models.llama_config import require

Block = TypeVar("Block", bound=nnx.Module)
Model = TypeVar("Model", bound=Any)


def stack_blocks(build: Callable[..., Block], n_layers: int, rngs: nnx.Rngs) -> Block:
    """`n_layers` modules from `build(rngs=...)` as one, their parameters with a leading axis."""

    @nnx.split_rngs(splits=n_layers)
    @nnx.vmap
    def stack(rngs: nnx.Rngs) -> Block:
        return build(rngs=rngs)

    return stack(rngs)


def run_blocks(
    blocks: nnx.Module, x: Float[Array, "b t d"], *inputs: Any, remat: bool
) -> Float[Array, "b t d"]:
    """The residual stream after all blocks, each called as `block(x, *inputs)`.

    blocks: one module with a leading layer axis, or an `nnx.List` of them.
    remat: the backward pass recomputes whole blocks; without it, all but the outputs of the
        projections.
    """
    return _run(lambda block, x: (block(x, *inputs), ()), blocks, x, remat)[0]


def run_blocks_detailed(
    blocks: nnx.Module, x: Float[Array, "b t d"], *inputs: Any, remat: bool
) -> tuple[Float[Array, "b t d"], dict[str, Array]]:
    """As `run_blocks` by `block.detailed`, whose details come back with a leading layer axis."""
    return _run(lambda block, x: block.detailed(x, *inputs), blocks, x, remat)


def _run(call: Any, blocks: nnx.Module, x: Array, remat: bool) -> tuple[Array, Any]:
    # Stacking every residual makes a training step on CPU 1.6 times as slow, and takes memory
    # anywhere; without `remat` the outputs of the projections alone are kept.
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    options: dict[str, Any] = {"policy": None if remat else keep}
    if isinstance(blocks, nnx.List):
        details = []
        for block in blocks:
            graphdef, params = nnx.split(block)
            body = partial(_call_block, call, graphdef)
            x, found = jax.checkpoint(body, **options)(x, params)
            details.append(found)
        return x, jax.tree.map(lambda *each: jnp.stack(each), *details)
    graphdef, stacked = nnx.split(blocks)
    # The loop's boundary already keeps XLA from merging the two forward passes.
    body = jax.checkpoint(partial(_call_block, call, graphdef), prevent_cse=False, **options)
    return lax.scan(body, x, stacked)


def _call_block(call: Any, graphdef: Any, x: Array, params: Any) -> tuple[Array, Any]:
    return call(nnx.merge(graphdef, params), x)


def decode_blocks(
    blocks: Any, x: Float[Array, "b t d"], cache: KVCache, *inputs: Any, first: int = 0
) -> tuple[Float[Array, "b t d"], KVCache]:
    """As `run_blocks`, each block called as `block.decode(x, *inputs, cache, layer)`.

    The cache comes back with the tokens of `x` written in, its length as it was.
    first: the layer of the first block.
    """
    if isinstance(blocks, nnx.List):
        for layer, block in enumerate(blocks, first):
            x, cache = block.decode(x, *inputs, cache, jnp.int32(layer))
        return x, cache
    graphdef, stacked = nnx.split(blocks)

    def body(carry, params):
        # The caches are carried, not scanned over, so that XLA updates them in place.
        x, cache, layer = carry
        x, cache = nnx.merge(graphdef, params).decode(x, *inputs, cache, layer)
        return (x, cache, layer + 1), None

    (x, cache, _), _ = lax.scan(body, (x, cache, jnp.int32(first)), stacked)
    return x, cache


def unroll(model: Model) -> Model:
    """A copy of a `Llama` or `Gpt` whose blocks are separate modules, made for decoding.

    A loop over stacked layers copies each layer's weights before it uses them; separate ones are
    read where they lie, and of sparse layers only the rows that are needed. Compiling takes time
    in proportion to the depth. Paths become `blocks/<layer>/...`; it computes what `model` does.
    `model.block(i)` and `set_block` are for stacked blocks.

    >>> from sparsejax.models import Llama, llama_config
    >>> model = unroll(Llama(llama_config("laptop"), rngs=nnx.Rngs(0)))
    >>> len(model.blocks), model.blocks[0].ffn.up_proj.kernel.shape
    (2, (96, 256))
    """
    layers = [model.block(i) for i in range(model.config.n_layers)]
    copy = nnx.clone(model)
    copy.blocks = nnx.List(layers)
    return copy


def slice_blocks(blocks: Block, first: int, last: int) -> Block:
    """Layers `first` to `last - 1` of blocks, stacked or in a list as they were."""
    if isinstance(blocks, nnx.List):
        return nnx.List(list(blocks)[first:last])  # type: ignore[return-value]
    graphdef, stacked = nnx.split(blocks)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[first:last], stacked))


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
