"""The Sparse-IFT experiment: results, resuming, costs, backbones, the paper, bad input."""

import dataclasses
import functools
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sparsejax as sj
from experiments.harness import cli, digits, images
from experiments.harness.run import execute
from experiments.sparse_ift import backbones, laptop, networks, report
from experiments.sparse_ift.__main__ import EXPERIMENT
from experiments.sparse_ift.config import FAMILIES, PRESETS, Arm
from sparsejax import weights
from sparsejax.models import resnet_config

TEST = PRESETS["test"]
BACKBONE = dataclasses.replace(TEST, model="resnet18_cifar", batch=4, epochs=10, update_every=2)
IMAGE = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)


@pytest.fixture(scope="module", autouse=True)
def datasets(tmp_path_factory):
    """Datasets of this module, away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEJAX_DATA", str(tmp_path_factory.mktemp("datasets")))
        yield


def only_run(out):
    (folder,) = (out / "sparse_ift").iterdir()
    return folder


def tiny(rngs, *, base_width=4):
    """A ResNet of two blocks, with a projected shortcut."""
    return images.build_backbone(BACKBONE, classes=10, side=8, channels=1, rngs=rngs,
                                 stage_sizes=(1, 1), base_width=base_width)  # fmt: skip


def tiny_plan(family, sparsity=0.75, mask="rigl", **changes):
    config = dataclasses.replace(BACKBONE, **changes)
    arm = Arm(family, sparsity, mask, 0)
    # `wide` widens the base of the settings' model, 64: as many times that of this one
    build = lambda rngs, base_width=64: tiny(rngs, base_width=base_width // 16)  # noqa: E731
    spent = networks.cost(arm, config, build, IMAGE)
    return config, spent, backbones.plan(arm, config, build, spent, steps=10)


def test_the_whole_experiment_and_its_resumption(tmp_path, capsys):
    execute(EXPERIMENT, dataclasses.replace(TEST, out=str(tmp_path)))
    folder = only_run(tmp_path)
    printed = capsys.readouterr().out
    for piece in ("wide 0.75 RigL", "claim: at the dense network's non-zeros (width 12 on"):
        assert piece in printed
    for name in ("accuracy_w12", "accuracy_by_cost_w12"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["seeds"] == 2
    assert [c["holds"] for c in summary["claims"]][2]  # equal sizes
    assert len(summary["claims"]) == 3
    assert summary["card"]["path"] == "sparse_to_sparse"
    dense, moving, static = (
        summary["metrics"][name]["0.1"]
        for name in ("dense-w12", "wide-0.75-rigl-w12", "wide-0.75-static-w12")
    )
    assert dense["nonzeros"] == [64 * 12 + 2 * 12 * 12 + 120] * 2
    assert static["ever"] == static["always"]
    assert moving["always"][0] < static["ever"][0] < moving["ever"][0]

    (folder / "summary.json").unlink()
    (folder / "arms" / "wide-0.75-static-w12-lr0.1.json").unlink()
    execute(EXPERIMENT, cli.parse(EXPERIMENT, ["--resume", str(folder)]))
    again = json.loads((folder / "summary.json").read_text())
    assert again["metrics"] == summary["metrics"]
    assert again["claims"] == summary["claims"]


def test_sizes_and_costs_of_the_networks_on_digits():
    # 720 weights at width 8, widened to 16: 1024 + 2 * 256 + 160 = 1696
    spent = laptop.expense(Arm("wide", 0.75, "rigl", 8), TEST)
    assert (spent.dense, spent.whole) == (720, 1696)
    assert set(spent.sparsity.values()) == {1 - 720 / 1696}
    assert spent.nonzeros == 721  # the paper's page: whole numbers of zeros in each layer
    narrow = laptop.expense(Arm("narrow", 0.75, "rigl", 8), TEST)
    assert (narrow.dense, narrow.whole, narrow.nonzeros) == (720, 720, 180)
    for family in ("parallel", "factorized", "doped"):
        local = laptop.expense(Arm(family, 0.75, "rigl", 12), TEST)
        assert local.used == pytest.approx(1176, rel=0.005)
        assert "layers/3/kernel" not in local.sparsity


def test_training_costs_more_where_dense_gradients_are_taken():
    spent = networks.Cost(dense=10, whole=40, used=10.0, nonzeros=10, sparsity={})
    config = dataclasses.replace(TEST, update_every=9, end_fraction=0.5)
    moving = (3 * 20 * 9 + 2 * 20 + 80) / 10
    assert spent.training(Arm("wide", 0.75, "rigl", 8), config) == 0.5 * moving + 0.5 * 60
    for family, mask in (("wide", "static"), ("wide", "set"), ("dense", "rigl")):
        assert spent.training(Arm(family, 0.75, mask, 8), config) == 60


@pytest.mark.parametrize("family", ["dense", "parallel", "factorized", "doped"])
def test_layers_start_with_outputs_of_mean_square_1(family):
    arm = Arm(family, 0.75, "static", 32)
    build = functools.partial(networks.Perceptron, base_width=32)
    graph, shapes = nnx.split(
        nnx.eval_shape(lambda: networks.build_arm(arm, TEST, build, nnx.Rngs(0)))
    )
    sparsity = laptop.expense(arm, TEST).sparsity

    @jax.jit
    def measure(keys):
        params = laptop.initial(keys[0], shapes, arm, sparsity)
        if sparsity:
            params = sj.apply_masks(params, networks.start_masks(keys[1], params, sparsity))
        x = jax.random.normal(keys[2], (256, 64))
        first = nnx.merge(graph, params).layers[0]
        return jnp.mean(jax.nn.relu(first(x)) ** 2)

    assert 0.6 < measure(jax.random.split(jax.random.key(0), 3)) < 1.6


def test_weights_that_were_ever_or_always_active_are_remembered():
    class State(NamedTuple):
        masks: jax.Array

    fake = optax.GradientTransformation(
        lambda params: State(jnp.array([True, True, False])),
        lambda updates, state, params=None: (updates, State(jnp.roll(state.masks, 1))),
    )
    tx = laptop.exploring(fake)
    state = tx.init(jnp.zeros(3))
    _, state = tx.update(jnp.zeros(3), state)
    np.testing.assert_array_equal(state.ever, [True, True, True])
    np.testing.assert_array_equal(state.always, [False, True, False])


def test_masks_of_a_backbone_are_drawn_once_and_moved_by_the_optimiser():
    config, spent, method = tiny_plan("wide")
    trainer = images.make_trainer(config, method, steps_per_epoch=1, mean=[0.5], deviation=[0.3])
    init, step = jax.jit(trainer.init), jax.jit(trainer.step)
    state = init(0, 0.1)
    batch = {"image": jax.random.randint(jax.random.key(0), (4, 8, 8, 1), 0, 255, jnp.uint8),
             "label": jnp.arange(4)}  # fmt: skip

    def masks(state):
        found = dict(sj.named_leaves(sj.get_masks(state["opt"])))
        return {path: np.asarray(found[path]) for path in spent.sparsity}

    def zero_where_masked(state):
        params = dict(sj.named_leaves(state["params"]))
        return all(not np.asarray(params[p])[~mask].any() for p, mask in masks(state).items())

    first = masks(state)
    assert "stem/kernel" not in first
    assert "stages/1/0/shortcut/kernel" in first
    for path, mask in first.items():
        assert mask.sum() == mask.size - int(mask.size * spent.sparsity[path])
    other = masks(init(1, 0.1))
    assert any((first[path] != other[path]).any() for path in first)

    histories = []
    for _ in range(2):
        assert zero_where_masked(state)
        state, _ = step(state, batch)
        histories.append(masks(state))
    assert zero_where_masked(state)
    for path, mask in first.items():  # due at step 2 alone
        np.testing.assert_array_equal(histories[0][path], mask)
    assert any((histories[1][path] != mask).any() for path, mask in first.items())


def test_every_family_of_a_backbone_costs_what_the_dense_one_does():
    dense = tiny_plan("dense")[1]
    assert dense.sparsity == {}
    assert dense.used == dense.whole == dense.dense
    for family in ("wide", "parallel", "factorized", "doped"):
        config, spent, method = tiny_plan(family)
        trainer = images.make_trainer(config, method, steps_per_epoch=1, mean=[0.5],
                                      deviation=[0.3])  # fmt: skip
        batch = {"image": jax.ShapeDtypeStruct((4, 8, 8, 1), jnp.uint8),
                 "label": jax.ShapeDtypeStruct((4,), jnp.int32)}  # fmt: skip
        before = jax.eval_shape(trainer.init, 0, 0.1)
        assert jax.eval_shape(trainer.step, before, batch)[0] == before
        assert spent.dense == dense.dense
        assert spent.used == pytest.approx(spent.dense, rel=0.01)
        paths = list(spent.sparsity)
        assert not any(path.startswith(("stem", "head")) for path in paths)
        if family == "parallel":
            model = nnx.eval_shape(lambda method=method: method.build(nnx.Rngs(0)))
            assert isinstance(model.stages[1][0], weights.ParallelResidualBlock)
            assert len(paths) == 4 * 4
    narrow = tiny_plan("narrow")[1]
    assert narrow.used < 0.5 * narrow.dense
    unmatched = tiny_plan("wide", match_flops=False)[1]
    assert set(unmatched.sparsity.values()) == {0.75}


def test_erk_shares_differ_and_meet_the_budget():
    uniform, erk = (tiny_plan("wide", distribution=d)[1] for d in ("uniform", "erk"))
    assert len(set(uniform.sparsity.values())) == 1
    assert len(set(erk.sparsity.values())) > 1
    assert erk.used == pytest.approx(erk.dense, rel=0.01)


def test_layers_inside_a_backbone_know_training_from_testing():
    model = images.build_backbone(BACKBONE, classes=10, side=8, channels=1, rngs=nnx.Rngs(0),
                                  stage_sizes=(1,), base_width=4)  # fmt: skip
    arm = Arm("factorized", 0.75, "rigl", 0)
    model = networks.build_arm(arm, BACKBONE, lambda rngs: model, nnx.Rngs(1))
    norm = model.stages[0][0].conv1.norm
    x = jnp.ones((2, 8, 8, 1)) * jnp.arange(8.0)[:, None]
    before = np.asarray(norm.mean[...])
    images.logits(model, x, train=False)
    np.testing.assert_array_equal(norm.mean[...], before)
    images.logits(model, x, train=True)
    assert np.any(np.asarray(norm.mean[...]) != before)


def test_a_backbone_is_trained(tmp_path, monkeypatch):
    small = lambda name, **changes: resnet_config(name, **changes, stage_sizes=(1,))  # noqa: E731
    monkeypatch.setattr(images, "resnet_config", small)
    config = dataclasses.replace(
        TEST, out=str(tmp_path), model="resnet20", family=("wide:0.5:static",), epochs=1, seeds=1,
        batch=700, nesterov=True, schedule="multistep",
    )  # fmt: skip
    execute(EXPERIMENT, config)
    summary = json.loads((only_run(tmp_path) / "summary.json").read_text())
    values = summary["metrics"]["wide-0.5-static"]["0.1"]
    assert 0 <= values["test_accuracy"][0] <= 100
    # a wider head is dense: a few more non-zeros at equal FLOPs
    assert 0 < values["nonzeros"][0] - (9 * 16 + 2 * 9 * 16**2 + 160) < 100
    assert values["training_flops"][0] == pytest.approx(6 * (64 * (144 + 4608) + 160), rel=1e-3)
    assert "nothing is compared" in summary["claims"][0]["sentence"]


def test_the_rate_falls_in_steps():
    config = dataclasses.replace(BACKBONE, schedule="multistep")
    rate = images.learning_rate(config, 10, 1.0)
    found = [float(rate(jnp.int32(step))) for step in (0, 29, 30, 59, 60, 80, 99)]
    np.testing.assert_allclose(found, [1, 1, 0.2, 0.2, 0.04, 0.008, 0.008], rtol=1e-6)


def test_the_paper_setting_is_checked_as_far_as_it_can_be_built(capsys):
    assert execute(EXPERIMENT, PRESETS["paper"]) is None
    printed = capsys.readouterr().out
    for piece in ("resnet18_cifar on cifar100, 44,755,172 parameters, 200 epochs of 390 steps",
                  "wide 0.75 RigL: 2,218,233,856 multiply-accumulates", "in 19 layers",
                  "1.0000 of the dense network's 555,468,800", "one training step traced",
                  "prepare it once with tensorflow-cpu"):  # fmt: skip
        assert piece in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--family", "tall"], "family is 'tall'; it must look like wide, wide:0.9"),
        (["--family", "wide:2"], "family is 'wide:2'"),
        (["--family"], "family"),
        (["--sparsity", "1"], "sparsity is 1.0; it must be between 0 and 1"),
        (["--sparsity", "0.6"], "1 / (1 - sparsity) is 2.5, further than 0.05 from a whole number"),
        (["--mask", "magic"], "mask"),
        (["--distribution", "flat"], "distribution"),
        (["--drop-fraction", "1"], "drop_fraction is 1.0; it must be in [0, 1)"),
        (["--update-every", "0"], "update_every is 0; it must be at least 1"),
        (["--end-fraction", "0"], "end_fraction is 0.0; it must be in (0, 1]"),
        (["--width", "0"], "width is 0"),
        (["--lr", "-1"], "lr is (-1.0,); give positive values"),
        (["--batch", "2000"], "batch is 2000; it must be from 1 to 1000"),
        (["--family", "doped:0.05", "--width", "2"], "leaves no rank"),
        (["--model", "vit_tiny_patch4"], "Sparse-IFT is here for the mlp and for convolutions"),
        (["--model", "resnet20", "--optimizer", "adamw", "--nesterov"], "nesterov is for sgd"),
        (["--model", "resnet19"], "model is 'resnet19'; known are mlp, resnet18"),
        (["--dataset", "cifar10", "--model", "resnet20"], "prepare it once with tensorflow-cpu"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, error_of):
    family = ["--family", "wide"] if "--sparsity" in arguments else []
    assert message in error_of(EXPERIMENT, [*arguments, *family])


def test_claims_are_computed_from_the_figures():
    config = dataclasses.replace(PRESETS["laptop"], family=("dense", "wide", "wide:0.75:static"))

    def arm(accuracy, loss, nonzeros=1000.0, collapsed=0.0):
        values = {"test_accuracy": [accuracy] * 8, "test_loss": [loss] * 8,
                  "nonzeros": [nonzeros] * 8, "collapsed": [collapsed] * 8}  # fmt: skip
        return dict.fromkeys(config.lr, values)

    found = {
        f"{name}-w{width}": values
        for width in (12, 8)
        for name, values in (("dense", arm(95.0, 0.2)), ("wide-0.75-rigl", arm(96.0, 0.17, 1004.0)),
                             ("wide-0.75-static", arm(95.5, 0.19)))
    }  # fmt: skip
    holds = lambda: [c.holds for c in report.make_claims(config, found)]  # noqa: E731
    assert holds() == [True, True, True, True]
    found["wide-0.75-rigl-w12"] = arm(95.4, 0.19, 1004.0)  # the loss is too high
    assert holds() == [False, False, True, True]
    found["wide-0.75-rigl-w8"] = arm(94.0, 0.1, 980.0)
    assert holds() == [False, False, False, False]


def test_arms_are_named_by_what_differs():
    config = PRESETS["laptop"]
    arms = config.arms()
    assert len(arms) == 22
    assert arms["wide-0.9-set-w8"] == Arm("wide", 0.9, "set", 8)
    assert config.labels()["wide-0.9-set-w8"] == "wide 0.9 SET"
    assert {arm.family for arm in arms.values()} == set(FAMILIES)
    assert list(PRESETS["paper"].arms()) == ["dense", "wide-0.75-rigl"]
    assert digits.static_settings(config) == dataclasses.replace(config, out="")
