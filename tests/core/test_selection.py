"""Paths, `where` and the tree walk, over every kind of tree."""

import re

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparsejax as sj


class Net(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)])
        self.norm = nnx.LayerNorm(4, rngs=rngs)


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Dense(8)(x)
        return linen.LayerNorm()(linen.Dense(4)(x))


def test_paths_are_the_same_however_a_model_is_wrapped():
    model = Net(nnx.Rngs(0))
    state = nnx.split(model)[1]
    wanted = ("layers/0/kernel", "layers/1/kernel")
    assert sj.selected_paths(state) == wanted
    assert sj.selected_paths(nnx.to_pure_dict(state)) == wanted
    assert sj.selected_paths(model) == wanted


def test_default_selects_kernels_of_linen_and_weights_of_equinox():
    params = LinenNet().init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    assert sj.selected_paths(params) == ("Dense_0/kernel", "Dense_1/kernel")
    mlp = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
    assert sj.selected_paths(mlp) == ("layers/0/weight", "layers/1/weight")
    table = eqx.nn.Embedding(4, 4, key=jax.random.key(0))
    with pytest.raises(ValueError, match="matches no leaf"):
        sj.selected_paths({"embedding": table})


def test_where_may_be_a_regular_expression_or_a_predicate():
    tree = {"a": {"kernel": jnp.ones((4, 4))}, "b": {"kernel": jnp.ones((2, 8))}}
    assert sj.selected_paths(tree, "^b/") == ("b/kernel",)
    assert sj.selected_paths(tree, re.compile("a")) == ("a/kernel",)
    assert sj.selected_paths(tree, lambda path, leaf: leaf.shape[0] == 4) == ("a/kernel",)


def test_a_walk_leaves_functions_alone():
    mlp = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
    doubled = sj.map_selected(lambda path, leaf: 2 * leaf, mlp)
    np.testing.assert_array_equal(doubled.layers[0].weight, 2 * mlp.layers[0].weight)
    np.testing.assert_array_equal(doubled.layers[0].bias, mlp.layers[0].bias)
    assert doubled.activation is mlp.activation


def test_align_brings_leaves_into_other_containers():
    state = nnx.split(Net(nnx.Rngs(0)))[1]
    pure = nnx.to_pure_dict(state)
    back = sj.align(pure, state)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for one, two in zip(jax.tree.leaves(back), jax.tree.leaves(state)):
        np.testing.assert_array_equal(one, two)


def test_errors_name_what_is_wrong(unchecked):
    tree = {"a": {"kernel": jnp.ones((4, 4))}}
    with pytest.raises(ValueError, match=r"where matches no leaf: 'query'; .* are a/kernel"):
        sj.selected_paths(tree, "query")
    with pytest.raises(ValueError, match=r"where is no regular expression: '\('"):
        sj.selected_paths(tree, "(")
    with pytest.raises(TypeError, match="not int"):
        sj.selected_paths(tree, 3)
    with pytest.raises(ValueError, match=r"masks do not have .*no \['a/kernel'\].*\['b/kernel'\]"):
        sj.align({"b": {"kernel": True}}, tree)
