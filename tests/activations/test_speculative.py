"""Speculative decoding: the target's own text whatever the draft, caches, counts and the edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial

from sparsejax.activations.block_ffn import block_ffn
from sparsejax.activations.speculative import speculative_decode
from sparsejax.models import Llama, generate, init_cache, llama_config

CONFIG = llama_config("laptop", d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, d_ff=48)
SMALLER = llama_config("laptop", d_model=16, n_layers=1, n_heads=1, n_kv_heads=1, d_ff=16)
NEW = 12


@functools.cache
def llama(config=CONFIG, seed=0):
    return Llama(config, rngs=nnx.Rngs(seed))


@functools.cache
def decoder(config):
    """A model function of parameters, the same object at each call."""
    graphdef = nnx.graphdef(llama(config))

    def decode(params, tokens, cache):
        return nnx.merge(graphdef, params).decode(tokens, cache)

    return decode


def rewind(cache, n):
    return cache._replace(length=cache.length - n)


def noisy(scale):
    """The target with other parameters nearby."""
    leaves, structure = jax.tree.flatten(nnx.state(llama()))
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(
        structure, [w + scale * jnp.asarray(rng.normal(size=w.shape), w.dtype) for w in leaves]
    )


def drafts():
    return {
        "itself": (CONFIG, nnx.state(llama())),
        "near": (CONFIG, noisy(0.001)),
        "another": (SMALLER, nnx.state(llama(SMALLER, 3))),
    }


def prompts(batch=1, t=5):
    return jnp.asarray(np.random.default_rng(0).integers(0, 128, (batch, t)), jnp.int32)


def speculate(prompt, draft, *, draft_tokens=3, room=None, new=NEW, **options):
    config, params = draft
    room = prompt.shape[1] + new + draft_tokens - 1 if room is None else room
    return speculative_decode(
        Partial(decoder(CONFIG), nnx.state(llama())),
        Partial(decoder(config), params),
        prompt,
        init_cache(CONFIG, prompt.shape[0], room),
        init_cache(config, prompt.shape[0], room),
        max_new_tokens=new,
        draft_tokens=draft_tokens,
        rewind=rewind,
        **options,
    )


@functools.cache
def greedy(batch=1, t=5, stop_token=None):
    return np.asarray(
        generate(llama(), prompts(batch, t), max_new_tokens=NEW, stop_token=stop_token)
    )


@pytest.mark.parametrize("draft", ["itself", "near", "another"])
@pytest.mark.parametrize(("draft_tokens", "t"), [(1, 5), (4, 1), (20, 5)])
def test_the_text_is_the_targets_own(draft, draft_tokens, t):
    prompt = prompts(t=t)
    found = speculate(prompt, drafts()[draft], draft_tokens=draft_tokens)
    np.testing.assert_array_equal(found.tokens, greedy(t=t))
    rounds, accepted = int(found.rounds), np.asarray(found.accepted)
    assert accepted.shape == (NEW,)
    assert not accepted[rounds:].any()
    # each round adds what it accepts and one token, and the last one reaches the end
    assert (accepted[: rounds - 1] + 1).sum() < NEW <= (accepted[:rounds] + 1).sum()
    if draft == "itself":
        assert (accepted[:rounds] == draft_tokens).all()
        assert rounds == -(-NEW // (draft_tokens + 1))


def test_better_drafts_are_accepted_more_often():
    rounds = {name: int(speculate(prompts(), draft).rounds) for name, draft in drafts().items()}
    assert rounds["itself"] < rounds["near"] < rounds["another"]


def test_a_batch_goes_in_step_and_vmap_lets_each_row_go_by_itself():
    prompt, draft = prompts(3), drafts()["near"]
    together = speculate(prompt, draft)
    np.testing.assert_array_equal(together.tokens, greedy(3))
    alone = jax.vmap(lambda row: speculate(row[None], draft))(prompt)
    np.testing.assert_array_equal(alone.tokens[:, 0], greedy(3))
    for row, rounds, accepted in zip(prompt, alone.rounds, alone.accepted):
        single = speculate(row[None], draft)
        assert single.rounds == rounds
        np.testing.assert_array_equal(single.accepted, accepted)
    assert together.rounds >= max(alone.rounds)


def test_a_stop_token_fills_up_and_ends_the_work():
    full = greedy(3)
    stop = int(full[0, 8])
    expected = greedy(3, stop_token=stop)
    assert (expected != full).any()
    for draft in drafts().values():
        np.testing.assert_array_equal(
            speculate(prompts(3), draft, stop_token=stop).tokens, expected
        )
    at_once = int(full[0, 5])
    found = speculate(prompts(), drafts()["itself"], stop_token=at_once)
    assert found.rounds == 1
    assert (np.asarray(found.tokens[0, 5:]) == at_once).all()


def test_a_text_is_continued():
    prompt, draft = prompts(t=6), drafts()["near"]
    caches = []
    for config, params in ((CONFIG, nnx.state(llama())), draft):
        empty = init_cache(config, 1, 6 + NEW + 2)
        caches.append(decoder(config)(params, prompt[:, :3], empty)[1])
    models = [Partial(decoder(CONFIG), nnx.state(llama())), Partial(decoder(CONFIG), draft[1])]
    found = speculative_decode(
        *models, prompt[:, 3:], *caches, max_new_tokens=NEW, draft_tokens=3, rewind=rewind
    )
    np.testing.assert_array_equal(found.tokens, greedy(t=6)[:, 3:])


def test_other_parameters_do_not_compile_again():
    traces = 0

    def counted(params, tokens, cache):
        nonlocal traces
        traces += 1
        return decoder(CONFIG)(params, tokens, cache)

    def call(scale):
        params = noisy(scale)
        caches = (init_cache(CONFIG, 1, 20) for _ in range(2))
        return speculative_decode(
            *(Partial(counted, params) for _ in range(2)), prompts(), *caches,
            max_new_tokens=4, draft_tokens=2, rewind=rewind,
        )  # fmt: skip

    first, so_far = call(0.0), traces
    second = call(0.5)
    assert traces == so_far > 0
    assert (np.asarray(first.tokens) != np.asarray(second.tokens)).any()


def test_a_cache_without_room_shows():
    needed = 5 + NEW + 3 - 1
    another = drafts()["another"]
    np.testing.assert_array_equal(speculate(prompts(), another, room=needed).tokens, greedy())
    short = np.asarray(speculate(prompts(), another, room=12).tokens)
    right = (short == greedy()).sum()
    assert 5 < right < 5 + NEW
    np.testing.assert_array_equal(short[:, :right], greedy()[:, :right])
    assert (short[:, right:] == -1).all()


def test_a_chunk_is_checked_through_the_union_of_its_experts():
    rng = np.random.default_rng(0)
    d, e, k, v = 8, 6, 4, 16
    shapes = {"router": (e, d), "router_norm": (e,), "up": (e, k, d), "down": (e, k, d)}
    params = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
    table = jnp.asarray(rng.normal(size=(v, d)), jnp.float32)

    def model(path, scale):
        def decode(tokens, sums):
            # of all tokens so far; the cache holds every partial sum
            total = jnp.cumsum(table[tokens], axis=1) + sums[:, -1:]
            y = jax.vmap(lambda row: block_ffn(params, scale * row, path=path)[0])(total)
            return y @ table.T, jnp.concatenate([sums, total], axis=1)[:, -9:]

        return decode

    def back(sums, n):
        return jnp.take(sums, jnp.clip(jnp.arange(9) - n, 0, 8), axis=1)

    prompt, start = jnp.asarray([[1, 2]]), jnp.zeros((1, 9, d))
    options = {"max_new_tokens": 10, "draft_tokens": 4, "rewind": back}
    found = speculative_decode(
        model("union", 1), model("dense", 1.1), prompt, start, start, **options
    )
    step, text, sums = jax.jit(model("dense", 1)), [1, 2], start
    _, sums = step(prompt[:, :1], sums)
    for _ in range(10):
        logits, sums = step(jnp.asarray([text[-1:]]), sums)
        text.append(int(jnp.argmax(logits)))
    np.testing.assert_array_equal(found.tokens[0], text)
    assert len(set(text)) > 3


def test_bad_input_is_named(unchecked):
    def echo(tokens, cache, size=4):
        return jax.nn.one_hot(tokens, size), cache

    def last(tokens, cache):
        return jax.nn.one_hot(tokens[:, -1:], 4), cache

    prompt = prompts() % 4
    for models, given, options, message in (
        ((echo, echo), prompt, {"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ((echo, echo), prompt, {"draft_tokens": 0}, "draft_tokens is 0; it must be at least 1"),
        ((echo, echo), prompt[:, :0], {}, r"prompt has shape \(1, 0\); it must be \[b, t\] with"),
        ((echo, echo), prompt[0], {}, r"prompt has shape \(5,\); it must be"),
        ((last, echo), prompt, {}, r"target gives logits of shape \(1, 1, 4\) for .* \(1, 3\)"),
        ((echo, lambda t, c: (t, c)), prompt, {}, r"draft gives logits of shape \(1, 1\) for"),
        ((echo, functools.partial(echo, size=5)), prompt, {}, r"have vocabularies of \[4, 5\]"),
    ):
        options = {"max_new_tokens": 2, "draft_tokens": 2} | options
        with pytest.raises(ValueError, match=message):
            speculative_decode(
                *models, given, jnp.int32(0), jnp.int32(0), rewind=lambda c, n: c, **options
            )
