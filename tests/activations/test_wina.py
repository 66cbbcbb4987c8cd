"""WINA's masks, layers and thresholds: the vectors, optimality, pitfalls."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sparsejax.activations import wina

RNG = np.random.default_rng(0)
ONE = jnp.ones(())


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def kernel_norms(kernel):
    return wina.column_norms(kernel, where=lambda path, leaf: True)


mask_of = jax.jit(wina.wina_mask, static_argnames=("sparsity", "by"))
layer_of = jax.jit(wina.sparse_linear, static_argnames=("sparsity", "gather"))


def with_prefill(mask, **options):
    return mask | ~wina.prefill_positions(mask.shape[-2], **options)[:, None]


# the vectors


@pytest.mark.vectors
def test_every_family_of_the_file_is_compared(reference):
    known = {"mask", "icdf", "teal", "cats", "rsparse", "greedy"}
    transform = {"before", "after", "tokens", "logits"}  # test_orthogonal_transform.py
    assert reference("wina").families() == known | transform


@pytest.mark.vectors
def test_masks_and_layers(reference):
    for case in reference("wina").cases("mask"):
        x, kernel, sparsity = (
            jnp.asarray(case["x"]),
            jnp.asarray(case["weight"].T),
            case["sparsity"],
        )
        c = kernel_norms(kernel)
        np.testing.assert_allclose(c, case["column_norm"], rtol=1e-9)
        np.testing.assert_allclose(x @ kernel, case["dense_y"], rtol=1e-9, atol=1e-9)
        sparsified = np.asarray(wina.prefill_positions(x.shape[-2]))
        for name, norms in (("wina", c), ("teal", ONE)):
            mask = np.asarray(with_prefill(mask_of(x, norms, sparsity)))
            theirs = case[f"{name}_topk_mask"].astype(bool)
            scores = np.asarray(wina.input_scores(x, norms))
            k = wina.kept_inputs(x.shape[-1], sparsity)
            ranked = -np.sort(-scores, axis=-1)
            tied = np.zeros(sparsified.shape, bool) | sparsified
            tied = tied & (0 < k < ranked.shape[-1] and ranked[..., k - 1] == ranked[..., k])
            # which of equals are kept is arbitrary there; that they are as good is not
            np.testing.assert_array_equal(
                np.sort(np.where(mask, scores, -1.0)), np.sort(np.where(theirs, scores, -1.0))
            )
            assert not tied.all()
            np.testing.assert_array_equal(mask[~tied], theirs[~tied])
            y = layer_of(x, kernel, norms, sparsity, gather=name == "wina")
            y = np.where(sparsified[:, None], y, x @ kernel)
            np.testing.assert_allclose(y[~tied], case[f"{name}_y"][~tied], rtol=1e-9, atol=1e-9)


@pytest.mark.vectors
def test_calibrated_thresholds(reference):
    for case in reference("wina").cases("icdf"):
        x = jnp.asarray(case["criterion"])
        found = [
            wina.empirical_icdf(np.abs(case["criterion"]).astype(np.float16).ravel(), float(q))
            for q in case["q"]
        ]
        np.testing.assert_allclose(found, case["threshold"], rtol=1e-6)
        mask = wina.wina_mask(x, ONE, by="threshold", threshold=float(case["threshold"][1]))
        np.testing.assert_array_equal(with_prefill(mask), case["mask_at_q1"].astype(bool))


# the criterion


def test_it_is_optimal_for_orthogonal_columns(x64):
    masks = np.zeros((210, 10), bool)
    for mask, chosen in zip(masks, itertools.combinations(range(10), 4)):
        mask[list(chosen)] = True
    for seed in range(50):
        rng = np.random.default_rng(seed)
        basis = np.linalg.qr(rng.normal(size=(12, 12)))[0][:10]
        kernel = basis * np.exp(rng.normal(size=(10, 1)))  # rows are orthogonal
        x = rng.normal(size=10)
        lost = np.linalg.norm((~masks * x) @ kernel, axis=1)
        mask = wina.wina_mask(jnp.asarray(x), kernel_norms(jnp.asarray(kernel)), 0.6)
        assert int(mask.sum()) == 4
        ours = np.linalg.norm((~np.asarray(mask) * x) @ kernel)
        np.testing.assert_allclose(ours, lost.min(), rtol=1e-12)


def test_it_is_optimal_in_expectation_over_signs(x64):
    kernel, size = np.float64(normal(6, 4)), np.abs(np.float64(normal(6)))
    signs = np.asarray(list(itertools.product([-1.0, 1.0], repeat=6)))
    lost = {}
    for chosen in itertools.combinations(range(6), 3):
        dropped = np.asarray([i not in chosen for i in range(6)])
        lost[chosen] = np.mean(np.sum(((dropped * size * signs) @ kernel) ** 2, axis=1))
    mask = wina.wina_mask(jnp.asarray(size), kernel_norms(jnp.asarray(kernel)), 0.5)
    assert tuple(np.flatnonzero(mask)) == min(lost, key=lost.__getitem__)


def test_norms_help_as_far_as_they_differ():
    ratios = {}
    for sigma in (0.0, 0.5, 1.0):
        errors = []
        for seed in range(3):
            rng = np.random.default_rng(seed)
            kernel = rng.normal(size=(512, 256)) * np.exp(sigma * rng.normal(size=(512, 1)))
            x = jnp.asarray(rng.normal(size=(256, 512)), jnp.float32)
            kernel = jnp.asarray(kernel, jnp.float32)
            y = x @ kernel
            for c in (ONE, kernel_norms(kernel)):
                lost = layer_of(x, kernel, c, 0.65) - y
                errors.append(jnp.linalg.norm(lost, axis=1) / jnp.linalg.norm(y, axis=1))
        teal, win = (float(np.mean(errors[i::2])) for i in (0, 1))
        assert 0.35 < teal < 0.5
        ratios[sigma] = win / teal
    assert abs(ratios[0.0] - 1) < 0.02
    assert ratios[1.0] < 0.5 < ratios[0.5] < 0.85


def test_norms_are_of_the_rows_and_wide():
    kernel = normal(2, 5, 7)
    params = {"dense": {"kernel": kernel, "bias": jnp.ones(7)}, "embed": {"kernel": kernel[0]}}
    c = wina.column_norms(params)
    np.testing.assert_allclose(c["dense"]["kernel"], np.linalg.norm(kernel, axis=-1), rtol=1e-6)
    assert c["dense"]["bias"].shape == c["embed"]["kernel"].shape == ()
    assert float(c["dense"]["bias"]) == float(c["embed"]["kernel"]) == 1.0
    # squares that float16 could not hold
    large = jnp.full((2, 4), 300.0, jnp.float16)
    np.testing.assert_allclose(kernel_norms(large), [600.0, 600.0])
    assert kernel_norms(large).dtype == jnp.float32
    with pytest.raises(ValueError, match="where matches no leaf: 'nothing'"):
        wina.column_norms(params, where="nothing")


def test_counts_are_those_of_python():
    assert wina.kept_inputs(10, 0.2) == 8
    assert wina.kept_inputs(10, 0.2 + 4e-17) == 7  # a sum of steps
    x = normal(3, 10)
    for sparsity in (0, 0.25, 0.65, 1 - 1e-9, 1):
        kept = wina.wina_mask(x, ONE, sparsity).sum(-1)
        np.testing.assert_array_equal(kept, int(10 * (1 - sparsity)))


def test_ties_zeros_and_what_is_not_a_number():
    x = jnp.asarray([0.0, 2.0, -2.0, 2.0, 0.0])
    np.testing.assert_array_equal(wina.wina_mask(x, ONE, 0.6), [0, 1, 1, 0, 0])
    np.testing.assert_array_equal(wina.wina_mask(x, ONE, 0.2), [1, 1, 1, 1, 0])
    above = wina.wina_mask(x, ONE, by="threshold", threshold=0)
    np.testing.assert_array_equal(above, [0, 1, 1, 1, 0])
    equal = wina.wina_mask(x, ONE, by="threshold", threshold=2.0)
    assert not equal.any()
    # a NaN is kept, not hidden, and the count stays what it is
    x = x.at[4].set(jnp.nan)
    np.testing.assert_array_equal(wina.wina_mask(x, ONE, 0.6), [0, 1, 0, 0, 1])
    equal = wina.wina_mask(x, ONE, by="threshold", threshold=2.0)
    np.testing.assert_array_equal(equal, [0, 0, 0, 0, 1])


@pytest.mark.parametrize(
    ("length", "fraction", "dense"), [(1, 0.99, 0), (120, 0.99, 2), (8, 0.5, 4), (5, 1, 0)]
)
def test_the_first_positions_of_a_prompt_stay_dense(length, fraction, dense):
    positions = wina.prefill_positions(length, fraction=fraction)
    np.testing.assert_array_equal(positions, np.arange(length) >= dense)


def test_the_gathered_rows_are_the_masked_product():
    x, kernel, bias = normal(2, 3, 24), normal(24, 10), normal(10)
    c = kernel_norms(kernel)
    for sparsity in (0.6, 1.0):
        got, wanted = (
            layer_of(x, kernel, c, sparsity, bias=bias, gather=gather) for gather in (True, False)
        )
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got, jnp.broadcast_to(bias, got.shape))  # nothing is kept
    # a row that is not kept is not read: 0 * nan would be seen
    x = x.at[..., 5].set(0.0)
    hidden = kernel.at[5].set(jnp.nan)
    assert np.isfinite(layer_of(x, hidden, c, 0.6, bias=bias, gather=True)).all()
    assert np.isnan(layer_of(x, hidden, c, 0.6, bias=bias, gather=False)).all()


def test_gradients_pass_through_what_is_kept():
    x, kernel = normal(3, 12), normal(12, 5)
    c = kernel_norms(kernel)
    up = normal(3, 5)
    mask = mask_of(x, c, 0.5)
    for gather in (False, True):

        def run(x, kernel, gather=gather):
            return wina.sparse_linear(x, kernel, kernel_norms(kernel), 0.5, gather=gather)

        dx, dw = jax.jit(lambda x, w: jax.vjp(run, x, w)[1](up))(x, kernel)
        np.testing.assert_allclose(dx, jnp.where(mask, up @ kernel.T, 0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(dw, jnp.where(mask, x, 0).T @ up, rtol=1e-5, atol=1e-6)


def test_batches_precisions_and_one_trace():
    x, kernel = normal(4, 6, 16), normal(16, 8)
    c = kernel_norms(kernel)
    traces = []

    @functools.partial(jax.jit, static_argnums=3)
    def run(x, kernel, c, gather):
        traces.append(gather)
        return wina.sparse_linear(x, kernel, c, 0.5, gather=gather)

    for gather in (False, True):
        wanted = run(x, kernel, c, gather)
        run(x + 1, kernel, c, gather)
        each = jax.jit(
            jax.vmap(lambda x, g=gather: wina.sparse_linear(x, kernel, c, 0.5, gather=g))
        )
        np.testing.assert_allclose(each(x), wanted, rtol=1e-6, atol=1e-6)
        narrow = run(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), c, gather)
        mixed = run(x.astype(jnp.bfloat16), kernel, c, gather)
        assert narrow.dtype == mixed.dtype == jnp.bfloat16
        for got in (narrow, mixed):
            lost = np.float32(got) - np.float32(wanted)
            assert np.linalg.norm(lost) < 0.1 * np.linalg.norm(wanted)
    assert traces == [False] * 3 + [True] * 3
    assert wina.input_scores(x.astype(jnp.bfloat16), c).dtype == jnp.float32


def test_double_stays_double(x64):
    x, kernel = jnp.asarray(RNG.normal(size=(3, 8))), jnp.asarray(RNG.normal(size=(8, 4)))
    assert kernel_norms(kernel).dtype == jnp.float64
    assert wina.input_scores(x, jnp.ones(8, jnp.float32)).dtype == jnp.float64
    assert wina.sparse_linear(x, kernel, kernel_norms(kernel), 0.5).dtype == jnp.float64


def test_eight_devices(mesh):
    x, kernel = normal(8, 16), normal(16, 12)
    c = kernel_norms(kernel)
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    split = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec("model", None)))
    np.testing.assert_allclose(jax.jit(kernel_norms)(split), c, rtol=1e-6)
    np.testing.assert_array_equal(mask_of(spread, c, 0.5), mask_of(x, c, 0.5))
    for gather in (False, True):
        np.testing.assert_allclose(
            layer_of(spread, split, c, 0.5, gather=gather),
            layer_of(x, kernel, c, 0.5),
            rtol=1e-5,
            atol=1e-5,
        )


def test_quantiles_with_counts_and_at_the_ends():
    values = np.asarray([3.0, 1.0, 2.0, 2.0, 5.0])
    unique, counts = np.unique(values, return_counts=True)
    for q in (0, 0.1, 0.2, 0.45, 0.6, 0.99, 1):
        alone = wina.empirical_icdf(values, q)
        assert alone == wina.empirical_icdf(unique, q, counts=counts)
    assert wina.empirical_icdf(values, 0) == 1.0
    assert wina.empirical_icdf(values, 0.2) == 1.0
    assert wina.empirical_icdf(values, 0.4) == 1.5
    assert wina.empirical_icdf(values, 0.6) == 2.0  # an exact hit
    assert wina.empirical_icdf(values, 1) == 5.0


# errors


def test_errors(unchecked):
    x, kernel = normal(3, 4), normal(4, 2)
    for arguments, message in (
        ((x, ONE), "sparsity is None; by='topk' needs it"),
        ((x, ONE, 1.5), r"sparsity is 1.5; it must be in \[0, 1\]"),
        ((x, ONE, float("nan")), "sparsity is nan"),
        ((x, jnp.ones(3), 0.5), r"c has shape \(3,\); x has 4 inputs"),
        ((x, -jnp.ones(4), 0.5), "c has a norm of -1.0; norms must be at least 0"),
        ((x, jnp.ones(4).at[2].set(jnp.nan), 0.5), "c has a norm of nan"),
    ):
        with pytest.raises(ValueError, match=message):
            wina.wina_mask(*arguments)
        if len(arguments) == 3:
            with pytest.raises(ValueError, match=message):
                wina.sparse_linear(x, kernel, *arguments[1:])
    with pytest.raises(ValueError, match="threshold is None; by='threshold' needs it"):
        wina.wina_mask(x, ONE, 0.5, by="threshold")
    with pytest.raises(ValueError, match="by is 'x'; allowed are 'topk' and 'threshold'"):
        wina.wina_mask(x, ONE, 0.5, by="x")
    with pytest.raises(ValueError, match=r"fraction is 0; it must be in \(0, 1\]"):
        wina.prefill_positions(4, fraction=0)
    with pytest.raises(ValueError, match="capacity is 0; it must be at least 1"):
        wina.product_of_kept(x[0], kernel, x[0] > 0, 0)
    with pytest.raises(ValueError, match=r"q is -0.1; it must be in \[0, 1\]"):
        wina.empirical_icdf(x[0], -0.1)
    for counts in (None, np.zeros(0)):
        with pytest.raises(ValueError, match="values and counts hold 0 values and no observation"):
            wina.empirical_icdf(x[0, :0], 0.5, counts=counts)
