"""`python -m experiments.crate`: every variant end to end, its parts, the paper's setting."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.crate import classify, dino, mae, measures, text
from experiments.crate.__main__ import EXPERIMENT
from experiments.crate.config import PRESETS
from experiments.harness import cli
from experiments.harness.config import ExperimentError
from experiments.harness.data.images import load_images
from experiments.harness.run import execute
from sparsejax.coding import masked_patch_loss, patchify, random_keep

TEST = PRESETS["test"]


@pytest.fixture(scope="module", autouse=True)
def datasets(tmp_path_factory):
    """Datasets of this module, away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEJAX_DATA", str(tmp_path_factory.mktemp("datasets")))
        yield


def quick(variant):
    return ["--variant", variant, "--preset", "test"]


def summary_of(out):
    (folder,) = (out / "crate").iterdir()
    return folder, json.loads((folder / "summary.json").read_text())


def resumed_to_the_same(folder, summary):
    """A finished run that is resumed trains nothing and says the same."""
    stamps = {file: file.stat().st_mtime_ns for file in (folder / "arms").iterdir()}
    execute(EXPERIMENT, cli.parse(EXPERIMENT, ["--resume", str(folder)]))
    assert {file: file.stat().st_mtime_ns for file in (folder / "arms").iterdir()} == stamps
    again = json.loads((folder / "summary.json").read_text())
    assert again["metrics"] == summary["metrics"]
    assert again["claims"] == summary["claims"]


def test_classifiers_and_their_resumption(tmp_path, capsys):
    execute(EXPERIMENT, dataclasses.replace(TEST, seeds=1, out=str(tmp_path)))
    printed = capsys.readouterr().out
    folder, summary = summary_of(tmp_path)
    assert "claim: with 0.32 of the parameters of a ViT of equal width CRATE" in printed
    for name in ("rate", "density", "attention"):
        assert (folder / f"{name}.png").stat().st_size > 5000
    crate = summary["metrics"]["crate"]["0.003"]
    vit = summary["metrics"]["vit"]["0.003"]
    assert crate["parameters"] == [2306]
    assert set(vit) == {"parameters", "test_accuracy", "test_loss", "train_loss"}
    for kind in ("random", "trained"):
        assert np.shape(crate[f"rate_{kind}"]) == (1, 2)  # seeds, layers
        assert (np.asarray(crate[f"rate_{kind}_deviation"]) > 0).all()
        density = np.asarray(crate[f"density_{kind}"])
        assert ((density > 0) & (density < 1)).all()
    assert crate["rate_random"] != crate["rate_trained"]
    kept = json.loads((folder / "arms" / "crate-lr0.003.json").read_text())
    maps = np.asarray(kept["attention"])
    assert maps.shape == (1, 3, 2, 16)  # seeds, images, heads, patches
    assert ((maps.sum(-1) > 0) & (maps.sum(-1) <= 1)).all()  # the class token has the rest
    first = summary["claims"][0]
    means = [np.mean(arm["test_accuracy"]) for arm in (crate, vit)]
    assert first["holds"] == (means[0] >= means[1] - 2)

    resumed_to_the_same(folder, summary)


@pytest.mark.parametrize(
    ("variant", "figures"),
    [
        ("mae", ("reconstructions",)),
        ("dino", ("views", "attention")),
        ("gpt", ("losses",)),
    ],
)
def test_the_other_variants_and_their_resumption(variant, figures, tmp_path):
    execute(EXPERIMENT, cli.parse(EXPERIMENT, [*quick(variant), "--out", str(tmp_path)]))
    folder, summary = summary_of(tmp_path)
    for name in figures:
        assert (folder / f"{name}.png").stat().st_size > 5000
    assert summary["preset"] == f"{variant}_test"
    assert len(summary["claims"]) == {"mae": 2, "dino": 2, "gpt": 3}[variant]
    metrics = summary["metrics"]
    if variant == "gpt":
        assert set(metrics["arms"]) == {"crate", "wide", "small"}
        assert 2.5 < metrics["unigram"] < np.log(256)
        sizes = {name: arm["0.003"]["parameters"][0] for name, arm in metrics["arms"].items()}
        assert sizes["small"] <= sizes["crate"] < sizes["wide"]
        for arm in metrics["arms"].values():
            assert 2 < arm["0.003"]["test_loss"][0] < 7
    else:
        found = metrics[variant]["0.003"]
        for kind in ("trained", "random", "pixels"):
            for measure in ("probe", "neighbours"):
                assert 0 <= found[f"{measure}_{kind}"][0] <= 100
        assert found["probe_pixels"][0] > 70  # 100 digits say as much
    if variant != "mae":
        return
    # the state of a finished training is there, where what was measured of it got lost
    (kept,) = (folder / "arms").iterdir()
    before = json.loads(kept.read_text())
    kept.unlink()
    execute(EXPERIMENT, cli.parse(EXPERIMENT, ["--resume", str(folder)]))
    assert json.loads(kept.read_text()) == before


def test_a_seed_cuts_the_digits_anew():
    data = load_images("small_digits")
    config = PRESETS["laptop"]
    zero, one = (measures.share_images(config, data, seed) for seed in (0, 1))
    assert (zero.examples, len(zero.test["label"])) == (1347, 450)
    assert not np.array_equal(zero.test["image"], one.test["image"])
    rows = [np.concatenate([part.train["image"], part.test["image"]]) for part in (zero, one)]
    ordered = [r.reshape(1797, -1)[np.lexsort(r.reshape(1797, -1).T)] for r in rows]
    np.testing.assert_array_equal(ordered[0], ordered[1])
    assert measures.share_images(dataclasses.replace(config, resplit=0), data, 3) is data
    images, labels = measures.first_images(zero, 300)
    np.testing.assert_array_equal(labels, zero.test["label"][:300])
    back = measures.unnormalised(images, zero) * 255
    np.testing.assert_allclose(back, zero.test["image"][:300], atol=1e-3)
    train, _ = measures.first_images(zero, 10_000, train=True)
    assert len(train) == 1347
    with pytest.raises(ExperimentError, match="resplit is 1797; there are 1797 images in all"):
        measures.share_images(dataclasses.replace(config, resplit=1797), data, 0)
    streamed = dataclasses.replace(data, fixed=False)
    with pytest.raises(ExperimentError, match="resplit is 1347; small_digits is not held in memor"):
        measures.share_images(config, streamed, 0)


def test_neighbours_and_probe_read_what_features_hold():
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 3
    clear = np.eye(3, dtype=np.float32)[labels] + 0.1 * rng.normal(size=(120, 3)).astype("f4")
    noise = rng.normal(size=(120, 3)).astype(np.float32)
    for features, low, high in ((clear, 99, 100), (noise, 10, 60)):
        both = (features[:60], labels[:60], features[60:], labels[60:])
        found = (measures.neighbour_accuracy(*both, neighbours=5), measures.probe_accuracy(*both))
        assert all(low <= value <= high for value in found)


def test_constants_and_pixels_of_the_autoencoder():
    images = jax.random.normal(jax.random.key(0), (3, 8, 8, 2))
    keep = random_keep(jax.random.uniform(jax.random.key(1), (3, 16)), 0.75)
    patches = patchify(images, 2)
    np.testing.assert_array_equal(mae.as_pixels(np.asarray(patches), np.asarray(images), 2), images)
    guess = mae.visible_mean(images, keep, 2)
    for i in range(3):
        wanted = np.asarray(patches)[i][np.asarray(keep)[i]].mean(0)
        np.testing.assert_allclose(guess[i], np.tile(wanted, (16, 1)), rtol=1e-5, atol=1e-6)
    losses = mae.image_losses(guess, keep, images, 2)
    # every image removes as many patches, so the mean of the images is the loss of the batch
    whole = masked_patch_loss(guess, images, keep, patch=2)
    np.testing.assert_allclose(losses.mean(), whole, rtol=1e-5)


def test_views_are_crops():
    config = dataclasses.replace(PRESETS["dino"], rotation=0.0, jitter=0.0, local_views=2)
    images = jax.random.uniform(jax.random.key(0), (5, 8, 8, 1))
    key = jax.random.key(1)
    same = dino.random_views(key, images, config, (1.0, 1.0))
    np.testing.assert_allclose(same, images, atol=1e-5)
    ramp = jnp.broadcast_to(jnp.arange(8.0)[:, None, None], (5, 8, 8, 1))
    half = np.asarray(dino.random_views(key, ramp, config, (0.5, 0.5)))
    # rows are half a pixel apart, within the image, the same in each column, and differ by image
    np.testing.assert_allclose(np.diff(half, axis=1), 0.5, atol=1e-5)
    assert half.min() >= -1e-5
    assert half.max() <= 7 + 1e-5
    assert np.ptp(half[:, 0, 0, 0]) > 0.1
    views = dino.make_views(key, images, config)
    assert views.shape == (4, 5, 8, 8, 1)
    turned = dataclasses.replace(config, rotation=0.5)
    assert not np.allclose(dino.random_views(key, images, turned, (1.0, 1.0)), images, atol=1e-2)


@pytest.mark.parametrize("balance", ["center", "sinkhorn"])
def test_the_teacher_follows_the_student(balance):
    config = dataclasses.replace(PRESETS["dino_test"], balance=balance)
    data = load_images("small_digits")
    sizes = config.crate(side=8, channels=1, classes=config.hidden)
    goal = dino.objective(config, dino.make_network(config, sizes), data, steps=10)
    params, memory = goal.init(jax.random.key(0))
    batch = {"image": data.train["image"][:4]}
    step = jax.jit(jax.value_and_grad(goal.loss, has_aux=True))
    (loss, (after, _)), grads = step(params, memory, batch, jax.random.key(1))
    assert float(loss) > 0
    assert ("center" in after) == (balance == "center")
    if balance == "center":
        assert float(jnp.abs(after["center"]).max()) > 0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    moved = jax.tree.map(lambda p: p + 1, params)
    for count, kept in ((0, config.teacher_momentum), (10, 1.0)):
        teacher = goal.remember(memory, moved, jnp.int32(count))["teacher"]
        for a, b in zip(jax.tree.leaves(teacher), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(a, b + 1 - kept, rtol=1e-4, atol=1e-5)


def test_masked_bytes_are_hidden_and_count_alone():
    windows = jnp.asarray(np.random.default_rng(0).integers(0, 256, (50, 41)))
    config = PRESETS["bert"]
    tokens, targets, counted = text.posed(config, windows, jax.random.key(0))
    np.testing.assert_array_equal(targets, windows[:, :-1])
    np.testing.assert_array_equal(tokens == text.MASK, counted)
    np.testing.assert_array_equal(tokens[~counted], targets[~counted])
    assert 0.12 < counted.mean() < 0.18
    tokens, targets, counted = text.posed(PRESETS["gpt"], windows, jax.random.key(0))
    np.testing.assert_array_equal(tokens[:, 1:], targets[:, :-1])
    assert counted.all()


@pytest.mark.parametrize("variant", ["gpt", "bert"])
def test_what_text_models_see(variant):
    config = PRESETS[f"{variant}_test"]
    arms = text.arms_of(dataclasses.replace(config, alpha_width=4 * (variant == "gpt")))
    wide = {"crate", "wide"} | ({"crate_alpha"} if variant == "gpt" else set())
    assert set(arms) - {"small"} == wide
    both = jnp.zeros((2, 16), jnp.int32).at[1, -1].set(7)
    for name in ("crate", "wide"):
        logits = jax.jit(lambda key, build: build(key)(both), static_argnums=1)
        first, second = logits(jax.random.key(0), arms[name])
        changed = not np.allclose(first[0], second[0], atol=1e-7)
        assert changed == (variant == "bert"), name
        assert first.shape == (16, text.vocabulary(config))


def found_of(**arms):
    return {name: {3e-3: {k: [v, v] for k, v in values.items()}} for name, values in arms.items()}


def test_claims_are_computed_from_the_figures():
    layers = {
        "rate_trained": [3.0, 2.0], "density_trained": [0.4, 0.3],
        "rate_random": [3.0, 3.0], "density_random": [0.4, 0.4],
    }  # fmt: skip
    vit = {"test_accuracy": 95.0, "test_loss": 0.2, "parameters": 400}

    def classified(accuracy, **changes):
        arm = {**layers, "test_accuracy": accuracy, "test_loss": 0.2, "parameters": 100, **changes}
        claims = classify.make_claims(TEST, found_of(crate=arm, vit=vit))
        return [claim.holds for claim in claims]

    assert classified(93.5) == [True, True]
    assert classified(92.5) == [False, True]
    assert classified(93.5, rate_trained=[2.0, 3.0]) == [True, False]
    assert classified(93.5, density_trained=[0.3, 0.3]) == [True, False]

    scores = {"test_loss": 0.3, "visible_loss": 1.0, "place_loss": 0.5, "probe_random": 80.0,
              "probe_pixels": 90.0}  # fmt: skip
    for changes, wanted in (
        ({}, [True, True]),
        ({"place_loss": 0.2}, [False, True]),
        ({"visible_loss": 0.5, "probe_random": 99.0}, [False] * 2),
    ):
        arm = {"probe_trained": 90.0, **scores, **changes}
        claims = mae.make_claims(PRESETS["mae"], found_of(mae=arm))
        assert [claim.holds for claim in claims] == wanted

    arm = {"test_loss": 0.1, "neighbours_trained": 90.0, "neighbours_random": 84.0,
           "neighbours_pixels": 97.0, "told_apart": 30.0}  # fmt: skip
    for changes, wanted in (({}, [True, True]), ({"neighbours_random": 86.0}, [False, True]),
                            ({"told_apart": 2.0}, [True, False])):  # fmt: skip
        claims = dino.make_claims(PRESETS["dino"], found_of(dino={**arm, **changes}))
        assert [claim.holds for claim in claims] == wanted

    def spoken(crate, wide, least, alpha):
        losses = {"crate": crate, "wide": wide, "small": least, "crate_alpha": alpha}
        arms = {name: {"test_loss": v, "parameters": 100} for name, v in losses.items()}
        claims = text.make_claims(PRESETS["gpt"], found_of(**arms), unigram=3.0)
        return [claim.holds for claim in claims]

    assert spoken(2.4, 2.0, 2.3, 2.2) == [True, True, True, True]
    assert spoken(2.6, 2.0, 2.7, 2.7) == [False, False, False, False]


def test_the_paper_setting_is_checked_as_far_as_it_can_be_built(capsys):
    assert execute(EXPERIMENT, PRESETS["paper"]) is None
    printed = capsys.readouterr().out
    for piece in (
        "crate_base_patch16 on imagenet2012, 22,796,008 parameters, 150 epochs of 625 steps",
        "vit_base_patch16 on imagenet2012",
        "one training step traced",
        "prepare it once with tensorflow-cpu",
    ):
        assert piece in printed


@pytest.mark.parametrize(
    ("variant", "pieces"),
    [
        ("mae", ["crate_base_patch16 on imagenet2012, 43,745,280 parameters, 800 epochs of 312"]),
        ("dino", ["crate_small_patch16 on imagenet2012", "100 epochs of 1,251 steps with 1024"]),
        ("gpt", ["600,000 steps of 384 x 1024 bytes of c4/en", "CRATE: 22,255,104 parameters",
                 "CRATE-alpha: 71,800,320", "GPT, equal parameters: 21,785,856"]),
        ("bert", ["12 blocks of width 768", "transformer, equal width: 85,646,592 parameters"]),
    ],
)  # fmt: skip
def test_a_step_of_every_variant_is_traced_at_full_size(variant, pieces, capsys):
    config = cli.parse(EXPERIMENT, ["--variant", variant, "--preset", "paper"])
    assert execute(EXPERIMENT, config) is None
    printed = capsys.readouterr().out
    for piece in (*pieces, "one training step traced", "checked abstractly: dataset"):
        assert piece in printed


def test_a_variant_has_presets_of_its_own():
    for arguments, preset in (
        ([], "laptop"),
        (["--variant", "classify"], "laptop"),
        (["--variant", "mae"], "mae"),
        (["--variant=mae", "--seeds", "2"], "mae"),
        (["--preset", "mae"], "mae"),
        (["--preset", "test", "--variant", "classify"], "test"),
        (["--preset=test", "--variant=dino"], "dino_test"),
    ):
        assert cli.parse(EXPERIMENT, arguments).preset == preset
    config = cli.parse(EXPERIMENT, ["--variant=mae", "--seeds", "2"])
    assert config == dataclasses.replace(PRESETS["mae"], seeds=2)
    assert [PRESETS[name].preset for name in PRESETS] == list(PRESETS)


@pytest.mark.parametrize(
    ("preset", "arguments", "message"),
    [
        (
            "test",
            ["--variant", "gan"],
            "variant is 'gan'; crate has classify, mae, dino, gpt, bert",
        ),
        ("mae", ["--variant", "dino"], "preset is 'dino_mae'; crate has laptop, test, paper, mae"),
        ("test", ["--model", "resnet20"], "model is 'resnet20'; it must be crate_SIZE_patchN"),
        ("test", ["--model", "crate_huge_patch2"], "model is 'crate_huge_patch2'; known are mlp"),
        ("test", ["--model", "crate_tiny_patch3"], "model crate_tiny_patch3: "),
        ("test", ["--heads", "3"], "n_heads is 3; it must divide d_model"),
        ("test", ["--layers", "0"], "layers is 0; it must be at least 1"),
        ("test", ["--measured", "0"], "measured is 0; it must be at least 1"),
        ("test", ["--lam", "-1"], "resplit is 1347 and lam -1.0; neither may be negative"),
        ("test", ["--learning-rates", "0"], "learning_rates are (0.0,); give positive ones"),
        ("test", ["--clip-norm", "-1"], "clip_norm is -1.0; it must not be negative"),
        ("test", ["--batch", "1400"], "batch is 1400; there are 1347 images"),
        ("mae", ["--ratio", "1"], "ratio is 1.0; it must be between 0 and 1"),
        ("mae", ["--neighbours", "0"], "neighbours is 0; it must be at least 1"),
        ("mae", ["--label-smoothing", "0.1"], "label_smoothing is 0.1; this training has no label"),
        ("mae", ["--model", "vit_tiny_patch2"], "model is 'vit_tiny_patch2'; it must be crate_SI"),
        ("mae", ["--batch", "1400"], "batch is 1400; there are 1347 examples"),
        ("dino", ["--prototypes", "0"], "prototypes is 0; it must be at least 1"),
        ("dino", ["--local-zoom", "0.9", "0.5"], "local_zoom is (0.9, 0.5); give two positive"),
        ("dino", ["--teacher-temperature", "0"], "teacher_temperature is 0.0; it must be positive"),
        ("dino", ["--teacher-momentum", "1"], "teacher_momentum is 1.0; it must be in [0, 1)"),
        ("dino", ["--rotation", "-1"], "local_views is 2 and rotation -1.0; neither may be neg"),
        ("gpt", ["--kv-heads", "2"], "kv_heads is 2; heads of d_model / heads are all there are"),
        ("gpt", ["--positions", "rope"], "positions is 'rope'; these models learn them"),
        ("gpt", ["--alpha-width", "-1"], "alpha_width -1 and clip_norm 1.0"),
        ("gpt", ["--heads", "3"], "n_heads is 3; it must divide d_model"),
        ("bert", ["--masked", "1"], "masked is 1.0; it must be between 0 and 1"),
    ],
)
def test_bad_input_is_one_clear_line(preset, arguments, message, error_of):
    assert message in error_of(EXPERIMENT, arguments, preset=preset)
