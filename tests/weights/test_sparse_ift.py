"""Sparse-IFT: the authors' sizes, distributions and mask trajectories, and the optimiser."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import sparsejax as sj
from sparsejax import weights

pytestmark = pytest.mark.standard_promotion


@pytest.mark.vectors
def test_every_family_has_a_test(reference):
    assert reference("sparse_ift").families() == {"conv", "block", "erk", "rigl"}


@pytest.mark.vectors
def test_size_vectors(reference):
    for case in reference("sparse_ift").cases("conv3x3"):
        (name,) = case.names()
        for f_in, f_out, s, *wanted in case[name]:
            d_in, d_out = int(f_in), int(f_out)

            def size(kind, d_in=d_in, d_out=d_out, s=float(s), **options):
                return weights.sift_size(kind, d_in, d_out, s, kernel=(3, 3), **options)

            found = [
                size("parallel", allow_rounding=True),
                weights.widened(64, float(s), allow_rounding=True),
                size("factorized"),
                size("factorized", sparse_u_only=True),
                size("doped"),
            ]
            assert found == wanted
            assert size("wide") == math.sqrt(1 / (1 - s))


@pytest.mark.vectors
def test_distribution_vectors(reference):
    for case in reference("sparse_ift").cases("erk"):
        shapes = [jax.ShapeDtypeStruct(tuple(map(int, s)), "float32") for s in case["shapes"]]
        density = 1 - case["sparsity"]
        if case["is_kernel"]:
            found = sj.erk(shapes, density)
        else:
            shapes = [jax.ShapeDtypeStruct(s.shape[:2], s.dtype) for s in shapes]
            found = sj.er(shapes, density, channel_axes=(0, 1))
        np.testing.assert_allclose(1 - np.asarray(found), case["layer_sparsity"], atol=1e-12)


@pytest.mark.vectors
def test_trajectory_vectors(reference):
    for case in reference("sparse_ift").cases("rigl"):
        masks = {"kernel": jnp.asarray(case["mask_init"].astype(bool))}
        s, every = case["sparsity"], case["frequency"]
        end = int(case["end_fraction"] * case["num_updates"])
        drop = weights.drop_schedule(case["drop_fraction"], end=end)
        start = {"kernel": jnp.asarray(case["weight_init"])}
        topk = sj.masks_from_scores(sj.magnitude(start), 1 - s, scope="local", count="prune_floor")
        assert sj.sad(topk, masks)["total"] == 0
        tx = weights.masked_optimizer(
            optax.sgd(case["lr"], case["momentum"]),
            masks=masks,
            sparsity=s,
            drop=drop,
            every=every,
            end=end,
        )

        def step(carry, g, tx=tx):
            params, state = carry
            updates, state = tx.update({"kernel": g}, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), (params["kernel"], state.masks["kernel"])

        params = sj.apply_masks(start, masks)
        grads = jnp.asarray(case["grad_per_step"])
        _, (kernels, found) = jax.jit(lambda c, g, step=step: lax.scan(step, c, g))(
            (params, tx.init(params)), grads
        )
        np.testing.assert_array_equal(found, case["mask_after_step"])
        np.testing.assert_allclose(kernels, case["weight_after_step"], rtol=1e-6, atol=1e-6)

        # the same masks by the function for one leaf, and the share that was dropped last
        w, mask, velocity = params["kernel"], masks["kernel"], jnp.zeros_like(grads[0])
        share = case["drop_fraction"]
        for t, g in enumerate(grads, start=1):
            velocity = case["momentum"] * velocity + g * mask
            w = w - case["lr"] * velocity
            if 0 < t < end and t % every == 0:
                share = drop(t)
                mask = weights.rigl_update(w, mask, g, share, sparsity=s)
            w, velocity = w * mask, velocity * mask
            np.testing.assert_array_equal(mask, case["mask_after_step"][t - 1])
            assert share == pytest.approx(case["drop_fraction_after_step"][t - 1], abs=1e-15)


def test_rounding_to_whole_branches():
    assert [weights.sift_size("parallel", 8, 8, s) for s in (0.0, 0.5, 0.75, 0.9)] == [1, 2, 4, 10]
    for call in (
        lambda **o: weights.sift_size("parallel", 8, 8, 0.6, **o),
        lambda **o: weights.widened(64, 0.6, **o),
    ):
        with pytest.raises(
            ValueError, match=r"sparsity is 0\.6: 1 / \(1 - sparsity\) is 2\.5, fur"
        ):
            call()
        assert call(allow_rounding=True) in (2, 90)  # half to even: not 3
    # nothing is rounded in the factor of Sparse-Wide
    assert weights.sift_size("wide", 8, 8, 0.6) == math.sqrt(1 / (1 - 0.6))


def test_linear_layers_have_kernels_of_one():
    assert weights.sift_size("factorized", 40, 60, 0.5) == math.ceil(2400 / (0.5 * 100))
    assert weights.sift_size("doped", 40, 60, 0.5) == math.floor(0.5 * 2400 / 100)
    # at no sparsity a factorisation costs the same and a doped layer is the dense one
    assert weights.sift_size("factorized", 40, 60, 0.0) == 24
    assert weights.sift_size("doped", 40, 60, 0.0) == 0
    assert weights.sift_size("factorized", 8, 8, 0.5, kernel=(1, 5)) == math.ceil(
        320 / (0.5 * (40 + 8))
    )


def test_a_wide_network_costs_the_dense_one():
    """Stem and head are widened on one side and stay dense; positions are those of the images."""
    positions = {"stem/kernel": 64, "body/kernel": 64, "point/kernel": 16, "head/kernel": 1}

    def shapes(width):
        sizes = {
            "stem": (3, 3, 3, width),
            "body": (3, 3, width, width),
            "point": (1, 1, width, 2 * width),
            "head": (2 * width, 10),
        }
        return {n: {"kernel": jax.ShapeDtypeStruct(size, "float32")} for n, size in sizes.items()}

    def report(width, masks=None):
        full = shapes(width)
        return sj.flops_report(masks or sj.dense_masks(full), positions, shapes=full)

    budget, wide, matched = report(24).dense, 0, 0.0
    for s in (0.5, 0.75, 0.9):
        wide = weights.widened(24, s)
        layers = [
            (full, bool(re.match("body|point", p))) for p, (_, full) in report(wide).layers.items()
        ]
        matched = weights.match_flops_sparsity(layers, budget)
        cost = sum(full * (1 - matched if sparse else 1) for full, sparse in layers)
        assert cost == pytest.approx(budget, rel=1e-12)
        assert matched != pytest.approx(s, abs=1e-3)  # it has to be solved for

    def mask(path, leaf):
        kept = np.arange(leaf.size) < sj.keep_count(leaf.size, 1 - matched)
        return jnp.asarray(kept.reshape(leaf.shape))

    dense = jnp.asarray(True)
    masks = sj.map_selected(mask, shapes(wide), where="body|point", otherwise=lambda leaf: dense)
    assert abs(report(wide, masks).sparse / budget - 1) < 1e-3


def test_closed_form_of_the_matched_sparsity():
    layers = [(100, False), (400, True), (600, True)]
    assert weights.match_flops_sparsity(layers, 350) == 0.75
    assert weights.match_flops_sparsity(layers, 1100) == 0
    assert weights.match_flops_sparsity(layers, 1101) == 0  # within 0.1 %
    for budget, message in (
        (100, "budget is 100; the dense layers alone cost 100"),
        (1102, "budget is 1102; all layers without zeros cost 1100"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.match_flops_sparsity(layers, budget)
    with pytest.raises(ValueError, match="layers has no sparse one"):
        weights.match_flops_sparsity(layers[:1], 50)


def tree(dtype=jnp.float32):
    w, v = jax.random.normal(jax.random.key(0), (2, 16, 16))
    made = {"a": {"kernel": w, "bias": v[0]}, "b": {"kernel": v}}
    return jax.tree.map(lambda leaf: leaf.astype(dtype), made)


def optimizer(inner=None, params=None, **options):
    params = tree() if params is None else params
    defaults = {
        "masks": sj.random_masks(jax.random.key(1), params, 0.25, where="b/kernel"),
        "sparsity": 0.75,
        "drop": weights.drop_schedule(end=18, kind="constant"),
        "every": 4,
        "end": 18,
    }
    inner = optax.sgd(1e-2, momentum=0.9) if inner is None else inner
    return weights.masked_optimizer(inner, **{**defaults, **options})


def starting(tx, params):
    state = tx.init(params)
    return sj.apply_masks(params, sj.get_masks(state)), state


def make_step(tx):
    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(lambda w: (w - jnp.cos(40 * w) - 1).astype(w.dtype), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), sj.get_masks(state)

    return step


def run(tx, params, steps=20):
    step = make_step(tx)
    scan = jax.jit(lambda c: lax.scan(step, c, length=steps))
    (params, state), masks = scan(starting(tx, params))
    return params, state, masks


def changes(masks):
    """The steps, from 1, whose masks differ from those of the step before."""
    m = np.asarray(masks["b"]["kernel"])
    return [t for t in range(2, len(m) + 1) if (m[t - 1] != m[t - 2]).any()]


@pytest.mark.parametrize(
    ("inner", "update"),
    [("adamw", "rigl"), ("adamw", "set"), ("momentum", "rigl"), ("adafactor", "rigl")],
)
def test_it_moves_masks_on_time_and_leaves_nothing_outside(inner, update):
    make = {
        "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
        "momentum": lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True),
        "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=8),
    }
    tx = optimizer(make[inner](), update=update, key=jax.random.key(2))
    params, state, masks = run(tx, tree())
    assert isinstance(state, weights.SparseIFTState)
    assert int(state.count) == 20
    assert changes(masks) == [4, 8, 12, 16]
    np.testing.assert_array_equal(masks["b"]["kernel"].sum((1, 2)), 64)
    outside = ~sj.get_masks(state)["b"]["kernel"]
    assert not bool(jnp.where(outside, params["b"]["kernel"], 0).any())
    slots = [
        leaf for path, leaf in sj.named_leaves(state.inner)
        if path.endswith("b/kernel") and leaf.shape == (16, 16)
    ]  # fmt: skip
    assert len(slots) == {"adamw": 2, "momentum": 1, "adafactor": 0}[inner]
    for slot in slots:
        assert bool(slot.any())
        assert not bool(jnp.where(outside, slot, 0).any())
    assert bool(params["a"]["bias"].all())


def test_growth_at_random_differs_by_step_and_key():
    tx = optimizer(update="set", key=jax.random.key(0), every=1)
    params, state = starting(tx, tree())
    step = jax.jit(make_step(tx))
    after = [
        step(
            (params, state._replace(key=jax.random.key_data(jax.random.key(seed)), count=count)),
            None,
        )
        for seed, count in (
            (0, state.count),
            (0, state.count),
            (1, state.count),
            (0, state.count + 1),
        )
    ]
    first, again, other_key, other_step = (np.asarray(masks["b"]["kernel"]) for _, masks in after)
    np.testing.assert_array_equal(first, again)
    assert (first != other_key).any()
    assert (first != other_step).any()


def compiles_updates(tx):
    params, state = starting(tx, tree())
    return "cond[" in str(jax.make_jaxpr(tx.update)(params, state, params))


def test_updates_are_strictly_between_begin_and_end():
    drop = weights.drop_schedule(begin=2, end=6, kind="constant")
    _, _, masks = run(optimizer(every=1, begin=2, end=6, drop=drop), tree(), 8)
    assert changes(masks) == [3, 4, 5]
    assert not compiles_updates(optimizer(every=1, begin=2, end=3))
    assert not compiles_updates(optimizer(every=2, begin=2, end=4))
    assert compiles_updates(optimizer(every=2, begin=2, end=5))


def test_static_masks_never_change_and_nothing_is_compiled_for_them():
    assert not compiles_updates(optimizer(update="static"))
    _, _, masks = run(optimizer(update="static"), tree())
    assert changes(masks) == []


def test_the_first_update_restores_the_count_of_random_masks():
    params = tree()
    loose = sj.random_masks(jax.random.key(3), params, 0.25, exact=False)
    loose["b"]["kernel"] = loose["b"]["kernel"] | (jnp.arange(16) < 2)  # too many
    loose["a"]["kernel"] = loose["a"]["kernel"] & (jnp.arange(16) > 2)  # too few
    _, _, masks = run(optimizer(masks=loose), params, 9)
    counts = [np.asarray(masks[n]["kernel"].sum((1, 2))) for n in ("a", "b")]
    assert counts[0][0] < 64
    assert counts[1][0] > 64
    assert counts[0][4] == 64
    n = counts[1][0]
    assert counts[1][4] == max(64, n - int(0.3 * n))


def test_every_layer_has_its_own_sparsity():
    params = tree()
    densities = {"a": {"kernel": 0.5, "bias": 1}, "b": {"kernel": 0.1}}
    masks = sj.random_masks(jax.random.key(0), params, densities)
    sparsity = jax.tree.map(lambda d: 1 - d, densities)
    _, state, _ = run(optimizer(masks=masks, sparsity=sparsity), params, 6)
    counts = sj.count_masks(sj.get_masks(state)).per_leaf
    assert counts == {"a/kernel": (128, 256), "b/kernel": (int((1 - 0.9) * 256), 256)}


def test_accumulated_gradients_are_the_average_of_the_step():
    params, masks = tree(), sj.random_masks(jax.random.key(1), tree(), 0.25, where="b")
    drop = weights.drop_schedule(end=9)
    made = [optimizer(masks=masks, every=2, end=9, drop=drop) for _ in range(2)]
    tx = [made[0], optax.MultiSteps(made[1], 2).gradient_transformation()]
    g = [jax.tree.map(lambda w, i=i: jnp.sin(w * (i + 3)), params) for i in range(6)]
    halves = [jax.tree.map(lambda a, b: (a + b) / 2, *g[i : i + 2]) for i in (0, 2, 4)]
    ends = []
    for transform, grads in zip(tx, (halves, g)):
        p, state = starting(transform, params)
        update = jax.jit(transform.update)
        for one in grads:
            updates, state = update(one, state, p)
            p = optax.apply_updates(p, updates)
        ends.append((p, sj.get_masks(state)))
    assert sj.sad(ends[0][1], ends[1][1])["total"] == 0
    assert sj.sad(ends[0][1], masks)["total"] > 0
    np.testing.assert_allclose(ends[0][0]["b"]["kernel"], ends[1][0]["b"]["kernel"], atol=1e-6)


def test_seeds_may_be_batched():
    tx = optimizer()
    step = make_step(tx)

    def train(params):
        (params, state), _ = lax.scan(step, starting(tx, params), length=9)
        return params["b"]["kernel"], sj.get_masks(state)["b"]["kernel"]

    params = tree()
    many = jax.jit(jax.vmap(train))(jax.tree.map(lambda w: jnp.stack([w, 2 * w]), params))
    alone = jax.jit(train)(jax.tree.map(lambda w: 2 * w, params))
    np.testing.assert_array_equal(many[1][1], alone[1])
    np.testing.assert_allclose(many[0][1], alone[0], rtol=1e-5, atol=1e-6)


def test_bfloat16_stays_and_ranks():
    params, state, masks = run(optimizer(optax.adamw(1e-2)), tree(jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert state.inner[0].mu["b"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(masks["b"]["kernel"].sum((1, 2)), 64)
    assert changes(masks) == [4, 8, 12, 16]


def test_eight_devices_equal_one_and_masks_keep_their_sharding(mesh):
    params = tree()
    spec = NamedSharding(mesh, PartitionSpec("data", "model"))
    alone = run(optimizer(), params)
    sharded = jax.tree.map(lambda w: jax.device_put(w, spec) if w.ndim == 2 else w, params)
    masks = sj.random_masks(jax.random.key(1), params, 0.25, where="b/kernel")
    masks = jax.tree.map(lambda m: jax.device_put(m, spec) if m.ndim == 2 else m, masks)
    together = run(optimizer(masks=masks), sharded)
    for tree_ in (together[0], sj.get_masks(together[1]), together[1].inner[0].trace):
        assert tree_["b"]["kernel"].sharding.is_equivalent_to(spec, 2)
    assert sj.sad(sj.get_masks(together[1]), sj.get_masks(alone[1]))["total"] == 0
    np.testing.assert_allclose(together[0]["b"]["kernel"], alone[0]["b"]["kernel"], atol=1e-6)


def test_one_leaf_updates():
    w, g = jax.random.normal(jax.random.key(0), (2, 10, 10))
    mask = sj.exact_topk_mask(jnp.abs(w), 10, axis=None)
    # (1 - 0.9) * 100 is 9.99...98: the count falls by one and stays there
    first = weights.rigl_update(w * mask, mask, g, 0.3, sparsity=0.9)
    assert int(first.sum()) == 9
    again = weights.rigl_update(w * first, first, g, 0.3, sparsity=0.9)
    assert int(again.sum()) == 9
    traced = jax.jit(weights.rigl_update, static_argnames="sparsity")
    found = traced(w * mask, mask, g, jnp.float32(0.35), sparsity=0.9)
    np.testing.assert_array_equal(found, weights.rigl_update(w * mask, mask, g, 0.35, sparsity=0.9))
    keys = jax.random.split(jax.random.key(1))
    drawn = [weights.set_update(k, w * mask, mask, 0.5, sparsity=0.8) for k in keys]
    kept = sj.exact_topk_mask(jnp.abs(w) * mask, 5, axis=None)
    for new in drawn:
        assert int(new.sum()) == int((1 - 0.8) * 100)
        assert bool((new | ~kept).all())
    assert bool((drawn[0] != drawn[1]).any())


def test_zero_weights_and_gradients_never_change_a_count():
    mask = jnp.arange(40).reshape(5, 8) % 2 == 0
    zero = jnp.zeros((5, 8))
    new = weights.rigl_update(zero, mask, zero, 0.5, sparsity=0.5)
    assert int(new.sum()) == 20
    # the lowest index wins: the first ten active ones stay, the first ten others grow
    kept = mask & (jnp.cumsum(mask).reshape(5, 8) <= 10)
    rest = ~kept & (jnp.cumsum(~kept).reshape(5, 8) <= 10)
    np.testing.assert_array_equal(new, kept | rest)


def test_shapes_of_the_drop_schedule():
    begin, end = 10, 50
    cosine = weights.drop_schedule(0.4, begin=begin, end=end)
    assert [cosine(t) for t in (10, 30, 50)] == pytest.approx([0.4, 0.2, 0.0])
    constant = weights.drop_schedule(0.4, begin=begin, end=end, kind="constant")
    assert constant(20) == constant(49) == 0.4
    falling = weights.drop_schedule(0.4, begin=begin, end=end, kind="exponential", rate=3.0)
    assert falling(30) == pytest.approx(0.4 * math.exp(-1.5))


def test_joint_decay_is_that_of_the_folded_product():
    keys = jax.random.split(jax.random.key(0), 4)
    u, v, w = (jax.random.normal(k, s) for k, s in zip(keys, ((6, 3), (3, 5), (6, 5))))
    for extra in (None, w):
        folded = u @ v if extra is None else extra + u @ v
        value, grads = jax.value_and_grad(weights.joint_weight_decay, argnums=(0, 1))(
            u, v, 0.2, w=extra
        )
        np.testing.assert_allclose(value, 0.1 * jnp.sum(folded**2), rtol=1e-6)
        np.testing.assert_allclose(grads[0], 0.2 * folded @ v.T, rtol=1e-5)
        np.testing.assert_allclose(grads[1], 0.2 * u.T @ folded, rtol=1e-5)
    # of a convolution, V mixes the channels that U makes at every offset
    u, v = jax.random.normal(keys[0], (3, 3, 4, 2)), jax.random.normal(keys[3], (1, 1, 2, 5))
    folded = np.einsum("hwid,do->hwio", u, v[0, 0])
    np.testing.assert_allclose(weights.joint_weight_decay(u, v, 2.0), (folded**2).sum(), rtol=1e-5)
    half = weights.joint_weight_decay(u.astype(jnp.bfloat16), v.astype(jnp.bfloat16), 2.0)
    assert half.dtype == jnp.float32


@pytest.mark.parametrize("s", [-0.1, 1.0, float("nan")])
def test_sparsities_that_are_refused(unchecked, s):
    mask, w = jnp.ones((4, 4), bool), jnp.ones((4, 4))
    for call in (
        lambda: weights.sift_size("doped", 8, 8, s),
        lambda: weights.widened(64, s),
        lambda: weights.rigl_update(w, mask, w, 0.3, sparsity=s),
        lambda: weights.set_update(jax.random.key(0), w, mask, 0.3, sparsity=s),
        lambda: optimizer(sparsity=s),
    ):
        with pytest.raises(ValueError, match=rf"sparsity is {s}; it must be in \[0, 1\)"):
            call()


def test_errors_name_argument_and_range(unchecked):
    w, mask = jnp.ones((4, 4)), jnp.ones((4, 4), bool)
    masks = sj.random_masks(jax.random.key(1), tree(), 0.25)

    def decay(u, v, w=None):
        w = None if w is None else jnp.ones(w)
        return weights.joint_weight_decay(jnp.ones(u), jnp.ones(v), 0.1, w=w)

    for call, message in (
        (lambda: weights.sift_size("x", 8, 8, 0.5), "kind is 'x'; allowed are wide, parallel"),
        (lambda: weights.sift_size("wide", 0, 8, 0.5), "d_in is 0, d_out 8 and kernel (1, 1)"),
        (lambda: weights.sift_size("doped", 8, 8, 0.5, sparse_u_only=True), "sparse_u_only is"),
        (lambda: weights.sift_size("doped", 2, 2, 0.5), "sparsity is 0.5: it leaves no rank for"),
        (lambda: weights.widened(0, 0.5), "width is 0; it must be at least 1"),
        (lambda: weights.sparse_parts("x"), "kind is 'x'; allowed are wide, parallel"),
        (lambda: weights.rigl_update(w, mask, w, 1.0, sparsity=0.5), "drop_fraction is 1.0; it"),
        (lambda: weights.rigl_update(w, mask, w[:1], 0.3, sparsity=0.5), "they must be equal"),
        (lambda: weights.drop_schedule(1.0, end=9), "initial is 1.0; it must be in [0, 1)"),
        (lambda: weights.drop_schedule(begin=9, end=9), "end is 9; it must come after begin = 9"),
        (lambda: weights.drop_schedule(end=9, rate=-1.0), "rate is -1.0; it must not be negative"),
        (lambda: weights.drop_schedule(end=9, kind="x"), "kind is 'x'; allowed are cosine"),
        (lambda: optimizer(update="x"), "update is 'x'; allowed are 'rigl', 'set' and 'static'"),
        (lambda: optimizer(update="set"), "key is None; update='set' draws positions"),
        (lambda: optimizer(every=0), "every is 0; it must be at least 1"),
        (lambda: optimizer(begin=18), "end is 18; it must come after begin = 18"),
        (lambda: optimizer(begin=-1), "begin is -1; it must not be negative"),
        (lambda: optimizer(drop=lambda t: t / 8), "drop at step 8: the share is 1.0; it"),
        (lambda: optimizer(masks={"b": masks["b"]}).init(tree()), "masks do not have the"),
        (lambda: optimizer(sparsity={"b": 0.5}).init(tree()), "sparsity do not have the structure"),
        (lambda: optimizer().update(tree(), optimizer().init(tree())), "params is None"),
        (lambda: decay((6, 3), (2, 5)), "u has shape (6, 3) and v (2, 5); their ranks"),
        (lambda: decay((3, 3, 4, 2), (3, 1, 2, 5)), "the second factor must be a 1 x 1 kernel"),
        (lambda: decay((6, 3), (3, 5), (5, 6)), "w has shape (5, 6); the product of u and v"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
