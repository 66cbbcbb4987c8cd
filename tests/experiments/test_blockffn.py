"""The BlockFFN experiment: results, resuming, losses, what is measured, bad input."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.blockffn import measures, report, training
from experiments.blockffn.__main__ import EXPERIMENT
from experiments.blockffn.config import PRESETS, Losses
from experiments.blockffn.speculation import speculate
from experiments.harness import cli
from experiments.harness.decoder_arms import check_decoder
from experiments.harness.run import execute
from sparsejax.activations import activation_locality_loss, chunk_sparsification_loss
from sparsejax.models import Llama

TEST = PRESETS["test"]
OURS, L1 = "al0.002-cs0.1", "l10.05"


def only_run(out):
    return max(p for p in (out / "blockffn").iterdir() if (p / "config.json").is_file())


def two_word_params(config, seed):
    """Parameters of a model that writes token 5 or 9, so that two of them agree now and then."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(0, 0.5, leaf.shape).astype(np.float32)
        if "head" in jax.tree_util.keystr(path):
            values, direction = np.zeros_like(values), values[:, 0]
            values[:, 5], values[:, 9] = direction, -direction
        return jax.device_put(values, jax.devices()[0])  # as from a checkpoint: compiled once

    shapes = nnx.state(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def test_the_whole_experiment_and_its_resumption(tmp_path, capsys):
    result = execute(EXPERIMENT, dataclasses.replace(TEST, out=str(tmp_path)))
    folder = only_run(tmp_path)
    printed = capsys.readouterr().out
    for piece in (
        "AL 0.002, CS 0.1 (1)",
        "reuse ratio",
        "Speculative decoding of 3 prompts",
        "claim: AL 0.002, CS 0.1 has a CLS_8 at least 0.12 above that of L1 0.05",
    ):
        assert piece in printed
    for name in ("trade_off", "cls_by_chunk", "tls", "cls_8"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["seeds"] == 2
    assert summary["card"]["what"] == "activations"
    arms = {name: rates["0.003"] for name, rates in summary["metrics"]["arms"].items()}
    assert set(arms) == {"none", L1, OURS, "draft"}
    assert "gap" not in arms["draft"]
    for name in ("none", L1, OURS):
        arm = arms[name]
        for seed in range(2):
            # longer chunks read more
            tls, cls = arm["test_tls"][seed], arm["cls"][seed]
            assert cls[0] == pytest.approx(arm["test_cls_8"][seed], abs=1e-5)
            assert tls >= cls[0] >= cls[1] >= 1 - arm["used"][seed] / TEST.experts - 1e-5
            assert arm["gap"][seed] == pytest.approx(tls - cls[0], abs=1e-5)
            assert 1 <= arm["sets"][seed] <= 2**TEST.experts
            assert 0 < arm["reuse"][seed] <= 1
    assert arms["none"]["added"] == [0, 0]
    assert np.mean(arms[OURS]["test_cls_8"]) > np.mean(arms["none"]["test_cls_8"])
    curves = json.loads((folder / "arms" / f"{OURS}-lr0.003.json").read_text())["curves"][0]
    assert curves["step"] == [10, 20]
    assert set(curves) == {"step", "loss", "tls", "cls_8", "al", "cs"}
    decoding = summary["metrics"]["decoding"]
    for chunk in TEST.eval_chunks:
        assert 0 < max(decoding[f"difference-{chunk}"]) < 1e-4
    for name in ("none", L1, OURS):
        assert decoding[f"{name}-3-greedy"] == [1, 1]
    assert [claim.holds for claim in result.claims] == [c["holds"] for c in summary["claims"]]
    assert result.claims[2].ours.startswith(f"{np.mean(decoding[f'{OURS}-3-union']):.3f} of")

    (folder / "summary.json").unlink()
    (folder / "arms" / f"{OURS}-lr0.003.json").unlink()
    execute(EXPERIMENT, cli.parse(EXPERIMENT, ["--resume", str(folder)]))
    again = json.loads((folder / "summary.json").read_text())
    assert again["metrics"] == summary["metrics"]
    assert again["claims"] == summary["claims"]


def test_losses_are_means_over_layers_and_sequences():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 32, 8))
    details = {"logits": logits, "gates": -logits}
    previous = jnp.arange(32) - 1
    locality = jax.jit(activation_locality_loss)
    sparsification = jax.jit(chunk_sparsification_loss, static_argnames="chunk")
    al = np.mean([[locality(x, previous) for x in layer] for layer in logits])
    cs = np.mean([[sparsification(x, chunk=32) for x in layer] for layer in logits])
    both = training.make_penalty(TEST, Losses(al=0.5, cs=2.0))
    total, state, found = jax.jit(both.apply)(details, both.init)
    assert state == ()
    assert float(found["al"]) == pytest.approx(al, rel=1e-5)
    assert float(found["cs"]) == pytest.approx(cs, rel=1e-5)
    assert float(total) == pytest.approx(0.5 * al + 2 * cs, rel=1e-5)
    l1 = training.make_penalty(TEST, Losses(l1=0.1))
    total, _, _ = jax.jit(l1.apply)(details, l1.init)
    assert float(total) == pytest.approx(0.1 * float(jnp.mean(jnp.abs(logits))), rel=1e-5)
    assert training.make_penalty(TEST, Losses()) is None


def test_the_adaptive_factor_falls_with_its_loss():
    penalty = training.make_penalty(TEST, Losses(cs=0.1, adaptive=True))
    state, factors, apply = penalty.init, [], jax.jit(penalty.apply)
    for step in range(1, 16):
        # fewer and fewer experts: more logits below 0
        logits = jnp.linspace(-step, 1, 8) * jnp.ones((1, 1, 32, 1))
        total, state, found = apply({"logits": logits}, state)
        factors.append(float(found["lambda_cs"]))
        assert float(total) == pytest.approx(factors[-1] * float(found["cs"]), rel=1e-5)
    assert factors[:10] == pytest.approx([0.1] * 10)
    assert factors[-1] < factors[11] < 0.1


def test_routers_without_the_norm_are_arms_of_their_own():
    config = dataclasses.replace(TEST, router=("sum", "none"))
    arms = training.make_arms(config, 256)
    for norm in config.router:
        name = f"{OURS}-router-{norm}"
        assert config.labels()[name] == f"AL 0.002, CS 0.1, router {norm}"
        build = functools.partial(Llama, arms[name].model)
        shapes = nnx.state(nnx.eval_shape(build, rngs=nnx.Rngs(0)))
        assert "router_norm" not in shapes["blocks"]["ffn"]
        assert "gives al, cls_8, cs, loss, tls" in check_decoder(config, arms[name])[0]


def test_sets_of_experts_are_counted():
    active = np.asarray([[1, 0, 1], [1, 0, 1], [0, 0, 0], [1, 0, 0]], bool)
    assert measures.distinct_sets(active) == 3
    wide = np.zeros((5, 70), bool)
    wide[3, 69] = True  # beyond what a machine word holds
    assert measures.distinct_sets(wide) == 2


def test_calls_of_the_target_are_those_of_decoding_by_hand():
    model, draft, k, new = TEST.model(), TEST.draft(), 3, TEST.new_tokens(3)
    params, draft_params = two_word_params(model, 0), two_word_params(draft, 1)
    prompts = np.random.default_rng(2).integers(0, 256, (3, 8), np.int32)
    found = speculate(model, draft, params, draft_params, prompts, new_tokens=new, draft_tokens=k)
    rounds, shares = decode_by_hand([(model, params), (draft, draft_params)], prompts, new, k)
    assert float(found["greedy"]) == 1.0
    assert 0 < float(found["accepted"]) < k
    assert float(found["accepted"]) == pytest.approx(np.mean(rounds), rel=1e-5)
    assert float(found["tokens"]) == pytest.approx(3 * new / len(rounds), rel=1e-5)
    assert float(found["union"]) == pytest.approx(np.mean(shares), rel=1e-5)


def decode_by_hand(models, prompts, new, k):
    """Accepted tokens and the share of experts of every call, from full forward passes alone."""

    @functools.partial(jax.jit, static_argnums=0)
    def read(config, params, text):
        model = measures.restored(config, params)
        hidden, details = model.detailed(text[None])
        return jnp.argmax(model.logits(hidden)[0], axis=-1), details.get("logits", 0) > 0

    def chosen(which, text):
        padded = np.zeros(TEST.seq_len, np.int32)
        padded[: len(text)] = text
        return [np.asarray(values) for values in read(*models[which], padded)]

    rounds, shares = [], []
    for prompt in prompts.tolist():
        text = list(prompt)
        while len(text) < len(prompt) + new:
            chunk = list(text)
            for _ in range(k):
                chunk.append(int(chosen(1, chunk)[0][len(chunk) - 1]))
            tokens, active = chosen(0, chunk)
            begin, taken = len(text) - 1, 0
            while taken < k and chunk[begin + 1 + taken] == tokens[begin + taken]:
                taken += 1
            text += tokens[begin : begin + taken + 1].tolist()
            shares.append(active[:, 0, begin : begin + k + 1].any(1).mean())
            rounds.append(taken)
    return rounds, shares


def arm(loss, tls, cls):
    """Figures of an arm as the runs give them, for `report.compared`."""
    values = {"test_loss": [loss] * 2, "test_tls": [tls] * 2, "test_cls_8": [cls[0]] * 2}
    return {0.003: {**values, "cls": [cls] * 2}}


def test_claims_are_computed_from_the_figures():
    config = dataclasses.replace(TEST, lambda_l1=(0.05, 0.2), adaptive=False)
    arms = {
        "none": arm(2.0, 0.5, [0.2, 0.1]),
        "l10.05": arm(2.01, 0.8, [0.4, 0.2]),
        "l10.2": arm(2.05, 0.9, [0.6, 0.3]),
        OURS: arm(2.03, 0.8, [0.75, 0.7]),
        "draft": {0.003: {"test_loss": [2.3] * 2}},
    }
    decoding = {f"{name}-3-greedy": [1.0, 1.0] for name in ("none", OURS)}
    decoding |= {"none-3-union": [0.6, 0.6], f"{OURS}-3-union": [0.3, 0.2]}

    def holds(**changes):
        found = report.compared(config, arms | changes)
        return [claim.holds for claim in report.make_claims(config, found, decoding)]

    found = report.compared(config, arms)
    assert found[OURS][0.003]["added"] == pytest.approx([0.03, 0.03])
    assert found[OURS][0.003]["gap"] == pytest.approx([0.05, 0.05])
    # half way between the two factors
    np.testing.assert_allclose(report.l1_of_equal_loss(config, found), [[0.5, 0.25]] * 2)
    assert holds() == [True, True, True]
    assert holds(**{OURS: arm(2.11, 0.8, [0.75, 0.7])})[0] is False  # costs too much
    assert holds(**{OURS: arm(2.03, 0.9, [0.75, 0.7])})[0] is False  # too wide a gap
    assert holds(**{"l10.05": arm(2.01, 0.8, [0.7, 0.2])})[0] is False  # L1 does it too
    assert holds(**{"l10.2": arm(2.03, 0.9, [0.6, 0.8])})[:2] == [True, False]
    decoding[f"{OURS}-3-greedy"] = [1.0, 0.9]
    assert holds() == [True, True, False]
    decoding[f"{OURS}-3-greedy"] = [1.0, 1.0]
    decoding[f"{OURS}-3-union"] = [0.31, 0.31]
    assert holds() == [True, True, False]


def test_the_paper_setting_is_built_abstractly(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SPARSEJAX_DATA", str(tmp_path))
    assert execute(EXPERIMENT, PRESETS["paper"]) is None
    printed = capsys.readouterr().out
    for piece in (
        "56 experts of 128 in each of 35 layers; 40,000 steps of 3,145,728 bytes of c4/en",
        "AL 0.002, CS 0.05: 1,353,289,896 parameters",
        "768 x 4096 tokens gives al, cls_8, cs, loss, tls",
        "AL 0.002, CS 0.05, adaptive: ",
        "gives al, cls_8, cs, lambda_cs, loss, tls",
        "checked abstractly: ",
    ):
        assert piece in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experts", "0"], "experts is 0; it must be at least 1"),
        (["--alpha", "0"], "alpha is 0.0; it must be positive"),
        (["--lambda-cs", "0.1", "0.2"], "give one of each for every arm"),
        (["--lambda-cs", "-0.1"], "lambda_cs must not be negative"),
        (["--lambda-l1", "0"], "lambda_l1 are (0.0,); give positive ones that differ"),
        (["--lambda-l1"], "lambda_l1 are (); give positive ones that differ"),
        (["--lambda-l1", "0.1", "0.1"], "lambda_l1 are (0.1, 0.1); give positive ones"),
        (["--lambda-cs", "0.1", "0.1", "--lambda-al", "0.2", "0.2"], "they must differ"),
        (["--lambda-cs", "0", "--lambda-al", "0"], "and not be 0"),
        (["--adaptive", "--lambda-cs", "0"], "lambda_cs begins with 0, which cannot be adaptive"),
        (["--router", "sum", "sum"], "router is ('sum', 'sum'); give different ones"),
        (["--adaptive-start", "9"], "adaptive_start is 9; it must be at least twice"),
        (["--chunk", "16"], "with 8 and chunk = 16 among them"),
        (["--eval-chunks", "1", "32"], "with 8 and chunk = 32 among them"),
        (["--eval-chunks", "6", "8", "32"], "eval_chunks has 6; it must divide seq_len = 32"),
        (["--eval-chunks", "32", "8"], "eval_chunks are (32, 8); give ascending ones"),
        (["--draft-tokens", "0"], "draft_tokens are (0,); give positive ones"),
        (["--prompt-tokens", "30"], "together they leave no room in seq_len = 32"),
        (["--draft-width", "9"], "n_heads is 2; it must divide d_model, which is 9"),
        (["--warmup", "20"], "warmup is 20; it must be below steps = 20"),
        (["--dataset", "magic"], "magic"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, error_of):
    assert message in error_of(EXPERIMENT, arguments)
