"""Mask trees: structure, counts, comparison, packing."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding, PartitionSpec

import sparsejax as sj

HALF = sj.NM(2, 4)


def params(key=0):
    w, v = jax.random.normal(jax.random.key(key), (2, 8, 12))
    return {"a": {"kernel": w, "bias": v[0]}, "b": {"kernel": v}}


def test_a_mask_tree_has_the_structure_of_the_parameters():
    tree = params()
    masks = sj.make_masks(sj.magnitude(tree), pattern=HALF, where="^a/kernel")
    assert jax.tree.structure(masks) == jax.tree.structure(tree)
    assert masks["b"]["kernel"].shape == ()
    assert bool(masks["a"]["bias"])
    product = jax.tree.map(lambda p, m: p * m.astype(p.dtype), tree, masks)
    for one, two in zip(jax.tree.leaves(product), jax.tree.leaves(sj.apply_masks(tree, masks))):
        np.testing.assert_array_equal(one, two)


def test_one_density_or_a_tree_of_them():
    tree = params()
    scores = sj.magnitude(tree)
    one = sj.count_masks(sj.make_masks(scores, 0.25))
    assert one.per_leaf == {"a/kernel": (24, 96), "b/kernel": (24, 96)}
    assert one.density == 0.25
    densities = {"a": {"kernel": 0.5, "bias": 1}, "b": {"kernel": 1}}
    several = sj.count_masks(sj.make_masks(scores, densities))
    assert several.per_leaf == {"a/kernel": (48, 96)}
    traced = jax.jit(sj.make_masks)(scores, jnp.float32(0.25))
    assert sj.sad(traced, sj.make_masks(scores, 0.25))["total"] == 0
    assert sj.count_masks(sj.dense_masks(tree)).density == 1.0


def test_the_same_masks_serve_every_wrapping():
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    state = nnx.split(model)[1]
    masks = sj.make_masks(sj.magnitude(state), pattern=HALF)
    pure = nnx.to_pure_dict(state)
    sparse = sj.apply_masks(pure, masks)
    assert int((sparse["kernel"] != 0).sum()) == 16
    again = sj.apply_masks(state, sj.make_masks(sj.magnitude(pure), pattern=HALF))
    np.testing.assert_array_equal(again["kernel"][...], sparse["kernel"])
    np.testing.assert_array_equal(sj.apply_masks(model, masks).kernel[...], sparse["kernel"])


def test_an_equinox_module_keeps_its_functions():
    mlp = eqx.nn.MLP(8, 4, 8, 1, key=jax.random.key(0))
    masks = sj.make_masks(sj.magnitude(mlp), pattern=sj.NM(2, 4, axis=-1))
    sparse = sj.apply_masks(mlp, masks)
    assert sparse.activation is mlp.activation
    assert int((sparse.layers[0].weight != 0).sum()) == 32
    assert sparse(jnp.ones(8)).shape == (4,)


def test_masks_of_a_filtered_equinox_module_fit_the_whole_one():
    mlp = eqx.nn.MLP(8, 4, 8, 1, key=jax.random.key(0))
    arrays = eqx.filter(mlp, eqx.is_array)
    pattern = sj.NM(2, 4, axis=-1)
    for source, target in ((mlp, arrays), (arrays, mlp)):
        masks = sj.make_masks(sj.magnitude(source), pattern=pattern)
        assert int((sj.apply_masks(target, masks).layers[0].weight != 0).sum()) == 32
        assert sj.summarize(target, masks).density == 0.5


def test_pruning_once():
    sparse, masks = sj.prune(params(), 0.25, where="^a/")
    assert int((sparse["a"]["kernel"] != 0).sum()) == 24
    assert str(sj.count_masks(masks)) == "27 of 108 kept (25.00%)"


def test_pruned_infinities_become_zero():
    w = {"kernel": jnp.full((4, 1), jnp.inf)}
    masks = {"kernel": jnp.asarray([[True], [False], [False], [False]])}
    np.testing.assert_array_equal(sj.apply_masks(w, masks)["kernel"][:, 0], [np.inf, 0.0, 0.0, 0.0])


def test_masks_follow_the_sharding_of_the_parameters(mesh):
    sharding = NamedSharding(mesh, PartitionSpec("data", "model"))
    tree = {"a": {"kernel": jax.device_put(params()["a"]["kernel"], sharding)}}

    @jax.jit
    def build(t):
        return sj.make_masks(sj.magnitude(t), 0.5)

    masks = build(tree)
    assert masks["a"]["kernel"].sharding.is_equivalent_to(sharding, 2)
    alone = sj.make_masks(sj.magnitude(params()), 0.5)["a"]["kernel"]
    np.testing.assert_array_equal(masks["a"]["kernel"], alone)
    assert "all-gather" not in build.lower(tree).compile().as_text()


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(bool, st.sampled_from([(3, 8), (2, 13), (5,), (2, 3, 1), (4, 0)])))
def test_packing_loses_nothing(mask):
    masks = {"w": jnp.asarray(mask), "dense": jnp.asarray(True)}
    packed = sj.pack_masks(masks)
    assert packed["w"].bits.nbytes == mask[..., :1].size * -(-mask.shape[-1] // 8)
    back = sj.unpack_masks(packed)
    np.testing.assert_array_equal(back["w"], mask)
    assert back["w"].dtype == bool
    assert back["dense"].shape == ()


def test_packing_works_under_jit():
    mask = {"w": jnp.eye(9, dtype=bool)}
    back = jax.jit(lambda m: sj.unpack_masks(sj.pack_masks(m)))(mask)
    np.testing.assert_array_equal(back["w"], mask["w"])


def test_comparison():
    first = {"w": jnp.asarray([True, True, False, False]), "d": jnp.asarray(True)}
    second = {"w": jnp.asarray([True, False, True, False]), "d": jnp.asarray(True)}
    comparison = sj.compare_masks(first, second)
    assert (comparison.changed, comparison.both, comparison.either) == (2, 1, 3)
    assert comparison.overlap == pytest.approx(1 / 3)
    assert sj.compare_masks(first, first).overlap == 1


def test_errors_name_the_leaf():
    tree = params()
    with pytest.raises(ValueError, match=r"leaf 'a/kernel': axis 0 .* length 8, .* m = 3"):
        sj.make_masks(tree, pattern=sj.NM(1, 3))
    broken = {"a": {"kernel": tree["a"]["kernel"].at[0, :2].set(jnp.nan)}}
    with pytest.raises(ValueError, match="leaf 'a/kernel': 2 of its 96 scores are NaN"):
        sj.make_masks(broken, 0.5)
    assert int(jax.jit(sj.make_masks)(broken, jnp.float32(0.5))["a"]["kernel"].sum()) == 48
    for density in (-0.5, 1.5):
        with pytest.raises(ValueError, match=rf"leaf 'a/kernel': density is {density}; it must"):
            sj.make_masks(tree, density)
    with pytest.raises(ValueError, match="where is given"):
        sj.make_masks(tree, jax.tree.map(lambda _: 0.5, tree), where="a")
    with pytest.raises(ValueError, match=r"densities do not have .*no \['a/bias', 'a/kernel'\]"):
        sj.make_masks(tree, {"b": {"kernel": 0.5}})
    with pytest.raises(ValueError, match=r"masks do not have the structure of the parameters"):
        sj.apply_masks(tree, {"a": True})
    wrong = jax.tree.map(lambda _: jnp.ones((2, 2), bool), tree)
    with pytest.raises(ValueError, match=r"the mask of 'a/bias' has shape \(2, 2\), its parameter"):
        sj.apply_masks(tree, wrong)
    with pytest.raises(TypeError, match="the mask of 'a/bias' must be bool, not float32"):
        sj.check_masks(tree, tree)
    with pytest.raises(ValueError, match=r"the masks of 'w' have shapes \(2,\) and \(\)"):
        sj.compare_masks({"w": jnp.ones(2, bool)}, {"w": jnp.asarray(True)})
