"""Speculative decoding of a model with experts: what a draft of tokens reads of it."""

import functools

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, PyTree

from experiments.blockffn.measures import restored
from sparsejax.activations import SpeculativeResult, speculative_decode
from sparsejax.models import KVCache, Llama, LlamaConfig, generate, init_cache


@functools.partial(jax.jit, static_argnames=("target", "draft", "new_tokens", "draft_tokens"))
def speculate(
    target: LlamaConfig,
    draft: LlamaConfig,
    params: PyTree,
    draft_params: PyTree,
    prompts: Int[Array, "n p"],
    *,
    new_tokens: int,
    draft_tokens: int,
) -> dict[str, Float[Array, ""]]:
    """Continues every prompt from drafts of another model.

    Args:
      target, draft: two models of one vocabulary, of the parameters `params` and `draft_params`.

    Returns:
      `accepted`, drafted tokens that a call of the target confirmed, and `tokens`, those that it
      gave; `union`, the share of a layer's experts that the tokens of such a call have on, those
      that were rejected included; `greedy`, the share of prompts whose text is, token by token, the
      one that the target writes alone. All but `greedy` are means over calls.
    """
    model, writer = restored(target, params), restored(draft, draft_params)

    def continued(prompt: Array) -> SpeculativeResult:
        return speculative_decode(
            Partial(functools.partial(_read, target), params),
            Partial(functools.partial(_read, draft), draft_params),
            prompt[None],
            init_cache(target, 1),
            init_cache(draft, 1),
            max_new_tokens=new_tokens,
            draft_tokens=draft_tokens,
            rewind=_rewind,
        )

    found = jax.lax.map(continued, prompts)
    texts = found.tokens[:, 0]
    alone = generate(model, prompts, max_new_tokens=new_tokens)
    shares = jax.vmap(
        lambda text, accepted: chunk_unions(
            model, writer, text, accepted, start=prompts.shape[1] - 1, draft_tokens=draft_tokens
        )
    )(texts, found.accepted)
    called = jnp.arange(new_tokens) < found.rounds[:, None]
    calls = jnp.sum(found.rounds)
    return {
        "accepted": jnp.sum(found.accepted) / calls,
        "tokens": texts.shape[0] * new_tokens / calls,
        "union": jnp.sum(shares, where=called) / calls,
        "greedy": jnp.mean(jnp.all(texts == alone, axis=1).astype(jnp.float32)),
    }


def chunk_unions(
    target: Llama,
    draft: Llama,
    text: Int[Array, " t"],
    accepted: Int[Array, " r"],
    *,
    start: int,
    draft_tokens: int,
) -> Float[Array, " r"]:
    """The share of experts that any token of each checked chunk has on, the mean over layers.

    What was drafted and rejected is not in the text, so it is drafted again.

    Args:
      accepted: drafted tokens that each round took. start: the last token of the prompt.
    """
    before = jnp.cumsum(accepted + 1) - (accepted + 1)
    first = start + before  # the last known token, with which the chunk of a round begins
    room = jnp.zeros(target.config.max_seq_len - text.size, text.dtype)
    place = jnp.arange(target.config.max_seq_len)
    padded = jnp.concatenate([text, room])

    def share(first: Array) -> Array:
        def extend(chunk: Array, i: Array) -> tuple[Array, None]:
            token = jnp.argmax(draft(chunk[None])[0, first + i]).astype(chunk.dtype)
            return chunk.at[first + i + 1].set(token), None

        # causal models do not see what follows
        chunk, _ = jax.lax.scan(extend, padded, jnp.arange(draft_tokens))
        active = target.detailed(chunk[None])[1]["logits"][:, 0] > 0
        checked = (place >= first) & (place <= first + draft_tokens)
        return jnp.mean(jnp.any(active & checked[:, None], axis=1).astype(jnp.float32))

    return jax.vmap(share)(first)


def _read(
    config: LlamaConfig, params: PyTree, tokens: Array, cache: KVCache
) -> tuple[Array, KVCache]:
    return restored(config, params).decode(tokens, cache)


def _rewind(cache: KVCache, left: Array) -> KVCache:
    return cache._replace(length=cache.length - left)
