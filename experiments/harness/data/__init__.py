"""Real data without a download and without TensorFlow: sources, text, tokens and batches."""

from experiments.harness.data.arrays import load_arrays
from experiments.harness.data.batches import epoch_batches, validation_windows, window_batches
from experiments.harness.data.builders import PROJECT_DATASETS
from experiments.harness.data.errors import DatasetError
from experiments.harness.data.load import (
    data_dir,
    load_source,
    missing_dataset,
    open_builder,
    prepare,
)
from experiments.harness.data.text import (
    TextCorpus,
    TokenizedText,
    check_length,
    corpus_from_dataset,
    corpus_from_files,
    tokenize,
)
from experiments.harness.data.tokenizers import (
    AsciiTokenizer,
    BytesTokenizer,
    Tokenizer,
    get_tokenizer,
)

__all__ = [
    "PROJECT_DATASETS",
    "AsciiTokenizer",
    "BytesTokenizer",
    "DatasetError",
    "TextCorpus",
    "TokenizedText",
    "Tokenizer",
    "check_length",
    "corpus_from_dataset",
    "corpus_from_files",
    "data_dir",
    "epoch_batches",
    "get_tokenizer",
    "load_arrays",
    "load_source",
    "missing_dataset",
    "open_builder",
    "prepare",
    "tokenize",
    "validation_windows",
    "window_batches",
]
