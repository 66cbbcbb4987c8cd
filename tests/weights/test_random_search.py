"""Random search: the equations' vectors, exact counts, and what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import sparsejax as sj
from sparsejax import weights

pytestmark = pytest.mark.standard_promotion


def mlp(params, x):
    for i in range(len(params)):
        layer = params[f"l{i}"]
        x = (x if i == 0 else jax.nn.relu(x)) @ layer["kernel"] + layer["bias"]
    return x


def cross_entropy(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(mlp(params, x), y).mean()


def candidates(case, space, layers):
    """Masks of all candidates by layer, each (trials, in, out)."""
    if space == "edge":
        return [jnp.asarray(case[f"edge_mask{i}"], bool) for i in range(layers)]
    keeps = [jnp.asarray(case[f"node_keep{i}"], bool) for i in range(layers - 1)]
    trials = len(keeps[0])
    first, last = case["weight0"].shape[0], case[f"weight{layers - 1}"].shape[1]
    ends = [jnp.ones((trials, first), bool), *keeps, jnp.ones((trials, last), bool)]
    return [a[:, :, None] & b[:, None, :] for a, b in zip(ends, ends[1:])]  # noqa: RUF007


@pytest.mark.vectors
def test_every_family_has_a_test(reference):
    file = reference("random_search")
    known = {"node", "edge", "weight", "bias", "x", "y", "sparsity", "lr", "dense"}
    assert file.families() == known


@pytest.mark.vectors
def test_vectors(reference):
    case = reference("random_search").whole()
    layers = sum(re.fullmatch(r"weight\d+", name) is not None for name in case.names())
    params = {
        f"l{i}": {"kernel": jnp.asarray(case[f"weight{i}"]), "bias": jnp.asarray(case[f"bias{i}"])}
        for i in range(layers)
    }
    x, y = jnp.asarray(case["x"]), jnp.asarray(case["y"])
    np.testing.assert_allclose(cross_entropy(params, x, y), case["dense_loss"], rtol=1e-9)
    size = sum(params[name]["kernel"].size for name in params)
    case.ignore("sparsity", reason="test_samplers_draw_the_counts_of_the_vectors")
    for space in ("node", "edge"):
        given = candidates(case, space, layers)
        trials, key = len(given[0]), jax.random.key(0)
        keys = jax.random.key_data(jax.random.split(key, trials))

        def sampler(one, given=given, keys=keys):
            """The masks given for the candidate that has this key."""
            t = jnp.argmax(jnp.all(keys == jax.random.key_data(one), -1))
            return {f"l{i}": {"kernel": m[t], "bias": True} for i, m in enumerate(given)}

        def score(p, masks):
            return cross_entropy(sj.apply_masks(p, masks), x, y)

        found = weights.random_search(
            key, params, sampler=sampler, score_fn=score, trials=trials, chunk=5
        )
        np.testing.assert_allclose(found.scores, case[f"{space}_losses"], rtol=1e-9)
        assert int(found.best_index) == case[f"{space}_best"]
        for i in range(layers):
            np.testing.assert_array_equal(
                found.best_masks[f"l{i}"]["kernel"], given[i][case[f"{space}_best"]]
            )
        for t, wanted in enumerate(case[f"{space}_weight_sparsity"]):
            kept = sj.count_masks({f"l{i}": m[t] for i, m in enumerate(given)})
            assert kept.size == size
            assert 1 - kept.density == pytest.approx(wanted, abs=1e-12)
        tx = sj.static_sparsity(optax.sgd(case["lr"]), found.best_masks)
        trained = sj.apply_masks(params, found.best_masks)
        state, losses = tx.init(trained), []

        @jax.jit
        def step(p, state, tx=tx):
            loss, gradients = jax.value_and_grad(cross_entropy)(p, x, y)
            updates, state = tx.update(gradients, state, p)
            return optax.apply_updates(p, updates), state, loss

        for i in range(len(case[f"{space}_train_loss"])):
            after, state, loss = step(trained, state)
            losses.append(float(loss))
            if i + 1 < len(case[f"{space}_train_loss"]):
                trained = after
        np.testing.assert_allclose(losses, case[f"{space}_train_loss"], rtol=1e-9)
        for i in range(layers):
            np.testing.assert_allclose(
                trained[f"l{i}"]["kernel"], case[f"{space}_trained_weight{i}"], atol=1e-10
            )


@pytest.mark.vectors
def test_samplers_draw_the_counts_of_the_vectors(reference):
    case = reference("random_search").whole()
    layers = sum(re.fullmatch(r"weight\d+", name) is not None for name in case.names())
    for name in case.names():
        if not re.match(r"weight\d|node_keep|edge_mask|sparsity", name):
            case.ignore(name, reason="compared in test_vectors")
    kernels = {f"l{i}": {"kernel": jnp.asarray(case[f"weight{i}"])} for i in range(layers)}
    sizes = tuple(k["kernel"].shape[0] for k in kernels.values())
    sizes += (kernels[f"l{layers - 1}"]["kernel"].shape[1],)
    keeps, _ = weights.sample_node_masks(jax.random.key(1), sizes, sparsity=case["sparsity"])
    for i, keep in enumerate(keeps):
        assert set(case[f"node_keep{i}"].sum(1)) == {int(keep.sum())}
    edges = weights.sample_edge_masks(jax.random.key(1), kernels, sparsity=case["sparsity"])
    for i in range(layers):
        counts = case[f"edge_mask{i}"].sum((1, 2))
        assert set(counts) == {int(edges[f"l{i}"]["kernel"].sum())}


def params(sizes=(6, 16, 8, 3)):
    keys = jax.random.split(jax.random.key(0), len(sizes))
    return {
        f"l{i}": {"kernel": jax.random.normal(keys[i], (n, m)), "bias": jnp.ones(m)}
        for i, (n, m) in enumerate(zip(sizes, sizes[1:]))  # noqa: RUF007
    }


KERNELS = ["l0/kernel", "l1/kernel", "l2/kernel"]


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.6, 0.75, 0.99])
def test_node_masks_are_outer_products_of_exact_counts(sparsity):
    sizes = (6, 16, 10, 3)
    keeps, masks = weights.sample_node_masks(jax.random.key(3), sizes, sparsity=sparsity)
    counts = [max(1, round(h * (1 - sparsity))) for h in sizes[1:-1]]
    assert [int(keep.sum()) for keep in keeps] == counts
    ends = [np.ones(sizes[0], bool), *map(np.asarray, keeps), np.ones(sizes[-1], bool)]
    for i, mask in enumerate(masks):
        np.testing.assert_array_equal(mask, np.outer(ends[i], ends[i + 1]))


def test_counts_round_half_to_even():
    for size, wanted in ((5, 2), (7, 4), (1, 1)):
        (keep,), _ = weights.sample_node_masks(jax.random.key(0), (2, size, 2), sparsity=0.5)
        assert int(keep.sum()) == wanted


def test_every_node_is_as_likely_as_any_other():
    def draw(key):
        return weights.sample_node_masks(key, (2, 8, 2), sparsity=0.75)[0][0]

    share = jax.vmap(draw)(jax.random.split(jax.random.key(0), 4000)).mean(0)
    np.testing.assert_allclose(share, 0.25, atol=0.03)


def test_weight_sparsity_of_node_sparsity():
    draw = weights.node_sampler(params((20, 40, 40, 5)), kernels=KERNELS, sparsity=0.9)
    counted = sj.count_masks(draw(jax.random.key(0))).per_leaf
    shares = [1 - kept / size for kept, size in counted.values()]
    np.testing.assert_allclose(shares, [0.9, 0.99, 0.9])


def test_a_dropped_node_sends_nothing_whatever_its_bias():
    tree = params()
    masks = weights.node_sampler(tree, kernels=KERNELS, sparsity=0.5)(jax.random.key(0))
    louder = {n: {"kernel": p["kernel"], "bias": p["bias"]} for n, p in tree.items()}
    dropped = ~np.asarray(masks["l0"]["kernel"]).any(0)
    louder["l0"]["bias"] = jnp.where(jnp.asarray(dropped), 100.0, tree["l0"]["bias"])
    x = jnp.ones((2, 6))
    np.testing.assert_array_equal(
        mlp(sj.apply_masks(louder, masks), x), mlp(sj.apply_masks(tree, masks), x)
    )


def test_other_leaves_get_the_scalar_true():
    tree = params()
    for masks in (
        weights.node_sampler(tree, kernels=KERNELS[:2], sparsity=0.5)(jax.random.key(0)),
        weights.sample_edge_masks(jax.random.key(0), tree, sparsity=0.5, where="l[01]/kernel"),
    ):
        assert jax.tree.structure(masks) == jax.tree.structure(tree)
        assert masks["l2"]["kernel"].shape == masks["l0"]["bias"].shape == ()
        assert set(sj.count_masks(masks).per_leaf) == {"l0/kernel", "l1/kernel"}


def test_edge_masks_are_cores_random_masks():
    tree, key = params(), jax.random.key(5)
    masks = weights.sample_edge_masks(key, tree, sparsity=0.9)
    assert sj.sad(masks, sj.random_masks(key, tree, 1 - 0.9))["total"] == 0
    assert sj.count_masks(masks).per_leaf["l0/kernel"] == (10, 96)


def score_by_sum(tree, masks):
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(sj.apply_masks(tree, masks)))


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_candidates_have_the_split_keys_and_the_first_best_wins(chunk):
    tree, key = params(), jax.random.key(2)
    draw = weights.node_sampler(tree, kernels=KERNELS, sparsity=0.5)
    found = weights.random_search(
        key, tree, sampler=draw, score_fn=score_by_sum, trials=10, chunk=chunk
    )
    keys = jax.random.split(key, 10)
    scores = [float(score_by_sum(tree, draw(k))) for k in keys]
    np.testing.assert_allclose(found.scores, scores, rtol=1e-5)
    assert int(found.best_index) == int(np.argmin(scores))
    assert sj.sad(found.best_masks, draw(keys[found.best_index]))["total"] == 0
    tied = weights.random_search(
        key, tree, sampler=draw, score_fn=lambda p, m: jnp.float32(1), trials=10, chunk=chunk
    )
    assert int(tied.best_index) == 0


def test_search_under_jit_and_vmap_leaves_parameters_alone():
    tree = params()

    def draw(key):
        mask = jax.random.bernoulli(key, 0.5, (6, 16))
        return sj.dense_masks(tree) | {"l0": {"kernel": mask, "bias": jnp.asarray(True)}}

    def search(key, p):
        return weights.random_search(key, p, sampler=draw, score_fn=score_by_sum, trials=6, chunk=4)

    key = jax.random.key(1)
    plain, jitted = search(key, tree), jax.jit(search)(key, tree)
    assert int(plain.best_index) == int(jitted.best_index)
    np.testing.assert_allclose(plain.scores, jitted.scores, rtol=1e-5)
    assert sj.sad(plain.best_masks, jitted.best_masks)["total"] == 0
    many = jax.vmap(search, (0, None))(jax.random.split(key, 3), tree)
    assert many.scores.shape == (3, 6)
    assert many.best_masks["l0"]["kernel"].shape == (3, 6, 16)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), tree)
    assert search(key, half).scores.dtype == jnp.bfloat16
    for before, after in zip(jax.tree.leaves(params()), jax.tree.leaves(tree)):
        np.testing.assert_array_equal(before, after)


def test_a_score_that_is_not_finite_never_wins_and_stays_visible():
    tree = {"kernel": jnp.arange(6.0).reshape(6, 1)}

    def draw(key):
        return weights.sample_edge_masks(key, tree, sparsity=0.8)

    def score(p, masks):
        kept = jnp.sum(sj.apply_masks(p, masks)["kernel"])
        return jnp.where(kept == 0, -jnp.inf, jnp.where(kept == 1, jnp.nan, kept))

    def search(score_fn):
        return weights.random_search(
            jax.random.key(0), tree, sampler=draw, score_fn=score_fn, trials=40
        )

    found = search(score)
    assert bool(jnp.isnan(found.scores).any())
    assert bool(jnp.isneginf(found.scores).any())
    assert float(found.scores[found.best_index]) == 2
    with pytest.raises(ValueError, match="none of the 40 scores is finite"):
        search(lambda p, m: jnp.float32(jnp.nan))
    assert int(jax.jit(lambda: search(lambda p, m: jnp.float32(jnp.nan)))().best_index) == 0


def test_paired_comparison_is_the_paired_t_test(x64):
    a, b = jax.random.normal(jax.random.key(0), (2, 12))
    for shift in (0.0, 0.4, -2.0, 30.0):
        mean, se, p = weights.paired_comparison(a + shift, b)
        wanted = stats.ttest_rel(np.asarray(a + shift), np.asarray(b))
        np.testing.assert_allclose(mean, np.mean(a + shift - b))
        np.testing.assert_allclose(se, np.std(a + shift - b, ddof=1) / 12**0.5)
        np.testing.assert_allclose(p, wanted.pvalue, rtol=1e-6, atol=1e-14)
    many = jax.jit(jax.vmap(weights.paired_comparison))(jnp.stack([a, b]), jnp.stack([b, a]))
    np.testing.assert_allclose(many[0][0], -many[0][1])
    np.testing.assert_allclose(many[2][0], many[2][1])


def test_paired_comparison_in_single_precision_and_of_equal_differences():
    a = jnp.asarray([97.2, 98.1, 96.9, 97.5])
    p = weights.paired_comparison(a, a[::-1])[2]
    np.testing.assert_allclose(p, stats.ttest_rel(a, a[::-1]).pvalue, rtol=1e-4)
    same = [float(x) for x in weights.paired_comparison(a, a)]
    assert same == [0, 0, 1]
    shifted = [float(x) for x in weights.paired_comparison(jnp.arange(4.0) + 2, jnp.arange(4.0))]
    assert shifted == [2, 0, 0]
    coarse = weights.paired_comparison(a.astype(jnp.bfloat16), jnp.zeros(4, jnp.bfloat16))
    assert coarse[0].dtype == jnp.float32


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_sparsities_that_are_refused(unchecked, sparsity):
    tree, key = params(), jax.random.key(0)
    for call in (
        lambda: weights.sample_node_masks(key, (2, 3, 2), sparsity=sparsity),
        lambda: weights.sample_edge_masks(key, tree, sparsity=sparsity),
        lambda: weights.node_sampler(tree, kernels=KERNELS, sparsity=sparsity),
    ):
        with pytest.raises(ValueError, match=rf"sparsity is {sparsity}; it must be in \[0, 1\)"):
            call()


def test_errors_name_argument_and_range(unchecked):
    tree, key = params(), jax.random.key(0)
    with pytest.raises(ValueError, match=r"layer_sizes is \(2, 3\): it has no hidden layer"):
        weights.sample_node_masks(key, (2, 3), sparsity=0.5)
    with pytest.raises(ValueError, match=r"layer_sizes is \(2, 0, 3\); every layer needs a node"):
        weights.sample_node_masks(key, (2, 0, 3), sparsity=0.5)
    for kernels, message in (
        (["l0/kernel"], "no hidden layer; give two or more"),
        (["l1/kernel", "l0/kernel"], r"do not chain: 'l1/kernel' has shape \(16, 8\)"),
        (["l0/kernel", "l9/kernel"], "kernels: no leaf 'l9/kernel'; the tree has l0/bias"),
        (["l0/kernel", "l0/bias"], r"'l0/bias' has shape \(16,\); it needs \(in, out\)"),
        (["l0/kernel", "l0/kernel"], "one of them is named twice"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.node_sampler(tree, kernels=kernels, sparsity=0.5)
    draw = weights.node_sampler(tree, kernels=KERNELS, sparsity=0.5)
    for changes, message in (
        ({"trials": 0}, "trials is 0; it must be at least 1"),
        ({"chunk": 0}, "chunk is 0; it must be at least 1"),
        ({"score_fn": lambda p, m: jnp.ones(2)}, r"score_fn gives float32\[2\]"),
        ({"score_fn": lambda p, m: jnp.int32(1)}, r"score_fn gives int32\[\]"),
        ({"score_fn": lambda p, m: 1.0}, "score_fn gives float; it must give one"),
    ):
        given = {"sampler": draw, "score_fn": score_by_sum, "trials": 3} | changes
        with pytest.raises(ValueError, match=message):
            weights.random_search(key, tree, **given)
    with pytest.raises(ValueError, match=r"a and b have shapes \(3,\) and \(2,\)"):
        weights.paired_comparison(jnp.ones(3), jnp.ones(2))
    with pytest.raises(ValueError, match="a paired comparison needs two seeds"):
        weights.paired_comparison(jnp.ones(1), jnp.ones(1))
