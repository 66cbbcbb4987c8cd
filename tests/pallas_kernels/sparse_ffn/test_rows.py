"""The row products: the definition in float64, every implementation against it, and the edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads

from pallas_kernels.sparse_ffn import (
    bit_patterns,
    check_rows,
    gather_rows_matvec,
    scatter_rows_vecmat,
)
from pallas_kernels.sparse_ffn.rows import reference, tpu, triton
from pallas_kernels.sparse_ffn.shapes import RAGGED

WAYS = {
    "xla": {"implementation": "xla"},
    "tpu": {"implementation": "tpu", "interpret": True, "blocks": tpu.Blocks(8)},
    "triton": {
        "implementation": "triton",
        "interpret": True,
        "blocks": triton.Blocks(rows=2, columns=64, shares=2, warps=1),
    },
}
OPS = {
    "matvec": (gather_rows_matvec, reference.gather_rows_matvec),
    "vecmat": (scatter_rows_vecmat, reference.scatter_rows_vecmat),
}
SHAPE = RAGGED["ragged"]
F, D, C, COUNT = SHAPE.neurons, SHAPE.outputs, SHAPE.capacity, SHAPE.active
OUTSIDE = 10**6
TOLERANCES = {"float32": 2e-6, "bfloat16": 2**-7, "uint16": 2e-6}


def problem(dtype=jnp.float32, shape=(F, D, C, COUNT), seed=0):
    """Weights, a list with a repeat and with nonsense beyond its length, a vector for each op."""
    f, d, capacity, count = shape
    rng = np.random.default_rng(seed)
    w = jnp.asarray(rng.normal(size=(f, d)) / d**0.5, jnp.float32)
    idx = rng.integers(0, f, capacity)
    idx[1] = idx[0]
    idx[count:] = OUTSIDE
    a = rng.normal(size=capacity)
    a[count:] = np.nan
    x = rng.normal(size=d)
    bits = dtype == jnp.uint16
    floats = jnp.float32 if bits else dtype
    vectors = {"matvec": jnp.asarray(x, floats), "vecmat": jnp.asarray(a, floats)}
    w = bit_patterns(w) if bits else w.astype(dtype)
    return w, jnp.asarray(idx, jnp.int32), jnp.int32(count), vectors


def both_ops(ways):
    """Values and gradients of both ops, compiled once."""

    @jax.jit
    def run(w, idx, count, vectors):
        found = {}
        for name, op in ways.items():
            if w.dtype == jnp.uint16:
                y, pull = jax.vjp(lambda v, op=op: op(w, idx, v, count), vectors[name])
            else:
                y, pull = jax.vjp(lambda v, w, op=op: op(w, idx, v, count), vectors[name], w)
            dy = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).astype(y.dtype)
            found[name] = y, *pull(dy)
        return found

    return run


@functools.cache
def defined(dtype):
    return both_ops({name: ops[1] for name, ops in OPS.items()})(*problem(dtype))


def assert_close(found, expected, tolerance):
    for name, arrays in expected.items():
        assert len(found[name]) == len(arrays)
        for a, b in zip(found[name], arrays):
            assert a.dtype == b.dtype, name
            a, b = (np.asarray(v).astype(np.float64) for v in (a, b))
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)


def test_the_definition_is_that_of_numpy_in_double_precision(x64):
    w, idx, count, vectors = problem(jnp.float64)
    rows = np.asarray(w)[np.asarray(idx)[:COUNT]]
    y = reference.gather_rows_matvec(w, idx, vectors["matvec"], count)
    np.testing.assert_allclose(y[:COUNT], rows @ np.asarray(vectors["matvec"]), rtol=1e-12)
    np.testing.assert_array_equal(y[COUNT:], 0)
    y = reference.scatter_rows_vecmat(w, idx, vectors["vecmat"], count)
    np.testing.assert_allclose(y, np.asarray(vectors["vecmat"])[:COUNT] @ rows, rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.uint16])
@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients_are_those_of_the_definition(way, dtype):
    ops = {name: functools.partial(op, **WAYS[way]) for name, (op, _) in OPS.items()}
    assert_close(both_ops(ops)(*problem(dtype)), defined(dtype), TOLERANCES[jnp.dtype(dtype).name])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.uint16])
@pytest.mark.parametrize("blocks", [None, WAYS["triton"]["blocks"]])
def test_a_gpu_gives_what_the_definition_gives(blocks, dtype):
    if jax.default_backend() != "gpu":
        pytest.skip(f"no GPU: the platform is {jax.default_backend()}")
    ops = {
        name: functools.partial(op, implementation="triton", blocks=blocks)
        for name, (op, _) in OPS.items()
    }
    assert_close(both_ops(ops)(*problem(dtype)), defined(dtype), TOLERANCES[jnp.dtype(dtype).name])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.uint16])
def test_weights_of_16_bits_lose_nothing_more(dtype):
    w, idx, count, vectors = problem(jnp.float32)
    rounded = w.astype(jnp.bfloat16)
    stored = rounded if dtype == jnp.float32 else bit_patterns(w)
    for name, (op, _) in OPS.items():
        expected = op(rounded.astype(jnp.float32), idx, vectors[name], count)
        found = op(stored, idx, vectors[name], count)
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("way", WAYS)
def test_every_length_of_a_list(way):
    w, idx, _, vectors = problem(shape=(8, 128, 16, 16))
    for name, (op, define) in OPS.items():
        run = jax.jit(functools.partial(op, **WAYS[way]))
        for count in (0, 1, 8, 15, 16):
            expected = define(w, idx, vectors[name], jnp.int32(count))
            found = run(w, idx, vectors[name], jnp.int32(count))
            np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def test_a_list_without_a_length_counts_as_a_whole():
    w, idx, _, vectors = problem(shape=(8, 128, 16, 16))
    for name, (op, _) in OPS.items():
        expected = op(w, idx, vectors[name], 16)
        np.testing.assert_array_equal(op(w, idx, vectors[name]), expected)
        assert np.count_nonzero(expected)
    assert gather_rows_matvec(w, idx[:0], vectors["matvec"]).shape == (0,)
    np.testing.assert_array_equal(scatter_rows_vecmat(w, idx[:0], vectors["vecmat"][:0]), 0)


@pytest.mark.parametrize("name", OPS)
def test_what_is_not_listed_is_not_read(name):
    w, idx, count, vectors = problem()
    listed = np.zeros(F, bool)
    listed[np.asarray(idx)[:COUNT]] = True
    poisoned = jnp.where(jnp.asarray(listed)[:, None], w, jnp.nan)
    op, _ = OPS[name]
    for way in WAYS.values():
        found = op(poisoned, jnp.where(idx == OUTSIDE, 0, idx), vectors[name], count, **way)
        np.testing.assert_array_equal(found, op(w, idx, vectors[name], count, **way))


@pytest.mark.parametrize("name", OPS)
def test_the_gradient_is_that_of_finite_differences(x64, name):
    w, idx, count, vectors = problem(jnp.float64, (6, 5, 4, 3))
    v = jnp.nan_to_num(vectors[name], nan=7.0)
    f = jax.jit(lambda w, v: jnp.sum(OPS[name][0](w, idx, v, count) ** 2))
    check_grads(f, (w, v), order=2, modes=("rev",), eps=1e-5, rtol=1e-6)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("way", WAYS)
def test_vmap(way, name):
    # every token has a list and a length of its own, twice over
    w, _, _, vectors = problem()
    rng = np.random.default_rng(1)
    idx = jnp.asarray(rng.integers(0, F, (2, 2, C)), jnp.int32)
    counts = jnp.asarray([[0, 19], [7, 11]], jnp.int32)
    v = vectors[name] if name == "matvec" else jnp.nan_to_num(vectors[name])
    v = jnp.stack([v, 2 * v, 3 * v, -v]).reshape(2, 2, -1)
    op = functools.partial(OPS[name][0], **WAYS[way])

    def mapped(w, v):
        return jax.vmap(jax.vmap(lambda i, v, n: op(w, i, v, n)))(idx, v, counts)

    def one_by_one(w, v):
        define = OPS[name][1]
        each = [define(w, idx[i], v[i], counts[i]) for i in np.ndindex(2, 2)]
        return jnp.stack(each).reshape(2, 2, -1)

    @jax.jit
    def run(w, v):
        found = []
        for f in (mapped, one_by_one):
            y, pull = jax.vjp(f, w, v)
            found.append((y, *pull(jnp.sin(y))))
        return found

    for a, b in zip(*run(w, v)):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_the_kernels_stay_in_bounds_and_leave_nothing_unwritten(tpu_simulator):
    # three steps, of which the second is filled in part and the third not at all; float32 alone,
    # for the simulator has no copies out of rows that are looked at as pairs
    ways = WAYS["tpu"] | {"interpret": tpu_simulator}
    ops = {name: functools.partial(op, **ways) for name, (op, _) in OPS.items()}
    assert_close(both_ops(ops)(*problem()), defined(jnp.float32), 2e-6)


def test_sharded_columns(mesh):
    w, idx, count, vectors = problem(shape=(8, 128, 16, 11))
    sharding = NamedSharding(mesh, PartitionSpec(None, "model"))
    sharded = jax.device_put(w, sharding)
    for name, (op, define) in OPS.items():
        found = jax.jit(op)(sharded, idx, vectors[name], count)
        expected = define(w, idx, vectors[name], count)
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def test_a_length_that_changes_is_not_traced_again():
    w, idx, _, vectors = problem()
    traces = []

    @jax.jit
    def run(count):
        traces.append(count)
        return gather_rows_matvec(w, idx, vectors["matvec"], count)

    assert [np.count_nonzero(run(n)) for n in (3, 5)] == [3, 5]
    assert len(traces) == 1


W, IDX, X = jnp.ones((4, 6)), jnp.zeros(3, jnp.int32), jnp.ones(6)
REFUSED = {
    "w": (lambda: gather_rows_matvec(W.astype(jnp.int32), IDX, X), "w must be floating point or"),
    "w axes": (lambda: gather_rows_matvec(X, IDX, X), r"w has shape \(6,\); it must be \[f, d\]"),
    "x": (lambda: gather_rows_matvec(W, IDX, X.astype(int)), "x must be floating point, not int"),
    "x shape": (
        lambda: gather_rows_matvec(W, IDX, jnp.ones(5)),
        r"x has shape \(5,\); it must be \(6,\), by the rows of w",
    ),
    "a": (lambda: scatter_rows_vecmat(W, IDX, IDX), "a must be floating point, not int32"),
    "a shape": (
        lambda: scatter_rows_vecmat(W, IDX, X),
        r"a has shape \(6,\); it must be \(3,\), by idx",
    ),
    "idx": (lambda: gather_rows_matvec(W, jnp.ones(3), X), "idx must be of integers, not float32"),
    "idx axes": (lambda: gather_rows_matvec(W, IDX[None], X), r"idx has shape \(1, 3\)"),
    "count": (lambda: gather_rows_matvec(W, IDX, X, 1.0), "count must be of integers, not float32"),
    "count shape": (lambda: gather_rows_matvec(W, IDX, X, IDX), r"count has shape \(3,\)"),
    "count range": (
        lambda: gather_rows_matvec(W, IDX, X, 4),
        r"count is 4; it must be in \[0, 3\], the entries of idx",
    ),
    "implementation": (
        lambda: gather_rows_matvec(W, IDX, X, implementation="tpu"),
        "implementation 'tpu' cannot run here: it is for tpu, this is cpu",
    ),
    "blocks": (
        lambda: gather_rows_matvec(W, IDX, X, blocks=tpu.Blocks(8)),
        "it is not of the implementation 'xla'",
    ),
    "odd": (
        lambda: gather_rows_matvec(
            W[:3].astype(jnp.bfloat16), IDX, X, implementation="tpu", interpret=True
        ),
        "w has 3 rows of 16-bit weights, which are read in pairs",
    ),
    "float16": (
        lambda: gather_rows_matvec(
            W.astype(jnp.float16), IDX, X, implementation="tpu", interpret=True
        ),
        "w is float16, it takes float32, bfloat16, uint16",
    ),
    "nothing": (
        lambda: gather_rows_matvec(W, IDX[:0], X, implementation="triton", interpret=True),
        "there is nothing to read",
    ),
    "check count": (lambda: check_rows(IDX, jnp.int32(-1), 4), r"count is -1; it must be in"),
    "check idx": (
        lambda: check_rows(jnp.asarray([0, 4, -1]), None, 4),
        r"idx\[1\] is 4; it must be in \[0, 4\)",
    ),
    "check traced": (
        lambda: jax.jit(lambda idx: check_rows(idx, 1, 4))(IDX),
        "check_rows runs outside of jit",
    ),
}
TYPE_ERRORS = ("w", "x", "a", "idx", "count", "check traced")


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_refused_by_name(unchecked, case):
    call, message = REFUSED[case]
    with pytest.raises(TypeError if case in TYPE_ERRORS else ValueError, match=message):
        call()


def test_a_good_list_passes():
    check_rows(jnp.asarray([0, 3, -7]), 2, 4)
    check_rows(jnp.asarray([0, 3]), None, 4)


def test_rows_that_are_too_wide_are_refused(unchecked):
    w = jax.ShapeDtypeStruct((2, 100_000), jnp.float32)
    x = jax.ShapeDtypeStruct((100_000,), jnp.float32)
    op = functools.partial(gather_rows_matvec, implementation="tpu", interpret=True)
    with pytest.raises(ValueError, match=r"rows have 100000 entries, \d+ fit"):
        jax.eval_shape(lambda w, x: op(w, IDX, x), w, x)
