"""The Spark Transformer experiment: results, resuming, arms, the paper's setting, bad input."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.harness import cli
from experiments.harness.decoder_arms import check_decoder
from experiments.harness.run import execute
from experiments.spark_transformer import report
from experiments.spark_transformer.__main__ import EXPERIMENT
from experiments.spark_transformer.config import (
    PRESETS,
    Config,
    Rows,
    ffn_multiply_adds,
    observe_shares,
)
from experiments.spark_transformer.operator_cost import LAX_TOP_K, OURS, RELU
from sparsejax.models import parameter_count

LAPTOP, TEST = PRESETS["laptop"], PRESETS["test"]


def test_the_whole_experiment_and_its_resumption(tmp_path, capsys):
    result = execute(EXPERIMENT, dataclasses.replace(TEST, out=str(tmp_path)))
    (folder,) = (tmp_path / "spark_transformer").iterdir()
    printed = capsys.readouterr().out
    for piece in ("lax.top_k", "Spark FFN", "claim: statistical top-k costs at most 1/40"):
        assert piece in printed
    for name in ("operator_cost", "loss", "active"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["card"]["what"] == "activations"
    assert len(summary["tables"]) == 3
    arms = summary["metrics"]["arms"]
    assert set(arms) == {"gated", "spark", "spark+attn"}
    assert arms["gated"]["0.003"]["train_active"] == [1.0, 1.0]
    for name in ("spark", "spark+attn"):
        # 6 of 48 neurons in expectation
        np.testing.assert_allclose(arms[name]["0.003"]["train_active"], 6 / 48, atol=0.05)
    keys = np.asarray(arms["spark+attn"]["0.003"]["test_keys"])
    assert ((keys > 0.4) & (keys < 0.9)).all()  # 6 of up to 16 keys, all where there are fewer
    costs = summary["metrics"]["operators"]["8x512"]
    assert costs["forward"][OURS]["ratio"] == costs["trained"][OURS]["ratio"] == 1.0
    assert set(LAX_TOP_K) < set(costs["forward"])
    assert all(row["cpu_ms"] > 0 for part in costs.values() for row in part.values())
    first, _, third = result.claims
    losses = {name: np.mean(arms[name]["0.003"]["test_loss"]) for name in arms}
    cheap = min(costs["forward"][use]["ratio"] for use in LAX_TOP_K) >= 40
    assert first.holds == (cheap and losses["spark"] - losses["gated"] < 0.04)
    assert third.ours == f"{np.mean(arms['spark']['0.003']['train_active']):.1%}"

    (folder / "summary.json").unlink()
    (folder / "arms" / "spark-lr0.003.json").unlink()
    execute(EXPERIMENT, cli.parse(EXPERIMENT, ["--resume", str(folder)]))
    again = json.loads((folder / "summary.json").read_text())
    assert again["metrics"] == summary["metrics"]
    assert again["claims"] == summary["claims"]


def test_arms_have_equal_parameters_or_equal_work():
    arms = dataclasses.replace(LAPTOP, ffn=(*LAPTOP.ffn, "topk")).arms()
    assert list(arms) == ["gated", "narrow", "spark", "stat_topk", "relu", "topk", "spark+attn"]
    sizes = {name: parameter_count(arm.model) for name, arm in arms.items()}
    assert len({size for name, size in sizes.items() if name != "narrow"}) == 1
    assert sizes["narrow"] < sizes["gated"]
    work = {name: ffn_multiply_adds(arms[name].model, 1.0) for name in ("gated", "narrow")}
    assert work["gated"] == 2 * 49_152
    # r f + (d - r) k + d k, twice: 3.2 times fewer
    spark = ffn_multiply_adds(arms["spark"].model, LAPTOP.ffn_k / LAPTOP.wide)
    assert spark == pytest.approx(2 * (32 * 384 + 32 * 31 + 64 * 31))
    assert work["narrow"] == pytest.approx(spark, rel=0.01)
    assert ffn_multiply_adds(arms["relu"].model, 0.5) == 2 * 64 * 384 * 1.5
    assert ffn_multiply_adds(arms["stat_topk"].model, 0.0) == 2 * 64 * 256


def test_attention_goes_with_the_ffn_of_the_paper_or_alone_with_all():
    alone = dataclasses.replace(LAPTOP, ffn=("gated", "spark"), attn=("spark",))
    assert list(alone.arms()) == ["gated+attn", "spark+attn"]
    none = dataclasses.replace(LAPTOP, ffn=("gated", "relu"))
    assert list(none.arms()) == ["gated", "relu"]


def test_layers_that_count_nothing_are_on():
    model = dataclasses.replace(LAPTOP, layers=3, sparsity_pattern=(0.9, 0.0, 0.5)).model(
        "stat_topk"
    )
    counts = jnp.asarray([[[64, 0]], [[128, 128]]])  # of two layers, a sequence, two tokens
    shares = observe_shares(model, {"num_active": counts})
    assert shares["active"] == pytest.approx((32 / 256 + 0.5 + 1) / 3)
    assert observe_shares(model, {})["active"] == 1
    causal = jnp.broadcast_to(jnp.arange(1, 5), (2, 1, 3, 4))
    assert observe_shares(model, {"keys_kept": causal})["keys"] == 1
    assert observe_shares(model, {"keys_kept": jnp.ones((2, 1, 3, 4))})["keys"] == 0.4


def test_a_pattern_for_each_layer_is_built():
    config = dataclasses.replace(TEST, ffn=("stat_topk", "topk"), sparsity_pattern=(0.75, 0.0))
    for arm in config.arms().values():
        (line,) = check_decoder(config, arm)
        assert "a step of 4 x 16 tokens gives active, loss" in line


def test_claims_are_computed_from_the_figures():
    def ratios(top_k, relu):
        uses = dict(zip(LAX_TOP_K, (top_k, 3 * top_k, 9 * top_k)))
        forward = {OURS: 1.0, RELU: 1 / relu, **uses}
        parts = {"forward": forward, "trained": {OURS: 1.0, RELU: 1 / relu}}
        return {p: {n: {"ratio": r, "cpu_ms": r} for n, r in v.items()} for p, v in parts.items()}

    def arm(loss, active=1.0):
        metrics = {"test_loss": [loss] * 3, "train_active": [active] * 3}
        return {3e-3: metrics, 6e-3: {**metrics, "test_loss": [loss + 1] * 3}}

    def verdicts(top_k=58.0, relu=2.0, spark=2.02, active=0.085, narrow=2.1):
        costs = {text: ratios(top_k, relu) for text in LAPTOP.timed[:1]}
        costs[LAPTOP.timed[1]] = ratios(1.0, 99.0)  # decides nothing
        found = {"gated": arm(2.0), "spark": arm(spark, active), "narrow": arm(narrow)}
        return [claim.holds for claim in report.make_claims(LAPTOP, costs, found)]

    assert verdicts() == [True] * 4
    assert verdicts(top_k=39) == [False, True, True, True]
    assert verdicts(spark=2.05) == [False, True, True, True]
    assert verdicts(relu=3.2) == [True, False, True, True]
    assert verdicts(active=0.1) == [True, True, False, True]
    assert verdicts(narrow=2.01) == [True, True, True, False]
    costs = {LAPTOP.timed[0]: ratios(58.0, 2.0)}
    alone = report.make_claims(LAPTOP, costs, {"gated": arm(2.0)})
    assert [claim.seeds for claim in alone] == [1, 1]


def test_the_paper_setting_builds_abstractly(capsys):
    assert execute(EXPERIMENT, PRESETS["paper"]) is None
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    # embeddings and head of bytes; 26 layers of 63.7 M in the feed-forward network, 14.2 M in
    # attention
    assert sum("2,025,577,728 parameters" in line for line in lines) == 4
    assert "Spark FFN, Spark attention" in printed
    assert "512 x 8192 tokens gives active, keys, loss" in printed
    assert "prepare it once with tensorflow-cpu" in printed


def test_rows_are_parsed():
    assert Rows.parse("16x65536") == Rows(16, 65536, "float32")
    assert str(Rows.parse("64x9216:bfloat16")) == "[64, 9216] bfloat16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ffn", "swiglu"], "ffn is 'swiglu'; known are gated, narrow, spark, stat_topk, relu"),
        (["--attn", "linear"], "attn is 'linear'; known are dense, spark"),
        (["--d-ff", "33"], "d_ff is 33; it must be even"),
        (["--ffn-k", "48"], "ffn_k is 48; it must be below 48"),
        (["--ffn-k", "0"], "ffn_k is 0; it must be at least 1"),
        (["--ffn-r", "16"], "ffn_r is 16; it must be below 16"),
        (["--attn-r", "8"], "attn_r is 8; it must be below 8"),
        (["--attn-k", "0"], "attn_k is 0; it must be at least 1"),
        (["--sparsity-pattern", "0.5", "0.5", "0.5"], "give one share in [0, 1), or 2"),
        (["--sparsity-pattern", "1.0"], "sparsity_pattern is (1.0,); give one share in [0, 1)"),
        (["--timed", "64by9216"], "timed is '64by9216'; it must look like 64x9216:bfloat16"),
        (["--timed", "64x9216:int8"], "timed is '64x9216:int8'; it must look like"),
        (["--timed", "0x9216"], "timed is '0x9216'; it must look like"),
        (["--rounds", "0"], "rounds is 0; it must be at least 1"),
        (["--kv-heads", "3"], "n_kv_heads is 3; it must divide n_heads"),
        (["--preset", "paper", "--dataset", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, error_of):
    assert message in error_of(EXPERIMENT, arguments)


def test_flags_choose_arms():
    config = cli.parse(EXPERIMENT, ["--ffn", "gated", "topk", "--attn", "dense", "--ffn-k", "16"])
    assert isinstance(config, Config)
    assert config.arms()["topk"].model.ffn_k == 16
