"""The user's own text files."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from experiments.harness.data.errors import DatasetError

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
_ALLOWED = ".txt, .md, .py or .jsonl"


def expand(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files that the paths name, each once: files as given, folders by path.

    In a folder other suffixes, empty files and hidden files or folders are passed over.
    """
    files: dict[Path, Path] = {}
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            found = _in_folder(path)
            if not found:
                raise DatasetError(f"no {_ALLOWED} file with text in the folder {path}")
        elif not path.exists():
            raise DatasetError(f"no such file or folder: {path}")
        elif path.suffix.lower() not in SUFFIXES:
            raise DatasetError(f"{path}: unknown suffix {path.suffix!r}, give {_ALLOWED} files")
        else:
            found = [path]
        for file in found:
            files.setdefault(file.resolve(), file)
    if not files:
        raise DatasetError(f"no text given: name {_ALLOWED} files, or folders of them")
    return list(files.values())


def read_documents(path: Path) -> list[str]:
    """The documents of a file: its whole text, or one per line of a .jsonl; blank ones left out."""
    text = _read_text(path)
    documents = _records(path, text) if path.suffix.lower() == ".jsonl" else [text]
    return [document for document in documents if document.strip()]


def _in_folder(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
        and path.stat().st_size
    )


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror}") from error
    if not data:
        raise DatasetError(f"{path} is empty")
    if b"\0" in data:
        raise DatasetError(f"{path} is not text: it has NUL bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 text: byte {error.start} is not valid") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _records(path: Path, text: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DatasetError(f"{path} line {number} is not JSON") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise DatasetError(f"{path} line {number} has no field 'text' that is a string")
        documents.append(record["text"])
    return documents
