"""Pruning a whole model block by block in bounded memory, with a folder to continue from.

The hidden states between two blocks stay on the host and pass through the devices chunk by chunk.
With a folder every finished block is written to one file; a later call reads those blocks, runs
them to make the hidden states anew, and goes on where the first one stopped, to the same bits.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PyTree

from sparsejax.core.masks import dense_masks
from sparsejax.core.selection import is_dense, map_selected, named_leaves
from sparsejax.weights.compact_file import load_compact, save_compact
from sparsejax.weights.sequential import (
    PrunedBlock,
    PruneMethod,
    Skip,
    check_skip,
    prune_block,
    put_like,
    run_block,
    split_chunks,
)

OnLayer = Callable[[int, str, float], None]


@runtime_checkable
class BlockModel(Protocol):
    """A model made of blocks that run one after the other, such as `sparsejax.models.Llama`."""

    config: Any  # with `n_layers`, the number of blocks

    def embedded(self, tokens: Array) -> Array:
        """What the first block reads, `[s, t, d]`."""
        ...

    def block(self, i: int) -> Any:
        """A standalone copy of block i, called with `[s, t, d]` alone."""
        ...

    def set_block(self, i: int, block: Any) -> None:
        """Writes the parameters of a block back."""
        ...


def prune_model(
    model: BlockModel,
    tokens: Int[Array, "s t"],
    *,
    method: PruneMethod,
    skip: Skip = None,
    chunk: int = 8,
    folder: str | os.PathLike[str] | None = None,
    mesh: Mesh | None = None,
    on_layer: OnLayer | None = None,
) -> tuple[list[PyTree], list[dict[str, float]]]:
    """Prunes the linear layers of all blocks of a model, in place; the rest of it is untouched.

    Weights stay in their dtype; statistics, Hessians and SparseGPT are in float32 at least.

    Args:
      model: see `BlockModel`.
      tokens: calibration sequences.
      method: criterion and amount. skip: see `prune_sequential`.
      chunk: sequences at a time; what a block's activations cost, and no more than that.
      folder: where each finished block is written, atomically, and read by a later call with the
        same settings. The model may be dense again then, or hold blocks that are finished.
      mesh: devices that the sequences of a chunk are spread over, along its axis "data"; weights
        lie as they do. One process alone.
      on_layer: called with block, kernel path and the layer's relative squared error once its block
        is finished and written, for blocks read from the folder too.

    Returns:
      One mask tree per block, in the structure of its `nnx.state`, and one report per block, as in
      `prune_sequential`.

    Raises:
      ValueError: as `prune_sequential`; sequences or a chunk that the data axis does not divide; a
        folder of another method, calibration or model, or with a damaged file (naming it).
      FloatingPointError: a layer's Hessian has no Cholesky factorisation (naming block and layer).
    """
    check_skip(method, skip)
    parts = split_chunks(tokens, chunk, name="tokens")
    place = _placement(mesh, parts)
    hidden = [_host(model.embedded(place(part))) for part in parts]
    settings = _settings(method, skip, chunk, tokens, hidden) if folder is not None else {}
    masks, reports = [], []
    for number in range(model.config.n_layers):
        graph, own = nnx.split(model.block(number))
        state = own if mesh is None else jax.tree.map(lambda w: _onto(mesh, w), own)
        path = None if folder is None else pathlib.Path(folder) / f"block_{number:04d}.safetensors"
        kept = None if path is None else _read(path, settings, state)
        if kept is None:
            pruned = prune_block(
                graph, state, hidden, method=method, skip=skip, number=number, place=place
            )
            if path is not None:
                _write(path, settings, state, pruned)
        else:
            pruned = kept
        model.set_block(number, nnx.merge(graph, jax.tree.map(_back, pruned.state, own)))
        for name, error in pruned.errors.items():
            if on_layer is not None:
                on_layer(number, name, error)
        masks.append(jax.tree.map(_back, pruned.masks, own))
        reports.append(pruned.errors)
        if number + 1 < model.config.n_layers:
            for i, part in enumerate(hidden):
                hidden[i] = _host(run_block(graph, pruned.state, place(part)))
    return masks, reports


def _placement(mesh: Mesh | None, parts: list[Any]) -> Callable[[Any], Array]:
    if mesh is None:
        return jnp.asarray
    if "data" not in mesh.shape:
        raise ValueError(f"mesh has axes {', '.join(mesh.shape)}; it needs one called data")
    for part in parts:
        if part.shape[0] % mesh.shape["data"]:
            raise ValueError(
                f"a chunk has {part.shape[0]} sequences, which the {mesh.shape['data']} devices "
                "of the data axis do not divide: change chunk or the number of sequences"
            )
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return lambda part: jax.device_put(part, sharding)


def _onto(mesh: Mesh, w: Array) -> Array:
    """A parameter where the sequences are: as it lies, or on every device of the mesh."""
    if w.sharding.device_set == set(mesh.devices.flat):
        return w
    return jax.device_put(w, NamedSharding(mesh, PartitionSpec()))


def _back(new: Array, old: Array) -> Array:
    """The inverse of `_onto` for a pruned parameter or its mask."""
    stays = is_dense(new) or new.sharding == old.sharding
    return new if stays else jnp.asarray(_host(new))


def _host(x: Array) -> np.ndarray:
    return np.asarray(x)


def _settings(
    method: PruneMethod, skip: Skip, chunk: int, tokens: Array, hidden: list[np.ndarray]
) -> dict[str, Any]:
    """What a block's file must agree on, but for the block's own weights."""
    return {
        "method": json.loads(json.dumps(dataclasses.asdict(method))),
        "skip": skip,
        "calibration": {
            "shape": list(tokens.shape),
            "chunk": chunk,
            "tokens": _digest({"tokens": tokens}),
        },
        "embeddings": _digest({str(i): part for i, part in enumerate(hidden)}),
    }


def _digest(leaves: Mapping[str, Any]) -> str:
    found = hashlib.sha256()
    for name, leaf in leaves.items():
        array = np.ascontiguousarray(leaf)
        found.update(f"{name} {array.dtype} {array.shape}\n".encode())
        found.update(array.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def _write(
    path: pathlib.Path, settings: Mapping[str, Any], state: PyTree, done: PrunedBlock
) -> None:
    leaves = dict(named_leaves(done.state))
    masks = {name: mask for name, mask in named_leaves(done.masks) if not is_dense(mask)}
    header = {
        **settings,
        "weights": [_digest(dict(named_leaves(state))), _digest(leaves)],
        "errors": done.errors,
    }
    tree = {
        "settings": np.frombuffer(json.dumps(header).encode(), np.uint8),
        "masks": {name: np.packbits(_host(mask)) for name, mask in masks.items()},
        "weights": {name: leaves[name] for name in masks},
    }
    save_compact(path, tree, dense_masks(tree))


def _read(path: pathlib.Path, settings: Mapping[str, Any], state: PyTree) -> PrunedBlock | None:
    """A finished block, or None where there is no file of it; nothing in it is trusted."""
    if not path.is_file():
        return None
    leaves = dict(named_leaves(state))
    try:
        found = load_compact(path)
        header = json.loads(np.asarray(found["settings"]).tobytes().decode())
        before, after = header.pop("weights")
        errors = {str(name): float(error) for name, error in header.pop("errors").items()}
        _compare(path, header, settings)
        if _digest(leaves) not in (before, after):
            raise _OtherFolderError(f"{path} is of a model with other weights; give another folder")
        masks = {name: _unpack(found, name, leaves[name]) for name in errors}
        pruned = map_selected(
            lambda name, w: put_like(found[f"weights/{name}"], w),
            state,
            where=lambda name, w: name in masks,
        )
        if _digest(dict(named_leaves(pruned))) != after:
            raise ValueError("its weights are not those that were written")
    except _OtherFolderError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete it and the block is pruned anew"
        ) from error
    kept = map_selected(
        lambda name, w: put_like(jnp.asarray(masks[name]), w),
        state,
        where=lambda name, w: name in masks,
        otherwise=lambda leaf: jnp.asarray(True),
    )
    return PrunedBlock(pruned, kept, errors)


class _OtherFolderError(ValueError):
    """The file is sound, but of another run."""


def _compare(path: pathlib.Path, header: Any, settings: Mapping[str, Any]) -> None:
    for name, wanted in settings.items():
        if header[name] != wanted:
            raise _OtherFolderError(
                f"{path} was written with another {name}: {header[name]}, not {wanted}; "
                "give another folder"
            )


def _unpack(found: Mapping[str, Array], name: str, w: Array) -> np.ndarray:
    """The mask of a layer, after a look at whether mask and weights are of its shape."""
    new, bits = found[f"weights/{name}"], found[f"masks/{name}"]
    if new.shape != w.shape or new.dtype != w.dtype or bits.shape != (-(-w.size // 8),):
        raise ValueError(f"weights and mask of {name!r} are not of shape {w.shape}")
    return np.unpackbits(np.asarray(bits), count=w.size).reshape(w.shape).astype(bool)
