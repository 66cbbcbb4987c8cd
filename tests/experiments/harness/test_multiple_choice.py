"""Multiple choice: scores against brute force, the boundary of tokens, and other people's files."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.harness import multiple_choice
from experiments.harness.data import BytesTokenizer, DatasetError
from experiments.harness.multiple_choice import Question, evaluate, read_questions
from sparsejax.models import Llama, llama_config

BYTES = BytesTokenizer()
CONFIG = llama_config("laptop", vocab_size=256, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2,
                      d_ff=32, max_seq_len=64, embed_std=1.0)  # fmt: skip
GRAPH, PARAMS = nnx.split(Llama(CONFIG, rngs=nnx.Rngs(0)))
QUESTIONS = [
    Question("The sky is", ("blue", "a very large green dog", "é"), 0),
    Question("Two and two are ", ("four", "five"), 1),
    Question(("The cat", "The mouse"), ("ran away.", "ran away."), 1),
    Question("x" * 60, ("long", "longer"), 0),
]


def logits(params, tokens):
    return nnx.merge(GRAPH, params)(tokens)


def brute_force(context, choice, *, length=64, tokenizer=BYTES):
    """The definition, one unpadded sequence at a time."""
    stripped = context.rstrip()
    choice = context[len(stripped) :] + " " + choice
    whole = list(tokenizer.encode(stripped + choice))
    first = len(tokenizer.encode(stripped))
    dropped = max(0, len(whole) - length - 1)
    tokens = np.asarray(whole[dropped:], np.int32)
    out = np.asarray(logits(PARAMS, jnp.asarray(tokens[None, :-1])), np.float64)[0]
    log_p = out - np.log(np.exp(out).sum(-1, keepdims=True))
    return sum(log_p[i - 1, tokens[i]] for i in range(first - dropped, len(tokens)))


@pytest.fixture(scope="module")
def result():
    return evaluate(logits, PARAMS, BYTES, QUESTIONS, max_length=64, batch=4)


def test_scores_are_those_of_brute_force(result):
    wanted = [
        [brute_force(context, choice) for context, choice in zip(q.contexts, q.choices)]
        for q in QUESTIONS
    ]
    for scores, exact in zip(result.scores, wanted, strict=True):
        np.testing.assert_allclose(scores, exact, rtol=1e-5)
    plain = [int(np.argmax(s)) == q.answer for s, q in zip(wanted, QUESTIONS)]
    per_byte = [
        int(np.argmax([x / len(c.encode()) for x, c in zip(s, q.choices)])) == q.answer
        for s, q in zip(wanted, QUESTIONS)
    ]
    assert plain != per_byte  # the questions tell the two apart
    assert (result.acc, result.acc_norm) == (np.mean(plain), np.mean(per_byte))
    assert result.count == 4
    assert result.standard_error == pytest.approx((result.acc * (1 - result.acc) / 3) ** 0.5)


def test_batches_and_order_change_nothing_and_compile_nothing_new(result):
    before = multiple_choice._log_likelihood._cache_size()
    turned = evaluate(logits, PARAMS, BYTES, QUESTIONS[::-1], max_length=64, batch=4)
    for scores, other in zip(result.scores, turned.scores[::-1], strict=True):
        np.testing.assert_allclose(scores, other, rtol=1e-6)
    assert multiple_choice._log_likelihood._cache_size() == before
    many = [Question("y" * n, ("a", "bb"), 0) for n in range(1, 60)]
    evaluate(logits, PARAMS, BYTES, many, max_length=64, batch=4)
    assert multiple_choice._log_likelihood._cache_size() == before  # lengths 32 and 64, no more


def test_a_sure_model_is_right_and_an_unsure_one_takes_the_first():
    def next_byte(params, tokens):  # certain that each byte follows the one before it
        return params * jax.nn.one_hot(tokens + 1, 256)

    alphabet = [Question("a", ("xzx", "bcd"), 1), Question("b", ("$%&", "acb"), 0)]
    sure = evaluate(next_byte, jnp.float32(9), BYTES, alphabet, max_length=32, batch=4)
    assert (sure.acc, sure.acc_norm) == (1.0, 1.0)
    flat = evaluate(next_byte, jnp.float32(0), BYTES, alphabet, max_length=32, batch=4)
    assert flat.acc == 0.5
    assert flat.scores[0] == pytest.approx([-4 * np.log(256)] * 2)  # the space counts too


class Words:
    """A tokenizer whose words swallow the space before them."""

    name, vocab_size = "words", 256

    def encode(self, text):
        pieces = re.findall(r" ?\w+|\W", text)
        return np.asarray([sum(piece.encode()) % 256 for piece in pieces], np.int32)

    def decode(self, tokens):
        return str(tokens)


def test_tokens_are_split_where_the_context_alone_ends():
    words = Words()
    for context in ("Two and two are", "Two and two are ", "Two and two are  "):
        question = Question(context, ("four", "five or six"), 0)
        found = evaluate(logits, PARAMS, words, [question], max_length=64, batch=4).scores[0]
        wanted = [brute_force(context, c, tokenizer=words) for c in question.choices]
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    bare = evaluate(logits, PARAMS, words, [Question("", ("a", "b"), 0)], max_length=64, batch=4,
                    bos=7)  # fmt: skip
    row = np.asarray(logits(PARAMS, jnp.asarray([[7]])), np.float64)[0, 0]
    log_p = row - np.log(np.exp(row).sum())
    picked = [log_p[words.encode(f" {c}")[0]] for c in "ab"]
    np.testing.assert_allclose(bare.scores[0], picked, rtol=1e-5)


def test_what_cannot_be_scored_is_refused():
    def run(*questions, **options):
        evaluate(logits, PARAMS, BYTES, questions, **{"max_length": 64, **options})

    with pytest.raises(ValueError, match="there are no questions"):
        run()
    with pytest.raises(ValueError, match="max_length is 0 and batch 16; both must be positive"):
        run(QUESTIONS[0], max_length=0)
    with pytest.raises(ValueError, match=r"question 1: choice 'five' has 5 tokens; 4 are allowed"):
        run(Question("a", ("b", "c"), 0), Question("a", ("b", "five"), 0), max_length=4)
    with pytest.raises(ValueError, match="question 0: the context is empty, and no bos token"):
        run(Question(" ", ("a", "b"), 0))
    for arguments, message in (
        (("c", ("a",), 0), "give two or more, none empty"),
        (("c", ("a", ""), 0), "give two or more, none empty"),
        (("c", ("a", "b"), 2), "answer is 2; there are 2 choices"),
        (("c", ("a", "b"), -1), "answer is -1; there are 2 choices"),
        ((("c",), ("a", "b"), 0), "1 contexts for 2 choices"),
    ):
        with pytest.raises(ValueError, match=message):
            Question(*arguments)


# files


LETTERS = {"text": ["one", "two", "three"], "label": ["A", "B", "C"]}
LISTED = [{"text": t, "label": n} for t, n in zip(LETTERS["text"], "123")]
GOOD = [
    (
        "hellaswag",
        {"activity_label": "Roof removal", "ctx_a": "A man sits. [header] He", "ctx_b": "he is",
         "endings": ["starts [step] now.", "b", "c", "d"], "label": "2"},
        Question("Roof removal: A man sits. He He is", ("starts now.", "b", "c", "d"), 2),
    ),
    (
        "hellaswag",
        {"activity_label": "X", "ctx_a": "How to [title] do.", "ctx_b": "", "label": 0,
         "endings": ["a", "b"]},
        Question("X: How to. do.", ("a", "b"), 0),
    ),
    (
        "arc",
        {"question": {"stem": "Which?", "choices": LISTED}, "answerKey": "3"},
        Question("Question: Which?\nAnswer:", ("one", "two", "three"), 2),
    ),
    (
        "arc",
        {"question": "Which?", "choices": LETTERS, "answerKey": "B"},
        Question("Question: Which?\nAnswer:", ("one", "two", "three"), 1),
    ),
    (
        "openbookqa",
        {"question_stem": "The sun is", "choices": LETTERS, "answerKey": " A"},
        Question("The sun is", ("one", "two", "three"), 0),
    ),
    (
        "openbookqa",
        {"question": {"stem": "The sun is", "choices": LISTED}, "answerKey": "1"},
        Question("The sun is", ("one", "two", "three"), 0),
    ),
    (
        "piqa",
        {"goal": "open a jar", "sol1": "twist", "sol2": "shout", "label": 1},
        Question("Question: open a jar\nAnswer:", ("twist", "shout"), 1),
    ),
    (
        "winogrande",
        {"sentence": "The cup did not fit because _ was big.", "option1": "the cup",
         "option2": "the box", "answer": "2"},
        Question(("The cup did not fit because the cup", "The cup did not fit because the box"),
                 ("was big.", "was big."), 1),
    ),
    (
        "race",
        {"article": "Tom ran.", "question": "Who ran?", "options": ["Tom", "Tim"], "answer": "A"},
        Question("Article: Tom ran.\n\nQuestion: Who ran?\nAnswer:", ("Tom", "Tim"), 0),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "record", "question"), GOOD)
def test_layouts(tmp_path, layout, record, question):
    path = tmp_path / "q.jsonl"
    path.write_text(f"{json.dumps(record)}\n\n{json.dumps(record)}\n")
    assert read_questions(path, layout) == [question] * 2


def test_labels_in_a_file_of_their_own(tmp_path):
    record = {key: GOOD[6][1][key] for key in ("goal", "sol1", "sol2")}
    path, labels = tmp_path / "valid.jsonl", tmp_path / "labels.lst"
    path.write_bytes(b"\xef\xbb\xbf" + f"{json.dumps(record)}\r\n{json.dumps(record)}".encode())
    labels.write_text("1\n0\n")
    assert [q.answer for q in read_questions(path, "piqa", labels=labels)] == [1, 0]
    labels.write_text("1\n")
    with pytest.raises(DatasetError, match=r"labels.lst has 1 labels, .*valid.jsonl 2 questions"):
        read_questions(path, "piqa", labels=labels)


def changed(number, **fields):
    return json.dumps({**GOOD[number][1], **fields})


@pytest.mark.parametrize(
    ("layout", "line", "message"),
    [
        ("arc", "{", "is not JSON"),
        ("arc", "[" * 100_000, "is not JSON"),
        ("arc", "3", "is not a JSON object"),
        ("arc", "{}", "field 'choices' must be an object"),
        ("arc", changed(2, question={"stem": "x", "choices": 3}), "must be a list of objects"),
        ("arc", changed(2, answerKey="9"), "answerKey is '9'; the choices are called"),
        ("arc", changed(3, choices={"text": ["a"], "label": []}), "answerKey is 'B'"),
        ("arc", changed(3, question=3), "field 'question' must be a string with text"),
        ("hellaswag", changed(0, endings=["a", 3]), "'endings' must be a list of strings"),
        ("hellaswag", changed(0, label="x"), "field 'label' must be the number of a choice"),
        ("hellaswag", changed(0, label=""), "field 'label' must be the number of a choice"),
        ("hellaswag", changed(0, label="9" * 5000), "field 'label' must be the number"),
        ("hellaswag", changed(0, label=True), "field 'label' must be the number of a choice"),
        ("hellaswag", changed(0, label=4), "answer is 4; there are 4 choices"),
        ("hellaswag", changed(0, endings=["[a]", "b"], label=0), "give two or more, none empty"),
        ("piqa", changed(6, goal=" "), "field 'goal' must be a string with text"),
        ("winogrande", changed(7, sentence="no blank"), "'sentence' has no '_' with text behind"),
        ("winogrande", changed(7, answer="0"), "answer is -1; there are 2 choices"),
        ("race", changed(8, answer="D"), "answer is 3; there are 2 choices"),
    ],
)
def test_bad_lines_are_named(tmp_path, layout, line, message):
    good = next(json.dumps(record) for name, record, _ in GOOD if name == layout)
    path = tmp_path / "q.jsonl"
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(DatasetError, match=re.escape(message)) as caught:
        read_questions(path, layout)
    assert str(caught.value).startswith(f"{path} line 2")
    assert "\n" not in str(caught.value)


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "q.jsonl"
    with pytest.raises(DatasetError, match=r"cannot read .*q.jsonl: No such file"):
        read_questions(path, "arc")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DatasetError, match=r"q.jsonl is not UTF-8 text: byte 0 is not valid"):
        read_questions(path, "arc")
    path.write_text("\n \n")
    with pytest.raises(DatasetError, match=r"q.jsonl holds no questions"):
        read_questions(path, "arc")
    with pytest.raises(DatasetError, match="layout is 'boolq'; known are hellaswag, arc, piqa"):
        read_questions(path, "boolq")
