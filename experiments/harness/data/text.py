"""Text for language models: documents from datasets or files, cut into train and validation."""

import dataclasses
import itertools
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from experiments.harness.data.errors import DatasetError
from experiments.harness.data.files import expand, read_documents
from experiments.harness.data.holdout import hold_out
from experiments.harness.data.load import load_source, open_builder
from experiments.harness.data.tokenizers import Tokenizer

HELD_OUT_SPLITS = ("validation", "test")
BETWEEN_DOCUMENTS = "\n\n"


@dataclasses.dataclass(frozen=True)
class TextCorpus:
    """Documents to train on and documents held out; `name` says where they come from."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    name: str = "text"


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedText:
    """The two parts of a corpus as one row of token numbers each."""

    train: Int[np.ndarray, "n"]
    validation: Int[np.ndarray, "m"]
    vocab_size: int
    tokenizer: str
    name: str = "text"


def corpus_from_dataset(
    name: str,
    *,
    text_key: str = "text",
    max_bytes: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> TextCorpus:
    """The texts of a TFDS dataset.

    The held-out part is its split `validation`, else `test`, else the last tenth of the
    documents of `train`. `max_bytes` bounds the whole: nine tenths of it for training, one tenth
    held out; the document that passes the bound is cut. Raises `DatasetError`.
    """
    if max_bytes is not None and max_bytes < 10:
        raise DatasetError(f"max_bytes is {max_bytes}: it must be 10 or more")
    info = open_builder(name, data_dir=data_dir).info
    features = list(info.features.keys())
    if text_key not in features:
        raise DatasetError(
            f"dataset {name!r} has no feature {text_key!r}: it has {', '.join(sorted(features))}"
        )
    if "train" not in info.splits:
        raise DatasetError(
            f"dataset {name!r} has no split 'train': it has {', '.join(info.splits)}"
        )
    held_out = next((split for split in HELD_OUT_SPLITS if split in info.splits), None)
    tenth = None if max_bytes is None else max_bytes // 10
    if held_out is None:
        source = load_source(name, "train", data_dir=data_dir)
        return _split(_read(source, name, text_key, max_bytes), name)
    rest = None if max_bytes is None or tenth is None else max_bytes - tenth
    train = _read(load_source(name, "train", data_dir=data_dir), name, text_key, rest)
    validation = _read(load_source(name, held_out, data_dir=data_dir), name, text_key, tenth)
    return TextCorpus(tuple(train), tuple(validation), name)


def corpus_from_files(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
) -> TextCorpus:
    """The user's own .txt, .md, .py and .jsonl files (field `text`), or folders of them.

    Of several files the last tenth is held out (at least one file, in the order given, folders
    by path); of a single .jsonl file the last tenth of its records; of any other single file the
    last tenth of its characters, from the border of a paragraph or line. Raises `DatasetError`.
    """
    files = expand([paths] if isinstance(paths, str | os.PathLike) else list(paths))
    name = files[0].name if len(files) == 1 else f"{len(files)} files"
    documents = [read_documents(file) for file in files]
    if len(files) == 1:
        return _split(documents[0], str(files[0]))
    train, validation = hold_out(documents)
    for part, kept, where in (
        ("first", train, files[: len(train)]),
        ("held-out", validation, files[len(train) :]),
    ):
        if not any(kept):
            raise DatasetError(f"no text in the {part} files: {', '.join(map(str, where))}")
    chain = itertools.chain.from_iterable
    return TextCorpus(tuple(chain(train)), tuple(chain(validation)), name)


def tokenize(corpus: TextCorpus, tokenizer: Tokenizer) -> TokenizedText:
    """The documents of each part in one row of tokens, a blank line between two documents."""
    return TokenizedText(
        train=tokenizer.encode(BETWEEN_DOCUMENTS.join(corpus.train)),
        validation=tokenizer.encode(BETWEEN_DOCUMENTS.join(corpus.validation)),
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.name,
        name=corpus.name,
    )


def check_length(tokens: TokenizedText, *, seq_len: int, batch: int) -> None:
    """Raise a `DatasetError` with the numbers when a part of the text is too short.

    Training needs `batch` different windows of `seq_len + 1` tokens, validation one.
    """
    for part, have, need, what in (
        ("train", len(tokens.train), seq_len + batch, f"a batch of {batch} windows"),
        ("validation", len(tokens.validation), seq_len + 1, "a window"),
    ):
        if have < need:
            raise DatasetError(
                f"{tokens.name}: the {part} text has {have} tokens, {what} of {seq_len} + 1 tokens"
                f" needs {need}: give more text, or a shorter sequence or a smaller batch"
            )


def _read(source: Sequence[dict[str, Any]], name: str, key: str, most: int | None) -> list[str]:
    documents = []
    left = most
    for index in range(len(source)):
        value = source[index][key]
        if not isinstance(value, bytes | str):
            raise DatasetError(f"feature {key!r} of dataset {name!r} is not text")
        data = value.encode("utf-8", "replace") if isinstance(value, str) else value
        if left is not None:
            data = data[:left]
            left -= len(data)
        if data.strip():
            # A cut inside a character leaves bytes that are not UTF-8: they go.
            documents.append(data.decode("utf-8", "ignore"))
        if left == 0:
            break
    if not documents:
        raise DatasetError(f"dataset {name!r} holds no text in feature {key!r}")
    return documents


def _split(documents: Sequence[str], name: str) -> TextCorpus:
    """Hold out the last tenth of the documents, or of the characters of a single one."""
    if not documents:
        raise DatasetError(f"no text in {name}")
    if len(documents) > 1:
        train, validation = hold_out(documents)
        return TextCorpus(tuple(train), tuple(validation), name)
    text = documents[0]
    border = _border(text)
    return TextCorpus((text[:border],), (text[border:],), name)


def _border(text: str) -> int:
    """Where the last tenth begins: at a paragraph, else a line, else anywhere.

    The border may lie before the exact place, by at most a twentieth of the text.
    """
    exact = len(text) - max(1, len(text) // 10)
    earliest = exact - len(text) // 20
    for end in (BETWEEN_DOCUMENTS, "\n"):
        found = text.rfind(end, earliest, exact)
        if found > 0:
            return found + len(end)
    return exact
