"""The tokenizer inside a GGUF file, as one of the `tokenizers` library. Needs the extra `llm`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from sparsejax.models.gguf_file import GgufFile
from sparsejax.models.loading import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = {"llama-bpe": _LLAMA3_WORDS, "qwen2": _LLAMA3_WORDS.replace("{1,3}", "")}
_NORMAL, _CONTROL, _USER, _BYTE = 1, 3, 4, 6
_LONGEST = 256  # characters of a piece of SentencePiece, whose splits are tried in pairs


def gguf_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a GGUF file; `.to_str()` is what a `tokenizer.json` holds.

    Byte-level BPE (`gpt2`) with the word splitting of GPT-2, SmolLM, LLaMA 3 or Qwen 2, and
    SentencePiece's BPE (`llama`). Special tokens are recognised in a text; none is added to it.

    Raises CheckpointError: no tokenizer, one of another kind, or parts that do not fit together.
    """
    file = GgufFile(path)
    try:
        return _build(file.metadata)
    except _BadTokenizerError as error:
        raise CheckpointError(file.path, [str(error)]) from error
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(file.path, [f"its tokenizer cannot be built: {error}"]) from error


class _BadTokenizerError(Exception):
    pass


def _build(data: dict[str, Any]) -> Tokenizer:
    model = data.get("tokenizer.ggml.model")
    tokens = _list_of(data, "tokenizer.ggml.tokens", str)
    kinds = _list_of(data, "tokenizer.ggml.token_type", int, default=[_NORMAL] * len(tokens))
    if len(kinds) != len(tokens):
        raise _BadTokenizerError(f"it has {len(tokens)} tokens and {len(kinds)} token types")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise _BadTokenizerError("two tokens of it are the same")
    if model == "gpt2":
        tokenizer = _byte_level(data, vocabulary)
    elif model == "llama":
        tokenizer = _sentence_piece(data, vocabulary, kinds)
    else:
        raise _BadTokenizerError(f"tokenizer.ggml.model is {model!r}; 'gpt2' and 'llama' are known")
    special = [token for token, kind in zip(tokens, kinds) if kind == _CONTROL]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([token for token, kind in zip(tokens, kinds) if kind == _USER])
    if tokenizer.get_vocab_size() != len(tokens):
        raise _BadTokenizerError("its special tokens are no part of its vocabulary")
    return tokenizer


def _byte_level(data: dict[str, Any], vocabulary: dict[str, int]) -> Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    pairs = []
    for merge in _list_of(data, "tokenizer.ggml.merges", str):
        left, _, right = merge.partition(" ")
        if not all(part in vocabulary for part in (left, right, left + right)):
            raise _BadTokenizerError(f"its merge {merge!r} joins tokens that it does not have")
        pairs.append((left, right))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, pairs))
    pre = data.get("tokenizer.ggml.pre", "default")
    if pre == "smollm":
        split = [pre_tokenizers.Digits(individual_digits=True)]
    elif isinstance(pre, str) and pre in _WORDS:
        split = [pre_tokenizers.Split(tokenizers.Regex(_WORDS[pre]), "isolated")]
    elif pre in ("default", "gpt-2"):
        split = []
    else:
        known = ", ".join(("default", "gpt-2", "smollm", *_WORDS))
        raise _BadTokenizerError(f"tokenizer.ggml.pre is {pre!r}; known are {known}")
    whole_words = pre in _WORDS
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not whole_words)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(
    data: dict[str, Any], vocabulary: dict[str, int], kinds: list[int]
) -> Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, normalizers

    scores = _list_of(data, "tokenizer.ggml.scores", float)
    if len(scores) != len(vocabulary):
        raise _BadTokenizerError(f"it has {len(vocabulary)} tokens and {len(scores)} scores")
    # BPE with merges is the same as joining the best-scored neighbours: each piece may come from
    # any two shorter ones, and a better score comes first.
    ranked = []
    for piece, i in vocabulary.items():
        if kinds[i] != _NORMAL or len(piece) > _LONGEST:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-scores[i], vocabulary[left], vocabulary[right], left, right))
    pairs = [(left, right) for *_, left, right in sorted(ranked)]
    unknown = data.get("tokenizer.ggml.unknown_token_id", 0)
    names = list(vocabulary)
    if not isinstance(unknown, int) or not 0 <= unknown < len(names):
        raise _BadTokenizerError(f"tokenizer.ggml.unknown_token_id is {unknown!r}")
    bpe = models.BPE(vocabulary, pairs, unk_token=names[unknown], fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(bpe)
    prefix = data.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    start = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*start, spaces])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _list_of(data: dict[str, Any], key: str, kind: type, default: Any = None) -> list[Any]:
    values = data.get(key, default)
    if not isinstance(values, list) or not values:
        raise _BadTokenizerError(f"{key} is missing")
    if not all(isinstance(value, kind) for value in values):
        raise _BadTokenizerError(f"{key} does not hold {kind.__name__} values alone")
    return values
