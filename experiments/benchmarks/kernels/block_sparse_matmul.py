"""A block-sparse weight against the dense one, as a 1x1 convolution of one image."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.kernels.common import Config, call, fastest, trained
from experiments.benchmarks.suite import Group
from experiments.harness.timing import Goal
from pallas_kernels.block_sparse_matmul import block_sparse_matmul, to_dense
from pallas_kernels.block_sparse_matmul.shapes import POINTWISE, RAGGED, SHAPES, Shape

AGAINST_DENSE = Goal(1 / 3)
SIZES = {
    "laptop": (*POINTWISE.values(), SHAPES["transformer_1024"]),
    "test": (RAGGED["ragged_rows"],),
}
WITH_GOAL = (SHAPES["512_at_14x14"], RAGGED["ragged_rows"])


def block_sparse_matmul_groups(config: Config) -> Iterator[Group]:
    """The block-sparse product against the faster of two dense ones, forward and trained."""
    for shape in SIZES[config.preset]:
        values, indices, x = _problem(shape)
        w = to_dense(values, indices, num_columns=shape.columns)

        def sparse(values: jax.Array, x: jax.Array, shape: Shape = shape, at: Any = indices) -> Any:
            return block_sparse_matmul(values, at, None, x, features=shape.features)

        for name, run in (("forward", call), ("trained", trained)):
            label = f"{_size(shape)} {name}"
            dense = {f"{label}: {form}": run(f, w, x) for form, f in _dense(shape).items()}
            baseline = fastest(dense)
            ours = f"{label}, block_sparse_matmul"
            functions = {baseline: dense[baseline], **dense, ours: run(sparse, values, x)}
            judged = name == "forward" and shape in WITH_GOAL
            goals = {ours: AGAINST_DENSE} if judged else {}
            yield Group(functions, baseline, config.rounds, goals)


def _dense(shape: Shape) -> dict[str, Callable[[jax.Array, jax.Array], jax.Array]]:
    """Two ways to write the dense product, which XLA lays out differently."""
    if shape.features == "last":
        return {
            "dense x @ w.T": lambda w, x: x @ w.T,
            "dense einsum": lambda w, x: jnp.einsum("ok,nk->no", w, x),
        }
    return {
        "dense w @ x": lambda w, x: jnp.matmul(w, x),
        "dense einsum": lambda w, x: jnp.einsum("ok,bkn->bon", w, x),
    }


def _size(shape: Shape) -> str:
    (bo, bk), sparsity = shape.block, 100 * shape.sparsity
    sizes = f"{shape.outputs} x {shape.inputs} x {shape.positions}"
    return f"{sizes}, {sparsity:.3g} % in {bo} x {bk}"


def _problem(shape: Shape) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Random blocks, the block columns of each row drawn without replacement, and activations."""
    keys = jax.random.split(jax.random.key(0), 3)
    ranks = jax.random.uniform(keys[0], (shape.rows, shape.columns))
    indices = jnp.sort(jnp.argsort(ranks, axis=1)[:, : shape.stored], axis=1)
    values = jax.random.normal(keys[1], (shape.rows, shape.stored, *shape.block))
    return values, indices, jax.random.normal(keys[2], shape.x)
