"""Mask laws of every pattern, and N:M against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding, PartitionSpec

import sparsejax as sj

SHAPE = (8, 12)
scores = hnp.arrays(
    np.float32,
    SHAPE,
    elements=st.sampled_from([0.0, 1.0, 1e-42, 2.0, np.inf, np.nan]) | st.floats(0, 9, width=32),
)
COUNTS = {  # pattern -> entries kept at density 0.5
    sj.Unstructured(): 48,
    sj.Unstructured(axis=-2): 48,
    sj.NM(2, 4): 48,
    sj.NM(1, 4, axis=-1): 24,
    sj.NM(2, 4, stride=2): 48,
    sj.NM(3, 6, axis=None, ties="lowest"): 48,
    sj.Block((2, 3)): 48,
    sj.Block((4,), pool="max"): 48,
    sj.Channel(-1): 48,
    sj.Channel(0): 48,
}
JITTED = {pattern: jax.jit(pattern.mask) for pattern in COUNTS}


def nm_by_sorting(a, n, m, ties):
    """N:M of the last axis by argsort, the definition."""
    a = np.where(np.isnan(a), np.inf, a).reshape(*a.shape[:-1], -1, m)
    if ties == "last":
        dropped = np.argsort(a, axis=-1, kind="stable")[..., : m - n]
    else:
        dropped = np.argsort(-a, axis=-1, kind="stable")[..., n:]
    mask = np.ones(a.shape, bool)
    np.put_along_axis(mask, dropped, False, axis=-1)
    return mask.reshape(*a.shape[:-2], -1)


@settings(max_examples=100, deadline=None)
@given(scores)
@pytest.mark.parametrize("ties", ["last", "lowest"])
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (5, 6), (4, 4)])
def test_nm_equals_the_stable_sort(ties, n, m, x):
    np.testing.assert_array_equal(
        sj.nm_mask(jnp.asarray(x), n, m, axis=-1, ties=ties), nm_by_sorting(x, n, m, ties)
    )


@settings(max_examples=40, deadline=None)
@given(scores)
@pytest.mark.parametrize("pattern", COUNTS, ids=str)
def test_counts_are_exact_whatever_the_scores(pattern, x):
    if isinstance(pattern, sj.Block | sj.Channel):
        x = np.nan_to_num(x, posinf=99.0)  # pooled: inf - inf has no order
    mask = JITTED[pattern](jnp.asarray(x), jnp.float32(0.5))
    assert mask.dtype == bool
    assert mask.shape == SHAPE
    assert int(mask.sum()) == COUNTS[pattern]


@pytest.mark.parametrize("pattern", COUNTS, ids=str)
def test_masks_are_idempotent_equivariant_to_scale_and_monotone(pattern):
    x = jax.random.uniform(jax.random.key(0), SHAPE, minval=0.1)
    half = pattern.mask(x, 0.5)
    np.testing.assert_array_equal(pattern.mask(jnp.where(half, x, 0.0), 0.5), half)
    np.testing.assert_array_equal(pattern.mask(4 * x, 0.5), half)
    if not isinstance(pattern, sj.NM):
        assert bool(jnp.all(pattern.mask(x, 0.25) <= half))
    np.testing.assert_array_equal(pattern.mask(x, 1), np.ones(SHAPE, bool))


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(12)), st.integers(0, 2**32 - 1))
def test_masks_follow_a_permutation_and_ignore_signs(order, seed):
    w = np.random.default_rng(seed).normal(size=SHAPE)  # no ties, in sums neither
    scores = jnp.abs(jnp.asarray(w, jnp.float32))
    order = jnp.asarray(order)
    for pattern in (sj.Unstructured(), sj.Unstructured(axis=-2), sj.NM(2, 4), sj.Channel()):
        mask = JITTED.get(pattern, jax.jit(pattern.mask))(scores, jnp.float32(0.5))
        moved = JITTED.get(pattern, jax.jit(pattern.mask))(scores[:, order], jnp.float32(0.5))
        np.testing.assert_array_equal(moved, mask[:, order])
    params = {"kernel": jnp.asarray(w, jnp.float32)}
    flipped = {"kernel": -params["kernel"]}
    for one, two in zip(sj.prune(params, 0.5), sj.prune(flipped, 0.5)):
        np.testing.assert_array_equal(jnp.abs(one["kernel"]), jnp.abs(two["kernel"]))


def test_one_element_leaves():
    x = jnp.ones((1, 1))
    for pattern in (sj.Unstructured(), sj.NM(1, 1), sj.Block((1, 1)), sj.Channel()):
        assert bool(pattern.mask(x, 0.1).all())


def test_axes_and_strides_of_nm():
    x = jax.random.uniform(jax.random.key(0), (8, 12))
    np.testing.assert_array_equal(sj.nm_mask(x, 1, 4).T, sj.nm_mask(x.T, 1, 4, axis=-1))
    kernel = jax.random.uniform(jax.random.key(1), (3, 3, 8, 5))  # [kh, kw, in, out]
    np.testing.assert_array_equal(sj.nm_mask(kernel, 2, 4)[1, 2], sj.nm_mask(kernel[1, 2], 2, 4))
    flat = sj.nm_mask(x, 2, 4, axis=None)
    np.testing.assert_array_equal(flat, sj.nm_mask(x.reshape(-1, 1), 2, 4).reshape(8, 12))
    strided = sj.nm_mask(x, 1, 4, stride=2)
    np.testing.assert_array_equal(strided[0::2], sj.nm_mask(x[0::2], 1, 4))


def test_many_members_in_a_group():
    x = jax.random.uniform(jax.random.key(0), (512, 2))
    assert int(sj.nm_mask(x, 100, 512).sum()) == 200


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (8, 0)])
def test_empty_leaves(shape):
    assert sj.nm_mask(jnp.zeros(shape), 2, 4).shape == shape
    for pattern in (sj.Unstructured(), sj.Block((2, 2)), sj.Channel()):
        assert pattern.mask(jnp.zeros(shape), 0.5).shape == shape


def test_unstructured_axes_are_per_output_and_per_layer():
    x = jax.random.uniform(jax.random.key(0), (3, 8, 4))
    np.testing.assert_array_equal(sj.Unstructured(-2).mask(x, 0.25).sum(1), np.full((3, 4), 2))
    np.testing.assert_array_equal(
        sj.Unstructured((-2, -1)).mask(x, 0.25)[1], sj.Unstructured().mask(x[1], 0.25)
    )


def test_blocks_pool_what_is_present():
    x = jnp.zeros((5, 5)).at[4, 4].set(3.0).at[0, 0].set(10.0)
    # means: the corner block of one entry scores 3, the first block 10 / 4
    mask = sj.Block((2, 2)).mask(x, 1 / 9)
    assert mask[4, 4]
    assert int(mask.sum()) == 1
    by_maximum = sj.Block((2, 2), pool="max").mask(x, 1 / 9)
    assert int(by_maximum[:2, :2].sum()) == 4
    leading = sj.Block((1,)).mask(jnp.arange(24.0).reshape(4, 3, 2), 0.5)
    np.testing.assert_array_equal(leading.all((1, 2)), [False, False, True, True])


def test_channels_go_whole():
    x = jnp.ones((4, 3)) * jnp.asarray([1.0, 3.0, 2.0])
    np.testing.assert_array_equal(sj.Channel().mask(x, 2 / 3)[0], [False, True, True])


def test_a_sharded_nm_mask_needs_no_communication(mesh):
    x = jax.random.normal(jax.random.key(0), (64, 32))
    sharding = NamedSharding(mesh, PartitionSpec("data", "model"))
    function = jax.jit(lambda s: sj.nm_mask(jnp.abs(s), 2, 4))
    sharded = jax.device_put(x, sharding)
    out = function(sharded)
    np.testing.assert_array_equal(out, function(x))
    text = function.lower(sharded).compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text


def test_vmap():
    x = jax.random.uniform(jax.random.key(0), (2, *SHAPE))
    for pattern in COUNTS:
        batched = jax.vmap(lambda s, p=pattern: p.mask(s, 0.5))(x)
        np.testing.assert_array_equal(batched[1], pattern.mask(x[1], 0.5))


def test_parse():
    assert sj.NM.parse("4:8") == sj.NM(4, 8)
    assert str(sj.NM(2, 4)) == "2:4"
    for text in ("2", "a:b", "2:4:8", "-1:4"):
        with pytest.raises(ValueError, match="it must look like 2:4"):
            sj.NM.parse(text)


def test_errors_name_argument_and_range(unchecked):
    x = jnp.ones((6, 10))
    with pytest.raises(ValueError, match="n is 5 and m is 4; allowed is 1 <= n <= m"):
        sj.NM(5, 4)
    with pytest.raises(ValueError, match="n is 0"):
        sj.nm_mask(x, 0, 2)
    with pytest.raises(ValueError, match="ties is 'first'; allowed"):
        sj.NM(2, 4, ties="first")
    with pytest.raises(ValueError, match="stride is 0"):
        sj.NM(2, 4, stride=0)
    with pytest.raises(ValueError, match=r"axis 0 .* has length 6, not a multiple of m = 4"):
        sj.nm_mask(x, 2, 4)
    with pytest.raises(ValueError, match=r"not a multiple of m \* stride = 4"):
        sj.nm_mask(x, 1, 2, stride=2)
    with pytest.raises(ValueError, match="axis 2 is not an axis"):
        sj.nm_mask(x, 2, 4, axis=2)
    with pytest.raises(TypeError, match="must be floating point, not int32"):
        sj.nm_mask(x.astype(jnp.int32), 1, 2)
    with pytest.raises(ValueError, match="density is None"):
        sj.Unstructured().mask(x)
    with pytest.raises(ValueError, match=r"density is 1.2; it must be in \[0, 1\]"):
        sj.Unstructured().mask(x, 1.2)
    with pytest.raises(ValueError, match="every size must be at least 1"):
        sj.Block((2, 0))
    with pytest.raises(ValueError, match="pool is 'sum'"):
        sj.Block((2,), pool="sum")
    with pytest.raises(ValueError, match="more axes than scores"):
        sj.Block((1, 1, 1)).mask(x, 0.5)
    with pytest.raises(ValueError, match="Channel: axis 3"):
        sj.Channel(3).mask(x, 0.5)
    with pytest.raises(ValueError, match="axis 5 is not an axis"):
        sj.Unstructured(axis=5).mask(x, 0.5)
