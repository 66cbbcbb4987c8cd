"""What CoreMatching leaves of a prompt: its choices for a batch, and the cache that they prune."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.activations import (
    core_neurons,
    core_tokens,
    neuron_overlap,
    prune_cache,
    reference_set,
)
from sparsejax.models.vision_language_config import CoreMatching

KeysAndValues = tuple[Float[Array, "b s heads width"], Float[Array, "b s heads width"]]
Places = tuple[Int[Array, "b s"], Bool[Array, "b s"]]  # positions, and which of them are valid


class LayerCache(NamedTuple):
    """Keys and values of one layer: those of a prompt, then room for what follows it."""

    # No shapes in the types: a cache may also hold shardings or ShapeDtypeStructs.
    k: Array  # [b, places, kv_heads, head_width]
    v: Array  # [b, places, kv_heads, head_width]
    positions: Array  # [b, places] int32, in the sequence before pruning
    valid: Array  # [b, places]
    end: Array  # [] int32, the place of the next token


def choose_neurons(
    a: Float[Array, "b m f"], valid: Bool[Array, "b m"], select: CoreMatching
) -> Int[Array, "b n_core"]:
    """The core neurons of every sample, over its valid tokens."""

    def one(a: Array, valid: Array) -> Array:
        return core_neurons(a, rho=select.rho, beta=select.beta, where=valid)[0]

    return jax.vmap(one)(a, valid)


def choose_tokens(
    a: Float[Array, "b m f"], image: Bool[Array, "m"], select: CoreMatching
) -> Bool[Array, "b m"]:
    """The core tokens of every sample, all text among them."""

    def one(a: Array) -> Array:
        core = None
        if select.reference == "core_neurons":
            core = core_neurons(a, rho=select.rho, beta=select.beta)[0]
        reference = reference_set(a, reference=select.reference, token=select.token, core=core)
        scores = neuron_overlap(a, reference)
        return core_tokens(scores, image, capacity=select.capacity, on_flat=select.on_flat)[0]

    return jax.vmap(one)(a)


def drop_tokens(
    x: Float[Array, "b m d"], keep: Bool[Array, "b m"], capacity: int | None
) -> tuple[Float[Array, "b s d"], Places]:
    """The hidden states of the tokens that stay, and where they were."""
    one_head = x[:, :, None]
    (x, _), places = prune_keys((one_head, one_head), keep, capacity)
    return x[:, :, 0], places


def prune_keys(
    keys: tuple[Float[Array, "b m heads width"], Float[Array, "b m heads width"]],
    keep: Bool[Array, "b m"],
    capacity: int | None,
) -> tuple[KeysAndValues, Places]:
    """`prune_cache` of a batch whose heads come after the tokens."""

    def one(k: Array, v: Array, keep: Array) -> Any:
        k, v, positions, valid = prune_cache(
            k.swapaxes(0, 1), v.swapaxes(0, 1), keep, capacity=capacity
        )
        return (k.swapaxes(0, 1), v.swapaxes(0, 1)), (positions, valid)

    return jax.vmap(one)(*keys, keep)


def with_room(keys: KeysAndValues, places: Places, *, first: int, room: int) -> LayerCache:
    """A cache with empty places for the tokens from position `first` on."""
    positions, valid = places
    b, used = positions.shape
    free = ((0, 0), (0, room), (0, 0), (0, 0))
    k, v = (jnp.pad(x, free) for x in keys)
    later = jnp.broadcast_to(first + jnp.arange(room, dtype=jnp.int32), (b, room))
    positions = jnp.concatenate([positions, later], axis=1)
    valid = jnp.concatenate([valid, jnp.ones((b, room), bool)], axis=1)
    return LayerCache(k, v, positions, valid, jnp.int32(used))
