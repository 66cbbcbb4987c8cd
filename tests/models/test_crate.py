"""CRATE: the vectors of all its models, sizes, statistics, PyTorch's layout, and composition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from sparsejax import coding
from sparsejax.coding.crate import dictionary_init
from sparsejax.core import named_leaves
from sparsejax.models import (
    CRATE_SIZES,
    ISTA,
    CrateBlock,
    CrateClassifier,
    CrateConfig,
    CrateDecoderBlock,
    CrateImageConfig,
    CrateLM,
    CrateMAE,
    CrateTextConfig,
    class_attention,
    crate_config,
    crate_from_torch,
    crate_param_specs,
    crate_to_torch,
    layer_statistics,
    load_crate,
    save_crate,
)
from sparsejax.models.loading import CheckpointError

COUNTS = {"tiny": 6_090_856, "small": 13_116_328, "base": 22_796_008, "large": 77_641_192}
MAE_COUNTS = {"tiny": 11.40e6, "small": 25.18e6, "base": 44.34e6}
IMAGE = CrateImageConfig(
    d_model=16, n_layers=2, n_heads=4, image_size=8, patch_size=4, num_classes=5
)
TEXT = CrateTextConfig(d_model=16, n_layers=2, n_heads=4, vocab_size=32, max_seq_len=12)
run = nnx.jit(lambda model, *inputs, **options: model(*inputs, **options))
detailed = nnx.jit(layer_statistics)


@functools.cache
def classifier(**overrides):
    return CrateClassifier(dataclasses.replace(IMAGE, **overrides), rngs=nnx.Rngs(0))


def images(b=3, side=8):
    return jax.random.normal(jax.random.key(1), (b, side, side, 3))


def tokens(b=2, t=10):
    return jax.random.randint(jax.random.key(2), (b, t), 0, 32)


@pytest.mark.vectors
def test_mssa_vectors(reference):
    file = reference("crate")
    for case in file.cases("mssa"):
        inputs = [jnp.asarray(case[n]) for n in ("x", "w_qkv", "w_out", "b_out")]
        y, back = jax.vjp(functools.partial(coding.mssa, heads=case["heads"]), *inputs)
        np.testing.assert_allclose(y, case["y"], rtol=1e-9, atol=1e-12)
        for name, grad in zip(
            ("x", "w_qkv", "w_out", "b_out"), back(jnp.asarray(case["cotangent"]))
        ):
            np.testing.assert_allclose(grad, case[f"grad_{name}"], rtol=1e-9, atol=1e-12)
        weights, heads = inputs[1:], case["heads"]
    for case in file.cases("causal"):
        mask = jnp.tril(jnp.ones((1, 1, 5, 5), bool))
        y = coding.mssa(jnp.asarray(case["x"]), *weights, heads=heads, mask=mask)
        np.testing.assert_allclose(y, case["y"], rtol=1e-9, atol=1e-12)
    case = next(iter(file.cases("sincos")))
    table = coding.sincos_positions(16, 3)
    np.testing.assert_allclose(table, case["pos_embed_16x3grid"], atol=1e-6)


def with_torch(block, case, names, config):
    """A block with the parameters of a case, by the names of the published code."""
    flat = {path: None for path, _ in named_leaves(nnx.state(block))}
    transposed = {"kernel"}
    for path, name in names.items():
        value = jnp.asarray(case[f"param/{name}"], jnp.float32)
        flat[path] = value.T if path.split("/")[-1] in transposed else value
    assert None not in flat.values()
    graph, state = nnx.split(block)
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), list(flat.values())))


ENCODER = {
    "attention/out_proj/bias": "layers.0.0.fn.to_out.0.bias",
    "attention/out_proj/kernel": "layers.0.0.fn.to_out.0.weight",
    "attention/qkv/kernel": "layers.0.0.fn.qkv.weight",
    "attention_norm/bias": "layers.0.0.norm.bias",
    "attention_norm/scale": "layers.0.0.norm.weight",
    "ista/dictionary": "layers.0.1.fn.weight",
    "ista_norm/bias": "layers.0.1.norm.bias",
    "ista_norm/scale": "layers.0.1.norm.weight",
}
DECODER = {
    "attention/out_proj/bias": "layers.0.1.fn.to_out.0.bias",
    "attention/out_proj/kernel": "layers.0.1.fn.to_out.0.weight",
    "attention/qkv/kernel": "layers.0.1.fn.qkv.weight",
    "attention_norm/bias": "layers.0.1.norm.bias",
    "attention_norm/scale": "layers.0.1.norm.weight",
    "dictionary": "layers.0.0.fn.weight",
    "linear_norm/bias": "layers.0.0.norm.bias",
    "linear_norm/scale": "layers.0.0.norm.weight",
}


@pytest.mark.vectors
def test_block_vectors(reference):
    """In float32, the dtype of the norms' statistics."""
    file = reference("crate")
    config = CrateConfig(d_model=10, n_layers=1, n_heads=3, head_dim=4)
    for case in file.cases("enc"):
        block = CrateBlock(dataclasses.replace(config, lam=case["lam"]), rngs=nnx.Rngs(0))
        block = with_torch(block, case, ENCODER, config)
        y = block(jnp.asarray(case["x"], jnp.float32))
        np.testing.assert_allclose(y, case["y"], rtol=1e-5, atol=1e-6)
    for kind in ("softmax", "linear"):
        for case in file.cases(f"dec_{kind}"):
            block = CrateDecoderBlock(config, rngs=nnx.Rngs(0), use_softmax=kind == "softmax")
            block = with_torch(block, case, DECODER, config)
            y, back = jax.vjp(block, jnp.asarray(case["x"], jnp.float32))
            np.testing.assert_allclose(y, case["y"], rtol=1e-4, atol=1e-5)
            (grad,) = back(jnp.asarray(case["cotangent"], jnp.float32))
            np.testing.assert_allclose(grad, case["grad_x"], rtol=1e-4, atol=2e-5)


@pytest.mark.vectors
def test_classifier_vectors(reference):
    case = next(iter(reference("crate").cases("model")))
    config = CrateImageConfig(
        d_model=10, n_layers=case["depth"], n_heads=case["heads"], head_dim=4, image_size=(8, 12),
        patch_size=case["patch"], num_classes=5,
    )  # fmt: skip
    names = [n.removeprefix("param/") for n in case.names() if n.startswith("param/")]
    state_dict = {name: case[f"param/{name}"] for name in names}
    model = crate_from_torch(state_dict, config, kind=CrateClassifier)
    x = jnp.asarray(case["image_nchw"], jnp.float32).transpose(0, 2, 3, 1)
    graph, params = nnx.split(model)

    def loss(params, x):
        logits = nnx.merge(graph, params)(x)
        smooth = optax.smooth_labels(
            jax.nn.one_hot(case["labels"], 5, dtype=jnp.float32), case["label_smoothing"]
        )
        return optax.softmax_cross_entropy(logits, smooth).mean(), logits

    (value, logits), (grads, grad_x) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        params, x
    )
    np.testing.assert_allclose(logits, case["logits"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(value, case["loss"], rtol=1e-5)
    expected = case["grad_image"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(grad_x, expected, rtol=1e-3, atol=1e-5)
    layers = "grad/transformer.layers.0"
    found = dict(named_leaves(grads))
    for got, name in (
        (found["blocks/ista/dictionary"][0], f"{layers}.1.fn.weight"),
        (found["blocks/attention/qkv/kernel"][0].T, f"{layers}.0.fn.qkv.weight"),
        (found["positions/embedding"][None], "grad/pos_embedding"),
    ):
        np.testing.assert_allclose(got, case[name], rtol=1e-3, atol=1e-5)
    seen = layer_statistics(model, x)
    rates = case["layer_coding_rate_mean_std"]
    np.testing.assert_allclose(seen["rate"].mean(axis=1), rates[:, 0], rtol=1e-4)
    np.testing.assert_allclose(seen["rate"].std(axis=1, ddof=1), rates[:, 1], rtol=1e-3, atol=1e-4)
    zeros = case["layer_zero_fraction_per_image"]
    np.testing.assert_allclose(1 - seen["density"], zeros, atol=1e-6)
    back = crate_to_torch(model)
    assert set(back) == set(state_dict)
    for name, value in state_dict.items():
        np.testing.assert_allclose(back[name], value, rtol=1e-6)


@pytest.mark.vectors
def test_mae_vectors(reference):
    case = next(iter(reference("crate").cases("mae")))
    config = CrateImageConfig(
        d_model=12, n_layers=1, n_heads=case["heads"], image_size=12, patch_size=case["patch"],
        lam=0.5,
    )  # fmt: skip
    names = [n.removeprefix("param/") for n in case.names() if n.startswith("param/")]
    state_dict = {name: case[f"param/{name}"] for name in names}
    table = coding.sincos_positions(12, 3)
    np.testing.assert_allclose(state_dict["decoder_pos_embed"][0], table, atol=1e-6)
    model = crate_from_torch(state_dict, config, kind=CrateMAE)
    x = jnp.asarray(case["image_nchw"], jnp.float32).transpose(0, 2, 3, 1)
    noise = jnp.asarray(case["noise"], jnp.float32)
    graph, params = nnx.split(model)

    def loss(params):
        prediction, keep = nnx.merge(graph, params)(x, noise, ratio=case["mask_ratio"])
        value = coding.masked_patch_loss(prediction, x, keep, patch=4, normalise=True)
        return value, (prediction, keep)

    (value, (prediction, keep)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    np.testing.assert_array_equal(~keep, case["mask"].astype(bool))
    np.testing.assert_allclose(prediction, case["pred"], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(value, case["loss"], rtol=1e-5)
    np.testing.assert_allclose(coding.patchify(x, 4), case["target_patches"], rtol=1e-6)
    found = dict(named_leaves(grads))
    np.testing.assert_allclose(
        found["blocks/ista/dictionary"][0], case["grad/blocks.0.layers.0.1.fn.weight"],
        rtol=2e-3, atol=1e-5,
    )  # fmt: skip
    np.testing.assert_allclose(
        found["mask_token/embedding"], case["grad/mask_token"][0], rtol=2e-3, atol=1e-5
    )


@pytest.mark.parametrize("name", CRATE_SIZES)
def test_sizes(name):
    """Built abstractly, with the parameters that the papers count."""
    for kind, counts in ((CrateClassifier, COUNTS), (CrateMAE, MAE_COUNTS)):
        if name in counts:
            model = nnx.eval_shape(lambda: kind(CRATE_SIZES[name], rngs=nnx.Rngs(0)))  # noqa: B023
            count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
            if kind is CrateClassifier:
                assert count == counts[name]
            else:  # the published count has a linear layer that nothing uses
                d = CRATE_SIZES[name].d_model
                assert count + d * d + d == pytest.approx(counts[name], rel=1e-3)


def test_a_program_does_not_grow_with_depth():
    """Blocks are scanned, forward and backward: what is compiled at 24 layers is what is at 2."""

    def equations(depth):
        sizes = dataclasses.replace(IMAGE, n_layers=depth)
        graph, params = nnx.split(nnx.eval_shape(lambda: CrateMAE(sizes, rngs=nnx.Rngs(0))))

        def loss(params, images, noise):
            return nnx.merge(graph, params)(images, noise, ratio=0.75)[0].sum()

        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 8, 8, 3), (2, 4))]
        return str(jax.make_jaxpr(jax.grad(loss))(params, *shapes)).count("=")

    assert equations(2) == equations(24)


def test_initial_values():
    config = crate_config("small", n_layers=1, image_size=32)
    flat = dict(named_leaves(nnx.state(CrateClassifier(config, rngs=nnx.Rngs(0)))))
    bound = (6 / 576) ** 0.5
    dictionary = np.asarray(flat["blocks/ista/dictionary"])
    assert 0.98 * bound < np.abs(dictionary).max() <= bound
    assert np.std(flat["positions/embedding"]) == pytest.approx(1, abs=0.05)
    kernel = np.asarray(flat["blocks/attention/qkv/kernel"])
    assert 0.98 * 576**-0.5 < np.abs(kernel).max() <= 576**-0.5
    assert dictionary_init(jax.random.key(0), (2, 3), jnp.float32).shape == (2, 3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_sparsifying_layer_solves_its_lasso(seed, x64):
    """40 steps from the token lower the objective at each, and leave few entries."""
    rng = np.random.default_rng(seed)
    dictionary = np.linalg.qr(rng.normal(size=(64, 64)))[0] + 0.05 / 8 * rng.normal(size=(64, 64))
    codes = np.abs(rng.normal(size=(64, 64))) * (rng.random((64, 64)) < 0.15)
    x, dictionary = jnp.asarray(codes @ dictionary.T), jnp.asarray(dictionary)

    def step(a, _):
        value = coding.objective(x, dictionary, a, lam=0.1).mean()
        return coding.ista_step(a, x, dictionary, step_size=0.1, lam=0.1), value

    after, seen = jax.lax.scan(step, x, length=40)
    assert (np.diff(seen) < 0).all()
    assert seen[0] > 10
    assert 0.5 < float(coding.objective(x, dictionary, after, lam=0.1).mean()) < 0.9
    assert 0.1 < float((after != 0).mean()) < 0.2


def test_details_follow_the_layers():
    model, x = classifier(), images()
    found = detailed(model, x)
    assert found["rate"].shape == (2, 3) == found["density"].shape
    first = model.block(0)
    hidden = model.embedded(x)
    codes = first(hidden)
    np.testing.assert_allclose(found["density"][0], (codes != 0).mean(axis=(1, 2)), rtol=1e-6)
    projected = first.attention.projections(first.attention_norm(hidden))
    np.testing.assert_allclose(
        found["rate"][0], coding.projected_coding_rate(projected, 0.01), rtol=1e-5
    )
    autoencoder = CrateMAE(IMAGE, rngs=nnx.Rngs(0))
    assert detailed(autoencoder, x)["rate"].shape == (2, 3)
    assert autoencoder.features(x).shape == (3, 16)
    maps = class_attention(model, x, 1)
    assert maps.shape == (3, 4, 4)
    assert float(maps.sum(-1).max()) < 1


def test_the_tokens_before_decide_alone_in_a_causal_model():
    model = CrateLM(TEXT, rngs=nnx.Rngs(0))
    ids = tokens()
    changed = ids.at[:, 6].add(1) % 32
    a, b = run(model, ids), run(model, changed)
    np.testing.assert_allclose(a[:, :6], b[:, :6], atol=1e-5)
    assert float(jnp.abs(a[:, 6:] - b[:, 6:]).max()) > 1e-3


def test_padding_is_not_seen_and_types_are():
    config = dataclasses.replace(TEXT, causal=False, type_vocab_size=2)
    model, ids = CrateLM(config, rngs=nnx.Rngs(0)), tokens()
    visible = jnp.arange(10)[None] < jnp.asarray([[7], [10]])
    a = run(model, ids, visible=visible)
    b = run(model, ids.at[0, 8].set(3), visible=visible)
    np.testing.assert_allclose(a[0, :7], b[0, :7], atol=1e-5)
    c = run(model, ids, visible=visible, types=jnp.ones_like(ids))
    assert float(jnp.abs(a - c).max()) > 1e-3
    assert bool(jnp.isfinite(a).all())


def test_alpha_blocks():
    """The wide dictionary: more parameters, codes counted in it, residual and separate output."""
    wide = {"dictionary_width": 64, "dictionary_steps": 2}
    plain, separate = (
        CrateClassifier(dataclasses.replace(IMAGE, **wide, **more), rngs=nnx.Rngs(0))
        for more in ({}, {"dictionary_residual": True, "dictionary_separate": True})
    )
    flat = dict(named_leaves(nnx.state(separate)))
    assert flat["blocks/ista/output"].shape == (2, 16, 64)
    for model in (plain, separate):
        assert run(model, images()).shape == (3, 5)
        density = detailed(model, images())["density"]
        assert 0 < float(density.mean()) < 1
    block, x = plain.block(0), plain.embedded(images())
    half = x + block.attention(block.attention_norm(x))
    _, y = coding.odl_block(
        block.ista_norm(half), block.ista.dictionary[...], step_size=0.1, lam=0.1, num_steps=2
    )
    np.testing.assert_allclose(block(x), y, rtol=1e-5, atol=1e-6)


def test_composition(mesh):
    """bf16, remat, vmap and 8 devices, against the plain model."""
    model, x = classifier(), images(8)
    expected = run(model, x)
    params = nnx.state(model)
    half = nnx.merge(nnx.split(classifier(dtype="bfloat16"))[0], params)
    assert float(jnp.median(jnp.abs(run(half, x) - expected))) < 0.1

    def gradient(graph, params):
        return jax.grad(lambda p: jnp.mean(jnp.square(nnx.merge(graph, p)(x))))(params)

    slopes = [
        jax.jit(functools.partial(gradient, nnx.split(classifier(remat=remat))[0]))(params)
        for remat in (False, True)
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), *slopes)
    graph = nnx.split(model)[0]
    mapped = jax.jit(jax.vmap(lambda x: nnx.merge(graph, params)(x[None])[0]))(x)
    np.testing.assert_allclose(mapped, expected, rtol=1e-4, atol=1e-5)
    specs = crate_param_specs(params)
    placed = jax.tree.map(lambda p, s: jax.device_put(p, NamedSharding(mesh, s)), params, specs)
    spread = jax.device_put(x, NamedSharding(mesh, jax.P("data")))
    np.testing.assert_allclose(
        run(nnx.merge(graph, placed), spread), expected, rtol=1e-4, atol=1e-5
    )
    state = optax.adam(1e-3).init(params)
    assert len(jax.tree.leaves(crate_param_specs(state))) == len(jax.tree.leaves(state))
    for other in (CrateMAE(IMAGE, rngs=nnx.Rngs(0)), CrateLM(TEXT, rngs=nnx.Rngs(0))):
        crate_param_specs(nnx.state(other))


def test_files_round_trip_and_are_not_trusted(tmp_path):
    for kind in (CrateClassifier, CrateMAE):
        model = kind(IMAGE, rngs=nnx.Rngs(3))
        path = tmp_path / f"{kind.__name__}.safetensors"
        save_crate(path, model)
        again = load_crate(path, IMAGE, kind=kind)
        for (name, a), (_, b) in zip(
            named_leaves(nnx.state(model)), named_leaves(nnx.state(again)), strict=True
        ):
            np.testing.assert_array_equal(a, b, err_msg=name)
    path = tmp_path / "CrateClassifier.safetensors"
    with pytest.raises(CheckpointError, match=r"mlp_head.1.weight has shape \(5, 16\)"):
        load_crate(path, dataclasses.replace(IMAGE, num_classes=7), kind=CrateClassifier)
    with pytest.raises(CheckpointError, match=r"pos_embedding is missing.*is no parameter"):
        load_crate(tmp_path / "CrateMAE.safetensors", IMAGE, kind=CrateClassifier)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="problem"):
        load_crate(path, IMAGE, kind=CrateClassifier)
    tensors = crate_to_torch(classifier())
    tensors["cls_token"] = np.full((1, 1, 16), np.nan, np.float32)
    with pytest.raises(CheckpointError, match="cls_token holds values that are not finite"):
        crate_from_torch(tensors, IMAGE, kind=CrateClassifier)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"n_heads": 3}, "n_heads is 3; it must divide d_model, which is 16, unless head_dim"),
        ({"patch_size": 3}, "image_size is 8; patch_size, which is 3, must divide both sides"),
        ({"lam": -1}, "lam is -1; it must not be negative"),
        ({"step_size": 0}, "step_size is 0; it must be positive"),
        ({"dictionary_residual": True}, "dictionary_width, which is None, must be given with it"),
        ({"dtype": "float16"}, "dtype is 'float16'; allowed are float32, bfloat16"),
    ],
)
def test_config_errors(overrides, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(IMAGE, **overrides)


@pytest.mark.usefixtures("unchecked")
def test_errors():
    x, w = jnp.ones((1, 3, 4)), jnp.ones((6, 4))
    with pytest.raises(ValueError, match="w_qkv has 6 rows; heads, which is 4, must divide them"):
        coding.mssa(x, w, jnp.ones((4, 6)), None, heads=4)
    with pytest.raises(ValueError, match=r"w_qkv has shape \(6, 4\) and w_out None for 4 features"):
        coding.mssa(x, w, None, None, heads=2)
    mask = jnp.ones((1, 1, 3, 3), bool)
    with pytest.raises(ValueError, match="mask is given with use_softmax False"):
        coding.mssa(x, w, jnp.ones((4, 6)), None, heads=2, mask=mask, use_softmax=False)
    with pytest.raises(ValueError, match="heads, which is 4, must divide them"):
        coding.attention_maps(x, w, heads=4)
    with pytest.raises(ValueError, match="images are 8 x 8; patch, which is 3, must divide both"):
        coding.patchify(images(), 3)
    with pytest.raises(ValueError, match=r"ratio is 1.0; it must be in \[0, 1\)"):
        coding.random_keep(jnp.ones((1, 4)), 1.0)
    with pytest.raises(ValueError, match="dim is 6; it must be a multiple of 4"):
        coding.sincos_positions(6, 2)
    with pytest.raises(ValueError, match="side is 0; it must be at least 1"):
        coding.sincos_positions(4, 0)
    with pytest.raises(ValueError, match="prediction and keep have shapes"):
        coding.masked_patch_loss(jnp.ones((1, 4, 3)), images(1), jnp.ones((1, 4), bool), patch=4)
    with pytest.raises(ValueError, match="keep removes no patch"):
        coding.masked_patch_loss(jnp.ones((1, 4, 48)), images(1), jnp.ones((1, 4), bool), patch=4)
    with pytest.raises(ValueError, match=r"dictionary has shape \(16, 3\); it must be square"):
        ISTA(IMAGE, rngs=nnx.Rngs(0), dictionary=jnp.ones((16, 3)))
    with pytest.raises(ValueError, match=r"images has the shape \(1, 4, 8, 3\); it must be"):
        classifier()(images(1)[:, :4])
    with pytest.raises(ValueError, match="the masked autoencoder takes squares"):
        CrateMAE(dataclasses.replace(IMAGE, image_size=(8, 4)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="layer is 2; this model has 2"):
        class_attention(classifier(), images(), 2)
    model = CrateLM(TEXT, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="tokens has 13 positions; max_seq_len allows 12"):
        model(tokens(t=13))
    with pytest.raises(ValueError, match="types are given; type_vocab_size, which is 0"):
        model(tokens(), types=tokens())
