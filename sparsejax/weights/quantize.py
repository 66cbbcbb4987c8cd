"""Symmetric round-to-nearest quantisation of weights, dense or N:M compact.

An int8 or int4 code times a scale, one scale for every output channel or for every group of
consecutive inputs of it. There is no zero point, so a pruned zero stays exactly zero.
"""

import dataclasses
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from sparsejax.core.dtypes import widen
from sparsejax.core.masks import check_masks, dense_masks
from sparsejax.core.selection import (
    Where,
    is_array,
    is_concrete,
    is_dense,
    named_leaves,
    selected_paths,
)
from sparsejax.weights.compact import NMCompact, index_bits, pack_indices, unpack_indices
from sparsejax.weights.compact_file import smallest_form

LARGEST = {4: 7, 8: 127}  # the code of the largest magnitude: the range is symmetric


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """Codes and scales of a weight; the weight is their product.

    Attributes:
      codes: int8 of the weight's shape; or, for 4 bits, uint8 with two codes a byte along `axis`,
        the first in the low bits, in two's complement.
      scales: float32 (float64 of a float64 weight), with one entry a group along `axis`.
      bits: static, 4 or 8. count: static length of the weight along `axis`.
      axis: static, negative. dtype: static, of the weight.
    """

    codes: PyTree  # not typed as arrays: JAX puts tangents, specs and shapes in their place
    scales: PyTree
    bits: int = dataclasses.field(metadata={"static": True})
    count: int = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes


@overload
def quantize(
    w: Float[Array, "*s"], *, bits: int = ..., group: int | None = ..., axis: int | None = ...
) -> Quantized: ...


@overload
def quantize(
    w: NMCompact, *, bits: int = ..., group: int | None = ..., axis: int | None = ...
) -> NMCompact: ...


def quantize(
    w: Float[Array, "*s"] | NMCompact,
    *,
    bits: int = 8,
    group: int | None = None,
    axis: int | None = None,
) -> Quantized | NMCompact:
    """Rounds a weight to the nearest multiples of its scales.

    A scale is the largest magnitude of its group over 127 (int8) or 7 (int4), so no entry is
    clipped and none is off by more than half a scale. Every axis but `axis` has scales of its own:
    output channels, and the layers of a stack.

    Args:
      w: a weight, or a compact one, whose kept values are quantised; its groups are those of the
        dense weight, so that the result is the same.
      bits: 4 or 8. group: inputs that share a scale; None shares it over the whole axis.
      axis: of the inputs; by default -2, and that of the groups of a compact weight.

    Returns:
      A `Quantized`, or an `NMCompact` whose values are one.

    Raises:
      TypeError: not floating point.
      ValueError: other bits, a group that does not divide the axis (or that N:M groups do not
        divide), an axis that there is not, or, outside `jit`, entries that are not finite.

    >>> q = quantize(jnp.asarray([[1.27], [-0.5], [0.0]]))
    >>> q.codes[:, 0], dequantize(q)[:, 0]
    (Array([127, -50,   0], dtype=int8), Array([ 1.27, -0.5 ,  0.  ], dtype=float32))
    """
    if bits not in LARGEST:
        raise ValueError(f"bits is {bits}; allowed are 4 and 8")
    if isinstance(w, NMCompact):
        if w.axis is None or (axis is not None and axis % len(w.shape) != w.axis):
            raise ValueError(f"axis is {axis}; the weight is compact along {w.axis}")
        run = w.m * w.stride
        if group is not None and (group < 1 or group % run):
            raise ValueError(f"group is {group}; it must be a multiple of {run}, for {w.pattern}")
        kept = None if group is None else group // w.m * w.n
        values = _quantize(w.values, bits, kept, w.axis - len(w.shape))
        return dataclasses.replace(w, values=values)
    return _quantize(w, bits, group, -2 if axis is None else axis)


@overload
def dequantize(q: Quantized) -> Float[Array, "..."]: ...


@overload
def dequantize(q: NMCompact) -> NMCompact: ...


def dequantize(q: Quantized | NMCompact) -> Float[Array, "..."] | NMCompact:
    """The weight of a `Quantized`, in its dtype; or a compact weight with its values so.

    Differentiable in the scales.
    """
    if isinstance(q, NMCompact):
        return dataclasses.replace(q, values=dequantize(q.values))
    codes = q.codes
    if q.bits == 4:
        nibbles = unpack_indices(codes, q.count, axis=q.axis, bits=4)
        codes = (nibbles.astype(jnp.int8) ^ 8) - 8
    groups = _grouped(codes, q.scales.shape[q.axis], q.axis)
    dense = groups.astype(q.scales.dtype) * jnp.expand_dims(q.scales, q.axis)
    return dense.reshape(codes.shape).astype(q.dtype)


def quantize_params(
    params: PyTree,
    masks: PyTree | None = None,
    *,
    bits: int = 8,
    group: int | None = None,
    where: Where = None,
) -> tuple[PyTree, dict[str, int]]:
    """Quantises the chosen leaves and gives them back as floats: the loss that it costs is theirs.

    Outside `jit`: bytes are counted on the host. Inside a trace use `quantize`.

    Args:
      params: any PyTree. masks: with the same paths; pruned entries are then not stored.
      bits, group: see `quantize`, along axis -2. where: see `selected_paths`.

    Returns:
      The parameters, and `{"dense": bytes of the parameters, "stored": bytes of codes, scales and
      positions}`, where leaves that are not chosen keep their dtype and sparse leaves are stored
      as N:M or with a bit mask, whichever is smaller.

    Raises:
      ValueError, TypeError: as `quantize`, naming the leaf; or non-zeros outside the masks.
    """
    chosen = set(selected_paths(params, where))
    masks = check_masks(dense_masks(params) if masks is None else masks, params)
    structure = jax.tree.structure(params)
    out, dense, stored = [], 0, 0
    for (path, leaf), mask in zip(named_leaves(params), jax.tree.leaves(masks)):
        if not is_array(leaf):
            out.append(leaf)
            continue
        kept = None if is_dense(mask) else np.asarray(mask)
        if kept is not None and np.any(np.asarray(leaf)[~kept] != 0):
            raise ValueError(f"leaf {path!r} has non-zeros outside its mask")
        value_bits, scales = 8 * leaf.dtype.itemsize, 0
        if path in chosen:
            try:
                q = quantize(jnp.asarray(leaf), bits=bits, group=group)
            except (ValueError, TypeError) as error:
                raise type(error)(f"leaf {path!r}: {error}") from error
            value_bits, scales = bits, q.scales.nbytes
            leaf = dequantize(q)
        dense += leaf.nbytes
        stored += scales + _stored_bytes(leaf.size, kept, value_bits)
        out.append(leaf)
    return jax.tree.unflatten(structure, out), {"dense": dense, "stored": stored}


def _quantize(w: Array, bits: int, group: int | None, axis: int) -> Quantized:
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"w must be floating point, not {w.dtype}")
    if not -w.ndim <= axis < w.ndim:
        raise ValueError(f"axis is {axis}; an array of {w.ndim} axes has none such")
    axis = axis % w.ndim - w.ndim
    count = w.shape[axis]
    if group is not None and (group < 1 or count % group):
        raise ValueError(f"group is {group}; it must divide axis {axis}, which is {count} long")
    if is_concrete(w):
        infinite = int(jnp.sum(~jnp.isfinite(w)))
        if infinite:
            raise ValueError(f"w has {infinite} entries that are not finite")
    groups = _grouped(widen(w), 1 if group is None else count // group, axis)
    largest = jnp.max(jnp.abs(groups), axis=axis, keepdims=True, initial=0)
    # a scale below the smallest normal float would be flushed to zero
    smallest = jnp.finfo(largest.dtype).tiny
    scales = jnp.where(largest > 0, jnp.maximum(largest / LARGEST[bits], smallest), 0)
    codes = jnp.round(jnp.where(scales > 0, groups / jnp.where(scales > 0, scales, 1), 0))
    codes = codes.astype(jnp.int8).reshape(w.shape)
    if bits == 4:
        nibbles = jax.lax.bitcast_convert_type(codes, jnp.uint8) & jnp.uint8(15)
        codes = pack_indices(nibbles, bits=4, axis=axis)
    return Quantized(codes, jnp.squeeze(scales, axis), bits, count, axis, str(w.dtype))


def _grouped(w: Array, groups: int, axis: int) -> Array:
    """The negative `axis` as [groups, members]; members stand where `axis` did."""
    place = w.ndim + axis
    members = w.shape[place] // groups if groups else 0
    return w.reshape(*w.shape[:place], groups, members, *w.shape[place + 1 :])


def _stored_bytes(size: int, kept: np.ndarray | None, value_bits: int) -> int:
    if kept is None:
        return -(-size * value_bits // 8)
    form = smallest_form(kept, value_bits=value_bits)
    if form is None:
        return -(-int(kept.sum()) * value_bits // 8) + -(-size // 8)
    values = size // form.m * form.n
    return -(-values * value_bits // 8) + -(-values * index_bits(form.m) // 8)
