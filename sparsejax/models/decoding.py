"""Text from a decoder: the key-value cache, and greedy or sampled generation.

Any module with a `config` and a `decode` method of `Llama`'s form can use them.
"""

from functools import partial
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sparsejax.core.selection import is_concrete

DType = Literal["float32", "bfloat16"]


@runtime_checkable
class DecoderConfig(Protocol):
    """What a cache must know of a model."""

    @property
    def n_layers(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_width(self) -> int: ...
    @property
    def max_seq_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def dtype(self) -> DType: ...


class KVCache(NamedTuple):
    """Keys (rotated) and values of the tokens seen so far, of which there are `length`."""

    # No shapes in the types: a cache may also hold shardings or ShapeDtypeStructs.
    k: Array  # [layers, b, max_len, kv_heads, head_width]
    v: Array  # [layers, b, max_len, kv_heads, head_width]
    length: Array  # [] int32


@runtime_checkable
class Decoder(Protocol):
    """A model that continues a cache; see `Llama.decode`."""

    @property
    def config(self) -> DecoderConfig: ...
    def decode(
        self, tokens: Int[Array, "b t"], cache: KVCache, *, last_only: bool = False
    ) -> tuple[Float[Array, "b n v"], KVCache]: ...


def init_cache(
    config: DecoderConfig, batch: int, max_len: int | None = None, dtype: DType | None = None
) -> KVCache:
    """An empty cache for `batch` sequences of up to `max_len` tokens.

    max_len: by default, and at most, `config.max_seq_len`. dtype: by default `config.dtype`.
    Raises ValueError if `batch` is not positive or `max_len` is out of range.
    """
    max_len = config.max_seq_len if max_len is None else max_len
    if batch <= 0:
        raise ValueError(f"batch is {batch}; it must be positive.")
    if not 0 < max_len <= config.max_seq_len:
        raise ValueError(
            f"max_len is {max_len}; it must be from 1 to max_seq_len = {config.max_seq_len}."
        )
    shape = (config.n_layers, batch, max_len, config.kv_heads, config.head_width)
    empty = jnp.zeros(shape, config.dtype if dtype is None else dtype)
    # Two buffers: a cache that is donated to a step may not hold one twice.
    return KVCache(empty, jnp.zeros_like(empty), jnp.zeros((), jnp.int32))


def check_cache(cache: KVCache, config: DecoderConfig, tokens: tuple[int, ...]) -> None:
    """Raises ValueError unless `cache` fits the model and has room for `tokens = (batch, t)` more.

    A traced length cannot be compared: then only `t` itself is.
    """
    batch, t = tokens
    room = cache.k.shape[2]
    expected = (config.n_layers, batch, room, config.kv_heads, config.head_width)
    if not cache.k.shape == expected == cache.v.shape:
        raise ValueError(
            f"cache has keys {cache.k.shape} and values {cache.v.shape}; this model and batch need "
            f"(layers, batch, max_len, kv_heads, head_width) = {expected}."
        )
    end = t + (int(cache.length) if is_concrete(cache.length) else 0)
    if end > room:
        raise ValueError(f"cache has max_len = {room} places; tokens would fill {end}.")


def write_layer(
    cache: KVCache,
    layer: Int[Array, ""],
    k: Float[Array, "b t kv_heads width"],
    v: Float[Array, "b t kv_heads width"],
) -> tuple[
    KVCache, Float[Array, "b max_len kv_heads width"], Float[Array, "b max_len kv_heads width"]
]:
    """Writes keys and values of `layer` after the `length` that are there, which stays as it is.

    Returns the cache, and all keys and values of the layer in the cache's dtype. Past the end the
    last places are overwritten: `check_cache` first.
    """
    start = (layer, 0, cache.length, 0, 0)
    keys = lax.dynamic_update_slice(cache.k, k[None].astype(cache.k.dtype), start)
    values = lax.dynamic_update_slice(cache.v, v[None].astype(cache.v.dtype), start)
    return (
        KVCache(keys, values, cache.length),
        lax.dynamic_index_in_dim(keys, layer, keepdims=False),
        lax.dynamic_index_in_dim(values, layer, keepdims=False),
    )


def generate(
    model: Decoder,
    prompt: Int[Array, "b t"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: PRNGKeyArray | None = None,
    stop_token: int | None = None,
) -> Int[Array, "b n"]:
    """`prompt` followed by `max_new_tokens` new tokens (`n = t + max_new_tokens`).

    One compiled program: the prompt in one pass, then one cached step a token. Another temperature,
    `top_p`, key or stop token of the same kind does not compile again.

    temperature: 0 takes the likeliest token, the lowest index among equals; otherwise the logits
        are divided by it and sampled.
    top_k, top_p: sample among the `top_k` likeliest tokens, then among the fewest of these whose
        probability reaches `top_p` (Holtzman et al., 2020).
    key: needed if, and only if, temperature is not 0.
    stop_token: a sequence that has produced it is filled up with it; once all have, work ends.

    Raises ValueError for an option out of range, a missing key, an empty prompt, or a total beyond
    `max_seq_len`. Not differentiable.

    >>> from flax import nnx
    >>> from sparsejax.models import Llama, llama_config
    >>> model = Llama(llama_config("laptop"), rngs=nnx.Rngs(0))
    >>> generate(model, jnp.zeros((1, 4), jnp.int32), max_new_tokens=3).shape
    (1, 7)
    """
    config, total = model.config, prompt.shape[1] + max_new_tokens
    if prompt.shape[1] < 1:
        raise ValueError(f"prompt has shape {prompt.shape}; it needs at least one token.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    if total > config.max_seq_len:
        raise ValueError(
            f"prompt and max_new_tokens make {total} tokens; max_seq_len is {config.max_seq_len}."
        )
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must not be negative.")
    if top_k is not None and not 1 <= top_k <= config.vocab_size:
        raise ValueError(f"top_k is {top_k}; it must be from 1 to {config.vocab_size}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1.")
    if (key is None) != (temperature == 0):
        raise ValueError(f"key is {key} at temperature {temperature}; sampling, alone, needs one.")
    graphdef, params = nnx.split(model)
    return _generate(
        graphdef,
        params,
        prompt,
        key,
        None if key is None else jnp.float32(temperature),
        None if top_p is None or key is None else jnp.float32(top_p),
        None if stop_token is None else jnp.asarray(stop_token, prompt.dtype),
        max_new_tokens=max_new_tokens,
        top_k=top_k,
    )


@partial(jax.jit, static_argnames=("graphdef", "max_new_tokens", "top_k"))
def _generate(
    graphdef, params, prompt, key, temperature, top_p, stop_token, *, max_new_tokens, top_k
):
    model = nnx.merge(graphdef, params)
    batch = prompt.shape[0]

    def choose(i, logits):
        if key is None:
            return jnp.argmax(logits, axis=-1).astype(prompt.dtype)
        token = _sample(logits / temperature, jax.random.fold_in(key, i), top_k, top_p)
        return token.astype(prompt.dtype)

    def stopped(token):
        return jnp.zeros(batch, bool) if stop_token is None else token == stop_token

    def unfinished(state):
        i, _, _, done = state
        return (i < max_new_tokens) & ~jnp.all(done)

    def step(state):
        i, tokens, cache, done = state
        last = lax.dynamic_slice_in_dim(tokens, i - 1, 1, axis=1)
        logits, cache = model.decode(last, cache)
        token = choose(i, logits[:, 0])
        token = token if stop_token is None else jnp.where(done, stop_token, token)
        tokens = lax.dynamic_update_slice_in_dim(tokens, token[:, None], i, axis=1)
        return i + 1, tokens, cache, done | stopped(token)

    cache = init_cache(model.config, batch, prompt.shape[1] + max_new_tokens)
    logits, cache = model.decode(prompt, cache, last_only=True)
    first = choose(jnp.int32(0), logits[:, 0])
    # Steps that an early end leaves out would have written the stop token.
    fill = jnp.zeros((), prompt.dtype) if stop_token is None else stop_token
    tokens = jnp.full((batch, max_new_tokens), fill).at[:, 0].set(first)
    state = (jnp.int32(1), tokens, cache, stopped(first))
    _, tokens, _, _ = lax.while_loop(unfinished, step, state)
    return jnp.concatenate([prompt, tokens], axis=1)


def _sample(
    logits: Float[Array, "b v"],
    key: PRNGKeyArray,
    top_k: int | None,
    top_p: Float[Array, ""] | None,
) -> Int[Array, "b"]:
    if top_k is None and top_p is None:
        return jax.random.categorical(key, logits)
    logits, tokens = lax.top_k(logits, logits.shape[-1] if top_k is None else top_k)
    if top_p is not None:
        probabilities = jax.nn.softmax(logits, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The first token stays whatever top_p and rounding are.
        kept = (before < top_p).at[:, 0].set(True)
        logits = jnp.where(kept, logits, -jnp.inf)
    choice = jax.random.categorical(key, logits)
    return jnp.take_along_axis(tokens, choice[:, None], axis=-1)[:, 0]
