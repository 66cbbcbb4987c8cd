"""Block-sparse matmul: the definition in float64, every implementation against it, its edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads

from pallas_kernels.block_sparse_matmul import block_sparse_matmul, reference, tpu, triton, xla
from pallas_kernels.block_sparse_matmul.shapes import RAGGED

SMALL = triton.Blocks(features=16, positions=16, inner=16, warps=1, stages=1)
WAYS = {
    "xla": {"implementation": "xla"},
    "tpu": {"implementation": "tpu", "interpret": True},
    "triton": {"implementation": "triton", "interpret": True},
    # several pieces of blocks, lists and positions
    "triton, pieces": {"implementation": "triton", "interpret": True, "blocks": SMALL},
}
TAKEN = {"tpu": ("ragged_first", "ragged_tiles")}
CASES = [(way, name) for way in WAYS for name in TAKEN.get(way, RAGGED)]


def problem(name, dtype=jnp.float32):
    """Stored blocks, lists, activations and upstream gradients of a ragged shape.

    One row is empty, one column is in no list, and padding holds NaN and names no block.
    """
    shape, rng = RAGGED[name], np.random.default_rng(0)
    r, s = shape.rows, shape.stored
    indices = np.stack([rng.permutation(shape.columns - 1)[:s] for _ in range(r)])
    counts = rng.integers(1, s + 1, r)
    counts[-1] = 0
    values, x = rng.normal(size=(r, s, *shape.block)), rng.normal(size=shape.x)
    padding = np.arange(s) >= counts[:, None]
    indices[padding], values[padding] = 10**6, np.nan
    axis = -2 if shape.features == "first" else -1
    dy = rng.normal(size=np.insert(np.delete(x.shape, axis), x.ndim + axis, shape.outputs))
    values, x, dy = (jnp.asarray(v, dtype) for v in (values, x, dy))
    return values, jnp.asarray(indices, jnp.int32), jnp.asarray(counts, jnp.int32), x, dy


def run(op, name, **options):
    """Output and gradients of stored blocks and activations, compiled."""
    op = functools.partial(op, features=RAGGED[name].features, **options)

    @jax.jit
    def both(values, indices, counts, x, dy):
        y, pull = jax.vjp(lambda values, x: op(values, indices, counts, x), values, x)
        return y, *pull(dy)

    return both


@functools.cache
def defined(name, dtype):
    """What the definition gives in float32, from inputs of a dtype."""
    values, indices, counts, x, dy = problem(name, dtype)
    values, x, dy = (v.astype(jnp.float32) for v in (values, x, dy))
    return run(reference.block_sparse_matmul, name)(values, indices, counts, x, dy)


def assert_close(found, expected, dtype):
    rtol, atol = (2**-7, 2**-5) if dtype == jnp.bfloat16 else (1e-5, 2e-5)
    for part, a, b in zip(("y", "dvalues", "dx"), found, expected):
        assert a.dtype == dtype, part
        a, b = np.asarray(a).astype(np.float64), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=part)


def test_the_definition_is_that_of_numpy_in_double_precision(x64):
    for name, shape in RAGGED.items():
        values, indices, counts, x, dy = (np.asarray(v) for v in problem(name, jnp.float64))
        (bo, bk), w = shape.block, np.zeros((shape.outputs, shape.inputs))
        for i, j in np.ndindex(indices.shape):
            if j < counts[i]:
                at = indices[i, j] * bk
                w[i * bo : (i + 1) * bo, at : at + bk] = values[i, j]
        last = shape.features == "last"
        y = np.einsum("ok,nk->no" if last else "ok,bkn->bon", w, x)
        dx = np.einsum("ok,no->nk" if last else "ok,bon->bkn", w, dy)
        dw = np.einsum("no,nk->ok" if last else "bon,bkn->ok", dy, x)
        dw = dw.reshape(shape.rows, bo, shape.columns, bk).swapaxes(1, 2)
        dvalues = np.zeros_like(values)
        for i, j in np.ndindex(indices.shape):
            if j < counts[i]:
                dvalues[i, j] = dw[i, indices[i, j]]
        found = run(reference.block_sparse_matmul, name)(*problem(name, jnp.float64))
        for a, b in zip(found, (y, dvalues, dx)):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("way", "name"), CASES)
def test_values_and_gradients_are_those_of_the_definition(way, name):
    values, indices, counts, x, dy = problem(name)
    found = run(block_sparse_matmul, name, **WAYS[way])(values, indices, counts, x, dy)
    assert_close(found, defined(name, jnp.float32), jnp.float32)
    # what is not stored has no gradient: padding, and the inputs that no list names
    _, dvalues, dx = found
    padding = np.arange(indices.shape[1]) >= np.asarray(counts)[:, None]
    assert not np.any(np.asarray(dvalues)[padding])
    inputs = -2 if RAGGED[name].features == "first" else -1
    assert not np.any(np.take(np.asarray(dx), np.arange(-values.shape[3], 0), inputs))


@pytest.mark.parametrize("way", ["xla", "tpu", "triton"])
def test_bfloat16_is_summed_in_float32(way):
    name = "ragged_tiles"
    found = run(block_sparse_matmul, name, **WAYS[way])(*problem(name, jnp.bfloat16))
    assert_close(found, defined(name, jnp.bfloat16), jnp.bfloat16)


@pytest.mark.parametrize("way", WAYS)
def test_without_counts_every_block_counts(way):
    values, indices, counts, x, dy = problem("ragged_tiles")
    values, indices = jnp.nan_to_num(values), jnp.broadcast_to(jnp.asarray([2, 0]), indices.shape)
    every = jnp.full_like(counts, indices.shape[1])
    op = run(block_sparse_matmul, "ragged_tiles", **WAYS[way])
    expected = run(reference.block_sparse_matmul, "ragged_tiles")(values, indices, every, x, dy)
    assert_close(op(values, indices, None, x, dy), expected, jnp.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", RAGGED)
@pytest.mark.parametrize("blocks", [None, SMALL])
def test_a_gpu_gives_what_the_definition_gives(blocks, name, dtype):
    if jax.default_backend() != "gpu":
        pytest.skip(f"no GPU: the platform is {jax.default_backend()}")
    with jax.default_matmul_precision("highest"):
        op = run(block_sparse_matmul, name, implementation="triton", blocks=blocks)
        assert_close(op(*problem(name, dtype)), defined(name, dtype), dtype)


@pytest.mark.parametrize("name", ["ragged_first", "ragged_last"])
def test_the_gradient_is_that_of_finite_differences(x64, name):
    values, indices, counts, x, dy = problem(name, jnp.float64)
    values = jnp.nan_to_num(values)

    def f(values, x):
        y = block_sparse_matmul(values, indices, counts, x, features=RAGGED[name].features)
        return jnp.sum(jnp.sin(y) * dy)

    check_grads(jax.jit(f), (values, x), order=1, modes=("rev",), eps=1e-6, rtol=1e-6)


@pytest.mark.parametrize("way", ["xla", "tpu", "triton"])
def test_leading_axes_and_vmap(way):
    values, indices, counts, x, dy = problem("ragged_tiles")
    op = functools.partial(block_sparse_matmul, **WAYS[way])
    pair = jnp.stack([x[:6], x[6:12]])
    up = jnp.stack([dy[:6], dy[6:12]])

    def shared(values, x):
        return jax.vmap(lambda x: op(values, indices, counts, x))(x)

    def own(values, x):
        lists = jnp.stack([indices, indices])[:, ::-1], jnp.stack([counts, counts])[:, ::-1]
        return jax.vmap(op)(jnp.stack([values, values])[:, ::-1], *lists, x)

    @jax.jit
    def both(values, x, dy):
        found = []
        for f in (lambda values, x: op(values, indices, counts, x), shared, own):
            y, pull = jax.vjp(f, values, x)
            found.append((y, *pull(dy)))
        return found

    plain, mapped, reversed_rows = both(values, pair, up)
    for a, b in zip(mapped, plain):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)
    assert np.count_nonzero(plain[0])
    assert np.count_nonzero(plain[1])
    # block rows in the opposite order give the outputs in it
    rows = reversed_rows[0].reshape(2, 6, 2, -1)[:, :, ::-1].reshape(plain[0].shape)
    np.testing.assert_allclose(rows, plain[0], rtol=1e-5, atol=2e-5)


def test_one_vector_is_multiplied_too():
    values, indices, counts, x, _ = problem("ragged_last")
    y = block_sparse_matmul(values, indices, counts, x[0])
    assert y.shape == (12,)
    expected = block_sparse_matmul(values, indices, counts, x)[0]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TAKEN["tpu"])
def test_the_kernel_stays_in_bounds_and_leaves_nothing_unwritten(tpu_simulator, name):
    # two tiles of positions, of which the second hangs over the end
    simulated = {
        "implementation": "tpu",
        "interpret": tpu_simulator,
        "blocks": tpu.Blocks(16, 2**20),
    }
    values, indices, counts, x, dy = problem(name)
    features = RAGGED[name].features

    def op(values, x):
        return block_sparse_matmul(values, indices, counts, x, features=features, **simulated)

    y, pull = jax.vjp(op, values, x)
    assert_close((y, *pull(dy)), defined(name, jnp.float32), jnp.float32)


@pytest.mark.parametrize("name", ["ragged_first", "ragged_last", "ragged_rows"])
def test_an_image_or_a_few_block_rows_at_a_time_give_the_same(monkeypatch, name):
    given = problem(name)
    expected = defined(name, jnp.float32)
    monkeypatch.setitem(xla.GATHERED, "cpu", 2**10)
    lowered = run(block_sparse_matmul, name).lower(*given)
    assert "while" in lowered.as_text()
    assert_close(lowered.compile()(*given), expected, jnp.float32)


def test_activations_that_are_sharded(mesh):
    values, indices, counts, _, _ = problem("ragged_last")
    values = jnp.nan_to_num(values)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6, 18)), jnp.float32)

    @jax.jit
    def both(values, x):
        y, pull = jax.vjp(lambda v, x: block_sparse_matmul(v, indices, counts, x), values, x)
        return y, *pull(jnp.sin(y))

    expected = both(values, x)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", "model")))
    for a, b in zip(both(values, sharded), expected):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_other_precisions(x64):
    values, indices, counts, x, dy = problem("ragged_first", jnp.float64)
    found = run(block_sparse_matmul, "ragged_first")(values, indices, counts, x, dy)
    expected = run(reference.block_sparse_matmul, "ragged_first")(values, indices, counts, x, dy)
    for a, b in zip(found, expected):
        assert a.dtype == jnp.float64
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    half = run(block_sparse_matmul, "ragged_first", **WAYS["triton"])(
        *(v if v.dtype == jnp.int32 else v.astype(jnp.float16) for v in problem("ragged_first"))
    )
    for a, b in zip(half, expected):
        assert a.dtype == jnp.float16
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2)


def test_no_positions():
    values, indices, counts, _, _ = problem("ragged_last")
    assert block_sparse_matmul(values, indices, counts, jnp.zeros((0, 18))).shape == (0, 12)
    for implementation in ("tpu", "triton"):
        with pytest.raises(ValueError, match="x is empty"):
            block_sparse_matmul(
                values,
                indices,
                counts,
                jnp.zeros((0, 18)),
                implementation=implementation,
                interpret=True,
            )


V, I, X = jnp.ones((2, 1, 4, 3)), jnp.zeros((2, 1), jnp.int32), jnp.ones((5, 6))
KERNEL = {"implementation": "tpu", "interpret": True}
REFUSED = {
    "features": (
        (V, I, None, X),
        {"features": "middle"},
        "features is 'middle'; allowed are first",
    ),
    "dtype": ((V, I, None, X.astype(jnp.bfloat16)), {}, "values is float32 and x is bfloat16"),
    "int32": ((V.astype(int), I, None, X.astype(int)), {}, "of one floating dtype"),
    "values": (
        (V[0], I, None, X),
        {},
        r"values has shape \(1, 4, 3\); it must be \[r, s, bo, bk\]",
    ),
    "empty": ((V[:, :0], I[:, :0], None, X), {}, r"values has shape \(2, 0, 4, 3\)"),
    "float lists": ((V, I.astype(float), None, X), {}, "indices must be integers, not float32"),
    "lists": ((V, I.T, None, X), {}, r"indices has shape \(1, 2\); values ask for \(2, 1\)"),
    "float counts": ((V, I, jnp.ones(2), X), {}, "counts must be integers, not float32"),
    "counts": ((V, I, I, X), {}, r"counts has shape \(2, 1\); values ask for \(2,\)"),
    "x": (
        (V, I, None, X[:, :5]),
        {},
        r"x has shape \(5, 5\); with features 'last' its axis -1 must be a multiple of bk = 3",
    ),
    "x first": (
        (V, I, None, X),
        {"features": "first"},
        r"x has shape \(5, 6\); with features 'first' its axis -2 must be a multiple of bk = 3",
    ),
    "vector first": ((V, I, None, X[0]), {"features": "first"}, r"x has shape \(6,\)"),
    "implementation": (
        (V, I, None, X),
        {"implementation": "tpu"},
        "implementation 'tpu' cannot run here: it is for tpu, this is cpu",
    ),
    "small blocks": ((V, I, None, X), KERNEL, "blocks are 4 x 3, with features last multiples of"),
    "float16": (
        (V.astype(jnp.float16), I, None, X.astype(jnp.float16)),
        KERNEL,
        "x is float16, it takes float32, bfloat16",
    ),
    "long lists": (
        (jnp.ones((1, 2**14 + 1, 1, 1)), jnp.zeros((1, 2**14 + 1), jnp.int32), None, X),
        KERNEL,
        "the lists have 16385 entries, 16384 fit",
    ),
    "blocks": (
        (V, I, None, X),
        {"blocks": tpu.Blocks(8, 2**20)},
        "it is not of the implementation 'xla'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_refused_by_name(unchecked, case):
    given, options, message = REFUSED[case]
    types = ("dtype", "int32", "float lists", "float counts")
    with pytest.raises(TypeError if case in types else ValueError, match=message):
        block_sparse_matmul(*given, **options)


def test_what_does_not_fit_on_chip_or_into_offsets_is_refused():
    def shapes(implementation, values, x):
        op = functools.partial(
            block_sparse_matmul, features="first", implementation=implementation, interpret=True
        )
        values, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (values, x))
        indices = jax.ShapeDtypeStruct(values.shape[:2], jnp.int32)
        return jax.eval_shape(lambda values, at, x: op(values, at, None, x), values, indices, x)

    with pytest.raises(ValueError, match="blocks of 2048 x 2048 do not fit into 12 MiB"):
        shapes("tpu", (1, 1, 2048, 2048), (1, 2048, 128))
    with pytest.raises(ValueError, match=r"x has 2147483648 entries, offsets reach 2147483647; y"):
        shapes("triton", (1, 1, 16, 16), (1, 16, 2**27))
    with pytest.raises(ValueError, match=r"values has 4294967296 entries, offsets reach"):
        shapes("triton", (2**12, 1, 2**10, 2**10), (1, 2**10, 1))
    with pytest.raises(ValueError, match="a grid has 65535 programs along an axis"):
        shapes("triton", (1, 1, 16, 16), (2**16, 16, 1))
