"""Densities, operations, bytes, exploration and similarity: the handbook's formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax as sj

EXACT = {"rtol": 1e-12, "atol": 0}


@pytest.mark.vectors
def test_ten_lessons_vectors(reference):
    case = reference("ten_lessons").whole()
    count = sum(name.startswith("mask_seq") for name in case.names())
    names = [f"layer{i}" for i in range(count)]
    snapshots = [jnp.asarray(case[f"mask_seq{i}"].astype(bool)) for i in range(count)]
    positions = {n: case[f"layer{i}_output_positions"] for i, n in enumerate(names)}
    steps = len(snapshots[0])
    history = [dict(zip(names, [s[t] for s in snapshots])) for t in range(steps)]
    first, last = history[0], history[-1]

    report = sj.density_report(last, last, where=".")
    np.testing.assert_allclose([report.layers[n][2] for n in names], case["layer_density"], **EXACT)
    np.testing.assert_allclose(report.sparsity, case["global_sparsity"], **EXACT)
    flops = sj.flops_report(last, positions)
    np.testing.assert_allclose(
        [flops.sparse, flops.dense], [case["flops_sparse"], case["flops_dense"]], **EXACT
    )
    cost = functools.partial(sj.training_flops, sparse=flops.sparse, dense=flops.dense)
    for method in ("dense", "static", "snfs"):
        np.testing.assert_allclose(cost(method), case[f"train_flops_{method}"], **EXACT)
    rigl = cost("rigl", interval=case["update_interval"])
    np.testing.assert_allclose(rigl, case["train_flops_rigl"], **EXACT)
    total, begin, end = case["gradual_steps"].tolist()
    final = case["gradual_final_sparsity"]
    progress = np.clip((np.arange(total) - begin) / (end - begin), 0, 1)
    sparsities = np.where(np.arange(total) < begin, 0, final * (1 - (1 - progress) ** 3))
    gradual = cost("gradual", sparsities=sparsities.tolist())
    np.testing.assert_allclose(gradual, case["train_flops_gradual_uniform"], **EXACT)
    for name, key in (("dense", "dense_f32"), ("bitmask", "bitmask_f32"), ("csr", "csr_int32")):
        assert sj.storage_bytes(last, name) == case[f"bytes_{key}"]
    np.testing.assert_allclose(
        [sj.fraction_groups_2_of_4(last[n]) for n in names], case["fraction_groups_2_of_4"], **EXACT
    )
    np.testing.assert_allclose(
        [sj.block_occupancy(last[n]) for n in names], case["block4x1_occupancy"], **EXACT
    )
    ever = functools.reduce(sj.exploration_update, history)
    np.testing.assert_allclose(sj.exploration_rate(ever), case["exploration_rate"], **EXACT)
    np.testing.assert_allclose(
        [sj.exploration_rate({n: ever[n]}) for n in names], case["exploration_rate_layer"], **EXACT
    )
    for function, key in (
        (sj.mask_jaccard, "mask_jaccard"),
        (sj.mask_hamming, "mask_hamming"),
        (sj.mask_overlap, "mask_overlap_coefficient"),
    ):
        np.testing.assert_allclose(function(first, last), case[key], **EXACT)


def masks():
    mask = jax.random.bernoulli(jax.random.key(0), 0.3, (8, 6))
    return {"kernel": mask, "bias": jnp.asarray(True)}


SHAPES = {"kernel": jnp.zeros((8, 6)), "bias": jnp.zeros(6)}


def test_dense_leaves_count_when_their_shapes_are_known():
    tree = masks()
    kept = int(tree["kernel"].sum())
    assert sj.storage_bytes(tree, "bitmask", shapes=SHAPES) == 4 * kept + 6 + 24
    flops = sj.flops_report(tree, {"kernel": 10, "bias": 1}, shapes=SHAPES)
    assert (flops.sparse, flops.dense) == (20 * kept + 12, 960 + 12)
    assert float(sj.exploration_rate(tree)) == pytest.approx(kept / 48)
    assert float(sj.exploration_rate(tree, shapes=SHAPES)) == pytest.approx((kept + 6) / 54)
    report = sj.density_report(SHAPES, tree)
    assert report.prunable_density == pytest.approx(kept / 48)
    assert report.density == pytest.approx((kept + 6) / 54)


def test_granularities_that_a_mask_satisfies():
    g = sj.Granularity
    ones = jnp.ones((8, 6), bool)
    assert sj.satisfied_granularities(ones) == {g.UNSTRUCTURED, g.BLOCK, g.CHANNEL}
    nm = sj.nm_mask(jax.random.uniform(jax.random.key(0), (8, 6)), 2, 4)
    assert sj.satisfied_granularities(nm) == {g.UNSTRUCTURED, g.N_M}
    blocks = jnp.repeat(jnp.asarray([[True, False] * 3, [False, True] * 3]), 4, axis=0)
    assert sj.satisfied_granularities(blocks) == {g.UNSTRUCTURED, g.BLOCK}


def test_shuffling_keeps_the_counts():
    tree = masks()
    mixed = jax.jit(sj.shuffle_within_layer)(jax.random.key(3), tree)
    assert int(mixed["kernel"].sum()) == int(tree["kernel"].sum())
    assert sj.compare_masks(mixed, tree).changed > 0
    assert mixed["bias"].ndim == 0


def test_similarities_work_under_jit():
    a, b = masks(), {"kernel": jnp.ones((8, 6), bool), "bias": jnp.asarray(True)}
    share = float(a["kernel"].mean())
    assert float(jax.jit(sj.mask_jaccard)(a, b)) == pytest.approx(share)
    assert float(jax.jit(sj.mask_hamming)(a, b)) == pytest.approx(1 - share)
    assert float(jax.jit(sj.mask_overlap)(a, b)) == pytest.approx(1)
    empty = {"kernel": jnp.zeros((8, 6), bool), "bias": jnp.asarray(True)}
    assert np.isnan(jax.jit(sj.mask_jaccard)(empty, empty))


@pytest.mark.parametrize(("target", "width"), [(52, 5), (55, 5), (56, 6), (1, 1), (10**9, 65536)])
def test_the_nearest_width(target, width):
    assert sj.match_dense_width(lambda w: 10 * w, target) == width


def test_a_card_states_every_axis():
    card = sj.SparsityCard(
        what=sj.WhatIsSparse.WEIGHTS,
        granularity=sj.Granularity.UNSTRUCTURED,
        timing=sj.Timing.BEFORE,
        path=sj.TrainingPath.SPARSE_TO_SPARSE,
        dynamics=sj.MaskDynamics.STATIC,
        allocation=sj.Allocation.ERK,
        criterion=sj.Criterion.RANDOM,
        gradient=sj.GradientRule.MASKED,
        seeds=5,
        budget="500 steps",
        simulated=True,
    )
    assert card.to_dict()["path"] == "sparse_to_sparse"
    assert "| allocation | erk |" in card.to_markdown()


def test_errors_name_argument_and_range(unchecked):
    tree = masks()
    with pytest.raises(ValueError, match="output_positions: 'x' matches no leaf"):
        sj.flops_report(tree, {"kernel": 1, "x": 1})
    with pytest.raises(ValueError, match="output_positions has no entry for 'kernel'"):
        sj.flops_report(tree, {})
    with pytest.raises(ValueError, match="shapes is needed: the mask of 'bias'"):
        sj.flops_report(tree, {"kernel": 1, "bias": 1})
    with pytest.raises(ValueError, match="shapes is needed: the mask of 'bias'"):
        sj.storage_bytes(tree, "dense")
    with pytest.raises(ValueError, match="format is 'zip'"):
        sj.storage_bytes(tree, "zip")
    with pytest.raises(ValueError, match="interval is 0; rigl needs at least 1"):
        sj.training_flops("rigl", sparse=1.0, dense=2.0, interval=0)
    with pytest.raises(ValueError, match="interval is None"):
        sj.training_flops("rigl", sparse=1.0, dense=2.0)
    with pytest.raises(ValueError, match="sparsities is missing"):
        sj.training_flops("gradual", sparse=1.0, dense=2.0)
    with pytest.raises(ValueError, match="method is 'x'; allowed are dense"):
        sj.training_flops("x", sparse=1.0, dense=2.0)
    with pytest.raises(ValueError, match="low is 3 and high 2"):
        sj.match_dense_width(lambda w: w, 5, low=3, high=2)
    with pytest.raises(ValueError, match="there is nothing to count"):
        sj.exploration_rate({"bias": jnp.asarray(True)})
    with pytest.raises(ValueError, match="there is nothing to compare"):
        sj.mask_jaccard({"b": jnp.asarray(True)}, {"b": jnp.asarray(True)})
    empty = {"kernel": jnp.zeros((8, 6), bool)}
    with pytest.raises(ValueError, match="the masks are empty"):
        sj.mask_overlap(empty, empty)
    with pytest.raises(ValueError, match=r"have shapes \(8, 6\) and \(4, 6\)"):
        sj.mask_hamming(empty, {"kernel": jnp.zeros((4, 6), bool)})
    with pytest.raises(ValueError, match="is float32; it must be bool"):
        sj.mask_hamming(empty, {"kernel": jnp.zeros((8, 6))})
    with pytest.raises(ValueError, match=r"axis -1 of shape \(8, 3\) holds no group of 4"):
        sj.fraction_groups_2_of_4(jnp.ones((8, 3), bool))
    with pytest.raises(ValueError, match=r"block is \(16, 1\); the mask is 8 rows x 6"):
        sj.block_occupancy(empty["kernel"], (16, 1))
