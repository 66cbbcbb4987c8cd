"""`sparsejax.coding.self_distillation`: targets, loss, and what keeps the teacher from collapse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import coding

LOGITS = jax.random.normal(jax.random.key(0), (2, 5, 7))


def test_the_loss_compares_different_views():
    """Of a teacher and a student that say the same it is the cross-entropy of the two views."""
    targets = coding.centered_targets(LOGITS, jnp.zeros(7), temperature=0.1)
    expected = -jnp.mean(jnp.sum(targets[::-1] * jnp.log(targets), axis=-1))
    got = coding.dino_loss(LOGITS, targets, temperature=0.1)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_the_loss_trains_the_student_alone():
    def loss(student, teacher):
        return coding.dino_loss(student, coding.sinkhorn_targets(teacher))

    slopes = jax.jit(jax.grad(loss, argnums=(0, 1)))(LOGITS, LOGITS)
    assert float(jnp.abs(slopes[0]).max()) > 0
    assert not bool(slopes[1].any())


def test_a_centre_takes_away_what_all_say():
    shift = jnp.arange(7.0)
    far = coding.centered_targets(LOGITS + shift, shift, temperature=0.5)
    near = coding.centered_targets(LOGITS, jnp.zeros(7), temperature=0.5)
    np.testing.assert_allclose(far, near, rtol=1e-4)
    moved = coding.update_center(jnp.ones(7), LOGITS)
    np.testing.assert_allclose(moved, 0.9 + 0.1 * LOGITS.mean((0, 1)), rtol=1e-5)


def test_balanced_targets_use_all_outputs_alike():
    biased = 0.2 * LOGITS + jnp.asarray([9.0, 0, 0, 0, 0, 0, 0])  # softmax says 0 of every view
    assert (jnp.argmax(biased, -1) == 0).all()
    targets = coding.sinkhorn_targets(biased, temperature=0.05, iterations=200)
    np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(targets.sum((0, 1)), 10 / 7, rtol=1e-2)
    # a scaling of rows and columns: differences of second order of the logarithms stay
    logs = jnp.log(targets.reshape(-1, 7))
    wanted = biased.reshape(-1, 7) / 0.05
    for values in (logs, wanted):
        assert jnp.isfinite(values).all()
    mixed = lambda a: a - a.mean(0) - a.mean(1, keepdims=True) + a.mean()  # noqa: E731
    np.testing.assert_allclose(mixed(logs), mixed(wanted), atol=2e-3)


def test_balanced_targets_of_sharp_teachers_are_finite_in_bf16():
    targets = coding.sinkhorn_targets((100 * LOGITS).astype(jnp.bfloat16), temperature=0.01)
    assert targets.dtype == jnp.float32
    assert jnp.isfinite(targets).all()
    np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-5)


def test_the_teacher_is_an_average():
    both = coding.update_teacher({"w": jnp.zeros(2)}, {"w": jnp.ones(2)}, momentum=0.75)
    np.testing.assert_allclose(both["w"], 0.25)


@pytest.mark.usefixtures("unchecked")
def test_errors():
    view = jnp.ones((2, 3, 4))
    with pytest.raises(ValueError, match="student and targets have shapes"):
        coding.dino_loss(view[:1], view)
    with pytest.raises(ValueError, match="temperature is 0; it must be positive"):
        coding.dino_loss(view, view, temperature=0)
    with pytest.raises(ValueError, match="temperature is 0; it must be positive"):
        coding.centered_targets(view, jnp.zeros(4), temperature=0)
    with pytest.raises(ValueError, match="temperature is -1; it must be positive"):
        coding.sinkhorn_targets(view, temperature=-1)
    with pytest.raises(ValueError, match="iterations is 0; it must be at least 1"):
        coding.sinkhorn_targets(view, iterations=0)
    with pytest.raises(ValueError, match=r"momentum is 2; it must be in \[0, 1\]"):
        coding.update_center(jnp.zeros(4), view, momentum=2)
    with pytest.raises(ValueError, match=r"momentum is -1; it must be in \[0, 1\]"):
        coding.update_teacher({}, {}, momentum=-1)
