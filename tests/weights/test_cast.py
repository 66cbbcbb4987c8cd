"""CAST: the vectors, the pitfalls of the method, and how its parts compose."""

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

RATE, DECAY, STEPS, PERIOD = 1e-2, 0.05, 12, 5
SHAPE = (16, 8)


cast_loss, loss_and_grad = (
    jax.jit(function, static_argnames=("eta", "temperature", "ignore"))
    for function in (weights.cast_loss, jax.value_and_grad(weights.cast_loss, has_aux=True))
)


def close(got, wanted, tolerance=1e-10):
    wanted = np.asarray(wanted)
    atol = 0.01 * tolerance * np.abs(wanted).max(initial=0.0)
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=atol)


def same_trees(one, two, **tolerance):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two)):
        np.testing.assert_allclose(a, b, **tolerance)


# the vectors


@pytest.mark.vectors
def test_every_family_has_a_test(reference):
    # compress is compared in test_compact.py, ast in test_baselines.py
    assert reference("cast").families() == {"adams", "scale", "distill", "compress", "ast"}


@pytest.mark.vectors
def test_adams_vectors(reference):
    for case in reference("cast").cases("adams"):
        rates = jnp.asarray(case["learning_rate_per_step"])
        pattern = sj.NM(case["n"], case["m"], ties="lowest")
        tx = weights.adams(
            lambda t, rates=rates: rates[t],
            total_steps=case["total_steps"],
            l1_decay=float(case["l1_decay"]),
            b1=float(case["b1"]),
            b2=float(case["b2"]),
            eps=float(case["eps"]),
            mask_period=case["mask_period"],
            pattern=pattern,
        )

        def step(carry, grad, tx=tx):
            params, state = carry
            updates, state = tx.update({"kernel": grad}, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), (params, state)

        start = {"kernel": jnp.asarray(case["weight0"].T)}
        grads = jnp.asarray(case["grads"].transpose(0, 2, 1))
        (end, _), (params, states) = jax.jit(
            lambda p, g, step=step, tx=tx: lax.scan(step, (p, tx.init(p)), g)
        )(start, grads)

        def saved(tree, steps=case["steps_saved"]):
            return np.asarray(tree["kernel"])[steps].transpose(0, 2, 1)

        np.testing.assert_array_equal(saved(states.masks), case["mask_used"])
        close(saved(params), case["weight_after"])
        close(saved(states.mu), case["mu_after"])
        close(saved(states.nu), case["nu_after"])
        np.testing.assert_array_equal(
            states.flips[:: case["mask_period"]], case["flips_per_refresh"]
        )
        _, masks = weights.finish(end, pattern=pattern)
        np.testing.assert_array_equal(masks["kernel"].T, case["mask_final"])
        report = weights.sparsity_report(end, masks)
        close(report["kept_ratio"], case["sparse_weight_ratio"])


fold_and_prune = jax.jit(weights.fold_and_prune)
finish = jax.jit(weights.finish, static_argnames=("pattern", "where"))


@jax.jit
def scale_and_pull(kernel, scale, x, cotangent):
    y, pull = jax.vjp(lambda w, a: x @ weights.scaled_kernel(w, a), kernel, scale)
    return y, pull(cotangent)


@pytest.mark.vectors
def test_scale_vectors(reference):
    for case in reference("cast").cases("scale"):
        arrays = [case[name].T for name in ("weight", "scale")] + [case["x"]]
        pattern = sj.NM(case["n"], case["m"], ties="lowest")
        for dtype, tolerance in ((jnp.float64, 1e-10), (jnp.float32, 2e-5)):
            kernel, scale, x = (jnp.asarray(a, dtype) for a in arrays)
            cotangent = jnp.asarray(case["cotangent"], dtype)
            y, (grad_kernel, grad_scale) = scale_and_pull(kernel, scale, x, cotangent)
            assert y.dtype == dtype
            close(y, case["y"], tolerance)
            close(grad_kernel.T, case["grad_weight"], tolerance)
            close(grad_scale.T, case["grad_scale"], tolerance)
            mask = pattern.mask(jnp.abs(kernel))
            np.testing.assert_array_equal(mask.T, case["mask"])
            folded = fold_and_prune(kernel, scale, mask)
            close(folded.T, case["folded_weight"], tolerance)
            finished, masks = finish({"kernel": kernel}, {"kernel": scale}, pattern=pattern)
            np.testing.assert_array_equal(masks["kernel"], mask)
            np.testing.assert_array_equal(finished["kernel"], folded)


@pytest.mark.vectors
def test_distillation_vectors(reference):
    for case in reference("cast").cases("distill"):
        labels = jnp.asarray(case["labels"])
        options = {name: float(case[name]) for name in ("eta", "temperature")}
        for dtype, tolerance in ((jnp.float64, 1e-10), (jnp.float32, 2e-5)):
            teacher = jnp.asarray(case["teacher_logits"], dtype)
            student = jnp.asarray(case["student_logits"], dtype)
            (loss, parts), grad = loss_and_grad(student, teacher, labels, **options)
            close(loss, case["loss"], tolerance)
            close(parts["cross_entropy"], case["cross_entropy"], tolerance)
            close(parts["kl"], case["kl"], tolerance * 10)  # a difference of logarithms
            close(grad, case["grad_student_logits"], tolerance * 10)


# AdamS


def network(shape=SHAPE):
    w, v = jax.random.normal(jax.random.key(0), (2, *shape))
    return {"fc": {"kernel": w, "bias": v[0]}, "norm": {"scale": v[1]}, "head": {"kernel": v}}


def gradients(params, t):
    """Some smooth function of the step, so that a whole run is one scan."""
    return jax.tree.map(lambda w: jnp.sin(3 * w + t.astype(w.dtype)), params)


def transform(rate=RATE, decay=DECAY, **options):
    options = {"total_steps": STEPS, "mask_period": PERIOD, "where": "fc/kernel", **options}
    return weights.adams(rate, l1_decay=decay, **options)


def advance(tx, params, state, t):
    updates, state = tx.update(gradients(params, t), state, params)
    return optax.apply_updates(params, updates), state


def scan(tx, params, state, steps):
    def step(carry, t):
        params, state = advance(tx, *carry, t)
        return (params, state), state

    (params, state), states = lax.scan(step, (params, state), steps)
    return params, state, states


@jax.jit
def run(params, rate, decay):
    """A whole run, its rates traced."""
    tx = transform(rate, decay)
    return scan(tx, params, tx.init(params), jnp.arange(STEPS))


@jax.jit
def one_step(params, state, t):
    return advance(transform(), params, state, t)


@jax.jit
def apply_gradients(grads, state, params):
    return transform().update(grads, state, params)


def test_adams_is_the_loop_of_its_equations():
    params = network()
    theta = np.asarray(params["fc"]["kernel"], np.float64)
    mu = nu = np.zeros_like(theta)
    mask, flips = None, []
    for t in range(STEPS):
        if t % PERIOD == 0:
            groups = np.abs(theta).reshape(4, 4, 8)
            ranked = np.argsort(np.argsort(-groups, axis=1, kind="stable"), axis=1)
            fresh = (ranked < 2).reshape(SHAPE)
            flips.append(0 if mask is None else int((fresh != mask).sum()))
            mask = fresh
        grad = np.sin(3 * theta + t)
        mu = 0.9 * mu + 0.1 * grad
        share = t / STEPS
        u = np.where(mask, mu, (1 - share) * mu + share * DECAY * np.sign(theta))
        nu = 0.999 * nu + 0.001 * u**2
        u_hat, nu_hat = u / (1 - 0.9 ** (t + 1)), nu / (1 - 0.999 ** (t + 1))
        theta = theta - RATE * u_hat / (np.sqrt(nu_hat) + 1e-8)
    end, state, states = run(params, RATE, DECAY)
    np.testing.assert_allclose(end["fc"]["kernel"], theta, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(state.mu["fc"]["kernel"], mu, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.nu["fc"]["kernel"], nu, rtol=2e-3, atol=1e-7)
    np.testing.assert_array_equal(state.masks["fc"]["kernel"], mask)
    np.testing.assert_array_equal(states.flips[::PERIOD], flips)
    np.testing.assert_array_equal(states.flips, np.repeat(flips, PERIOD)[:STEPS])


@pytest.mark.standard_promotion
def test_leaves_out_of_scope_get_the_adam_of_optax():
    params = network()
    end, state, _ = run(params, RATE, DECAY)
    tx = optax.adam(RATE)
    plain, adam, _ = jax.jit(lambda p: scan(tx, p, tx.init(p), jnp.arange(STEPS)))(params)
    for path in (("fc", "bias"), ("norm", "scale"), ("head", "kernel")):
        got, wanted = (tree[path[0]][path[1]] for tree in (end, plain))
        np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=1e-7)
        assert state.masks[path[0]][path[1]].shape == ()
        for moment in ("mu", "nu"):
            ours, theirs = (getattr(s, moment)[path[0]][path[1]] for s in (state, adam[0]))
            np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-8)
    assert not np.allclose(end["fc"]["kernel"], plain["fc"]["kernel"], atol=1e-3)


def test_momentum_keeps_the_raw_gradient_and_the_second_moment_what_is_applied():
    params = network()
    state = transform().init(params)._replace(count=jnp.asarray(PERIOD + 1, jnp.int32))
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, state = apply_gradients(grads, state, params)
    assert float(jnp.abs(state.mu["fc"]["kernel"]).max()) == 0.0
    mask = state.masks["fc"]["kernel"]
    pushed = DECAY * (PERIOD + 1) / STEPS
    np.testing.assert_allclose(
        state.nu["fc"]["kernel"], jnp.where(mask, 0.0, 0.001 * pushed**2), rtol=1e-5
    )
    # the decay goes against the sign of the weight, and only where the mask is off
    np.testing.assert_array_equal(
        jnp.sign(updates["fc"]["kernel"]),
        jnp.where(mask, 0.0, -jnp.sign(params["fc"]["kernel"])),
    )


def test_the_first_step_does_not_decay_and_a_zero_weight_is_not_pushed():
    params = network()
    params["fc"]["kernel"] = params["fc"]["kernel"].at[0].set(0.0)
    state = transform().init(params)
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, state = apply_gradients(grads, state, params)
    assert all(float(jnp.abs(u).max()) == 0.0 for u in jax.tree.leaves(updates))
    updates, state = apply_gradients(grads, state, params)
    assert float(jnp.abs(updates["fc"]["kernel"]).max()) > 0.0
    assert float(jnp.abs(updates["fc"]["kernel"][0]).max()) == 0.0
    assert float(jnp.abs(state.nu["fc"]["kernel"][0]).max()) == 0.0


def test_masks_are_refreshed_before_they_are_used_and_kept_in_between():
    params = network()
    fresh = sj.make_masks(sj.magnitude(params), pattern=weights.CAST_PATTERN, where="fc/kernel")
    stale = jax.tree.map(lambda m: m if m.ndim == 0 else ~m, fresh)
    grads = jax.tree.map(jnp.zeros_like, params)
    bits = params["fc"]["kernel"].size

    def after(count):
        state = transform().init(params)._replace(masks=stale, count=jnp.asarray(count, jnp.int32))
        return apply_gradients(grads, state, params)

    for count, flips in ((0, 0), (PERIOD, bits), (2 * PERIOD, bits)):
        updates, state = after(count)
        np.testing.assert_array_equal(state.masks["fc"]["kernel"], fresh["fc"]["kernel"])
        assert int(state.flips) == flips
        assert int(state.count) == count + 1
        # what is pushed at this very step is what the new mask removes
        pushed = updates["fc"]["kernel"] != 0
        np.testing.assert_array_equal(pushed, ~fresh["fc"]["kernel"] & (count > 0))
    for count in (1, PERIOD - 1, PERIOD + 1):
        updates, state = after(count)
        np.testing.assert_array_equal(state.masks["fc"]["kernel"], stale["fc"]["kernel"])
        np.testing.assert_array_equal(updates["fc"]["kernel"] != 0, fresh["fc"]["kernel"])
        assert int(state.flips) == 0


def test_the_planned_number_of_steps_is_part_of_the_algorithm():
    params = network()
    longer = transform(total_steps=2 * STEPS)
    steps = jnp.arange(STEPS)
    end, _, _ = jax.jit(lambda p: scan(longer, p, longer.init(p), steps))(params)
    other = run(params, RATE, DECAY)[0]["fc"]["kernel"]
    assert float(jnp.abs(end["fc"]["kernel"] - other).max()) > RATE / 2


def test_a_resumed_run_ends_where_the_unbroken_one_does_and_nothing_recompiles():
    params = network()
    state = transform().init(params)
    compiled = one_step._cache_size()
    for t in range(STEPS):
        if t == PERIOD + 2:  # the mask is two steps old: it has to come back as it was
            params, state = jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, (params, state)))
        params, state = one_step(params, state, jnp.asarray(t))
    assert one_step._cache_size() == compiled + 1
    end, last, _ = run(network(), RATE, DECAY)
    same_trees(params, end, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(state.masks["fc"]["kernel"], last.masks["fc"]["kernel"])


def test_rates_may_be_traced_and_batched():
    params = network()
    rates, decays = jnp.asarray([RATE, 2 * RATE]), jnp.asarray([DECAY, 0.0])
    run(params, rates[0], decays[0])
    compiled = run._cache_size()
    alone = [run(params, rates[i], decays[i]) for i in range(2)]
    assert run._cache_size() == compiled  # other numbers, the same program
    ends, states, _ = jax.vmap(run, in_axes=(None, 0, 0))(params, rates, decays)
    for i, (end, state, _) in enumerate(alone):
        same_trees(jax.tree.map(lambda w, i=i: w[i], ends), end, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(states.masks["fc"]["kernel"][i], state.masks["fc"]["kernel"])


@pytest.mark.parametrize("spec", [(None, "model"), ("data", "model"), ("data", None)])
def test_sharded_state_equals_one_device_without_gathering(mesh, spec):
    params = network()  # 16 inputs on 4 devices: whole groups of 4
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    sharded = jax.tree.map(lambda w: jax.device_put(w, sharding) if w.ndim == 2 else w, params)
    state = transform().init(sharded)
    for tree in (state.mu, state.nu, state.masks):
        assert tree["fc"]["kernel"].sharding.is_equivalent_to(sharding, 2)
    step = one_step.lower(sharded, state, jnp.asarray(0)).compile()
    assert "all-gather" not in step.as_text()
    alone, alone_state = params, transform().init(params)
    for t in range(PERIOD + 1):
        sharded, state = one_step(sharded, state, jnp.asarray(t))
        alone, alone_state = one_step(alone, alone_state, jnp.asarray(t))
        assert state.masks["fc"]["kernel"].sharding.is_equivalent_to(sharding, 2)
    same_trees(sharded, alone, rtol=1e-5, atol=1e-6)
    assert int(state.flips) == int(alone_state.flips)
    np.testing.assert_array_equal(state.masks["fc"]["kernel"], alone_state.masks["fc"]["kernel"])


@pytest.mark.standard_promotion
def test_it_chains_behind_a_global_clip_and_the_masks_are_found():
    params = network()
    chained = optax.chain(optax.clip_by_global_norm(1.0), transform())
    state = chained.init(params)
    grads = gradients(params, jnp.asarray(0))
    norm = optax.tree.norm(grads)
    assert float(norm) > 1.0
    updates, state = jax.jit(chained.update)(grads, state, params)
    clipped = jax.tree.map(lambda g: g / norm, grads)
    wanted, alone = apply_gradients(clipped, transform().init(params), params)
    same_trees(updates, wanted, rtol=1e-5, atol=1e-7)
    same_trees(state[1].mu, alone.mu, rtol=1e-5, atol=1e-7)
    masks = sj.get_masks(state)
    assert sj.count_masks(masks).per_leaf == {"fc/kernel": (64, 128)}
    assert sj.count_masks(sj.get_masks(sj.set_masks(state, masks))).density == 0.5


def test_it_runs_in_the_optimiser_of_nnx():
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model))
    tx = weights.adams(RATE, total_steps=4, l1_decay=DECAY)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 8))) ** 2))(model)
        optimizer.update(model, grads)

    @jax.jit
    def pure_step(params, state):
        def loss(p):
            return jnp.sum((jnp.ones((2, 8)) @ p["kernel"] + p["bias"]) ** 2)

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
        step(model, optimizer)
        params, state = pure_step(params, state)
    same_trees(nnx.to_pure_dict(nnx.state(model)), params, rtol=1e-5, atol=1e-6)
    masks = sj.get_masks(optimizer.opt_state)
    assert sj.count_masks(masks).per_leaf == {"kernel": (16, 32)}


def test_narrow_leaves_out_of_scope_move_and_stay_narrow():
    params = network()
    params["norm"]["scale"] = params["norm"]["scale"].astype(jnp.bfloat16)
    state = transform().init(params)
    assert state.nu["norm"]["scale"].dtype == jnp.float32  # b2 = 0.999 is 1 in bfloat16
    grads = jax.tree.map(jnp.ones_like, params)
    grads["norm"]["scale"] = grads["norm"]["scale"].at[0].set(0)
    for _ in range(2):
        updates, state = apply_gradients(grads, state, params)
    assert updates["norm"]["scale"].dtype == jnp.bfloat16
    np.testing.assert_allclose(
        updates["norm"]["scale"].astype(jnp.float32), [0] + [-RATE] * 7, rtol=0.01
    )


def test_double_precision_is_allowed(x64):
    params = {"kernel": jnp.ones((4, 2), jnp.float64)}
    tx = weights.adams(RATE, total_steps=4, l1_decay=DECAY)
    updates, state = tx.update(params, tx.init(params), params)
    assert updates["kernel"].dtype == state.nu["kernel"].dtype == jnp.float64


@pytest.mark.standard_promotion
def test_a_run_ends_sparse_and_pruning_does_not_jump():
    key = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(key[0], (64, 16))
    y = x @ jax.random.normal(key[1], (16, 8))
    params = {"kernel": jax.random.normal(key[2], (16, 8))}
    schedule = optax.cosine_decay_schedule(0.1, 200, alpha=0.001)
    scales = weights.init_scales(params)

    def loss(params, scales):
        return jnp.mean((x @ weights.scale_params(params, scales)["kernel"] - y) ** 2)

    @jax.jit
    def train(params, scales):
        tx = weights.adams(schedule, total_steps=200, l1_decay=0.5, where="^0/kernel")

        def step(carry, _):
            trees, state = carry
            grads = jax.grad(lambda both: loss(*both))(trees)
            updates, state = tx.update(grads, state, trees)
            return (optax.apply_updates(trees, updates), state), state.flips

        start = (params, scales)
        (trees, state), flips = lax.scan(step, (start, tx.init(start)), length=200)
        return trees, state, flips

    masks = sj.make_masks(sj.magnitude(params), pattern=weights.CAST_PATTERN)
    reach, mean = weights.check_reach(params, masks, schedule, total_steps=200)
    assert reach > 1.5 * mean
    (params, scales), state, flips = train(params, scales)
    assert int(flips[-1]) == 0
    final, masks = weights.finish(params, scales)
    np.testing.assert_array_equal(masks["kernel"], state.masks[0]["kernel"])
    report = weights.sparsity_report(params, masks)
    assert report["kept_ratio"] > 0.999
    assert float(weights.groups_in_pattern(params, weights.CAST_PATTERN)) == 1.0
    before, after = (float(loss(params, scales)), float(loss(final, weights.init_scales(final))))
    assert after == pytest.approx(before, rel=0.005)
    dropped = sj.apply_masks(final, jax.tree.map(jnp.logical_not, masks))
    assert float(jnp.abs(dropped["kernel"]).max()) == 0.0
    assert int((final["kernel"].reshape(4, 4, 8) != 0).sum(1).max()) == 2
    weights.compress_2to4(final["kernel"])  # refuses a third non-zero
    assert not np.allclose(scales["kernel"], 1.0)


@pytest.mark.standard_promotion
def test_the_decay_budget_is_the_sum_of_its_loop():
    schedule = optax.cosine_decay_schedule(0.1, 50)
    wanted = sum(float(schedule(t)) * t / 50 for t in range(50))
    assert weights.decay_budget(schedule, total_steps=50) == pytest.approx(wanted, rel=1e-6)
    assert weights.decay_budget(2e-5, total_steps=7500) == pytest.approx(0.075, rel=1e-3)
    assert weights.decay_budget(jnp.float32(0.5), total_steps=1) == 0.0


def test_a_run_out_of_reach_is_refused_unless_forced():
    params = {"kernel": jnp.asarray([[3.0], [0.4], [-2.0], [0.2]])}
    masks = sj.make_masks(sj.magnitude(params), pattern=weights.CAST_PATTERN)
    with pytest.raises(ValueError, match=r"travel 0\.045, .* magnitude is 0\.3: at least 1\.5"):
        weights.check_reach(params, masks, 0.01, total_steps=10)
    forced = weights.check_reach(params, masks, 0.01, total_steps=10, force=True)
    assert forced == pytest.approx((0.045, 0.3))
    assert weights.check_reach(params, masks, 0.2, total_steps=10) == pytest.approx((0.9, 0.3))
    with pytest.raises(ValueError, match=r"at least 4\.0 times"):
        weights.check_reach(params, masks, 0.2, total_steps=10, margin=4.0)


# scales


def test_scaled_kernel_is_its_formula_and_so_is_its_gradient():
    kernel, cotangent = jax.random.normal(jax.random.key(0), (2, 12, 5))
    scale = jax.random.normal(jax.random.key(1), (3, 5))

    def explicit(w, a):
        return jnp.stack([w[r] * a[r // 4] for r in range(12)])

    def pulled(function):
        def value_and_pull(w, a):
            value, pull = jax.vjp(function, w, a)
            return value, pull(cotangent)

        return jax.jit(value_and_pull)(kernel, scale)

    (got, grads), (wanted, wanted_grads) = pulled(weights.scaled_kernel), pulled(explicit)
    np.testing.assert_array_equal(got, wanted)
    same_trees(grads, wanted_grads, rtol=1e-5, atol=1e-6)
    narrow = weights.scaled_kernel(kernel.astype(jnp.bfloat16), scale.astype(jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16
    batched = jax.vmap(weights.scaled_kernel, in_axes=(None, 0))(kernel, scale[None])
    np.testing.assert_array_equal(batched[0], wanted)


def test_stacked_layers_are_scaled_and_finished_layer_by_layer():
    kernel = jax.random.normal(jax.random.key(0), (3, 8, 4))
    params = {"layers": {"kernel": kernel}, "embed": {"kernel": kernel[0]}}
    scales = weights.init_scales(params)
    assert scales["layers"]["kernel"].shape == (3, 2, 4)
    assert scales["embed"]["kernel"].shape == ()
    scales["layers"]["kernel"] += jax.random.normal(jax.random.key(1), (3, 2, 4))
    view = jax.jit(weights.scale_params)(params, scales)
    final, masks = finish(params, scales)
    np.testing.assert_array_equal(view["embed"]["kernel"], kernel[0])
    np.testing.assert_array_equal(final["embed"]["kernel"], kernel[0])
    for i in range(3):
        scale = scales["layers"]["kernel"][i]
        np.testing.assert_array_equal(
            view["layers"]["kernel"][i], weights.scaled_kernel(kernel[i], scale)
        )
        alone, mask = finish({"kernel": kernel[i]}, {"kernel": scale})
        np.testing.assert_array_equal(final["layers"]["kernel"][i], alone["kernel"])
        np.testing.assert_array_equal(masks["layers"]["kernel"][i], mask["kernel"])


def test_the_mask_is_of_the_raw_weights_not_of_the_scaled_ones():
    kernel = jnp.asarray([[4.0], [3.0], [2.0], [1.0]])
    scale = jnp.asarray([[0.1], [10.0]])
    final, masks = weights.finish({"kernel": kernel}, {"kernel": scale})
    np.testing.assert_array_equal(masks["kernel"][:, 0], [True, True, False, False])
    np.testing.assert_allclose(final["kernel"][:, 0], [0.4, 0.3, 0.0, 0.0], rtol=1e-6)
    ties, _ = weights.finish({"kernel": jnp.ones((4, 1))})
    np.testing.assert_array_equal(ties["kernel"][:, 0], [1.0, 1.0, 0.0, 0.0])


def test_an_nnx_state_is_scaled_trained_and_finished():
    graph, params = nnx.split(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    scales = weights.init_scales(params, groups=4)
    assert scales["kernel"][...].shape == (4, 4)
    assert scales["bias"][...].shape == ()

    @jax.jit
    def grads(params, scales):
        def loss(params, scales):
            return jnp.sum(nnx.merge(graph, weights.scale_params(params, scales))(jnp.ones((2, 8))))

        return jax.grad(loss, argnums=(0, 1))(params, scales)

    of_params, of_scales = grads(params, scales)
    kernel = params["kernel"][...]
    np.testing.assert_allclose(of_params["kernel"][...], jnp.full((8, 4), 2.0))
    np.testing.assert_allclose(
        of_scales["kernel"][...], 2 * kernel.reshape(4, 2, 4).sum(1), rtol=1e-5, atol=1e-6
    )
    final, masks = finish(params, scales)
    pure, _ = finish(nnx.to_pure_dict(params), nnx.to_pure_dict(scales))
    np.testing.assert_array_equal(final["kernel"][...], pure["kernel"])
    assert sj.count_masks(masks).per_leaf == {"kernel": (16, 32)}
    assert jax.tree.structure(final) == jax.tree.structure(params)


def test_scaled_linear():
    layer = weights.ScaledLinear(8, 3, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    assert layer.bias is None
    assert layer.scale.shape == (2, 3)
    np.testing.assert_allclose(layer(x), x @ layer.kernel[...], rtol=1e-6)  # ones at the start
    biased = weights.ScaledLinear(8, 3, scale_groups=4, use_bias=True, rngs=nnx.Rngs(0))
    biased.scale[...] = jnp.arange(12.0).reshape(4, 3)
    biased.bias[...] = jnp.arange(3.0)
    rows = jnp.repeat(biased.scale[...], 2, axis=0)
    np.testing.assert_allclose(
        biased(x), x @ (biased.kernel[...] * rows) + jnp.arange(3.0), rtol=1e-5, atol=1e-5
    )
    grads = nnx.jit(nnx.grad(lambda m: jnp.sum(m(x) ** 2)))(biased)
    assert all(float(jnp.abs(grads[k][...]).max()) > 0 for k in ("kernel", "scale", "bias"))
    state = nnx.state(biased)
    assert sj.selected_paths(state) == ("kernel",)  # the scales stay dense by default


# the loss

LOGITS = jax.random.normal(jax.random.key(3), (2, 3, 4, 7))
LABELS = jnp.asarray([[1, 3, -100, 6], [-100, 0, 2, 5], [4, -100, -100, 0]])


def test_ignored_labels_do_not_count():
    student, teacher = LOGITS
    used = LABELS != -100
    loss, parts = cast_loss(student, teacher, LABELS, eta=0.25)
    alone, alone_parts = cast_loss(student[used], teacher[used], LABELS[used], eta=0.25)
    np.testing.assert_allclose(loss, alone, rtol=1e-6)
    same_trees(parts, alone_parts, rtol=1e-6)
    renamed = jnp.where(used, LABELS, 3)
    other, _ = cast_loss(student, teacher, jnp.where(used, LABELS, -1), ignore=-1, eta=0.25)
    np.testing.assert_allclose(other, loss, rtol=1e-6)
    counted, _ = cast_loss(student, teacher, renamed, eta=0.25)
    assert abs(float(counted) - float(loss)) > 1e-3
    grad = loss_and_grad(student, teacher, LABELS, eta=0.25)[1]
    assert float(jnp.abs(grad[~used]).max()) == 0.0


def test_without_a_label_in_use_the_loss_and_its_gradient_are_zero():
    student, teacher = LOGITS
    nothing = jnp.full(LABELS.shape, -100)
    (loss, _), grad = loss_and_grad(student, teacher, nothing)
    assert float(loss) == 0.0
    assert float(jnp.abs(grad).max()) == 0.0


def test_eta_mixes_cross_entropy_and_divergence():
    student, teacher = LOGITS
    labels = jnp.maximum(LABELS, 0)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(student, labels).mean()
    p, q = jax.nn.softmax(teacher), jax.nn.softmax(student)
    kl = jnp.sum(p * (jnp.log(p) - jnp.log(q)), axis=-1).mean()
    np.testing.assert_allclose(
        cast_loss(student, teacher, labels, eta=0.0)[0], cross_entropy, rtol=1e-5
    )
    np.testing.assert_allclose(cast_loss(student, teacher, labels, eta=1.0)[0], kl, rtol=1e-5)
    third, parts = cast_loss(student, teacher, labels)
    np.testing.assert_allclose(third, kl / 3 + 2 * cross_entropy / 3, rtol=1e-5)
    np.testing.assert_allclose(parts["kl"], kl, rtol=1e-5)


def test_temperature_softens_the_divergence_alone():
    student, teacher = LOGITS
    _, cold = cast_loss(student / 2, teacher / 2, LABELS)
    _, warm = cast_loss(student, teacher, LABELS, temperature=2.0)
    _, plain = cast_loss(student, teacher, LABELS)
    np.testing.assert_allclose(warm["kl"], 4 * cold["kl"], rtol=1e-5)
    np.testing.assert_array_equal(warm["cross_entropy"], plain["cross_entropy"])
    _, same = cast_loss(student, student, LABELS, temperature=2.0)
    np.testing.assert_allclose(same["kl"], 0.0, atol=1e-6)


def test_the_teacher_gets_no_gradient_and_narrow_logits_a_wide_loss():
    student, teacher = LOGITS
    grad = jax.grad(lambda t: cast_loss(student, t, LABELS)[0])(teacher)
    assert float(jnp.abs(grad).max()) == 0.0
    narrow = student.astype(jnp.bfloat16)
    (loss, parts), grad = loss_and_grad(narrow, teacher, LABELS)
    assert {v.dtype for v in (loss, *parts.values())} == {jnp.dtype(jnp.float32)}
    assert grad.dtype == jnp.bfloat16
    wide, _ = cast_loss(narrow.astype(jnp.float32), teacher, LABELS)
    np.testing.assert_allclose(loss, wide, rtol=1e-6)


def test_a_class_that_both_rule_out_adds_nothing():
    student, teacher = LOGITS.at[..., -1].set(-jnp.inf)
    labels = jnp.minimum(jnp.maximum(LABELS, 0), 5)
    (loss, _), grad = loss_and_grad(student, teacher, labels)
    without, _ = cast_loss(student[..., :-1], teacher[..., :-1], labels)
    np.testing.assert_allclose(loss, without, rtol=1e-6)
    assert bool(jnp.isfinite(grad).all())


# reports


def test_the_report_is_that_of_its_definitions_also_under_jit():
    params = {
        "a": {"kernel": jnp.asarray([[3.0], [-1.0], [0.0], [0.5]])},
        "b": {"bias": jnp.ones(3), "kernel": jnp.asarray([[-2.0], [0.25], [0.0], [1.0]])},
    }
    masks = sj.make_masks(sj.magnitude(params), pattern=sj.NM(1, 4))
    for report in (weights.sparsity_report, jax.jit(weights.sparsity_report)):
        got = report(params, masks)
        assert float(got["kept_ratio"]) == pytest.approx(5 / 7.75)
        assert float(got["mean_masked"]) == pytest.approx(2.75 / 6)
        assert float(got["max_masked"]) == 1.0
        assert jax.tree.map(int, got["nonzeros"]) == {"a/kernel": 3, "b/kernel": 3}
    sparse = weights.sparsity_report(sj.apply_masks(params, masks), masks)
    assert float(sparse["kept_ratio"]) == 1.0
    assert float(sparse["mean_masked"]) == float(sparse["max_masked"]) == 0.0
    assert jax.tree.map(int, sparse["nonzeros"]) == {"a/kernel": 1, "b/kernel": 1}
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    narrow["a"]["kernel"] = params["a"]["kernel"]  # two dtypes in one report
    assert float(weights.sparsity_report(narrow, masks)["kept_ratio"]) == pytest.approx(5 / 7.75)


def test_all_groups_of_obeying_weights_are_in_the_pattern():
    params = network()
    pattern = sj.NM(2, 4)
    obeying, _ = weights.finish(params, pattern=pattern, where="kernel")
    count = jax.jit(functools.partial(weights.groups_in_pattern, pattern=pattern, tolerance=0.0))
    assert float(count(obeying)) == 1.0
    assert float(count(params)) == 0.0
    zeros = jax.tree.map(jnp.zeros_like, params)
    assert float(count(zeros)) == 1.0


def test_groups_are_in_the_pattern_up_to_the_tolerance():
    groups = jnp.asarray([[5.0, 5.0, 0.1, 0.0], [5.0, 5.0, 0.2, 0.0], [4, 0, 3, 0], [1, 1, 1, 1]])
    row = {"kernel": groups.reshape(1, 16)}
    along = sj.NM(2, 4, axis=-1)
    for tree, pattern in (
        (row, along),
        ({"kernel": groups.T}, sj.NM(2, 4)),
        ({"kernel": groups.reshape(2, 8)}, sj.NM(2, 4, axis=None)),
        ({"kernel": groups.T.reshape(1, 16)}, sj.NM(2, 4, axis=-1, stride=4)),
    ):
        assert float(weights.groups_in_pattern(tree, pattern)) == 0.5
        assert float(weights.groups_in_pattern(tree, pattern, tolerance=0.0)) == 0.25
        assert float(weights.groups_in_pattern(tree, pattern, tolerance=0.02)) == 0.75
    two = {"a": row, "b": {"kernel": jnp.ones((1, 16))}}
    assert float(weights.groups_in_pattern(two, along)) == 0.25
    # 0.0234 of 2.0234 is above a hundredth, and sums in bfloat16 would not see it
    narrow = {"kernel": jnp.asarray([[1.0, 1.0, 0.0234, 0.0]], jnp.bfloat16)}
    assert float(weights.groups_in_pattern(narrow, along)) == 0.0


# errors


def test_adams_refuses_impossible_settings():
    for options, message in (
        ({"total_steps": 0}, "total_steps is 0; it must be at least 1"),
        ({"mask_period": 0}, "mask_period is 0; it must be at least 1"),
        ({"decay": -0.1}, r"l1_decay is -0\.1; it must be at least 0"),
        ({"decay": float("nan")}, "l1_decay is nan; it must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            transform(**options)


def test_adams_refuses_parameters_that_do_not_fit():
    params = network()
    params["fc"]["kernel"] = params["fc"]["kernel"].astype(jnp.bfloat16)
    with pytest.raises(ValueError, match="leaf 'fc/kernel' is bfloat16; CAST needs float32"):
        transform().init(params)
    with pytest.raises(ValueError, match=r"leaf 'fc/kernel': axis 0 .* length 6, .* m = 4"):
        transform().init(network((6, 8)))
    with pytest.raises(ValueError, match="where matches no leaf: 'none'"):
        transform(where="none").init(network())
    with pytest.raises(ValueError, match="leaf 'fc/kernel': density is None"):
        transform(pattern=sj.Unstructured()).init(network())


def test_adams_refuses_to_lose_the_decay_silently():
    params = network()
    tx = transform()
    state = tx.init(params)
    with pytest.raises(ValueError, match="params is None; adams decays the parameters"):
        tx.update(params, state)

    def with_mask(path, mask):
        masks = jax.tree.map(lambda m: m, state.masks)
        masks[path[0]][path[1]] = mask
        return state._replace(masks=masks)

    missing = with_mask(("fc", "kernel"), jnp.asarray(True))
    with pytest.raises(ValueError, match="leaf 'fc/kernel' is in scope and has no mask"):
        tx.update(params, missing, params)
    extra = with_mask(("head", "kernel"), jnp.ones(SHAPE, bool))
    with pytest.raises(ValueError, match="leaf 'head/kernel' has a mask out of scope"):
        tx.update(params, extra, params)
    half = with_mask(("fc", "kernel"), state.masks["fc"]["kernel"][:8])
    with pytest.raises(ValueError, match=r"the mask of 'fc/kernel' has shape \(8, 8\), its param"):
        tx.update(params, half, params)
    gone = state._replace(masks={"fc": state.masks["fc"]})
    with pytest.raises(ValueError, match=r"masks do not have the structure .*'head/kernel'"):
        tx.update(params, gone, params)
    bits = with_mask(("fc", "kernel"), jnp.ones(SHAPE, jnp.uint8))
    with pytest.raises(TypeError, match="the mask of 'fc/kernel' must be bool, not uint8"):
        tx.update(params, bits, params)


def test_scales_refuse_blocks_that_do_not_fit():
    kernel = jnp.ones((8, 4))
    with pytest.raises(ValueError, match="scale has 3 groups, which do not divide 8 inputs"):
        weights.scaled_kernel(kernel, jnp.ones((3, 4)))
    with pytest.raises(ValueError, match="scale has 0 groups"):
        weights.scaled_kernel(kernel, jnp.ones((0, 4)))
    for groups in (0, 3):
        message = f"groups is {groups}; it must divide axis -2 of 'a/kernel', of length 8"
        with pytest.raises(ValueError, match=message):
            weights.init_scales({"a": {"kernel": kernel}}, groups=groups)
        with pytest.raises(ValueError, match=f"scale_groups is {groups}; it must divide d_in = 8"):
            weights.ScaledLinear(8, 4, scale_groups=groups, rngs=nnx.Rngs(0))


def test_the_loss_refuses_what_it_cannot_mix(unchecked):
    student, teacher = LOGITS
    with pytest.raises(ValueError, match=r"student_logits has shape \(3, 4, 7\), teacher_logits"):
        weights.cast_loss(student, teacher[:2], LABELS)
    for eta in (-0.1, 1.5):
        with pytest.raises(ValueError, match=rf"eta is {eta}; it must be in \[0, 1\]"):
            weights.cast_loss(student, teacher, LABELS, eta=eta)
    for temperature in (0.0, -1.0):
        with pytest.raises(ValueError, match=f"temperature is {temperature}; it must be positive"):
            weights.cast_loss(student, teacher, LABELS, temperature=temperature)


def test_reports_refuse_trees_without_masks():
    params = network()
    with pytest.raises(ValueError, match="masks have no sparse leaf"):
        weights.sparsity_report(params, sj.dense_masks(params))
    with pytest.raises(ValueError, match="masks do not have the structure"):
        weights.sparsity_report(params, {"fc": True})
    with pytest.raises(ValueError, match="where matches no leaf"):
        weights.groups_in_pattern(params, sj.NM(2, 4), where="none")
    with pytest.raises(ValueError, match="total_steps is 0; it must be at least 1"):
        weights.decay_budget(1e-3, total_steps=0)
