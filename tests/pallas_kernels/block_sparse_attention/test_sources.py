"""The lists of block-sparse attention: their check, their merge, and the lists turned round."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.block_sparse_attention import (
    block_sparse_attention,
    merge_lse,
    transpose_lists,
    validate_sources,
)
from pallas_kernels.block_sparse_attention.reference import multiplicity
from pallas_kernels.block_sparse_attention.shapes import RAGGED, random_source
from pallas_kernels.block_sparse_attention.walks import by_key, key_tiles, segments

SHAPE = RAGGED["ragged"]
Q, SOURCE = random_source(SHAPE, 0)


def test_good_lists_pass_whatever_lies_beyond_the_counts():
    counts = SOURCE.counts.at[0, 1].set(1)
    beyond = SOURCE.starts.at[0, 1, 1:].set(-5)
    source = dataclasses.replace(SOURCE, counts=counts, starts=beyond)
    validate_sources(Q, [SOURCE, source], block_q=SHAPE.block_q)


def full(**changes):
    counts = jnp.full_like(SOURCE.counts, SHAPE.slots)
    return dataclasses.replace(SOURCE, counts=counts, **changes)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (full(starts=SOURCE.starts.at[1, 2, 0].set(-16)), r"starts has -16; a start is at least 0"),
        (dataclasses.replace(full(), counts=SOURCE.counts.at[0, 0].set(4)), "counts are .* to 4"),
        (dataclasses.replace(full(), counts=SOURCE.counts.at[0, 0].set(-1)), "counts are -1 to"),
        (full(starts=SOURCE.starts.at[0, 3, 2].set(65)), "starts has 65, which its width 16 does"),
        (
            full(starts=SOURCE.starts.at[1, 2].set(jnp.array([32, 0, 32]))),
            "lists token 32 twice, in row 1 for query tile 2",
        ),
        (
            full(starts=SOURCE.starts.at[1, 2].set(jnp.array([32, 0, 40])), aligned=False),
            "lists token 40 twice, in row 1 for query tile 2",
        ),
        (
            full(tile_mask=jnp.full_like(SOURCE.starts, 2), masks=jnp.ones((2, 16, 16), bool)),
            "tile_mask is 2 to 2; it must be -1 to 1",
        ),
    ],
)
def test_what_a_traced_call_cannot_see_is_named(source, error):
    with pytest.raises(ValueError, match=r"sources\[1\].*" + error):
        validate_sources(Q, [SOURCE, source], block_q=SHAPE.block_q)


def test_traced_lists_are_refused():
    with pytest.raises(TypeError, match=r"sources\[0\] is traced"):
        jax.jit(lambda s: validate_sources(Q, [s], block_q=16))(SOURCE)


def test_two_sources_may_list_a_token_and_it_counts_twice():
    source = full()
    validate_sources(Q, [source, source], block_q=SHAPE.block_q)
    once, lse = block_sparse_attention(Q, [source], block_q=16)
    twice, doubled = block_sparse_attention(Q, [source, source], block_q=16)
    np.testing.assert_allclose(twice, once, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(doubled, lse + np.log(2), rtol=1e-6)


def test_merged_parts_are_the_joint_softmax_with_its_gradient():
    other = random_source(SHAPE, 1)[1]

    def joint(q):
        return block_sparse_attention(q, [SOURCE, other], block_q=16)

    def merged(q):
        parts = [block_sparse_attention(q, [source], block_q=16) for source in (SOURCE, other)]
        return merge_lse(parts)

    found, pull = jax.vjp(merged, Q)
    expected, pull_joint = jax.vjp(joint, Q)
    up = jax.tree.map(jnp.cos, found)
    up = (up[0], jnp.where(jnp.isfinite(found[1]), up[1], 0))
    for a, b in zip((*found, *pull(up)), (*expected, *pull_joint(up))):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert np.isneginf(found[1]).any()  # rows that no part sees


def test_nothing_to_merge_is_refused():
    with pytest.raises(ValueError, match="parts is empty"):
        merge_lse([])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), aligned=st.booleans())
def test_lists_turned_round_name_the_same_pairs(seed, aligned):
    shape = dataclasses.replace(SHAPE, keys=80)  # whole tiles
    source = random_source(shape, seed)[1]
    if not aligned:
        shift = np.random.default_rng(seed).integers(0, 16, source.starts.shape)
        source = dataclasses.replace(source, starts=source.starts + shift, aligned=False)
    n, nq = key_tiles(source), source.starts.shape[1]
    q_idx, q_count = transpose_lists(source, n, nq)
    times = np.asarray(multiplicity(source, SHAPE.key_heads, nq * SHAPE.block_q, SHAPE.block_q))
    touched = times.reshape(SHAPE.key_heads, nq, SHAPE.block_q, n, 16).any(axis=(2, 4))
    for h in range(SHAPE.key_heads):
        for tile in range(n):
            found = list(q_idx[h, tile, : q_count[h, tile]])
            assert found == list(np.flatnonzero(touched[h, :, tile]))
            assert not q_idx[h, tile, q_count[h, tile] :].any()


def test_lists_that_do_not_fit_show_by_their_count():
    source = full(starts=jnp.zeros_like(SOURCE.starts))
    q_idx, q_count = transpose_lists(source, key_tiles(source), 2)
    assert q_idx.shape == (2, 5, 2)
    assert (q_count[:, 0] == 4).all()
    assert (q_idx[:, 0] == jnp.array([0, 1])).all()


def test_a_walk_by_key_takes_every_pair_once_and_marks_the_ends_of_tiles():
    walk = by_key(SOURCE)
    n = key_tiles(SOURCE)
    begins = segments(walk, n)
    for h in range(SHAPE.key_heads):
        pairs = {
            (t, int(start) // 16)
            for t in range(SOURCE.starts.shape[1])
            for start in SOURCE.starts[h, t, : SOURCE.counts[h, t]]
        }
        live = np.asarray(walk.flags[h]) & 1 > 0
        found = list(zip(np.asarray(walk.queries[h])[live], np.asarray(walk.keys[h])[live]))
        assert sorted(found) == sorted(pairs)
        keys = [key for _, key in found]
        assert keys == sorted(keys)
        for tile in range(n):
            inside = np.asarray(walk.keys[h, begins[h, tile] : begins[h, tile + 1]])
            assert (inside == tile).all()
            assert len(inside) == keys.count(tile)
            if len(inside):
                assert walk.flags[h, begins[h, tile]] & 2
                assert walk.flags[h, begins[h, tile + 1] - 1] & 4
