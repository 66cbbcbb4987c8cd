"""Statistical top-k for devices that are not there: always lowered, compiled with `-m aot`."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import statistical_topk
from pallas_kernels.statistical_topk import tpu
from pallas_kernels.statistical_topk.shapes import RAGGED, SHAPES

KERNELS = {"v5e": "tpu", "v6e": "tpu", "A100": "triton", "H200": "triton"}
MADE = {"tpu": "tpu_custom_call", "triton": "triton"}
COMPILED = ("spark_gemma2_2b_ffn", "spark_gemma2_2b_attention_8k", "wide", "ragged_masked")


def problem(shape, dtype, implementation, *, vmapped=False, blocks=None):
    """Forward and backward pass of a named shape, and its arguments."""
    x = jax.ShapeDtypeStruct((shape.rows, shape.width), dtype)
    where = jax.ShapeDtypeStruct(x.shape, bool) if shape.masked else None

    def both(x, where, dy):
        def op(x):
            return statistical_topk(
                x, shape.k, where=where, implementation=implementation, blocks=blocks
            )

        y, pull = jax.vjp(jax.vmap(op) if vmapped else op, x)
        return y, pull(dy)[0]

    return both, (x, where, x)


@pytest.mark.parametrize("name", ["wide", "spark_gemma2_2b_attention_8k", "ragged_short"])
@pytest.mark.parametrize("target", ["v5e", "H200"])
def test_both_passes_lower(lowered, target, name):
    both, args = problem((SHAPES | RAGGED)[name], jnp.bfloat16, None)
    text = lowered(target, both, *args)
    # no implementation was named: the target's own kernel is chosen
    assert text.count("custom_call") >= 2
    assert MADE[KERNELS[target]] in text
    assert "statistical_topk_forward" in text
    assert "statistical_topk_backward" in text


@pytest.mark.parametrize("target", ["v5e", "H200"])
def test_a_vmapped_op_lowers(lowered, target):
    both, args = problem(RAGGED["ragged_rows"], jnp.float32, KERNELS[target], vmapped=True)
    assert MADE[KERNELS[target]] in lowered(target, both, *args)


def test_what_a_kernel_cannot_take_falls_back_or_is_refused(lowered):
    def longest(x, implementation):
        return statistical_topk(x, 2**18, implementation=implementation)

    x = jax.ShapeDtypeStruct((8, 2**20), jnp.float32)
    assert "custom_call" not in lowered("v5e", lambda x: longest(x, None), x)
    with pytest.raises(ValueError, match=r"'tpu' cannot run here: rows have 1048576 entries, \d+"):
        lowered("v5e", lambda x: longest(x, "tpu"), x)
    with pytest.raises(ValueError, match="'triton' cannot run here: it is for gpu, this is tpu"):
        lowered("v5e", lambda x: longest(x, "triton"), x)


@pytest.mark.aot
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("target", KERNELS)
def test_both_passes_compile(compiled, target, name, dtype):
    shape = (SHAPES | RAGGED)[name]
    both, args = problem(shape, dtype, KERNELS[target])
    made = compiled(target, both, *args, label=f"statistical_topk {name} {jnp.dtype(dtype).name}")
    if KERNELS[target] == "tpu":
        assert made.text.count("tpu_custom_call") >= 2
    else:
        used = {name: cell for name, cell in made.kernels.items() if "statistical_topk" in name}
        assert len(used) == 2
        assert all(registers <= 255 for registers, _ in used.values())
        assert not any(spilled for _, spilled in used.values()), used


@pytest.mark.aot
def test_too_much_memory_is_rejected(compiled):
    # shows that the compiler does count: half of what one block needs
    shape = SHAPES["wide"]
    both, args = problem(shape, jnp.float32, "tpu", blocks=tpu.Blocks(8, 2 * 2**20))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?i)vmem|RESOURCE_EXHAUSTED"):
        compiled("v5e", both, *args, label="too large")
