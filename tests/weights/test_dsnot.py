"""DSnoT: the vectors, the procedure with sorts and lists, guards and pitfalls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import sparsejax as sj
from sparsejax import weights
from sparsejax.core.scores import wanda_score

SHAPE = (32, 12)
dsnot = jax.jit(
    weights.dsnot_mask,
    static_argnames=(
        "sparsity", "pattern", "max_cycles", "threshold", "var_power", "require_same_sign",
    ),
)  # fmt: skip
collect = jax.jit(weights.activation_stats)


@functools.cache
def layer(*, ties=False):
    """A kernel and statistics of inputs with a mean."""
    x = jax.random.normal(jax.random.key(0), (4, 16, 32)) + jnp.linspace(-1, 1, 32)
    w = jax.random.normal(jax.random.key(1), SHAPE)
    of_inputs = collect(x)
    if ties:
        w = jnp.round(w * 2) / 2  # zeros among them
        of_inputs = of_inputs._replace(
            sum=jnp.sign(of_inputs.sum), sum_sq=jnp.ones(32), var=jnp.ones(32)
        )
    return w, of_inputs


def by_lists(
    w, of_inputs, score, *, sparsity=None, pattern=None, max_cycles=50, threshold=0.1,
    var_power=1.0, require_same_sign=True,
):  # fmt: skip
    """The procedure for one output after the other."""
    w, score = np.asarray(w, np.float32).T, np.asarray(score, np.float32).T
    sums, var, sq = (np.asarray(a) for a in (of_inputs.sum, of_inputs.var, of_inputs.sum_sq))
    masks = []
    for row, first in zip(w, score):
        n, d = len(row), row * sums
        kept = np.ones(n, bool)
        if pattern is None:
            kept[np.argsort(first, kind="stable")[: int(n * sparsity)]] = False
        else:
            for g in range(0, n, pattern.m):
                order = np.argsort(first[g : g + pattern.m], kind="stable")
                kept[g + order[: pattern.m - pattern.n]] = False
        error = np.float32(d[~kept].sum(dtype=np.float64))
        sign = np.sign(error)
        gain = np.where(kept, 0, d / var**var_power if var_power else d)
        grow = list(np.argsort(gain, kind="stable"))
        ranked = [i for i in np.argsort(np.abs(row) * np.sqrt(sq), kind="stable") if kept[i]]
        drop = [i for i in ranked if d[i] < 0] + [i for i in ranked if d[i] > 0][::-1]
        left = np.where(kept, first, np.inf)
        for _ in range(max_cycles):
            if not grow or (pattern is None and not drop):
                break
            i = grow.pop() if error > 0 else grow.pop(0)
            if pattern is None:
                j = drop.pop() if error < 0 else drop.pop(0)
            else:
                start = i - i % pattern.m
                j = start + int(np.argmin(left[start : start + pattern.m]))
                if left[j] == np.inf:
                    break
                left[j] = np.inf
            after = error + d[j] - d[i]
            same = np.sign(after) == sign or not (require_same_sign or pattern is not None)
            if kept[i] or not kept[j] or not abs(error) > threshold or not same:
                break
            kept[i], kept[j], error = True, False, after
        masks.append(kept)
    return np.stack(masks).T


# the vectors


@pytest.mark.vectors
def test_vectors(reference):
    file = reference("dsnot")
    compared = set()
    for case in file.cases("case"):
        w = jnp.asarray(case["weight"].T)
        of_inputs = weights.activation_stats(jnp.asarray(case["x"]))
        for got, name in ((of_inputs.sum_sq, "x_sq_norm_per_sample"),
                          (of_inputs.sum, "x_sum_per_sample"), (of_inputs.var, "x_var"),
                          (of_inputs.sum / case["x"].shape[1], "x_mean")):  # fmt: skip
            wanted = case[name]
            np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=2e-6 * np.abs(wanted).max())
        for name in case.names():
            if name.startswith("sparsegpt") or name == "hessian":
                case.ignore(name, reason="compared in test_sparsegpt.py")
            if not name.endswith("_mask"):
                continue
            family = name.removesuffix("_mask")
            compared.add(family)
            amount = {}
            if f"{family}_group" in case:
                m = int(case[f"{family}_group"])
                amount["pattern"] = sj.NM(m - int(case[f"{family}_pruned_per_group"]), m)
                if f"{family}_sparsity" in case:
                    case.ignore(f"{family}_sparsity", reason="the groups decide")
            else:
                amount["sparsity"] = float(case[f"{family}_sparsity"])
            if family.startswith("wanda"):
                mask = weights.wanda_mask(w, of_inputs, **amount)
            else:
                scores = {
                    "wanda": wanda_score(w, jnp.sqrt(of_inputs.sum_sq)),
                    "magnitude": jnp.abs(w),
                }
                mask = weights.dsnot_mask(
                    w,
                    of_inputs,
                    scores[str(case[f"{family}_init"])],
                    **amount,
                    max_cycles=int(case[f"{family}_max_cycle_time"]),
                    threshold=float(case[f"{family}_update_threshold"]),
                    var_power=float(case[f"{family}_var_power"]),
                    require_same_sign=bool(case[f"{family}_require_same_sign"]),
                )
            np.testing.assert_array_equal(mask.T, case[name].astype(bool), err_msg=name)
    assert any(family.startswith("dsnot_u") for family in compared)
    assert any(family.startswith("dsnot_nm") for family in compared)


# the procedure


@pytest.mark.parametrize("initial", ["magnitude", "wanda"])
@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.5, "max_cycles": 3},
        {"sparsity": 0.7, "threshold": 2.0},
        # both lists run out
        {"sparsity": 0.6, "max_cycles": 100, "require_same_sign": False, "threshold": 0.0},
        {"sparsity": 0.5, "var_power": 0.0, "require_same_sign": False, "max_cycles": 12},
        {"pattern": sj.NM(2, 4), "max_cycles": 6},
        {"pattern": sj.NM(3, 8), "threshold": 1.0},
    ],
    ids=str,
)
def test_equals_the_procedure_with_lists(settings, initial):
    for ties in (False, True):
        w, of_inputs = layer(ties=ties)
        score = jnp.abs(w)
        if initial == "wanda":
            score = wanda_score(w, jnp.sqrt(of_inputs.sum_sq))
        mask = np.asarray(dsnot(w, of_inputs, score, **settings))
        np.testing.assert_array_equal(mask, by_lists(w, of_inputs, score, **settings))
        start = np.asarray(dsnot(w, of_inputs, score, **(settings | {"max_cycles": 0})))
        assert (mask != start).any()
        np.testing.assert_array_equal(mask.sum(0), start.sum(0))  # of every output


def test_the_mean_output_comes_nearer():
    w, of_inputs = layer()
    score = wanda_score(w, jnp.sqrt(of_inputs.sum_sq))

    def lost(mask):
        return np.abs(of_inputs.sum @ jnp.where(mask, 0.0, w))

    start = lost(dsnot(w, of_inputs, score, sparsity=0.6, max_cycles=0))
    after = lost(dsnot(w, of_inputs, score, sparsity=0.6))
    assert (after <= start).all()
    assert after.mean() < 0.7 * start.mean()
    swinging = lost(dsnot(w, of_inputs, score, sparsity=0.6, require_same_sign=False))
    assert swinging.mean() > after.mean()
    # an output that is near enough is left alone
    np.testing.assert_array_equal(
        dsnot(w, of_inputs, score, sparsity=0.6, threshold=1e9),
        dsnot(w, of_inputs, score, sparsity=0.6, max_cycles=0),
    )


def test_groups_stay_whole_and_the_sign_rule_on():
    w, of_inputs = layer()
    score = jnp.abs(w)
    mask = dsnot(w, of_inputs, score, pattern=sj.NM(2, 4), require_same_sign=False)
    np.testing.assert_array_equal(mask.reshape(8, 4, 12).sum(1), np.full((8, 12), 2))
    np.testing.assert_array_equal(mask, dsnot(w, of_inputs, score, pattern=sj.NM(2, 4)))


def test_a_dead_input_gains_nothing():
    w, of_inputs = layer()
    dead = of_inputs._replace(
        **{name: getattr(of_inputs, name).at[3].set(0.0) for name in ("sum", "sum_sq", "var")}
    )
    score = wanda_score(w, jnp.sqrt(dead.sum_sq))
    mask = dsnot(w, dead, score, sparsity=0.5, max_cycles=3)
    # 0 / 0 would sort last and be revived first
    guarded = dead._replace(var=dead.var.at[3].set(1e-6))
    np.testing.assert_array_equal(mask, dsnot(w, guarded, score, sparsity=0.5, max_cycles=3))
    assert not bool(mask[3].any())


def test_narrow_weights_are_those_of_single_precision():
    w, of_inputs = layer()
    narrow = w.astype(jnp.bfloat16)
    mask = dsnot(narrow, of_inputs, jnp.abs(narrow), sparsity=0.5)
    wide = narrow.astype(jnp.float32)
    np.testing.assert_array_equal(mask, dsnot(wide, of_inputs, jnp.abs(wide), sparsity=0.5))


def test_sharded_kernels_get_the_same_masks(mesh):
    w, of_inputs = layer()
    spread = jax.device_put(w, NamedSharding(mesh, PartitionSpec("data", "model")))
    for amount in ({"sparsity": 0.6}, {"pattern": sj.NM(2, 4)}):
        np.testing.assert_array_equal(
            dsnot(spread, of_inputs, jnp.abs(spread), **amount),
            dsnot(w, of_inputs, jnp.abs(w), **amount),
        )


def test_errors(unchecked):
    w, of_inputs = layer()
    for options, message in (
        ({}, "one of sparsity and pattern is needed, neither given"),
        ({"sparsity": 0.5, "pattern": sj.NM(2, 4)}, "is needed, both given"),
        ({"sparsity": 1.0}, r"sparsity is 1.0; it must be in \[0, 1\)"),
        ({"pattern": sj.NM(2, 5)}, "w has 32 inputs, not a multiple of m = 5"),
        ({"pattern": sj.NM(2, 4, axis=-1)}, "pattern has axis -1 and stride 1; its groups must"),
        ({"sparsity": 0.5, "max_cycles": -1}, "max_cycles is -1; it must not be negative"),
        ({"sparsity": 0.5, "threshold": -1.0}, "threshold is -1.0; it must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.dsnot_mask(w, of_inputs, jnp.abs(w), **options)
    with pytest.raises(ValueError, match="stats are of 32 inputs, w has 31"):
        weights.dsnot_mask(w[1:], of_inputs, jnp.abs(w[1:]), sparsity=0.5)
    with pytest.raises(ValueError, match=r"init_score has shape \(31, 12\), w has \(32, 12\)"):
        weights.dsnot_mask(w, of_inputs, jnp.abs(w[1:]), sparsity=0.5)
