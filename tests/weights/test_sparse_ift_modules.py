"""The layers of Sparse-IFT: the authors' blocks, costs, and what is between the parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sparsejax as sj
from sparsejax import weights


def load(param, value):
    assert param.shape == value.shape
    param[...] = jnp.asarray(value)


def kernel_of(case, name):
    """PyTorch's OIHW as HWIO."""
    return case[f"param.{name}.weight"].transpose(2, 3, 1, 0)


def load_norm(case, norm, names):
    """Running batch norms; one of ours may hold several of theirs."""
    parts = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    for ours, theirs in parts.items():
        joined = np.concatenate([case[f"param.{name}.{theirs}"] for name in names])
        load(getattr(norm, ours), joined)


def parallel_block(case, d_in, d_out, strides):
    block = weights.ParallelResidualBlock(
        d_in, d_out, case["arg"], strides=strides, rngs=nnx.Rngs(0)
    )
    for i, layer in ((1, block.conv1), (2, block.conv2)):
        for j, branch in enumerate(layer.branches):
            load(branch.kernel, kernel_of(case, f"conv{i}_list.{j}"))
        load_norm(case, layer.norm, [f"bn{i}_list.{j}" for j in range(case["arg"])])
    assert (block.shortcut is not None) == ("param.shortcut.0.weight" in case)
    if block.shortcut is not None:
        load(block.shortcut.kernel, kernel_of(case, "shortcut.0"))
        load_norm(case, block.shortcut_norm, ["shortcut.1"])
    return block


def factorized_conv(case, d_in, d_out, strides):
    rank = weights.sift_size("factorized", d_in, d_out, case["arg"], kernel=(3, 3))
    layer = weights.SparseFactorized(
        d_in, d_out, rank, kernel=(3, 3), strides=strides, rngs=nnx.Rngs(0)
    )
    load(layer.u.kernel, kernel_of(case, "U_conv3x3"))
    load(layer.v.kernel, kernel_of(case, "V_conv1x1"))
    load_norm(case, layer.norm, ["U_conv3x3_bn"])
    return layer


def doped_conv(case, d_in, d_out, strides):
    rank = weights.sift_size("doped", d_in, d_out, case["arg"], kernel=(3, 3))
    layer = weights.SparseDoped(d_in, d_out, rank, kernel=(3, 3), strides=strides, rngs=nnx.Rngs(0))
    load(layer.sparse.kernel, kernel_of(case, "sparse_conv"))
    load(layer.dense_u.kernel, kernel_of(case, "U_conv3x3"))
    load(layer.dense_v.kernel, kernel_of(case, "V_conv1x1"))
    return layer


@pytest.mark.vectors
def test_block_vectors(reference):
    make = {"parallel": parallel_block, "factorized": factorized_conv, "doped": doped_conv}
    for case in reference("sparse_ift").cases("block"):
        x, y = (case[name].transpose(0, 2, 3, 1) for name in ("x_nchw", "y_nchw"))
        strides = -(-x.shape[1] // y.shape[1])
        block = make[case["kind"]](case, x.shape[-1], y.shape[-1], strides)
        found = block(jnp.asarray(x), train=False)
        np.testing.assert_allclose(found, y, rtol=2e-6, atol=2e-6 * np.abs(y).max())


def layer_of(kind, s, d_in, d_out, kernel=None, **options):
    size = weights.sift_size(kind, d_in, d_out, s, kernel=kernel or (1, 1))
    make = {
        "parallel": weights.SparseParallel,
        "factorized": weights.SparseFactorized,
        "doped": weights.SparseDoped,
    }
    return make[kind](d_in, d_out, size, kernel=kernel, rngs=nnx.Rngs(0), **options)


def masked(kind, s, d_in, d_out, kernel=None):
    """Parameters, and masks of the counts of `random_masks` at less to compile."""
    params = nnx.state(layer_of(kind, s, d_in, d_out, kernel), nnx.Param)

    def mask(path, leaf):
        kept = np.arange(leaf.size) < sj.keep_count(leaf.size, 1 - s)
        return jnp.asarray(kept.reshape(leaf.shape))

    where, dense = weights.sparse_parts(kind), jnp.asarray(True)
    return params, sj.map_selected(mask, params, where=where, otherwise=lambda leaf: dense)


@pytest.mark.parametrize("s", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("kind", ["parallel", "factorized", "doped"])
def test_it_costs_the_dense_layer(kind, s):
    """Multiply-accumulates at 36 positions; a whole rank is within one of the real one."""
    d_in, d_out, kernel, positions = (40, 40, None, 1) if s == 0.75 else (10, 16, (3, 3), 36)
    area = 9 if kernel else 1
    params, masks = masked(kind, s, d_in, d_out, kernel)
    at = {p: positions for p, leaf in sj.named_leaves(params) if leaf.ndim > 1}
    cost = sj.flops_report(masks, at, shapes=params)
    dense = 2 * positions * area * d_in * d_out
    one_rank = 2 * positions * (area * d_in + d_out)
    gap = cost.sparse - dense
    if kind == "parallel":
        assert gap == 0
    elif kind == "factorized":
        assert 0 <= gap < one_rank * (1 - s) + 4 * positions
    else:
        assert -one_rank < gap <= 2 * positions
    summary = sj.summarize(params, masks)
    assert summary.flops[1] * positions == cost.sparse
    # the space that masks are searched in
    searched = sum(leaf.size for leaf in summary.leaves if leaf.sparse) / (area * d_in * d_out)
    wanted = 1.0 if kind == "doped" else 1 / (1 - s)
    slack = one_rank / dense if kind == "factorized" else 1e-9
    assert searched == pytest.approx(wanted, abs=slack)


def test_sparse_parts_are_named_by_path():
    model = nnx.Dict(
        parallel=layer_of("parallel", 0.5, 6, 6),
        factorized=layer_of("factorized", 0.5, 6, 6),
        doped=layer_of("doped", 0.5, 6, 6),
        block=weights.ParallelResidualBlock(4, 6, 2, rngs=nnx.Rngs(0)),
    )
    params = nnx.state(model, nnx.Param)
    blocks = [f"block/conv{i}/branches/{j}/kernel" for i in (1, 2) for j in (0, 1)]
    for kind, wanted in (
        ("parallel", [*blocks, *(f"parallel/branches/{j}/kernel" for j in (0, 1))]),
        ("factorized", ["factorized/u/kernel", "factorized/v/kernel"]),
        ("doped", ["doped/sparse/kernel"]),
    ):
        assert sorted(sj.selected_paths(params, weights.sparse_parts(kind))) == wanted
    doped, where = nnx.state(model["doped"], nnx.Param), weights.sparse_parts("doped")
    masks = sj.random_masks(jax.random.key(0), doped, 0.5, where=where)
    assert sj.count_masks(masks).per_leaf == {"sparse/kernel": (18, 36)}
    only = weights.sparse_parts("factorized", sparse_u_only=True)
    assert sj.selected_paths(params, only) == ("factorized/u/kernel",)
    plain = {"fc": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    assert sj.selected_paths(plain, weights.sparse_parts("wide")) == ("fc/kernel",)


def test_the_branches_are_those_of_separate_layers():
    """One product and one batch norm over all channels are k of each, in training too."""
    layer = weights.SparseParallel(5, 4, 3, norm=True, use_bias=True, rngs=nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(0), (32, 5))
    norms = [nnx.BatchNorm(4, momentum=0.9, epsilon=1e-5, rngs=nnx.Rngs(0)) for _ in range(3)]
    branches = [x @ branch.kernel[...] for branch in layer.branches]
    layer.bias[...] = jnp.arange(4.0)
    wanted = jnp.arange(4.0) + sum(n(b, use_running_average=False) for n, b in zip(norms, branches))
    np.testing.assert_allclose(layer(x, train=True), wanted, rtol=1e-5, atol=1e-5)
    for name in ("mean", "var"):
        joined = jnp.concatenate([getattr(n, name)[...] for n in norms])
        np.testing.assert_allclose(getattr(layer.norm, name)[...], joined, rtol=1e-5, atol=1e-6)
    relus = weights.SparseParallel(5, 4, 3, norm=False, rngs=nnx.Rngs(1))
    wanted = sum(jax.nn.relu(x @ branch.kernel[...]) for branch in relus.branches)
    np.testing.assert_allclose(relus(x), wanted, rtol=1e-5, atol=1e-5)
    assert not np.allclose(relus(-x), -relus(x))  # no dense kernel does that


def test_train_and_eval_by_call_or_by_mode():
    layer = weights.SparseFactorized(5, 4, 6, rngs=nnx.Rngs(0))
    x = 3 + jax.random.normal(jax.random.key(0), (32, 5))
    batch = layer(x, train=True)
    running = layer(x, train=False)
    assert not np.allclose(batch, running)
    layer.eval()
    np.testing.assert_array_equal(layer(x), running)
    layer.train()
    np.testing.assert_array_equal(layer(x), batch)


def test_what_is_between_the_factors():
    x = jax.random.normal(jax.random.key(0), (16, 5))
    found = {}
    for factor in ("linear", "nonlinear_norelu", "nonlinear_relu"):
        layer = weights.SparseFactorized(5, 4, 6, factor=factor, rngs=nnx.Rngs(0))
        h = x @ layer.u.kernel[...]
        if factor != "linear":
            h = (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5)
        h = jax.nn.relu(h) if factor == "nonlinear_relu" else h
        found[factor] = layer(x, train=True)
        np.testing.assert_allclose(found[factor], h @ layer.v.kernel[...], rtol=1e-4, atol=1e-4)
    assert not np.allclose(found["nonlinear_norelu"], found["nonlinear_relu"])


def test_a_doped_layer_of_rank_zero_is_a_layer():
    layer = weights.SparseDoped(5, 4, 0, rngs=nnx.Rngs(0))
    assert set(dict(sj.named_leaves(nnx.state(layer, nnx.Param)))) == {"sparse/kernel"}
    x = jnp.ones((2, 5))
    np.testing.assert_array_equal(layer(x), x @ layer.sparse.kernel[...])


def test_kernels_are_he_normal_as_if_dense():
    layer = weights.SparseDoped(64, 32, 48, kernel=(3, 3), rngs=nnx.Rngs(0))
    for part, fan_out in ((layer.sparse, 9 * 32), (layer.dense_u, 9 * 48), (layer.dense_v, 32)):
        std = float(jnp.std(part.kernel[...]))
        assert std == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


def test_ten_branches_without_norm_do_not_explode():
    def growth(k, density, scale):
        key = jax.random.key(7)
        h = jax.random.normal(key, (64, 64))
        for i in range(6):
            layer = weights.SparseParallel(64, 64, k, norm=False, rngs=nnx.Rngs(i))
            for j, branch in enumerate(layer.branches):
                one = jax.random.fold_in(key, k * i + j)
                mask = jax.random.bernoulli(one, density, (64, 64))
                branch.kernel[...] = jnp.where(mask, scale * branch.kernel[...], 0.0)
            h = layer(h)
        return float(jnp.sqrt(jnp.mean(h**2)))

    dense = growth(1, 1.0, 1.0)
    assert 0.6 < growth(10, 0.1, 1.0) / dense < 1.7
    # drawn as one branch is, which is what diverges
    assert growth(10, 0.1, (1 + 9 / np.pi) ** 0.5) / dense > 20


@pytest.mark.parametrize("kind", ["parallel", "factorized", "doped"])
def test_bfloat16_jit_and_batches_of_any_shape(kind):
    layer = layer_of(kind, 0.5, 8, 6, (3, 3), strides=2, param_dtype=jnp.bfloat16)
    layer.eval()
    graph, state = nnx.split(layer)
    x = jax.random.normal(jax.random.key(0), (2, 3, 6, 6, 8), jnp.bfloat16)
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    y = run(state, x)
    assert (y.shape, y.dtype) == ((2, 3, 3, 3, 6), jnp.dtype("bfloat16"))
    wide = layer_of(kind, 0.5, 8, 6, (3, 3), strides=2)
    wide.eval()
    nnx.update(wide, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state))
    exact = wide(x.astype(jnp.float32))
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.05 * float(abs(exact).max()))


@pytest.mark.standard_promotion
def test_a_layer_trains_under_masks():
    block = weights.SparseParallel(12, 8, 2, rngs=nnx.Rngs(0))
    params = nnx.state(block, nnx.Param)
    masks = sj.random_masks(jax.random.key(0), params, 0.5, where=weights.sparse_parts("parallel"))
    nnx.update(block, sj.apply_masks(params, masks))
    drop = weights.drop_schedule(end=9)
    tx = weights.masked_optimizer(
        optax.sgd(0.02, 0.9), masks=masks, sparsity=0.5, drop=drop, every=2, end=9
    )
    optimizer = nnx.Optimizer(block, tx, wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(1), (64, 12))

    @nnx.jit
    def step(block, optimizer):
        def loss(block):
            return jnp.mean((block(x, train=True) - 1) ** 2)

        value, grads = nnx.value_and_grad(loss)(block)
        optimizer.update(block, grads)
        return value

    losses = [float(step(block, optimizer)) for _ in range(10)]
    assert losses[-1] < 0.7 * losses[0]
    found = sj.get_masks(optimizer.opt_state)
    assert sj.sad(found, masks)["total"] > 0
    assert set(sj.count_masks(found).per_leaf.values()) == {(48, 96)}
    for branch in block.branches:
        assert int((branch.kernel[...] != 0).sum()) == 48
    assert not np.allclose(block.norm.mean[...], 0)


def test_errors_name_argument_and_range(unchecked):
    def make(module, *sizes, **options):
        return getattr(weights, module)(*sizes, rngs=nnx.Rngs(0), **options)

    for call, message in (
        (lambda: make("SparseParallel", 4, 4, 0), "k is 0; a layer needs a branch"),
        (lambda: make("SparseFactorized", 4, 4, 0), "rank is 0; it must be at least 1"),
        (lambda: make("SparseFactorized", 4, 4, 2, factor="x"), "factor is 'x'; allowed are 'lin"),
        (lambda: make("SparseDoped", 4, 4, -1), "rank is -1; it must not be negative"),
        (lambda: make("SparseDoped", 0, 4, 1), "d_in is 0, d_out 4, kernel None"),
        (lambda: make("SparseDoped", 4, 4, 1, strides=2), "a linear layer .kernel=None. has none"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
