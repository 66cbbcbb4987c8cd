"""CRATE models from and to state dicts in PyTorch's layout, stored as safetensors.

Published checkpoints are pickles, which are never opened here: save their state dict by the
`safetensors` library first.

Source: names and layouts of the published code of CRATE.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Shaped

from sparsejax.core.safetensors_file import read_header, read_tensor, write_safetensors
from sparsejax.core.selection import named_leaves
from sparsejax.models.crate import CrateClassifier, CrateMAE
from sparsejax.models.crate_config import CrateImageConfig
from sparsejax.models.loading import CheckpointError

StateDict = Mapping[str, Shaped[np.ndarray, "..."]]
CrateModel = TypeVar("CrateModel", CrateClassifier, CrateMAE)
_UNUSED = ("pos_embed", "decoder_pos_embed", "decoder_embed.weight", "decoder_embed.bias")


class _Place(NamedTuple):
    """Where a parameter lies in both; `{}` in the name of a stacked one is its layer."""

    path: str
    name: str
    to_torch: Callable = lambda a: a
    to_ours: Callable = lambda a: a


def load_crate(
    path: str | os.PathLike[str], config: CrateImageConfig, *, kind: type[CrateModel]
) -> CrateModel:
    """A model from a safetensors file with the names and layouts of the published code.

    config: sizes; those of the file must be the same. kind: `CrateClassifier` or `CrateMAE`, whose
        fixed tables and unused parameters are passed over.

    Raises CheckpointError naming all that is missing, unknown, of another shape or not finite.
    """
    header = read_header(Path(path))
    if header.problems:
        raise CheckpointError(path, header.problems)
    shapes = {name: tuple(entry.shape) for name, entry in header.tensors.items()}
    problems = _differences(shapes, config, kind)
    if problems:
        raise CheckpointError(path, problems)
    wanted = set(_names(config, kind))
    found = {n: read_tensor(entry) for n, entry in header.tensors.items() if n in wanted}
    return crate_from_torch(found, config, kind=kind, where=path)


def save_crate(path: str | os.PathLike[str], model: CrateClassifier | CrateMAE) -> None:
    """Writes `crate_to_torch(model)` as a safetensors file, whole or not at all."""
    tensors = crate_to_torch(model)
    forms = {name: (a.dtype, a.shape) for name, a in tensors.items()}
    write_safetensors(Path(path), forms, tensors.__getitem__, metadata={"format": "pt"})


def crate_from_torch(
    tensors: StateDict, config: CrateImageConfig, *, kind: type[CrateModel], where: object = "dict"
) -> CrateModel:
    """A model from a state dict; arguments and errors as `load_crate`."""
    problems = _differences({n: a.shape for n, a in tensors.items()}, config, kind)
    for name in set(tensors) - set(_UNUSED):
        if not np.isfinite(np.asarray(tensors[name], np.float64)).all():
            problems.append(f"{name} holds values that are not finite")
    if problems:
        raise CheckpointError(where, problems)
    graph, abstract = nnx.split(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))))
    places = {place.path: place for place in _places(config, kind)}
    leaves = []
    for path, leaf in named_leaves(abstract):
        place = places[path]
        names = _layers(place, config)
        parts = [place.to_ours(np.asarray(tensors[name])) for name in names]
        whole = np.stack(parts) if "{}" in place.name else parts[0]
        leaves.append(jnp.asarray(whole, leaf.dtype))
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(abstract), leaves))


def crate_to_torch(model: CrateClassifier | CrateMAE) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The state dict of a model, without the fixed tables.

    >>> from sparsejax.models import crate_config
    >>> config = crate_config("tiny", n_layers=1, patch_size=8, image_size=16, num_classes=10)
    >>> names = crate_to_torch(CrateClassifier(config, rngs=nnx.Rngs(0)))
    >>> names["transformer.layers.0.0.fn.qkv.weight"].shape
    (384, 384)
    """
    values = dict(named_leaves(nnx.state(model)))
    found = {}
    for place in _places(model.config, type(model)):
        whole = np.asarray(values[place.path])
        parts = whole if "{}" in place.name else [whole]
        names = _layers(place, model.config)
        found |= {n: np.ascontiguousarray(place.to_torch(a)) for n, a in zip(names, parts)}
    return found


def _layers(place: _Place, config: CrateImageConfig) -> list[str]:
    count = config.n_layers if "{}" in place.name else 1
    return [place.name.replace("{}", str(i)) for i in range(count)]


def _names(config: CrateImageConfig, kind: type) -> dict[str, tuple[int, ...]]:
    """Every name of a state dict, with its shape."""
    abstract = nnx.state(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))))
    leaves = dict(named_leaves(abstract))
    found = {}
    for place in _places(config, kind):
        leaf = leaves[place.path]
        shape = leaf.shape[1:] if "{}" in place.name else leaf.shape
        there = jax.eval_shape(place.to_torch, jax.ShapeDtypeStruct(shape, leaf.dtype))
        found |= dict.fromkeys(_layers(place, config), there.shape)
    return found


def _differences(
    shapes: Mapping[str, tuple[int, ...]], config: CrateImageConfig, kind: type
) -> list[str]:
    expected = _names(config, kind)
    problems = [f"{name} is missing" for name in expected if name not in shapes]
    passed_over = _UNUSED if kind is CrateMAE else ()
    for name, shape in shapes.items():
        if name in expected and shape != expected[name]:
            problems.append(f"{name} has shape {shape}; the configuration wants {expected[name]}")
        elif name not in expected and name not in passed_over:
            problems.append(f"{name} is no parameter of {kind.__name__}")
    return problems


def _places(config: CrateImageConfig, kind: type) -> Iterator[_Place]:
    if kind is CrateClassifier:
        yield _table("positions/embedding", "pos_embedding")
        yield _table("class_token/embedding", "cls_token")
        yield from _norm("patch_norm", "to_patch_embedding.1")
        yield from _linear("patch_embed", "to_patch_embedding.2")
        yield from _norm("embed_norm", "to_patch_embedding.3")
        yield from _encoder(config, "transformer.layers.{}.")
        yield from _norm("head_norm", "mlp_head.0")
        yield from _linear("head", "mlp_head.1")
        return
    patch, channels = config.patch_size, config.in_channels
    yield _table("class_token/embedding", "cls_token")
    yield _table("mask_token/embedding", "mask_token")
    yield _Place(
        "patch_embed/kernel",
        "patch_embed.proj.weight",
        lambda a: a.reshape(patch, patch, channels, -1).transpose(3, 2, 0, 1),
        lambda a: a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0]),
    )
    yield _Place("patch_embed/bias", "patch_embed.proj.bias")
    yield from _encoder(config, "blocks.{}.layers.0.")
    yield from _norm("norm", "norm")
    inner = "decoder_blocks.{}.layers.0."
    yield from _norm("decoder_blocks/linear_norm", f"{inner}0.norm")
    yield _Place("decoder_blocks/dictionary", f"{inner}0.fn.weight")
    yield from _norm("decoder_blocks/attention_norm", f"{inner}1.norm")
    yield from _attention(config, "decoder_blocks/attention", f"{inner}1.fn")
    yield from _norm("decoder_norm", "decoder_norm")
    yield from _linear("predictor", "decoder_pred")


def _encoder(config: CrateImageConfig, layer: str) -> Iterator[_Place]:
    yield from _norm("blocks/attention_norm", f"{layer}0.norm")
    yield from _attention(config, "blocks/attention", f"{layer}0.fn")
    yield from _norm("blocks/ista_norm", f"{layer}1.norm")
    yield _Place("blocks/ista/dictionary", f"{layer}1.fn.weight")


def _attention(config: CrateImageConfig, path: str, name: str) -> Iterator[_Place]:
    yield _Place(f"{path}/qkv/kernel", f"{name}.qkv.weight", _transposed, _transposed)
    if config.n_heads > 1 or config.head_width != config.d_model:
        yield from _linear(f"{path}/out_proj", f"{name}.to_out.0")


def _norm(path: str, name: str) -> Iterator[_Place]:
    yield _Place(f"{path}/scale", f"{name}.weight")
    yield _Place(f"{path}/bias", f"{name}.bias")


def _linear(path: str, name: str) -> Iterator[_Place]:
    yield _Place(f"{path}/kernel", f"{name}.weight", _transposed, _transposed)
    yield _Place(f"{path}/bias", f"{name}.bias")


def _table(path: str, name: str) -> _Place:
    return _Place(path, name, lambda a: a[None], lambda a: a.reshape(-1, a.shape[-1]))


def _transposed(a: Any) -> Any:
    return a.swapaxes(0, 1)
