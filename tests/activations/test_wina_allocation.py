"""The greedy search: the vectors, what it takes first, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.activations import wina, wina_allocation
from sparsejax.core.topk import exact_topk_mask

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@jax.jit
def toy_layer(x, kernels, norms, kept):
    """The layer of the search's vectors, with numbers of kept inputs that are traced."""

    def linear(name, h):
        mask = exact_topk_mask(wina.input_scores(h, norms[name]), kept[name])
        return jnp.where(mask | ~wina.prefill_positions(h.shape[-2])[:, None], h, 0) @ kernels[name]

    def normed(h):
        return h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + 1e-6)

    def heads(h):
        return h.reshape(*h.shape[:2], 2, -1)

    h = normed(x)
    q, k, v = (heads(linear(name, h)) for name in "qkv")
    logits = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    causal = jnp.tril(jnp.ones(logits.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, logits, -jnp.inf))
    x = x + linear("o", jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape))
    h = normed(x)
    return x + linear("down", jax.nn.silu(linear("gate", h)) * linear("up", h))


@pytest.mark.vectors
def test_greedy_allocation(reference):
    for case in reference("wina").cases("greedy"):
        kernels = {name: jnp.asarray(case[f"W_{name}"].T) for name in PROJECTIONS}
        norms = {
            n: wina.column_norms(w, where="^$") if n in ("k", "gate") else jnp.ones(())
            for n, w in kernels.items()
        }
        names = [str(name) for name in case["columns"]][3:]
        assert set(names) == set(PROJECTIONS)
        size = kernels["q"].size
        weights = {name: kernels[name].size / size for name in names}

        def layer(x, sparsity, kernels=kernels, norms=norms):
            kept = {
                name: jnp.int32(wina.kept_inputs(kernels[name].shape[0], s))
                for name, s in sparsity.items()
            }
            return toy_layer(x, kernels, norms, kept)

        samples = [jnp.asarray(x)[None] for x in case["x"]]
        settings = {name: case[name] for name in ("target", "step", "last_fraction")}
        table = wina_allocation.greedy_allocation(layer, samples, weights, **settings)
        np.testing.assert_allclose(table, case["table"], rtol=1e-9, atol=1e-9)
        # what goes above 1 in the table is 1 in use
        for row in table:
            used = wina_allocation.allocation_at(table, weights, float(row[0]))
            np.testing.assert_array_equal([*used.values()], np.minimum(row[3:], 1))


def test_the_search_takes_the_cheapest_first():
    weights = {"a": 1.0, "b": 2.0}
    seen = []

    def layer(x, sparsity):
        seen.append(dict(sparsity))
        return x * (1 - sparsity["a"]) + 0.1 * x * (1 - sparsity["b"])

    x = [normal(1, 8, 3)]
    table = wina_allocation.greedy_allocation(layer, x, weights, target=0.9, step=0.5)
    np.testing.assert_array_equal(table[:, 4], [0.25, 0.5, 0.75, 1.0, 1.0, 1.0][: len(table)])
    assert (np.diff(table[:, 0]) > 0).all()
    assert table[-1, 0] >= 0.9 > table[-2, 0]
    assert table[0, 1] < table[0, 2]  # better than all alike
    assert all(0 <= s <= 1 for sparsity in seen for s in sparsity.values())
    # the error is of the last positions
    np.testing.assert_allclose(
        table[0, 1], np.mean(np.linalg.norm(0.025 * x[0][:, 6:], axis=1)), rtol=1e-5
    )
    assert wina_allocation.allocation_at(table, weights, 0.0) == {"a": 0.0, "b": 0.25}


def test_errors_of_the_search(unchecked):
    x, weights = normal(1, 4, 2), {"q": 1.0, "up": 3.5}
    good = {"target": 0.5, "step": 0.1}
    for samples, w, change, message in (
        ([], weights, {}, "xs is empty"),
        ([x], {}, {}, "weights is empty: there are no projections"),
        ([x], {"q": 0.0}, {}, "weights has 0.0 for 'q'; it must be positive"),
        ([x], weights, {"target": 1.1}, r"target is 1.1; it must be in \[0, 1\]"),
        ([x], weights, {"step": 0.0}, "step is 0.0; it must be positive"),
        ([x], weights, {"last_fraction": -1}, r"last_fraction is -1; it must be in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            wina_allocation.greedy_allocation(lambda x, s: x, samples, w, **(good | change))
    with pytest.raises(ValueError, match="sparsity has projections q, k; weights has q, up"):
        wina_allocation.effective_sparsity({"q": 0.5, "k": 0.5}, weights)
    for table in (np.zeros((0, 5)), np.zeros((2, 4))):
        with pytest.raises(ValueError, match=r"table has shape .*; it needs a row, and 3 columns"):
            wina_allocation.allocation_at(table, weights, 0.5)
    with pytest.raises(ValueError, match="sparsity is 2"):
        wina_allocation.allocation_at(np.zeros((2, 5)), weights, 2)
