"""Block-sparse attention: the definition in NumPy, every implementation against it, its edges."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from pallas_kernels.block_sparse_attention import (
    KVSource,
    block_sparse_attention,
    reference,
    triton,
)
from pallas_kernels.block_sparse_attention.shapes import RAGGED, random_source

SHAPE = RAGGED["ragged"]
WAYS = {
    "xla": {"implementation": "xla"},
    "tpu": {"implementation": "tpu", "interpret": True},
    "triton": {"implementation": "triton", "interpret": True},
    # products of listed tokens that are no whole tiles, and several pieces of a tile of rows
    "triton, pieces": {
        "implementation": "triton",
        "interpret": True,
        "blocks": triton.Blocks(16, 16, 1, 1),
    },
}


def causal(q, k):
    return k <= q + 20


def problem(dtype=jnp.float32, shape=SHAPE, seed=0):
    """Queries and two sources: one with log weights, one with tile masks, head 0 masked whole."""
    q, first = random_source(shape, seed, dtype)
    _, second = random_source(dataclasses.replace(shape, block_k=24, slots=2), seed + 1, dtype)
    rng = np.random.default_rng(seed)
    size = first.k.shape[:2]
    first = dataclasses.replace(
        first,
        log_weight=jnp.asarray(rng.normal(size=size), dtype),
        counts=first.counts.at[0].set(0),
    )
    tile_mask = rng.integers(-1, 3, second.starts.shape)
    masks = rng.random((3, shape.block_q, 24)) < 0.6
    masks[2] = False
    second = dataclasses.replace(
        second,
        tile_mask=jnp.asarray(tile_mask, jnp.int32).at[0].set(2),
        masks=jnp.asarray(masks),
        kv_pos=jnp.asarray(rng.integers(0, shape.keys, size), jnp.int32),
    )
    return q, [first, second]


def with_gradients(op, *, block_q=SHAPE.block_q, mask_mod=causal, **options):
    """`(q, sources) -> out, lse` and the gradients of all that has one, compiled."""

    def run(q, sources):
        def call(q, floats):
            now = [
                dataclasses.replace(s, k=k, v=v, log_weight=w)
                for s, (k, v, w) in zip(sources, floats)
            ]
            return op(q, now, block_q=block_q, mask_mod=mask_mod, **options)

        floats = [(s.k, s.v, s.log_weight) for s in sources]
        (out, lse), pull = jax.vjp(call, q, floats)
        up = [
            jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape).astype(x.dtype)
            for x in (out, lse)
        ]
        return {"out": out, "lse": lse, "gradients": pull(tuple(up))}

    return jax.jit(run)


@functools.cache
def defined(dtype):
    return with_gradients(reference.block_sparse_attention)(*problem(dtype))


def compare(found, expected, rtol=1e-5, atol=1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=str(path))


def in_numpy(q, sources, block_q, scale, mask_mod):
    """The definition once more, entry by entry."""
    heads, queries, _ = q.shape
    out = np.zeros((heads, queries, sources[0].v.shape[2]))
    lse = np.full((heads, queries), -np.inf)
    for h in range(heads):
        for i in range(queries):
            logits, values = [], []
            for s in sources:
                head = h * s.k.shape[0] // heads
                row, t = h * s.starts.shape[0] // heads, i // block_q
                for slot in range(s.counts[row, t]):
                    for j in range(s.width):
                        e = int(s.starts[row, t, slot]) + j
                        if e >= s.k.shape[1]:
                            continue
                        cut = -1 if s.tile_mask is None else int(s.tile_mask[row, t, slot])
                        if cut >= 0 and not s.masks[cut, i % block_q, j]:
                            continue
                        if not mask_mod(i, e if s.kv_pos is None else int(s.kv_pos[head, e])):
                            continue
                        weight = 0 if s.log_weight is None else s.log_weight[head, e]
                        logits.append(float(np.dot(q[h, i], s.k[head, e])) * scale + float(weight))
                        values.append(np.asarray(s.v[head, e]))
            if logits:
                lse[h, i] = np.logaddexp.reduce(logits)
                out[h, i] = np.exp(np.asarray(logits) - lse[h, i]) @ np.stack(values)
    return out, lse


def test_the_definition_is_that_of_numpy_in_double_precision(x64):
    q, sources = problem(jnp.float64)
    out, lse = reference.block_sparse_attention(
        q, sources, block_q=SHAPE.block_q, scale=0.3, mask_mod=causal
    )
    host = [jax.tree.map(np.asarray, s) for s in sources]
    expected = in_numpy(np.asarray(q), host, SHAPE.block_q, 0.3, causal)
    np.testing.assert_allclose(out, expected[0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(lse, expected[1], rtol=1e-12)
    assert np.isneginf(lse[0]).all()  # a head that is masked whole
    assert np.isfinite(lse[2:]).mean() > 0.5


@pytest.mark.parametrize(
    ("way", "dtype"),
    [(way, jnp.float32) for way in WAYS]
    + [(way, jnp.bfloat16) for way in ("xla", "tpu", "triton")],
)
def test_values_and_gradients_are_those_of_the_definition(way, dtype):
    found = with_gradients(block_sparse_attention, **WAYS[way])(*problem(dtype))
    loose = {"rtol": 3e-2, "atol": 3e-2} if dtype == jnp.bfloat16 else {}
    compare(found, defined(dtype), **loose)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_gpu_computes_the_definition(dtype):
    if jax.default_backend() != "gpu":
        pytest.skip(f"no GPU: the platform is {jax.default_backend()}")
    run = with_gradients(block_sparse_attention, implementation="triton")
    loose = {"rtol": 3e-2, "atol": 3e-2} if dtype == jnp.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    compare(run(*problem(dtype)), defined(dtype), **loose)


def test_double_precision_is_kept(x64):
    q, sources = problem(jnp.float64)
    found = with_gradients(block_sparse_attention)(q, sources)
    expected = with_gradients(reference.block_sparse_attention)(q, sources)
    compare(found, expected, rtol=1e-11, atol=1e-11)


def test_gradients_are_those_of_finite_differences(x64):
    shape = dataclasses.replace(SHAPE, queries=5, keys=9, width=3, block_q=2, block_k=4, slots=2)
    q, source = random_source(shape, 3, jnp.float64)
    weight = jnp.asarray(np.random.default_rng(0).normal(size=source.k.shape[:2]))
    seen = source.counts.at[:].set(2)

    @jax.jit
    def f(q, k, v, w):
        now = dataclasses.replace(source, k=k, v=v, log_weight=w, counts=seen)
        out, lse = block_sparse_attention(q, [now], block_q=2)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    check_grads(f, (q, source.k, source.v, weight), order=1, modes=["rev"], rtol=1e-6)


@pytest.mark.parametrize("way", ["xla", "triton"])
def test_columns_and_ranges_that_begin_anywhere(way):
    q, source = random_source(SHAPE, 5)
    rng = np.random.default_rng(5)
    tiles = source.starts.shape[1]
    columns = np.stack([rng.choice(SHAPE.keys, 5, replace=False) for _ in range(tiles)])
    ranges = np.stack([rng.choice(6, 3, replace=False) * 14 + 3 for _ in range(tiles)])
    sources = [
        dataclasses.replace(
            source,
            starts=jnp.asarray(columns[None], jnp.int32),
            counts=jnp.full((1, tiles), 4, jnp.int32),
            width=1,
        ),
        # the last range runs past the keys, the one after begins beyond them
        dataclasses.replace(
            source,
            starts=jnp.asarray(ranges[None] + 1, jnp.int32).at[0, 0, 1].set(SHAPE.keys + 7),
            counts=jnp.full((1, tiles), 3, jnp.int32),
            width=13,
            aligned=False,
        ),
    ]
    found = with_gradients(block_sparse_attention, **WAYS[way])(q, sources)
    compare(found, with_gradients(reference.block_sparse_attention)(q, sources))


@pytest.mark.parametrize("way", ["xla", "tpu", "triton"])
def test_decoding_one_query_over_pages(way):
    shape = RAGGED["ragged_decode"]
    q, source = random_source(shape, 2)
    # the last page is not full, the cache beyond 40 tokens not written
    position = jnp.where(jnp.arange(shape.keys) < 40, jnp.arange(shape.keys), 2**31 - 1)
    source = dataclasses.replace(
        source,
        counts=jnp.array([[3], [2]]),
        kv_pos=jnp.broadcast_to(position, source.k.shape[:2]).astype(jnp.int32),
    )
    options = {"block_q": 1, "mask_mod": lambda q, k: k <= q, "q_pos": jnp.array([39])}
    found = with_gradients(block_sparse_attention, **options, **WAYS[way])(q, [source])
    compare(found, with_gradients(reference.block_sparse_attention, **options)(q, [source]))


@pytest.mark.parametrize("way", ["xla", "tpu", "triton"])
def test_lists_for_every_query_head_beside_lists_for_all(way):
    q, source = random_source(SHAPE, 4)
    own = dataclasses.replace(SHAPE, key_heads=SHAPE.heads)
    _, lists = random_source(own, 6)
    shared = dataclasses.replace(source, starts=source.starts[:1], counts=source.counts[:1])
    sources = [dataclasses.replace(source, starts=lists.starts, counts=lists.counts), shared]
    found = with_gradients(block_sparse_attention, mask_mod=None, **WAYS[way])(q, sources)
    defined = with_gradients(reference.block_sparse_attention, mask_mod=None)(q, sources)
    compare(found, defined)


@pytest.mark.parametrize("way", ["xla", "tpu", "triton"])
def test_a_batch_by_vmap(way):
    problems = [problem(seed=seed) for seed in (0, 7)]
    q, sources = jax.tree.map(lambda *x: jnp.stack(x), *problems)
    found = jax.vmap(with_gradients(block_sparse_attention, **WAYS[way]))(q, sources)
    for i, one in enumerate(problems):
        expected = with_gradients(reference.block_sparse_attention)(*one)
        compare(jax.tree.map(lambda x, i=i: x[i], found), expected)


def test_a_tpu_simulator_finds_no_race_and_nothing_unwritten(tpu_simulator):
    shape = dataclasses.replace(SHAPE, queries=20, keys=40, heads=2, key_heads=1, slots=2)
    q, source = random_source(shape, 1)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=source.k.shape[:2]), jnp.float32)
    # the first query tile lists nothing, and what lies in its slots must not be followed
    starts = source.starts.at[:, 0].set(-1000)
    sources = [dataclasses.replace(source, log_weight=weight, starts=starts)]
    options = {"implementation": "tpu", "interpret": tpu_simulator}
    found = with_gradients(block_sparse_attention, **options)(q, sources)
    compare(found, with_gradients(reference.block_sparse_attention)(q, sources))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_the_order_of_slots_and_the_split_into_sources_do_not_matter(seed):
    q, source = random_source(SHAPE, 9, full=True)
    order = np.random.default_rng(seed).permutation(SHAPE.slots)
    mixed = dataclasses.replace(source, starts=source.starts[..., order])
    one = dataclasses.replace(source, counts=jnp.full_like(source.counts, 1))
    rest = dataclasses.replace(
        source,
        starts=jnp.roll(source.starts, -1, axis=-1),
        counts=jnp.full_like(source.counts, SHAPE.slots - 1),
    )
    out, lse = call(q, (source,))
    for sources in ((mixed,), (one, rest)):
        found = call(q, sources)
        np.testing.assert_allclose(found[0], out, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[1], lse, rtol=1e-5, atol=1e-5)


@jax.jit
def call(q, sources):
    return block_sparse_attention(q, sources, block_q=SHAPE.block_q)


def test_over_heads_on_a_mesh(mesh):
    shape = dataclasses.replace(SHAPE, heads=8, key_heads=4)
    q, source = random_source(shape, 8)
    heads = jax.NamedSharding(mesh, jax.P("data"))
    run = with_gradients(block_sparse_attention)
    spread = run(jax.device_put(q, heads), jax.device_put([source], heads))
    compare(spread, run(q, [source]))


def test_memory_grows_with_the_keys_alone():
    def temporary(tokens):
        shape = dataclasses.replace(SHAPE, queries=tokens, keys=tokens, heads=1, key_heads=1)
        arguments = jax.eval_shape(lambda: random_source(shape))
        run = with_gradients(block_sparse_attention, mask_mod=None)
        compiled = run.lower(arguments[0], [arguments[1]]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 3 * temporary(2048)
    assert temporary(4096) < 4096 * 4096


SOURCE = random_source(SHAPE)[1]
Q = random_source(SHAPE)[0]


@pytest.mark.parametrize(
    ("q", "changes", "options", "error"),
    [
        (Q[0], {}, {}, r"q has shape \(50, 16\); it must be \[heads, queries, width\]"),
        (Q.astype(jnp.int32), {}, {}, "q must be floating point, not int32"),
        (Q, {"k": SOURCE.k.astype(jnp.bfloat16)}, {}, r"sources\[0\].k is bfloat16; it must be fl"),
        (Q, {"k": SOURCE.k[..., :3]}, {}, r"sources\[0\].k has shape .* with q .* \[Hk, Lk, 16\]"),
        (Q, {"v": SOURCE.v[:, :3]}, {}, r"sources\[0\].v has shape .* must be \[2, 75, 16\]"),
        (Q, {"starts": SOURCE.starts[:, :2]}, {}, r"starts has shape .*; it must be \[Hs, 4, S\]"),
        (Q, {"starts": SOURCE.starts[..., :0]}, {}, r"starts has no slot; give one and a count"),
        (Q, {"starts": SOURCE.starts * 1.0}, {}, r"starts must be integers, not float32"),
        (Q, {"counts": SOURCE.counts[:1]}, {}, r"counts has shape \(1, 4\); it must be \(2, 4\)"),
        (Q, {"log_weight": jnp.ones((2, 3))}, {}, r"log_weight has shape .* must be \(2, 75\)"),
        (Q, {"tile_mask": SOURCE.starts}, {}, "one of tile_mask and masks; give both or none"),
        (
            Q,
            {"tile_mask": SOURCE.starts, "masks": jnp.ones((1, 2, 3), bool)},
            {},
            r"masks has shape \(1, 2, 3\); it must be \[P, 16, 16\]",
        ),
        (Q, {"width": 0}, {}, r"sources\[0\].width is 0; it must be at least 1"),
        (Q, {}, {"block_q": 0}, "block_q is 0; it must be at least 1"),
        (Q, {}, {"q_pos": jnp.arange(3)}, r"q_pos has shape \(3,\); it must be \(50,\)"),
        (Q, {}, {"implementation": "fast"}, "implementation is 'fast'; allowed are"),
        (Q, {}, {"implementation": "tpu"}, "'tpu' cannot run here: it is for tpu, this is cpu"),
        (Q, {}, {"blocks": triton.Blocks()}, "it is not of the implementation 'xla'"),
    ],
)
def test_bad_input_is_named(unchecked, q, changes, options, error):
    options = {"block_q": SHAPE.block_q} | options
    with pytest.raises((ValueError, TypeError), match=error):
        block_sparse_attention(q, [dataclasses.replace(SOURCE, **changes)], **options)


def test_no_source_is_refused():
    with pytest.raises(ValueError, match="sources is empty"):
        block_sparse_attention(Q, [], block_q=16)


def test_a_kernel_says_all_that_it_cannot_take():
    source = dataclasses.replace(SOURCE, width=12, aligned=False)
    with pytest.raises(
        ValueError, match=r"\[0\] is not aligned; sources\[0\] has tiles of 12 keys"
    ):
        block_sparse_attention(Q, [source], block_q=16, implementation="tpu", interpret=True)
    wide = dataclasses.replace(SOURCE, starts=SOURCE.starts[..., :1], width=2**16)
    with pytest.raises(ValueError, match=r"of 32 rows and 65536 keys takes \d+ MiB, 12 fit"):
        block_sparse_attention(Q, [wide], block_q=16, implementation="tpu", interpret=True)
    half = jax.tree.map(lambda x: x.astype(jnp.float16) if x.dtype == jnp.float32 else x, SOURCE)
    with pytest.raises(ValueError, match="q is float16, it takes float32, bfloat16"):
        block_sparse_attention(
            Q.astype(jnp.float16), [half], block_q=16, implementation="tpu", interpret=True
        )


def test_keys_that_are_shorter_than_a_tile():
    source = KVSource(
        SOURCE.k[:, :5],
        SOURCE.v[:, :5],
        jnp.zeros((1, 4, 1), jnp.int32),
        jnp.ones((1, 4), jnp.int32),
        width=16,
    )
    found = with_gradients(block_sparse_attention)(Q, [source])
    compare(found, with_gradients(reference.block_sparse_attention)(Q, [source]))
