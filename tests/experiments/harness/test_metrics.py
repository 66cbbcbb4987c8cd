"""Calibration and corrupted labels: the vectors, definitions in loops, and what is refused."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.harness.metrics import corrupt_labels, expected_calibration_error

LABELS = jax.random.randint(jax.random.key(0), (4000,), 0, 10)


def by_loops(probs, labels, bins):
    probs, total = np.asarray(probs, np.float64), 0.0
    place = np.asarray([min(max(math.ceil(p.max() * bins) - 1, 0), bins - 1) for p in probs])
    for b in range(bins):
        inside = place == b
        if inside.any():
            right = probs[inside].argmax(1) == np.asarray(labels)[inside]
            total += inside.mean() * abs(right.mean() - probs[inside].max(1).mean())
    return total


@pytest.mark.vectors
def test_the_error_is_that_of_the_vectors(reference):
    case = reference("lazy_neuron").whole()
    for name in case.names():
        if not name.startswith("ece"):
            case.ignore(name, reason="compared in tests/activations/test_topk_mlp.py")
    found = [match[1] for name in case.names() if (match := re.fullmatch(r"(ece\d*)_probs", name))]
    assert found
    for ece in found:
        probs, labels = jnp.asarray(case[f"{ece}_probs"]), jnp.asarray(case[f"{ece}_labels"])
        bins = case[f"{ece}_bins"]
        error = expected_calibration_error(probs, labels, num_bins=bins)
        np.testing.assert_allclose(error, case[ece], rtol=1e-9, atol=1e-9)
        single = expected_calibration_error(probs.astype(jnp.float32), labels, num_bins=bins)
        np.testing.assert_allclose(single, case[ece], atol=1e-5)


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_the_error_is_that_of_the_definition(bins):
    logits = 3 * jax.random.normal(jax.random.key(1), (300, 10))
    probs = jax.nn.softmax(logits)
    probs = probs.at[:2].set(jnp.eye(10)[:2])  # sure, in the last bin
    error = jax.jit(expected_calibration_error, static_argnames="num_bins")
    np.testing.assert_allclose(
        error(probs, LABELS[:300], num_bins=bins), by_loops(probs, LABELS[:300], bins), atol=1e-6
    )


def test_edges_of_bins_belong_to_the_bin_below_and_ties_predict_the_first():
    # 0.5 is in the first of two bins: with 0.9 in the other, the gaps do not cancel
    probs = jnp.asarray([[0.5, 0.5], [0.9, 0.1]])
    error = expected_calibration_error(probs, jnp.asarray([0, 1]), num_bins=2)
    np.testing.assert_allclose(error, (0.5 + 0.9) / 2, rtol=1e-6)
    one = expected_calibration_error(probs, jnp.asarray([0, 1]), num_bins=1)
    np.testing.assert_allclose(one, 0.2, rtol=1e-6)
    assert expected_calibration_error(jnp.eye(3), jnp.arange(3)) == 0
    assert expected_calibration_error(jnp.eye(3, dtype=jnp.bfloat16), jnp.arange(3)).dtype == (
        jnp.float32
    )


def test_labels_change_as_often_as_asked():
    key = jax.random.key(2)
    corrupt = jax.jit(corrupt_labels, static_argnames=("p", "num_classes"))
    for p in (0.0, 0.4, 0.8, 1.0):
        found = np.asarray(corrupt(key, LABELS, p=p, num_classes=10))
        changed = np.mean(found != np.asarray(LABELS))
        # the right class is among those drawn
        assert abs(changed - 0.9 * p) < 4 * math.sqrt(0.25 / len(found)) * (p > 0) or changed == p
        assert found.dtype == LABELS.dtype
        assert set(found) == set(range(10))
    drawn = np.bincount(corrupt(key, 0 * LABELS, p=1.0, num_classes=4), minlength=4) / 4000
    np.testing.assert_allclose(drawn, 0.25, atol=0.03)
    np.testing.assert_array_equal(
        corrupt(key, LABELS, p=0.4, num_classes=10),
        corrupt_labels(key, LABELS, p=0.4, num_classes=10),
    )
    other = corrupt(jax.random.key(3), LABELS, p=0.4, num_classes=10)
    assert (other != corrupt(key, LABELS, p=0.4, num_classes=10)).any()
    # a smaller p with the same key changes a part of the same labels, to the same classes
    some = np.asarray(corrupt(key, LABELS, p=0.4, num_classes=10))
    many = np.asarray(corrupt(key, LABELS, p=0.8, num_classes=10))
    assert (many[some != LABELS] == some[some != LABELS]).all()


def test_bad_input_is_named():
    probs, labels = jnp.full((3, 2), 0.5), jnp.zeros(3, jnp.int32)
    key = jax.random.key(0)
    for call, message in (
        (lambda: expected_calibration_error(probs, labels, num_bins=0), "num_bins is 0; it must"),
        (lambda: expected_calibration_error(probs, labels[:2]),
         r"probs has shape \(3, 2\) and labels \(2,\): one a row"),
        (lambda: expected_calibration_error(probs[:0], labels[:0]), r"probs has shape \(0, 2\)"),
        (lambda: expected_calibration_error(2 * probs, labels), "has a row whose sum is 1 away"),
        (lambda: expected_calibration_error(probs * jnp.nan, labels), "whose sum is nan away"),
        (lambda: corrupt_labels(key, labels, p=1.1, num_classes=2), r"p is 1.1; it must be in \[0"),
        (lambda: corrupt_labels(key, labels, p=0.1, num_classes=0), "num_classes is 0; it must be"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    jax.eval_shape(expected_calibration_error, 2 * probs, labels)  # only what can be looked at
