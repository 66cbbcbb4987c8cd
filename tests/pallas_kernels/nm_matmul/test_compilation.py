"""Products with N:M weights for devices that are not there: lowered, compiled with `-m aot`."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.nm_matmul import nm_matmul, tpu
from pallas_kernels.nm_matmul.layout import Pattern
from pallas_kernels.nm_matmul.shapes import RAGGED, SHAPES

KERNELS = {"v5e": "tpu", "v6e": "tpu", "A100": "triton", "H200": "triton"}
MADE = {"tpu": "tpu_custom_call", "triton": "triton"}
COMPILED = ("llama_7b_attention_decode", "bdwp_vit_small_up", "vit_base_down", "ragged_1_16")


def problem(shape, dtype, implementation, *, vmapped=False, blocks=None):
    """Forward and backward pass of a named shape, and its arguments."""
    pattern = Pattern(shape.n, shape.m)
    stored = shape.inputs // shape.m * shape.n
    values = jax.ShapeDtypeStruct((stored, shape.outputs), dtype)
    packed = jax.ShapeDtypeStruct((pattern.packed_rows(stored), shape.outputs), jnp.uint8)
    x = jax.ShapeDtypeStruct((shape.rows, shape.inputs), dtype)
    dy = jax.ShapeDtypeStruct((shape.rows, shape.outputs), dtype)

    def both(x, values, packed, dy):
        def op(x, values):
            return nm_matmul(
                x,
                values,
                packed,
                n=shape.n,
                m=shape.m,
                implementation=implementation,
                blocks=blocks,
            )

        y, pull = jax.vjp(jax.vmap(op, (0, None)) if vmapped else op, x, values)
        return y, pull(dy)

    return both, (x, values, packed, dy)


@pytest.mark.parametrize("name", ["bdwp_vit_small_up", "llama_7b_up_decode", "ragged_2_4"])
@pytest.mark.parametrize("target", ["v5e", "H200"])
def test_both_passes_lower(lowered, target, name):
    both, args = problem((SHAPES | RAGGED)[name], jnp.bfloat16, None)
    text = lowered(target, both, *args)
    # no implementation was named: the target's own kernel is chosen
    assert text.count("custom_call") >= 2
    assert MADE[KERNELS[target]] in text
    assert "nm_matmul_transposed" in text


@pytest.mark.parametrize("target", ["v5e", "H200"])
def test_a_vmapped_op_lowers(lowered, target):
    both, args = problem(RAGGED["ragged_2_8"], jnp.float32, KERNELS[target], vmapped=True)
    assert MADE[KERNELS[target]] in lowered(target, both, *args)


def test_what_a_kernel_cannot_take_falls_back_or_is_refused(lowered):
    def product(implementation, m, target):
        def op(x, values, packed):
            return nm_matmul(x, values, packed, n=3, m=m, implementation=implementation)

        packed = jax.ShapeDtypeStruct((Pattern(3, m).packed_rows(24), 128), jnp.uint8)
        values = jax.ShapeDtypeStruct((24, 128), jnp.float32)
        return lowered(target, op, jax.ShapeDtypeStruct((2, 8 * m), jnp.float32), values, packed)

    assert "custom_call" not in product(None, 12, "H200")
    assert "custom_call" not in product(None, 32, "v5e")
    with pytest.raises(ValueError, match="cannot run here: m is 12, it takes powers of two from 2"):
        product("triton", 12, "H200")
    with pytest.raises(
        ValueError, match="positions of 3:32 fill bytes after 256 entries, it takes"
    ):
        product("tpu", 32, "v5e")
    with pytest.raises(ValueError, match="'triton' cannot run here: it is for gpu, this is tpu"):
        product("triton", 4, "v5e")


@pytest.mark.aot
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("target", KERNELS)
def test_both_passes_compile(compiled, target, name, dtype):
    shape = (SHAPES | RAGGED)[name]
    both, args = problem(shape, dtype, KERNELS[target])
    made = compiled(target, both, *args, label=f"nm_matmul {name} {jnp.dtype(dtype).name}")
    if KERNELS[target] == "tpu":
        assert made.text.count("tpu_custom_call") >= 2
    else:
        used = {name: cell for name, cell in made.kernels.items() if "nm_matmul" in name}
        assert len(used) == 2
        assert all(registers <= 255 for registers, _ in used.values())
        assert not any(spilled for _, spilled in used.values()), used


@pytest.mark.aot
def test_too_much_memory_is_rejected(compiled):
    # shows that the compiler does count: a tile of float32 alone takes 1 MiB
    shape = SHAPES["bdwp_vit_small_up"]
    both, args = problem(shape, jnp.float32, "tpu", blocks=tpu.Blocks(256, 256, 2**20))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?i)vmem|RESOURCE_EXHAUSTED"):
        compiled("v5e", both, *args, label="too large")
