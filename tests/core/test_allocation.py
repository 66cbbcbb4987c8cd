"""Layer densities: the published codes' figures, and the sums that must come out."""

import jax
import numpy as np
import pytest

import sparsejax as sj


def tree(shapes):
    return {
        f"l{i}": jax.ShapeDtypeStruct(tuple(int(n) for n in row if n), "float32")
        for i, row in enumerate(shapes)
    }


@pytest.mark.vectors
def test_every_family_of_random_pruning_has_a_test(reference):
    families = {"erk", "rigl", "drop", "rigltraj", "gmag", "gsal", "global", "vita", "pai", "sf"}
    assert reference("random_pruning").families() == families | {"vitadst"}


@pytest.mark.vectors
def test_rigl_vectors(reference):
    for case in reference("random_pruning").cases("erk"):
        shapes = tree(case["shapes"])
        rule = sj.erk if case["include_kernel"] else sj.er
        custom = {f"^l{int(i)}$": 1 - sparsity for i, sparsity in case["custom"]}
        got = rule(
            shapes,
            1 - case["target_sparsity"],
            custom=custom,
            power=case["power_scale"],
            integer_zeros=True,
        )
        np.testing.assert_allclose(
            [1 - d for d in got.values()], case["layer_sparsity"], rtol=0, atol=1e-9
        )


@pytest.mark.vectors
def test_vita_vectors(reference):
    file = reference("random_pruning")
    cases = list(file.cases("vita"))
    shapes = next(case["shapes"] for case in cases if "shapes" in case)
    for case in cases:
        if "density" not in case:
            continue
        # printed by the code with few digits
        er = sj.er(tree(shapes), case["density"], channel_axes=(0, 1))
        np.testing.assert_allclose(list(er.values()), case["ER_layer_density"], atol=6e-4)
        erk = sj.erk(tree(shapes), case["density"])
        np.testing.assert_allclose(list(erk.values()), case["ERK_layer_density"], atol=6e-4)
        wanted = case["uniform_plus_layer_density"]
        if np.min(wanted) < 0:
            with pytest.raises(ValueError, match=r"would get density -.*, outside \[0, 1\]"):
                sj.uniform_plus(tree(shapes), case["density"], compat=True)
        else:
            got = sj.uniform_plus(tree(shapes), case["density"], compat=True)
            np.testing.assert_allclose(list(got.values()), wanted, atol=6e-4)


SHAPES = tree([(3, 3, 3, 16), (3, 3, 16, 32), (128, 64), (64, 10)])
SIZES = {name: int(np.prod(leaf.shape)) for name, leaf in SHAPES.items()}


@pytest.mark.parametrize("density", [0.05, 0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("kind", ["uniform", "er", "erk", "erk_plus", "uniform_plus"])
def test_the_total_is_exact(kind, density):
    if kind == "uniform_plus" and 0.2 <= density < 1:
        pytest.skip("by definition all but the first leaf get the density")
    if kind == "erk_plus" and density == 0.05:
        pytest.skip("the dense last leaf leaves too little")
    got = sj.layer_densities(SHAPES, density, kind)
    total = sum(SIZES[name] * d for name, d in got.items())
    assert total == pytest.approx(density * sum(SIZES.values()), rel=1e-9)
    assert all(0 < d <= 1 for d in got.values())


def test_custom_leaves_are_left_out_of_the_total():
    got = sj.erk(SHAPES, 0.1, custom={"l3": 1.0})
    assert got["l3"] == 1.0
    others = sum(SIZES[n] * d for n, d in got.items() if n != "l3")
    assert others == pytest.approx(0.1 * sum(s for n, s in SIZES.items() if n != "l3"))


def test_errors_name_argument_and_range(unchecked):
    for density in (0.0, 1.2, -1.0):
        with pytest.raises(ValueError, match=rf"density is {density}; it must be in \(0, 1\]"):
            sj.erk(SHAPES, density)
    with pytest.raises(ValueError, match="shapes is an empty tree"):
        sj.uniform({}, 0.5)
    with pytest.raises(ValueError, match="custom: 'nothing' matches no leaf"):
        sj.er(SHAPES, 0.5, custom={"nothing": 1.0})
    with pytest.raises(ValueError, match="kind is 'x'; allowed are uniform, uniform_plus"):
        sj.layer_densities(SHAPES, 0.5, "x")
    with pytest.raises(ValueError, match=r"leaf 'b' has shape \(3,\); ER needs two axes"):
        sj.er({"b": jax.ShapeDtypeStruct((3,), "float32")}, 0.5)
    with pytest.raises(ValueError, match=r"with the last leaf at 1.0 the others would get -"):
        sj.erk_plus(tree([(4, 4), (64, 64)]), 0.1)
    with pytest.raises(ValueError, match=r"would get density -.*, outside \[0, 1\]"):
        sj.uniform_plus(tree([(64, 64), (8, 8), (4, 4)]), 0.1)
    with pytest.raises(ValueError, match="fc_density is 2"):
        sj.erk_plus(SHAPES, 0.5, fc_density=2.0)
