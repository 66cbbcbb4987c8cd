"""What must be true of a `tokenizer.json` before it is believed to belong to a model."""

from collections.abc import Mapping
from typing import Any

from sparsejax.core.untrusted import listed, shown


def check_tokenizer(tokenizer: Mapping[str, Any], vocab_size: int | None) -> None:
    """Raises ValueError unless `tokenizer.json` has a vocabulary, all of it below `vocab_size`."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        ids: list[Any] = list(vocabulary.values())
    elif isinstance(vocabulary, list):
        ids = list(range(len(vocabulary)))
    else:
        raise ValueError("tokenizer.json has no vocabulary at model.vocab")
    added = tokenizer.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise ValueError("tokenizer.json has added_tokens that are no list of objects")
    ids += [token.get("id") for token in added]
    if strange := [i for i in ids if not isinstance(i, int) or isinstance(i, bool) or i < 0]:
        raise ValueError(f"tokenizer.json has ids that are no numbers of tokens: {listed(strange)}")
    if vocab_size is not None and ids and max(ids) >= vocab_size:
        raise ValueError(f"tokenizer.json has the id {shown(max(ids))}; vocab_size is {vocab_size}")
