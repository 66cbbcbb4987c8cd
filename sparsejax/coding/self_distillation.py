"""Self-distillation without labels (DINO), by which CRATE learns to segment.

A student predicts what a teacher, the average of its own past, says of another view of the same
image; a running centre and a sharp temperature keep the teacher from saying always the same.

Source: Caron et al., Emerging properties in self-supervised vision transformers (2021, arXiv
2104.14294); Yu et al., Emergence of segmentation with minimalistic white-box transformers (2023).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from sparsejax.core.dtypes import widen


def dino_loss(
    student: Float[Array, "views b k"],
    teacher: Float[Array, "global b k"],
    center: Float[Array, "k"],
    *,
    student_temperature: float = 0.1,
    teacher_temperature: float | Float[Array, ""] = 0.04,
) -> Float[Array, ""]:
    """Cross-entropy of every student view against every other teacher view.

        p = softmax((teacher - center) / teacher_temperature);  -sum_k p_k log softmax(student / t)

    Means over images and pairs of different views. Differentiated in student alone.

    Args:
      student: logits of all views, those that the teacher sees too in front, in its order.
      teacher: logits of these. center: the running mean of the teacher's logits.

    Raises:
      ValueError: shapes that do not match, fewer than two student views, or a temperature that is
        not positive.

    >>> views = jnp.zeros((2, 3, 4))
    >>> round(float(dino_loss(views, views, jnp.zeros(4))), 3)
    1.386
    """
    views, first = student.shape[0], teacher.shape[0]
    if student.shape[1:] != teacher.shape[1:] or first > views or views < 2:
        raise ValueError(
            f"student and teacher have shapes {student.shape} and {teacher.shape}; they must be "
            "[views, b, k] and [global, b, k], with at least 2 views and no more global ones"
        )
    for name, value in (("student_temperature", student_temperature),
                        ("teacher_temperature", teacher_temperature)):  # fmt: skip
        if isinstance(value, int | float) and not value > 0:
            raise ValueError(f"{name} is {value}; it must be positive")
    sharp = (widen(teacher) - center) / teacher_temperature
    targets = jax.lax.stop_gradient(jax.nn.softmax(sharp, axis=-1))
    log_p = jax.nn.log_softmax(widen(student) / student_temperature, axis=-1)
    losses = -jnp.einsum("gbk,vbk->gv", targets, log_p) / student.shape[1]
    pairs = 1 - jnp.eye(first, views, dtype=losses.dtype)
    return jnp.sum(losses * pairs) / (first * (views - 1))


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


def _check_momentum(momentum: float | Array) -> None:
    if isinstance(momentum, int | float) and not 0 <= momentum <= 1:
        raise ValueError(f"momentum is {momentum}; it must be in [0, 1]")
