"""Scores against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax as sj


def test_magnitude_is_wide_and_leaves_integers_alone():
    tree = {"kernel": jnp.asarray([[-1.5, 2.0]], jnp.bfloat16), "steps": jnp.asarray(3)}
    scores = sj.magnitude(tree)
    assert scores["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(scores["kernel"], [[1.5, 2.0]])
    assert scores["steps"] == 3


def test_wanda_multiplies_input_norms():
    w = jax.random.normal(jax.random.key(0), (2, 3, 4))  # [layers, in, out]
    norms = jnp.arange(1.0, 7.0).reshape(2, 3)
    scores = sj.wanda({"kernel": w, "bias": -jnp.ones(4)}, {"kernel": norms, "bias": 1.0})
    np.testing.assert_allclose(scores["kernel"], np.abs(w) * np.asarray(norms)[:, :, None])
    np.testing.assert_array_equal(scores["bias"], np.ones(4))


def test_wanda_names_the_leaf_that_does_not_fit():
    with pytest.raises(ValueError, match=r"leaf 'kernel' .* must have shape \(3,\), not \(4,\)"):
        sj.wanda({"kernel": jnp.ones((3, 4))}, {"kernel": jnp.ones(4)})
    with pytest.raises(ValueError, match="input_norms do not have the structure"):
        sj.wanda({"kernel": jnp.ones((3, 4))}, {"weight": jnp.ones(3)})


def test_movement_grows_where_weights_move_away_from_zero():
    params = {"kernel": jnp.asarray([[2.0, -2.0]])}
    grads = {"kernel": jnp.asarray([[-1.0, -1.0]])}
    zero = {"kernel": jnp.zeros((1, 2))}
    scores = sj.movement(zero, params, grads, learning_rate=0.5)
    np.testing.assert_array_equal(scores["kernel"], [[1.0, -1.0]])
    saliency = sj.gradient_saliency(params, grads)
    np.testing.assert_array_equal(saliency["kernel"], [[2.0, 2.0]])
    with pytest.raises(ValueError, match="grads do not have the structure"):
        sj.gradient_saliency(params, {"weight": grads["kernel"]})


def test_random_scores_differ_by_leaf_and_key():
    params = {"a": jnp.zeros((4, 4)), "b": jnp.zeros((4, 4)), "steps": jnp.asarray(3)}
    one, two = (sj.random(jax.random.key(i), params) for i in (0, 1))
    assert not bool((one["a"] == one["b"]).any())
    assert not bool((one["a"] == two["a"]).any())
    assert one["steps"] == 3
