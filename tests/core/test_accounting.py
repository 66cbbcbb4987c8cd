"""Counts, operations and bytes against hand arithmetic."""

import jax
import jax.numpy as jnp
import pytest

import sparsejax as sj


def tree():
    w = jax.random.normal(jax.random.key(0), (8, 4))
    return {"embed": {"kernel": jnp.ones((10, 8))}, "fc": {"bias": jnp.zeros(4), "kernel": w}}


def test_sad_and_flips():
    first = {"w": jnp.asarray([[True, False], [True, True]]), "d": jnp.asarray(True)}
    second = {"w": jnp.asarray([[False, True], [True, True]]), "d": jnp.asarray(True)}
    assert sj.sad(first, second) == {"total": 2, "fraction": 0.5, "per_leaf": {"d": 0, "w": 2}}
    assert int(jax.jit(sj.flips)(first, second)) == 2
    assert sj.sad({"d": True}, {"d": True})["fraction"] == 0.0
    with pytest.raises(ValueError, match="masks do not have the structure"):
        sj.sad(first, {"w": second["w"]})


def test_nonzero_report():
    params = tree()
    masks = sj.make_masks(sj.magnitude(params), pattern=sj.NM(1, 4))
    leaves, total = sj.nonzero_report(sj.apply_masks(params, masks), masks)
    assert leaves == {"fc/kernel": (8, 32, 0.75)}
    assert total == (8, 32, 0.75)
    everything, (nonzeros, size, _) = sj.nonzero_report(params)
    assert everything["fc/bias"] == (0, 4, 1.0)
    assert (nonzeros, size) == (112, 116)


def test_the_summary_counts_operations_and_bytes():
    params = tree()
    masks = sj.make_masks(sj.magnitude(params), pattern=sj.NM(1, 4))
    card = sj.summarize(params, masks)
    assert card.size == 116
    assert card.density == 0.25
    assert card.flops == (64, 16)  # embeddings and biases multiply nothing
    assert card.bytes == (464, 4 * (80 + 4 + 8) + 4)
    text = str(card)
    for piece in ("fc/kernel", "8x4", "0.2500", "dense", "75.0% fewer", "simulated"):
        assert piece in text
    abstract = jax.eval_shape(tree)
    assert sj.summarize(abstract, masks).bytes == card.bytes
    assert sj.summarize(params, sj.dense_masks(params)).density == 1.0
