"""Models to directories that Hugging Face Transformers reads."""

import json
import math
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from sparsejax.core.safetensors_file import write_safetensors
from sparsejax.core.selection import named_leaves
from sparsejax.core.untrusted import listed, parse_object, shown
from sparsejax.models.gpt import Gpt
from sparsejax.models.hf import INDEX, WEIGHTS
from sparsejax.models.hf_config import layout_of, to_hf_config
from sparsejax.models.hf_layout import Layout
from sparsejax.models.hf_tokenizer import check_tokenizer
from sparsejax.models.llama import Llama

_METADATA = {"format": "pt"}  # Transformers asks for it


def save_hf(
    path: str | os.PathLike[str],
    model: Llama | Gpt,
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    start_token: int | None = None,
    stop_token: int | None = None,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Writes a directory that Transformers 4 and 5, and `load_hf`, read.

    The directory is complete or not there: it is built beside its place and then renamed. Weights
    keep their dtype (float32 or bfloat16), and zeros of pruning are written as zeros.

    tokenizer: a `tokenizer.json` to go with it: its path, or its text.
    start_token, stop_token: for Transformers' `bos_token_id` and `eos_token_id`.
    shard_bytes: above so much the weights are split into files of at most this, or of one tensor.
    overwrite: replaces a directory that holds a model; otherwise only an empty one may be there.

    Raises ValueError if `path` is taken, the tokenizer is damaged or larger than the vocabulary, a
    token is outside it, a parameter is not finite, of another dtype or shape than `model.config`
    says, or spread over several processes.
    """
    config, target = model.config, Path(path).resolve()
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes}; it must be positive.")
    for name, token in (("start_token", start_token), ("stop_token", stop_token)):
        if token is not None and not 0 <= token < config.vocab_size:
            raise ValueError(f"{name} is {token}; it must be from 0 to {config.vocab_size - 1}.")
    _check_free(target, overwrite)
    text = None if tokenizer is None else _tokenizer_text(tokenizer, config.vocab_size)
    layout = layout_of(config)
    params = _checked_parameters(model, layout)
    kinds = {np.dtype(leaf.dtype) for leaf in params.values()}
    stored = "float32" if np.dtype(np.float32) in kinds else "bfloat16"
    tokens = {"bos_token_id": start_token, "eos_token_id": stop_token}
    files = {"config.json": to_hf_config(config) | tokens | {"torch_dtype": stored}}
    if text is not None:
        # Transformers would otherwise guess a class, and with it another pre-tokenizer.
        files["tokenizer_config.json"] = {"tokenizer_class": "PreTrainedTokenizerFast"}

    target.parent.mkdir(parents=True, exist_ok=True)
    building = _beside(target)
    building.mkdir()
    try:
        files |= _write_weights(building, layout, params, shard_bytes)
        for name, content in files.items():
            _write_text(building / name, json.dumps(content, indent=2) + "\n")
        if text is not None:
            _write_text(building / "tokenizer.json", text)
        _put(building, target, overwrite)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _check_free(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise ValueError(f"path is {target}, which is a file.")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"path is {target}, which is not empty; overwrite=True replaces it.")
    if not (target / "config.json").is_file():
        raise ValueError(
            f"path is {target}, which has no config.json; only a model's directory is replaced."
        )


def _tokenizer_text(tokenizer: str | os.PathLike[str], vocab_size: int) -> str:
    if isinstance(tokenizer, str) and tokenizer.lstrip().startswith("{"):
        text = tokenizer
    else:
        file = Path(tokenizer)
        if not file.is_file():
            raise ValueError(f"tokenizer is {shown(str(tokenizer))}; there is no such file.")
        text = file.read_text(encoding="utf-8")
    try:
        content = parse_object(text)
    except ValueError as error:
        raise ValueError(f"tokenizer {error}") from None
    check_tokenizer(content, vocab_size)
    return text


def _checked_parameters(model: Llama | Gpt, layout: Layout) -> dict[str, jax.Array]:
    params = dict(named_leaves(nnx.split(model)[1]))
    if set(params) != set(layout.sources):
        odd = sorted(set(params) ^ set(layout.sources))
        raise ValueError(f"model has other parameters than its config says: {listed(odd)}.")
    for path, leaf in params.items():
        source = layout.sources[path]
        shape = source.shape[::-1] if source.transposed else source.shape
        if source.columns is not None:
            shape = (*shape[:-1], source.columns[1] - source.columns[0])
        shape = (layout.n_layers, *shape) if "{}" in source.name else shape
        if leaf.shape != shape:
            raise ValueError(f"{path} has the shape {leaf.shape}; the config makes it {shape}.")
        if str(leaf.dtype) not in ("float32", "bfloat16"):
            raise ValueError(f"{path} is {leaf.dtype}; allowed are float32 and bfloat16.")
        if not getattr(leaf, "is_fully_addressable", True):
            raise ValueError(f"{path} is spread over several processes; gather it first.")
    return params


def _write_weights(
    folder: Path, layout: Layout, params: Mapping[str, jax.Array], shard_bytes: int
) -> dict[str, Any]:
    """Writes the files of weights; returns the index, by its name, if there is one."""
    # Parts of one tensor, in the order of their columns.
    paths: dict[str, list[str]] = {}
    for path, source in layout.sources.items():
        paths.setdefault(source.name, []).append(path)
    tensors, places = {}, {}
    for template, parts in paths.items():
        dtype, shape = np.dtype(params[parts[0]].dtype), layout.sources[parts[0]].shape
        for i in range(layout.n_layers) if "{}" in template else [None]:
            name = template.format(i)
            tensors[name], places[name] = (dtype, shape), (parts, i)

    def fetch(name: str) -> np.ndarray:
        parts, layer = places[name]
        arrays = []
        for path in parts:
            values = np.asarray(params[path] if layer is None else params[path][layer])
            if not np.isfinite(values).all():
                raise ValueError(f"{path} has values that are not finite.")
            arrays.append(values.T if layout.sources[path].transposed else values)
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)

    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in tensors.items()}
    groups = _shards(sizes, shard_bytes)
    if len(groups) == 1:
        write_safetensors(folder / WEIGHTS, tensors, fetch, metadata=_METADATA)
        return {}
    where = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        part = {name: tensors[name] for name in group}
        write_safetensors(folder / file, part, fetch, metadata=_METADATA)
        where |= dict.fromkeys(group, file)
    return {INDEX: {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}}


def _shards(sizes: Mapping[str, int], limit: int) -> Sequence[list[str]]:
    """Names in their order, in groups of at most `limit` bytes; a larger tensor stands alone."""
    groups: list[list[str]] = []
    filled = limit + 1
    for name, size in sizes.items():
        if filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _write_text(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}-{secrets.token_hex(6)}")


def _put(building: Path, target: Path, overwrite: bool) -> None:
    """Renames `building` to `target`, which stays as it is if that fails."""
    _check_free(target, overwrite)  # again: writing takes time
    if not (target.is_dir() and any(target.iterdir())):
        building.rename(target)
        return
    old = _beside(target)
    target.rename(old)
    try:
        building.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)
