"""Lists of blocks: their transpose, their checks, and the way from a dense weight and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.block_sparse_matmul import check_lists, from_dense, to_dense, transpose_lists


def lists(seed, rows=6, room=4, columns=5):
    """Random lists; padding holds indices that do not exist."""
    rng = np.random.default_rng(seed)
    indices = np.stack([rng.permutation(columns)[:room] for _ in range(rows)])
    counts = rng.integers(0, room + 1, rows)
    indices[np.arange(room) >= counts[:, None]] = -7
    return jnp.asarray(indices, jnp.int32), jnp.asarray(counts, jnp.int32)


transpose = jax.jit(transpose_lists, static_argnames="num_columns")


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_transpose_lists_every_block_once_by_column(seed, counted):
    indices, counts = lists(seed)
    if not counted:
        indices, counts = jnp.maximum(indices, 0), None
    found = jax.tree.map(np.asarray, transpose(indices, counts, num_columns=5))
    indices = np.asarray(indices)
    limits = np.full(6, 4) if counts is None else np.asarray(counts)
    blocks = [(i, j) for i in range(6) for j in range(limits[i])]
    for column in range(5):
        at = slice(int(found.starts[column]), int(found.starts[column] + found.counts[column]))
        expected = [(i, j) for i, j in blocks if indices[i, j] == column]
        assert found.sources[at].tolist() == [i for i, _ in expected]
        assert found.slots[at].tolist() == [i * 4 + j for i, j in expected]
        assert np.all(found.owners[at] == column)
    assert int(found.counts.sum()) == len(blocks)
    assert np.all(np.diff(found.owners) >= 0)
    assert sorted(found.slots.tolist()) == list(range(24))


def test_lists_that_are_right_pass():
    for seed in range(3):
        check_lists(*lists(seed), num_columns=5)
    check_lists(jnp.asarray([[4, 0], [1, 2]]), num_columns=5)


WRONG = {
    "twice": ([[0, 1], [2, 2]], None, r"indices\[1\] names block 2 twice"),
    "below": ([[0, -1]], None, r"indices\[0\] names block -1; it must be in \[0, 3\)"),
    "above": ([[0, 1], [3, 0]], [2, 1], r"indices\[1\] names block 3; it must be in \[0, 3\)"),
    "count": ([[0, 1]], [3], r"counts\[0\] is 3; it must be in \[0, 2\]"),
    "negative": ([[0, 1]], [-1], r"counts\[0\] is -1; it must be in \[0, 2\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_lists_that_are_wrong_are_refused(case):
    indices, counts, message = WRONG[case]
    counts = None if counts is None else jnp.asarray(counts)
    with pytest.raises(ValueError, match=message):
        check_lists(jnp.asarray(indices), counts, num_columns=3)


def test_traced_lists_are_refused():
    with pytest.raises(TypeError, match="traced; check_lists reads them outside of jit"):
        jax.jit(lambda i: check_lists(i, num_columns=3))(jnp.zeros((1, 1), jnp.int32))


@pytest.mark.parametrize("of_blocks", [True, False])
def test_a_weight_comes_back_from_its_blocks(of_blocks):
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(6, 12)), jnp.float32)
    kept = rng.random((3, 4)) < 0.5
    kept[1] = False
    mask = np.repeat(np.repeat(kept, 2, 0), 3, 1)
    if not of_blocks:
        mask &= rng.random(mask.shape) < 0.7
        kept = np.any(mask.reshape(3, 2, 4, 3), axis=(1, 3))
    room = int(kept.sum(1).max())

    @jax.jit
    def pack(w, mask):
        return from_dense(w, mask, block=(2, 3), capacity=room)

    packed = pack(w, jnp.asarray(kept if of_blocks else mask))
    check_lists(packed.indices, packed.counts, num_columns=4)
    for row, count, expected in zip(packed.indices, packed.counts, np.asarray(kept)):
        assert row[:count].tolist() == np.flatnonzero(expected).tolist()
    assert int(packed.overflow) == 0
    back = to_dense(packed.values, packed.indices, packed.counts, num_columns=4)
    np.testing.assert_array_equal(back, np.where(mask, w, 0))
    gradient = jax.grad(lambda w: jnp.sum(pack(w, jnp.asarray(mask)).values ** 2))(w)
    np.testing.assert_array_equal(gradient, np.where(mask, 2 * w, 0))


def test_rows_without_room_lose_their_last_blocks_and_say_so():
    w = jnp.arange(1.0, 9.0).reshape(2, 4)
    mask = jnp.asarray([[True, True, False, True], [False, False, True, False]])
    packed = from_dense(w, mask, block=(1, 1), capacity=2)
    assert packed.indices[0].tolist() == [0, 1]
    assert packed.counts.tolist() == [2, 1]
    assert packed.values[..., 0, 0].tolist() == [[1, 2], [7, 0]]
    assert int(packed.overflow) == 1


W = jnp.ones((4, 6))
REFUSED = {
    "block": ({"block": (3, 2)}, W > 0, r"block is \(3, 2\); it must divide w of shape \(4, 6\)"),
    "no block": ({"block": (0, 2)}, W > 0, r"block is \(0, 2\)"),
    "mask": ({}, W.T > 0, r"mask has shape \(6, 4\); it must be \(4, 6\) or \(2, 3\)"),
    "no capacity": ({"capacity": 0}, W > 0, r"capacity is 0; it must be in \[1, 3\]"),
    "capacity": ({"capacity": 4}, W > 0, r"capacity is 4; it must be in \[1, 3\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_packed_is_refused(case):
    options, mask, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        from_dense(W, mask, **({"block": (2, 2), "capacity": 2} | options))
