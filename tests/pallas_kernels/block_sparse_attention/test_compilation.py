"""Block-sparse attention for devices that are not there: always lowered, compiled with `-m aot`."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.block_sparse_attention import KVSource, block_sparse_attention, tpu
from pallas_kernels.block_sparse_attention.shapes import RAGGED, SHAPES

KERNELS = {"v5e": "tpu", "v6e": "tpu", "A100": "triton", "H200": "triton"}
MADE = {"tpu": "tpu_custom_call", "triton": "triton"}
PASSES = ("_forward", "_query", "_key")
COMPILED = ("prefill_8k", "decode_pages", "fine")


def arrays(shape, dtype, *, extras=False):
    """Shapes of the arguments; extras: a log weight, positions and tile masks."""
    tiles = -(-shape.queries // shape.block_q)

    def made(*size, dtype=dtype):
        return jax.ShapeDtypeStruct(size, dtype)

    keys = made(shape.key_heads, shape.keys, shape.width)
    lists = made(shape.key_heads, tiles, shape.slots, dtype=jnp.int32)
    source = KVSource(
        keys, keys, lists, made(*lists.shape[:2], dtype=jnp.int32), width=shape.block_k
    )
    if extras:
        source = dataclasses.replace(
            source,
            log_weight=made(*keys.shape[:2], dtype=jnp.float32),
            kv_pos=made(*keys.shape[:2], dtype=jnp.int32),
            tile_mask=lists,
            masks=made(2, shape.block_q, shape.block_k, dtype=bool),
        )
    return made(shape.heads, shape.queries, shape.width), source


def both_passes(shape, implementation, *, extras=False, blocks=None):
    """Outputs, and the gradients of all that has one."""

    def run(q, source):
        def op(q, k, v, log_weight):
            return block_sparse_attention(
                q,
                [dataclasses.replace(source, k=k, v=v, log_weight=log_weight)],
                block_q=shape.block_q,
                mask_mod=(lambda q, k: k <= q) if extras else None,
                implementation=implementation,
                blocks=blocks,
            )

        (out, lse), pull = jax.vjp(op, q, source.k, source.v, source.log_weight)
        return out, lse, pull((out, lse))

    return run


@pytest.mark.parametrize("name", ["ragged", "ragged_decode"])
@pytest.mark.parametrize("target", ["v5e", "H200"])
def test_all_passes_lower(lowered, target, name):
    shape = RAGGED[name]
    q, source = arrays(shape, jnp.bfloat16, extras=True)
    text = lowered(target, both_passes(shape, None, extras=True), q, source)
    # no implementation was named: the target's own kernels are chosen
    assert MADE[KERNELS[target]] in text
    wanted = PASSES if KERNELS[target] == "tpu" or shape.block_k >= 16 else PASSES[:1]
    for name in wanted:
        assert f"block_sparse_attention{name}" in text


@pytest.mark.parametrize("target", ["v5e", "H200"])
def test_a_vmapped_call_lowers(lowered, target):
    shape = RAGGED["ragged"]
    q, source = arrays(shape, jnp.float32)

    def twice(x):
        return jax.ShapeDtypeStruct((2, *x.shape), x.dtype)

    # with one set of lists: a TPU loops over batched ones, and jax 0.11 cannot lower that loop
    # under a mesh that is only described
    batch = dataclasses.replace(source, k=twice(source.k), v=twice(source.v))
    axes = dataclasses.replace(source, k=0, v=0, starts=None, counts=None)
    run = jax.vmap(both_passes(shape, KERNELS[target]), in_axes=(0, axes))
    assert MADE[KERNELS[target]] in lowered(target, run, twice(q), batch)


def test_what_a_kernel_cannot_take_falls_back_or_is_refused(lowered):
    shape = RAGGED["ragged"]
    q, source = arrays(shape, jnp.float32)
    loose = dataclasses.replace(source, aligned=False)
    assert "custom_call" not in lowered("v5e", both_passes(shape, None), q, loose)
    with pytest.raises(ValueError, match=r"'tpu' cannot run here: sources\[0\] is not aligned"):
        lowered("v5e", both_passes(shape, "tpu"), q, loose)
    assert "triton" in lowered("H200", both_passes(shape, None), q, loose)
    with pytest.raises(ValueError, match="'triton' cannot run here: it is for gpu, this is tpu"):
        lowered("v5e", both_passes(shape, "triton"), q, source)


def test_lists_of_many_heads_are_prefetched_in_parts(lowered, monkeypatch):
    shape = RAGGED["ragged"]
    q, source = arrays(shape, jnp.float32)
    # room for the lists of one head
    monkeypatch.setattr(tpu, "SCALARS", 16 * 4 * shape.slots)
    assert "while" in lowered("v5e", both_passes(shape, "tpu"), q, source)


@pytest.mark.aot
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", [*COMPILED, "ragged"])
@pytest.mark.parametrize("target", KERNELS)
def test_all_passes_compile(compiled, target, name, dtype):
    shape, extras = (SHAPES | RAGGED)[name], name == "ragged"
    q, source = arrays(shape, dtype, extras=extras)
    label = f"block_sparse_attention {name} {jnp.dtype(dtype).name}"
    run = both_passes(shape, KERNELS[target], extras=extras)
    made = compiled(target, run, q, source, label=label)
    if KERNELS[target] == "tpu":
        assert made.text.count("tpu_custom_call") >= 3
    else:
        used = {n: cell for n, cell in made.kernels.items() if "block_sparse_attention" in n}
        assert len(used) == 3
        assert not any(spilled for _, spilled in used.values()), used
