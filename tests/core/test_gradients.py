"""Straight-through and SR-STE: the authors' vectors, and how the rules compose."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import sparsejax as sj

PATTERN = sj.NM(2, 4)


def close(got, wanted, tolerance=1e-6):
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.vectors
def test_every_family_has_a_test(reference):
    assert reference("sr_ste").families() == {"linear", "conv", "traj"}


@pytest.mark.vectors
def test_linear_vectors(reference):
    for case in reference("sr_ste").cases("linear"):
        kernel, x = jnp.asarray(case["weight"].T), jnp.asarray(case["x"])
        n, m, decay = case["n"], case["m"], case["decay"]

        def forward(w, x=x, n=n, m=m, decay=decay):
            return x @ sj.nm_project(w, n, m, decay=decay)

        mask = sj.nm_mask(jnp.abs(kernel), n, m)
        np.testing.assert_array_equal(mask.T, case["mask"])
        np.testing.assert_array_equal(
            sj.nm_project(kernel, n, m, decay=decay).T, case["weight_sparse"]
        )
        y, pull = jax.vjp(forward, kernel)
        close(y, case["y"])
        cotangent = jnp.asarray(case["cotangent"]).astype(y.dtype)
        (grad,) = pull(cotangent)
        assert grad.dtype == kernel.dtype
        close(grad.T, case["grad_weight_srste"])
        tree = {"kernel": kernel}
        through = jax.vjp(lambda p, x=x, n=n, m=m: x @ sj.ste(p, sj.NM(n, m))["kernel"], tree)[1]
        close(through(cotangent)[0]["kernel"].T, case["grad_weight_ste"])


@pytest.mark.vectors
def test_conv_vectors(reference):
    for case in reference("sr_ste").cases("conv"):
        kernel = jnp.asarray(case["weight_oihw"].transpose(2, 3, 1, 0))  # HWIO
        x = jnp.asarray(case["x_nchw"].transpose(0, 2, 3, 1))
        n, m, decay = case["n"], case["m"], case["decay"]

        def forward(w, x=x, n=n, m=m, decay=decay):
            w = sj.nm_project(w, n, m, decay=decay)
            return lax.conv_general_dilated(
                x, w, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        def oihw(w):
            return np.asarray(w).transpose(3, 2, 0, 1)

        np.testing.assert_array_equal(oihw(sj.nm_mask(jnp.abs(kernel), n, m)), case["mask_oihw"])
        np.testing.assert_array_equal(
            oihw(sj.nm_project(kernel, n, m, decay=decay)), case["weight_sparse_oihw"]
        )
        y, pull = jax.vjp(forward, kernel)
        close(np.asarray(y).transpose(0, 3, 1, 2), case["y_nchw"])
        cotangent = jnp.asarray(case["cotangent_nchw"].transpose(0, 2, 3, 1)).astype(y.dtype)
        close(oihw(pull(cotangent)[0]), case["grad_weight_srste_oihw"])
        flat = sj.nm_mask(jnp.abs(jnp.asarray(case["weight_oihw"])), n, m, axis=None)
        np.testing.assert_array_equal(flat, case["mask_flat_grouping_oihw"])


@pytest.mark.standard_promotion
@pytest.mark.vectors
def test_trajectory_vectors(reference):
    for case in reference("sr_ste").cases("traj"):
        x, target = jnp.asarray(case["x"]), jnp.asarray(case["target"])
        pattern = sj.NM(case["n"], case["m"])
        tx = optax.chain(
            optax.add_decayed_weights(case["weight_decay"]),
            optax.sgd(case["lr"], case["momentum"]),
        )

        def loss(params, decay, x=x, target=target, pattern=pattern):
            w = sj.sr_ste(params, pattern, decay=decay)["kernel"]
            return 0.5 * jnp.mean(jnp.sum((x @ w - target) ** 2, axis=-1))

        for name, decay in (("srste", case["decay"]), ("ste", 0.0)):

            def step(carry, _, decay=decay, tx=tx, loss=loss, pattern=pattern):
                params, state = carry
                before = sj.make_masks(sj.magnitude(params), pattern=pattern)
                value, grads = jax.value_and_grad(loss)(params, decay)
                updates, state = tx.update(grads, state, params)
                params = optax.apply_updates(params, updates)
                after = sj.make_masks(sj.magnitude(params), pattern=pattern)
                return (params, state), (value, sj.flips(before, after))

            start = {"kernel": jnp.asarray(case["w0"].T)}
            (end, _), (losses, flips) = jax.jit(
                lambda s, step=step, tx=tx, length=case["steps"]: lax.scan(
                    step, (s, tx.init(s)), length=length
                )
            )(start)
            close(end["kernel"].T, case[f"{name}_w_final"])
            close(losses, case[f"{name}_loss"])
            np.testing.assert_array_equal(flips, case[f"{name}_sad_consecutive"])
            first, last = (sj.make_masks(sj.magnitude(p), pattern=pattern) for p in (start, end))
            np.testing.assert_array_equal(last["kernel"].T, case[f"{name}_mask_final"])
            assert sj.sad(first, last)["total"] == case[f"{name}_sad_from_init"]


def network():
    w, v = jax.random.normal(jax.random.key(0), (2, 8, 8))
    return {"a": {"kernel": w, "bias": v[0]}, "b": {"kernel": v}}


def loss(params, x):
    hidden = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"])
    return jnp.sum((hidden @ params["b"]["kernel"]) ** 2)


X = jax.random.normal(jax.random.key(9), (5, 8))


def test_the_view_and_the_optax_transform_are_two_routes_to_one_gradient():
    params = network()
    by_view = jax.grad(lambda p: loss(sj.sr_ste(p, PATTERN, decay=0.1), X))(params)
    plain = jax.grad(lambda p: loss(sj.ste(p, PATTERN), X))(params)
    tx = sj.srste_decay(PATTERN, decay=0.1)
    by_transform, _ = tx.update(plain, tx.init(params), params)
    for one, two in zip(jax.tree.leaves(by_view), jax.tree.leaves(by_transform)):
        np.testing.assert_allclose(one, two, rtol=1e-6)
    assert not np.allclose(plain["a"]["kernel"], by_view["a"]["kernel"])


def test_the_gradient_is_not_masked_and_the_decay_is_that_of_the_loss_side():
    params = network()
    pattern, decay = sj.NM(1, 4), 0.3
    grad = jax.grad(lambda p: loss(sj.sr_ste(p, pattern, decay=decay), X))(params)
    masks = sj.make_masks(sj.magnitude(params), pattern=pattern)

    def penalty(p):
        outside = jax.tree.map(lambda w, m: jnp.where(m, 0.0, w), p, masks)
        return decay / 2 * sum(jnp.sum(w**2) for w in jax.tree.leaves(outside))

    dense_at_projected = jax.grad(loss)(sj.apply_masks(params, masks), X)
    wanted = jax.tree.map(jnp.add, dense_at_projected, jax.grad(penalty)(params))
    for one, two in zip(jax.tree.leaves(grad), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
    assert bool((grad["a"]["kernel"][~masks["a"]["kernel"]] != 0).all())


def test_masks_may_be_reused_and_other_patterns_take_a_density():
    params = network()
    masks = sj.make_masks(sj.magnitude(params), pattern=PATTERN, where="a/kernel")
    view = sj.sr_ste(params, PATTERN, masks=masks)
    assert int((view["a"]["kernel"] == 0).sum()) == 32
    np.testing.assert_array_equal(view["b"]["kernel"], params["b"]["kernel"])
    traced = jax.jit(lambda p, d: sj.ste(p, sj.Unstructured(), density=d))(params, 0.25)
    assert int((traced["b"]["kernel"] != 0).sum()) == 16


def test_decay_may_be_traced_and_batched():
    params = network()
    grads = jax.vmap(
        lambda decay: jax.grad(lambda p: loss(sj.sr_ste(p, PATTERN, decay=decay), X))(params)
    )(jnp.asarray([0.0, 0.1]))
    alone = jax.grad(lambda p: loss(sj.sr_ste(p, PATTERN, decay=0.1), X))(params)
    np.testing.assert_allclose(grads["b"]["kernel"][1], alone["b"]["kernel"], rtol=2e-5)


def test_nnx_state_and_bfloat16():
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    graph, state = nnx.split(model)

    def square(s):
        return jnp.sum(nnx.merge(graph, sj.sr_ste(s, PATTERN))(X.astype(jnp.bfloat16)) ** 2)

    grad = jax.jit(jax.grad(square))(state)
    assert grad["kernel"][...].dtype == jnp.bfloat16
    assert bool(jnp.isfinite(grad["kernel"][...]).all())


def test_sharded_equals_one_device(mesh):
    params = network()
    spec = NamedSharding(mesh, PartitionSpec(None, "model"))
    sharded = jax.tree.map(lambda w: jax.device_put(w, spec) if w.ndim == 2 else w, params)
    function = jax.jit(jax.grad(lambda p: loss(sj.sr_ste(p, PATTERN), X)))
    for one, two in zip(jax.tree.leaves(function(sharded)), jax.tree.leaves(function(params))):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def test_a_full_pattern_is_the_identity():
    params = network()
    same = sj.sr_ste(params, sj.NM(4, 4))
    np.testing.assert_array_equal(same["a"]["kernel"], params["a"]["kernel"])


def test_errors_name_argument_and_range(unchecked):
    params = network()
    with pytest.raises(ValueError, match=r"decay is -0\.1; it must not be negative"):
        sj.sr_ste(params, PATTERN, decay=-0.1)
    with pytest.raises(ValueError, match="decay is -1"):
        sj.srste_decay(PATTERN, decay=-1.0)
    with pytest.raises(ValueError, match="params is None"):
        sj.srste_decay(PATTERN).update(params, optax.EmptyState())
    with pytest.raises(ValueError, match=r"leaf 'a/kernel': axis 0 .* length 8, .* m = 5"):
        sj.sr_ste(params, sj.NM(1, 5))
    with pytest.raises(ValueError, match="where matches no leaf"):
        sj.ste(params, PATTERN, where="none")
    with pytest.raises(TypeError, match="'w' must be floating point, not int32"):
        sj.nm_project(jnp.ones((4, 4), jnp.int32), 2, 4)
    with pytest.raises(
        ValueError, match=r"the mask of 'w' has shape \(2, 2\), its weight \(4, 4\)"
    ):
        sj.nm_project(jnp.ones((4, 4)), 2, 4, mask=jnp.ones((2, 2), bool))
    with pytest.raises(ValueError, match="masks do not have the structure"):
        sj.sr_ste(params, PATTERN, masks={"a": True})
