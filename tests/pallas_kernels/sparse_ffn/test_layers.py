"""A feed-forward layer over its active neurons: the forms of the gate, against the dense layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels.sparse_ffn import bit_patterns, sparse_ffn
from pallas_kernels.sparse_ffn.rows import tpu
from pallas_kernels.sparse_ffn.shapes import RAGGED

SHAPE = RAGGED["ragged"]
WAYS = {
    "xla": {"implementation": "xla"},
    "tpu": {"implementation": "tpu", "interpret": True, "blocks": tpu.Blocks(8)},
    "triton": {"implementation": "triton", "interpret": True},
}
FORMS = {"numbers": None, "weights": jax.nn.silu, "none": jax.nn.gelu}


def problem(dtype=jnp.float32):
    """A token, weights, a gate of every form, and a list whose rest is nonsense."""
    rng, shape = np.random.default_rng(0), SHAPE
    scale = shape.inputs**-0.5

    def normal(*axes):
        return jnp.asarray(rng.normal(size=axes), dtype)

    x, numbers = normal(shape.inputs), normal(shape.capacity)
    up, gate = scale * normal(shape.neurons, shape.inputs), normal(shape.neurons, shape.inputs)
    down = normal(shape.neurons, shape.outputs)
    idx = rng.permutation(shape.neurons)[: shape.capacity]
    idx[shape.active :] = 10**6
    numbers = numbers.at[shape.active :].set(jnp.nan)
    gates = {"numbers": numbers, "weights": scale * gate, "none": None}
    return x, up, down, gates, jnp.asarray(idx, jnp.int32), jnp.int32(shape.active)


def dense(x, up, down, gate, idx, count, activation):
    """The layer over all neurons, with a mask of those that are listed."""
    listed = jnp.zeros(up.shape[0], bool).at[idx[: int(count)]].set(True)
    hidden = up @ x
    if gate is None:
        hidden = activation(hidden)
    elif gate.ndim == 1:
        full = jnp.zeros(up.shape[0], x.dtype).at[idx[: int(count)]].set(gate[: int(count)])
        hidden = full * hidden
    else:
        hidden = activation(gate @ x) * hidden
    return jnp.where(listed, hidden, 0) @ down


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients_are_those_of_the_masked_dense_layer(way, form):
    x, up, down, gates, idx, count = problem()
    activation = FORMS[form]

    def op(x, up, down, gate):
        options = {"gate": gate, "activation": activation, **WAYS[way]}
        return sparse_ffn(x, up, down, idx, count, **options)

    def define(x, up, down, gate):
        return dense(x, up, down, gate, idx, SHAPE.active, activation)

    @jax.jit
    def both(*args):
        found = []
        for f in (op, define):
            y, pull = jax.vjp(f, *args)
            found.append((y, pull(jnp.cos(y))))
        return found

    found, expected = both(x, up, down, gates[form])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), *(found, expected)
    )
    assert np.count_nonzero(expected[1][2].any(axis=1)) == SHAPE.active


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_is_that_of_finite_differences(x64, form):
    x, up, down, gates, idx, _ = problem(jnp.float64)
    x, up, down, idx = x[:4], up[:6, :4], down[:6, :3], idx[:5] % 6
    gates |= {"numbers": gates["numbers"][:5], "weights": gates["weights"][:6, :4]}

    def f(x, up, down, gate):
        y = sparse_ffn(x, up, down, idx, 4, gate=gate, activation=FORMS[form])
        return jnp.sum(y**2)

    check_grads(
        jax.jit(f), (x, up, down, gates[form]), order=1, modes=("rev",), eps=1e-5, rtol=1e-6
    )


def test_bfloat16_is_summed_and_kept_wide_in_between():
    x, up, down, gates, idx, count = problem(jnp.bfloat16)
    found = sparse_ffn(x, up, down, idx, count, gate=gates["numbers"])
    wide = (v.astype(jnp.float32) for v in (x, up, down))
    gate = gates["numbers"].astype(jnp.float32)
    expected = sparse_ffn(*wide, idx, count, gate=gate)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))


@pytest.mark.parametrize("form", FORMS)
def test_bit_patterns_give_what_their_numbers_give(form):
    x, up, down, gates, idx, count = problem()
    up, down = up.astype(jnp.bfloat16), down.astype(jnp.bfloat16)
    gate = gates[form]
    as_bits = bit_patterns(gate) if form == "weights" else gate
    gate = gate.astype(jnp.bfloat16) if form == "weights" else gate
    op = functools.partial(sparse_ffn, activation=FORMS[form])
    found = op(x, bit_patterns(up), bit_patterns(down), idx, count, gate=as_bits)
    np.testing.assert_array_equal(found, op(x, up, down, idx, count, gate=gate))


def test_vmap_over_tokens():
    x, up, down, gates, idx, count = problem()
    xs = jnp.stack([x, 2 * x, -x])
    counts = jnp.asarray([0, SHAPE.active, 3], jnp.int32)

    def op(x, count):
        return sparse_ffn(x, up, down, idx, count, gate=gates["numbers"])

    found = jax.vmap(op)(xs, counts)
    for y, x, count in zip(found, xs, counts):
        np.testing.assert_allclose(y, op(x, count), rtol=1e-6, atol=1e-6)


X, UP, DOWN, IDX = jnp.ones(3), jnp.ones((4, 3)), jnp.ones((4, 2)), jnp.zeros(2, jnp.int32)
REFUSED = {
    "x": ({"x": jnp.ones(3, jnp.int32)}, TypeError, "x must be floating point, not int32"),
    "down": (
        {"down": jnp.ones((3, 2))},
        ValueError,
        r"down has shape \(3, 2\); it must be \(4, 2\)",
    ),
    "gate": (
        {"gate": jnp.ones(3)},
        ValueError,
        r"gate has shape \(3,\); it must be \(2,\), by idx",
    ),
    "weights": (
        {"gate": jnp.ones((4, 2)), "activation": jax.nn.silu},
        ValueError,
        r"gate has shape \(4, 2\); it must be \(4, 3\), by up",
    ),
    "activation": (
        {"gate": jnp.ones(2), "activation": jax.nn.silu},
        ValueError,
        "with a gate of numbers there is none",
    ),
    "no activation": ({}, ValueError, "activation is None; without a gate of numbers"),
    "no activation of a gate": ({"gate": UP}, ValueError, "activation is None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_refused_by_name(unchecked, case):
    changed, error, message = REFUSED[case]
    arguments = {"x": X, "up": UP, "down": DOWN, "idx": IDX} | changed
    with pytest.raises(error, match=message):
        sparse_ffn(**arguments)
