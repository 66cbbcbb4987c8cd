"""Perplexity, the list of experiments, and the results table."""

import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments import __main__ as listing
from experiments import reproduce
from experiments.harness.perplexity import make_perplexity
from experiments.harness.progress import make_table, mean_and_deviation
from experiments.harness.registry import last_summaries, list_experiments

CLAIM = {"sentence": "a | b", "holds": False, "ours": "1", "baseline": "2", "seeds": 3}
SUMMARY = {
    "slug": "cast_llama", "preset": "laptop", "holds": False, "ours": "1", "claims": [CLAIM],
    "seconds": 90, "device": "1 x cpu", "cores": 2,
}  # fmt: skip


def test_perplexity_is_the_exponential_of_the_mean_over_all_predictions():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(5, 5)), jnp.float32)
    perplexity = make_perplexity(lambda params, tokens: params[tokens], batch=4)
    windows = np.random.default_rng(1).integers(0, 5, (6, 9)).astype(np.int32)
    log_p = np.asarray(table) - np.log(np.exp(table).sum(-1, keepdims=True))
    wanted = math.exp(-log_p[windows[:, :-1], windows[:, 1:]].mean())
    assert perplexity(table, windows) == pytest.approx(wanted, rel=1e-5)
    assert perplexity(jnp.zeros((5, 5)), windows) == pytest.approx(5, rel=1e-5)


def test_mean_and_deviation():
    assert mean_and_deviation([1.0, 3.0], 2) == "2.00 ± 1.41"
    assert mean_and_deviation([1.5], 1) == "1.5"


def test_tables_show_brackets():
    console = Console(file=io.StringIO(), width=60)
    console.print(make_table("[t]", ("[a]", "b"), [("[d, f]", "[bold]1")]))
    printed = console.file.getvalue()
    for cell in ("[t]", "[a]", "[d, f]", "[bold]1"):
        assert cell in printed


def test_every_experiment_is_listed_with_its_line_and_times(capsys):
    entries = {entry.slug: entry for entry in list_experiments()}
    assert "cast_llama" in entries
    for entry in entries.values():
        assert entry.line.endswith(".")
        assert {"laptop", "test", "paper"} <= entry.minutes.keys()
    listing.main()
    assert "cast_llama" in capsys.readouterr().out


def test_the_newest_readable_summary_counts(tmp_path):
    for name, text in (("1", json.dumps(SUMMARY)), ("2", "{"), ("0", "{}")):
        (tmp_path / "x" / name).mkdir(parents=True)
        (tmp_path / "x" / name / "summary.json").write_text(text)
    assert last_summaries(tmp_path, "x")["laptop"]["ours"] == "1"
    assert last_summaries(tmp_path, "none") == {}


def test_reproduce_collects_results_and_fills_the_readme(tmp_path, capsys):
    table = {"title": "T", "header": ["a", "b"], "rows": [["x|y", "1.5"]]}
    loaded = {**SUMMARY, "preset": "pretrained", "tables": [table], "ours": "4"}
    for number, summary in (("1", SUMMARY), ("2", loaded), ("3", {**SUMMARY, "preset": "test"})):
        folder = tmp_path / "runs" / "cast_llama" / number
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps(summary))
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "old.laptop.json").write_text(json.dumps({**SUMMARY, "slug": "old"}))
    readme = tmp_path / "README.md"
    readme.write_text(
        "before <!-- results -->stale<!-- end of results --> after "
        "<!-- cast_llama pretrained --><!-- end of cast_llama pretrained -->"
    )
    reproduce.main(
        ["--collect", "--out", str(tmp_path / "runs"), "--results", str(tmp_path / "R.md"),
         "--readme", str(readme), "--kept", str(kept)]
    )  # fmt: skip
    row = "| `cast_llama` (laptop) | a \\| b | **does not hold** | 1 | 2 | 3 | 1.5 | 1 x cpu, 2"
    shown = "T:\n\n| a | b |\n| --- | ---: |\n| x\\|y | 1.5 |\n"
    assert {path.name for path in kept.iterdir()} == {
        "cast_llama.laptop.json", "cast_llama.pretrained.json", "old.laptop.json"
    }  # fmt: skip
    results, text = (tmp_path / "R.md").read_text(), readme.read_text()
    for written in (results, text):
        assert row in written
        assert "`cast_llama` (pretrained)" in written
        assert "`old` (laptop)" in written
        assert shown in written
    assert "stale" not in text
    assert text.startswith("before ")
    assert " after " in text
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["nothing"])
    assert stop.value.code == 2
    assert "error: no experiment 'nothing'; there are" in capsys.readouterr().err
