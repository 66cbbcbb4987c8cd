"""Zero-shot multiple choice: files of questions, and how often a model prefers the right answer.

The model never writes an answer: each choice is scored by its log-likelihood after the context.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness.data import DatasetError, Tokenizer

Logits = Callable[[Any, jax.Array], jax.Array]
SHORTEST = 32  # tokens: shorter questions share one compilation


@dataclasses.dataclass(frozen=True)
class Question:
    """A question and its possible answers.

    Attributes:
      context: what comes before; one text, or one for each choice (WinoGrande).
      choices: what may follow, after a space. answer: index of the right one.

    Raises:
      ValueError: fewer than two choices, an empty one, no such answer, or contexts of another
        number.
    """

    context: str | tuple[str, ...]
    choices: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        if len(self.choices) < 2 or not all(self.choices):
            raise ValueError(f"choices are {self.choices!r}; give two or more, none empty")
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"answer is {self.answer}; there are {len(self.choices)} choices")
        if not isinstance(self.context, str) and len(self.context) != len(self.choices):
            raise ValueError(f"{len(self.context)} contexts for {len(self.choices)} choices")

    @property
    def contexts(self) -> tuple[str, ...]:
        """The context of each choice."""
        same = isinstance(self.context, str)
        return (self.context,) * len(self.choices) if same else self.context  # type: ignore


@dataclasses.dataclass(frozen=True)
class MultipleChoiceResult:
    """How a model did.

    Attributes:
      acc: share of questions whose right choice has the largest summed log-likelihood.
      acc_norm: the same with every sum divided by the bytes of the choice in UTF-8.
      count: questions. scores: the summed log-likelihoods of every question's choices, in nats.
    """

    acc: float
    acc_norm: float
    count: int
    scores: tuple[tuple[float, ...], ...]

    @property
    def standard_error(self) -> float:
        """Of `acc`, over questions."""
        return (self.acc * (1 - self.acc) / max(1, self.count - 1)) ** 0.5


def evaluate(
    logits: Logits,
    params: Any,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    max_length: int,
    batch: int = 16,
    bos: int | None = None,
) -> MultipleChoiceResult:
    """Scores every choice of every question and counts the right ones.

    As in the field's evaluation harness: the choice follows its context after a space; trailing
    spaces of the context move to the choice; context and choice are encoded together, and the
    choice's tokens are those beyond the length of the context encoded alone; what is too long loses
    tokens on the left. `acc` compares sums, `acc_norm` sums per byte of the choice without that
    space (the harness counts characters, which differ outside ASCII). Ties go to the first choice.

    Sequences are padded on the right to powers of two, so that one compilation serves many
    questions and, for the same function `logits`, later calls. The model must be causal.

    Args:
      logits: `(params, tokens [b, t]) -> [b, t, vocabulary]`.
      max_length: tokens that the model accepts. batch: sequences at a time.
      bos: token before every context, where the tokenizer adds none itself.

    Raises:
      ValueError: no questions, sizes below 1, or, naming the question, a choice that does not fit
        `max_length`, has no tokens, or follows nothing (an empty context without `bos`).
    """
    if not questions:
        raise ValueError("there are no questions")
    if max_length < 1 or batch < 1:
        raise ValueError(f"max_length is {max_length} and batch {batch}; both must be positive")
    requests = []
    for i, question in enumerate(questions):
        for context, choice in zip(question.contexts, question.choices):
            try:
                requests.append(_request(tokenizer, context, choice, max_length, bos))
            except ValueError as error:
                raise ValueError(f"question {i}: {error}") from None
    sums = _score(logits, params, requests, max_length, batch)
    right, right_norm, scores, start = 0, 0, [], 0
    for question in questions:
        found = sums[start : start + len(question.choices)]
        start += len(question.choices)
        lengths = np.asarray([len(choice.encode()) for choice in question.choices])
        right += int(np.argmax(found)) == question.answer
        right_norm += int(np.argmax(found / lengths)) == question.answer
        scores.append(tuple(map(float, found)))
    count = len(questions)
    return MultipleChoiceResult(right / count, right_norm / count, count, tuple(scores))


def read_questions(
    path: str | os.PathLike[str], layout: str, *, labels: str | os.PathLike[str] | None = None
) -> list[Question]:
    """Questions of a JSONL file, one a line.

    Args:
      path: of the file; it is not trusted.
      layout: one of `LAYOUTS`: hellaswag, arc (easy and challenge), piqa, winogrande, openbookqa,
        race; each as its authors or the usual hubs distribute it.
      labels: a file with one label a line, as PIQA has it, instead of a field `label`.

    Raises:
      DatasetError: in one line, with the number of the line that cannot be used.
    """
    if layout not in LAYOUTS:
        raise DatasetError(f"layout is {layout!r}; known are {', '.join(LAYOUTS)}")
    path = Path(path)
    lines = [(i, x) for i, x in enumerate(_read_lines(path), start=1) if x.strip()]
    given = None if labels is None else [x.strip() for x in _read_lines(Path(labels)) if x.strip()]
    if given is not None and len(given) != len(lines):
        raise DatasetError(f"{labels} has {len(given)} labels, {path} {len(lines)} questions")
    questions = []
    for place, (number, line) in enumerate(lines):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{path} line {number} is not JSON") from error
        if not isinstance(record, dict):
            raise DatasetError(f"{path} line {number} is not a JSON object")
        if given is not None:
            record["label"] = given[place]
        try:
            questions.append(LAYOUTS[layout](record))
        except ValueError as error:
            raise DatasetError(f"{path} line {number}: {error}") from error
    if not questions:
        raise DatasetError(f"{path} holds no questions")
    return questions


def _hellaswag(record: Mapping[str, Any]) -> Question:
    start = f"{_text(record, 'activity_label')}: {_text(record, 'ctx_a')}"
    rest = _text(record, "ctx_b", empty=True)
    endings = tuple(_without_marks(text) for text in _texts(record, "endings"))
    answer = _number(record, "label")
    return Question(_without_marks(f"{start} {rest.capitalize()}"), endings, answer)


def _arc(record: Mapping[str, Any]) -> Question:
    stem, choices, answer = _lettered(record, "question")
    return Question(f"Question: {stem}\nAnswer:", choices, answer)


def _openbookqa(record: Mapping[str, Any]) -> Question:
    return Question(*_lettered(record, "question_stem"))


def _piqa(record: Mapping[str, Any]) -> Question:
    choices = (_text(record, "sol1"), _text(record, "sol2"))
    context = f"Question: {_text(record, 'goal')}\nAnswer:"
    return Question(context, choices, _number(record, "label"))


def _winogrande(record: Mapping[str, Any]) -> Question:
    before, blank, after = _text(record, "sentence").partition("_")
    after = after.strip()
    if not blank or not after:
        raise ValueError("field 'sentence' has no '_' with text behind it")
    contexts = tuple(before + _text(record, f"option{i}") for i in (1, 2))
    return Question(contexts, (after, after), _number(record, "answer") - 1)


def _race(record: Mapping[str, Any]) -> Question:
    context = f"Article: {_text(record, 'article')}\n\nQuestion: {_text(record, 'question')}"
    options = _texts(record, "options")
    answer = "ABCDEFGH".find(_text(record, "answer"))
    return Question(f"{context}\nAnswer:", options, answer)


LAYOUTS: Mapping[str, Callable[[Mapping[str, Any]], Question]] = {
    "hellaswag": _hellaswag,
    "arc": _arc,
    "piqa": _piqa,
    "winogrande": _winogrande,
    "openbookqa": _openbookqa,
    "race": _race,
}


def _lettered(record: Mapping[str, Any], stem: str) -> tuple[str, tuple[str, ...], int]:
    """Stem, choices and answer; both layouts that ARC and OpenBookQA come in."""
    nested = record.get("question")
    if isinstance(nested, dict):  # the authors' files: a list of {"text", "label"}
        listed = nested.get("choices")
        if not isinstance(listed, list) or not all(isinstance(c, dict) for c in listed):
            raise ValueError("field 'choices' must be a list of objects")
        text = _text(nested, "stem")
        choices = tuple(_text(c, "text") for c in listed)
        names = tuple(_text(c, "label") for c in listed)
    else:  # the hubs': two lists side by side
        if not isinstance(record.get("choices"), dict):
            raise ValueError("field 'choices' must be an object")
        text = _text(record, stem)
        choices, names = (_texts(record["choices"], name) for name in ("text", "label"))
    key = _text(record, "answerKey").strip()
    if len(choices) != len(names) or key not in names:
        raise ValueError(f"answerKey is {key[:40]!r}; the choices are called {list(names)[:9]}")
    return text, choices, names.index(key)


def _text(record: Mapping[str, Any], name: str, *, empty: bool = False) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not (value.strip() or empty):
        raise ValueError(f"field {name!r} must be a string with text")
    return value


def _texts(record: Mapping[str, Any], name: str) -> tuple[str, ...]:
    values = record.get(name)
    if not isinstance(values, list) or not all(isinstance(v, str) and v.strip() for v in values):
        raise ValueError(f"field {name!r} must be a list of strings with text")
    return tuple(values)


def _number(record: Mapping[str, Any], name: str) -> int:
    value = record.get(name)
    if type(value) is int:
        return value
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,3}", value.strip()):
        return int(value)
    raise ValueError(f"field {name!r} must be the number of a choice")


def _without_marks(text: str) -> str:
    """WikiHow's marks removed, as all evaluations of HellaSwag do."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 text: byte {error.start} is not valid") from error


def _request(
    tokenizer: Tokenizer, context: str, choice: str, max_length: int, bos: int | None
) -> tuple[np.ndarray, int]:
    """Tokens of context and choice, and how many at the end are the choice's."""
    bare = context.rstrip()
    whole = np.asarray(tokenizer.encode(f"{context} {choice}"), np.int32)
    chosen = len(whole) - len(tokenizer.encode(bare))
    if bos is not None:
        whole = np.concatenate([np.asarray([bos], np.int32), whole])
    if chosen < 1:
        raise ValueError(f"choice {choice[:40]!r} has no tokens of its own")
    if chosen == len(whole):
        raise ValueError("the context is empty, and no bos token is given")
    if chosen > max_length:
        raise ValueError(f"choice {choice[:40]!r} has {chosen} tokens; {max_length} are allowed")
    return whole[-(max_length + 1) :], chosen


def _score(
    logits: Logits,
    params: Any,
    requests: Sequence[tuple[np.ndarray, int]],
    max_length: int,
    batch: int,
) -> np.ndarray:
    """The summed log-likelihood of every request."""
    by_length: dict[int, list[int]] = {}
    for i, (tokens, _) in enumerate(requests):
        length = max(SHORTEST, 1 << (len(tokens) - 2).bit_length())
        by_length.setdefault(min(length, max_length), []).append(i)
    sums = np.zeros(len(requests))
    for length, members in sorted(by_length.items()):
        for start in range(0, len(members), batch):
            part = members[start : start + batch]
            windows = np.zeros((batch, length + 1), np.int32)
            counted = np.zeros((batch, length), bool)
            for row, i in enumerate(part):
                tokens, chosen = requests[i]
                windows[row, : len(tokens)] = tokens
                counted[row, len(tokens) - 1 - chosen : len(tokens) - 1] = True
            found = _log_likelihood(logits, params, windows, counted)
            sums[part] = np.asarray(found)[: len(part)]
    return sums


@functools.partial(jax.jit, static_argnums=0)
def _log_likelihood(
    logits: Logits, params: Any, windows: jax.Array, counted: jax.Array
) -> jax.Array:
    log_p = jax.nn.log_softmax(logits(params, windows[:, :-1]).astype(jnp.float32))
    picked = jnp.take_along_axis(log_p, windows[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(counted, picked, 0.0), axis=-1)
