"""One-shot pruning against numpy: sorts, ties, and statistics of calibration inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import sparsejax as sj
from sparsejax import weights

SHAPE = (24, 10)


def kernel(key=0, *, ties=False):
    w = jax.random.normal(jax.random.key(key), SHAPE)
    return jnp.round(w * 2) / 2 if ties else w


def inputs(key, sequences, tokens, width=24):
    x = jax.random.normal(jax.random.key(key), (sequences, tokens, width))
    return x * jnp.linspace(0.1, 3.0, width) + 0.5


collect = jax.jit(weights.activation_stats)
magnitude_mask = jax.jit(
    weights.magnitude_mask, static_argnames=("sparsity", "pattern", "inclusive")
)
wanda_mask = jax.jit(weights.wanda_mask, static_argnames=("sparsity", "pattern"))


def stats(key=7):
    return collect(inputs(key, 3, 5))


# statistics


def test_statistics_are_sums_per_sequence():
    x = np.asarray(inputs(0, 4, 6), np.float64)
    got = weights.activation_stats(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got.sum_sq, (x**2).sum((0, 1)) / 4, rtol=1e-5)
    np.testing.assert_allclose(got.sum, x.sum((0, 1)) / 4, rtol=1e-5)
    np.testing.assert_allclose(got.var, x.var(axis=1).mean(0), rtol=1e-5)
    assert (got.n_seq, got.n_tok) == (4, 24)
    narrow = collect(jnp.asarray(x, jnp.bfloat16))
    assert {v.dtype for v in narrow[:3]} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(narrow.sum_sq, got.sum_sq, rtol=0.02)


def test_a_shift_between_sequences_is_no_variance():
    x = inputs(0, 2, 6)
    shifted = x + jnp.asarray([0.0, 100.0])[:, None, None]
    np.testing.assert_allclose(collect(shifted).var, collect(x).var, rtol=1e-3)
    dead = collect(x.at[..., 3].set(0.0))
    assert float(dead.sum_sq[3]) == float(dead.var[3]) == 0.0


def test_merged_statistics_are_those_of_all_sequences():
    x = inputs(0, 6, 5)
    parts = [collect(part) for part in (x[:1], x[1:4], x[4:])]
    left = weights.merge_stats(weights.merge_stats(parts[0], parts[1]), parts[2])
    right = weights.merge_stats(parts[0], jax.jit(weights.merge_stats)(parts[1], parts[2]))
    for merged in (left, right):
        for one, two in zip(merged[:3], collect(x)[:3]):
            np.testing.assert_allclose(one, two, rtol=1e-5)
        assert (int(merged.n_seq), int(merged.n_tok)) == (6, 30)


def test_ragged_sequences_weigh_the_variance_by_tokens():
    long, short = inputs(1, 2, 9), inputs(2, 3, 4)
    merged = weights.merge_stats(collect(long), collect(short))
    rows = [np.asarray(s, np.float64) for s in (*long, *short)]
    np.testing.assert_allclose(merged.sum_sq, sum((r**2).sum(0) for r in rows) / 5, rtol=1e-5)
    np.testing.assert_allclose(merged.sum, sum(r.sum(0) for r in rows) / 5, rtol=1e-5)
    np.testing.assert_allclose(merged.var, sum(len(r) * r.var(0) for r in rows) / 30, rtol=1e-5)
    assert (merged.n_seq, merged.n_tok) == (5, 30)


# masks


def magnitude_by_sorting(w, sparsity, inclusive):
    score = np.abs(np.asarray(w).T).reshape(-1)  # PyTorch's order
    count = int(score.size * sparsity)
    if inclusive:
        return (score > np.sort(score)[count]).reshape(w.T.shape).T
    kept = np.ones(score.size, bool)
    kept[np.argsort(score, kind="stable")[:count]] = False
    return kept.reshape(w.T.shape).T


@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_magnitude_is_a_sort_of_the_whole_matrix(ties, inclusive):
    w = kernel(ties=ties)
    for sparsity in (0.0, 0.33, 0.7):
        mask = magnitude_mask(w, sparsity=sparsity, inclusive=inclusive)
        np.testing.assert_array_equal(mask, magnitude_by_sorting(w, sparsity, inclusive))
        count = int(240 * sparsity)
        if not inclusive:
            assert int((~mask).sum()) == count
        elif not ties:
            assert int((~mask).sum()) == count + 1  # one more than asked for
        else:
            assert int((~mask).sum()) > count + 1


def test_wanda_is_a_sort_of_every_output():
    for ties in (False, True):
        w = kernel(1, ties=ties)
        of_inputs = stats()
        if ties:
            of_inputs = of_inputs._replace(sum_sq=jnp.ones(24))
        score = np.abs(np.asarray(w)) * np.sqrt(np.asarray(of_inputs.sum_sq))[:, None]
        for sparsity in (0.0, 0.5, 0.61):
            mask = wanda_mask(w, of_inputs, sparsity=sparsity)
            wanted = np.ones(SHAPE, bool)
            order = np.argsort(score, axis=0, kind="stable")[: int(24 * sparsity)]
            np.put_along_axis(wanted, order, False, axis=0)
            np.testing.assert_array_equal(mask, wanted)
            np.testing.assert_array_equal((~mask).sum(0), np.full(10, int(24 * sparsity)))


def test_wanda_weighs_by_the_inputs_and_magnitude_does_not():
    w = jnp.asarray([[1.0, 1.0], [0.6, 0.6], [0.5, 0.5], [0.4, 0.4]])
    of_inputs = stats()._replace(sum_sq=jnp.asarray([0.01, 1.0, 1.0, 4.0]))
    wanda = wanda_mask(w, of_inputs, sparsity=0.5)
    np.testing.assert_array_equal(wanda[:, 0], [False, True, False, True])
    np.testing.assert_array_equal(wanda, wanda_mask(w, of_inputs, pattern=sj.NM(2, 4)))
    np.testing.assert_array_equal(magnitude_mask(w, sparsity=0.5)[:, 0], [True, True, False, False])


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_groups_prune_their_smallest_the_lowest_index_first(n, m):
    w = kernel(2, ties=True)
    flat = stats()._replace(sum_sq=jnp.ones(24))
    groups = np.abs(np.asarray(w)).reshape(24 // m, m, 10)
    wanted = np.ones(groups.shape, bool)
    np.put_along_axis(wanted, np.argsort(groups, 1, kind="stable")[:, : m - n], False, axis=1)
    wanted = wanted.reshape(SHAPE)
    np.testing.assert_array_equal(magnitude_mask(w, pattern=sj.NM(n, m)), wanted)
    for pattern in (sj.NM(n, m), sj.NM(n, m, ties="lowest")):  # whatever its own rule
        np.testing.assert_array_equal(wanda_mask(w, flat, pattern=pattern), wanted)
    equal = wanda_mask(jnp.ones(SHAPE), flat, pattern=sj.NM(n, m))
    np.testing.assert_array_equal(equal[:m, 0], np.arange(m) >= m - n)


def test_other_axes_and_strides_are_those_of_the_pattern():
    w, of_inputs = kernel(3), stats()
    score = np.abs(np.asarray(w)) * np.sqrt(np.asarray(of_inputs.sum_sq))[:, None]
    along = wanda_mask(w, of_inputs, pattern=sj.NM(2, 5, axis=-1))
    np.testing.assert_array_equal(along, sj.NM(2, 5, axis=-1).mask(jnp.asarray(score)))
    strided = wanda_mask(w, of_inputs, pattern=sj.NM(2, 4, stride=6))
    np.testing.assert_array_equal(strided.reshape(4, 6, 10).sum(0), np.full((6, 10), 2))


def test_narrow_kernels_are_ranked_in_single_precision():
    # equal in bfloat16 once multiplied, different in float32
    w = jnp.asarray([[1.0], [1.0], [1.0], [1.0]], jnp.bfloat16)
    of_inputs = stats()._replace(sum_sq=jnp.asarray([1.003, 1.002, 1.001, 1.0]))
    mask = wanda_mask(w, of_inputs, pattern=sj.NM(2, 4))
    np.testing.assert_array_equal(mask[:, 0], [True, True, False, False])
    assert int(magnitude_mask(w, sparsity=0.5).sum()) == 2


def test_masks_have_their_size_also_with_infinities_and_nan():
    w = kernel().at[:3, :3].set(jnp.asarray([[jnp.nan], [jnp.inf], [-jnp.inf]]))
    assert int(magnitude_mask(w, sparsity=0.5).sum()) == 120
    np.testing.assert_array_equal(wanda_mask(w, stats(), sparsity=0.5).sum(0), [12] * 10)


def test_layers_and_experts_are_batched():
    w = jnp.stack([kernel(0), kernel(1)])
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), stats(1)[:3], stats(2)[:3])

    @jax.vmap
    def prune(w, sums):
        of_inputs = weights.ActivationStats(*sums, n_seq=3, n_tok=15)
        return (
            wanda_mask(w, of_inputs, sparsity=0.5),
            magnitude_mask(w, sparsity=0.5),
        )

    wanda, magnitude = prune(w, both)
    for i in range(2):
        np.testing.assert_array_equal(wanda[i], wanda_mask(w[i], stats(i + 1), sparsity=0.5))
        np.testing.assert_array_equal(magnitude[i], magnitude_mask(w[i], sparsity=0.5))


def test_sharded_kernels_get_the_same_masks(mesh):
    w = kernel()
    sharded = jax.device_put(w, NamedSharding(mesh, PartitionSpec("data", "model")))

    @jax.jit
    def prune(w, of_inputs):
        return (
            magnitude_mask(w, sparsity=0.5),
            wanda_mask(w, of_inputs, sparsity=0.5),
        )

    for one, two in zip(prune(sharded, stats()), prune(w, stats())):
        np.testing.assert_array_equal(one, two)


def test_errors_name_argument_and_range():
    w, of_inputs = kernel(), stats()
    for prune in (
        weights.magnitude_mask,
        lambda w, **options: weights.wanda_mask(w, of_inputs, **options),
    ):
        with pytest.raises(ValueError, match="one of sparsity and pattern is needed, neither"):
            prune(w)
        with pytest.raises(ValueError, match="one of sparsity and pattern is needed, both given"):
            prune(w, sparsity=0.5, pattern=sj.NM(2, 4))
        for sparsity in (-0.1, 1.0):
            message = rf"sparsity is {sparsity}; it must be in \[0, 1\)"
            with pytest.raises(ValueError, match=message):
                prune(w, sparsity=sparsity)
        with pytest.raises(ValueError, match="length 24, not a multiple of m = 5"):
            prune(w, pattern=sj.NM(2, 5))
    with pytest.raises(ValueError, match="stats are of 24 inputs, w has 10"):
        weights.wanda_mask(w.T, of_inputs, sparsity=0.5)
    for shape in ((0, 5, 4), (3, 0, 4)):
        with pytest.raises(ValueError, match=r"there are no calibration samples"):
            weights.activation_stats(jnp.zeros(shape))


def test_statistics_of_two_widths_do_not_merge():
    narrow = weights.activation_stats(inputs(0, 1, 2, width=8))
    with pytest.raises(ValueError, match="a has 24 inputs, b has 8"):
        weights.merge_stats(stats(), narrow)
