"""Products with N:M weights: the definition in float64, every implementation, and the edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads

from pallas_kernels.nm_matmul import nm_matmul, reference, tpu, triton, xla
from pallas_kernels.nm_matmul.shapes import RAGGED, Shape
from sparsejax.core.patterns import NM
from sparsejax.weights.compact import compress_nm

WAYS = {
    "xla": {"implementation": "xla"},
    "tpu": {"implementation": "tpu", "interpret": True},
    "triton": {"implementation": "triton", "interpret": True},
}
ORIENTATIONS = [(-2, False), (-2, True), (-1, False), (-1, True)]


def packed_positions(index, bits, axis):
    """The stream of bits, by NumPy."""
    along = np.moveaxis(index, axis, 0)
    stream = (along[:, None] >> np.arange(bits).reshape(1, -1, 1)) & 1
    stream = stream.reshape(-1, along.shape[1]).astype(np.uint8)
    return np.moveaxis(np.packbits(stream, axis=0, bitorder="little"), 0, axis)


def weight(inputs, outputs, n, m, axis=-2, seed=0):
    """A random N:M weight: dense in float64, its stored values, and their packed positions."""
    rng = np.random.default_rng(seed)
    length, other = (inputs, outputs) if axis == -2 else (outputs, inputs)
    order = rng.permuted(np.tile(np.arange(m), (length // m * other, 1)), axis=1)
    index = np.sort(order[:, :n], axis=1).reshape(length // m, other, n)
    values = rng.normal(size=index.shape)
    dense = np.zeros((length // m, other, m))
    np.put_along_axis(dense, index, values, axis=2)
    dense, values, index = (v.transpose(0, 2, 1).reshape(-1, other) for v in (dense, values, index))
    if axis == -1:
        dense, values, index = dense.T, values.T, index.T
    return dense, values, packed_positions(index, (m - 1).bit_length(), axis)


def problem(shape, dtype=jnp.float32, transpose=False, axis=-2):
    """x, values, packed and dy of a shape, whose weight is stored transposed where asked for."""
    sizes = (shape.outputs, shape.inputs) if transpose else (shape.inputs, shape.outputs)
    _, values, packed = weight(*sizes, shape.n, shape.m, axis)
    rng = np.random.default_rng(1)
    x, dy = (rng.normal(size=(shape.rows, width)) for width in (shape.inputs, shape.outputs))
    return (
        *(jnp.asarray(v, dtype) for v in (x, values)),
        jnp.asarray(packed),
        jnp.asarray(dy, dtype),
    )


def passes(op, shape, transpose=False, axis=-2):
    """Output and both gradients."""

    @jax.jit
    def run(x, values, packed, dy):
        def product(x, values):
            return op(x, values, packed, n=shape.n, m=shape.m, axis=axis, transpose=transpose)

        y, pull = jax.vjp(product, x, values)
        return y, *pull(dy.astype(y.dtype))

    return run


def assert_passes_agree(found, expected):
    for name, a, b in zip(("y", "dx", "dvalues"), found, expected, strict=True):
        assert a.dtype == b.dtype, name
        loose = a.dtype == jnp.bfloat16
        a, b = (np.asarray(v).astype(np.float64) for v in (a, b))
        scale = np.abs(b).max()
        tolerance = {"rtol": 2**-7, "atol": 2**-8 * scale} if loose else {"atol": 2e-6 * scale}
        np.testing.assert_allclose(a, b, **tolerance, err_msg=name)


@functools.cache
def defined(shape, dtype, transpose=False, axis=-2):
    run = passes(reference.nm_matmul, shape, transpose, axis)
    return run(*problem(shape, dtype, transpose, axis))


PATTERNS = [(1, 1), (1, 2), (2, 4), (2, 8), (3, 8), (3, 5), (1, 16), (2, 200)]


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_the_definition_is_that_of_numpy_in_double_precision(x64, n, m):
    x = np.random.default_rng(1).normal(size=(2, 3 * m))
    for axis, transpose in ORIENTATIONS if m == 8 else ORIENTATIONS[:1]:
        sizes = (3 * m, m) if not transpose else (m, 3 * m)
        dense, values, packed = weight(*sizes, n, m, axis)
        options = {"n": n, "m": m, "axis": axis, "transpose": transpose}
        found = reference.nm_matmul(
            jnp.asarray(x), jnp.asarray(values), jnp.asarray(packed), **options
        )
        expected = x @ (dense.T if transpose else dense)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", RAGGED)
@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients_are_those_of_the_definition(way, name):
    run = passes(functools.partial(nm_matmul, **WAYS[way]), RAGGED[name])
    assert_passes_agree(run(*problem(RAGGED[name])), defined(RAGGED[name], jnp.float32))


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16(way):
    shape = RAGGED["ragged_2_4"]
    run = passes(functools.partial(nm_matmul, **WAYS[way]), shape)
    assert_passes_agree(run(*problem(shape, jnp.bfloat16)), defined(shape, jnp.bfloat16))


@pytest.mark.parametrize(
    ("way", "axis", "transpose"),
    [*(("xla", *o) for o in ORIENTATIONS[1:]), ("tpu", -2, True), ("triton", -2, True)],
)
def test_every_orientation(way, axis, transpose):
    shape = Shape(3, 48, 32)
    run = passes(functools.partial(nm_matmul, **WAYS[way]), shape, transpose, axis)
    arrays = problem(shape, jnp.float32, transpose, axis)
    assert_passes_agree(run(*arrays), defined(shape, jnp.float32, transpose, axis))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", RAGGED)
def test_a_gpu_gives_what_the_definition_gives(name, dtype):
    if jax.default_backend() != "gpu":
        pytest.skip(f"no GPU: the platform is {jax.default_backend()}")
    run = passes(functools.partial(nm_matmul, implementation="triton"), RAGGED[name])
    assert_passes_agree(run(*problem(RAGGED[name], dtype)), defined(RAGGED[name], dtype))


@pytest.mark.parametrize("rows", [1, xla.AT_ONCE + 1, xla.FEW_ROWS + 1])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 5), (2, 8), (1, 16), (2, 200)])
def test_few_rows_and_many_of_any_pattern(n, m, rows):
    # eleven groups: more than one piece, and a rest, of most patterns
    shape = Shape(rows, 11 * m, 24, n, m)
    x, values, packed, _ = problem(shape)
    found = jax.jit(functools.partial(nm_matmul, n=n, m=m))(x, values, packed)
    expected = reference.nm_matmul(x, values, packed, n=n, m=m)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_few_rows_need_no_dense_weight():
    shape = Shape(xla.FEW_ROWS, 256, 64)
    x, values, packed, _ = problem(shape, jnp.bfloat16)
    run = jax.jit(functools.partial(nm_matmul, n=2, m=4))

    def compiled(x):
        return str(run.lower(x, values, packed).compile().as_text())

    assert "256,64]" not in compiled(x)
    assert "256,64]" in compiled(jnp.concatenate([x, x]))


@pytest.mark.parametrize("transpose", [False, True])
def test_the_gradients_are_those_of_float64_and_of_finite_differences(x64, transpose):
    shape = Shape(3, 16, 24, 2, 8)
    arrays = problem(shape, jnp.float64, transpose)
    found = passes(nm_matmul, shape, transpose)(*arrays)
    expected = passes(reference.nm_matmul, shape, transpose)(*arrays)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == jnp.float64
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    x, values, packed, _ = arrays

    def f(x, values):
        return jnp.sum(nm_matmul(x, values, packed, n=2, m=8, transpose=transpose) ** 3)

    check_grads(jax.jit(f), (x, values), order=1, modes=("rev",), eps=1e-6, rtol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_vmap_and_leading_axes(way):
    op = functools.partial(nm_matmul, n=2, m=4, **WAYS[way])
    _, values, packed, _ = problem(Shape(1, 40, 24))
    x, dy = (
        jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, w)), jnp.float32) for w in (40, 24)
    )

    @jax.jit
    def both(x, values, dy):
        plain, pull = jax.vjp(lambda x, v: op(x, v, packed), x, values)
        mapped = jax.vmap(lambda x, v: op(x, v, packed), (0, None))
        y, pull_mapped = jax.vjp(mapped, x, values)
        return (plain, *pull(dy)), (y, *pull_mapped(dy))

    expected, found = both(x, values, dy)
    assert found[0].shape == (2, 3, 24)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    # experts: a weight for each
    many = jax.jit(jax.vmap(op))(x, jnp.stack([values, 2 * values]), jnp.stack([packed, packed]))
    np.testing.assert_allclose(many[1], 2 * op(x[1], values, packed), rtol=1e-5, atol=1e-5)


def test_the_kernel_stays_in_bounds_and_leaves_nothing_unwritten(tpu_simulator):
    # two blocks of everything, of which the second hangs over the end
    shape = Shape(17, 300, 200)
    simulated = {
        "implementation": "tpu",
        "interpret": tpu_simulator,
        "blocks": tpu.Blocks(16, 128, 2**23),
    }
    run = passes(functools.partial(nm_matmul, **simulated), shape)
    assert_passes_agree(run(*problem(shape)), defined(shape, jnp.float32))


def test_blocks_do_not_matter():
    shape = RAGGED["ragged_1_16"]
    blocks = triton.Blocks(16, 16, 64, 3, 1)
    run = passes(functools.partial(nm_matmul, **WAYS["triton"], blocks=blocks), shape)
    assert_passes_agree(run(*problem(shape)), defined(shape, jnp.float32))


@pytest.mark.parametrize("way", WAYS)
def test_a_nan_stays_in_its_column_and_beyond_the_end_nothing_counts(way):
    shape = Shape(2, 40, 24)
    x, values, packed, _ = problem(shape)
    values = values.at[3, 5].set(jnp.nan)
    y = nm_matmul(x, values, packed, n=2, m=4, **WAYS[way])
    assert np.isnan(y[:, 5]).all()
    assert np.isfinite(np.delete(np.asarray(y), 5, axis=1)).all()


@pytest.mark.parametrize("way", WAYS)
def test_the_result_has_the_common_dtype(way):
    x, values, packed, dy = problem(Shape(3, 40, 24))
    run = passes(functools.partial(nm_matmul, **WAYS[way]), Shape(3, 40, 24))
    half, whole = jnp.bfloat16, jnp.float32
    found = jax.eval_shape(run, x, values.astype(half), packed, dy)
    assert [v.dtype for v in found] == [whole, whole, half]
    found = jax.eval_shape(run, x.astype(half), values, packed, dy)
    assert [v.dtype for v in found] == [whole, half, whole]


def test_mixed_precision_loses_nothing():
    x, values, packed, _ = problem(Shape(3, 40, 24))
    half = values.astype(jnp.bfloat16)
    found = nm_matmul(x, half, packed, n=2, m=4)
    expected = nm_matmul(x, half.astype(jnp.float32), packed, n=2, m=4)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axis", [-2, -1])
def test_the_compact_form_of_the_library_fits_as_it_is(axis):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(48, 32)), jnp.float32)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 48)), jnp.float32)
    pattern = NM(2, 8, axis=axis)
    pruned = jnp.where(pattern.mask(jnp.abs(w)), w, 0)
    c = compress_nm(pruned, pattern)
    y = nm_matmul(x, c.values, c.packed, n=c.n, m=c.m, axis=axis)
    np.testing.assert_allclose(y, x @ pruned, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [4, 16])
def test_sharded_rows_and_columns(mesh, rows):
    shape = Shape(rows, 64, 48)
    x, values, packed, dy = problem(shape)
    run = passes(nm_matmul, shape)
    expected = run(x, values, packed, dy)
    rows_of, columns_of = (
        NamedSharding(mesh, PartitionSpec(*s)) for s in (("data",), (None, "model"))
    )
    sharded = (
        jax.device_put(x, rows_of),
        jax.device_put(values, columns_of),
        jax.device_put(packed, columns_of),
        jax.device_put(dy, NamedSharding(mesh, PartitionSpec("data", "model"))),
    )
    assert_passes_agree(run(*sharded), expected)


def test_nothing_to_multiply():
    _, values, packed, _ = problem(Shape(1, 40, 24))
    assert nm_matmul(jnp.zeros((0, 3, 40)), values, packed, n=2, m=4).shape == (0, 3, 24)
    empty = jnp.zeros((0, 24)), jnp.zeros((0, 24), jnp.uint8)
    np.testing.assert_array_equal(nm_matmul(jnp.zeros((2, 0)), *empty, n=2, m=4), np.zeros((2, 24)))
    for implementation in ("tpu", "triton"):
        with pytest.raises(ValueError, match=r"x has shape \(0, 40\) and values \(20, 24\), none"):
            nm_matmul(
                jnp.zeros((0, 40)),
                values,
                packed,
                n=2,
                m=4,
                implementation=implementation,
                interpret=True,
            )


X, VALUES, PACKED = jnp.ones((2, 8)), jnp.ones((4, 3)), jnp.zeros((1, 3), jnp.uint8)


def call(x=X, values=VALUES, packed=PACKED, n=2, m=4, **options):
    return nm_matmul(x, values, packed, n=n, m=m, **options)


REFUSED = {
    "x": (TypeError, {"x": jnp.ones((2, 8), jnp.int32)}, "x must be floating point, not int32"),
    "values": (TypeError, {"values": jnp.ones((4, 3), int)}, "values must be floating point, not"),
    "packed": (TypeError, {"packed": jnp.ones((1, 3))}, "packed must be uint8, not float32"),
    "n": (ValueError, {"n": 5}, "n is 5 and m is 4; allowed is 1 <= n <= m <= 256"),
    "none": (ValueError, {"n": 0}, "n is 0 and m is 4"),
    "m": (ValueError, {"m": 257}, "n is 2 and m is 257"),
    "axis": (ValueError, {"axis": 0}, "axis is 0; allowed are -2 and -1"),
    "divided": (
        ValueError,
        {"n": 3},
        r"values has shape \(4, 3\); it must have two axes, and n = 3 must divide axis -2",
    ),
    "axes": (ValueError, {"values": jnp.ones(4)}, r"values has shape \(4,\); it must have two"),
    "positions": (
        ValueError,
        {"m": 8, "x": jnp.ones((2, 16))},
        r"packed has shape \(1, 3\); the positions of values of shape \(4, 3\) take \(2, 3\)",
    ),
    "columns": (ValueError, {"packed": jnp.zeros((1, 4), jnp.uint8)}, r"take \(1, 3\)"),
    "reduced": (
        ValueError,
        {"x": jnp.ones((2, 9))},
        r"x has shape \(2, 9\); its last axis must be 8 long for a weight of shape \(8, 3\)$",
    ),
    "turned": (
        ValueError,
        {"transpose": True},
        r"x has shape \(2, 8\); its last axis must be 3 long .* \(8, 3\), transposed",
    ),
    "scalar": (ValueError, {"x": jnp.ones(())}, r"x has shape \(\); its last axis must be 8"),
    "unknown": (ValueError, {"implementation": "cuda"}, "implementation is 'cuda'; allowed are"),
    "implementation": (
        ValueError,
        {"implementation": "tpu"},
        "implementation 'tpu' cannot run here: it is for tpu, this is cpu",
    ),
    "float16": (
        ValueError,
        {"values": VALUES.astype(jnp.float16), "implementation": "tpu", "interpret": True},
        "values is float16, it takes float32, bfloat16",
    ),
    "blocks": (
        ValueError,
        {"blocks": tpu.Blocks(16, 128, 2**20)},
        "it is not of the implementation 'xla'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_refused_by_name(unchecked, case):
    error, options, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call(**options)


def test_arrays_beyond_the_reach_of_offsets_are_refused():
    x = jax.ShapeDtypeStruct((1, 2**18), jnp.float32)
    values = jax.ShapeDtypeStruct((2**17, 2**14 + 2), jnp.float32)
    packed = jax.ShapeDtypeStruct((2**15, 2**14 + 2), jnp.uint8)
    op = functools.partial(nm_matmul, n=2, m=4, implementation="triton", interpret=True)
    with pytest.raises(
        ValueError, match="an array has 2147745792 entries, offsets reach 2147483647"
    ):
        jax.eval_shape(op, x, values, packed)
