"""SparseGPT: the vectors, a plain reference, and what its updates must leave true."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import sparsejax as sj
from sparsejax import weights

SHAPE = (24, 10)
sparsegpt = jax.jit(weights.sparsegpt, static_argnames=("sparsity", "pattern", "block", "damp"))
gram_of = jax.jit(weights.hessian)


@functools.cache
def layer(*, dead=False, dtype="float32"):
    """A kernel, inputs that are correlated, and their Hessian."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (6, 12, 24)) @ jax.random.normal(keys[1], (24, 24)) * 0.3
    x = x.at[..., 5].set(0.0) if dead else x
    w = jax.random.normal(keys[2], SHAPE).astype(dtype)
    return w, x, gram_of(x).value


def upper_factor(gram, damp=0.01):
    """The factor in double precision, through the inverse."""
    gram = np.array(gram, np.float64)
    index = np.arange(len(gram))
    gram[index, index] = np.where(gram[index, index] == 0, 1, gram[index, index])
    gram[index, index] += damp * gram[index, index].mean()
    return np.linalg.cholesky(np.linalg.inv(gram)).T


def one_by_one(w, gram, *, block, sparsity=None, pruned=0, m=0):
    """Algorithm 1 with sorts, input by input, in double precision."""
    u = upper_factor(gram)
    w = np.array(w, np.float64)
    w[np.diagonal(gram) == 0] = 0
    mask = np.ones(w.shape, bool)
    for a in range(0, len(w), block):
        b = min(a + block, len(w))
        if sparsity is not None:
            score = (w[a:b] / np.diagonal(u)[a:b, None]) ** 2
            mask[a:b] = score > np.sort(score, axis=None)[int(score.size * sparsity)]
        for i in range(a, b):
            if m and i % m == 0:
                score = (w[i : i + m] / np.diagonal(u)[i : i + m, None]) ** 2
                lowest = np.argsort(score, axis=0, kind="stable")[:pruned]
                np.put_along_axis(mask[i : i + m], lowest, False, axis=0)
            error = np.where(mask[i], 0, w[i]) / u[i, i]
            w[i + 1 :] -= u[i, i + 1 :, None] * error
            w[i] = np.where(mask[i], w[i], 0)
    return w, mask


# the vectors


def options(case, family):
    """Settings of a family from its suffixes."""
    block = int(case[f"{family}_blocksize"])
    if f"{family}_group" in case:
        m = int(case[f"{family}_group"])
        kept = m - int(case[f"{family}_pruned_per_group"])
        if f"{family}_sparsity" in case:
            case.ignore(f"{family}_sparsity", reason="the groups decide")
        return {"pattern": sj.NM(kept, m), "block": block}
    return {"sparsity": float(case[f"{family}_sparsity"]), "block": block}


@pytest.mark.vectors
def test_vectors(reference):
    file = reference("dsnot")
    families = 0
    for case in file.cases("case"):
        names = case.names()
        gram = weights.hessian(jnp.asarray(case["x"])).value
        wanted = case["hessian"]
        np.testing.assert_allclose(gram, wanted, rtol=2e-6, atol=2e-6 * np.abs(wanted).max())
        w = jnp.asarray(case["weight"].T)
        for name in names:
            if name.startswith("sparsegpt") and name.endswith("_weight"):
                family = name.removesuffix("_weight")
                new, mask = weights.sparsegpt(w, jnp.asarray(wanted), **options(case, family))
                np.testing.assert_array_equal(mask.T, case[name] != 0)
                np.testing.assert_allclose(new.T, case[name], rtol=5e-5, atol=5e-5)
                families += 1
            elif name.split("_")[0] in ("wanda", "dsnot") or name.startswith("x_"):
                case.ignore(name, reason="compared in test_dsnot.py")
    assert families


# the algorithm


def test_equals_the_algorithm_written_out():
    for dead in (False, True):
        w, _, gram = layer(dead=dead)
        for settings, plain in (
            ({"sparsity": 0.6, "block": 10}, {"sparsity": 0.6, "block": 10}),  # 10 + 10 + 4 inputs
            ({"pattern": sj.NM(1, 4), "block": 8}, {"pruned": 3, "m": 4, "block": 8}),
        ):
            new, mask = sparsegpt(w, gram, **settings)
            wanted, kept = one_by_one(w, gram, **plain)
            np.testing.assert_array_equal(mask, kept)
            np.testing.assert_allclose(new, wanted, atol=2e-4)
            assert not np.asarray(new)[~np.asarray(mask)].any()  # exactly 0
            assert not dead or not np.asarray(new[5]).any()


def test_the_score_is_that_of_the_first_block():
    w, _, gram = layer(dead=True)
    diagonal = np.diagonal(upper_factor(gram))
    wanted = (np.where(np.arange(24) == 5, 0, np.asarray(w).T).T / diagonal[:, None]) ** 2
    score = weights.sparsegpt_score(w, gram)
    np.testing.assert_allclose(score, wanted, rtol=1e-3)
    assert not np.asarray(score[5]).any()
    _, mask = sparsegpt(w, gram, sparsity=0.5)  # one block: nothing was updated before
    threshold = np.sort(np.asarray(score), axis=None)[120]
    np.testing.assert_array_equal(mask, np.asarray(score) > threshold)


def test_later_weights_make_up_for_what_goes():
    w, x, gram = layer()

    def loss(new):
        return float(jnp.sum((x @ (w - new)) ** 2) / jnp.sum((x @ w) ** 2))

    for amount in ({"sparsity": 0.5}, {"pattern": sj.NM(2, 4)}):
        new, mask = sparsegpt(w, gram, **amount)
        wanda = weights.wanda_mask(w, weights.activation_stats(x), **amount)
        assert loss(new) < 0.8 * loss(jnp.where(wanda, w, 0.0))
        assert loss(new) < 0.8 * loss(jnp.where(mask, w, 0.0))


def test_counts():
    w, _, gram = layer()
    new, mask = sparsegpt(w, gram, sparsity=0.0)  # the identity
    np.testing.assert_array_equal(new, w)
    assert bool(mask.all())
    _, mask = sparsegpt(w, gram, sparsity=0.3, block=10)
    pruned = [int((~mask[a:b]).sum()) for a, b in ((0, 10), (10, 20), (20, 24))]
    assert pruned == [int(100 * 0.3) + 1, int(100 * 0.3) + 1, int(40 * 0.3) + 1]
    for ties in ("last", "lowest"):  # whatever the pattern's own rule
        pattern = sj.NM(2, 4, ties=ties)
        _, mask = sparsegpt(jnp.ones((8, 3)), jnp.eye(8), pattern=pattern)
        np.testing.assert_array_equal(mask[:, 0], [False, False, True, True] * 2)


def test_narrow_weights_are_pruned_in_single_precision():
    w, _, gram = layer(dtype="bfloat16")
    new, mask = sparsegpt(w, gram, sparsity=0.5)
    wide, wide_mask = sparsegpt(w.astype(jnp.float32), gram, sparsity=0.5)
    assert new.dtype == jnp.bfloat16
    np.testing.assert_array_equal(mask, wide_mask)
    np.testing.assert_array_equal(new, wide.astype(jnp.bfloat16))
    half, half_mask = sparsegpt(w, gram.astype(jnp.bfloat16), sparsity=0.5)  # widened first
    assert bool(jnp.isfinite(half).all())
    assert float((half_mask == mask).mean()) > 0.95


def test_sharded_outputs_give_the_same_weights(mesh):
    w, _, gram = layer()
    spread = NamedSharding(mesh, PartitionSpec(None, "model"))
    for amount in ({"pattern": sj.NM(2, 4)}, {"sparsity": 0.5}):
        new, mask = sparsegpt(jax.device_put(w, spread), gram, **amount)
        wanted, kept = sparsegpt(w, gram, **amount)
        np.testing.assert_array_equal(mask, kept)
        np.testing.assert_allclose(new, wanted, atol=1e-5)


def test_a_hessian_without_a_factor_is_an_error():
    w, _, gram = layer()
    for broken in (-gram, gram.at[0, 0].set(jnp.nan)):
        with pytest.raises(FloatingPointError, match="hessian has no Cholesky factorisation"):
            weights.sparsegpt(w, broken, sparsity=0.5)
        with pytest.raises(FloatingPointError, match="hessian has no Cholesky factorisation"):
            weights.sparsegpt_score(w, broken)
        assert bool(jnp.isnan(sparsegpt(w, broken, sparsity=0.5)[0]).any())  # not unseen


def test_errors(unchecked):
    w, _, gram = layer()
    for options, message in (
        ({}, "one of sparsity and pattern is needed, neither given"),
        ({"sparsity": 0.5, "pattern": sj.NM(2, 4)}, "is needed, both given"),
        ({"sparsity": 1.0}, r"sparsity is 1.0; it must be in \[0, 1\)"),
        ({"sparsity": -0.1}, r"sparsity is -0.1; it must be in \[0, 1\)"),
        ({"pattern": sj.NM(2, 5)}, "w has 24 inputs, not a multiple of m = 5"),
        ({"pattern": sj.NM(2, 4), "block": 6}, "block is 6, not a multiple of m = 4"),
        ({"pattern": sj.NM(2, 5, axis=-1)}, "pattern has axis -1 and stride 1; its groups must"),
        ({"pattern": sj.NM(2, 4, stride=2)}, "pattern has axis -2 and stride 2; its groups must"),
        ({"sparsity": 0.5, "block": 0}, "block is 0; it must be at least 1"),
        ({"sparsity": 0.5, "damp": -1.0}, "damp is -1.0; it must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.sparsegpt(w, gram, **options)
    with pytest.raises(ValueError, match=r"hessian has shape \(23, 23\); w has 24 inputs"):
        weights.sparsegpt(w, gram[1:, 1:], sparsity=0.5)
