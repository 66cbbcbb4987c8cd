"""BlockFFN's losses, factor and metrics: the vectors, definitions in loops, and the edges."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.activations import block_ffn_losses as losses

T, E = 24, 6
locality = jax.jit(losses.activation_locality_loss)
sparsification = jax.jit(losses.chunk_sparsification_loss, static_argnames=("chunk", "eps"))
token_level = jax.jit(losses.token_level_sparsity)
chunk_level = jax.jit(losses.chunk_level_sparsity, static_argnames="chunk")
reuse = jax.jit(losses.reuse_ratio)
with_grad = functools.cache(lambda f, **o: jax.jit(jax.value_and_grad(functools.partial(f, **o))))
of_locality = with_grad(losses.activation_locality_loss)
of_sparsification = with_grad(losses.chunk_sparsification_loss, chunk=8)


def some_logits(seed=0, t=T):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(t, E)), jnp.float32)


def previous(*starts, t=T):
    """Indices of predecessors in segments that begin at the starts."""
    shift = np.arange(-1, t - 1)
    shift[[0, *starts]] = -1
    return jnp.asarray(shift, jnp.int32)


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def locality_by_definition(logits, shift, alpha):
    """The cross-entropy of one expert of one token after the other."""
    logits = np.asarray(logits, np.float64)
    terms = []
    for now, before in enumerate(np.asarray(shift)):
        if before >= 0:
            p, q = sigmoid(alpha * logits[now]), sigmoid(alpha * logits[before])
            terms.append(-p * np.log(q) - (1 - p) * np.log(1 - q))
    return np.mean(terms)


def sparsification_by_definition(logits, mask, chunk):
    """Of every chunk and expert the product over tokens."""
    total = []
    for first in range(0, len(logits), chunk):
        untouched = np.ones(E)
        for token in range(first, first + chunk):
            on = np.maximum(np.asarray(logits[token], np.float64), 0)
            on = on / np.sqrt(np.mean(on**2) + 1e-6)
            untouched *= 1 - mask[token] * on / (on.sum() + 1e-5) + 1e-5
        total.append(1 - untouched)
    return np.mean(total)


# the vectors


@pytest.mark.vectors
def test_published_losses_and_metrics_are_the_same(reference):
    for case in reference("blockffn").cases("loss"):
        logits = jnp.asarray(case["raw_router_logits"])
        shift, mask = jnp.asarray(case["shift_index"]), jnp.asarray(case["token_mask"])
        chunk, eps = case["chunk_length"], case["rms_eps"]
        local, d_local = of_locality(logits, shift, alpha=case["alpha"])
        np.testing.assert_allclose(local, case["activation_locality"], rtol=1e-10)
        np.testing.assert_allclose(
            d_local, case["grad_activation_locality"], rtol=1e-10, atol=1e-10
        )
        # the published mean square is that of float32
        p = jax.jit(functools.partial(losses.expert_probabilities, eps=eps))(logits)
        np.testing.assert_allclose(p, case["probs"], rtol=2e-6, atol=2e-6)
        loss = with_grad(losses.chunk_sparsification_loss, chunk=chunk, eps=eps)
        spread, d_spread = loss(logits, mask)
        np.testing.assert_allclose(spread, case["chunk_sparsification"], rtol=2e-6)
        wanted = case["grad_chunk_sparsification"]
        np.testing.assert_allclose(d_spread, wanted, rtol=2e-6, atol=2e-6 * np.abs(wanted).max())
        for window, rate in zip(case["window_sizes"], case["window_activation_rate"], strict=True):
            found = chunk_level(logits > 0, chunk=int(window), valid=shift >= 0)
            np.testing.assert_allclose(1 - found, rate, rtol=1e-10)
            if window == 1:
                found = token_level(logits > 0, valid=shift >= 0)
                np.testing.assert_allclose(1 - found, rate, rtol=1e-10)


@pytest.mark.vectors
def test_published_factors_are_the_same(reference):
    for case in reference("blockffn").cases("sched"):
        names = ("stable_steps", "adjust_every", "max_factor", "min_ratio")
        options = {name: case[name] for name in names}
        state, factors = jax.lax.scan(
            functools.partial(losses.adaptive_factor_step, **options),
            losses.adaptive_factor_init(case["start"]),
            jnp.asarray(case["loss"]),
        )
        assert state.step == len(case["loss"])
        np.testing.assert_allclose(factors, case["factor"], rtol=1e-10)


# activation locality


@pytest.mark.parametrize("alpha", [1.0, 5.0])
def test_locality_is_the_cross_entropy_of_neighbours(alpha):
    logits, shift = some_logits(), previous(7, 15)
    expected = locality_by_definition(logits, shift, alpha)
    np.testing.assert_allclose(locality(logits, shift, alpha=alpha), expected, rtol=1e-5)
    # the direction matters
    ahead = jnp.where(jnp.arange(T) < T - 1, jnp.arange(1, T + 1), -1)
    backwards = locality(logits, ahead, alpha=alpha)
    assert abs(backwards - locality(logits, previous(), alpha=alpha)) > 1e-3


def test_both_tokens_are_differentiated_and_the_scale_is_soft():
    logits = some_logits(t=2)
    shift = jnp.asarray([-1, 0])
    _, grads = of_locality(logits, shift, alpha=3.0)
    l, own = (3.0 * np.asarray(row, np.float64) for row in logits)
    target = sigmoid(own)
    expected = [3 / E * (sigmoid(l) - target), -3 / E * l * target * (1 - target)]
    np.testing.assert_allclose(grads, expected, rtol=1e-4, atol=1e-6)


def test_segments_and_padding_do_not_meet():
    logits, shift = some_logits(), previous(8)
    padded = shift.at[20:].set(-1)
    value, grads = of_locality(logits, padded)
    spoilt = logits.at[20:].set(jnp.nan)
    np.testing.assert_allclose(locality(spoilt, padded), value, rtol=1e-6)
    found = of_locality(spoilt, padded)[1]
    np.testing.assert_allclose(found, grads, rtol=1e-6)
    assert not grads[20:].any()
    # the mean over pairs, of which two segments have 7 and 11
    parts = [locality(logits[:8], previous(t=8)), locality(logits[8:20], previous(t=12))]
    np.testing.assert_allclose(value, np.average(parts, weights=[7, 11]), rtol=1e-5)


def test_nothing_but_padding_costs_nothing():
    value, grads = of_locality(some_logits(), jnp.full(T, -1))
    assert value == 0
    assert not grads.any()


def test_large_logits_are_flat_but_finite():
    value, grads = of_locality(1e4 * some_logits(), previous())
    assert value > 1e4
    assert np.isfinite(grads).all()
    agreeing = jnp.abs(some_logits()) + 1
    assert locality(agreeing, previous()) < 1e-6


# chunk sparsification


@pytest.mark.parametrize("chunk", [1, 4, 24])
def test_sparsification_is_one_minus_the_product(chunk):
    logits = some_logits()
    mask = np.arange(T) % 5 != 2
    for given_mask, counts in ((None, np.ones(T)), (jnp.asarray(mask), mask)):
        found = sparsification(logits, given_mask, chunk=chunk)
        expected = sparsification_by_definition(logits, counts, chunk)
        np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_sparsification_without_an_active_expert_is_just_below_zero():
    off = -jnp.abs(some_logits())
    found = sparsification(off, chunk=8)
    np.testing.assert_allclose(found, 1 - (1 + 1e-5) ** 8, rtol=1e-5)
    _, grads = of_sparsification(off)
    assert np.isfinite(grads).all()


def test_a_certain_expert_is_finite():
    only = jnp.full((8, E), -1.0).at[:, 2].set(1e4)
    value, grads = of_sparsification(only)
    np.testing.assert_allclose(value, 1 / E, rtol=1e-3)
    assert np.isfinite(grads).all()


def test_sparsification_falls_when_neighbours_share():
    shared = jnp.tile(jnp.eye(E)[:2].sum(0) - 0.5, (12, 1))
    spread = jnp.stack([jnp.roll(shared[0], i) for i in range(12)])
    assert sparsification(shared, chunk=6) < 0.5 * sparsification(spread, chunk=6)
    # tokens of a chunk may come in any order, and padding may hold anything
    logits, order = some_logits(), np.r_[3, 1, 0, 2, 7, 6, 5, 4]
    value = sparsification(logits[:8], chunk=4)
    np.testing.assert_allclose(sparsification(logits[order], chunk=4), value, rtol=1e-6)
    mask = jnp.arange(8) < 5
    spoilt = logits[:8].at[5:].set(jnp.nan)
    np.testing.assert_allclose(
        sparsification(spoilt, mask, chunk=4), sparsification(logits[:8], mask, chunk=4), rtol=1e-6
    )


@pytest.mark.parametrize("loss", ["locality", "sparsification"])
def test_losses_of_batches_and_narrow_logits(loss):
    shift, mask = previous(9), jnp.arange(T) < 22
    of_row = {
        "locality": lambda row: losses.activation_locality_loss(row, shift, alpha=2.0),
        "sparsification": lambda row: losses.chunk_sparsification_loss(row, mask, chunk=8),
    }[loss]
    batch = jnp.stack([some_logits(1), some_logits(2)])
    found = jax.jit(jax.vmap(of_row))(batch)
    np.testing.assert_allclose(found, [jax.jit(of_row)(row) for row in batch], rtol=1e-5)
    narrow = batch[0].astype(jnp.bfloat16)
    value, grads = jax.jit(jax.value_and_grad(of_row))(narrow)
    assert (value.dtype, grads.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(value, of_row(narrow.astype(jnp.float32)), rtol=1e-6)


# the factor


def run_factor(given_losses, start=1.0, **options):
    options = {"stable_steps": 4, "adjust_every": 2} | options
    _, factors = jax.lax.scan(
        functools.partial(losses.adaptive_factor_step, **options),
        losses.adaptive_factor_init(start),
        jnp.asarray(given_losses, jnp.float32),
    )
    return np.asarray(factors)


def test_factor_follows_the_means_of_windows_on_a_ramp():
    # windows: 1, .5, .75, .75 -> ratios .5, 1.5, 1
    found = run_factor([2, 0, 0.5, 0.5, 1, 0.5, 0.75, 0.75, 0, 0])
    np.testing.assert_allclose(found, [1, 1, 1, 1, 0.75, 0.5, 0.625, 0.75, 0.75, 0.75], rtol=1e-6)
    # the first adjustment is at the end of the first window from stable_steps on
    later = run_factor([2, 0, 0.5, 0.5, 1, 0.5, 0.75, 0.75], stable_steps=5)
    np.testing.assert_allclose(later, [1, 1, 1, 1, 1, 1, 1.25, 1.5], rtol=1e-6)


def test_factor_rises_by_a_least_ratio_and_up_to_a_multiple():
    barely = [1, 1, 1.01, 1.01, 1.01, 1.01]
    np.testing.assert_allclose(run_factor(barely)[4:], [1.0125, 1.025], rtol=1e-5)
    np.testing.assert_allclose(run_factor(barely, min_ratio=1.2)[4:], [1.1, 1.2], rtol=1e-5)
    doubling = np.repeat(2.0 ** np.arange(8), 2)
    found = run_factor(doubling, start=0.5)
    np.testing.assert_allclose(found[4::2], [0.75, 1.5, 2, 2, 2, 2], rtol=1e-6)
    np.testing.assert_allclose(run_factor(doubling, max_factor=1.5)[-1], 1.5, rtol=1e-6)


@pytest.mark.parametrize("odd", [0.0, -1e-4, float("nan"), float("inf")])
def test_factor_survives_losses_that_are_no_size(odd):
    found = run_factor([1, 1, odd, odd, 1, 1, 1, 1, 2, 2, 2, 2])
    np.testing.assert_allclose(found[:10], 1)
    np.testing.assert_allclose(found[10:], [1.5, 2])


def test_factor_lives_in_a_donated_state_and_passes_no_gradient():
    step = jax.jit(
        functools.partial(losses.adaptive_factor_step, stable_steps=4, adjust_every=2),
        donate_argnums=0,
    )
    state = losses.adaptive_factor_init(0.5)
    assert {leaf.shape for leaf in state} == {()}
    structure = jax.tree.map(lambda leaf: leaf.dtype, state)
    for _ in range(3):
        state, factor = step(state, jnp.float32(1))
    assert jax.tree.map(lambda leaf: leaf.dtype, state) == structure
    assert factor == 0.5
    assert step._cache_size() == 1

    def weighted(loss):
        following, factor = losses.adaptive_factor_step(
            losses.adaptive_factor_init(0.5), loss, stable_steps=4, adjust_every=2
        )
        return factor * loss + following.total

    assert jax.grad(weighted)(jnp.float32(3)) == 0.5
    _, narrow = losses.adaptive_factor_step(
        losses.adaptive_factor_init(jnp.float32(0.5)), jnp.bfloat16(1)
    )
    assert narrow.dtype == jnp.float32


# metrics


def by_sets(active, chunk, valid):
    """The three metrics from lists of sets."""
    tokens = [set(np.flatnonzero(row)) for row, counts in zip(active, valid) if counts]
    e = active.shape[1]
    tls = 1 - np.mean([len(s) / e for s in tokens]) if tokens else np.nan
    chunks = [
        set.union(*tokens[i : i + chunk])
        for i in range(0, len(tokens) - len(tokens) % chunk, chunk)
    ]
    cls = 1 - np.mean([len(s) / e for s in chunks]) if chunks else np.nan
    sets = [set(np.flatnonzero(row)) if counts else None for row, counts in zip(active, valid)]
    pairs = [(a, b) for a, b in itertools.pairwise(sets) if a and b is not None]
    again = np.mean([len(a & b) / len(a) for a, b in pairs]) if pairs else np.nan
    return tls, cls, again


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 3, 8, 24, 30]))
def test_metrics_are_those_of_sets(seed, chunk):
    rng = np.random.default_rng(seed)
    active = rng.random((T, E)) < rng.choice([0.05, 0.3, 0.8])
    valid = rng.random(T) < rng.choice([0.0, 0.1, 0.7, 1.0])
    for mask, counts in ((jnp.asarray(valid), valid), (None, np.ones(T, bool))):
        found = (
            token_level(active, valid=mask),
            chunk_level(active, chunk=chunk, valid=mask),
            reuse(active, valid=mask),
        )
        np.testing.assert_allclose(found, by_sets(active, chunk, counts), rtol=1e-5, atol=1e-6)


def test_chunks_start_at_the_first_valid_token():
    active = jnp.asarray(np.eye(E, dtype=bool)[[0, 0, 1, 1, 2, 2, 3, 3]])
    aligned = chunk_level(active, chunk=2)
    np.testing.assert_allclose(aligned, 1 - 1 / E, rtol=1e-6)
    shifted = chunk_level(active, chunk=2, valid=jnp.arange(8) > 0)
    np.testing.assert_allclose(shifted, 1 - 2 / E, rtol=1e-6)
    # padding between two tokens does not separate them
    gap = jnp.asarray([1, 0, 1, 1, 1, 0, 0, 0], bool)
    np.testing.assert_allclose(chunk_level(active, chunk=4, valid=gap), 1 - 3 / E, rtol=1e-6)


def test_metrics_of_batches():
    active = jnp.asarray(np.random.default_rng(0).random((3, T, E)) < 0.4)
    valid = jnp.arange(T) < jnp.asarray([[24], [13], [5]])
    found = jax.vmap(lambda a, v: losses.chunk_level_sparsity(a, chunk=4, valid=v))(active, valid)
    expected = [chunk_level(a, chunk=4, valid=v) for a, v in zip(active, valid)]
    np.testing.assert_allclose(found, expected)


# errors


def test_bad_input_is_named(unchecked):
    logits, shift = some_logits(), previous()
    active = logits > 0
    local, spread = losses.activation_locality_loss, losses.chunk_sparsification_loss
    step, one = losses.adaptive_factor_step, (losses.adaptive_factor_init(1.0), jnp.float32(1))
    short = shift[1:]
    for call, args, options, message in (
        (local, (logits, shift), {"alpha": 0.0}, "alpha is 0.0; it must be positive"),
        (local, (logits, short), {}, r"shift has shape \(23,\); it must be \(24,\), by tokens"),
        (local, (logits, shift + 2), {}, r"shift has entries from 1 to 24; .* in \[-1, 24\)"),
        (local, (logits, shift - 1), {}, "shift has entries from -2 to 21"),
        (spread, (logits,), {"chunk": 5}, "chunk is 5; it must divide the 24 tokens of logits"),
        (spread, (logits,), {"chunk": 0}, "chunk is 0; it must be at least 1"),
        (spread, (logits, short > 0), {"chunk": 4}, r"token_mask has shape \(23,\); it must be"),
        (spread, (logits,), {"chunk": 4, "eps": 0.0}, "eps is 0.0; it must be positive"),
        (losses.expert_probabilities, (logits,), {"eps": 0.0}, "eps is 0.0; it must be positive"),
        (losses.adaptive_factor_init, (0.0,), {}, "start is 0.0; it must be positive"),
        (step, one, {"stable_steps": 150}, r"stable_steps is 150; .* 2 \* adjust_every = 200"),
        (step, one, {"adjust_every": 0}, "adjust_every is 0; it must be at least 1"),
        (step, one, {"max_factor": 0.5}, "max_factor is 0.5; it must be at least 1"),
        (step, one, {"min_ratio": 0.9}, "min_ratio is 0.9; it must be at least 1"),
        (losses.chunk_level_sparsity, (active,), {"chunk": 0}, "chunk is 0; it must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call(*args, **options)
    for metric in (losses.token_level_sparsity, losses.reuse_ratio,
                   functools.partial(losses.chunk_level_sparsity, chunk=2)):  # fmt: skip
        with pytest.raises(ValueError, match=r"valid has shape \(23,\); it must be \(24,\)"):
            metric(active, valid=short > 0)
