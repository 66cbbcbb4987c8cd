"""The benchmark of decoding: its rows compute what they say, and read what is written beside."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.benchmarks.decoding import __main__ as decoding
from experiments.benchmarks.decoding import feed_forward, whole_model
from experiments.benchmarks.decoding.config import PRESETS
from experiments.benchmarks.decoding.reading import details, note, shifted_router
from sparsejax.models import Llama, init_cache, parameter_count, unroll
from sparsejax.models.sparse_layers import BlockFeedForward, SparkFeedForward

SMALL = PRESETS["test"]
KINDS = ("dense", "spark", "block")


def test_the_small_preset_runs_and_writes_every_row(tmp_path, capsys):
    decoding.main(["--preset", "test", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "benchmarks" / "decoding.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert len(rows) == len(report["rows"]) == 15
    for name, row in rows.items():
        assert math.isfinite(row["ratio"])
        assert "dense" in row["baseline"]
        assert row["baseline"].split(":")[0] == name.split(":")[0]
        assert row["median_ms"] > 0
        assert float(row["MB"]) > 0
        assert ("dense" in name) == (row["bound"] == "")
    with_goals = {name: row["goal"] for name, row in rows.items() if row["goal"] is not None}
    assert [name.split(", ")[0] for name in with_goals] == [
        "FFN: Spark", "FFN: Spark", "FFN: BlockFFN", "model: Spark FFN"
    ]  # fmt: skip
    assert list(with_goals.values())[:2] == ["<= 1/2.5", "<= 1/6"]
    assert "4 goals met" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_the_models_have_as_many_parameters(kind):
    config = PRESETS["laptop"]
    dense, other = (parameter_count(config.model(name)) for name in ("dense", kind))
    assert abs(other / dense - 1) < 0.01


def test_the_layers_of_one_kind_agree():
    group = next(feed_forward.feed_forward_rows(SMALL, {}))
    forms = [call for name, call in group.functions.items() if "dense" in name]
    spark = [call for name, call in group.functions.items() if "Spark" in name]
    for _ in range(4):  # layers and tokens in turns
        (one, two), (wide, bits) = ([call() for call in calls] for calls in (forms, spark))
        np.testing.assert_allclose(one, two, atol=1e-5)
        assert 0 < jnp.abs(bits - wide).max() < 0.1 * jnp.abs(wide).max()
    assert jnp.abs(forms[0]() - forms[0]()).max() > 0.1


@pytest.mark.parametrize(
    ("layer", "kind"), [(SparkFeedForward, "spark"), (BlockFeedForward, "block")]
)
def test_weights_of_16_bits_are_not_widened_whole(layer, kind):
    sizes = {"d_model": 64, "d_ff": 768, "param_dtype": "bfloat16"}
    sizes |= {"ffn_r": 32} if kind == "spark" else {}
    model = layer(dataclasses.replace(SMALL.model(kind), **sizes), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 1, 64))
    graph, params = nnx.split(model)
    decode = jax.jit(lambda params, x: nnx.merge(graph, params).decode(x))
    np.testing.assert_allclose(decode(params, x), model(x), rtol=1e-4, atol=1e-5)
    half = 4 * 32 * 768  # the smallest matrix of either, in float32
    assert scratch_bytes(decode.lower(params, x)) < half


def scratch_bytes(lowered):
    found = lowered.compile().memory_analysis()
    assert found is not None
    return found.temp_size_in_bytes


def test_what_a_row_reads():
    notes = {}
    note(notes, "dense", 4e6, 4e6)
    note(notes, "sparse", 1.6e6, 4e6)
    assert notes == {
        "dense": {"MB": "4", "bound": ""},
        "sparse": {"MB": "1.6", "bound": "1/2.5"},
    }


@pytest.mark.parametrize("sparsity", [0.25, 0.8])
def test_a_shifted_router_leaves_off_its_share(sparsity):
    router, inputs = (jax.random.normal(jax.random.key(i), (n, 40)) for i, n in ((0, 30), (1, 8)))
    before, after = inputs @ router.T, inputs @ shifted_router(router, inputs, sparsity).T
    assert abs(float(jnp.mean(after <= 0)) - sparsity) < 1 / 60
    shift = before - after  # of all logits by one number: who wins among experts stays
    np.testing.assert_allclose(shift, jnp.full_like(shift, shift[0, 0]), rtol=1e-4)


@functools.cache
def tokens():
    return whole_model._token_ids(SMALL)


@pytest.mark.parametrize("kind", [*KINDS, "spark_both"])
def test_decoding_gives_the_logits_of_the_whole_text(kind):
    model = whole_model._built(SMALL.model(kind))
    if kind == "block":
        model = whole_model._routed(SMALL, *model, tokens())
        logits = details(*model, tokens())["logits"][:, :, -1]
        assert abs(float(jnp.mean(logits <= 0)) - SMALL.token_sparsity) < 0.02
    call = whole_model.decoder(SMALL, model, tokens())
    expected = jax.jit(lambda params: nnx.merge(model[0], params)(tokens()))(model[1])[:, -1]
    for _ in range(2):  # the second round meets a cache as long as the first did
        found = jnp.stack([call()[0, 0] for _ in range(SMALL.tokens)])
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_stacked_blocks_are_copied_in_a_step_and_separate_ones_are_not():
    config = dataclasses.replace(SMALL.dense, d_model=128, d_ff=512)
    layer = 4 * 3 * config.d_model * config.d_ff

    def scratch(separate):
        model = nnx.eval_shape(
            lambda: (
                unroll(Llama(config, rngs=nnx.Rngs(0)))
                if separate
                else Llama(config, rngs=nnx.Rngs(0))
            )
        )
        graph, params = nnx.split(model)
        step = jax.jit(lambda p, token, cache: nnx.merge(graph, p).decode(token, cache))
        cache = jax.eval_shape(lambda: init_cache(config, 1))
        return scratch_bytes(step.lower(params, jax.ShapeDtypeStruct((1, 1), jnp.int32), cache))

    assert scratch(separate=False) >= layer > 5 * scratch(separate=True)
