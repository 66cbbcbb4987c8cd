"""Gradual pruning: trajectories of the reference, and what holds for every schedule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import sparsejax as sj

pytestmark = pytest.mark.standard_promotion


@pytest.mark.vectors
def test_every_family_has_a_test(reference):
    families = {"sched", "topk", "nm", "channel", "traj", "zgtraj", "block", "blockown"}
    assert reference("gradual_pruning").families() == families


@pytest.mark.vectors
def test_schedule_vectors(reference):
    for case in reference("gradual_pruning").cases("sched"):
        begin, end, freq = case["start"], case["end"], case["update_freq"]
        power, final, steps = case["power"], case["target"], jnp.asarray(case["steps"])
        for name, options in (
            ("jaxpruner", {"convention": "jaxpruner"}),
            ("zg", {"initial": case["zg_initial"]}),
        ):
            got = jax.vmap(
                lambda t, o=options, b=begin, e=end, f=final, p=power: sj.polynomial_sparsity(
                    t, final=f, begin=b, end=e, power=float(p), **o
                )
            )(steps)
            np.testing.assert_allclose(got, case[f"{name}_sparsity"], rtol=0, atol=1e-6)
            due = jax.vmap(
                lambda t, n=name, b=begin, e=end, f=freq: sj.is_update_step(
                    t, begin=b, end=e, freq=f, phase="absolute" if n == "jaxpruner" else "begin"
                )
            )(steps)
            np.testing.assert_array_equal(due, case[f"{name}_is_update"])


@pytest.mark.vectors
def test_mask_vectors(reference):
    file = reference("gradual_pruning")
    for case in file.cases("topk"):
        mask = sj.topk_mask(jnp.abs(jnp.asarray(case["weight"])), case["sparsity"])
        np.testing.assert_array_equal(mask, case["mask"])
    for case in file.cases("nm"):
        pattern = sj.NM(case["n"], case["m"], axis=case["axis"])
        mask = pattern.mask(jnp.abs(jnp.asarray(case["weight"])))
        np.testing.assert_array_equal(mask, case["mask"])
    for case in file.cases("channel"):
        scores = jnp.abs(jnp.asarray(case["weight"]))
        mask = sj.Channel(case["axis"]).mask(scores, 1 - jnp.float32(case["sparsity"]))
        np.testing.assert_array_equal(mask, np.broadcast_to(case["mask"], scores.shape))
    for family in ("block", "blockown"):
        for case in file.cases(family):
            pool = "mean" if case["avg_pool"] else "max"
            pattern = sj.Block(tuple(int(b) for b in case["block"]), pool=pool)
            scores = jnp.abs(jnp.asarray(case["weight"]))
            mask = pattern.mask(scores, 1 - jnp.float32(case["sparsity"]))
            np.testing.assert_array_equal(mask, case["mask"])


@dataclasses.dataclass(frozen=True)
class AsGiven:
    """A schedule of one's own: any interval, as the vectors may have it."""

    convention: str
    begin: int
    end: int
    freq: int

    def __call__(self, step, final):
        return sj.polynomial_sparsity(
            step, final=final, begin=self.begin, end=self.end, convention=self.convention
        )

    def is_update(self, step):
        phase = "absolute" if self.convention == "jaxpruner" else "begin"
        return sj.is_update_step(step, begin=self.begin, end=self.end, freq=self.freq, phase=phase)


@pytest.mark.vectors
def test_trajectory_vectors(reference):
    file = reference("gradual_pruning")
    for case, own in zip(file.cases("traj"), file.cases("zgtraj")):
        x, y = jnp.asarray(case["x"]), jnp.asarray(case["y"])
        start = {"kernel": jnp.asarray(case["kernel0"]), "bias": jnp.asarray(case["bias0"])}
        settings = {"begin": case["start"], "end": case["end"], "freq": case["update_freq"]}
        common = {"allocation": 1 - case["target"], "where": "kernel"}
        sgd = optax.sgd(case["lr"], case["momentum"])

        def loss(p, x=x, y=y):
            return 0.5 * jnp.mean((x @ p["kernel"] + p["bias"] - y) ** 2)

        length = len(case["loss"])

        def run(tx, start=start, loss=loss, length=length):
            def step(carry, _):
                params, state = carry
                value, grads = jax.value_and_grad(loss)(params)
                updates, state = tx.update(grads, state, params)
                params = optax.apply_updates(params, updates)
                return (params, state), (value, params["kernel"], sj.get_masks(state)["kernel"])

            state = tx.init(start)
            first = sj.get_masks(state)["kernel"]
            params = sj.apply_masks(start, sj.get_masks(state))
            return first, jax.jit(lambda c: lax.scan(step, c, length=length)[1])((params, state))

        close = {"rtol": 1e-4, "atol": 1e-6}
        _, (losses, kernels, masks) = run(
            sj.gradual_pruning(
                sgd,
                schedule=AsGiven("jaxpruner", **settings),
                order="jaxpruner",
                mask_gradients=bool(case["mask_gradients"]),
                **common,
            )
        )
        np.testing.assert_array_equal(masks, case["mask"])
        np.testing.assert_allclose(kernels, case["kernel"], **close)
        np.testing.assert_allclose(losses, case["loss"], **close)
        first, (_, kernels, masks) = run(
            sj.gradual_pruning(sgd, schedule=AsGiven("zhu_gupta", **settings), **common)
        )
        # after step t the state holds the mask of step t + 1
        ours = np.concatenate([np.asarray(first)[None], np.asarray(masks)])
        np.testing.assert_array_equal(ours[:-1], own["mask"])
        later = own["kernel"][:-1] * own["mask"][1:]
        np.testing.assert_allclose(kernels[:-1], later, **close)


def params():
    w, v = jax.random.normal(jax.random.key(0), (2, 16, 16))
    return {"a": {"kernel": w, "bias": v[0]}, "b": {"kernel": v}}


def train(tx, tree, steps, loss=None):
    loss = loss or (lambda p: sum(jnp.sum((w - 1.0) ** 2) for w in jax.tree.leaves(p)))

    @jax.jit
    def run(carry):
        def step(carry, _):
            p, s = carry
            updates, s = tx.update(jax.grad(loss)(p), s, p)
            p = optax.apply_updates(p, updates)
            return (p, s), jnp.mean(p["b"]["kernel"] != 0)

        return lax.scan(step, carry, length=steps)

    return run((tree, tx.init(tree)))


@pytest.mark.parametrize("order", ["zhu_gupta", "jaxpruner"])
def test_density_falls_to_the_allocated_one(order):
    convention = {"convention": "jaxpruner"} if order == "jaxpruner" else {}
    tx = sj.gradual_pruning(
        optax.adam(1e-2),
        allocation={"a": {"kernel": 0.5, "bias": 1}, "b": {"kernel": 0.1}},
        schedule=sj.cubic(begin=5, end=25, freq=5, **convention),
        order=order,
    )
    (end, state), density = train(tx, params(), 40)
    assert np.all(np.diff(density) <= 1e-6)
    assert int((end["b"]["kernel"] != 0).sum()) == 26
    assert int((end["a"]["kernel"] != 0).sum()) == 128
    counts = sj.count_masks(sj.get_masks(state)).per_leaf
    assert counts == {"a/kernel": (128, 256), "b/kernel": (26, 256)}


def test_slots_of_pruned_weights_are_zero():
    tx = sj.gradual_pruning(
        optax.adam(1e-2), allocation=0.25, schedule=sj.cubic(begin=0, end=10, freq=5)
    )
    (_, state), _ = train(tx, params(), 12)
    masks = sj.get_masks(state)
    for slots in (state.inner[0].mu, state.inner[0].nu):
        assert bool((slots["b"]["kernel"][~masks["b"]["kernel"]] == 0).all())


def test_skipping_the_step_where_masks_change():
    tx = sj.gradual_pruning(
        optax.sgd(0.1),
        allocation=0.5,
        schedule=sj.Periodic(begin=0, end=0, freq=1),
        order="jaxpruner",
        skip_on_update=True,
    )
    tree = params()
    updates, state = tx.update(jax.tree.map(jnp.ones_like, tree), tx.init(tree), tree)
    after = optax.apply_updates(tree, updates)
    kept = state.masks["b"]["kernel"]
    np.testing.assert_array_equal(after["b"]["kernel"], jnp.where(kept, tree["b"]["kernel"], 0))
    np.testing.assert_array_equal(after["a"]["bias"], tree["a"]["bias"])


def test_an_allocation_may_be_a_function_of_the_chosen_leaves():
    tx = sj.gradual_pruning(
        optax.sgd(0.1),
        allocation=lambda leaves: sj.erk(leaves, 0.2),
        schedule=sj.one_shot(0),
        where="kernel",
    )
    state = tx.init(params())
    assert sj.count_masks(state.masks).density == pytest.approx(0.2, abs=0.01)


def test_patterns_and_scores_of_ones_own():
    for pattern in (sj.NM(2, 4), sj.Block((4, 4)), sj.Channel()):
        tx = sj.gradual_pruning(
            optax.sgd(0.1), pattern=pattern, allocation=0.5, schedule=sj.one_shot(2)
        )
        (end, _), _ = train(tx, params(), 4)
        assert int((end["b"]["kernel"] != 0).sum()) == 128
    tx = sj.gradual_pruning(
        optax.sgd(0.1),
        allocation=0.5,
        schedule=sj.one_shot(0),
        scores=lambda p: jax.tree.map(lambda w: -jnp.abs(w), p),
    )
    state = tx.init(params())
    w = jnp.abs(params()["b"]["kernel"])
    assert float(jnp.max(w[state.masks["b"]["kernel"]])) <= float(jnp.median(w)) + 1e-6


def test_errors_name_argument_and_range(unchecked):
    schedule = sj.cubic(begin=0, end=10, freq=5)

    def make(**options):
        return sj.gradual_pruning(optax.sgd(0.1), **{"schedule": schedule, **options})

    for density in (0.0, 1.5):
        with pytest.raises(
            ValueError, match=rf"leaf 'a/kernel': its density is {density}; it must"
        ):
            make(allocation=density).init(params())
    with pytest.raises(ValueError, match=r"allocation gives no density for \['b/kernel'\]"):
        make(allocation={"a": {"kernel": 0.5}}).init(params())
    with pytest.raises(ValueError, match="order is 'x'; allowed"):
        make(allocation=0.5, order="x")
    with pytest.raises(ValueError, match="skip_on_update is for the order 'jaxpruner' alone"):
        make(allocation=0.5, skip_on_update=True)
    with pytest.raises(ValueError, match="where matches no leaf"):
        make(allocation=0.5, where="none").init(params())
    with pytest.raises(ValueError, match=r"leaf 'a/kernel': axis 0 .* m = 5"):
        make(allocation=0.5, pattern=sj.NM(1, 5)).init(params())
    tx = make(allocation=0.5)
    with pytest.raises(ValueError, match="params is None"):
        tx.update(params(), tx.init(params()))
