"""The greedy allocation of TEAL and WINA in every layer of a pretrained model."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float64

from experiments.harness.digits import kept_arm
from experiments.harness.progress import training_bar
from experiments.harness.run import Run
from experiments.wina.config import SLUG, Arm, Config
from experiments.wina.methods import Workshop, projection_sizes
from sparsejax import activations as act
from sparsejax.core.selection import path_name


def allocate(
    config: Config, run: Run, workshop: Workshop, arm: Arm
) -> dict[float, dict[str, list[float]]]:
    """The sparsity of every projection of every layer, for each of the run's sparsities.

    Each layer's search is kept by itself.
    """
    model = workshop.base(arm.rotated)
    sizes = projection_sizes(model.config)
    weights = {p.removeprefix("blocks/"): n / next(iter(sizes.values())) for p, n in sizes.items()}
    found: dict[float, dict[str, list[float]]] = {
        share: {path: [] for path in sizes} for share in config.sparsity
    }
    search = _Search(config, workshop, arm, weights)
    with training_bar(
        run.console, f"allocation of {arm.label}", total=model.config.n_layers
    ) as bar:
        for layer in range(model.config.n_layers):
            name = f"allocation-{arm.name}-{layer}"
            kept = kept_arm(run, SLUG, name, functools.partial(search, layer))
            table = np.asarray(kept["table"]["rows"])
            for share in config.sparsity:
                at = act.allocation_at(table, weights, share)
                for path, value in at.items():
                    found[share][f"blocks/{path}"].append(value)
            bar(layer + 1, 0.0, {})
    return found


class _Search:
    """The search in one layer after the other, all by one compiled function."""

    def __init__(self, config: Config, workshop: Workshop, arm: Arm, weights: Mapping[str, float]):
        self.config, self.arm, self.weights = config, arm, weights
        self.workshop = workshop
        self.model = workshop.base(arm.rotated)
        tokens = jnp.asarray(workshop.windows(config.greedy_windows))
        self.inputs = [self.model.embedded(window[None]) for window in tokens]
        self.layer = 0
        dense = self.model.block(0)
        self.graph = nnx.split(dense)[0]
        self.advance = jax.jit(lambda state, x: nnx.merge(self.graph, state)(x))
        self.sparse_graph = nnx.split(self._sparse(dense))[0]
        self.run = jax.jit(lambda state, x: nnx.merge(self.sparse_graph, state)(x))

    def __call__(self, layer: int) -> dict[str, Any]:
        """The table of a layer, as JSON values."""
        while self.layer < layer:
            state = nnx.state(self.model.block(self.layer))
            self.inputs = [self.advance(state, x) for x in self.inputs]
            self.layer += 1
        histograms = {
            path.removeprefix("blocks/"): counts[layer]
            for path, counts in self.workshop.scores(self.arm).items()
        }
        state = nnx.state(self._sparse(self.model.block(layer)))

        def sparse(x: Array, sparsity: dict[str, float]) -> Array:
            limits = act.input_thresholds(histograms, sparsity)
            return self.run(with_thresholds(state, limits), x)

        rows: Float64[np.ndarray, "rows columns"] = act.greedy_allocation(
            sparse,
            self.inputs,
            self.weights,
            target=min(1.0, max(self.config.sparsity) + 0.01),
            step=self.config.greedy_step,
        )
        return {"table": {"rows": rows.tolist()}}

    def _sparse(self, block: nnx.Module) -> act.SparseInputs:
        return act.sparse_inputs(
            block,
            thresholds=0.0,
            criterion=self.arm.criterion,
            norms=self.arm.where_norms,
            gather=False,
        )


def with_thresholds(state: Any, thresholds: Mapping[str, Any]) -> Any:
    """The state of a sparsified model under other thresholds.

    Args:
      thresholds: by the path of a kernel, all of them.
    """
    limits = {
        f"model/{path.removesuffix('kernel')}dot_general/limit": value
        for path, value in thresholds.items()
    }

    def replaced(path: Any, leaf: Array) -> Array:
        value = limits.get(path_name(path))
        return leaf if value is None else jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(replaced, state)
