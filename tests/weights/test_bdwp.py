"""BDWP's products: the page's vectors, the pitfalls, and the pre-generated form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import sparsejax as sj
from sparsejax import weights
from sparsejax.weights.compact import index_bits

pregenerate = jax.jit(weights.pregenerate, static_argnames=("n", "m", "dtype"))
unpack = jax.jit(weights.unpack_indices, static_argnames=("count", "axis", "bits"))
LAYOUT = ("NHWC", "HWIO", "NHWC")


@functools.partial(jax.jit, static_argnames=("n", "m", "method"))
def run(x, w, dy, decay=0.0, *, n, m, method="bdwp"):
    """The output, and the gradients of input and kernel."""
    y, pull = jax.vjp(lambda x, w: weights.bdwp_dot(x, w, n, m, decay=decay, method=method), x, w)
    return y, *pull(dy)


@functools.partial(jax.jit, static_argnames=("n", "m"))
def run_conv(x, w, dy, *, n, m):
    y, pull = jax.vjp(lambda x, w: weights.bdwp_conv(x, w, n, m, decay=0), x, w)
    return y, *pull(dy)


@functools.partial(jax.jit, static_argnames=("n", "m"))
def run_all(x, w, dy, pair, decay, *, n, m):
    """`run` for all methods that prune; one compilation."""
    methods = ("srste", "sdwp", "sdgp", "bdwp")
    results = {method: run(x, w, dy, decay, n=n, m=m, method=method) for method in methods}
    y, pull = jax.vjp(lambda x, w: weights.bdwp_dot_compact(x, w, pair, decay=decay), x, w)
    return results | {"bdwp_compact": (y, *pull(dy))}


def close(got, wanted, tolerance=1e-12):
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.vectors
def test_every_family_has_a_test(reference):
    assert reference("bdwp").families() == {"linear", "conv", "cost"}


@pytest.mark.vectors
def test_linear_vectors(reference):
    for case in reference("bdwp").cases("linear"):
        w, x, dy = (jnp.asarray(case[name]) for name in ("weight_in_out", "x", "cotangent"))
        n, m, decay = case["n"], case["m"], case["decay"]
        for side, axis in (("forward", -2), ("backward", -1)):
            mask = sj.nm_mask(jnp.abs(w), n, m, axis=axis, ties="last")
            np.testing.assert_array_equal(mask, case[f"mask_{side}"])
        pair = pregenerate(w, n, m)
        for side, part in (("forward", pair.ff), ("backward", pair.bp)):
            count, bits = part.values.shape[0], index_bits(m)
            indices = unpack(part.packed, count=count, axis=0, bits=bits)
            np.testing.assert_array_equal(part.values, case[f"compressed_values_{side}"])
            np.testing.assert_array_equal(indices, case[f"compressed_index_{side}"])
        results = run_all(x, w, dy, pair, decay, n=n, m=m)
        for name, (y, grad_x, grad_w) in results.items():
            method = name.removesuffix("_compact")
            close(y, case[f"{method}_y"])
            close(grad_x, case[f"{method}_grad_x"])
            close(grad_w, case[f"{method}_grad_weight"])


@pytest.mark.vectors
def test_conv_vectors(reference):
    for case in reference("bdwp").cases("conv"):
        w, x, dy = (jnp.asarray(case[name]) for name in ("weight_hwio", "x_nhwc", "cotangent_nhwc"))
        n, m = case["n"], case["m"]
        for side, axis in (("forward", -2), ("backward", -1)):
            mask = sj.nm_mask(jnp.abs(w), n, m, axis=axis, ties="last")
            np.testing.assert_array_equal(mask, case[f"mask_{side}"])
        y, grad_x, grad_w = run_conv(x, w, dy, n=n, m=m)
        close(y, case["y_nhwc"])
        close(grad_x, case["grad_x_nhwc"])
        close(grad_w, case["grad_weight_hwio"])


def normal(*shape, key=0):
    return jnp.asarray(np.random.default_rng(key).normal(size=shape), jnp.float32)


def layer(*batch, i=16, o=8):
    return normal(*batch, i), normal(i, o, key=1), normal(*batch, o, key=2)


def masks(w, n, m):
    return (sj.nm_mask(jnp.abs(w), n, m, axis=axis, ties="last") for axis in (-2, -1))


# pitfalls


def test_the_input_gradient_is_not_the_derivative_of_the_output():
    x, w, dy = layer(3, 2)
    inside, turned = masks(w, 2, 8)
    assert 0 < int((inside & turned).sum()) < int(inside.sum())

    @jax.jit
    def by_projection(x, w, dy):
        y, pull = jax.vjp(lambda x, w: x @ sj.nm_project(w, 2, 8, decay=0.1), x, w)
        return y, *pull(dy)

    wanted = by_projection(x, w, dy)
    for got, expected in zip(run(x, w, dy, 0.1, n=2, m=8, method="srste"), wanted):
        close(got, expected, 1e-6)
    y, grad_x, grad_w = run(x, w, dy, 0.1, n=2, m=8)
    close(y, wanted[0], 1e-6)
    close(grad_w, wanted[2], 1e-6)
    close(grad_x, dy @ jnp.where(turned, w, 0).T, 1e-6)
    assert float(jnp.abs(grad_x - wanted[1]).max()) > 0.1


@pytest.mark.parametrize("method", ["dense", "srste", "sdwp", "sdgp", "bdwp"])
def test_the_weight_gradient_is_dense(method):
    x, w, dy = layer(5)
    grad = run(x, w, dy, n=1, m=8, method=method)[2]
    close(grad, x.T @ dy, 1e-6)
    assert bool((grad != 0).all())  # what is pruned learns, so it can come back


def test_dense_is_dense_and_the_others_prune_what_they_say():
    x, w, dy = layer(5)
    dropped = sj.nm_mask(jnp.abs(dy), 2, 8, axis=-1, ties="last")
    wanted = {
        "dense": (x @ w, dy @ w.T),
        "sdgp": (x @ w, jnp.where(dropped, dy, 0) @ w.T),
        "sdwp": (x @ w, dy @ jnp.where(list(masks(w, 2, 8))[1], w, 0).T),
    }
    for method, (y, dx) in wanted.items():
        got = run(x, w, dy, n=2, m=8, method=method)
        close(got[0], y, 1e-6)
        close(got[1], dx, 1e-6)
    for got, dense in zip(run(x, w, dy, n=8, m=8), wanted["dense"]):  # nothing is pruned
        close(got, dense, 1e-6)


def test_of_equals_the_last_stay():
    w = jnp.ones((8, 8)).at[0, 0].set(-1.0)
    last = np.zeros((8, 8))
    last[6:] = 1
    y, grad_x, _ = run(jnp.eye(8), w, jnp.eye(8), n=2, m=8)
    np.testing.assert_array_equal(y, last)
    np.testing.assert_array_equal(grad_x, last)


@pytest.mark.parametrize(
    ("strides", "padding", "size"),
    [
        (1, "SAME", (5, 6)),
        (2, "SAME", (7, 6)),
        ((3, 2), "VALID", (8, 8)),
        (2, ((0, 2), (1, 0)), (6, 7)),
    ],
)
def test_convolutions_of_any_stride_and_padding(strides, padding, size):
    x, w = normal(2, *size, 4), normal(3, 2, 4, 8, key=1)
    inside, turned = masks(w, 1, 4)

    def plain(x, w):
        steps = (strides, strides) if isinstance(strides, int) else strides
        return lax.conv_general_dilated(x, w, steps, padding, dimension_numbers=LAYOUT)

    def pruned(x, w):
        return weights.bdwp_conv(x, w, 1, 4, strides=strides, padding=padding, decay=0.3)

    @jax.jit
    def both(x, w):
        y, pull = jax.vjp(pruned, x, w)
        dy = normal(*y.shape, key=2)
        forward, backward = jnp.where(inside, w, 0), jnp.where(turned, w, 0)
        grad_x = jax.vjp(plain, x, backward)[1](dy)[0]
        grad_w = jax.vjp(plain, x, forward)[1](dy)[1] + 0.3 * jnp.where(inside, 0, w)
        return (y, *pull(dy)), (plain(x, forward), grad_x, grad_w)

    for got, wanted in zip(*both(x, w)):
        close(got, wanted, 1e-6)


# pre-generation


def trained(dtype):
    """A step on the fly and one with the pair in its state, with decay and clipping in both."""
    x, w, target = layer(6, i=16, o=16)
    x = x.astype(dtype)
    tx = optax.chain(
        optax.clip_by_global_norm(0.5), optax.add_decayed_weights(0.1), optax.sgd(0.2, 0.9)
    )

    def loss(w, product):
        hidden = jnp.tanh(product(x, w))
        return jnp.mean((product(hidden, w).astype(jnp.float32) - target) ** 2)

    def update(w, state, product):
        updates, state = tx.update(jax.grad(loss)(w, product), state, w)
        return optax.apply_updates(w, updates), state

    def fly(carry, _):
        return update(*carry, lambda x, w: weights.bdwp_dot(x, w, 2, 8, decay=0.01)), None

    def stored(stale):
        def step(carry, _):
            w, state, pair = carry
            new, state = update(
                w, state, lambda x, w: weights.bdwp_dot_compact(x, w, pair, decay=0.01)
            )
            fresh = w if stale else new
            return (new, state, pregenerate(fresh, 2, 8, dtype=dtype)), None

        return step

    start = (w, tx.init(w))
    paired = (*start, pregenerate(w, 2, 8, dtype=dtype))
    run = jax.jit(lax.scan, static_argnums=0, static_argnames="length")
    routes = [(fly, start), (stored(False), paired)]
    if dtype == jnp.float32:
        routes.append((stored(True), paired))
    return [run(step, carry, length=20)[0] for step, carry in routes]


@pytest.mark.standard_promotion
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pregenerated_training_is_the_same_bit_for_bit(dtype):
    fly, stored, *stale = trained(jnp.dtype(dtype))
    np.testing.assert_array_equal(fly[0], stored[0])
    np.testing.assert_array_equal(fly[1][2][0].trace, stored[1][2][0].trace)
    assert stored[2].ff.values.dtype == dtype
    # a pair from before the update is another method
    for w, *_ in stale:
        assert float(jnp.abs(w - fly[0]).max()) > 1e-3


def test_the_pair_gets_no_gradient_and_a_kept_zero_is_not_pulled():
    x, w, dy = layer(5)
    w = w.at[:8].set(0.0).at[0].set(1e-30)  # underflows in float16, yet it is kept
    pair = pregenerate(w, 2, 8, dtype=jnp.float16)
    pull = jax.vjp(lambda w, pair: weights.bdwp_dot_compact(x, w, pair, decay=1e25), w, pair)[1]
    grad_w, grad_pair = pull(dy)
    close(grad_w[:8], (x.T @ dy)[:8], 1e-6)
    assert not any(np.any(np.asarray(leaf, bool)) for leaf in jax.tree.leaves(grad_pair))


# transformations


@pytest.mark.parametrize("product", [weights.bdwp_dot, weights.bdwp_conv])
def test_decay_may_be_traced_and_gets_no_gradient(product):
    x, w, _ = layer(2, 3, 3)
    kernel = w if product is weights.bdwp_dot else w[None, None]

    def loss(kernel, decay):
        return jnp.sum(product(x, kernel, 2, 8, decay=decay) ** 2)

    grads = jax.jit(jax.vmap(jax.grad(loss, (0, 1)), in_axes=(None, 0)))(
        kernel, jnp.asarray([0.0, 0.5])
    )
    np.testing.assert_array_equal(grads[1], [0.0, 0.0])
    pruned = jnp.where(next(masks(kernel, 2, 8)), 0, kernel)
    close(grads[0][1] - grads[0][0], 0.5 * pruned, 1e-4)
    for i, decay in enumerate((0, 0.5)):  # known when it is compiled
        close(jax.jit(jax.grad(lambda w, decay=decay: loss(w, decay)))(kernel), grads[0][i], 1e-6)


def test_seeds_and_layers_pass_through_vmap_and_scan():
    x, _, _ = layer(5, i=16)
    stack = normal(3, 16, 16, key=1)

    def chain(stack, x):
        def body(x, w):
            return jnp.tanh(weights.bdwp_dot(x, w, 2, 4)), None

        return jnp.sum(lax.scan(body, x, stack)[0] ** 2)

    @jax.jit
    def seeds(stacks, x):
        return jax.vmap(jax.grad(chain, (0, 1)), in_axes=(0, None))(stacks, x)

    both = seeds(jnp.stack([stack, stack[::-1]]), x)

    def loop(stack, x):
        for w in stack:
            x = jnp.tanh(weights.bdwp_dot(x, w, 2, 4))
        return jnp.sum(x**2)

    alone = jax.jit(jax.grad(loop, (0, 1)))
    for i, one in enumerate((stack, stack[::-1])):
        for got, wanted in zip(both, alone(one, x)):
            close(got[i], wanted, 1e-5)


def test_bfloat16_products_and_float32_sums():
    x, w, dy = layer(4096, i=8)
    x, dy = x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)
    # not compiled, for XLA may leave out the rounding of a sum that is widened again
    images = x.reshape(4, 32, 32, 8), w[None, None], dy.reshape(4, 32, 32, 8)
    for product, case in ((weights.bdwp_dot, (x, w, dy)), (weights.bdwp_conv, images)):
        x, w, dy = case
        for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 8e-3)):
            y, pull = jax.vjp(lambda x, w, f=product: f(x, w, 2, 8, decay=0), x, w.astype(dtype))
            grad_x, grad_w = pull(dy)
            assert (y.dtype, grad_x.dtype, grad_w.dtype) == (x.dtype, x.dtype, dtype)
            close(grad_w.astype(jnp.float32).reshape(8, 8), exact, tolerance)


def test_sharded_equals_one_device(mesh):
    x, w, _ = layer(8, 2, i=16, o=16)

    def loss(x, w):
        return jnp.sum(jnp.tanh(weights.bdwp_dot(x, w, 2, 8)) ** 2)

    grad = jax.jit(jax.grad(loss, (0, 1)))
    placed = [
        jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))
        for a, spec in ((x, ("data",)), (w, (None, "model")))
    ]
    for got, wanted in zip(grad(*placed), grad(x, w)):
        close(got, wanted, 1e-6)
    forward = jax.jit(lambda w: pregenerate(w, 2, 8).ff)
    text = forward.lower(placed[1]).compile().as_text()  # groups of inputs lie on one device each
    assert not [op for op in ("all-gather", "all-to-all", "collective-permute") if op in text]


# errors


def test_errors_name_argument_and_range(unchecked):
    x, w, _ = layer(3, i=12, o=8)
    for m, method, message in (
        (8, "bdwp", r"w has shape \(12, 8\): its 12 inputs are not a multiple of m = 8, as bdwp"),
        (8, "srste", "12 inputs are not a multiple of m = 8, as srste needs"),
        (3, "bdwp", "8 outputs are not a multiple of m = 3, as bdwp needs"),
        (3, "sdwp", "8 outputs are not a multiple of m = 3, as sdwp needs"),
        (3, "sdgp", "8 outputs are not a multiple of m = 3, as sdgp needs"),
        (4, "rste", "method is 'rste'; allowed are dense, srste, sdwp, sdgp, bdwp"),
        (1, "bdwp", "n is 2 and m is 1; allowed is 1 <= n <= m"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.bdwp_dot(x, w, 2, m, method=method)
        with pytest.raises(ValueError, match=message.replace(r"(12", r"(1, 1, 12")):
            weights.bdwp_conv(x[:, None, None], w[None, None], 2, m, method=method)
    # an axis along which a method does not prune is free
    assert weights.bdwp_dot(x, w, 2, 8, method="sdwp").shape == (3, 8)
    assert weights.bdwp_dot(x, w, 1, 3, method="srste").shape == (3, 8)
    for decay in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=f"decay is {decay}; it must not be negative"):
            weights.bdwp_dot(x, w, 2, 4, decay=decay)
    for bad in ({"x": x.astype(int)}, {"w": w.astype(int)}):
        with pytest.raises(TypeError, match=f"{next(iter(bad))} must be floating point, not int32"):
            weights.bdwp_dot(**{"x": x, "w": w, "n": 2, "m": 4, **bad})
    with pytest.raises(ValueError, match="8 outputs are not a multiple of m = 3"):
        weights.pregenerate(w, 1, 3)


def test_a_pair_of_another_kernel_is_refused(unchecked):
    x, w, _ = layer(3)
    pair = pregenerate(w, 2, 8)
    other = pregenerate(jnp.ones((16, 16)), 2, 8)
    along = weights.compress_nm(jnp.zeros((16, 8)), sj.NM(2, 8, axis=1))
    for bad, message in (
        (other, r"pair.ff is of shape \(16, 16\), grouped along 0; a kernel of shape \(16, 8\)"),
        (pair._replace(bp=pair.ff), r"pair.bp is of shape \(16, 8\), .* needs \(8, 16\)"),
        (pair._replace(ff=along), r"pair.ff is of shape \(16, 8\), grouped along 1"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.bdwp_dot_compact(x, w, bad)
    with pytest.raises(ValueError, match="decay is -1"):
        weights.bdwp_dot_compact(x, w, pair, decay=-1)


def test_bad_convolutions_are_refused(unchecked):
    x, w = jnp.zeros((1, 4, 4, 8)), jnp.zeros((3, 3, 8, 8))
    for options, message in (
        ({"strides": 0}, "strides is 0; it must be 2 numbers of at least 1"),
        ({"strides": (1, 2, 1)}, r"strides is \(1, 2, 1\); it must be 2 numbers"),
        ({"padding": "CIRCULAR"}, "padding is 'CIRCULAR'; allowed are SAME, SAME_LOWER, VALID and"),
        ({"padding": ((1, 1),)}, r"padding is \(\(1, 1\),\); it must be 2 pairs \(low, high\)"),
        ({"padding": (1, 1)}, r"padding is \(1, 1\); it must be 2 pairs"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.bdwp_conv(x, w, 2, 8, **options)
