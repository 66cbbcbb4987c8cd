"""Convolutional classifiers: sizes, forward passes, batch norm, gradients, seeds and devices."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from sparsejax.core.selection import named_leaves
from sparsejax.models import (
    RESNET_SIZES,
    VGG19,
    BasicBlock,
    BottleneckBlock,
    ConvNetConfig,
    ResNet,
    ResNet9,
    ResNetConfig,
    replicated_specs,
    resnet_config,
)
from sparsejax.models.conv_layers import halved

PUBLISHED = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet18_cifar": 11_173_962,
    "resnet34_cifar": 21_282_122,
    "resnet50_cifar": 23_520_842,
    # by hand: convolutions, two numbers per channel of every batch norm, classifier
    "resnet20": 9 * (48 + 6 * 16**2 + 16 * 32 + 5 * 32**2 + 32 * 64 + 5 * 64**2) + 1_376 + 650,
    "resnet56": 9 * (48 + 18 * 16**2 + 16 * 32 + 17 * 32**2 + 32 * 64 + 17 * 64**2) + 4_064 + 650,
}
SMALL = ResNetConfig(stage_sizes=(1, 1), stem="cifar", base_width=4, num_classes=5)
BOTTLENECK = dataclasses.replace(SMALL, block="bottleneck", stem="imagenet", norm_eps=0.01)
OPTION_A = dataclasses.replace(SMALL, shortcut="identity_pad", norm_momentum=0.7)
NINE = ConvNetConfig(base_width=2, num_classes=5)
MODELS = {
    "basic": (ResNet, SMALL),
    "bottleneck": (ResNet, BOTTLENECK),
    "option_a": (ResNet, OPTION_A),
    "resnet9": (ResNet9, NINE),
    "vgg19": (VGG19, NINE),
}


def abstract(model, config):
    return nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0)))


def count(params):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@functools.cache
def build(name, seed=0, **changes):
    """Graph, parameters and averages: norms random too, so that no zero hides a branch."""
    model, config = MODELS[name]
    config = dataclasses.replace(config, **changes)
    graphdef, params, averages = nnx.split(abstract(model, config), nnx.Param, nnx.BatchStat)
    rng = np.random.default_rng(seed)

    def values(path, leaf):
        if leaf.ndim > 1:
            value = rng.standard_normal(leaf.shape) / math.sqrt(math.prod(leaf.shape[:-1]))
        else:
            value = rng.uniform(0.5, 1.5, leaf.shape)
        return jnp.asarray(value, leaf.dtype)

    fill = functools.partial(jax.tree_util.tree_map_with_path, values)
    return graphdef, fill(params), fill(averages)


@functools.cache
def images(name, seed=0):
    side = {"vgg19": (32, 32), "resnet9": (8, 16), "bottleneck": (19, 16)}.get(name, (9, 8))
    return jax.random.normal(jax.random.key(seed), (8, *side, 3))


@functools.partial(jax.jit, static_argnums=0)
def both(graphdef, params, averages, x):
    """Logits in training, the averages after it, and logits by the averages before it."""
    model = nnx.merge(graphdef, params, averages)
    fixed = model(x, train=False)
    logits = model(x, train=True)
    return logits, nnx.state(model, nnx.BatchStat), fixed


def loss(graphdef, params, averages, x):
    model = nnx.merge(graphdef, params, averages, copy=True)
    logits = model(x, train=True)
    labels = jnp.arange(x.shape[0]) % 5
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
    return -jnp.mean(picked), nnx.state(model, nnx.BatchStat)


loss_and_gradient = jax.jit(jax.value_and_grad(loss, argnums=1, has_aux=True), static_argnums=0)


class NumpyNet:
    """The layers in float64 NumPy; remembers the averages after the call."""

    def __init__(self, params, averages, config, train):
        self.p, self.old = (
            {path: np.asarray(leaf, np.float64) for path, leaf in named_leaves(tree)}
            for tree in (params, averages)
        )
        self.config, self.train, self.new = config, train, {}

    def conv(self, x, name, stride=1):
        kernel = self.p[f"{name}/kernel"]
        size = kernel.shape[0]
        padded = np.pad(x, ((0, 0), *((size // 2, size // 2),) * 2, (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))
        return np.einsum("bhwcij,ijco->bhwo", windows[:, ::stride, ::stride], kernel)

    def norm(self, x, name):
        mean, var = self.old[f"{name}/mean"], self.old[f"{name}/var"]
        if self.train:
            keep = self.config.norm_momentum
            batch_mean, batch_var = x.mean((0, 1, 2)), x.var((0, 1, 2))
            self.new[f"{name}/mean"] = keep * mean + (1 - keep) * batch_mean
            self.new[f"{name}/var"] = keep * var + (1 - keep) * batch_var
            mean, var = batch_mean, batch_var
        x = (x - mean) / np.sqrt(var + self.config.norm_eps)
        return x * self.p[f"{name}/scale"] + self.p[f"{name}/bias"]

    def layer(self, x, name):
        return np.maximum(self.norm(self.conv(x, f"{name}/conv"), f"{name}/norm"), 0)

    def residual(self, x, name):
        return x + self.layer(self.layer(x, f"{name}/0"), f"{name}/1")

    def pool(self, x):
        b, h, w, c = x.shape
        return x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))

    def block(self, x, name, stride):
        strides = (stride, 1) if self.config.block == "basic" else (1, stride, 1)
        y = x
        for i, step in enumerate(strides, 1):
            y = np.maximum(y, 0) if i > 1 else y
            y = self.norm(self.conv(y, f"{name}/conv{i}", step), f"{name}/norm{i}")
        if f"{name}/shortcut/kernel" in self.p:
            x = self.norm(self.conv(x, f"{name}/shortcut", stride), f"{name}/shortcut_norm")
        elif x.shape != y.shape:
            skipped, x = x[:, ::stride, ::stride], np.zeros_like(y)
            x[..., : skipped.shape[-1]] = skipped
        return np.maximum(x + y, 0)

    def resnet(self, x):
        imagenet = self.config.stem == "imagenet"
        x = np.maximum(self.norm(self.conv(x, "stem", 2 if imagenet else 1), "stem_norm"), 0)
        if imagenet:
            padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
            x = windows[:, ::2, ::2].max((-1, -2))
        x = self.block(self.block(x, "stages/0/0", 1), "stages/1/0", 2).mean((1, 2))
        return x @ self.p["head/kernel"] + self.p["head/bias"]

    def resnet9(self, x):
        x = self.pool(self.layer(self.layer(x, "prep"), "layer1"))
        x = self.pool(self.layer(self.residual(x, "residual1"), "layer2"))
        x = self.residual(self.pool(self.layer(x, "layer3")), "residual3")
        return x.max((1, 2)) @ self.p["head/kernel"] / 8

    def vgg19(self, x):
        for i, layers in enumerate((2, 2, 4, 4, 4)):
            for j in range(layers):
                x = self.layer(x, f"stages/{i}/{j}")
            x = self.pool(x)
        return x[:, 0, 0] @ self.p["head/kernel"] + self.p["head/bias"]


# Sizes


@pytest.mark.parametrize("name", RESNET_SIZES)
def test_parameter_counts(name):
    params = nnx.state(abstract(ResNet, resnet_config(name)), nnx.Param)
    assert count(params) == PUBLISHED[name]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_parameter_counts_of_the_small_networks():
    assert (PUBLISHED["resnet20"], PUBLISHED["resnet56"]) == (269_722, 853_018)
    plan = [3, 64, 64, 128, 128, *4 * [256], *8 * [512]]
    convs = sum(9 * a * b + 2 * b for a, b in itertools.pairwise(plan))
    for classes in (10, 100):
        config = ConvNetConfig(num_classes=classes)
        assert count(nnx.state(abstract(VGG19, config), nnx.Param)) == convs + 513 * classes
    assert convs + 51_300 == 20_081_188
    assert count(nnx.state(abstract(ResNet9, ConvNetConfig()), nnx.Param)) == 6_573_120


def test_base_width_scales_the_inner_sides():
    config = resnet_config("resnet18_cifar", base_width=128, num_classes=100)
    shapes = {
        path: leaf.shape
        for path, leaf in named_leaves(nnx.state(abstract(ResNet, config), nnx.Param))
    }
    assert shapes["stem/kernel"] == (3, 3, 3, 128)
    assert shapes["stages/0/1/conv2/kernel"] == (3, 3, 128, 128)
    assert shapes["stages/3/0/conv1/kernel"] == (3, 3, 512, 1024)
    assert shapes["stages/3/0/shortcut/kernel"] == (1, 1, 512, 1024)
    assert shapes["head/kernel"] == (1024, 100)
    learned = {path for path in shapes if path.endswith("shortcut/kernel")}
    assert learned == {f"stages/{i}/0/shortcut/kernel" for i in (1, 2, 3)}


def test_initial_values():
    block = BasicBlock(SMALL, 32, 64, 2, rngs=nnx.Rngs(1))
    p = dict(named_leaves(nnx.state(block, nnx.Param)))
    assert np.std(p["conv2/kernel"]) == pytest.approx(math.sqrt(2 / 9 / 64), rel=0.02)
    assert np.std(p["shortcut/kernel"]) == pytest.approx(math.sqrt(2 / 64), rel=0.1)
    for norm, scale in (("norm1", 1), ("norm2", 0), ("shortcut_norm", 1)):
        assert np.all(p[f"{norm}/scale"] == scale)
        assert not np.any(p[f"{norm}/bias"])
    config = dataclasses.replace(SMALL, zero_init_last_scale=False)
    block = BottleneckBlock(config, 16, 4, 1, rngs=nnx.Rngs(1))
    assert np.all(block.norm3.scale[...] == 1)


def test_blocks_start_as_the_identity():
    x = jnp.abs(jax.random.normal(jax.random.key(0), (2, 4, 4, 16)))
    for block in (BasicBlock, BottleneckBlock):
        width = 16 // block.expansion
        fresh = jax.jit(
            lambda x, block=block, width=width: block(SMALL, 16, width, 1, rngs=nnx.Rngs(1))(
                x, train=True
            )
        )
        np.testing.assert_array_equal(fresh(x), x)


def test_convolutions_can_be_replaced():
    for name in MODELS:
        model = nnx.merge(*build(name))
        convs = [module for _, module in nnx.iter_modules(model) if isinstance(module, nnx.Conv)]
        kernels = [leaf for _, leaf in named_leaves(nnx.state(model, nnx.Param)) if leaf.ndim == 4]
        assert len(convs) == len(kernels)
        assert all(module.conv_general_dilated is lax.conv_general_dilated for module in convs)


# Forward pass


@pytest.mark.parametrize("name", MODELS)
def test_forward_equals_numpy(name):
    graphdef, params, averages = build(name)
    x, config = images(name), MODELS[name][1]
    logits, after, fixed = both(graphdef, params, averages, x)
    for result, train in ((logits, True), (fixed, False)):
        net = NumpyNet(params, averages, config, train)
        forward = getattr(net, name, net.resnet)
        np.testing.assert_allclose(result, forward(np.asarray(x, np.float64)), rtol=2e-3, atol=2e-4)
        if train:
            assert set(net.new) == {path for path, _ in named_leaves(after)}
            for path, leaf in named_leaves(after):
                np.testing.assert_allclose(leaf, net.new[path], rtol=1e-4, atol=1e-5, err_msg=path)


def test_training_changes_the_model_that_is_called():
    model = nnx.merge(*build("basic"))
    x = images("basic")
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))
    _, after, fixed = both(*nnx.split(model, nnx.Param, nnx.BatchStat), x)
    np.testing.assert_allclose(model(x, train=False), fixed, rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model, nnx.BatchStat), before)
    model(x, train=True)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        nnx.state(model, nnx.BatchStat),
        after,
    )


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16(param_dtype):
    name = "bottleneck"
    exact = both(*build(name), images(name))
    graphdef, params, averages = build(name, dtype="bfloat16", param_dtype=param_dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(param_dtype)}
    shapes = jax.eval_shape(
        functools.partial(loss_and_gradient, graphdef), params, averages, images(name)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes[1])} == {jnp.dtype(param_dtype)}
    result = both(graphdef, params, averages, images(name))
    assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {jnp.dtype("float32")}
    assert float(jnp.abs(result[0] - exact[0]).max()) < 0.2 * float(jnp.std(exact[0]))
    stem = nnx.merge(graphdef, params, averages).stem
    assert jax.eval_shape(lambda x: stem(x), images(name)).dtype == jnp.bfloat16


# Gradients, seeds, devices


def test_gradients():
    """Along the gradient the loss rises as it says."""
    graphdef, params, averages = build("basic")
    x = images("basic")
    gradient = loss_and_gradient(graphdef, params, averages, x)[1]
    size = math.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(gradient)))
    ends = []
    for step in (3e-3, -3e-3):
        moved = jax.tree.map(lambda p, g, s=step: p + s / size * g, params, gradient)
        ends.append(float(loss_and_gradient(graphdef, moved, averages, x)[0][0]))
    assert (ends[0] - ends[1]) / 6e-3 == pytest.approx(size, rel=1e-2)


def test_pooling_has_the_gradient_of_the_maximum():
    x = jax.random.normal(jax.random.key(3), (2, 4, 6, 3))

    def window(x):
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    for pool in (halved, window):
        y, back = jax.vjp(pool, x)
        expected = (window(x), jax.vjp(window, x)[1](jnp.cos(y))[0])
        np.testing.assert_array_equal(y, expected[0])
        np.testing.assert_array_equal(back(jnp.cos(y))[0], expected[1])
    np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(halved(x)))(jnp.ones((1, 2, 2, 1))), 0.25)


def test_seeds_are_a_batch_axis():
    graphdef, *first = build("basic")
    second = build("basic", seed=1)[1:]
    x = images("basic")
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), tuple(first), tuple(second))
    together = jax.jit(jax.vmap(functools.partial(both, graphdef), in_axes=(0, 0, None)))
    result = together(*stacked, x)
    for i, seed in enumerate((first, second)):
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-3, atol=1e-4),
            result,
            both(graphdef, *seed, x),
        )


def test_eight_devices_equal_one(mesh):
    graphdef, params, averages = build("basic")
    x = images("basic")
    (one, after), gradient = loss_and_gradient(graphdef, params, averages, x)
    place = functools.partial(jax.tree.map, lambda spec: NamedSharding(mesh, spec))
    params = jax.device_put(params, place(replicated_specs(params)))
    averages = jax.device_put(averages, place(replicated_specs(averages)))
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "model"))))
    assert split.sharding.shard_shape(x.shape)[0] == 1
    (eight, after8), gradient8 = loss_and_gradient(graphdef, params, averages, split)
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        (after8, gradient8),
        (after, gradient),
    )


# Errors


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_width": 0}, "base_width is 0; it must be a positive integer"),
        ({"num_classes": 2.5}, "num_classes is 2.5; it must be a positive integer"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0; it must be positive"),
        ({"norm_momentum": 1.0}, "norm_momentum is 1.0; it must be at least 0 and below 1"),
        ({"stage_sizes": ()}, r"stage_sizes is \(\); it must hold positive integers"),
        ({"stage_sizes": (2, 0)}, r"stage_sizes is \(2, 0\); it must hold positive integers"),
        ({"block": "wide"}, "block is 'wide'; allowed are basic, bottleneck"),
        ({"stem": "mnist"}, "stem is 'mnist'; allowed are cifar, imagenet"),
        ({"shortcut": "b"}, "shortcut is 'b'; allowed are projection, identity_pad"),
        ({"dtype": "float16"}, "dtype is 'float16'; allowed are float32, bfloat16"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


@pytest.mark.usefixtures("unchecked")
def test_other_errors():
    with pytest.raises(ValueError, match="name is 'resnet101'; known are resnet18, resnet34,"):
        resnet_config("resnet101")
    for name, shape, message in (
        ("basic", (8, 8, 3), r"\(8, 8, 3\); it must be \[batch, height, width, 3\]\."),
        ("basic", (1, 8, 8, 1), r"\(1, 8, 8, 1\); it must be"),
        ("basic", (1, 0, 8, 3), r"\(1, 0, 8, 3\); it must be"),
        ("resnet9", (1, 8, 12, 3), "height and width divisible by 8"),
        ("vgg19", (1, 16, 32, 3), "height and width divisible by 32"),
    ):
        with pytest.raises(ValueError, match=message):
            nnx.merge(*build(name))(jnp.ones(shape), train=False)
