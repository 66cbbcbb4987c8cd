"""Models from directories of Hugging Face Transformers: safetensors and config.json.

A directory is checked as a whole, header against header and against its configuration, before
anything of its size is allocated; all that is wrong with it is in one `CheckpointError`.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import numpy as np
from jax.sharding import Mesh

from sparsejax.core.safetensors_file import Entry, read_header, read_tensor, same_bytes
from sparsejax.core.untrusted import listed, shown
from sparsejax.models.decoding import DType
from sparsejax.models.gpt import Gpt
from sparsejax.models.gpt_config import GptConfig
from sparsejax.models.hf_config import hf_config, layout_of
from sparsejax.models.hf_fields import architecture
from sparsejax.models.hf_files import inside, plural, read_object
from sparsejax.models.hf_gpt import GPT_ARCHITECTURE
from sparsejax.models.hf_layout import Layout
from sparsejax.models.hf_llama import LLAMA_ARCHITECTURES
from sparsejax.models.hf_tokenizer import check_tokenizer
from sparsejax.models.llama import DEFAULT_RULES, Llama
from sparsejax.models.llama_config import LlamaConfig
from sparsejax.models.loading import CheckpointError, Rules, build_gpt, build_llama

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = ("F32", "F16", "BF16")
_CONFIG_LIMIT, _INDEX_LIMIT, _TOKENIZER_LIMIT = 1 << 20, 1 << 26, 1 << 27


def load_hf(
    path: str | os.PathLike[str],
    *,
    dtype: DType = "float32",
    param_dtype: DType = "float32",
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
) -> Llama:
    """The model in a directory that Transformers or `save_hf` wrote, finite and whole.

    LLaMA, Qwen2 and Mistral for causal language modelling, from `config.json` and either
    `model.safetensors` or the files of `model.safetensors.index.json`, in float32, float16 or
    bfloat16. Tensors are read one at a time, each straight to its shard. A `tokenizer.json` is
    checked, not returned. Nothing is downloaded and no code of the directory is run.

    dtype, param_dtype: of the activations and of the parameters.
    mesh, rules: where the parameters go, as in `param_specs`; None puts all on the first device.

    Raises CheckpointError (a ValueError) with everything that is wrong: files that are missing,
    damaged or elsewhere, a header or an index that contradicts its files, tensors that are missing,
    unknown, of a wrong shape or dtype or not finite, a configuration that contradicts them or asks
    for what `Llama` lacks (see `hf_config`), a tokenizer beyond the vocabulary.
    """
    config, fetch = _opened(path, LLAMA_ARCHITECTURES, dtype, param_dtype)
    with _finished(path, fetch):
        return build_llama(cast(LlamaConfig, config), fetch, mesh=mesh, rules=rules)


def load_hf_gpt(
    path: str | os.PathLike[str],
    *,
    dtype: DType = "float32",
    param_dtype: DType = "float32",
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
) -> Gpt:
    """As `load_hf`, for a directory that holds a GPT-2."""
    config, fetch = _opened(path, (GPT_ARCHITECTURE,), dtype, param_dtype)
    with _finished(path, fetch):
        return build_gpt(cast(GptConfig, config), fetch, mesh=mesh, rules=rules)


def _opened(
    path: str | os.PathLike[str], known: tuple[str, ...], dtype: DType, param_dtype: DType
) -> tuple[LlamaConfig | GptConfig, "_Fetch"]:
    """The configuration and the reader of a directory in which nothing but values can be wrong."""
    folder = Path(path).resolve()
    if not folder.is_dir():
        raise CheckpointError(path, ["there is no such directory; only local ones are read"])
    problems: list[str] = []
    entries = _entries(folder, problems)
    config = layout = None
    try:
        raw = read_object(folder, "config.json", _CONFIG_LIMIT)
        architecture(raw, known)
        config = hf_config(raw, dtype=dtype, param_dtype=param_dtype)
        layout = layout_of(config, entries or ())
    except CheckpointError as error:
        problems += [f"config.json: {problem}" for problem in error.problems]
    except ValueError as error:
        problems.append(str(error))
    if layout is not None and entries is not None:
        problems += _disagreements(layout, entries)
    if os.path.lexists(folder / "tokenizer.json"):
        try:
            tokenizer = read_object(folder, "tokenizer.json", _TOKENIZER_LIMIT)
            check_tokenizer(tokenizer, None if config is None else config.vocab_size)
        except ValueError as error:
            problems.append(str(error))
    if config is None or layout is None or entries is None or problems:
        raise CheckpointError(path, problems)
    return config, _Fetch(layout, entries, np.dtype(param_dtype))


@contextlib.contextmanager
def _finished(path: str | os.PathLike[str], fetch: "_Fetch") -> Iterator[None]:
    """Turns what goes wrong while values are read into a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(path, [f"cannot be read ({shown(str(error))})"]) from None
    if fetch.problems:
        raise CheckpointError(path, fetch.problems)


def _entries(folder: Path, problems: list[str]) -> dict[str, Entry] | None:
    """All tensors of the directory, or None where a file cannot be understood."""
    before = len(problems)
    has_index = os.path.lexists(folder / INDEX)
    if has_index:
        files = _indexed(folder, problems)
        if os.path.lexists(folder / WEIGHTS) and WEIGHTS not in files:
            problems.append(f"{WEIGHTS} is there, and an index that does not name it")
    elif os.path.lexists(folder / WEIGHTS):
        files = {WEIGHTS: None}
    else:
        pickles = sorted(file.name for file in folder.glob("*.bin"))
        advice = f"; {listed(pickles)} may run code when read: convert to safetensors"
        problems.append(f"{WEIGHTS} is missing" + (advice if pickles else ""))
        return None
    found: dict[str, Entry] = {}
    for name, promised in files.items():
        try:
            header = read_header(inside(folder, name))
        except OSError as error:
            problems.append(f"{name} cannot be read ({shown(str(error))})")
            continue
        except ValueError as error:
            problems.append(f"{shown(name)} {error}")
            continue
        problems += [f"{name} {problem}" for problem in header.problems]
        if promised is not None and not header.problems:
            if absent := promised - set(header.tensors):
                problems.append(f"{name} has no {listed(sorted(absent))}, against the index")
            if unknown := set(header.tensors) - promised:
                problems.append(f"{name} has {listed(sorted(unknown))}, against the index")
        found |= header.tensors
    return found if len(problems) == before else None


def _indexed(folder: Path, problems: list[str]) -> Mapping[str, set[str] | None]:
    """The files that the index names, and the tensors that it says are in each."""
    try:
        entries = read_object(folder, INDEX, _INDEX_LIMIT).get("weight_map")
    except ValueError as error:
        problems.append(str(error))
        return {}
    if not isinstance(entries, dict) or not entries:
        problems.append(f"{INDEX} has the weight_map {shown(entries)}; it must map names to files")
        return {}
    files: dict[str, set[str] | None] = {}
    for tensor, file in entries.items():
        if not isinstance(file, str):
            problems.append(f"{INDEX} puts {shown(tensor)} into {shown(file)}, which is no file")
            continue
        promised = files.setdefault(file, set())
        if promised is not None:
            promised.add(tensor)
    return files


def _disagreements(layout: Layout, entries: Mapping[str, Entry]) -> list[str]:
    """What configuration and files say differently about tensors; no work grows with the former."""
    problems = []
    ignored = {name for name in entries if layout.ignored.fullmatch(name)}
    present = {layout.layer(name) for name in set(entries) - ignored} - {None}
    if layout.n_layers != len(present):
        problems.append(
            f"config.json asks for {layout.n_layers} layers; the files have {len(present)}"
        )
    expected = layout.tensors(min(layout.n_layers, len(present)))
    if missing := [name for name in expected if name not in entries]:
        problems.append(f"{plural(len(missing), 'tensor')} missing: {listed(missing)}")
    copies = {name: of for name, of in layout.copies.items() if name in entries and of in entries}
    if extra := sorted(set(entries) - set(expected) - ignored - set(copies)):
        problems.append(f"{plural(len(extra), 'tensor')} not of this model: {listed(extra)}")
    for name, shape in expected.items():
        entry = entries.get(name)
        if entry is not None and entry.shape != shape:
            problems.append(f"{name} has the shape {entry.shape}; config.json makes it {shape}")
        if entry is not None and entry.dtype not in _DTYPES:
            problems.append(f"{name} is {entry.dtype}; allowed are {', '.join(_DTYPES)}")
    for name, of in copies.items():
        try:
            if not same_bytes(entries[name], entries[of]):
                problems.append(f"{name} differs from {of}, to which config.json ties it")
        except OSError as error:
            problems.append(f"{name} cannot be read ({shown(str(error))})")
    return problems


class _Fetch:
    """Reads one parameter of one layer, in the layout of our models; notes what is not finite."""

    def __init__(self, layout: Layout, entries: Mapping[str, Entry], dtype: np.dtype):
        self._layout, self._entries, self._dtype = layout, entries, dtype
        self.problems: list[str] = []

    def __call__(self, path: str, layer: int | None) -> np.ndarray:
        source = self._layout.sources[path]
        name = source.name.format(layer)
        try:
            values = read_tensor(self._entries[name])
        except ValueError as error:
            raise CheckpointError(name, [str(error)]) from None
        if source.columns is not None:
            values = values[..., slice(*source.columns)]
        # A finite float32 may be infinite in bfloat16; that is reported below.
        with np.errstate(over="ignore", invalid="ignore"):
            values = values.astype(self._dtype)
        if not np.isfinite(values).all():
            self.problems.append(f"{name} has values that are not finite in {self._dtype}")
        return values.T if source.transposed else values
