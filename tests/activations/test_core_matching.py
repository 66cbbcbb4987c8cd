"""CoreMatching: the vectors, the definitions in loops, both ways to prune, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from sparsejax.activations import core_matching as cm

neurons = jax.jit(cm.core_neurons, static_argnames=("rho", "beta"))
tokens = jax.jit(cm.core_tokens, static_argnames=("capacity", "on_flat"))
threshold_of = jax.jit(cm.elbow_threshold)
overlap_of = jax.jit(cm.neuron_overlap)
decode = jax.jit(lambda params, idx, x: cm.gated_ffn(cm.compact_ffn(params, idx), x))


def elbow(scores, **options):
    """Threshold and index as Python numbers."""
    threshold, index = threshold_of(scores, **options)
    return threshold.item(), index.item()


@functools.cache
def activations(m=20, f=48, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(0.1 * rng.normal(size=f), 1, (m, f)), jnp.float32)


@functools.cache
def ffn(f=24, d=8):
    gate, up, down = jax.random.normal(jax.random.key(3), (3, f, d))
    return {"gate": gate, "up": up, "down": down}


def neurons_by_loops(a, rho, beta, valid=None):
    a = np.asarray(a, np.float32)
    rows = a if valid is None else a[np.asarray(valid)]
    limit = max(1, int(rho * np.sum(rows > 0) / len(rows)))
    counts = np.zeros(a.shape[1], int)
    for row in rows:
        counts[np.argsort(-row, kind="stable")[:limit]] += 1
    core = np.argsort(-counts, kind="stable")[: int(beta * a.shape[1])]
    return np.sort(core), counts


def elbow_by_loops(scores):
    v = sorted(map(int, scores), reverse=True)
    n = len(v)
    away = [abs((n - 1) * (x - v[0]) - i * (v[-1] - v[0])) for i, x in enumerate(v)]
    best = max(i for i in range(n) if away[i] == max(away)) if any(away) else 0
    return v[best], best


# the vectors


@pytest.mark.vectors
def test_every_family_has_a_test(reference):
    assert reference("corematching").families() == {"elbow", "core", "edge"}


@pytest.mark.vectors
def test_tokens_of_the_published_code(reference):
    for case in reference("corematching").cases("elbow"):
        packed, f, m = (case[n] for n in ("activation_positive", "num_neurons", "num_tokens"))
        on = np.unpackbits(packed, axis=1)[:, :f].astype(bool)
        assert on.shape == (m, f)
        a = jnp.where(jnp.asarray(on), 1.0, -1.0)
        image = np.zeros(m, bool)
        image[case["image_start"] : case["image_stop"]] = True
        set_of_token = cm.reference_set(a, token=case["reference_token"])
        np.testing.assert_array_equal(set_of_token, on[case["reference_token"]])
        scores = overlap_of(a, set_of_token)
        np.testing.assert_array_equal(scores[image], case["scores"])
        found = elbow(scores, where=jnp.asarray(image))
        assert found == (case["value"], case["index"])
        keep, idx, count = tokens(scores, jnp.asarray(image))
        np.testing.assert_array_equal(np.flatnonzero(keep), case["kept_positions"])
        np.testing.assert_array_equal(idx[: int(count)], case["kept_positions"])


@pytest.mark.vectors
def test_core_neurons_of_the_published_code(reference):
    for case in reference("corematching").cases("core"):
        a = jnp.asarray(case["activation"])
        m = a.shape[0]
        rho, beta = case["token_fraction_rho"], case["neuron_fraction_beta"]
        idx, counts = neurons(a, rho=rho, beta=beta)
        np.testing.assert_array_equal(counts, case["counts"])
        assert counts.sum() == m * case["per_token_limit"]
        assert len(idx) == case["num_core"]
        np.testing.assert_array_equal(idx, case["stable_core_neurons"])
        # the code's sort is not stable: it may have others of the smallest count
        must, may = set(case["must_include"]), set(case["may_include"])
        for found in (set(np.asarray(idx)), set(case["code_core_neurons"])):
            assert must <= found <= must | may
        scores = overlap_of(a, cm.reference_set(a, reference="core_neurons", core=idx))
        np.testing.assert_array_equal(scores, case["token_scores"])
        assert elbow(scores)[0] == case["elbow_value"]
        keep, _, _ = tokens(scores, jnp.ones(m, bool))
        np.testing.assert_array_equal(np.flatnonzero(keep), case["core_tokens"])
        # an input of 1 whose gate is 1 and whose up-projection gives the activation of the vectors
        down = jnp.asarray(case["down_weight"]).T
        up = jnp.asarray(case["decode_activation"][0]) / jax.nn.silu(1.0)
        nothing = jnp.zeros_like(down)
        gate, up = nothing.at[:, 0].set(1.0), nothing.at[:, 0].set(up.astype(down.dtype))
        params = {"gate": gate, "up": up, "down": down}
        x = jnp.zeros((1, down.shape[1])).at[:, 0].set(1.0)
        y = decode(params, idx, x)
        np.testing.assert_allclose(y, case["decode_y_stable"], rtol=1e-9, atol=1e-9)


@pytest.mark.vectors
def test_curves_with_ties_plateaus_and_three_points(reference):
    for case in reference("corematching").cases("edge"):
        scores = jnp.asarray(case["scores"])
        for dtype in (jnp.int32, jnp.float32):
            assert elbow(scores.astype(dtype)) == (case["elbow_value"], case["elbow_index"])
        keep, _, count = tokens(scores, jnp.ones(len(scores), bool))
        np.testing.assert_array_equal(np.flatnonzero(keep), case["kept"])
        assert count == len(case["kept"])


# core neurons


@pytest.mark.parametrize(
    ("rho", "beta", "padded"),
    [(0.2, 0.4, False), (0.4, 0.25, True), (1.0, 1.0, True), (0.01, 0.03, False)],
)
def test_core_neurons_are_those_of_the_definition(rho, beta, padded):
    a = activations()
    for values in (a, jnp.round(a * 2) / 2, a.astype(jnp.bfloat16)):  # the last two have ties
        valid = jnp.arange(20) < 13 if padded else None
        idx, counts = neurons(values, rho=rho, beta=beta, where=valid)
        core, wanted = neurons_by_loops(values, rho, beta, valid)
        np.testing.assert_array_equal(counts, wanted)
        np.testing.assert_array_equal(idx, core)
        assert idx.dtype == counts.dtype == jnp.int32


def test_the_limit_is_the_mean_of_all_tokens_rounded_down_exactly():
    counted = jax.jit(lambda a, v, r: cm.core_neurons(a, rho=r, where=v)[1].sum(), static_argnums=2)
    for rho in (0.2, 0.4):
        for positives in range(0, 200, 5):  # multiples, where a rounded product is just too small
            for m in (1, 3, 7, 10):
                row = np.concatenate([np.ones(positives), -np.ones(400 - positives)])
                a = jnp.asarray(row.reshape(10, 40), jnp.float32)
                valid = np.arange(10) < m
                limit = max(1, int(rho * np.sum(np.asarray(a)[:m] > 0) / m))
                assert counted(a, jnp.asarray(valid), rho) == limit * m


def test_a_limit_of_none_is_one_and_neurons_never_counted_fill_the_set():
    a = -1 - jnp.arange(12.0).reshape(2, 6)  # nothing is positive
    for valid, times in ((jnp.ones(2, bool), 2), (jnp.zeros(2, bool), 0)):
        idx, counts = neurons(a, beta=0.5, where=valid)
        np.testing.assert_array_equal(counts, [times, 0, 0, 0, 0, 0])
        np.testing.assert_array_equal(idx, [0, 1, 2])


# core tokens


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 30), min_size=8, max_size=8), st.lists(st.booleans(), min_size=8,
       max_size=8), st.sampled_from([3, 9]), st.sampled_from(["none", "all"]))  # fmt: skip
def test_tokens_are_those_of_the_definition(scores, image, capacity, on_flat):
    keep, idx, count = tokens(
        jnp.asarray(scores, jnp.int32), jnp.asarray(image), capacity=capacity, on_flat=on_flat
    )
    kept = [not i for i in image]
    if any(image):
        threshold, index = elbow_by_loops([s for s, i in zip(scores, image) if i])
        found = elbow(jnp.asarray(scores, jnp.int32), where=jnp.asarray(image))
        assert found == (threshold, index)
        every = on_flat == "all" and index == 0
        kept = [not i or s > threshold or every for s, i in zip(scores, image)]
    assert count == sum(kept)
    ranked = sorted(np.flatnonzero(kept), key=lambda j: (image[j], -scores[j] * image[j], j))
    stay = sorted(ranked[:capacity])
    np.testing.assert_array_equal(np.flatnonzero(keep), stay)
    assert idx.shape == (capacity,)
    np.testing.assert_array_equal(idx, stay + [0] * (capacity - len(stay)))


def test_flat_curves_keep_nothing_or_all():
    scores, image = jnp.asarray([5, 5, 5, 9, 5]), jnp.asarray([1, 1, 1, 0, 1], bool)
    np.testing.assert_array_equal(tokens(scores, image)[0], ~image)
    assert tokens(scores, image, on_flat="all")[0].all()
    assert elbow(jnp.arange(6)) == (5, 0)
    assert not tokens(jnp.arange(6), jnp.ones(6, bool))[0].any()
    assert tokens(scores, jnp.zeros(5, bool))[0].all()
    assert elbow(jnp.zeros(0, jnp.int32))[1] == 0


def test_of_equal_distances_the_last_wins_on_both_sides_of_the_line():
    assert elbow(jnp.asarray([8, 4, 2, 0, 0])) == (0, 3)  # three points 8 below the line
    assert elbow(jnp.asarray([8, 4, 4, 4, 0])) == (4, 3)  # one 8 below, one 8 above
    assert elbow(jnp.asarray([0, 4, 2, 8, 0, 40]), where=jnp.arange(6) < 5) == (0, 3)


def test_a_plateau_before_a_cliff_keeps_nearly_all_and_axes_are_not_scaled():
    plateau = jnp.asarray([50 - i // 4 for i in range(30)] + [3, 2])
    assert tokens(plateau, jnp.ones(32, bool))[2] >= 28
    few = jnp.asarray([90, 80] + [10 - i // 4 for i in range(30)])
    assert tokens(few, jnp.ones(32, bool))[2] == 2
    assert elbow(few)[1] == elbow(few * 1000)[1]


def test_counts_and_scores_beyond_narrow_floats_stay_apart():
    scores = jnp.asarray([2**24, 2**24 + 1, 4095, 1, 0, 0])  # equal in float32
    keep = tokens(scores, jnp.ones(6, bool), capacity=1)[0]
    np.testing.assert_array_equal(np.flatnonzero(keep), [1])
    a = jnp.ones((2, 2050), jnp.bfloat16).at[1, 0].set(-1)
    np.testing.assert_array_equal(overlap_of(a, jnp.ones(2050, bool)), [2050, 2049])


def test_scores_that_are_no_numbers_do_not_count():
    scores = jnp.asarray([9.0, jnp.nan, 8.5, 1.0, 0.5, 0.0, -jnp.inf])
    assert elbow(scores) == (1.0, 2)
    np.testing.assert_array_equal(np.flatnonzero(tokens(scores, jnp.ones(7, bool))[0]), [0, 2])


def test_padding_never_stays_and_does_not_bend_the_curve():
    scores = jnp.asarray([0, 9, 8, 1, 1, 0, 40, 0])
    image = jnp.asarray([0, 1, 1, 1, 1, 0, 1, 0], bool)
    valid = jnp.arange(8) < 6
    keep, idx, count = tokens(scores, image, where=valid)
    np.testing.assert_array_equal(np.flatnonzero(keep), [0, 1, 2, 5])
    short = tokens(scores[:6], image[:6])
    np.testing.assert_array_equal(keep[:6], short[0])
    assert (count, idx.shape) == (short[2], (8,))


def test_reference_sets():
    a = activations()
    np.testing.assert_array_equal(cm.reference_set(a), a[15] > 0)  # the published choice
    traced = jax.jit(lambda a, t: cm.reference_set(a, token=t))
    np.testing.assert_array_equal(traced(a, 3), a[3] > 0)
    of_core = cm.reference_set(a, reference="core_neurons", core=jnp.asarray([1, 5]))
    np.testing.assert_array_equal(np.flatnonzero(of_core), [1, 5])


# decoding, and both ways to prune


def test_compact_neurons_add_up_to_all_and_equal_a_masked_sum():
    params, x = ffn(), jax.random.normal(jax.random.key(4), (5, 8))
    idx = jnp.asarray([0, 3, 4, 9, 20])
    rest = jnp.asarray([i for i in range(24) if i not in {0, 3, 4, 9, 20}])
    parts = [decode(params, i, x) for i in (idx, rest)]
    whole = cm.gated_ffn(params, x)
    np.testing.assert_allclose(parts[0] + parts[1], whole, rtol=1e-4, atol=1e-4)
    active = jax.nn.silu(x @ params["gate"].T) * (x @ params["up"].T)
    masked = jnp.where(jnp.isin(jnp.arange(24), idx), active, 0.0) @ params["down"]
    np.testing.assert_allclose(parts[0], masked, rtol=1e-4, atol=1e-5)
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    assert decode(narrow, idx, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    grads = jax.jit(jax.grad(lambda p: decode(p, idx, x).sum()))(params)
    assert (np.flatnonzero(jnp.abs(grads["down"]).sum(1)) == np.asarray(idx)).all()


def rotary(x, positions):
    angle = positions[:, None].astype(x.dtype) * jnp.asarray([1.0, 0.1])
    first, second = x[..., :2], x[..., 2:]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def attend(q, k, v, visible):
    weights = jax.nn.softmax(jnp.where(visible, q @ k.swapaxes(-1, -2), -jnp.inf))
    return weights @ v


@pytest.mark.parametrize("mode", ["mask_cache", "drop_after"])
def test_both_modes_attend_to_the_kept_tokens_at_their_positions(mode):
    x = jax.random.normal(jax.random.key(5), (12, 4))
    a = activations(12, 32, seed=2)
    image = (jnp.arange(12) >= 2) & (jnp.arange(12) < 8)
    overlap = cm.neuron_overlap(a, cm.reference_set(a))
    keep, idx, count = tokens(overlap, image, capacity=11)
    kept = np.flatnonzero(keep)
    assert 6 < count < 12
    query = rotary(jnp.ones((1, 4)), jnp.asarray([12]))

    @jax.jit
    def attended(x, keep, idx, count):
        if mode == "drop_after":  # what is dropped flows no further: later layers see idx alone
            rows, positions, valid = x[idx], idx, jnp.arange(11) < count
            return attend(query, rotary(rows, positions), rows, valid)
        positions = jnp.arange(12, dtype=jnp.int32)
        whole = (rotary(x, positions)[None], x[None])
        k, v, kv_pos, valid = cm.prune_cache(*whole, keep)
        np.testing.assert_array_equal(k.shape, whole[0].shape)
        masked = attend(query, k[0], v[0], valid)
        k, v, kv_pos, valid = cm.prune_cache(x[None], x[None], keep, capacity=11)
        gathered = attend(query, rotary(k[0], kv_pos), v[0], valid)
        return jnp.concatenate([masked, gathered])

    whole = jax.jit(lambda x, at: attend(query, rotary(x, at), x, True))
    wanted = whole(x[kept], jnp.asarray(kept))
    found = attended(x, keep, idx, count)
    np.testing.assert_allclose(found, jnp.broadcast_to(wanted, found.shape), rtol=1e-5, atol=1e-6)
    if mode == "mask_cache":  # zeros instead of a mask still weigh
        zeroed = jnp.where(keep[:, None], x, 0.0)
        zero_keys = whole(zeroed, jnp.arange(12))
        assert jnp.abs(zero_keys - wanted).max() > 1e-3


def test_the_cache_keeps_all_heads_and_says_what_is_valid():
    k = jax.random.normal(jax.random.key(6), (3, 7, 4))
    v = jax.random.normal(jax.random.key(7), (3, 7, 5))
    keep = jnp.asarray([1, 0, 0, 1, 1, 0, 1], bool)
    same = cm.prune_cache(k, v, keep)
    for found, wanted in zip(same, (k, v, np.arange(7), keep)):
        np.testing.assert_array_equal(found, wanted)
    short = jax.jit(functools.partial(cm.prune_cache, capacity=5))(k, v, keep)
    assert [x.shape for x in short] == [(3, 5, 4), (3, 5, 5), (5,), (5,)]
    np.testing.assert_array_equal(short[2], [0, 3, 4, 6, 0])
    np.testing.assert_array_equal(short[3], [True, True, True, True, False])
    for found, wanted in zip(short[:2], (k, v)):
        np.testing.assert_array_equal(found[:, :4], wanted[:, np.flatnonzero(keep)])


# composition


def select(a, image):
    idx, counts = cm.core_neurons(a)
    scores = cm.neuron_overlap(a, cm.reference_set(a, reference="core_neurons", core=idx))
    return idx, counts, *cm.core_tokens(scores, image, capacity=12)


def test_selections_batch_trace_once_and_have_no_gradient(mesh):
    batch = jnp.stack([activations(20, 48, seed) for seed in range(4)])
    image = (jnp.arange(20) > 2) & (jnp.arange(20) < 15)
    traces = []

    @jax.jit
    def many(batch):
        traces.append(0)
        return jax.vmap(select, (0, None))(batch, image)

    found = many(batch)
    for row, a in enumerate(np.asarray(batch)):
        core, counts = neurons_by_loops(a, 0.2, 0.4)
        scores = jnp.asarray((a[:, core] > 0).sum(1), jnp.int32)
        for one, wanted in zip(found, (core, counts, *tokens(scores, image, capacity=12))):
            np.testing.assert_array_equal(one[row], wanted)
    many(batch + 1)
    assert len(traces) == 1
    spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data", None, "model")))
    for one, other in zip(many(spread), found):
        np.testing.assert_array_equal(one, other)

    def weighed(a):
        idx, *_ = cm.core_neurons(a)
        keep, *_ = cm.core_tokens(a[:, 0], image)
        return jnp.sum(jnp.where(keep[:, None], a[:, idx], 0.0))

    grad = jax.jit(jax.grad(weighed))(batch[0])
    np.testing.assert_array_equal(np.unique(np.asarray(grad)), [0, 1])


def test_bad_input_is_named(unchecked):
    a, m = activations(), 20
    scores, image = jnp.arange(m), jnp.ones(m, bool)
    params = ffn()
    for call, message in (
        (lambda: cm.core_neurons(a, rho=0.0), r"rho is 0.0; it must be in \(0, 1\]"),
        (lambda: cm.core_neurons(a, rho=1.5), r"rho is 1.5; it must be in \(0, 1\]"),
        (lambda: cm.core_neurons(a, beta=-0.1), r"beta is -0.1; it must be in \(0, 1\]"),
        (lambda: cm.core_neurons(a, beta=0.02), r"a has 48 neurons; beta = 0.02 of them is none"),
        (lambda: cm.core_neurons(a[:0]), r"a has shape \(0, 48\): there are no tokens"),
        (lambda: jax.eval_shape(cm.core_neurons, jax.ShapeDtypeStruct((2**16, 2**15), "float32")),
         r"a has shape \(65536, 32768\); counts are int32, so that m \* f, m \* 5 and f \* 1"),
        (lambda: cm.reference_set(a, reference="all"), "reference is 'all'; allowed are 'token'"),
        (lambda: cm.reference_set(a, token=20), "token is 20; a has 20 tokens"),
        (lambda: cm.reference_set(a[:3]), "token is -5; a has 3 tokens"),
        (lambda: cm.reference_set(a, core=jnp.arange(3)), "core is given with reference 'token'"),
        (lambda: cm.reference_set(a, reference="core_neurons"), "core is None; reference 'core_n"),
        (lambda: cm.reference_set(a, reference="core_neurons", token=1, core=jnp.arange(3)),
         "token is given with reference 'core_neurons'"),
        (lambda: cm.core_tokens(scores, image, capacity=0), "capacity is 0; it must be at least 1"),
        (lambda: cm.core_tokens(scores, image, on_flat="some"), "on_flat is 'some'; allowed are"),
        (lambda: cm.prune_cache(a[None], a[None], image, capacity=0), "capacity is 0; it must be"),
        (lambda: cm.prune_cache(a[None], a[None], image, capacity=8),
         "keep has 20 tokens; capacity is 8"),
        (lambda: cm.compact_ffn(params, jnp.asarray([0, 24])), "there are 24 neurons"),
        (lambda: cm.gated_ffn({"gate": a, "up": a}, a), "it must have gate, up and down of one sh"),
        (lambda: cm.compact_ffn(params | {"down": params["down"].T}, jnp.arange(2)),
         r"'down': \(8, 24\)}; it must have"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
