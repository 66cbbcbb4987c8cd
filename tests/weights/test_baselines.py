"""CAST's baselines: the optimiser of AST against its vectors, MaskLLM against its definitions."""

import itertools

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

PATTERN = sj.NM(2, 4)
RATE, PULL, PERIOD = 0.02, 0.5, 3


def close(got, wanted, tolerance=1e-10):
    wanted = np.asarray(wanted)
    atol = 0.01 * tolerance * np.abs(wanted).max(initial=0.0)
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=atol)


@pytest.mark.vectors
def test_ast_vectors(reference):
    for case in reference("cast").cases("ast"):
        masks = {"kernel": jnp.asarray(case["mask"].T.astype(bool))}
        tx = weights.ast_adamw(
            float(case["learning_rate"]),
            decay=float(case["decay"]),
            weight_decay=float(case["weight_decay"]),
            b1=float(case["b1"]),
            b2=float(case["b2"]),
            eps=float(case["eps"]),
            pattern=PATTERN,
            masks=masks,
        )

        def step(carry, grad, tx=tx):
            params, state = carry
            updates, state = tx.update({"kernel": grad}, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params["kernel"]

        start = {"kernel": jnp.asarray(case["weight0"].T)}
        (_, state), after = jax.jit(
            lambda p, g, step=step, tx=tx: lax.scan(step, (p, tx.init(p)), g)
        )(start, jnp.asarray(case["grads"].transpose(0, 2, 1)))
        close(np.asarray(after).transpose(0, 2, 1), case["weight_after"])
        np.testing.assert_array_equal(state.masks["kernel"], masks["kernel"])


def network(shape=(16, 8)):
    w, v = jax.random.normal(jax.random.key(0), (2, *shape))
    return {"fc": {"kernel": w, "bias": v[0]}, "head": {"kernel": v}}


def transform(rate=RATE, pull=PULL, **options):
    options = {"pattern": PATTERN, "mask_period": PERIOD, "where": "fc/kernel", **options}
    return weights.ast_adamw(rate, decay=pull, **options)


def advance(tx, params, state, t):
    grads = jax.tree.map(lambda w: jnp.sin(3 * w + t.astype(w.dtype)), params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


@jax.jit
def one_step(params, state, t):
    return advance(transform(), params, state, t)


@jax.jit
def run(params, rate, pull):
    tx = transform(rate, pull)

    def step(carry, t):
        params, state = advance(tx, *carry, t)
        return (params, state), (params, state)

    return lax.scan(step, (params, tx.init(params)), jnp.arange(8))[1]


def test_the_masks_are_refreshed_after_the_update_from_the_new_weights():
    params, states = run(network(), RATE, PULL)
    fresh = jax.vmap(PATTERN.mask)(jnp.abs(params["fc"]["kernel"]))
    masks = states.masks["fc"]["kernel"]
    first = PATTERN.mask(jnp.abs(network()["fc"]["kernel"]))
    for t in range(8):
        if (t + 1) % PERIOD == 0:
            np.testing.assert_array_equal(masks[t], fresh[t])
        else:
            np.testing.assert_array_equal(masks[t], masks[t - 1] if t else first)
    assert bool((masks[-1] != first).any())
    np.testing.assert_array_equal(states.count, np.arange(1, 9))


def test_given_masks_are_never_refreshed_and_say_what_is_in_scope():
    params = network()
    masks = {"fc": {"kernel": jnp.arange(128).reshape(16, 8) % 2 == 0, "bias": True}}
    masks["head"] = {"kernel": True}
    tx = transform(masks=masks, where=None)
    step = jax.jit(lambda p, s, t: advance(tx, p, s, t))
    state = tx.init(params)
    for t in range(2 * PERIOD):
        params, state = step(params, state, jnp.asarray(t))
    np.testing.assert_array_equal(state.masks["fc"]["kernel"], masks["fc"]["kernel"])
    assert state.masks["head"]["kernel"].shape == ()
    assert sj.count_masks(sj.get_masks(state)).per_leaf == {"fc/kernel": (64, 128)}


def test_pruned_weights_are_pulled_in_proportion_and_the_momentum_stays_raw():
    params = network()
    tx = transform(pull=1e-3, weight_decay=0.0, eps=1e3)  # so large that a step is linear in u
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    kernel, mask = params["fc"]["kernel"], tx.init(params).masks["fc"]["kernel"]
    pull = jnp.where(mask, 0.0, 1e-3 * kernel)
    np.testing.assert_allclose(
        updates["fc"]["kernel"], -RATE * pull / 0.1 / 1e3, rtol=2e-3, atol=2.0**-24 * 4
    )
    np.testing.assert_allclose(state.nu["fc"]["kernel"], 0.05 * pull**2, rtol=1e-5)
    assert all(float(jnp.abs(m).max()) == 0.0 for m in jax.tree.leaves(state.mu))


def test_decoupled_decay_shrinks_every_weight_in_scope_and_no_other():
    params = network()
    tx = transform(pull=0.0)
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(
        after["fc"]["kernel"], params["fc"]["kernel"] * (1 - 0.1 * RATE), rtol=1e-6
    )
    np.testing.assert_array_equal(after["head"]["kernel"], params["head"]["kernel"])


@pytest.mark.standard_promotion
def test_leaves_out_of_scope_get_the_adam_of_optax():
    ends, _ = run(network(), RATE, PULL)
    tx = optax.adam(RATE, b2=0.95)
    plain, state = network(), tx.init(network())
    step = jax.jit(lambda p, s, t: advance(tx, p, s, t))
    for t in range(8):
        plain, state = step(plain, state, jnp.asarray(t))
    for path in (("fc", "bias"), ("head", "kernel")):
        got, wanted = ends[path[0]][path[1]][-1], plain[path[0]][path[1]]
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_rates_are_numbers_schedules_or_traced_and_batched():
    params = network()
    rates, pulls = jnp.asarray([RATE, RATE / 2]), jnp.asarray([PULL, 0.0])
    batched, _ = jax.vmap(run, in_axes=(None, 0, 0))(params, rates, pulls)
    alone, _ = run(params, rates[1], pulls[1])
    np.testing.assert_allclose(
        batched["fc"]["kernel"][1], alone["fc"]["kernel"], rtol=1e-5, atol=1e-6
    )
    tx = transform(
        lambda t: RATE * (t + 1).astype(jnp.float32), lambda t: PULL * t.astype(jnp.float32)
    )
    state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    update = jax.jit(tx.update)
    first, state = update(grads, state, params)
    second, state = update(grads, state, params)
    np.testing.assert_allclose(first["head"]["kernel"], -RATE, rtol=1e-4)
    np.testing.assert_allclose(second["head"]["kernel"], -2 * RATE, rtol=1e-4)
    # without a pull at step 0 the second moment of all weights is that of the gradient
    assert float(jnp.ptp(first["fc"]["kernel"] + 0.1 * RATE * params["fc"]["kernel"])) < 1e-5


def test_it_trains_through_the_masks_in_one_compiled_step():
    x = jax.random.normal(jax.random.key(1), (32, 16))
    y = x @ jax.random.normal(jax.random.key(2), (16, 8))
    params = {"kernel": jnp.zeros((16, 8)) + 0.01 * network()["fc"]["kernel"]}
    tx = transform(where=None, pull=1e-3)

    def loss(params, masks):
        return jnp.mean((x @ sj.ste(params, PATTERN, masks=masks)["kernel"] - y) ** 2)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params, sj.get_masks(state))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, values = tx.init(params), []
    for _ in range(40):
        params, state, value = step(params, state)
        values.append(float(value))
    assert step._cache_size() == 1
    assert values[-1] < values[0] / 2


def test_sharded_equals_one_device_without_gathering(mesh):
    sharding = NamedSharding(mesh, PartitionSpec("data", "model"))
    params = network()
    sharded = jax.tree.map(lambda w: jax.device_put(w, sharding) if w.ndim == 2 else w, params)
    state, alone_state = transform().init(sharded), transform().init(params)
    assert state.nu["fc"]["kernel"].sharding.is_equivalent_to(sharding, 2)
    step = one_step.lower(sharded, state, jnp.asarray(0)).compile()
    assert "all-gather" not in step.as_text()
    for t in range(PERIOD):
        sharded, state = one_step(sharded, state, jnp.asarray(t))
        params, alone_state = one_step(params, alone_state, jnp.asarray(t))
    np.testing.assert_allclose(
        sharded["fc"]["kernel"], params["fc"]["kernel"], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(state.masks["fc"]["kernel"], alone_state.masks["fc"]["kernel"])


def test_narrow_weights_move_and_stay_narrow():
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), network())
    tx = transform()
    state = tx.init(params)
    assert state.nu["fc"]["kernel"].dtype == jnp.float32
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = jax.jit(tx.update)(grads, state, params)
    assert updates["fc"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_allclose(
        updates["head"]["kernel"].astype(jnp.float32), -RATE, atol=2.0**-7
    )  # half the spacing of weights around 2
    kept = updates["fc"]["kernel"][state.masks["fc"]["kernel"]].astype(jnp.float32)
    assert float(kept.max()) < 0.0


def test_an_nnx_state_is_updated_as_it_is():
    params = nnx.state(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    tx = transform(where=None)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert sj.count_masks(sj.get_masks(state)).per_leaf == {"kernel": (16, 32)}


def test_ast_refuses_impossible_settings():
    params = network()
    with pytest.raises(ValueError, match="mask_period is 0; it must be at least 1"):
        transform(mask_period=0)
    with pytest.raises(ValueError, match=r"weight_decay is -0\.1; it must not be negative"):
        transform(weight_decay=-0.1)
    with pytest.raises(ValueError, match=r"leaf 'fc/kernel': axis 0 .* length 6, .* m = 4"):
        transform().init(network((6, 8)))
    with pytest.raises(ValueError, match="where matches no leaf: 'none'"):
        transform(where="none").init(params)
    with pytest.raises(ValueError, match="masks do not have the structure of the parameters"):
        transform(masks={"fc": True}).init(params)
    wrong = jax.tree.map(lambda _: jnp.ones((2, 2), bool), params)
    with pytest.raises(
        ValueError, match=r"the mask of 'fc/bias' has shape \(2, 2\), its parameter"
    ):
        transform(masks=wrong).init(params)
    tx = transform()
    state = tx.init(params)
    with pytest.raises(ValueError, match="params is None; ast_adamw decays the parameters"):
        tx.update(params, state)
    with pytest.raises(ValueError, match="masks do not have the structure"):
        tx.update(params, state._replace(masks={"fc": state.masks["fc"]}), params)


# MaskLLM

PATTERNS = np.array([p for p in itertools.product([1, 0], repeat=4) if sum(p) == 2])
GROUPS = 2048


def prior_mask():
    return PATTERN.mask(jax.random.normal(jax.random.key(0), (4, GROUPS))).T


LOGITS = weights.maskllm_init(jax.random.key(1), prior_mask())
soft_mask = jax.jit(
    lambda key, logits, kappa, tau: weights.maskllm_mask(key, logits, kappa=kappa, tau=tau)
)


def test_the_hard_mask_is_one_of_the_six_patterns():
    logits = jnp.eye(6)
    np.testing.assert_array_equal(weights.maskllm_hard_mask(logits), PATTERNS == 1)
    mask = jax.jit(weights.maskllm_hard_mask)(LOGITS)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask.sum(-1), np.full(GROUPS, 2))


def test_the_prior_adds_its_agreement_in_standard_deviations():
    key, mask = jax.random.key(1), prior_mask()
    plain = weights.maskllm_init(key, mask, prior=0.0)
    assert plain.shape == (GROUPS, 6)
    assert float(plain.std()) == pytest.approx(0.01, rel=0.05)
    assert float(plain.mean()) == pytest.approx(0.0, abs=5e-4)
    agreement = np.asarray(mask, np.int32) @ PATTERNS.T
    wanted = plain + (agreement - 1) * 3 * float(plain.std())
    np.testing.assert_allclose(LOGITS, wanted, rtol=1e-5, atol=1e-7)


def test_a_strong_prior_is_the_given_mask_and_none_is_chance():
    key, mask = jax.random.key(1), prior_mask()

    def agreement(prior):
        hard = weights.maskllm_hard_mask(weights.maskllm_init(key, mask, prior=prior))
        return float((hard == mask).all(-1).mean())

    assert agreement(30.0) == 1.0
    assert agreement(0.0) == pytest.approx(1 / 6, abs=0.04)
    assert agreement(0.0) < agreement(1.0) < agreement(3.0)


def test_soft_masks_keep_two_of_four_and_harden_as_tau_falls():
    key = jax.random.key(2)
    warm, cold = (soft_mask(key, LOGITS, 500.0, tau) for tau in (4.0, 1e-4))
    for mask in (warm, cold):
        np.testing.assert_allclose(mask.sum(-1), 2.0, rtol=1e-5)
        assert float(mask.min()) >= 0.0
        assert float(mask.max()) <= 1.0 + 1e-6

    def distance(mask):
        return float(jnp.abs(mask - jnp.round(mask)).mean())

    assert distance(cold) < 1e-3 < 0.02 < distance(warm)
    # with logits that dwarf the noise the soft mask tends to the hard one
    settled = soft_mask(key, LOGITS, 1e6, 1.0)
    hard = weights.maskllm_hard_mask(LOGITS)
    assert float(jnp.abs(settled - hard.astype(jnp.float32)).mean()) < 1e-3


def test_noise_comes_from_the_key_and_picks_patterns_by_their_softmax():
    logits = jnp.tile(jnp.log(jnp.asarray([0.4, 0.2, 0.2, 0.1, 0.05, 0.05])), (GROUPS, 1))
    one, same, other = (soft_mask(jax.random.key(k), logits, 1.0, 1e-3) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert bool((one != other).any())
    kept = np.asarray([0.4, 0.2, 0.2, 0.1, 0.05, 0.05]) @ PATTERNS
    np.testing.assert_allclose(one.mean(0), kept, atol=0.05)


def test_gradients_flow_to_the_logits_of_the_patterns_that_help():
    logits = 0.01 * jax.random.normal(jax.random.key(0), (8, 6))

    def loss(logits):
        return -soft_mask(jax.random.key(1), logits, 1.0, 1.0)[:, 0].sum()  # keep the first weight

    grad = np.asarray(jax.jit(jax.grad(loss))(logits))
    assert (grad[:, :3] < 0).all()
    assert (grad[:, 3:] > 0).all()
    np.testing.assert_allclose(grad.sum(-1), 0.0, atol=1e-6)


def test_kappa_and_tau_may_be_batched_and_logits_narrow():
    keys = jax.random.split(jax.random.key(0), 3)
    taus = jnp.asarray([4.0, 1.0, 0.1])
    masks = jax.vmap(soft_mask, in_axes=(0, None, None, 0))(keys, LOGITS[:8], 100.0, taus)
    alone = soft_mask(keys[1], LOGITS[:8], 100.0, taus[1])
    np.testing.assert_allclose(masks[1], alone, rtol=1e-5, atol=1e-6)
    narrow = soft_mask(keys[0], LOGITS[:8].astype(jnp.bfloat16), 100.0, jnp.float32(1.0))
    assert narrow.dtype == jnp.bfloat16


def test_maskllm_refuses_impossible_settings():
    key, mask = jax.random.key(0), prior_mask()[:2]
    with pytest.raises(ValueError, match=r"std is -1\.0 and prior 3\.0; neither may be negative"):
        weights.maskllm_init(key, mask, std=-1.0)
    with pytest.raises(ValueError, match=r"prior -3\.0; neither may be negative"):
        weights.maskllm_init(key, mask, prior=-3.0)
    for tau in (0.0, -1.0):
        with pytest.raises(ValueError, match=f"tau is {tau}; it must be positive"):
            weights.maskllm_mask(key, LOGITS[:2], kappa=1.0, tau=tau)


def tree_of_kernels():
    keys = jax.random.split(jax.random.key(5), 2)
    return {
        "stack": {"kernel": jax.random.normal(keys[0], (2, 8, 6))},
        "one": {"kernel": jax.random.normal(keys[1], (12, 4)), "bias": jnp.ones(4)},
    }


def test_maskllm_over_a_tree_starts_at_the_priors_masks():
    params = tree_of_kernels()
    masks = sj.make_masks(sj.magnitude(params), pattern=sj.NM(2, 4, ties="lowest"))
    logits = weights.maskllm_logits(jax.random.key(0), masks, prior=20.0)
    assert logits["one"]["bias"].shape == ()
    assert logits["stack"]["kernel"].shape == (2 * 6 * 2, 6)
    found = weights.maskllm_masks(params, logits)
    jax.tree.map(np.testing.assert_array_equal, found, masks)
    # cold and strongly weighted, the soft masks are the hard ones
    soft = weights.maskllm_params(jax.random.key(1), params, logits, kappa=1e4, tau=0.01)
    hard = sj.apply_masks(params, masks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), soft, hard)


def test_maskllm_over_a_tree_trains_the_logits_alone():
    params = tree_of_kernels()
    masks = sj.make_masks(sj.magnitude(params), pattern=sj.NM(2, 4, ties="lowest"))
    logits = weights.maskllm_logits(jax.random.key(0), masks)

    def loss(logits):
        soft = weights.maskllm_params(jax.random.key(1), params, logits, kappa=100.0, tau=4.0)
        return sum(jnp.sum((leaf - 1) ** 2) for leaf in jax.tree.leaves(soft))

    grads = jax.jit(jax.grad(loss))(logits)
    assert float(grads["one"]["bias"]) == 0.0
    assert float(jnp.abs(grads["stack"]["kernel"]).max()) > 0
    first, second = (
        weights.maskllm_params(jax.random.key(k), params, logits, kappa=100.0, tau=4.0)
        for k in (1, 2)
    )
    assert not np.allclose(first["one"]["kernel"], second["one"]["kernel"])
