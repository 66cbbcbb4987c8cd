"""The ops for devices that are not there: always lowered, compiled with `-m aot`."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.sparse_ffn import expert_union_ffn, gather_rows_matvec, sparse_ffn
from pallas_kernels.sparse_ffn.experts import tpu
from pallas_kernels.sparse_ffn.shapes import EXPERTS, RAGGED, RAGGED_EXPERTS, SHAPES

KERNELS = {"v5e": "tpu", "v6e": "tpu", "A100": "triton", "H200": "triton"}
MADE = {"tpu": "tpu_custom_call", "triton": "triton"}
DTYPES = (jnp.float32, jnp.bfloat16, jnp.uint16)


def array(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def layer(shape, dtype, **options):
    """A layer with known gates, its gradients, and the arguments."""
    up, down = ((shape.neurons, width) for width in (shape.inputs, shape.outputs))
    args = (array((shape.inputs,)), array((shape.capacity,)), array(up, dtype), array(down, dtype))
    lists = array((shape.capacity,), jnp.int32), array((), jnp.int32)

    def both(x, gate, up, down, idx, count):
        def op(x, gate):
            return sparse_ffn(x, up, down, idx, count, gate=gate, **options)

        y, pull = jax.vjp(op, x, gate)
        return y, pull(y)

    return both, (*args, *lists)


def union(shape, dtype, **options):
    """A chunk through its union of experts, and the arguments."""
    weights = array((shape.experts, shape.size, shape.width), dtype)
    args = (
        array((shape.tokens, shape.width)),
        array((shape.tokens, shape.experts)),
        weights,
        weights,
        array((shape.experts,), jnp.int32),
        array((), jnp.int32),
    )
    return lambda *arrays: expert_union_ffn(*arrays, **options), args


@pytest.mark.parametrize("name", ["spark_gemma2_2b", "ragged"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.uint16])
@pytest.mark.parametrize("target", ["v5e", "H200"])
def test_a_layer_and_its_gradients_lower(lowered, target, dtype, name):
    both, args = layer((SHAPES | RAGGED)[name], dtype)
    text = lowered(target, both, *args)
    # no implementation was named: the target's own kernel is chosen
    assert MADE[KERNELS[target]] in text
    assert "sparse_ffn_matvec" in text
    assert "sparse_ffn_vecmat" in text


@pytest.mark.parametrize("name", ["blockffn_2.8b_chunk", "ragged"])
@pytest.mark.parametrize("target", ["v5e", "H200"])
def test_a_union_of_experts_lowers(lowered, target, name):
    op, args = union((EXPERTS | RAGGED_EXPERTS)[name], jnp.bfloat16)
    text = lowered(target, op, *args)
    assert MADE[KERNELS[target]] in text
    assert "sparse_ffn_experts" in text


@pytest.mark.parametrize("target", ["v5e", "H200"])
def test_vmapped_tokens_lower(lowered, target):
    both, args = layer(RAGGED["ragged"], jnp.float32)
    # a TPU prefetches lists: for lists of their own Pallas loops over the tokens, which jax 0.11
    # cannot trace under a described device
    lists = 0 if KERNELS[target] == "triton" else None
    axes = (0, 0, None, None, lists, lists)
    args = [v if axis is None else array((3, *v.shape), v.dtype) for v, axis in zip(args, axes)]
    assert MADE[KERNELS[target]] in lowered(target, jax.vmap(both, axes), *args)


def test_what_a_kernel_cannot_take_falls_back_or_is_refused(lowered):
    def product(w, idx, x, implementation=None):
        return gather_rows_matvec(w, idx, x, implementation=implementation)

    odd = array((7, 128), jnp.bfloat16), array((3,), jnp.int32), array((128,))
    assert "custom_call" not in lowered("v5e", product, *odd)
    with pytest.raises(ValueError, match=r"'tpu' cannot run here: w has 7 rows of 16-bit weights"):
        lowered("v5e", lambda *args: product(*args, "tpu"), *odd)
    with pytest.raises(ValueError, match=r"'triton' cannot run here: it is for gpu, this is tpu"):
        lowered("v5e", lambda *args: product(*args, "triton"), *odd)


@pytest.mark.aot
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["spark_gemma2_2b", "spark_small", "ragged"])
@pytest.mark.parametrize("target", KERNELS)
def test_a_layer_and_its_gradients_compile(compiled, target, name, dtype):
    both, args = layer((SHAPES | RAGGED)[name], dtype, implementation=KERNELS[target])
    made = compiled(target, both, *args, label=f"sparse_ffn {name} {jnp.dtype(dtype).name}")
    check(made, target, {"sparse_ffn_matvec", "sparse_ffn_vecmat"})


@pytest.mark.aot
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["blockffn_0.1b_token", "blockffn_2.8b_chunk", "ragged_wide"])
@pytest.mark.parametrize("target", KERNELS)
def test_a_union_of_experts_compiles(compiled, target, name, dtype):
    op, args = union((EXPERTS | RAGGED_EXPERTS)[name], dtype, implementation=KERNELS[target])
    made = compiled(target, op, *args, label=f"experts {name} {jnp.dtype(dtype).name}")
    check(made, target, {"sparse_ffn_experts_hidden", "sparse_ffn_experts_output"})


@pytest.mark.aot
def test_too_much_memory_is_rejected(compiled):
    # shows that the compiler does count: half of what the weights of one expert need
    blocks = tpu.Blocks(2 * 2**20)
    op, args = union(
        EXPERTS["blockffn_2.8b_chunk"], jnp.float32, implementation="tpu", blocks=blocks
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?i)vmem|RESOURCE_EXHAUSTED"):
        compiled("v5e", op, *args, label="too large")


def check(made, target, names):
    """What was compiled holds the kernels, and none of them spills."""
    if KERNELS[target] == "tpu":
        assert "tpu_custom_call" in made.text
        return
    used = {name: cell for name, cell in made.kernels.items() if "sparse_ffn" in name}
    assert all(any(name in found for found in used) for name in names), used
    assert all(registers <= 255 for registers, _ in used.values())
    assert not any(spilled for _, spilled in used.values()), used
