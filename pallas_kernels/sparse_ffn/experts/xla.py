"""A chunk of tokens through the listed experts as XLA compiles it: a loop over the list.

Its length is dynamic, so that experts which no token chose cost nothing, whatever the capacity of
the list. An expert's weights are sliced, which XLA on CPU does at the speed of memory; gathering
several would take longer than all experts.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from pallas_kernels.dispatch import target
from pallas_kernels.sparse_ffn.rows import xla as rows
from pallas_kernels.sparse_ffn.weights import piece

Blocks = None
"""XLA chooses its own."""
Activation = Callable[[Array], Array]


class Gradients(NamedTuple):
    """Of the floating arguments, in the dtype of the products."""

    x: Array
    gates: Array
    up: Array
    down: Array


def reasons(x: Array, up: Array, idx: Array, *, interpret: object = False) -> list[str]:
    """It runs everywhere."""
    return []


def forward(
    x: Array,
    gates: Array,
    up: Array,
    down: Array,
    idx: Array,
    count: Array,
    activation: Activation,
    *,
    blocks: None,
    interpret: object,
) -> Array:
    """`[n, d]` tokens and `[n, e]` gates to `[n, d]`."""
    run = functools.partial(_forward, activation)
    if target().platform == "cpu":
        run = functools.partial(_one_token, activation) if len(x) == 1 else run
        # one after the other under vmap: a batched loop would run as long as its longest list
        run = jax.custom_batching.sequential_vmap(run)
    return run(x, gates, up, down, idx, count)


def _one_token(
    activation: Activation, x: Array, gates: Array, up: Array, down: Array, idx: Array, count: Array
) -> Array:
    """By rows: a slice of an expert would be copied to be read once."""
    _, size, width = up.shape
    neurons = (idx[:, None] * size + jnp.arange(size, dtype=idx.dtype)).reshape(-1)
    options = {"blocks": None, "interpret": False}
    products = rows.matvec(up.reshape(-1, width), neurons, count * size, x[0], **options)
    hidden = activation(products) * jnp.repeat(gates[0, idx], size)
    return rows.vecmat(down.reshape(-1, width), neurons, count * size, hidden, **options)[None]


def _forward(
    activation: Activation, x: Array, gates: Array, up: Array, down: Array, idx: Array, count: Array
) -> Array:
    def add(j: Array, y: Array) -> Array:
        expert = idx[j]
        hidden = activation(x @ piece(up, expert, x.dtype)[0].T)
        gate = lax.dynamic_index_in_dim(gates, expert, 1)
        return y + (gate * hidden) @ piece(down, expert, x.dtype)[0]

    # two a step, whose products may overlap, and the last of an odd number
    y = lax.fori_loop(0, count // 2, lambda i, y: add(2 * i + 1, add(2 * i, y)), jnp.zeros_like(x))
    return lax.fori_loop(count // 2 * 2, count, add, y)


def backward(
    x: Array,
    gates: Array,
    up: Array,
    down: Array,
    idx: Array,
    count: ArrayLike,
    activation: Activation,
    dy: Array,
) -> Gradients:
    """The gradients of all floating arguments, expert by expert like the forward pass."""

    def step(j: Array, found: Gradients) -> Gradients:
        expert = idx[j]
        up_e, down_e = piece(up, expert, x.dtype)[0], piece(down, expert, x.dtype)[0]
        hidden, pull = jax.vjp(activation, x @ up_e.T)
        gate = lax.dynamic_index_in_dim(gates, expert, 1)
        d_gated = dy @ down_e.T
        (d_hidden,) = pull(gate * d_gated)
        return Gradients(
            found.x + d_hidden @ up_e,
            found.gates.at[:, expert].add(jnp.sum(hidden * d_gated, axis=1)),
            found.up.at[expert].add(d_hidden.T @ x),
            found.down.at[expert].add((gate * hidden).T @ dy),
        )

    zeros = (jnp.zeros(v.shape, x.dtype) for v in (x, gates, up, down))
    return lax.fori_loop(0, count, step, Gradients(*zeros))
