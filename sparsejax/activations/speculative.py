"""Speculative decoding: a small model drafts a chunk, the large one checks it in one call.

What the large model reads for a chunk is the union of what its tokens need, once, which is where
layers whose neighbours share experts gain most.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial
from jaxtyping import Array, Int

Decode: TypeAlias = Callable[[Array, Any], tuple[Array, Any]]
"""`(tokens [b, t], cache) -> (logits [b, t, v], cache)`: continues what a cache holds."""
Rewind: TypeAlias = Callable[[Any, Array], Any]
"""`(cache, n) -> cache` without its last n tokens."""


class SpeculativeResult(NamedTuple):
    """What `speculative_decode` found."""

    tokens: Int[Array, "b n"]  # the prompt and the new tokens
    accepted: Int[Array, "r"]  # drafted tokens that each round took, 0 for rounds that were not run
    rounds: Int[Array, ""]  # calls of the target


def speculative_decode(
    target: Decode,
    draft: Decode,
    prompt: Int[Array, "b t"],
    target_cache: Any,
    draft_cache: Any,
    *,
    max_new_tokens: int,
    draft_tokens: int,
    rewind: Rewind,
    stop_token: int | Int[Array, ""] | None = None,
) -> SpeculativeResult:
    """Greedy decoding of `target`, several tokens a call, from the drafts of another model.

    A round: `draft` continues the text by `draft_tokens` tokens, `target` reads the last token and
    those in one call, and its own choices stand up to and with the first one that differs from the
    draft. Hence the text is the target's own greedy one whatever the draft is; only rounding, which
    may differ between one token and a chunk, can decide near ties otherwise. Sequences of a batch
    go in step, with what all of them accept; under `vmap` each goes by itself. One compiled
    program; nothing is differentiated.

    Args:
      target, draft: models over one vocabulary; see `Decode`. Of a plain function all arrays that
        it closes over are constants; `jax.tree_util.Partial(function, params)` makes params
        arguments, and does not compile again for others. Calls see the prompt without its last
        token, then `draft_tokens + 1` tokens (target) or one (draft).
      prompt: at least one token.
      target_cache, draft_cache: what precedes the prompt, usually nothing; with room for
        `t + max_new_tokens + draft_tokens - 1` more tokens.
      max_new_tokens, draft_tokens: at least 1.
      rewind: of both caches; entries past the new end may stay if later ones overwrite them. For
        `sparsejax.models`: `lambda cache, n: cache._replace(length=cache.length - n)`.
      stop_token: a sequence that has produced it is filled up with it; once all have, work ends.

    Returns:
      The tokens (`n = t + max_new_tokens`) and what was accepted (`r = max_new_tokens`; the last
      round may accept beyond the end). Equal logits give the lowest token. Where the target's
      logits are NaN, as those of a cache that ran out of room may be, the token is -1.

    Raises:
      ValueError: an empty prompt, a number of tokens below 1, or logits that are not [b, t, v] or
        of two vocabularies.

    Source: Leviathan et al., Fast inference from transformers via speculative decoding (2023), at
    temperature 0.

    >>> def count(tokens, length):
    ...     return jax.nn.one_hot((tokens + 1) % 5, 5), length + tokens.shape[1]
    >>> found = speculative_decode(
    ...     count, count, jnp.asarray([[2, 3]]), 0, 0,
    ...     max_new_tokens=5, draft_tokens=3, rewind=lambda length, n: length - n,
    ... )
    >>> found.tokens, int(found.rounds)
    (Array([[2, 3, 4, 0, 1, 2, 3]], dtype=int32), 2)
    """
    if prompt.ndim != 2 or not prompt.shape[1]:
        raise ValueError(f"prompt has shape {prompt.shape}; it must be [b, t] with a token or more")
    for name, value in (("max_new_tokens", max_new_tokens), ("draft_tokens", draft_tokens)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    return _decode(
        *(model if isinstance(model, Partial) else Partial(model) for model in (target, draft)),
        prompt,
        target_cache,
        draft_cache,
        None if stop_token is None else jnp.asarray(stop_token).astype(prompt.dtype),
        max_new_tokens,
        draft_tokens,
        rewind,
    )


class _State(NamedTuple):
    """Between two rounds; both caches hold all tokens but the last."""

    tokens: Array
    length: Array
    target_cache: Any
    draft_cache: Any
    accepted: Array
    rounds: Array
    stopped: Array  # of each sequence


@partial(jax.jit, static_argnums=(6, 7, 8))
def _decode(
    target: Decode,
    draft: Decode,
    prompt: Array,
    target_cache: Any,
    draft_cache: Any,
    stop_token: Array | None,
    max_new_tokens: int,
    draft_tokens: int,
    rewind: Rewind,
) -> SpeculativeResult:
    batch, start = prompt.shape
    end = start + max_new_tokens
    _check_models(target, draft, prompt, target_cache, draft_cache, draft_tokens + 1)

    def propose(carry: tuple[Array, Any], _: None) -> tuple[tuple[Array, Any], Array]:
        last, cache = carry
        logits, cache = draft(last, cache)
        token = jnp.argmax(logits, axis=2).astype(prompt.dtype)
        return (token, cache), token[:, 0]

    def verify(state: _State) -> _State:
        last = lax.dynamic_slice_in_dim(state.tokens, state.length - 1, 1, axis=1)
        # one step more than is proposed: the last token too must be in the draft's cache
        (_, draft_cache), drafted = lax.scan(
            propose, (last, state.draft_cache), length=draft_tokens + 1
        )
        drafted = drafted[:draft_tokens].T
        chunk = jnp.concatenate([last, drafted], axis=1)
        logits, target_cache = target(chunk, state.target_cache)
        chosen = jnp.argmax(logits, axis=2).astype(prompt.dtype)
        # a draft cannot continue a NaN, the target's own text can: it stays one
        chosen = jnp.where(jnp.any(jnp.isnan(logits), axis=2), -1, chosen)
        agrees = (drafted == chosen[:, :-1]) | state.stopped[:, None]
        taken = jnp.min(jnp.sum(jnp.cumprod(agrees, axis=1, dtype=jnp.int32), axis=1))
        stopped = state.stopped
        if stop_token is not None:
            new = jnp.arange(draft_tokens + 1, dtype=jnp.int32) <= taken
            stopped |= jnp.any((chosen == stop_token) & new, axis=1)
        left = draft_tokens - taken
        return _State(
            # what follows the accepted ones is overwritten by the next round
            lax.dynamic_update_slice_in_dim(state.tokens, chosen, state.length, axis=1),
            state.length + taken + 1,
            rewind(target_cache, left),
            rewind(draft_cache, left),
            state.accepted.at[state.rounds].set(taken),
            state.rounds + 1,
            stopped,
        )

    if start > 1:  # logits that nobody asks for are not computed
        target_cache = target(prompt[:, :-1], target_cache)[1]
        draft_cache = draft(prompt[:, :-1], draft_cache)[1]
    room = jnp.zeros((batch, max_new_tokens + draft_tokens), prompt.dtype)
    state = _State(
        jnp.concatenate([prompt, room], axis=1),
        jnp.int32(start),
        target_cache,
        draft_cache,
        jnp.zeros(max_new_tokens, jnp.int32),
        jnp.int32(0),
        jnp.zeros(batch, bool),
    )
    state = lax.while_loop(lambda s: (s.length < end) & ~jnp.all(s.stopped), verify, state)
    tokens = state.tokens[:, :end]
    if stop_token is not None:
        new = jnp.arange(end, dtype=jnp.int32) >= start
        seen = jnp.cumsum((tokens == stop_token) & new, axis=1, dtype=jnp.int32) > 0
        tokens = jnp.where(seen, stop_token, tokens)
    return SpeculativeResult(tokens, state.accepted, state.rounds)


def _check_models(
    target: Decode, draft: Decode, tokens: Array, target_cache: Any, draft_cache: Any, chunk: int
) -> None:
    sizes = []
    for name, model, cache, t in (
        ("target", target, target_cache, chunk), ("draft", draft, draft_cache, 1)
    ):  # fmt: skip
        given = (tokens.shape[0], t)
        logits = jax.eval_shape(model, jax.ShapeDtypeStruct(given, tokens.dtype), cache)[0].shape
        if len(logits) != 3 or logits[:2] != given:
            raise ValueError(
                f"{name} gives logits of shape {logits} for tokens of shape {given}; they must be "
                "[b, t, v]"
            )
        sizes.append(logits[2])
    if sizes[0] != sizes[1]:
        raise ValueError(f"target and draft have vocabularies of {sizes}; they must be equal")
