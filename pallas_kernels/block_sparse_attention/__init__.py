"""Block-sparse attention: a joint softmax over lists of key tiles, from one or many sources.

A rule of sparse attention only writes lists; this op computes with them. What belongs here: lists
and their checks, log weights, positions, tile masks, grouped queries, the merge of parts by their
log-sum-exp, and all gradients. What chooses the lists is above.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.block_sparse_attention import tpu, triton, xla
from pallas_kernels.block_sparse_attention.canonical import (
    Rule,
    Tiles,
    to_tiles,
    unfold,
)
from pallas_kernels.block_sparse_attention.sources import (
    KVSource,
    MaskMod,
    check_shapes,
    merge_lse,
    transpose_lists,
    validate_sources,
)

__all__ = [
    "Blocks",
    "KVSource",
    "MaskMod",
    "block_sparse_attention",
    "merge_lse",
    "transpose_lists",
    "validate_sources",
]

Blocks = tpu.Blocks | triton.Blocks
_IMPLEMENTATIONS: dict[str, Any] = {"tpu": tpu, "triton": triton, "xla": xla}


def block_sparse_attention(
    q: Float[Array, "hq lq d"],
    sources: Sequence[KVSource],
    *,
    block_q: int,
    scale: float | None = None,
    mask_mod: MaskMod | None = None,
    q_pos: Int[Array, "lq"] | None = None,
    implementation: dispatch.Implementation | None = None,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "hq lq dv"], Float[Array, "hq lq"]]:
    """Attention of every tile of `block_q` queries to the key tiles that its lists name.

        out_i = sum_e p_ie v_e,  p = softmax over e of  q_i . k_e * scale + log_weight_e

    over all listed entries e of all sources together. An entry counts where its slot is below the
    count, its token exists, its tile mask is True and `mask_mod(q_pos, kv_pos)` is True; a token
    that is listed twice counts twice. A row that sees nothing gives 0 and `lse = -inf`. Logits and
    sums are float32, or float64 for float64. Batches by `jax.vmap`.

    Gradients go to `q` and to `k`, `v` and `log_weight` of every source, from both outputs; lists
    and positions have none. Only reverse mode is defined.

    Args:
      q: queries. sources: see `KVSource`.
      block_q: queries of a tile; need not divide Lq.
      scale: of the products, by default `D ** -0.5`. Static.
      mask_mod: one function for all sources, elementwise in int32 positions. Static: it must not
        capture traced arrays. Causal attention is `lambda q, k: k <= q`.
      q_pos: positions of the queries, by default `0 .. Lq - 1`.
      implementation: "xla", "tpu" or "triton"; None takes the best that can run.
      blocks: of the named kernel; None chooses by device and shape.
      interpret: for tests: runs the named kernel on any device, as `pallas_call` takes it.

    Returns:
      `out`, in the dtype of the first source's `v`, and `lse`, the logarithm of the sum of the
      weights' exponentials, log weights included.

    Raises:
      TypeError: arrays that are not floating point, or lists that are not integers.
      ValueError: shapes that do not fit (the lists' contents are checked by `validate_sources`), an
        unknown implementation or one that cannot run here (with the reasons), blocks of another.

    >>> keys = jnp.ones((1, 4, 2))
    >>> lists = jnp.array([[[2], [0]]]), jnp.array([[1, 0]])
    >>> source = KVSource(keys, keys, *lists, width=2)
    >>> out, lse = block_sparse_attention(jnp.zeros((1, 4, 2)), [source], block_q=2)
    >>> out[0, :, 0], jnp.exp(lse[0])
    (Array([1., 1., 0., 0.], dtype=float32), Array([2., 2., 0., 0.], dtype=float32))
    """
    check_shapes(q, sources, block_q, q_pos)
    tiles = to_tiles(q, sources, block_q=block_q, mask_mod=mask_mod, q_pos=q_pos)
    against = {
        name: module.reasons(tiles, interpret=interpret)
        for name, module in _IMPLEMENTATIONS.items()
    }
    chosen = dispatch.choose(implementation, against, interpret=interpret)
    dispatch.check_blocks(blocks, chosen, _IMPLEMENTATIONS[chosen].Blocks)
    call = _Call(
        rule=Rule(q.shape[2] ** -0.5 if scale is None else scale, mask_mod),
        implementation=chosen,
        blocks=blocks,
        interpret=interpret,
    )
    found: tuple[Array, Array] = _apply(call, tiles)
    out, lse = found
    heads, queries, _ = q.shape
    return (
        unfold(out, heads, queries, block_q),
        unfold(lse[..., None], heads, queries, block_q)[..., 0],
    )


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static; `implementation` is the one that runs."""

    rule: Rule
    implementation: str
    blocks: Blocks | None
    interpret: Any

    @property
    def options(self) -> dict[str, Any]:
        return {"blocks": self.blocks, "interpret": self.interpret}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(call: _Call, tiles: Tiles) -> tuple[Array, Array]:
    return _IMPLEMENTATIONS[call.implementation].forward(tiles, call.rule, **call.options)


def _forward(call: _Call, tiles: Tiles) -> tuple[Any, Any]:
    found: tuple[Array, Array] = _apply(call, tiles)
    return found, (tiles, *found)


def _backward(call: _Call, residuals: Any, cotangents: Any) -> tuple[Tiles]:
    tiles, out, lse = residuals
    dout, dlse = cotangents
    delta = jnp.sum(out.astype(lse.dtype) * dout.astype(lse.dtype), axis=-1) - dlse
    # what no key contributes to has no gradient, whatever came from above
    delta = jnp.where(lse == -jnp.inf, 0, delta)
    run = _IMPLEMENTATIONS[call.implementation].backward
    found = run(tiles, call.rule, lse, dout, delta, **call.options)
    nothing = {"starts": None, "counts": None, "kv_pos": None, "tile_mask": None, "masks": None}
    sources = tuple(
        dataclasses.replace(source, k=dk, v=dv, log_weight=dw, **nothing)
        for source, (dk, dv, dw) in zip(tiles.sources, found.sources)
    )
    return (Tiles(found.q, None, sources),)


_apply.defvjp(_forward, _backward)
