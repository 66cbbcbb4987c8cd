"""Static masks around an optimiser, and masks found inside its state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sparsejax as sj

pytestmark = pytest.mark.standard_promotion


def problem():
    w = jax.random.normal(jax.random.key(0), (8, 4))
    params = {"fc": {"kernel": w, "bias": jnp.zeros(4)}}
    return params, sj.make_masks(sj.magnitude(params), pattern=sj.NM(2, 4))


def gradients(params):
    return jax.tree.map(lambda w: 0.1 * w + 1.0, params)


@pytest.mark.parametrize("mask_gradients", [True, False])
def test_parameters_are_sparse_after_every_update(mask_gradients):
    params, masks = problem()
    tx = sj.static_sparsity(optax.adam(1e-2), masks, mask_gradients=mask_gradients)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(gradients(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
        np.testing.assert_array_equal(params["fc"]["kernel"] != 0, masks["fc"]["kernel"])
    momentum = state.inner[0].mu["fc"]["kernel"]
    assert bool((momentum[~masks["fc"]["kernel"]] == 0).all()) == mask_gradients
    assert sj.sad(sj.get_masks(state), masks)["total"] == 0
    assert bool((params["fc"]["bias"] != 0).all())


def test_masks_are_found_and_replaced_however_deep():
    params, masks = problem()
    tx = optax.chain(optax.clip(1.0), sj.static_sparsity(optax.sgd(0.1), masks))
    state = tx.init(params)
    dense = sj.dense_masks(params)
    flipped = jax.tree.map(lambda m: ~m if m.ndim else m, masks)
    changed = sj.set_masks(state, flipped)
    assert sj.sad(sj.get_masks(changed), masks)["total"] == 32
    with pytest.raises(ValueError, match="opt_state holds no mask trees; exactly one is needed"):
        sj.get_masks(optax.adam(1.0).init(params))
    twice = optax.chain(sj.static_sparsity(optax.sgd(0.1), masks), tx).init(params)
    with pytest.raises(ValueError, match="opt_state holds 2 mask trees"):
        sj.get_masks(twice)
    with pytest.raises(ValueError, match="masks do not have the structure"):
        sj.set_masks(state, {"fc": dense["fc"]["bias"]})


def test_inside_nnx_optimizer():
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    masks = sj.make_masks(sj.magnitude(nnx.state(model, nnx.Param)), pattern=sj.NM(2, 4))
    optimizer = nnx.Optimizer(model, sj.static_sparsity(optax.adamw(1e-2), masks), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 8))) ** 2))(model)
        optimizer.update(model, grads)

    step(model, optimizer)
    np.testing.assert_array_equal(model.kernel[...] != 0, masks["kernel"][...])
    assert sj.count_masks(sj.get_masks(optimizer.opt_state)).density == 0.5


def test_errors():
    params, masks = problem()
    tx = sj.static_sparsity(optax.sgd(0.1), masks)
    with pytest.raises(ValueError, match="params is None"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="masks do not have the structure"):
        tx.init({"other": params["fc"]["kernel"]})
