"""Sparse-IFT of whole models: which layers are replaced, by what, and which are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparsejax as sj
from sparsejax import weights


class Net(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.body = nnx.Sequential(
            nnx.Conv(8, 8, (3, 3), strides=2, padding=1, use_bias=False, rngs=rngs),
            jax.nn.relu,
            nnx.Conv(8, 12, (1, 1), padding="VALID", rngs=rngs),
        )
        self.fc = nnx.Linear(12, 12, rngs=rngs)
        self.again = nnx.Dict(fc=self.fc)
        self.head = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.body(jax.nn.relu(self.stem(x)))).mean((1, 2))
        return self.head(self.again.fc(self.fc(x)))


KINDS = {
    "parallel": weights.SparseParallel,
    "factorized": weights.SparseFactorized,
    "doped": weights.SparseDoped,
}
BODY = "body|fc"


def transform(model, kind="doped", sparsity=0.5, **options):
    return weights.sparse_ift_model(model, kind, sparsity, rngs=nnx.Rngs(1), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_chosen_layers_are_replaced_at_the_same_cost(kind):
    before = Net(nnx.Rngs(0))
    before.fc.bias[...] = jnp.arange(12.0)
    after = transform(before, kind, where=BODY)
    new = (after.body.layers[0], after.body.layers[2], after.fc)
    assert [type(layer) for layer in new] == [KINDS[kind]] * 3
    assert type(before.fc) is nnx.Linear
    assert after.again["fc"] is after.fc  # shared before, shared now
    assert after.stem.kernel is before.stem.kernel
    assert [layer.bias is None for layer in new] == [True, False, False]
    np.testing.assert_array_equal(after.fc.bias[...], jnp.arange(12.0))
    for model in (before, after):
        model.eval()
    x = jnp.ones((2, 8, 8, 3))
    assert jax.eval_shape(after, x).shape == jax.eval_shape(before, x).shape
    # strides and padding are those of the old layers
    h = jnp.ones((2, 7, 7, 8))
    assert jax.eval_shape(after.body, h).shape == jax.eval_shape(before.body, h).shape
    params, dense = nnx.state(after, nnx.Param), nnx.state(before, nnx.Param)
    masks = sj.map_selected(
        lambda path, leaf: jnp.asarray(np.arange(leaf.size).reshape(leaf.shape) % 2 == 0),
        params,
        where=weights.sparse_parts(kind),
        otherwise=lambda leaf: True,
    )
    cost = sj.summarize(dense, sj.dense_masks(dense)).flops[0]
    assert sj.summarize(params, masks).flops[1] == pytest.approx(cost, rel=0.08)


def test_a_dense_doped_layer_is_the_convolution_it_replaces():
    """Without sparsity only the kernel is new: geometry is compared by giving it the old one."""
    before = Net(nnx.Rngs(0))
    after = transform(before, sparsity=0.0, where=BODY)
    for old, new in zip(
        (before.body.layers[0], before.body.layers[2], before.fc),
        (after.body.layers[0], after.body.layers[2], after.fc),
    ):
        new.sparse.kernel[...] = old.kernel[...]
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    np.testing.assert_allclose(after(x), before(x), rtol=1e-5, atol=1e-5)


def test_dtypes_stay_and_a_layer_may_be_the_model():
    layer = nnx.Linear(8, 8, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    new = transform(layer, "parallel", norm=False)
    assert isinstance(new, weights.SparseParallel)
    assert {leaf.dtype for _, leaf in sj.named_leaves(nnx.state(new))} == {jnp.dtype("bfloat16")}
    assert jax.eval_shape(new, jnp.ones((2, 8))).dtype == jnp.bfloat16


def test_layers_that_are_refused_by_name(unchecked):
    rngs = nnx.Rngs(0)

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def stack(rngs):
        return nnx.Linear(8, 8, rngs=rngs)

    def conv(size=(3, 3), **options):
        return nnx.Conv(8, 8, size, rngs=rngs, **options)

    for layer, message in (
        (stack(rngs), r"layer 'x/kernel' is stacked: its kernel has shape \(3, 8, 8\)"),
        (conv(feature_group_count=2), "layer 'x/kernel' has feature_group_count 2; the new layer"),
        (conv(kernel_dilation=(2, 1)), r"layer 'x/kernel' has kernel_dilation \(2, 1\); the new"),
        (conv(input_dilation=2), "layer 'x/kernel' has input_dilation 2"),
        (conv(padding="CIRCULAR"), "layer 'x/kernel' has padding 'CIRCULAR'; the new layer pads"),
        (conv((3,)), r"layer 'x/kernel' has kernel_size \(3,\); it needs two axes"),
        (conv(mask=jnp.ones((3, 3, 8, 8))), "layer 'x/kernel' has a mask, which the new layer"),
        (nnx.Linear(8, 8, precision="high", rngs=rngs), "layer 'x/kernel' has a precision"),
        (nnx.Linear(2, 2, rngs=rngs), "layer 'x/kernel': sparsity is 0.5: it leaves no rank"),
    ):
        with pytest.raises(ValueError, match=message):
            transform(nnx.Dict(x=layer))
    held = Net(rngs)
    held.pair = nnx.data((nnx.Linear(8, 8, rngs=rngs),))
    with pytest.raises(ValueError, match="layer 'pair/0/kernel' is held by a tuple"):
        transform(held)


def test_kinds_and_choices_that_are_refused(unchecked):
    model = Net(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"kind is 'wide', which is no layer: .* widened\(width"):
        transform(model, "wide")
    with pytest.raises(ValueError, match="kind is 'x'; allowed are 'parallel', 'fact"):
        transform(model, "x")
    with pytest.raises(ValueError, match="where matches no leaf: 'nothing'"):
        transform(model, where="nothing")
    with pytest.raises(ValueError, match=r"model has no nnx\.Linear or nnx\.Conv"):
        transform(nnx.LayerNorm(4, rngs=nnx.Rngs(0)))
