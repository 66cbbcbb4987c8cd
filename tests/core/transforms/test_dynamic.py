"""SET and RigL: the reference's exchanges and trajectory, and constant density."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import sparsejax as sj

pytestmark = pytest.mark.standard_promotion


@pytest.mark.vectors
def test_exchange_vectors(reference):
    file = reference("random_pruning")
    for case in file.cases("rigl"):
        mask = jnp.asarray(case["old_mask"].astype(bool))
        w, g = (jnp.abs(jnp.asarray(case[name])) for name in ("weight", "grad"))
        new, grown = sj.prune_and_regrow(mask, w, g, case["drop_fraction"], count="nearest")
        np.testing.assert_array_equal(new, case["new_mask"])
        np.testing.assert_array_equal(grown, new & ~mask)
    for case in file.cases("drop"):
        got = jax.vmap(lambda t, c=case: sj.cosine_drop(t, end=c["end_step"], alpha=c["alpha"]))(
            jnp.asarray(case["steps"])
        )
        np.testing.assert_allclose(got, case["fraction"], atol=1e-6)
    for case in file.cases("vitadst"):
        mask = jnp.asarray(case["mask"].astype(bool))
        w, g = (jnp.abs(jnp.asarray(case[name])) for name in ("weight", "grad"))
        active = int(mask.sum())
        dying = math.ceil(case["death_rate"] * active)
        stay = sj.exact_topk_mask(jnp.where(mask, w, -jnp.inf), active - dying, axis=None)
        np.testing.assert_array_equal(stay, case["after_death"])
        new, _ = sj.prune_and_regrow(mask, w, g, (dying + 1e-3) / active)
        np.testing.assert_array_equal(new, case["after_growth"])


@pytest.mark.vectors
def test_trajectory_vectors(reference):
    for case in reference("random_pruning").cases("rigltraj"):
        x, y = jnp.asarray(case["x"]), jnp.asarray(case["y"])
        masks = {"kernel": jnp.asarray(case["mask0"].astype(bool))}
        tx = sj.rigl(
            optax.sgd(case["lr"], case["momentum"]),
            masks=masks,
            freq=case["update_freq"],
            begin=case["start"],
            end=case["end"],
            alpha=case["alpha"],
            count="nearest",
        )
        params = sj.apply_masks({"kernel": jnp.asarray(case["kernel0"])}, masks)

        def step(carry, _, x=x, y=y, tx=tx):
            params, state = carry
            grads = jax.grad(lambda p: 0.5 * jnp.mean((x @ p["kernel"] - y) ** 2))(params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            trace = state.inner[0].trace["kernel"]
            return (params, state), (params["kernel"], state.masks["kernel"], trace)

        length = len(case["kernel"])
        _, (kernels, found, traces) = jax.jit(
            lambda c, step=step, length=length: lax.scan(step, c, length=length)
        )((params, tx.init(params)))
        np.testing.assert_array_equal(found, case["mask"])
        np.testing.assert_allclose(kernels, case["kernel"], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(traces, case["trace"], rtol=1e-4, atol=1e-6)


def problem():
    w, v = jax.random.normal(jax.random.key(0), (2, 16, 16))
    params = {"a": {"kernel": w, "bias": v[0]}, "b": {"kernel": v}}
    masks = sj.random_masks(jax.random.key(1), params, 0.25)
    return sj.apply_masks(params, masks), masks


def methods():
    _, masks = problem()
    inner = optax.adam(1e-2)
    return {
        "rigl": sj.rigl(inner, masks=masks, freq=4, end=20),
        "set": sj.sparse_evolution(inner, masks=masks, key=jax.random.key(2), freq=4, end=20),
    }


@pytest.mark.parametrize("name", ["rigl", "set"])
def test_density_is_constant_masks_move_and_new_weights_start_at_zero(name):
    params, masks = problem()
    tx = methods()[name]
    target = jax.tree.map(lambda w: jnp.ones_like(w), params)

    def step(carry, _):
        p, s = carry
        grads = jax.tree.map(lambda w, t: w - t * 2, p, target)
        updates, s = tx.update(grads, s, p)
        new = optax.apply_updates(p, updates)
        born = s.masks["b"]["kernel"] & (p["b"]["kernel"] == 0)
        slots = jnp.where(born, s.inner[0].mu["b"]["kernel"], 0)
        return (new, s), (sj.flips(masks, s.masks), s.masks, new, jnp.abs(slots).sum())

    _, (moved, found, weights, slots) = jax.jit(lambda c: lax.scan(step, c, length=24))(
        (params, tx.init(params))
    )
    np.testing.assert_array_equal(found["b"]["kernel"].sum((1, 2)), np.full(24, 64))
    # the first exchange is that of step 4, the fifth step
    assert moved[3] == 0
    assert moved[4] > 0
    assert slots[4] == 0
    outside = jnp.where(found["b"]["kernel"], 0, weights["b"]["kernel"])
    assert not bool(outside.any())
    assert bool((moved[20:] == moved[20]).all())


def test_an_update_step_takes_no_optimiser_step():
    params, masks = problem()
    tx = sj.dynamic_sparsity(
        optax.sgd(0.1), masks=masks, grow="gradient", drop=lambda t: 0.3, freq=1, begin=0, end=5
    )
    state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = tx.update(grads, state, params)
    after = optax.apply_updates(params, updates)
    kept = masks["b"]["kernel"] & state.masks["b"]["kernel"]
    np.testing.assert_array_equal(after["b"]["kernel"], jnp.where(kept, params["b"]["kernel"], 0))
    np.testing.assert_array_equal(after["a"]["bias"], params["a"]["bias"])


def stepping(**options):
    params, masks = problem()
    defaults = {"grow": "gradient", "drop": lambda t: 0.25, "freq": 1, "begin": 2, "end": 2}
    tx = sj.dynamic_sparsity(
        optax.sgd(0.1, momentum=0.9), masks=masks, **{**defaults, "on_update": "step", **options}
    )
    grads = [
        jax.tree.map(
            lambda w, i=i: jnp.cos(jnp.arange(1.0 * w.size) * (i + 3)).reshape(w.shape), params
        )
        for i in range(2)
    ]
    update = jax.jit(tx.update)
    state, trail = tx.init(params), [(params, tx.init(params))]
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        trail.append((params, state))
    return trail, grads


def test_an_update_step_may_take_the_optimiser_step_first():
    trail, grads = stepping(drop=lambda t: 0.75)
    (_, first), (w1, after1), (w2, after2) = trail
    old, new = first.masks["b"]["kernel"], after2.masks["b"]["kernel"]
    np.testing.assert_array_equal(after1.masks["b"]["kernel"], old)  # steps count from 1
    momentum = 0.9 * after1.inner[0].trace["b"]["kernel"] + grads[1]["b"]["kernel"]
    weights = jnp.where(old, w1["b"]["kernel"] - 0.1 * momentum, 0)
    wanted, _ = sj.prune_and_regrow(old, abs(weights), abs(grads[1]["b"]["kernel"]), 0.75)
    np.testing.assert_array_equal(new, wanted)
    # grown ones start at zero; what was dropped and grown at once keeps value and momentum
    np.testing.assert_allclose(w2["b"]["kernel"], jnp.where(new, weights, 0), atol=1e-6)
    np.testing.assert_allclose(
        after2.inner[0].trace["b"]["kernel"], jnp.where(new & old, momentum, 0), atol=1e-6
    )
    stay = sj.exact_topk_mask(jnp.where(old, abs(weights), -jnp.inf), 16, axis=None)
    assert bool((new & old & ~stay).any())
    np.testing.assert_allclose(
        w2["a"]["bias"],
        w1["a"]["bias"] - 0.1 * (0.9 * grads[0]["a"]["bias"] + grads[1]["a"]["bias"]),
        atol=1e-6,
    )


def test_the_count_follows_a_given_sparsity():
    for sparsity, counts in (
        (None, (64, 64)),
        (0.9, (48, 48)),  # more stay than 25: nothing grows
        (0.6, (102, 102)),
        ({"a": {"kernel": 0.6, "bias": 0.0}, "b": {"kernel": 0.7}}, (102, 76)),
    ):
        trail, _ = stepping(sparsity=sparsity)
        counted = sj.count_masks(trail[-1][1].masks).per_leaf
        assert tuple(kept for kept, _ in counted.values()) == counts


def test_masks_that_never_change_are_not_made():
    for on_update in ("skip", "step"):
        trail, _ = stepping(grow=None, on_update=on_update)
        assert sj.sad(trail[0][1].masks, trail[-1][1].masks)["total"] == 0
        assert not bool((trail[1][0]["b"]["kernel"] == trail[-1][0]["b"]["kernel"]).all())
    params, masks = problem()
    programs = [
        str(
            jax.make_jaxpr(
                sj.dynamic_sparsity(
                    optax.sgd(0.1), masks=masks, grow=grow, drop=lambda t: 0.3, freq=2, end=9
                ).update
            )(params, state, params)
        )
        for grow in (None, "gradient")
        for state in [
            sj.DynamicSparsityState(jnp.int32(0), masks, optax.sgd(0.1).init(params), None)
        ]
    ]
    assert ["cond[" in program for program in programs] == [False, True]


def test_an_exact_fraction_drops_what_float64_does():
    mask, w = jnp.arange(120) < 100, jnp.arange(120.0)[::-1]
    for share, dropped in ((0.29, 29), (sj.exact_fraction(0.29), int(0.29 * 100))):
        new, _ = sj.prune_and_regrow(mask, w, w, share, target=0)
        np.testing.assert_array_equal(new, jnp.arange(120) < 100 - dropped)
    assert int(0.29 * 100) == 28


def test_exchange_survives_nan_and_infinity():
    mask = jnp.arange(12).reshape(3, 4) < 6
    w = jnp.ones((3, 4)).at[0, 0].set(jnp.nan)
    g = jnp.ones((3, 4)).at[2, 3].set(jnp.inf).at[2, 2].set(jnp.nan)
    new, grown = sj.prune_and_regrow(mask, w, g, 0.5)
    assert int(new.sum()) == 6
    assert bool(new[2, 3])
    assert not bool((grown & mask).any())


def test_errors_name_argument_and_range(unchecked):
    params, masks = problem()
    mask, w = masks["b"]["kernel"], params["b"]["kernel"]
    with pytest.raises(ValueError, match=r"drop_fraction is 1\.5"):
        sj.prune_and_regrow(mask, w, w, 1.5)
    with pytest.raises(ValueError, match="count is 'x'"):
        sj.prune_and_regrow(mask, w, w, 0.5, count="x")
    with pytest.raises(ValueError, match="they must be equal"):
        sj.prune_and_regrow(mask, w[:1], w, 0.5)

    def make(**options):
        defaults = {"masks": masks, "grow": "gradient", "drop": lambda t: 0.3, "freq": 2, "end": 9}
        return sj.dynamic_sparsity(optax.sgd(0.1), **{**defaults, **options})

    with pytest.raises(ValueError, match="an ExactFraction is for 'floor'"):
        sj.prune_and_regrow(mask, w, w, sj.exact_fraction(0.5), count="nearest")
    huge = [jax.ShapeDtypeStruct((2**16, 2**15), kind) for kind in ("bool", "float32", "float32")]
    with pytest.raises(ValueError, match=r"mask has 2147483648 entries; counts are exact below"):
        jax.eval_shape(lambda *a: sj.prune_and_regrow(*a, 0.5), *huge)
    with pytest.raises(ValueError, match="grow is 'x'; allowed"):
        make(grow="x")
    with pytest.raises(ValueError, match="on_update is 'x'; allowed are 'skip' and 'step'"):
        make(on_update="x")
    with pytest.raises(ValueError, match=r"sparsity is 1\.0; it must be in \[0, 1\)"):
        make(sparsity=1.0)
    with pytest.raises(ValueError, match=r"sparsity of 'b/kernel' is -1; it must be in \[0, 1\)"):
        make(sparsity={"b": {"kernel": -1}})
    with pytest.raises(ValueError, match="sparsity do not have the structure"):
        make(sparsity={"b": {"kernel": 0.5}}).init(params)
    with pytest.raises(ValueError, match="key is None; grow='random' draws positions"):
        make(grow="random")
    with pytest.raises(ValueError, match="freq is 0"):
        make(freq=0, begin=0)
    with pytest.raises(ValueError, match="end is 1; it must not come before begin = 2"):
        make(end=1)
    with pytest.raises(ValueError, match="count is 'x'"):
        make(count="x")
    with pytest.raises(ValueError, match="params is None"):
        make().update(params, make().init(params))
    with pytest.raises(ValueError, match="drop is 2"):
        sj.sparse_evolution(optax.sgd(0.1), masks=masks, key=jax.random.key(0), end=200, drop=2.0)
    with pytest.raises(ValueError, match="masks do not have the structure"):
        make(masks={"b": mask}).init(params)
