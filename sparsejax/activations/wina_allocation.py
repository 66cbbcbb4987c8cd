"""How sparse the inputs of each projection of a layer are: the greedy search of TEAL and WINA."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Array, Float, Float64

from sparsejax.activations.wina import check_share

Layer: TypeAlias = Callable[[Array, dict[str, float]], Array]
"""A layer `[b, t, d] -> [b, t, d]`, given the sparsity of each of its projections."""


def effective_sparsity(
    sparsity: Mapping[str, int | float], weights: Mapping[str, int | float]
) -> float:
    """The mean of the projections' sparsities, by the sizes of their kernels.

    Args:
      sparsity, weights: by projection; summed in the order of `weights`.

    Raises:
      ValueError: other projections in one than in the other, none at all, or a weight that is not
        positive.

    >>> effective_sparsity({"q": 0.0, "up": 0.5}, {"q": 1.0, "up": 4.0})
    0.4
    """
    if sparsity.keys() != weights.keys():
        given, wanted = (", ".join(mapping) for mapping in (sparsity, weights))
        raise ValueError(f"sparsity has projections {given}; weights has {wanted}")
    _check_weights(weights)
    return sum(w * sparsity[name] for name, w in weights.items()) / sum(weights.values())


def greedy_allocation(
    layer_fn: Layer,
    xs: Sequence[Float[Array, "b t d"]],
    weights: Mapping[str, int | float],
    *,
    target: int | float,
    step: int | float,
    last_fraction: int | float = 0.25,
) -> Float64[np.ndarray, "rows columns"]:
    """Raises the sparsity of one projection after the other, each time where it hurts least.

    A projection of weight w goes up by `step / w`, the same number of dropped weights for all. The
    error of a setting is that of the layer's output: its norm along the sequence, as the mean over
    sequences and features and the sum over `xs`. A loop on the host; nothing is differentiated.

    Args:
      layer_fn: `(x, sparsity) -> y`. It is called with hundreds of sparsities: compile it once for
        all, with the numbers of kept inputs (`kept_inputs`) as traced integers, which
        `exact_topk_mask` takes. Sparsity 0 must give the dense layer.
      xs: inputs of the layer, samples that are run one by one.
      weights: size of each projection relative to one of them; of equal errors the first wins.
      target: effective sparsity at which to stop, in [0, 1]. step: above 0; 0.025 in WINA.
      last_fraction: share of the positions, at the end, whose error counts.

    Returns:
      A row a step: effective sparsity, error, error where all projections have that effective
      sparsity, and the sparsity of each projection in the order of `weights`. A projection goes up
      as long as it is below 1, so its last entry may be above; the layer is given 1 then.

    Raises:
      ValueError: no samples, no projections, a weight or step that is not positive, or target or
        last_fraction outside [0, 1].

    Source: TEAL (2024, arXiv 2408.14690), algorithm 1, and the code of WINA (2025, arXiv
    2505.19427).

    >>> import jax.numpy as jnp
    >>> table = greedy_allocation(
    ...     lambda x, s: x * (1 - s["a"]) + 2 * x * (1 - s["b"]),
    ...     [jnp.ones((1, 4, 2))], {"a": 1.0, "b": 1.0}, target=0.5, step=0.5,
    ... )
    >>> table[:, 3:].tolist()
    [[0.5, 0.0], [1.0, 0.0]]
    """
    _check_weights(weights)
    check_share("target", target)
    check_share("last_fraction", last_fraction)
    if not step > 0:
        raise ValueError(f"step is {step}; it must be positive")
    if not xs:
        raise ValueError("xs is empty: there are no calibration samples")
    dense = [_last(layer_fn(x, dict.fromkeys(weights, 0.0)), last_fraction) for x in xs]

    def error(sparsity: dict[str, float]) -> float:
        clipped = {name: min(s, 1.0) for name, s in sparsity.items()}
        total = 0.0
        for x, wanted in zip(xs, dense):
            lost = _last(layer_fn(x, dict(clipped)), last_fraction) - wanted
            total += float(np.mean(np.linalg.norm(lost, axis=-2)))
        return total

    current = dict.fromkeys(weights, 0.0)
    rows: list[list[float]] = []
    while effective_sparsity(current, weights) < target:
        raised = {
            name: current | {name: current[name] + step * (1 / w)}
            for name, w in weights.items()
            if current[name] < 1
        }
        errors = {name: error(candidate) for name, candidate in raised.items()}
        best = min(errors, key=errors.__getitem__)
        current = raised[best]
        effective = effective_sparsity(current, weights)
        uniform = error(dict.fromkeys(weights, effective))
        rows.append([effective, errors[best], uniform, *current.values()])
    return np.asarray(rows, np.float64).reshape(-1, 3 + len(weights))


def allocation_at(
    table: Float64[np.ndarray, "rows columns"],
    weights: Mapping[str, int | float],
    sparsity: int | float,
) -> dict[str, float]:
    """The row of a greedy search whose effective sparsity is nearest, each projection at most 1.

    Args:
      table, weights: of `greedy_allocation`. sparsity: effective, in [0, 1]; among equally near
        rows the first.

    Raises:
      ValueError: a table of other projections or without rows, or sparsity outside [0, 1].

    >>> allocation_at(np.asarray([[0.2, 0.1, 0.1, 0.2], [0.5, 0.3, 0.3, 0.5]]), {"q": 1.0}, 0.3)
    {'q': 0.2}
    """
    check_share("sparsity", sparsity)
    if not len(table) or table.shape[1] != 3 + len(weights):
        raise ValueError(
            f"table has shape {table.shape}; it needs a row, and 3 columns more than the "
            f"{len(weights)} projections of weights"
        )
    row = table[np.argmin(np.abs(table[:, 0] - sparsity))]
    return {name: min(float(s), 1.0) for name, s in zip(weights, row[3:])}


def _check_weights(weights: Mapping[str, int | float]) -> None:
    if not weights:
        raise ValueError("weights is empty: there are no projections")
    for name, w in weights.items():
        if not w > 0:
            raise ValueError(f"weights has {w} for {name!r}; it must be positive")


def _last(y: Array, fraction: float) -> np.ndarray:
    """The last positions of a layer's output, in double precision."""
    return np.asarray(y, np.float64)[..., int((1 - fraction) * y.shape[-2]) :, :]
