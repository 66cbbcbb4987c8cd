"""Progressive gradient flow: the authors' vectors, the phases, and how the recipes compose."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import sparsejax as sj
from sparsejax import weights
from sparsejax.weights import ProgressiveConfig

KINDS = {"sparsify": "stepwise", "fine": "geometric", "densify": "densify"}
CONFIG = ProgressiveConfig("mdgf_exp", 1, 4, epochs=10, steps_per_epoch=10, fine_tune_fraction=0.2)
X = jax.random.normal(jax.random.key(9), (5, 16))


def network():
    w, v = jax.random.normal(jax.random.key(0), (2, 16, 16))
    return {"a": {"kernel": w, "bias": v[0]}, "b": {"kernel": v}}


def loss(params, x):
    hidden = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"])
    return jnp.mean((hidden @ params["b"]["kernel"]) ** 2)


def recipe(name, **changes):
    return weights.progressive_recipe(dataclasses.replace(CONFIG, recipe=name, **changes))


@functools.partial(jax.jit, static_argnames=("config", "stage"))
def value_and_grad(params, step, *, config, stage=None):
    view, _ = weights.progressive_recipe(config)
    return jax.value_and_grad(lambda p: loss(view(p, step, stage=stage), X))(params)


def close(got, wanted, tolerance=1e-6):
    wanted = np.asarray(wanted)
    atol = tolerance * max(np.abs(wanted).max(), 1e-30)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=atol)


def assert_same(one, two, rtol=0.0):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


@pytest.mark.vectors
def test_every_family_has_a_test(reference):
    assert reference("progressive_gradient_flow").families() == {"mask", "decay", "schedule"}


@pytest.mark.vectors
def test_mask_vectors(reference):
    for case in reference("progressive_gradient_flow").cases("mask"):
        # a PyTorch weight (out, in) is the transpose of a kernel
        kernel = jnp.asarray(case["weight"].T)
        pattern = sj.NM(case["n"], case["m"], axis=-2 if case["sparse_dim"] == 0 else -1)
        np.testing.assert_array_equal(pattern.mask(jnp.abs(kernel)).T, case["mask"])


@pytest.mark.vectors
def test_decay_vectors(reference):
    kinds = {"linear": sj.linear_mask_decay, "exp": sj.exponential_mask_decay}
    for case in reference("progressive_gradient_flow").cases("decay"):
        kernel, x = jnp.asarray(case["weight"].T), jnp.asarray(case["x"])
        cotangent = jnp.asarray(case["cotangent"])
        n, m, kind, coef = case["n"], case["m"], case["kind"], case["coef"]
        axis = -2 if case["sparse_dim"] == 0 else -1
        mask = sj.nm_mask(jnp.abs(kernel), n, m, axis=axis)
        np.testing.assert_array_equal(mask.T, case["mask"])
        at_once = ProgressiveConfig("ste", n, m, axis=axis, dense_fraction=0.0)
        beta = (kinds[kind](coef=coef) if kind in kinds else at_once.beta)(case["step"])
        close(beta, case["beta"])
        # in double precision: the schedules are float32
        decay = functools.partial(sj.mask_decay_weight, beta=case["beta"], n=n, m=m, axis=axis)
        close(decay(kernel).T, case["weight_sparse"])

        def gradient(forward, kernel=kernel, x=x, cotangent=cotangent):
            y, pull = jax.vjp(lambda w: x @ forward(w), kernel)
            return y, pull(cotangent)[0].T

        y, masked = gradient(decay)
        close(y, case["y"])
        close(masked, case["grad_weight_chain_rule"])
        if kind == "srste":
            y, code = gradient(lambda w, n=n, m=m, axis=axis, coef=coef: sj.nm_project(
                w, n, m, axis=axis, decay=coef))  # fmt: skip
        else:
            y, code = gradient(functools.partial(decay, gradient="straight_through"))
        close(y, case["y"])
        close(code, case["grad_weight_code"])


@pytest.mark.vectors
def test_schedule_vectors(reference):
    for case in reference("progressive_gradient_flow").cases("schedule"):
        rows = sj.stepwise_nm(
            case["n"],
            case["m"],
            kind=KINDS[case["type"]],
            epochs=case["total_epochs"],
            dense_epochs=case["dense_epochs"],
            fine_tune_epochs=case["fine_tune_epochs"],
        )
        np.testing.assert_array_equal(rows, case["start_epoch_n_m"])


def test_the_phases_follow_from_the_step():
    steps = np.arange(100)
    for name, decay in (("mdgf_exp", np.exp(-16 * (steps - 10) / 70)),
                        ("mdgf_linear", 1 - (steps - 10) / 70)):  # fmt: skip
        config = dataclasses.replace(CONFIG, recipe=name)
        assert (config.dense_epochs, config.fine_tune_epochs, config.decay_steps) == (1, 2, 70)
        beta = jax.vmap(config.beta)(steps)
        wanted = np.where(steps < 10, 1, np.where(steps < 80, decay, 0))
        np.testing.assert_allclose(beta, wanted, rtol=1e-5, atol=1e-7)
    ste = dataclasses.replace(CONFIG, recipe="ste")
    np.testing.assert_array_equal(jax.vmap(ste.beta)(steps), steps < 10)
    stairs = jax.vmap(dataclasses.replace(CONFIG, update_every=7).beta)(steps)
    np.testing.assert_array_equal(stairs, jax.vmap(CONFIG.beta)(steps - steps % 7))
    faster = dataclasses.replace(CONFIG, recipe="mdgf_linear", decay_coef=0.1)
    np.testing.assert_allclose(jax.vmap(faster.beta)(jnp.asarray([15, 25])), [0.5, 0], atol=1e-6)


def test_the_limits_are_dense_ste_and_srste():
    params = network()
    dense = jax.jit(jax.value_and_grad(loss))(params, X)
    pattern = sj.NM(1, 4)

    @jax.jit
    def projected(params, decay):
        view = lambda p: sj.sr_ste(p, pattern, decay=decay)  # noqa: E731
        return jax.value_and_grad(lambda p: loss(view(p), X))(params)

    through = dataclasses.replace(CONFIG, gradient="straight_through")
    for config in (CONFIG, through):
        assert_same(value_and_grad(params, 9, config=config), dense, rtol=1e-6)
    # fine-tuning straight through is STE; by the chain rule its gradient is masked
    ste = projected(params, 0.0)
    assert_same(value_and_grad(params, 80, config=through), ste, rtol=1e-6)
    masks = sj.make_masks(sj.magnitude(params), pattern=pattern)
    value, grads = value_and_grad(params, 80, config=CONFIG)
    assert_same((value, grads), (ste[0], sj.apply_masks(ste[1], masks)), rtol=1e-6)
    assert bool((grads["a"]["kernel"][~masks["a"]["kernel"]] == 0).all())
    for name, decay in (("ste", 0.0), ("srste", 0.3)):
        config = dataclasses.replace(CONFIG, recipe=name, srste_decay=0.3)
        assert_same(value_and_grad(params, 50, config=config), projected(params, decay), rtol=1e-6)
    # SR-STE is sparse from step 0, STE after the dense phase
    srste = dataclasses.replace(CONFIG, recipe="srste", srste_decay=0.3)
    assert_same(value_and_grad(params, 0, config=srste), projected(params, 0.3), rtol=1e-6)
    ste_config = dataclasses.replace(CONFIG, recipe="ste")
    assert_same(value_and_grad(params, 0, config=ste_config), dense, rtol=1e-6)
    never = dataclasses.replace(CONFIG, recipe="dense")
    assert_same(value_and_grad(params, 99, config=never), dense, rtol=1e-6)


def test_the_gradient_of_pruned_entries_fades_with_beta_and_beta_has_none():
    w = network()["a"]["kernel"]
    mask = sj.nm_mask(jnp.abs(w), 1, 4)
    for gradient, share in (("masked", 0.25), ("straight_through", 1.0)):

        def through(w, beta, gradient=gradient):
            return jnp.sum(sj.mask_decay_weight(w, beta, 1, 4, gradient=gradient))

        grad, beta_grad = jax.grad(through, argnums=(0, 1))(w, 0.25)
        np.testing.assert_array_equal(grad, jnp.where(mask, 1, share))
        assert beta_grad == 0


def test_stages_tighten_and_hold_to_the_end():
    view, stage = recipe("sdgf_stepwise", m=8, epochs=12, fine_tune_fraction=0.25)
    assert [stage(epoch) for epoch in range(12)] == [None, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3]
    params = network()
    kept = [[int((view(params, 0, stage=s)["b"]["kernel"] != 0).sum()) for s in (None, 0, 1, 2, 3)]]
    assert kept == [[256, 224, 128, 64, 32]]
    custom = ((1, 2, 4), (3, 4, 16), (4, 1, 4))
    view, stage = recipe("sdgf_custom", table=custom)
    assert [stage(epoch) for epoch in (0, 1, 2, 3, 4, 9)] == [None, 0, 0, 1, 2, 2]
    assert int((view(params, 0, stage=1)["b"]["kernel"] != 0).sum()) == 64
    # straight through: the gradient is that at the projected weight, unmasked
    grad = jax.grad(lambda p: jnp.sum(view(p, 0, stage=2)["b"]["kernel"]))(params)
    np.testing.assert_array_equal(grad["b"]["kernel"], jnp.ones((16, 16)))


@pytest.mark.standard_promotion
def test_one_program_under_scan_with_traced_steps_and_stages_by_switch():
    view, _ = recipe("mdgf_exp")
    config = dataclasses.replace(CONFIG, recipe="sdgf_stepwise", m=8)
    by_switch = weights.progressive_view(config)
    tx = optax.sgd(0.1)

    def train(view, params):
        def body(carry, step):
            params, state = carry
            grads = jax.grad(lambda p: loss(view(p, step), X))(params)
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        (end, _), _ = lax.scan(body, (params, tx.init(params)), jnp.arange(100))
        return view(end, 99)

    both = jax.jit(lambda p: (train(view, p), train(by_switch, p)))
    for end in both(network()):
        found = end["b"]["kernel"]
        assert bool(jnp.isfinite(found).all())
    assert int((both(network())[0]["b"]["kernel"] != 0).sum()) == 64  # 1 of 4
    assert int((both(network())[1]["b"]["kernel"] != 0).sum()) == 32  # 1 of 8


def test_vmap_bfloat16_and_nnx_state():
    graph, state = nnx.split(
        nnx.Linear(16, 8, rngs=nnx.Rngs(0), param_dtype=jnp.float32, dtype=jnp.bfloat16)
    )
    view, _ = recipe("mdgf_exp")

    def square(state, step):
        return jnp.sum(nnx.merge(graph, view(state, step))(X.astype(jnp.bfloat16)) ** 2)

    grads = jax.vmap(jax.grad(square), in_axes=(None, 0))(state, jnp.asarray([0, 40, 90]))
    assert grads["kernel"][...].dtype == jnp.float32  # masters stay wide
    assert grads["kernel"][...].shape == (3, 16, 8)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), network())
    decayed = sj.mask_decay(half, jnp.float32(0.5), sj.NM(1, 4))
    assert decayed["a"]["kernel"].dtype == jnp.bfloat16


def test_sharded_equals_one_device(mesh):
    params = network()
    spec = NamedSharding(mesh, PartitionSpec(None, "model"))
    sharded = jax.tree.map(lambda w: jax.device_put(w, spec) if w.ndim == 2 else w, params)
    one, eight = (value_and_grad(p, 30, config=CONFIG) for p in (params, sharded))
    assert_same(one, eight, rtol=1e-5)


def test_gradient_noise_is_the_variance_of_each_leaf():
    grads = jax.grad(loss)(network(), X)
    found = weights.gradient_noise(grads)
    np.testing.assert_allclose(found["a"]["kernel"], np.var(grads["a"]["kernel"]), rtol=1e-5)
    half = weights.gradient_noise({"w": jnp.asarray([1.0, 3.0], jnp.bfloat16)})
    assert half["w"].dtype == jnp.float32
    assert half["w"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "magic"}, "recipe is 'magic'; allowed are mdgf_exp, mdgf_linear"),
        ({"gradient": "none"}, "gradient is 'none'; allowed are masked, straight_through"),
        ({"dense_fraction": -0.1}, "dense_fraction is -0.1"),
        ({"dense_fraction": 0.5, "fine_tune_fraction": 0.5}, "their sum must be below 1"),
        ({"decay_coef": -1.0}, "decay_coef is -1.0; it must not be negative"),
        ({"srste_decay": -1.0}, "srste_decay is -1.0"),
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"update_every": 0}, "update_every is 0"),
        ({"recipe": "sdgf_geometric", "frames": 0}, "frames is 0"),
        ({"recipe": "sdgf_stepwise", "n": 1, "m": 6}, "m / n is 6/1; the stepwise kind needs"),
        ({"n": 5}, "n is 5 and m is 4"),
        ({"recipe": "sdgf_custom"}, "table is None and recipe 'sdgf_custom'"),
        ({"table": ((0, 1, 4),)}, "they go together"),
        ({"recipe": "sdgf_custom", "table": ((3, 2, 4), (1, 1, 4))}, r"epochs \[3, 1\]"),
        ({"recipe": "sdgf_custom", "table": ((0, 2, 4),)}, "its last pattern must be 1:4"),
    ],
)
def test_settings_out_of_range(changes, message, unchecked):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_errors_name_argument_and_range(unchecked):
    params = network()
    view, _ = recipe("sdgf_geometric", n=1, m=8)
    message = r"leaf 'a/kernel' of shape \(16, 16\): stage 0 \(8:64\) needs groups of 64"
    with pytest.raises(ValueError, match=message):
        view(params, 0, stage=3)
    view, _ = recipe("sdgf_stepwise")
    with pytest.raises(ValueError, match="stage is 3; there are 0 to 2"):
        view(params, 0, stage=3)
    with pytest.raises(ValueError, match="where matches no leaf"):
        weights.progressive_recipe(CONFIG, where="none")[0](params, 0)
    with pytest.raises(ValueError, match=r"beta is 1\.5; it must be in \[0, 1\]"):
        sj.mask_decay(params, 1.5, sj.NM(1, 4))
    with pytest.raises(ValueError, match="gradient is 'free'; allowed are 'masked' and"):
        sj.mask_decay_weight(X, 0.5, 1, 4, axis=-1, gradient="free")
    with pytest.raises(TypeError, match="'w' must be floating point, not int32"):
        sj.mask_decay_weight(jnp.ones((4, 4), jnp.int32), 0.5, 1, 4)
    with pytest.raises(ValueError, match=r"the schedule starts at epochs \[\]"):
        weights.stage_at((), 0)
    with pytest.raises(ValueError, match="epoch is -1"):
        weights.stage_at(((0, 1, 4),), -1)
