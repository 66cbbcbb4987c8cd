"""Self-distillation without labels (DINO), by which CRATE learns to segment.

A student predicts what a teacher, the average of its own past, says of another view of the same
image. The teacher is kept from saying always the same, or nothing at all, by a running centre and a
sharp temperature; in small batches, where those two do not balance, by assignments that are made
balanced (Sinkhorn-Knopp).

Source: Caron et al., Emerging properties in self-supervised vision transformers (2021, arXiv
2104.14294), and Unsupervised learning of visual features by contrasting cluster assignments (2020,
arXiv 2006.09882); Yu et al., Emergence of segmentation with minimalistic white-box transformers
(2023).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from sparsejax.core.dtypes import widen


def dino_loss(
    student: Float[Array, "views b k"],
    targets: Float[Array, "global b k"],
    *,
    temperature: float = 0.1,
) -> Float[Array, ""]:
    """Cross-entropy of every student view against what the teacher says of every other view.

        -sum_k p_k log softmax(student / temperature)

    Means over images and pairs of different views. Differentiated in student alone.

    Args:
      student: logits of all views, those that the teacher sees too in front, in its order.
      targets: what the teacher says of these, `centered_targets` or `sinkhorn_targets`.

    Raises:
      ValueError: shapes that do not match, fewer than two student views, or a temperature that is
        not positive.

    >>> round(float(dino_loss(jnp.zeros((2, 3, 4)), jnp.full((2, 3, 4), 0.25))), 3)
    1.386
    """
    views, first = student.shape[0], targets.shape[0]
    if student.shape[1:] != targets.shape[1:] or first > views or views < 2:
        raise ValueError(
            f"student and targets have shapes {student.shape} and {targets.shape}; they must be "
            "[views, b, k] and [global, b, k], with at least 2 views and no more global ones"
        )
    _check_temperature(temperature)
    log_p = jax.nn.log_softmax(widen(student) / temperature, axis=-1)
    fixed = jax.lax.stop_gradient(widen(targets))
    losses = -jnp.einsum("gbk,vbk->gv", fixed, log_p) / student.shape[1]
    pairs = 1 - jnp.eye(first, views, dtype=losses.dtype)
    return jnp.sum(losses * pairs) / (first * (views - 1))


def centered_targets(
    teacher: Float[Array, "*b k"],
    center: Float[Array, "k"],
    *,
    temperature: float | Float[Array, ""] = 0.04,
) -> Float[Array, "*b k"]:
    """`softmax((teacher - center) / temperature)`: probabilities from the teacher's logits.

    center: the running mean of these, see `update_center`.

    Raises:
      ValueError: a temperature that is not positive.

    >>> centered_targets(jnp.asarray([[2.0, 0.0]]), jnp.asarray([2.0, 0.0])).tolist()
    [[0.5, 0.5]]
    """
    _check_temperature(temperature)
    return jax.nn.softmax((widen(teacher) - center) / temperature, axis=-1)


def sinkhorn_targets(
    teacher: Float[Array, "*b k"],
    *,
    temperature: float | Float[Array, ""] = 0.04,
    iterations: int = 3,
) -> Float[Array, "*b k"]:
    """Probabilities near `softmax(teacher / temperature)` that use all k outputs alike.

    Columns, over all views and images, and rows are scaled in turn; each row ends with sum 1. By
    logarithms, so that no temperature overflows.

    Raises:
      ValueError: a temperature that is not positive, or fewer than one iteration.

    >>> sinkhorn_targets(jnp.asarray([[2.0, 0.0], [2.0, 0.0]])).round(3).tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """
    _check_temperature(temperature)
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; it must be at least 1")
    logs = widen(teacher).reshape(-1, teacher.shape[-1]) / temperature
    for _ in range(iterations):
        logs = jax.nn.log_softmax(logs, axis=0)
        logs = jax.nn.log_softmax(logs, axis=1)
    return jnp.exp(logs).reshape(teacher.shape)


def update_center(
    center: Float[Array, "k"], teacher: Float[Array, "global b k"], *, momentum: float = 0.9
) -> Float[Array, "k"]:
    """The running mean of the teacher's logits after one more batch.

    Raises:
      ValueError: momentum outside [0, 1].

    >>> update_center(jnp.zeros(2), jnp.ones((1, 1, 2))).round(3).tolist()
    [0.10000000149011612, 0.10000000149011612]
    """
    _check_momentum(momentum)
    return momentum * center + (1 - momentum) * jnp.mean(widen(teacher), axis=(0, 1))


def update_teacher(
    teacher: PyTree, student: PyTree, *, momentum: float | Float[Array, ""]
) -> PyTree:
    """`momentum * teacher + (1 - momentum) * student`, leaf by leaf.

    Raises:
      ValueError: momentum outside [0, 1].

    >>> update_teacher({"w": jnp.zeros(1)}, {"w": jnp.ones(1)}, momentum=0.5)
    {'w': Array([0.5], dtype=float32)}
    """
    _check_momentum(momentum)
    return jax.tree.map(lambda t, s: (momentum * t + (1 - momentum) * s).astype(t.dtype), teacher,
                        student)  # fmt: skip


def _check_temperature(temperature: float | Array) -> None:
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")


def _check_momentum(momentum: float | Array) -> None:
    if isinstance(momentum, int | float) and not 0 <= momentum <= 1:
        raise ValueError(f"momentum is {momentum}; it must be in [0, 1]")
