"""A chunk of tokens through the listed experts as a Mosaic kernel: one expert a grid step.

The list is prefetched, so that the weights of the next expert are on their way while one is used.
What lies beyond its length repeats the last expert: no further weights are read.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import not_of_dtype, not_on
from pallas_kernels.sparse_ffn.weights import active, widen

DTYPES = ("float32", "bfloat16", "uint16")
VMEM = 12 * 2**20
"""Bytes that every generation has on chip."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut up: by expert.

    Attributes:
      vmem_bytes: what the kernel may use on chip.
    """

    vmem_bytes: int


def reasons(x: Array, up: Array, idx: Array, *, interpret: Any = False) -> list[str]:
    """Why the kernel cannot run on wide `x [n, d]` and `up [e, k, d]`."""
    found = not_on("tpu", interpret=interpret) + not_of_dtype(up.dtype, DTYPES, of="up")
    found += not_of_dtype(x.dtype, ("float32",), of="wide x")
    if up.size == 0 or idx.size == 0 or x.size == 0:
        found.append("there is nothing to compute")
    needed = _bytes(x, up)
    if needed > VMEM:
        found.append(f"a step takes {needed} bytes on chip, {VMEM} are there")
    return found


def forward(
    x: Array,
    gates: Array,
    up: Array,
    down: Array,
    idx: Array,
    count: Array,
    activation: Callable[[Array], Array],
    *,
    blocks: Blocks | None,
    interpret: Any,
) -> Array:
    """`[n, d]` tokens and `[n, e]` gates to `[n, d]`."""
    blocks = blocks or Blocks(VMEM)
    last = jnp.where(count > 0, idx[jnp.maximum(count - 1, 0)], 0)
    idx = jnp.where(active(idx, count), idx, last)
    columns = jnp.take(gates, idx, axis=1).T[:, :, None]  # a column of gates an entry
    tokens = pl.BlockSpec(x.shape, lambda j, *_: (0, 0))
    expert = pl.BlockSpec((1, *up.shape[1:]), lambda j, idx_ref, _: (idx_ref[j], 0, 0))
    return pl.pallas_call(
        functools.partial(_kernel, activation=activation),
        name="sparse_ffn_experts",
        out_shape=jax.ShapeDtypeStruct(x.shape, jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(idx.shape[0],),
            in_specs=[
                tokens,
                pl.BlockSpec((1, x.shape[0], 1), lambda j, *_: (j, 0, 0)),
                expert,
                expert,
            ],
            out_specs=tokens,
        ),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=blocks.vmem_bytes),
        interpret=interpret,
    )(idx, count[None], x, columns, up, down)


def _kernel(
    _: Any,
    count_ref: Any,
    x_ref: Any,
    gate_ref: Any,
    up_ref: Any,
    down_ref: Any,
    y_ref: Any,
    *,
    activation: Callable[[Array], Array],
) -> None:
    step = pl.program_id(0)

    @pl.when(step == 0)
    def _() -> None:
        y_ref[...] = jnp.zeros_like(y_ref)

    @pl.when(step < count_ref[0])
    def _() -> None:
        exact = functools.partial(
            lax.dot_general, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
        up, down = widen(up_ref[0], jnp.float32), widen(down_ref[0], jnp.float32)
        hidden = activation(exact(x_ref[...], up, (((1,), (1,)), ((), ()))))
        y_ref[...] += exact(gate_ref[0] * hidden, down, (((1,), (0,)), ((), ())))


def _bytes(x: Array, up: Array) -> int:
    """Two blocks of every operand, and both weights in float32."""
    (n, d), k = x.shape, up.shape[1]
    return 2 * (2 * k * d * up.dtype.itemsize + 2 * n * d * 4 + n * 128 * 4) + 2 * k * d * 4
