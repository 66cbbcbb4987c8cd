"""The random search experiment end to end: results, resuming, paired arms, bad input."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax as sj
from experiments import random_search
from experiments.harness import cli, digits
from experiments.harness.run import execute
from experiments.random_search import EXPERIMENT, PRESETS, Comparison, Config


@pytest.fixture(scope="module", autouse=True)
def datasets(tmp_path_factory):
    """Datasets of this module, away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEJAX_DATA", str(tmp_path_factory.mktemp("datasets")))
        yield


def settings(out, **changes) -> Config:
    return dataclasses.replace(PRESETS["test"], out=str(out), **changes)


def test_the_whole_experiment_and_its_resumption(tmp_path, capsys):
    execute(EXPERIMENT, settings(tmp_path))
    (folder,) = (tmp_path / "random_search").iterdir()
    printed = capsys.readouterr().out
    for piece in ("searched", "random", "difference", "node 0.5", "edge 0.5",
                  "claim: the best of 8 sub-networks by loss before training trains"):  # fmt: skip
        assert piece in printed
    for name in ("difference", "training_loss"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["seeds"] == 3
    assert summary["card"]["granularity"] == "channel"
    metrics = summary["metrics"]
    for row in metrics["rows"].values():
        assert all(best <= mean for best, mean in zip(row["score_best"], row["score_mean"]))
        np.testing.assert_allclose(row["score_best"], row["initial_loss_searched"], rtol=1e-5)
        found, first = (row[f"initial_loss_{arm}"] for arm in ("searched", "random"))
        assert all(a <= b for a, b in zip(found, first))
    # 8 of 16 nodes: 64 x 8 + 8 x 8 + 8 x 10 of 64 x 16 + 16 x 16 + 16 x 10 weights
    np.testing.assert_allclose(metrics["rows"]["node-s0.5"]["weight_sparsity"], 1 - 656 / 1440)
    np.testing.assert_allclose(metrics["rows"]["edge-s0.5"]["weight_sparsity"], 0.5)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3 * 3

    (folder / "summary.json").unlink()
    (folder / "arms" / "edge-s0.5.json").unlink()
    execute(EXPERIMENT, cli.parse(EXPERIMENT, ["--resume", str(folder)]))
    again = json.loads((folder / "summary.json").read_text())
    assert again["metrics"] == metrics
    assert again["claims"] == summary["claims"]
    assert sorted((folder / "metrics.jsonl").read_text().splitlines()) == sorted(lines)


@pytest.mark.parametrize("proxy", ["acc", "snip"])
def test_other_scores(proxy):
    config = dataclasses.replace(PRESETS["test"], proxy=proxy, trials=4)
    data = digits.load_digits()
    params = digits.init_mlp(jax.random.key(0), config.sizes())
    batch = (data.train_x[:64], data.train_y[:64])
    found, first, losses = random_search.search(
        jax.random.key(1), params, batch, space="node", sparsity=0.5, config=config
    )
    assert found.scores.shape == (4,)
    assert float(found.scores.min()) == float(found.scores[found.best_index])
    assert losses.shape == (2,)
    counts = [sj.count_masks(masks).kept for masks in (found.best_masks, first)]
    assert counts == [656, 656]


def test_pruned_weights_stay_zero_and_biases_are_trained():
    config, data = digits.static_settings(PRESETS["test"]), digits.load_digits()
    params = digits.init_mlp(jax.random.key(0), config.sizes())
    kernels = {name: layer["kernel"] for name, layer in params.items()}
    masks = {name: {"kernel": k > 0.1, "bias": jnp.asarray(True)} for name, k in kernels.items()}
    order = digits.batch_order(0, steps=config.steps, batch=config.batch)
    trained = random_search.train_arm(params, masks, order, data, config=config)
    for name, layer in trained.params.items():
        np.testing.assert_array_equal(layer["kernel"] != 0, masks[name]["kernel"])
        assert bool((layer["bias"] != 0).any())
    assert float(trained.losses[-1]) < float(trained.losses[0])


def test_convergence_is_the_mean_of_ten_losses():
    losses = np.concatenate([np.full(15, 1.0), np.zeros(30)])
    assert random_search.converged_at(losses, 0.3) == 23
    assert random_search.converged_at(np.zeros(12), 0.3) == 10
    assert random_search.converged_at(np.ones(40), 0.3) is None
    assert random_search.mean_steps([10, 21, None]) == "2 of 3 got there"


def test_claims_are_computed_from_the_paired_tests():
    config = PRESETS["laptop"]
    rows = config.rows()
    found = {row: {f"test_accuracy_{arm}": [96.0] * 10 for arm in ("searched", "random")}
             for row in rows}  # fmt: skip
    dense = {"test_accuracy_dense": [98.0] * 10}

    def verdicts(gain, p):
        tests = {row: Comparison(gain if row[1] <= 0.9 else 9.0, 0.1, p, None) for row in rows}
        return [c.holds for c in random_search.make_claims(config, dense, found, tests)]

    assert verdicts(0.1, 0.5) == [True, True]
    assert verdicts(0.5, 0.5) == [False, True]
    assert verdicts(0.1, 0.001) == [False, True]
    assert verdicts(-0.1, 0.001) == [True, True]
    dense["test_accuracy_dense"] = [99.9] * 10
    found["node", 0.9]["test_accuracy_random"] = [90.0] * 10
    assert verdicts(0.0, 1.0) == [True, False]


def test_the_paper_setting_is_checked_as_far_as_it_can_be_built(capsys):
    assert execute(EXPERIMENT, PRESETS["paper"]) is None
    printed = capsys.readouterr().out
    for figure in ("784-1024-1024-10", "1,000 candidates", "not known", "not there yet"):
        assert figure in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "1"], "sparsity is 1.0; it must be in [0, 1)"),
        (["--space", "tree"], "space is 'tree'; known are node, edge"),
        (["--proxy", "luck"], "proxy is 'luck'; known are loss, acc, snip"),
        (["--trials", "0"], "trials is 0; it must be at least 1"),
        (["--seeds", "1"], "seeds is 1; a paired comparison needs two"),
        (["--hidden", "0"], "hidden is 0; it must be at least 1"),
        (["--search-examples", "2000"], "search_examples is 2000; allowed are 1 to 1257"),
        (["--batch", "0"], "batch is 0; it must be from 1 to 1257"),
        (["--mesh", "data=2"], "it runs on 1 device"),
        (["--trails", "3"], "Perhaps you meant: --trials"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, error_of):
    assert message in error_of(EXPERIMENT, arguments)
