"""Datasets, texts, tokenizers and batches; nothing is written outside a temporary folder."""

import dataclasses
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.harness import data
from experiments.harness.data.__main__ import main
from experiments.harness.data.builders import PROJECT_DATASETS

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(autouse=True)
def _environment(data_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEJAX_DATA", str(data_folder))
    monkeypatch.setenv("HOME", str(tmp_path))
    yield
    assert not (tmp_path / ".cache").exists()


@pytest.fixture(scope="session")
def foreign(tmp_path_factory):
    """A folder of prepared datasets whose classes are nowhere: `fables` and `tales/{en,fr}`."""
    import tensorflow_datasets as tfds

    class Base(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.2.0")

        def _info(self):
            features = {"text": tfds.features.Text(), "numbers": tfds.features.Sequence(np.int32)}
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {name: self._generate_examples(name, n) for name, n in self.sizes.items()}

        def _generate_examples(self, split, count):
            for index in range(count):
                text = f"{split} document {index:02d}"
                yield index, {"text": text, "numbers": list(range(index))}

    class Fables(Base, skip_registration=True):
        name = "fables"
        sizes = {"train": 20, "test": 5}  # noqa: RUF012

    class Tales(Base, skip_registration=True):
        name = "tales"
        sizes = {"train": 30}  # noqa: RUF012
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("en", "fr")]  # noqa: RUF012

    folder = tmp_path_factory.mktemp("foreign")
    tfds.disable_progress_bar()
    offline = tfds.download.DownloadConfig(try_download_gcs=False)
    for builder in (
        Fables(data_dir=folder, file_format="array_record"),
        Tales(config="en", data_dir=folder, file_format="array_record"),
        Tales(config="fr", data_dir=folder, file_format="array_record"),
    ):
        builder.download_and_prepare(download_config=offline)
    return folder


def error_of(function, *arguments, **options):
    """The message of the one-line error that a call raises."""
    with pytest.raises(data.DatasetError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def run(code, **environment):
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=env, capture_output=True, text=True
    )


# The package


def test_import_is_light():
    result = run(
        "import sys, experiments.harness.data\n"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'grain', 'jax', 'sklearn', 'skimage'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_all_names_exist():
    assert all(hasattr(data, name) for name in data.__all__)
    assert list(data.__all__) == sorted(data.__all__, key=lambda n: (not n.isupper(), n))


def test_data_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEJAX_DATA", "~/sets")
    assert data.data_dir() == tmp_path / "sets"
    monkeypatch.delenv("SPARSEJAX_DATA")
    assert data.data_dir() == tmp_path / ".cache/sparsejax/datasets"


# Our datasets


@pytest.mark.parametrize("name", PROJECT_DATASETS)
def test_table_agrees_with_builder(name):
    dataset = PROJECT_DATASETS[name]
    builder_class = dataset.builder_class()
    assert builder_class.name == name
    assert tuple(config.name for config in builder_class.BUILDER_CONFIGS) == dataset.configs
    assert tuple(data.open_builder(name).info.splits) == dataset.splits


def test_small_digits():
    from sklearn.datasets import load_digits

    values = load_digits().images
    train = data.load_arrays("small_digits", "train")
    test = data.load_arrays("small_digits/8x8", "test")
    assert train["image"].shape == (1437, 8, 8, 1)
    assert test["image"].shape == (360, 8, 8, 1)
    assert train["image"].dtype == np.uint8
    images = np.concatenate([train["image"], test["image"]])
    np.testing.assert_array_equal(images[..., 0] // 15, values)
    np.testing.assert_array_equal(images % 15, 0)
    labels = np.concatenate([train["label"], test["label"]])
    np.testing.assert_array_equal(labels, load_digits().target)


def test_small_digits_enlarged():
    small = data.load_arrays("small_digits/8x8", "test[:40]")["image"]
    large = data.load_arrays("small_digits/32x32", "test[:40]")["image"]
    assert large.shape == (40, 32, 32, 1)
    np.testing.assert_array_equal(large, np.kron(small, np.ones((1, 4, 4, 1), np.uint8)))


def test_photo_patches_hold_out_whole_photos():
    from experiments.harness.data.builders.photo_patches import PHOTOS, TEST_PHOTOS, photo

    train = data.load_arrays("photo_patches", "train")
    test = data.load_arrays("photo_patches", "test")
    assert train["image"].shape[1:] == (32, 32, 3)
    assert 1000 < len(train["label"]) < 3000
    assert len(test["label"]) > 300
    held_out = {PHOTOS.index(name) for name in TEST_PHOTOS}
    assert set(test["label"].tolist()) == held_out
    assert set(train["label"].tolist()) == set(range(len(PHOTOS))) - held_out
    np.testing.assert_array_equal(train["image"][0], photo("astronaut")[:32, :32])
    np.testing.assert_array_equal(test["image"][1], photo("china")[:32, 32:64])


def test_photo_crops_of_64_pixels_are_a_spread_grid():
    from experiments.harness.data.builders.photo_patches import crops

    image = np.arange(1000 * 1000 * 3).reshape(1000, 1000, 3)
    found = list(crops(image, 64))
    assert len(found) == 256
    assert all(crop.shape == (64, 64, 3) for crop in found)
    np.testing.assert_array_equal(found[0], image[:64, :64])
    np.testing.assert_array_equal(found[-1], image[928:992, 928:992])
    assert len(list(crops(image[:100, :130], 64))) == 2 * 3


def test_python_text_topics():
    from pydoc_data.topics import topics

    records = [
        record
        for split in ("train", "validation")
        for record in data.load_source("python_text", split)
    ]
    assert [record["name"].decode() for record in records] == sorted(topics)
    assert all(r["text"].decode() == topics[r["name"].decode()] for r in records)
    assert len(data.load_source("python_text/topics", "validation")) == round(len(topics) / 10)


def test_python_text_source():
    train = data.load_source("python_text/source", "train")
    validation = data.load_source("python_text/source", "validation")
    names = [
        source[i]["name"].decode() for source in (train, validation) for i in range(len(source))
    ]
    assert len(names) > 400
    assert names == sorted(names)
    assert "json/decoder.py" in names
    assert not [n for n in names if re.search(r"(^|/)(tests?|idle_test|site-packages)/", n)]
    decoder = train[names.index("json/decoder.py")]["text"].decode()
    assert decoder == Path(json.decoder.__file__).read_text("utf-8")
    assert len(validation) == round(len(names) / 10)


def test_source_slices_and_batched_reads():
    source = data.load_source("small_digits", "train[:10%]")
    assert len(source) == 144
    first, third = source.__getitems__([0, 2])
    assert first["label"] == source[0]["label"]
    np.testing.assert_array_equal(third["image"], source[2]["image"])


def test_prepare_is_silent_and_leaves_only_the_dataset(tmp_path, capfd):
    folder = data.prepare("python_text", data_dir=tmp_path / "new")
    assert data.load_source("small_digits", "test", data_dir=tmp_path / "new")[0]["label"] == 2
    assert capfd.readouterr() == ("", "")
    assert folder.parent == tmp_path / "new/python_text/topics"
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["python_text", "small_digits"]
    assert data.prepare("python_text/topics", data_dir=tmp_path / "new") == folder


def test_two_processes_prepare_at_once(tmp_path):
    code = (
        "from experiments.harness import data\n"
        "print(len(data.load_source('small_digits', 'train', data_dir={folder!r})))"
    ).format(folder=str(tmp_path / "sets"))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, env=env, **pipes) for _ in range(2)]
    for process in running:
        out, err = process.communicate()
        assert (out, err) == ("1437\n", "")
    assert [path.name for path in (tmp_path / "sets").iterdir()] == ["small_digits"]


def test_the_second_builder_takes_the_first_ones_result(tmp_path):
    from experiments.harness.data import load

    folder = data.prepare("small_digits", data_dir=tmp_path)
    before = (folder / "dataset_info.json").stat().st_mtime_ns
    load._build(PROJECT_DATASETS["small_digits"].builder_class(), "8x8", folder, tmp_path)
    assert (folder / "dataset_info.json").stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == ["small_digits"]


def test_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    builder_class = PROJECT_DATASETS["small_digits"].builder_class()

    def interrupted(self, images, labels):
        yield from ()
        raise KeyboardInterrupt

    monkeypatch.setattr(builder_class, "_generate_examples", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.prepare("small_digits", data_dir=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.name for path in tmp_path.iterdir()] == ["small_digits"]
    monkeypatch.undo()
    assert len(data.load_source("small_digits", "test", data_dir=tmp_path)) == 360


def test_tensorflow_is_never_imported(data_folder, tmp_path):
    """Not even where it could be: a stand-in package would leave a mark."""
    (tmp_path / "tensorflow").mkdir()
    mark = tmp_path / "imported"
    (tmp_path / "tensorflow/__init__.py").write_text(f"open({str(mark)!r}, 'w').close()")
    result = run(
        "import sys\n"
        "from experiments.harness import data\n"
        "for name in data.PROJECT_DATASETS:\n"
        "    data.load_source(name, 'train')[0]\n"
        "try: data.load_source('no_such_set', 'train')\n"
        "except data.DatasetError: print('tensorflow' in sys.modules)",
        PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)]),
        SPARSEJAX_DATA=str(data_folder),
    )
    assert result.stdout == "False\n", result.stderr
    assert not mark.exists()


# Other TFDS names


def test_prepared_dataset_is_read_without_its_class(foreign):
    for name in ("fables", "fables:1.2.0"):
        source = data.load_source(name, "test", data_dir=foreign)
        assert [record["text"] for record in source][-1] == b"test document 04"
    assert len(data.load_source("tales/fr", "train", data_dir=foreign)) == 30


def test_newest_version_is_read(foreign, tmp_path):
    shutil.copytree(foreign / "fables", tmp_path / "fables")
    shutil.copytree(foreign / "fables/1.2.0", tmp_path / "fables/1.10.0")
    info = tmp_path / "fables/1.10.0/dataset_info.json"
    info.write_text(info.read_text().replace('"1.2.0"', '"1.10.0"'))
    assert str(data.open_builder("fables", data_dir=tmp_path).info.version) == "1.10.0"
    assert str(data.open_builder("fables:1.2.0", data_dir=tmp_path).info.version) == "1.2.0"


def test_configuration_left_out(foreign, tmp_path):
    shutil.copytree(foreign / "tales/fr", tmp_path / "tales/fr")
    assert len(data.load_source("tales", "train", data_dir=tmp_path)) == 30
    shutil.copytree(foreign / "tales/en", tmp_path / "tales/en")
    message = error_of(data.load_source, "tales", "train", data_dir=tmp_path)
    assert message == (
        "dataset 'tales' is prepared in 2 configurations; name one: tales/en, tales/fr"
    )
    (tmp_path / "tales/.config").mkdir()
    (tmp_path / "tales/.config/metadata.json").write_text('{"default_config_name": "fr"}')
    assert data.open_builder("tales", data_dir=tmp_path).info.config_name == "fr"


def test_tfrecord_says_how_to_convert(foreign, tmp_path):
    folder = tmp_path / "fables/1.2.0"
    shutil.copytree(foreign / "fables/1.2.0", folder)
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    message = error_of(data.load_source, "fables", "train", data_dir=tmp_path)
    assert message == (
        f"dataset 'fables' in {folder} is not in array_record form; convert it once with"
        f" tensorflow-cpu installed: tfds convert_format --dataset_version_dir={folder}"
        " --out_file_format=array_record"
    )


@pytest.mark.parametrize("name", ["lm1b", "c4/en", "coco/2017", "wiki40b/en"])
def test_known_dataset_says_how_to_prepare_it(name, data_folder):
    assert error_of(data.load_source, name, "train") == (
        f"dataset {name!r} is not prepared in {data_folder}; prepare it once with tensorflow-cpu"
        " installed: pip install tensorflow-cpu tensorflow-datasets array_record && python -c"
        f" \"import tensorflow_datasets as tfds; tfds.builder('{name}', data_dir='{data_folder}',"
        " file_format='array_record').download_and_prepare()\" (or copy a prepared folder there,"
        " or set SPARSEJAX_DATA to where it is)"
    )


def test_hugging_face_bridge_needs_datasets_too():
    message = error_of(data.load_source, "huggingface:wikitext/wikitext-2-raw-v1", "train")
    assert "tensorflow-cpu tensorflow-datasets array_record datasets &&" in message


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("smal_digits", "train", r"unknown dataset 'smal_digits'; did you mean small_digits.*\?"),
        ("mnst", "train", r"unknown dataset 'mnst'; did you mean mnist or .*\?"),
        (
            "qqqqqq",
            "train",
            "unknown dataset 'qqqqqq'; ours are python_text, small_digits, photo_patches",
        ),
        ("a b", "train", "'a b' is not a dataset name: write name, name/config or name:1.0.0"),
        (
            "wiki40b/eng",
            "train",
            r"dataset 'wiki40b' has no configuration 'eng'; did you mean en\?",
        ),
        ("lm1b/x", "train", "dataset 'lm1b' has no configuration 'x'; it has no configurations"),
        (
            "python_text/topic",
            "train",
            "dataset 'python_text' has no configuration 'topic': it has topics, source",
        ),
        ("small_digits:9.0.0", "train", "dataset 'small_digits' is at version 1.0.0, not 9.0.0"),
        (
            "small_digits",
            "validation",
            "dataset 'small_digits' has no split 'validation': it has train, test",
        ),
        (
            "small_digits",
            "tran",
            r"dataset 'small_digits' has no split 'tran'; did you mean train\?",
        ),
        ("small_digits", "train[", r"cannot read 'train\[' of dataset 'small_digits': .*parsing.*"),
    ],
)
def test_bad_names(name, split, message):
    assert re.fullmatch(message, error_of(data.load_source, name, split))


def test_data_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = error_of(data.prepare, "small_digits", data_dir=tmp_path / "file")
    assert message == (
        f"cannot write dataset 'small_digits' to {tmp_path / 'file'} (Not a directory);"
        " set SPARSEJAX_DATA to a folder that can be written"
    )


def test_folder_without_dataset_in_the_way(tmp_path):
    (tmp_path / "small_digits/8x8/1.0.0/other").mkdir(parents=True)
    message = error_of(data.prepare, "small_digits", data_dir=tmp_path)
    assert message.startswith(f"cannot write dataset 'small_digits' to {tmp_path} (")


def test_missing_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert error_of(data.prepare, "small_digits", data_dir=tmp_path) == (
        "building dataset 'small_digits' needs the module sklearn.datasets:"
        " pip install 'sparsejax[experiments]'"
    )
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert error_of(data.load_source, "small_digits", "train") == (
        "datasets need the package tensorflow_datasets: pip install 'sparsejax[experiments]'"
    )


def test_load_arrays(foreign):
    texts = data.load_arrays("python_text", "validation")["text"]
    assert texts.dtype == object
    assert isinstance(texts[0], bytes)
    assert error_of(data.load_arrays, "fables", "train", data_dir=foreign) == (
        "feature 'numbers' of dataset 'fables' differs in shape from record to record:"
        " read it with load_source"
    )
    message = error_of(data.load_arrays, "fables", "train[:0]", data_dir=foreign)
    assert message.startswith("cannot read 'train[:0]' of dataset 'fables': ")


# Text


def test_corpus_from_our_dataset():
    corpus = data.corpus_from_dataset("python_text")
    assert corpus.name == "python_text"
    assert corpus.train[0].startswith('The "assert" statement')
    assert len(corpus.validation) == len(data.load_source("python_text", "validation"))


def test_corpus_from_dataset_splits(foreign):
    corpus = data.corpus_from_dataset("fables", data_dir=foreign)
    assert len(corpus.train) == 20
    assert corpus.validation == tuple(f"test document {i:02d}" for i in range(5))
    corpus = data.corpus_from_dataset("tales/en", data_dir=foreign)
    assert corpus.train[-1] == "train document 26"
    assert corpus.validation == tuple(f"train document {i}" for i in (27, 28, 29))


def test_corpus_from_dataset_is_bounded(foreign):
    corpus = data.corpus_from_dataset("fables", max_bytes=100, data_dir=foreign)
    assert (
        "".join(corpus.train).encode()
        == b"".join(f"train document {i:02d}".encode() for i in range(20))[:90]
    )
    assert corpus.validation == ("test docum",)
    corpus = data.corpus_from_dataset("tales/en", max_bytes=170, data_dir=foreign)
    assert len(corpus.train) == 9
    assert corpus.validation == ("train document 09",)
    one = data.corpus_from_dataset("tales/en", max_bytes=10, data_dir=foreign)
    assert (one.train, one.validation) == (("train doc",), ("u",))


def test_corpus_from_dataset_errors(foreign):
    assert error_of(data.corpus_from_dataset, "small_digits") == (
        "dataset 'small_digits' has no feature 'text': it has image, label"
    )
    assert error_of(data.corpus_from_dataset, "small_digits", text_key="label") == (
        "feature 'label' of dataset 'small_digits' is not text"
    )
    assert error_of(data.corpus_from_dataset, "fables", max_bytes=3, data_dir=foreign) == (
        "max_bytes is 3: it must be 10 or more"
    )


def write(folder, **files):
    """Files by name, `_` for the dot; the paths."""
    paths = []
    for name, content in files.items():
        path = folder / name.replace("_", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        paths.append(path)
    return paths


def test_corpus_from_one_file_splits_at_a_paragraph(tmp_path):
    paragraphs = [f"Paragraph {i:03d}.\nIts second line." for i in range(100)]
    [path] = write(tmp_path, a_txt="\n\n".join(paragraphs).replace("\n", "\r\n"))
    corpus = data.corpus_from_files(path)
    assert corpus.name == str(path)
    [train], [validation] = corpus.train, corpus.validation
    assert train + validation == "\n\n".join(paragraphs)
    assert train.endswith(".\n\n")
    assert validation.startswith("Paragraph 0")
    assert 0.1 <= len(validation) / (len(train) + len(validation)) <= 0.15


def test_corpus_from_one_file_without_paragraphs(tmp_path):
    lines, solid = write(tmp_path, a_py="x = 1\n" * 100, b_md="é" * 50)
    corpus = data.corpus_from_files([lines])
    assert corpus.validation[0].startswith("x = 1\n")
    corpus = data.corpus_from_files(str(solid))
    assert (corpus.train, corpus.validation) == (("é" * 45,), ("é" * 5,))


def test_corpus_from_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / ".hidden").mkdir()
    write(tmp_path / ".hidden", h_txt="hidden")
    write(tmp_path / "deep", z_md="last")
    write(
        tmp_path, picture_png=b"\0\0", empty_py="", **{f"f{i}_txt": f"text {i}" for i in range(10)}
    )
    write(tmp_path, records_jsonl='{"text": "one"}\n\n{"text": "two", "other": 1}\n')
    corpus = data.corpus_from_files([tmp_path, tmp_path / "f0.txt"])
    assert corpus.name == "12 files"
    assert corpus.train == ("last", *(f"text {i}" for i in range(10)))
    assert corpus.validation == ("one", "two")


def test_corpus_from_jsonl_holds_out_records(tmp_path):
    [path] = write(tmp_path, a_jsonl="".join(f'{{"text": "record {i}"}}\n' for i in range(30)))
    corpus = data.corpus_from_files(path)
    assert len(corpus.train) == 27
    assert corpus.validation == ("record 27", "record 28", "record 29")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "{path} is empty"),
        ("a.txt", b"  \n\n ", "no text in {path}"),
        ("a.txt", b"text\0more", "{path} is not text: it has NUL bytes"),
        ("a.md", b"caf\xe9 au lait", "{path} is not UTF-8 text: byte 3 is not valid"),
        (
            "a.pdf",
            b"%PDF",
            "{path}: unknown suffix '.pdf', give .txt, .md, .py or .jsonl files",
        ),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": 1}',
            "{path} line 2 has no field 'text' that is a string",
        ),
        ("a.jsonl", b'{"text": 3}', "{path} line 1 has no field 'text' that is a string"),
        ("a.jsonl", b"[1]", "{path} line 1 has no field 'text' that is a string"),
        ("a.jsonl", b'\n{"text": "x"', "{path} line 2 is not JSON"),
        ("a.jsonl", b'{"text": " "}', "no text in {path}"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    assert error_of(data.corpus_from_files, [path]) == message.format(path=path)


def test_bad_paths(tmp_path):
    missing = tmp_path / "nothing.txt"
    assert error_of(data.corpus_from_files, missing) == f"no such file or folder: {missing}"
    assert error_of(data.corpus_from_files, tmp_path) == (
        f"no .txt, .md, .py or .jsonl file with text in the folder {tmp_path}"
    )
    assert error_of(data.corpus_from_files, []) == (
        "no text given: name .txt, .md, .py or .jsonl files, or folders of them"
    )
    paths = write(tmp_path, a_txt="text", b_txt="  \n")
    assert error_of(data.corpus_from_files, paths) == (f"no text in the held-out files: {paths[1]}")
    assert (
        error_of(data.corpus_from_files, paths[::-1]) == f"no text in the first files: {paths[1]}"
    )


# Tokenizers


@pytest.mark.parametrize(("name", "size"), [("ascii", 128), ("bytes", 256)])
def test_tokenizers(name, size):
    tokenizer = data.get_tokenizer(name)
    assert (tokenizer.name, tokenizer.vocab_size) == (name, size)
    text = "def f(x):\n\treturn 'x'\n"
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.uint8
    assert len(tokens) == len(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decode(tokens.astype(np.int32)) == text
    assert tokenizer.decode(tokenizer.encode("")) == ""
    assert tokenizer.encode("naïve \ud800 \N{GRINNING FACE}").max() < size
    assert "?" in tokenizer.decode(np.array([[-1, 65], [1000, 66]]))
    assert isinstance(tokenizer.decode(np.arange(256)[::-1]), str)
    with pytest.raises(dataclasses.FrozenInstanceError):
        tokenizer.vocab_size = 3  # type: ignore[misc]


def test_tokenizers_beyond_ascii():
    text = "naïve – 😀"
    ascii_tokens = data.get_tokenizer("ascii").encode(text)
    assert data.get_tokenizer("ascii").decode(ascii_tokens) == "na?ve ? ?"
    byte_tokens = data.get_tokenizer("bytes").encode(text)
    assert data.get_tokenizer("bytes").decode(byte_tokens) == text
    assert (
        data.get_tokenizer("bytes").decode(byte_tokens[:-1]) == "naïve – \N{REPLACEMENT CHARACTER}"
    )


def test_unknown_tokenizer():
    assert error_of(data.get_tokenizer, "bpe") == (
        "unknown tokenizer 'bpe': choose one of ascii, bytes"
    )


def test_tokenize_joins_documents_by_a_blank_line():
    tokenizer = data.get_tokenizer("bytes")
    text = data.tokenize(data.TextCorpus(("one", "two"), ("three",), "numbers"), tokenizer)
    assert tokenizer.decode(text.train) == "one\n\ntwo"
    assert tokenizer.decode(text.validation) == "three"
    assert (text.vocab_size, text.tokenizer, text.name) == (256, "bytes", "numbers")


def test_check_length():
    tokenizer = data.get_tokenizer("ascii")
    text = data.tokenize(data.TextCorpus(("x" * 20,), ("y" * 9,), "tiny"), tokenizer)
    data.check_length(text, seq_len=8, batch=12)
    assert error_of(data.check_length, text, seq_len=8, batch=13) == (
        "tiny: the train text has 20 tokens, a batch of 13 windows of 8 + 1 tokens needs 21:"
        " give more text, or a shorter sequence or a smaller batch"
    )
    assert error_of(data.check_length, text, seq_len=9, batch=1) == (
        "tiny: the validation text has 9 tokens, a window of 9 + 1 tokens needs 10:"
        " give more text, or a shorter sequence or a smaller batch"
    )


# Batches


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_windows_are_the_texts_own():
    tokens = np.arange(1000, dtype=np.uint16)
    batch = next(data.window_batches(tokens, seq_len=7, batch=5, seed=0))
    assert batch.shape == (5, 8)
    assert batch.dtype == np.int32
    np.testing.assert_array_equal(batch, batch[:, :1] + np.arange(8))
    assert batch.flags.writeable


def test_every_offset_once_per_epoch():
    tokens = np.arange(67)
    batches = data.window_batches(tokens, seq_len=7, batch=5, seed=3)
    starts = np.concatenate(take(batches, 36))[:, 0]
    first, second, third = np.split(starts, 3)
    for epoch in (first, second, third):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(60))
    assert not np.array_equal(first, second)


def test_seeds():
    tokens = np.arange(500)
    runs = {
        seed: np.stack(take(data.window_batches(tokens, seq_len=4, batch=8, seed=seed), 4))
        for seed in range(4)
    }
    again = np.stack(take(data.window_batches(tokens, seq_len=4, batch=8, seed=2), 4))
    np.testing.assert_array_equal(runs[2], again)
    assert len({run.tobytes() for run in runs.values()}) == 4


def test_shards_make_up_the_whole_batch():
    tokens = np.arange(500)
    whole = take(data.window_batches(tokens, seq_len=4, batch=12, seed=1), 100)
    parts = [
        take(data.window_batches(tokens, seq_len=4, batch=4, seed=1, shard=(i, 3)), 100)
        for i in range(3)
    ]
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([part[step] for part in parts]), batch)


def window_iterator():
    return data.window_batches(np.arange(300), seq_len=6, batch=4, seed=5)


def epoch_iterator():
    arrays = {"x": np.random.default_rng(0).normal(size=(30, 3)), "y": np.arange(30)}
    return data.epoch_batches(arrays, batch=4, seed=5)


@pytest.mark.parametrize("make", [window_iterator, epoch_iterator])
def test_state_restores_the_following_batches(make):
    iterator = make()
    take(iterator, 23)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 60)
    restored = make()
    take(restored, 2)
    restored.set_state(state)
    for left, right in zip(expected, take(restored, 60), strict=True):
        left, right = (b if isinstance(b, dict) else {"tokens": b} for b in (left, right))
        assert left.keys() == right.keys()
        assert all(left[key].tobytes() == right[key].tobytes() for key in left)
    iterator.set_state(state)
    again = next(iterator)
    first = expected[0]
    for key in first if isinstance(first, dict) else [...]:
        np.testing.assert_array_equal(again[key], first[key])


def test_window_batches_are_fast():
    batches = data.window_batches(np.zeros(1_000_000, np.uint8), seq_len=64, batch=16, seed=0)
    times = []
    for _ in range(300):
        start = time.perf_counter()
        next(batches)
        times.append(time.perf_counter() - start)
    assert statistics.median(times) < 2e-3  # 0.15 ms on an idle core


def test_window_batch_errors():
    tokens = np.arange(20)
    assert error_of(data.window_batches, tokens, seq_len=8, batch=13, seed=0) == (
        "the text has 20 tokens, a batch of 13 windows of 8 + 1 tokens needs 21"
    )
    for options, message in (
        ({"seq_len": 0}, "seq_len is 0: it must be 1 or more"),
        ({"batch": 0}, "batch is 0: it must be 1 or more"),
        ({"seed": -1}, r"seed is -1: it must be in 0 .. 2\*\*32 - 1"),
        ({"shard": (2, 2)}, r"shard is \(2, 2\): it must be \(index, count\) with 0 <= index"),
    ):
        with pytest.raises(ValueError, match=message):
            data.window_batches(tokens, **{"seq_len": 4, "batch": 2, "seed": 0, **options})
    with pytest.raises(ValueError, match=r"tokens are float64\[20\]: give one row of integers"):
        data.window_batches(tokens * 1.0, seq_len=4, batch=2, seed=0)
    with pytest.raises(ValueError, match=r"tokens are int64\[4, 5\]: give one row of integers"):
        data.window_batches(tokens.reshape(4, 5), seq_len=4, batch=2, seed=0)


def test_validation_windows():
    windows = data.validation_windows(np.arange(23, dtype=np.uint8), 4)
    assert windows.dtype == np.int32
    np.testing.assert_array_equal(windows, np.arange(20).reshape(4, 5))
    assert error_of(data.validation_windows, np.arange(4), 4) == (
        "the text has 4 tokens, a window of 4 + 1 tokens needs 5"
    )


def test_epoch_batches():
    arrays = {"x": np.arange(10) * 2, "y": np.arange(10)}
    batches = list(data.epoch_batches(arrays, batch=3, seed=0, epochs=2))
    assert len(batches) == 6
    for batch in batches:
        np.testing.assert_array_equal(batch["x"], batch["y"] * 2)
    first = np.concatenate([batch["y"] for batch in batches[:3]])
    second = np.concatenate([batch["y"] for batch in batches[3:]])
    assert len(set(first.tolist())) == len(set(second.tolist())) == 9
    assert not np.array_equal(first, second)


def test_epoch_batches_in_order_with_remainder():
    arrays = {"y": np.arange(7)}
    options = {"batch": 3, "seed": 0, "shuffle": False, "epochs": 1, "drop_remainder": False}
    assert [b["y"].tolist() for b in data.epoch_batches(arrays, **options)] == [
        [0, 1, 2],
        [3, 4, 5],
        [6],
    ]


def test_epoch_batches_of_shards_make_up_the_whole():
    arrays = {"y": np.arange(50)}
    whole = take(data.epoch_batches(arrays, batch=12, seed=1), 10)
    parts = [take(data.epoch_batches(arrays, batch=6, seed=1, shard=(i, 2)), 10) for i in (0, 1)]
    for step, batch in enumerate(whole):
        together = np.concatenate([part[step]["y"] for part in parts])
        np.testing.assert_array_equal(together, batch["y"])


def test_epoch_batch_errors():
    arrays = {"x": np.arange(5), "y": np.arange(5)}
    assert error_of(data.epoch_batches, arrays, batch=6, seed=0) == (
        "the data has 5 records, a batch needs 6"
    )
    with pytest.raises(ValueError, match=r"of one length, these are \{'x': 5, 'y': 4\}"):
        data.epoch_batches({"x": np.arange(5), "y": np.arange(4)}, batch=2, seed=0)
    with pytest.raises(ValueError, match="of one length, these are none"):
        data.epoch_batches({}, batch=2, seed=0)
    with pytest.raises(ValueError, match="epochs is 0: it must be 1 or more"):
        data.epoch_batches(arrays, batch=2, seed=0, epochs=0)
    with pytest.raises(ValueError, match="cannot be shared among processes"):
        data.epoch_batches(arrays, batch=2, seed=0, drop_remainder=False, shard=(0, 2))


# The command line


def test_list(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEJAX_DATA", str(tmp_path))
    data.prepare("small_digits")
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"datasets in {tmp_path}"
    assert any(
        re.search(r"small_digits/8x8 +train 1,437, test 360 \(\d\.\d MB\)", x) for x in lines
    )
    assert any(re.search(r"photo_patches/64x64 +train, test \(built at", x) for x in lines)


def test_prepare_command(capsys, data_folder):
    assert main(["prepare", "small_digits", "python_text/topics"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"small_digits/8x8: {data_folder / 'small_digits/8x8/1.0.0'}"
    assert lines[1].startswith("small_digits/32x32: ")
    assert lines[2].startswith(f"python_text/topics: {data_folder / 'python_text/topics'}")


def test_prepare_command_error_is_one_line(capsys):
    assert main(["prepare", "qqqqqq"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "error: unknown dataset 'qqqqqq'; ours are python_text, small_digits, photo_patches\n"
    )
