"""A chunk through its experts: the definition in float64, every implementation, and the edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels.sparse_ffn import bit_patterns, expert_union_ffn
from pallas_kernels.sparse_ffn.experts import reference, tpu, triton
from pallas_kernels.sparse_ffn.shapes import RAGGED_EXPERTS

WAYS = {
    "xla": {"implementation": "xla"},
    "tpu": {"implementation": "tpu", "interpret": True},
    "triton": {
        "implementation": "triton",
        "interpret": True,
        "blocks": triton.Blocks(tokens=16, neurons=16, columns=16, shares=2, warps=1),
    },
}
SHAPE = RAGGED_EXPERTS["ragged"]
OUTSIDE = 10**6
TOLERANCES = {"float32": 5e-6, "bfloat16": 2**-6, "uint16": 5e-5}


def problem(dtype=jnp.float32, shape=SHAPE):
    """Tokens, gates, weights and a list whose rest is nonsense."""
    rng = np.random.default_rng(0)
    bits = dtype == jnp.uint16

    def normal(*axes):
        return jnp.asarray(rng.normal(size=axes), jnp.float32 if bits else dtype)

    x, gates = normal(shape.tokens, shape.width), normal(shape.tokens, shape.experts)
    weights = (shape.experts, shape.size, shape.width)
    up, down = normal(*weights) * shape.width**-0.5, normal(*weights) * shape.size**-0.5
    if bits:
        up, down = bit_patterns(up), bit_patterns(down)
    idx = rng.permutation(shape.experts)
    idx[shape.union :] = OUTSIDE
    return x, gates, up, down, jnp.asarray(idx, jnp.int32), jnp.int32(shape.union)


def with_gradients(op):
    """The op's values and gradients, compiled once."""

    @jax.jit
    def run(x, gates, up, down, idx, count):
        def f(*floats):
            return op(*floats, *(() if len(floats) == 4 else (up, down)), idx, count)

        floats = (x, gates) if up.dtype == jnp.uint16 else (x, gates, up, down)
        y, pull = jax.vjp(f, *floats)
        return y, *pull(
            jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype)
        )

    return run


@functools.cache
def defined(dtype):
    op = functools.partial(reference.expert_union_ffn, activation=jax.nn.silu)
    return with_gradients(op)(*problem(dtype))


def assert_close(found, expected, tolerance):
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert a.dtype == b.dtype
        a, b = (np.asarray(v).astype(np.float64) for v in (a, b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


def test_the_definition_is_that_of_numpy_in_double_precision(x64):
    x, gates, up, down, idx, count = problem(jnp.float64)
    y = 0
    for e in np.asarray(idx)[: SHAPE.union]:
        hidden = np.asarray(x) @ np.asarray(up)[e].T
        hidden = hidden / (1 + np.exp(-hidden)) * np.asarray(gates)[:, e : e + 1]
        y = y + hidden @ np.asarray(down)[e]
    found = reference.expert_union_ffn(x, gates, up, down, idx, count, jax.nn.silu)
    np.testing.assert_allclose(found, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.uint16])
@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients_are_those_of_the_definition(way, dtype):
    op = functools.partial(expert_union_ffn, **WAYS[way])
    found = with_gradients(op)(*problem(dtype))
    assert_close(found, defined(dtype), TOLERANCES[jnp.dtype(dtype).name])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.uint16])
@pytest.mark.parametrize("blocks", [None, WAYS["triton"]["blocks"]])
def test_a_gpu_gives_what_the_definition_gives(blocks, dtype):
    if jax.default_backend() != "gpu":
        pytest.skip(f"no GPU: the platform is {jax.default_backend()}")
    op = functools.partial(expert_union_ffn, implementation="triton", blocks=blocks)
    found = with_gradients(op)(*problem(dtype))
    assert_close(found, defined(dtype), TOLERANCES[jnp.dtype(dtype).name])


@pytest.mark.parametrize("way", WAYS)
def test_the_whole_list_is_the_dense_layer(way):
    shape = RAGGED_EXPERTS["ragged_wide"]
    x, gates, up, down, idx, _ = problem(shape=shape)
    op = jax.jit(functools.partial(expert_union_ffn, activation=jax.nn.relu, **WAYS[way]))
    hidden = jax.nn.relu(jnp.einsum("nd,ekd->nek", x, up)) * gates[:, :, None]
    expected = jnp.einsum("nek,ekd->nd", hidden, down)
    np.testing.assert_allclose(op(x, gates, up, down, idx), expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(op(x, gates, up, down, idx, jnp.int32(0)), 0)


@pytest.mark.parametrize("way", WAYS)
def test_an_expert_that_is_listed_twice_counts_twice(way):
    x, gates, up, down, _, _ = problem()
    op = functools.partial(expert_union_ffn, **WAYS[way])
    twice = with_gradients(op)(x, gates, up, down, jnp.asarray([2, 2], jnp.int32), jnp.int32(2))
    once = with_gradients(op)(x, gates, up, down, jnp.asarray([2, 0], jnp.int32), jnp.int32(1))
    assert_close(twice, [2 * v for v in once], 5e-6)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_listed_is_not_read(way):
    x, gates, up, down, idx, count = problem()
    listed = np.zeros(SHAPE.experts, bool)
    listed[np.asarray(idx)[: SHAPE.union]] = True
    keep = jnp.asarray(listed)
    poisoned = [jnp.where(keep[:, None, None], w, jnp.nan) for w in (up, down)]
    op = functools.partial(expert_union_ffn, **WAYS[way])
    found = op(x, jnp.where(keep, gates, jnp.nan), *poisoned, idx, count)
    np.testing.assert_array_equal(found, op(x, gates, up, down, idx, count))


def test_the_gradient_is_that_of_finite_differences(x64):
    x, gates, up, down, _, _ = problem(jnp.float64)
    args = x[:2, :4], gates[:2, :3], up[:3, :2, :4], down[:3, :2, :4]
    idx = jnp.asarray([2, 0, 0], jnp.int32)
    f = jax.jit(lambda *a: jnp.sum(expert_union_ffn(*a, idx, 2, activation=jax.nn.gelu) ** 2))
    check_grads(f, args, order=1, modes=("rev",), eps=1e-5, rtol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_vmap(way):
    # every chunk has a list and a length of its own
    x, gates, up, down, _, _ = problem()
    xs, all_gates = jnp.stack([x, 2 * x]), jnp.stack([gates, gates[::-1]])
    idx = jnp.asarray([[0, 1, 2], [5, 3, 5]], jnp.int32)
    counts = jnp.asarray([1, 3], jnp.int32)
    op = functools.partial(expert_union_ffn, **WAYS[way])

    def mapped(x, gates, up, down):
        return jax.vmap(lambda x, g, i, n: op(x, g, up, down, i, n))(x, gates, idx, counts)

    def one_by_one(x, gates, up, down):
        define = functools.partial(reference.expert_union_ffn, activation=jax.nn.silu)
        each = [define(x[i], gates[i], up, down, idx[i], counts[i]) for i in range(2)]
        return jnp.stack(each)

    @jax.jit
    def run(*args):
        found = []
        for f in (mapped, one_by_one):
            y, pull = jax.vjp(f, *args)
            found.append((y, *pull(jnp.sin(y))))
        return found

    assert_close(*run(xs, all_gates, up, down), 5e-6)


def test_the_kernel_stays_in_bounds_and_leaves_nothing_unwritten(tpu_simulator):
    op = functools.partial(expert_union_ffn, implementation="tpu", interpret=tpu_simulator)
    assert_close(with_gradients(op)(*problem()), defined(jnp.float32), 5e-6)


X, GATES, W, IDX = jnp.ones((2, 3)), jnp.ones((2, 4)), jnp.ones((4, 5, 3)), jnp.zeros(2, jnp.int32)
REFUSED = {
    "x": ({"x": jnp.ones(3)}, r"x has shape \(3,\); it must be \[n, d\]"),
    "int x": ({"x": jnp.ones((2, 3), jnp.int32)}, "x must be floating point, not int32"),
    "int gates": ({"gates": jnp.ones((2, 4), bool)}, "gates must be floating point, not bool"),
    "int up": ({"up": W.astype(jnp.int8)}, "up must be floating point or uint16 bit patterns"),
    "up axes": ({"up": W[0]}, r"up has shape \(5, 3\); it must be \[e, k, d\]"),
    "up": ({"up": W[..., :2]}, r"up has shape \(4, 5, 2\); it must be \(4, 5, 3\), by x"),
    "down": ({"down": W[:3]}, r"down has shape \(3, 5, 3\); it must be \(4, 5, 3\), by up"),
    "gates": ({"gates": X}, r"gates has shape \(2, 3\); it must be \(2, 4\), by x and up"),
    "idx": ({"idx": jnp.ones(2)}, "idx must be of integers, not float32"),
    "count": ({"count": 3}, r"count is 3; it must be in \[0, 2\], the entries of idx"),
    "implementation": ({"implementation": "triton"}, "it is for gpu, this is cpu"),
    "blocks": ({"blocks": tpu.Blocks(1)}, "it is not of the implementation 'xla'"),
    "float16": (
        {"up": W.astype(jnp.float16), "implementation": "tpu", "interpret": True},
        "up is float16, it takes float32, bfloat16, uint16",
    ),
    "nothing": (
        {"idx": IDX[:0], "implementation": "tpu", "interpret": True},
        "there is nothing to compute",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_refused_by_name(unchecked, case):
    changed, message = REFUSED[case]
    arguments = {"x": X, "gates": GATES, "up": W, "down": W, "idx": IDX} | changed
    error = TypeError if case.startswith("int ") or case == "idx" else ValueError
    with pytest.raises(error, match=message):
        expert_union_ffn(**arguments)


def test_experts_that_do_not_fit_on_the_chip_are_refused(unchecked):
    w = jax.ShapeDtypeStruct((4, 1024, 4096), jnp.float32)
    x = jax.ShapeDtypeStruct((2, 4096), jnp.float32)
    op = functools.partial(expert_union_ffn, implementation="tpu", interpret=True)
    with pytest.raises(ValueError, match=r"a step takes \d+ bytes on chip, 12582912 are there"):
        jax.eval_shape(lambda x, w: op(x, GATES, w, w, IDX), x, w)
