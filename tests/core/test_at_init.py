"""SNIP, GraSP, SynFlow and global ranking against the authors' codes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import sparsejax as sj

pytestmark = pytest.mark.standard_promotion
KERNELS = "kernel"


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mlp(params, x):
    for name in sorted(params)[:-1]:
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    last = params[max(params)]
    return x @ last["kernel"] + last["bias"]


def mlp_params(case):
    count = sum(name[0] == "w" and name[1:].isdigit() for name in case.names())
    return {
        f"l{i}": {"kernel": jnp.asarray(case[f"w{i}"].T), "bias": jnp.asarray(case[f"b{i}"])}
        for i in range(count)
    }


@pytest.mark.vectors
def test_synaptic_flow_vectors(reference):
    for case in reference("random_pruning").cases("sf"):
        params = mlp_params(case)
        batch = (jnp.asarray(case["x"]), jnp.asarray(case["y"]))
        keep = case["keep_ratio"]
        scores = {
            "mag": sj.magnitude(params),
            "snip": sj.snip_scores(
                lambda p, b: cross_entropy(mlp(p, b[0]), b[1]), params, batch, where=KERNELS
            ),
            "grasp": jax.tree.map(
                jnp.negative,
                sj.grasp_scores(
                    lambda p, b: cross_entropy(mlp(p, b[0]) / 200, b[1]),
                    params,
                    [batch],
                    where=KERNELS,
                ),
            ),
            "synflow": sj.synflow_scores(mlp, params, batch[0].shape[1:], where=KERNELS),
        }
        for name, tree in scores.items():
            masks = sj.masks_from_scores(tree, keep, count="prune_floor", where=KERNELS)
            for i, layer in enumerate(sorted(params)):
                wanted = case[f"{name}_score{i}"]
                np.testing.assert_allclose(
                    tree[layer]["kernel"].T, wanted, rtol=2e-3, atol=1e-4 * np.abs(wanted).max()
                )
                np.testing.assert_array_equal(masks[layer]["kernel"].T, case[f"{name}_mask{i}"])
        masks = sj.synflow_masks(
            mlp,
            params,
            batch[0].shape[1:],
            case["synflow_iter_density"],
            rounds=case["synflow_iter_rounds"],
            where=KERNELS,
        )
        for i, layer in enumerate(sorted(params)):
            np.testing.assert_array_equal(masks[layer]["kernel"].T, case[f"synflow_iter_mask{i}"])


def convnet(params, x):
    """Images NCHW; conv, relu, conv, relu, 1x1 conv, relu, mean, linear."""
    for name in ("conv", "mid", "pw"):
        x = lax.conv_general_dilated(
            x, params[name]["kernel"], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
        )
        x = jax.nn.relu(x)
    return x.mean((2, 3)) @ params["fc"]["kernel"].T + params["fc"]["bias"]


@pytest.mark.vectors
def test_pruning_at_initialisation_vectors(reference):
    for case in reference("random_pruning").cases("pai"):
        params = {
            name: {"kernel": jnp.asarray(case[f"{name}_weight"])}
            for name in ("conv", "mid", "pw", "fc")
        }
        params["fc"]["bias"] = jnp.asarray(case["fc_bias"])
        keep, order = case["keep_ratio"], ("conv", "mid", "pw", "fc")

        def sparsities(masks, order=order):
            return [1 - float(masks[name]["kernel"].mean()) for name in order]

        batch = (jnp.asarray(case["x"]), jnp.asarray(case["y"]))
        scores = sj.snip_scores(
            lambda p, b: cross_entropy(convnet(p, b[0]), b[1]), params, batch, where=KERNELS
        )
        masks = sj.masks_from_scores(scores, keep, count="keep_floor", where=KERNELS)
        np.testing.assert_allclose(sparsities(masks), case["snip_layer_sparsity"], atol=1e-6)
        x, y = jnp.asarray(case["grasp_x"]), jnp.asarray(case["grasp_y"])
        half = len(x) // 2
        scores = sj.grasp_scores(
            lambda p, b, t=case["grasp_T"]: cross_entropy(convnet(p, b[0]) / t, b[1]),
            params,
            [(x[:half], y[:half]), (x[half:], y[half:])],
            where=KERNELS,
        )
        size = sum(params[name]["kernel"].size for name in order)
        # the code's comparison lets the entry at the threshold live
        kept = size - int((1 - keep) * size) + 1
        masks = sj.masks_from_scores(scores, kept / size, largest=False, where=KERNELS)
        np.testing.assert_allclose(sparsities(masks), case["grasp_layer_sparsity"], atol=1e-6)


@pytest.mark.vectors
def test_global_vectors(reference):
    file = reference("random_pruning")
    masks = {kind: next(file.cases(kind)) for kind in ("gmag", "gsal")}
    for case in file.cases("global"):
        w, g = (
            {name: jnp.asarray(case[f"{kind}_{name}"]) for name in ("a", "b")}
            for kind in ("weight", "grad")
        )
        for kind, scores in (("gmag", sj.magnitude(w)), ("gsal", sj.gradient_saliency(w, g))):
            for name, normalize in (("norm", True), ("raw", False)):
                got = sj.masks_from_scores(
                    scores, 1 - case["sparsity"], normalize=normalize, where="."
                )
                for leaf in ("a", "b"):
                    wanted = masks[kind][f"{name}_mask_{leaf}"]
                    np.testing.assert_array_equal(got[leaf], wanted)


def params():
    w = jax.random.normal(jax.random.key(0), (3, 8, 8))
    return {f"l{i}": {"kernel": w[i], "bias": w[i, 0]} for i in range(3)}


def loss(p, batch):
    return cross_entropy(mlp(p, batch), jnp.arange(len(batch)) % 8)


X = jax.random.normal(jax.random.key(1), (16, 8))


def test_scores_have_the_structure_of_the_parameters_and_leave_biases_out():
    tree = params()
    for scores in (
        sj.snip_scores(loss, tree, X),
        sj.grasp_scores(loss, tree, [X, X + 1]),
        sj.synflow_scores(mlp, tree, (8,)),
    ):
        assert jax.tree.structure(scores) == jax.tree.structure(tree)
        assert not bool(scores["l0"]["bias"].any())
    total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(sj.snip_scores(loss, tree, X)))
    assert float(total) == pytest.approx(1, rel=1e-5)


def test_synflow_conserves_flow_through_every_layer():
    tree = jax.tree.map(lambda w: w if w.ndim == 2 else jnp.zeros_like(w), params())
    scores = sj.synflow_scores(mlp, tree, (8,))
    flows = [float(scores[name]["kernel"].sum()) for name in tree]
    np.testing.assert_allclose(flows, flows[0], rtol=1e-5)


def test_synflow_masks_reach_their_density_and_are_nested_in_the_score():
    masks = sj.synflow_masks(mlp, params(), (8,), 0.1, rounds=10)
    assert sj.count_masks(masks).kept == 192 - int(0.9 * 192)


def test_global_ranking_on_a_mesh_equals_one_device_without_a_gather(mesh):
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "model"))
    tree = {n: {"kernel": jnp.round(4 * p["kernel"])} for n, p in params().items()}
    wanted = sj.masks_from_scores(sj.magnitude(tree), 0.3)
    sharded = jax.device_put(tree, spec)
    function = jax.jit(lambda t: sj.masks_from_scores(sj.magnitude(t), 0.3))
    assert sj.sad(function(sharded), wanted)["total"] == 0
    text = function.lower(sharded).compile().as_text()
    assert "all-gather" not in text


def test_local_ranking_random_masks_and_counts():
    tree = params()
    local = sj.masks_from_scores(sj.magnitude(tree), 0.25, scope="local")
    assert sj.count_masks(local).per_leaf == {f"l{i}/kernel": (16, 64) for i in range(3)}
    drawn = sj.random_masks(jax.random.key(0), tree, 0.25)
    assert sj.count_masks(drawn).per_leaf == {f"l{i}/kernel": (16, 64) for i in range(3)}
    other = sj.random_masks(jax.random.key(1), tree, 0.25)
    assert sj.compare_masks(drawn, other).changed > 0
    loose = sj.random_masks(jax.random.key(0), tree, 0.25, exact=False)
    assert 20 < sj.count_masks(loose).kept < 80


def test_errors_name_argument_and_range(unchecked):
    tree = params()
    with pytest.raises(ValueError, match=r"density is 0; it must be in \(0, 1\]"):
        sj.masks_from_scores(tree, 0)
    with pytest.raises(ValueError, match="scope is 'x'"):
        sj.masks_from_scores(tree, 0.5, scope="x")
    with pytest.raises(ValueError, match="count is 'x'"):
        sj.masks_from_scores(tree, 0.5, count="x")
    broken = {"kernel": jnp.asarray([[jnp.nan, 1.0]])}
    with pytest.raises(ValueError, match="leaf 'kernel': its scores hold NaN"):
        sj.masks_from_scores(broken, 0.5)
    with pytest.raises(ValueError, match="batches is empty"):
        sj.grasp_scores(loss, tree, [])
    with pytest.raises(ValueError, match="density is 2"):
        sj.synflow_masks(mlp, tree, (8,), 2.0)
    with pytest.raises(ValueError, match="rounds is 0"):
        sj.synflow_masks(mlp, tree, (8,), 0.5, rounds=0)
    with pytest.raises(ValueError, match=r"k is 9; it must be in \[0, 4\]"):
        sj.global_topk_masks([jnp.ones(4)], 9)
    with pytest.raises(ValueError, match="scores have dtypes bfloat16, float32"):
        sj.global_topk_masks([jnp.ones(4), jnp.ones(4, jnp.bfloat16)], 2)
    with pytest.raises(ValueError, match="scores is empty"):
        sj.global_topk_masks([], 0)
    with pytest.raises(ValueError, match="density is 2"):
        sj.random_masks(jax.random.key(0), tree, 2.0, exact=False)
