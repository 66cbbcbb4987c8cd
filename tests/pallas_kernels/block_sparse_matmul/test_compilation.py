"""Block-sparse matmul for devices that are not there: always lowered, compiled with `-m aot`."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.block_sparse_matmul import block_sparse_matmul, tpu
from pallas_kernels.block_sparse_matmul.shapes import RAGGED, SHAPES

KERNELS = {"v5e": "tpu", "v6e": "tpu", "A100": "triton", "H200": "triton"}
MADE = {"tpu": "tpu_custom_call", "triton": "triton"}
PASSES = ("forward", "dx", "dvalues")
COMPILED = ("512_at_14x14_in_tiles", "512_at_14x14", "llama_7b_ffn", "ragged_tiles")


def problem(shape, dtype, implementation, *, vmapped=False, blocks=None):
    """Forward and backward pass of a named shape, and its arguments."""
    listed = (shape.rows, shape.stored)
    values = jax.ShapeDtypeStruct((*listed, *shape.block), dtype)
    indices = jax.ShapeDtypeStruct(listed, jnp.int32)
    counts = jax.ShapeDtypeStruct(listed[:1], jnp.int32)
    x = jax.ShapeDtypeStruct((2, *shape.x) if vmapped else shape.x, dtype)
    op = functools.partial(
        block_sparse_matmul, features=shape.features, implementation=implementation, blocks=blocks
    )

    def both(values, indices, counts, x):
        def one(values, x):
            return op(values, indices, counts, x)

        y, pull = jax.vjp(jax.vmap(one, in_axes=(None, 0)) if vmapped else one, values, x)
        return y, pull(y)

    return both, (values, indices, counts, x)


@pytest.mark.parametrize("name", ["llama_7b_ffn", "512_at_14x14_in_tiles", "ragged_tiles"])
@pytest.mark.parametrize("target", ["v5e", "H200"])
def test_both_passes_lower(lowered, target, name):
    both, args = problem((SHAPES | RAGGED)[name], jnp.bfloat16, None)
    text = lowered(target, both, *args)
    # no implementation was named: the target's own kernel is chosen
    assert MADE[KERNELS[target]] in text
    for kernel in PASSES:
        assert f"block_sparse_matmul_{kernel}" in text


@pytest.mark.parametrize("target", ["v5e", "H200"])
def test_a_vmapped_op_lowers(lowered, target):
    both, args = problem(RAGGED["ragged_tiles"], jnp.float32, KERNELS[target], vmapped=True)
    assert MADE[KERNELS[target]] in lowered(target, both, *args)


def test_what_a_kernel_cannot_take_falls_back_or_is_refused(lowered):
    shape = SHAPES["512_at_14x14"]
    both, args = problem(shape, jnp.float32, None)
    assert "custom_call" not in lowered("v5e", both, *args)
    assert "block_sparse_matmul_forward" in lowered("H200", both, *args)
    both, args = problem(shape, jnp.float32, "tpu")
    with pytest.raises(ValueError, match="'tpu' cannot run here: blocks are 32 x 1, with features"):
        lowered("v5e", both, *args)
    both, args = problem(shape, jnp.float32, "triton")
    with pytest.raises(ValueError, match="'triton' cannot run here: it is for gpu, this is tpu"):
        lowered("v5e", both, *args)


@pytest.mark.aot
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("target", KERNELS)
def test_both_passes_compile(compiled, target, name, dtype):
    shape = (SHAPES | RAGGED)[name]
    if KERNELS[target] == "tpu" and shape.block[1] == 1:
        pytest.skip("single inputs run as plain XLA on TPU")
    both, args = problem(shape, dtype, KERNELS[target])
    label = f"block_sparse_matmul {name} {jnp.dtype(dtype).name}"
    made = compiled(target, both, *args, label=label)
    if KERNELS[target] == "tpu":
        assert made.text.count("tpu_custom_call") >= len(PASSES)
    else:
        used = {n: cell for n, cell in made.kernels.items() if "block_sparse_matmul" in n}
        assert len(used) == len(PASSES)
        assert all(registers <= 255 for registers, _ in used.values())
        assert not any(spilled for _, spilled in used.values()), used


@pytest.mark.aot
def test_too_much_memory_is_rejected(compiled):
    # shows that the compiler does count: less than what the tiles need
    shape = SHAPES["llama_7b_ffn"]
    both, args = problem(shape, jnp.float32, "tpu", blocks=tpu.Blocks(1024, 2**20))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?i)vmem|RESOURCE_EXHAUSTED"):
        compiled("v5e", both, *args, label="too large")
