"""Tokenizers that need no vocabulary file: one token per character or per byte."""

import dataclasses
from typing import Protocol

import numpy as np
from jaxtyping import Int, UInt8

from experiments.harness.data.errors import DatasetError


class Tokenizer(Protocol):
    """Text to token numbers 0 .. vocab_size - 1 and back; `decode` never raises."""

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> Int[np.ndarray, "n"]: ...

    def decode(self, tokens: Int[np.ndarray, "..."]) -> str: ...


@dataclasses.dataclass(frozen=True)
class AsciiTokenizer:
    """One token per character; a character outside ASCII becomes `?`."""

    name: str = dataclasses.field(default="ascii", init=False)
    vocab_size: int = dataclasses.field(default=128, init=False)

    def encode(self, text: str) -> UInt8[np.ndarray, "n"]:
        """One number per character."""
        return np.frombuffer(text.encode("ascii", "replace"), np.uint8)

    def decode(self, tokens: Int[np.ndarray, "..."]) -> str:
        """The text; a number outside the vocabulary becomes `?`."""
        return _to_bytes(tokens, self.vocab_size).decode("ascii")


@dataclasses.dataclass(frozen=True)
class BytesTokenizer:
    """One token per byte of UTF-8: every text comes back exactly."""

    name: str = dataclasses.field(default="bytes", init=False)
    vocab_size: int = dataclasses.field(default=256, init=False)

    def encode(self, text: str) -> UInt8[np.ndarray, "n"]:
        """One number per byte; half of a surrogate pair, which UTF-8 cannot hold, becomes `?`."""
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8)

    def decode(self, tokens: Int[np.ndarray, "..."]) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD, numbers outside 0..255 `?`."""
        return _to_bytes(tokens, self.vocab_size).decode("utf-8", "replace")


TOKENIZERS: dict[str, Tokenizer] = {
    tokenizer.name: tokenizer for tokenizer in (AsciiTokenizer(), BytesTokenizer())
}


def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer `ascii` (vocabulary 128) or `bytes` (256)."""
    if name not in TOKENIZERS:
        raise DatasetError(f"unknown tokenizer {name!r}: choose one of {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name]


def _to_bytes(tokens: Int[np.ndarray, "..."], vocab_size: int) -> bytes:
    numbers = np.asarray(tokens).reshape(-1)
    valid = (numbers >= 0) & (numbers < vocab_size)
    return np.where(valid, numbers, ord("?")).astype(np.uint8).tobytes()
