"""BDWP inside Flax: whole models, the layers that are chosen, and what the products refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import sparsejax as sj
from sparsejax import weights
from sparsejax.models import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=24, d_model=16, n_layers=2, n_heads=2, d_ff=32, max_seq_len=8, tie_embeddings=False
)
PATTERN = sj.NM(2, 8)
RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.integers(0, 24, (2, 8)))


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


BLOCKS = sorted(
    [f"blocks/attention/{name}_proj/kernel" for name in "qkvo"]
    + [f"blocks/ffn/{name}_proj/kernel" for name in ("gate", "up", "down")]
)


@functools.partial(jax.jit, static_argnums=0)
def loss(graph, state, x):
    return jnp.mean(nnx.merge(graph, state)(x).astype(jnp.float32) ** 2)


grad = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)


def close(got, wanted, tolerance):
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


class Stack(nnx.Module):
    """Layers run by a scan."""

    def __init__(self, rngs):
        stack = nnx.vmap(lambda rngs: nnx.Linear(16, 16, rngs=rngs))
        self.blocks = nnx.split_rngs(splits=2)(stack)(rngs)

    def __call__(self, x):
        graph, state = nnx.split(self.blocks)
        return jax.lax.scan(lambda x, s: (jnp.tanh(nnx.merge(graph, s)(x)), None), x, state)[0]


class ConvNet(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.conv = nnx.Conv(8, 16, (3, 3), strides=2, rngs=rngs)
        self.depth = nnx.Conv(16, 16, (3, 3), feature_group_count=16, rngs=rngs)
        self.groups = nnx.Conv(16, 16, 1, feature_group_count=2, rngs=rngs)
        self.wide = nnx.Conv(16, 16, (3, 3), kernel_dilation=2, padding="VALID", rngs=rngs)
        self.odd = nnx.Linear(16, 12, rngs=rngs)
        self.head = nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x):
        x = self.conv(nnx.relu(self.norm(self.stem(x))))
        return self.head(self.odd(x.mean(axis=(1, 2))))


@pytest.fixture(scope="module")
def stack():
    return Stack(nnx.Rngs(0))


@pytest.fixture(scope="module")
def convnet():
    return ConvNet(nnx.Rngs(0))


def test_a_language_model():
    dense = Llama(CONFIG, rngs=nnx.Rngs(0))
    chosen = weights.bdwp_layers(dense, PATTERN)
    assert sorted(chosen) == BLOCKS  # the head stays dense
    graph, state = nnx.split(weights.bdwp_model(dense, PATTERN))
    plain, before = nnx.split(dense)
    assert jax.tree.structure(state) == jax.tree.structure(before)
    # inference uses the forward weight, which sj.prune gives
    pruned, masks = sj.prune(before, pattern=PATTERN, where=lambda path, leaf: path in chosen)
    assert sj.count_masks(masks).density == 0.25
    value, grads = grad(graph, state, TOKENS)
    close(value, loss(plain, pruned, TOKENS), 1e-6)
    for path, leaf in sj.core.named_leaves(grads):
        if path in chosen:
            assert bool((leaf != 0).all())


def test_stacked_layers_and_the_view_of_sr_ste(stack):
    x = normal(4, 3, 16)
    plain, state = nnx.split(stack)

    def through(state):
        return loss(plain, sj.sr_ste(state, PATTERN, decay=0.1), x)

    view = jax.jit(jax.grad(through))(state)["blocks"]["kernel"][...]
    srste, bdwp = (
        grad(nnx.split(weights.bdwp_model(stack, PATTERN, decay=0.1, method=method))[0], state, x)
        for method in ("srste", "bdwp")
    )
    close(srste[1]["blocks"]["kernel"][...], view, 1e-5)
    close(bdwp[0], srste[0], 1e-6)
    # the gradient of the last layer has passed through no other
    kernels = bdwp[1]["blocks"]["kernel"][...]
    close(kernels[1], view[1], 1e-5)
    assert float(jnp.abs(kernels[0] - view[0]).max()) > 1e-3


def test_two_models_of_the_same_settings_share_what_is_compiled(stack):
    first, second, other = (
        nnx.split(weights.bdwp_model(stack, PATTERN, decay=decay))[0] for decay in (0.1, 0.1, 0.2)
    )
    assert first == second
    assert hash(first) == hash(second)
    assert first != other


def test_bfloat16_layers_are_masked_by_their_float32_kernels():
    w = normal(16, 8)
    # two that bfloat16 cannot tell apart, of which the first is larger
    w = w.at[:8].set(0.0).at[0, :].set(1.001).at[1, :].set(1.0)
    layer = nnx.Linear(
        16,
        8,
        dtype=jnp.bfloat16,
        use_bias=False,
        preferred_element_type=jnp.float32,
        rngs=nnx.Rngs(0),
    )
    layer.kernel[...] = w
    sparse = weights.bdwp_model(layer, sj.NM(1, 8), decay=1e-4)
    graph, state = nnx.split(sparse)
    x = jnp.ones((4, 16), jnp.bfloat16)

    @jax.jit
    def run(state):
        y, pull = jax.vjp(lambda s: nnx.merge(graph, s)(x), state)
        return y, pull(jnp.ones_like(y))[0]

    y, grads = run(state)
    assert y.dtype == jnp.float32
    kernel = grads["kernel"][...]
    assert kernel.dtype == jnp.float32
    # 4, and the pull of the pruned: bfloat16 would have lost it
    close(kernel[1], np.full(8, 4 + 1e-4), 1e-7)
    np.testing.assert_array_equal(kernel[0], np.full(8, 4.0))


def test_what_cannot_be_pruned_stays_dense_unless_it_is_asked_for(convnet, unchecked):
    model = convnet
    assert weights.bdwp_layers(model, PATTERN) == ("conv/kernel",)
    srste = weights.bdwp_layers(model, PATTERN, method="srste")
    assert set(srste) == {"conv/kernel", "odd/kernel"}  # its outputs do not matter there
    assert weights.bdwp_layers(model, sj.NM(2, 4), where="head") == ("head/kernel",)
    for where, message in (
        ("stem", "layer 'stem/kernel' cannot be pruned: its 3 inputs are not a multiple of m = 8"),
        ("odd", "layer 'odd/kernel' cannot be pruned: its 12 outputs are not a multiple of m = 8"),
        ("depth", "layer 'depth/kernel' cannot be pruned: its feature_group_count is 16, not 1"),
        ("groups", "layer 'groups/kernel' cannot be pruned: its feature_group_count is 2, not 1"),
        ("wide", "layer 'wide/kernel' cannot be pruned: its kernel_dilation is 2, not 1"),
        ("norm", "where matches no leaf: 'norm'"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.bdwp_model(model, PATTERN, where=where)
    with pytest.raises(ValueError, match="where matches no leaf"):
        weights.bdwp_layers(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), PATTERN)
    with pytest.raises(ValueError, match="method is 'x'; allowed are dense, srste"):
        weights.bdwp_layers(model, PATTERN, method="x")


def test_a_convolution_in_a_model_with_batch_statistics(convnet):
    model = convnet
    sparse = weights.bdwp_model(model, PATTERN, decay=0.0)
    x = normal(2, 5, 6, 3)
    hidden = normal(2, 5, 6, 8)
    kernel, bias = model.conv.kernel[...], model.conv.bias[...]

    @nnx.jit
    def run(model, x):
        return nnx.grad(lambda model: jnp.sum(model(x) ** 2))(model)

    grads = run(sparse, x)
    assert bool((grads["conv"]["kernel"][...] != 0).all())
    assert bool((grads["stem"]["kernel"][...] != 0).any())
    np.testing.assert_array_equal(model.norm.mean[...], np.zeros(8))  # it shares no state
    assert bool((sparse.norm.mean[...] != 0).all())

    @jax.jit
    def both(kernel, hidden):
        graph, state = nnx.split(sparse.conv)
        state["kernel"] = state["kernel"].replace(kernel)
        got = jax.vjp(lambda h: nnx.merge(graph, state)(h), hidden)
        wanted = jax.vjp(
            lambda h: weights.bdwp_conv(h, kernel, 2, 8, strides=2, decay=0.0) + bias, hidden
        )
        return [(y, pull(jnp.ones_like(y))[0]) for y, pull in (got, wanted)]

    for got, wanted in zip(*both(kernel, hidden)):
        close(got, wanted, 1e-6)


def test_convolutions_over_a_line():
    layer = nnx.Conv(8, 8, 3, padding="CAUSAL", strides=2, use_bias=False, rngs=nnx.Rngs(0))
    sparse = weights.bdwp_model(layer, PATTERN, method="bdwp")
    graph, _ = nnx.split(layer)
    x = normal(3, 7, 8)

    @jax.jit
    def run(x):
        y, pull = jax.vjp(sparse, x)
        w, got, wanted = layer.kernel[...], [y, pull(jnp.ones_like(y))[0]], []
        for axis in (-2, -1):
            mask = sj.nm_mask(jnp.abs(w), 2, 8, axis=axis)
            plain = nnx.merge(graph, {"kernel": jnp.where(mask, w, 0)})
            y, pull = jax.vjp(plain, x)
            wanted.append(y if axis == -2 else pull(jnp.ones_like(y))[0])
        return got, wanted

    for got, wanted in zip(*run(x)):
        close(got, wanted, 1e-6)


def test_seeds_and_eight_devices(stack, mesh):
    graph, state = nnx.split(weights.bdwp_model(stack, PATTERN))
    x = normal(8, 3, 16)
    alone = grad(graph, state, x)[1]
    two = jax.tree.map(lambda leaf: jnp.stack([2 * leaf, leaf]), state)
    seeds = jax.jit(jax.vmap(lambda s: jax.grad(loss, argnums=1)(graph, s, x)))(two)

    def place(path, leaf):
        spec = PartitionSpec(None, None, "model") if path == "blocks/kernel" else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    spread = sj.core.map_selected(place, state, where=lambda path, leaf: True)
    devices = grad(graph, spread, jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))[1]
    for seed, device, wanted in zip(*map(jax.tree.leaves, (seeds, devices, alone))):
        close(seed[1], wanted, 1e-5)
        close(device, wanted, 1e-5)


@pytest.mark.parametrize("make", [weights.bdwp_dot_general, weights.bdwp_conv_general_dilated])
def test_settings_that_are_refused(make, unchecked):
    for settings, message in (
        ({"pattern": sj.NM(2, 4, axis=-1)}, r"pattern is NM\(.*axis=-1.*BDWP has its own axes"),
        ({"pattern": sj.NM(2, 4, ties="lowest")}, "BDWP has its own axes: axis=-2"),
        ({"pattern": sj.NM(2, 4, stride=2)}, "BDWP has its own axes"),
        ({"decay": -0.5}, "decay is -0.5; it must not be negative"),
        ({"method": "x"}, "method is 'x'; allowed are dense, srste, sdwp, sdgp, bdwp"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**{"pattern": PATTERN, **settings})
    with pytest.raises(TypeError, match="decay is traced; a layer keeps it as a number"):
        jax.eval_shape(lambda decay: make(PATTERN, decay=decay), 0.1)


def test_other_contractions_are_refused():
    dot, conv = weights.bdwp_dot_general(PATTERN), weights.bdwp_conv_general_dilated(PATTERN)
    x, w = jnp.ones((8, 8)), jnp.ones((8, 8))
    ordinary = (((1,), (0,)), ((), ()))
    for dimensions in (
        (((0,), (0,)), ((), ())),
        (((1,), (1,)), ((), ())),
        (((1,), (0,)), ((), ())),
    ):
        kernel = w if dimensions != ordinary else w[:, None]
        with pytest.raises(ValueError, match=r"dimension_numbers is .* BDWP contracts the last ax"):
            dot(x, kernel, dimensions)
    with pytest.raises(ValueError, match=r"dimension_numbers is .* BDWP contracts"):
        dot(x[None], w[None], (((2,), (1,)), ((0,), (0,))))
    with pytest.raises(
        ValueError, match=r"out_sharding is .*; BDWP leaves the layout to the compiler"
    ):
        dot(x, w, ordinary, out_sharding=PartitionSpec(None))
    images, kernel = jnp.ones((1, 4, 4, 8)), jnp.ones((3, 3, 8, 8))
    layout = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    assert conv(images, kernel, (1, 1), "SAME", **layout).shape == images.shape
    for options, message in (
        ({"lhs_dilation": (2, 1)}, r"lhs_dilation is \(2, 1\); BDWP's convolution has 1 alone"),
        ({"rhs_dilation": (1, 2)}, r"rhs_dilation is \(1, 2\); BDWP's"),
        ({"feature_group_count": 2}, "feature_group_count is 2; BDWP's"),
        ({"batch_group_count": 2}, "batch_group_count is 2; BDWP's"),
        ({"dimension_numbers": None}, "dimension_numbers is None; BDWP's convolution has channels"),
        ({"dimension_numbers": ("NHWC", "HWOI", "NHWC")}, "kernels .*, in, out"),
        ({"out_sharding": PartitionSpec(None)}, "out_sharding is "),
    ):
        with pytest.raises(ValueError, match=message):
            conv(images, kernel, (1, 1), "SAME", **(layout | options))
