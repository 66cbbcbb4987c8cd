"""Statistical top-k: the definition in float64, every implementation against it, and its edges."""

import functools
import itertools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads

from pallas_kernels import statistical_topk
from pallas_kernels.statistical_topk import MODES, reference, tpu, triton
from pallas_kernels.statistical_topk.shapes import RAGGED

# three pieces of a row of 208 in the last one
WAYS = {
    "xla": {"implementation": "xla"},
    "tpu": {"implementation": "tpu", "interpret": True, "blocks": tpu.Blocks(8, 2**20)},
    "triton": {"implementation": "triton", "interpret": True},
    "triton, pieces": {
        "implementation": "triton",
        "interpret": True,
        "blocks": triton.Blocks(64, 1),
    },
}
SHAPE = RAGGED["ragged_masked"]


def rows(shape=(SHAPE.rows, SHAPE.width), dtype=jnp.float32, seed=0):
    """Random rows, upstream gradients of output and threshold, and a mask with hard rows."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0.3, 2.0, shape)
    where = rng.random((math.prod(shape[:-1]), shape[-1])) < 0.7
    where[1] = False
    where[2, SHAPE.k // 2 :] = False
    where = where.reshape(shape)
    dy, dlimit = rng.normal(size=shape), rng.normal(size=(*shape[:-1], 1))
    return *(jnp.asarray(v, dtype) for v in (x, dy)), jnp.asarray(dlimit), jnp.asarray(where)


CASES = (("soft", False), ("soft", True), ("hard", True), ("neg_inf", False), ("mask", True))


def all_cases(op, cases=CASES, k=SHAPE.k):
    """Outputs, thresholds and gradients of modes with and without a mask, compiled once."""

    @jax.jit
    def run(x, dy, dlimit, where):
        found = {}
        for mode, masked in cases:
            f = functools.partial(op, k=k, mode=mode, where=where if masked else None)
            (y, limit), pull = jax.vjp(f, x)
            up = dy if mode != "mask" else np.zeros(x.shape, jax.dtypes.float0)
            found[mode, masked] = (y, limit, pull((up, dlimit.astype(limit.dtype)))[0])
        return found

    return run


@functools.cache
def defined(dtype, cases):
    return all_cases(reference.statistical_topk, cases)(*rows(dtype=dtype))


def compare(found, defined):
    for case, expected in defined.items():
        for name, a, b in zip(("y", "threshold", "gradient"), found[case], expected):
            assert a.dtype == b.dtype, (case, name)
            loose = a.dtype == jnp.bfloat16
            tolerance = {"rtol": 2**-7, "atol": 2**-8} if loose else {"rtol": 2e-6, "atol": 2e-6}
            a, b = (np.asarray(v).astype(np.float64) for v in (a, b))
            np.testing.assert_allclose(a, b, **tolerance, err_msg=f"{case} {name}")


def in_numpy(x, k, mode, where):
    """The definition once more, entry by entry."""
    y, limits = [], []
    for row, valid in zip(x, where):
        values, off = row[valid], -math.inf if mode == "neg_inf" else 0
        if len(values) <= k:
            limit = -math.inf
        else:
            quantile = statistics.NormalDist().inv_cdf(1 - k / len(values))
            limit = values.mean() + values.std() * quantile
        shift = limit if mode == "soft" and len(values) > k else 0
        y.append([v - shift if ok and v > limit else off for v, ok in zip(row, valid)])
        limits.append([limit])
    return np.asarray(y), np.asarray(limits)


@pytest.mark.parametrize("mode", MODES)
def test_the_definition_is_that_of_numpy_in_double_precision(x64, mode):
    x, _, _, where = rows(dtype=jnp.float64)
    for valid in (where, None):
        y, limit = reference.statistical_topk(x, SHAPE.k, mode=mode, where=valid)
        seen = np.ones(x.shape, bool) if valid is None else np.asarray(valid)
        expected, expected_limit = in_numpy(np.asarray(x), SHAPE.k, "soft", seen)
        if mode == "mask":
            expected = seen & (np.asarray(x) > expected_limit)
        elif mode != "soft":
            expected, _ = in_numpy(np.asarray(x), SHAPE.k, mode, seen)
        np.testing.assert_allclose(limit, expected_limit, rtol=1e-12)
        np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients_are_those_of_the_definition(way, dtype):
    op = functools.partial(statistical_topk, return_threshold=True, **WAYS[way])
    cases = CASES if dtype == jnp.float32 else CASES[1:3]
    found = all_cases(op, cases)(*rows(dtype=dtype))
    compare(found, defined(dtype, cases))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("blocks", [None, triton.Blocks(64, 1)])
def test_a_gpu_gives_what_the_definition_gives(blocks, dtype):
    if jax.default_backend() != "gpu":
        pytest.skip(f"no GPU: the platform is {jax.default_backend()}")
    op = functools.partial(
        statistical_topk, return_threshold=True, implementation="triton", blocks=blocks
    )
    compare(all_cases(op)(*rows(dtype=dtype)), defined(dtype, CASES))


def test_without_its_threshold_the_gradients_are_the_same():
    x, dy, _, where = rows()
    modes = ("soft", "hard", "neg_inf")

    @jax.jit
    def run(x, dy):
        found = {}
        for mode, stop in itertools.product(modes, (False, True)):
            options = {"mode": mode, "where": where, "stop_gradient_threshold": stop}
            y, pull = jax.vjp(lambda x, o=options: statistical_topk(x, SHAPE.k, **o), x)
            found[mode, stop] = y, pull(dy)[0]
        return found

    @jax.jit
    def define(x, dy):
        found = {}
        for mode in modes:
            f = functools.partial(reference.statistical_topk, k=SHAPE.k, mode=mode, where=where)
            (y, limit), pull = jax.vjp(f, x)
            on = where & (x > limit)
            found[mode, False] = y, pull((dy, jnp.zeros_like(limit)))[0]
            found[mode, True] = y, jnp.where(on, dy, 0)
        return found

    expected = define(x, dy)
    for case, found in run(x, dy).items():
        for a, b in zip(found, expected[case]):
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6, err_msg=str(case))


def test_the_gradient_is_that_of_finite_differences(x64):
    x, _, _, where = rows((4, 24), jnp.float64)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=x.shape))

    def f(x):
        y, limit = statistical_topk(x, 4, where=where, return_threshold=True)
        return jnp.sum(weights * y) + jnp.sum(jnp.where(jnp.isinf(limit), 0, limit**2))

    check_grads(jax.jit(f), (x,), order=1, modes=("rev",), eps=1e-6, rtol=1e-6)


@pytest.mark.parametrize("way", ["xla", "tpu", "triton"])
def test_vmap_and_leading_axes(way):
    x, dy, _, where = rows((2, 3, 130))
    op = functools.partial(statistical_topk, k=16, where=where, **WAYS[way])

    def mapped(x):
        return jax.vmap(lambda x, w: statistical_topk(x, 16, where=w, **WAYS[way]))(x, where)

    @jax.jit
    def both(x, dy):
        plain, pull = jax.vjp(op, x)
        y, pull_mapped = jax.vjp(mapped, x)
        return (plain, pull(dy)[0]), (y, pull_mapped(dy)[0])

    expected, found = both(x, dy)
    np.testing.assert_array_equal(found, expected)
    assert np.count_nonzero(found[0])


def test_the_kernel_stays_in_bounds_and_leaves_nothing_unwritten(tpu_simulator):
    # two blocks, of which the second hangs over the end
    x, dy, dlimit, where = rows((9, 208))

    def run(x, where, **options):
        op = functools.partial(statistical_topk, k=SHAPE.k, return_threshold=True, **options)
        y, pull = jax.vjp(functools.partial(op, where=where), x)
        return y, pull((dy, dlimit))

    simulated = {
        "implementation": "tpu",
        "interpret": tpu_simulator,
        "blocks": tpu.Blocks(8, 2**20),
    }
    for valid in (None, where):
        for a, b in zip(
            jax.tree.leaves(run(x, valid, **simulated)), jax.tree.leaves(run(x, valid))
        ):
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_are_special(way):
    usual = np.random.default_rng(0).normal(size=208)
    table = np.stack([np.full(208, 0.1), usual, usual, np.full(208, -3.0)]).astype(np.float32)
    table[2, 7] = np.nan
    x = jnp.asarray(table)

    @jax.jit
    def run(x):
        outs = {m: statistical_topk(x, 60, mode=m, **WAYS[way]) for m in MODES}
        return outs, jax.grad(lambda x: statistical_topk(x, 60, **WAYS[way])[:2].sum())(x)

    outs, gradient = run(x)
    # a row of equal entries has none on, whatever the rounding of its mean
    for row in (0, 3):
        assert not np.any(outs["soft"][row]), row
        assert not np.any(outs["hard"][row]), row
        assert np.all(outs["neg_inf"][row] == -np.inf), row
        assert not np.any(outs["mask"][row]), row
    assert not np.any(gradient[0])
    for mode in ("soft", "hard", "neg_inf"):
        assert np.isnan(outs[mode][2]).all(), mode
    assert not np.any(outs["mask"][2])
    assert 30 < np.count_nonzero(outs["mask"][1]) < 90


@pytest.mark.parametrize("mode", ["soft", "hard", "neg_inf"])
def test_where_nothing_is_to_go_rows_come_back(mode):
    x, dy, _, _ = rows()
    for option in ({"k": 208}, {"k": 1000.5}, {"target_sparsity": 0.0}):
        op = functools.partial(statistical_topk, mode=mode, return_threshold=True, **option)
        (y, limit), pull = jax.vjp(op, x)
        np.testing.assert_array_equal(y, x)
        assert np.all(limit == -np.inf)
        np.testing.assert_array_equal(pull((dy, jnp.ones_like(limit)))[0], dy)


def test_sparsity_is_a_share_of_the_valid_entries():
    x, _, _, where = rows()
    by_k = statistical_topk(x, 16)
    np.testing.assert_array_equal(statistical_topk(x, target_sparsity=1 - 16 / 208), by_k)
    y, limit = statistical_topk(x, target_sparsity=0.9, where=where, return_threshold=True)
    expected, expected_limit = reference.statistical_topk(x, target_sparsity=0.9, where=where)
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(limit, expected_limit, rtol=2e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_large_mean_or_a_first_block_of_outliers_costs_no_precision(way):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(2, 208)).astype(np.float32)
    table[0] += 1e4
    table[1, :20] += 1e3
    quantile = statistics.NormalDist().inv_cdf(1 - 20 / 208)
    exact = table.astype(np.float64)
    expected = exact.mean(-1) + exact.std(-1) * quantile
    _, limit = statistical_topk(jnp.asarray(table), 20, return_threshold=True, **WAYS[way])
    np.testing.assert_allclose(limit[:, 0], expected, rtol=3e-7)


def test_sharded_rows_and_entries(mesh):
    x, dy, _, where = rows((8, 208))
    sharding = NamedSharding(mesh, PartitionSpec("data", "model"))

    @jax.jit
    def run(x, where, dy):
        y, pull = jax.vjp(lambda x: statistical_topk(x, 16, where=where), x)
        return y, pull(dy)[0]

    expected = run(x, where, dy)
    found = run(*(jax.device_put(v, sharding) for v in (x, where, dy)))
    for a, b in zip(found, expected):
        assert a.sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)


def test_no_rows():
    assert statistical_topk(jnp.zeros((0, 3, 8)), 2).shape == (0, 3, 8)
    for implementation in ("tpu", "triton"):
        with pytest.raises(ValueError, match="x has no rows"):
            statistical_topk(jnp.zeros((0, 8)), 2, implementation=implementation, interpret=True)


X = jnp.ones((2, 8))
REFUSED = {
    "int32": (lambda: statistical_topk(jnp.ones((2, 8), jnp.int32), 2), "x must be floating point"),
    "scalar": (lambda: statistical_topk(jnp.ones(()), 2), r"shape \(\); its last axis must have"),
    "empty": (lambda: statistical_topk(jnp.ones((2, 0)), 2), r"shape \(2, 0\)"),
    "neither": (lambda: statistical_topk(X), "k is None and target_sparsity is None; exactly one"),
    "both": (lambda: statistical_topk(X, 2, target_sparsity=0.5), "k is 2 and target_sparsity is"),
    "k": (lambda: statistical_topk(X, 0), "k is 0; it must be finite and above 0"),
    "nan": (lambda: statistical_topk(X, math.nan), "k is nan; it must be finite"),
    "sparsity": (
        lambda: statistical_topk(X, target_sparsity=1.0),
        r"target_sparsity is 1.0; it must be in \[0, 1\)",
    ),
    "mode": (lambda: statistical_topk(X, 2, mode="firm"), "mode is 'firm'; allowed are soft, hard"),
    "where": (
        lambda: statistical_topk(X, 2, where=jnp.ones(8, bool)),
        r"where is bool of shape \(8,\); it must be bool of shape \(2, 8\)",
    ),
    "float where": (
        lambda: statistical_topk(X, 2, where=jnp.ones((2, 8))),
        "where is float32 of shape",
    ),
    "implementation": (
        lambda: statistical_topk(X, 2, implementation="tpu"),
        "implementation 'tpu' cannot run here: it is for tpu, this is cpu",
    ),
    "float16": (
        lambda: statistical_topk(X.astype(jnp.float16), 2, implementation="tpu", interpret=True),
        "x is float16, it takes float32, bfloat16",
    ),
    "blocks": (
        lambda: statistical_topk(X, 2, blocks=tpu.Blocks(8, 2**20)),
        "it is not of the implementation 'xla'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_refused_by_name(unchecked, case):
    call, message = REFUSED[case]
    with pytest.raises(TypeError if case == "int32" else ValueError, match=message):
        call()


def test_other_precisions(x64):
    x = rows(dtype=jnp.float64)[0]
    y, limit = statistical_topk(x, SHAPE.k, return_threshold=True)
    expected, _ = reference.statistical_topk(x, SHAPE.k)
    assert limit.dtype == jnp.float64
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    half = statistical_topk(x.astype(jnp.float16), SHAPE.k)
    assert half.dtype == jnp.float16
    np.testing.assert_allclose(half, expected, atol=2e-2)
