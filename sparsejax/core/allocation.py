"""How much of each layer stays: densities per leaf from one density for all.

Computed on the host in float64 from shapes alone, so the results are static numbers. A leaf whose
density is 1 stays dense. Every leaf of `shapes` is prunable, in tree order.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
from jaxtyping import PyTree

from sparsejax.core.selection import named_leaves

Kind = Literal["uniform", "uniform_plus", "er", "erk", "erk_plus"]


def uniform(shapes: PyTree, density: float, *, custom: Mapping[str, float] | None = None) -> PyTree:
    """The same density for every leaf.

    Args:
      shapes: tree of arrays or `jax.ShapeDtypeStruct`s, all of them prunable.
      density: share that stays, in (0, 1].
      custom: `{regular expression on the path: density}` for leaves that get their own.

    Raises:
      ValueError: a density outside (0, 1], an empty tree, or a custom key that matches no leaf.
    """
    names, _, given = _read(shapes, density, custom)
    return _tree(shapes, [given.get(name, density) for name in names])


def er(
    shapes: PyTree,
    density: float,
    *,
    custom: Mapping[str, float] | None = None,
    power: float = 1.0,
    integer_zeros: bool = False,
    channel_axes: tuple[int, int] = (-2, -1),
) -> PyTree:
    """Erdos-Renyi densities, proportional to `((in + out) / (in * out)) ** power`.

    The scale is solved exactly: leaves that would pass 1 become dense, and the others share what
    is left, so that the total of non-zeros is `density` of all entries.

    Args:
      shapes, density, custom: see `uniform`; custom leaves are left out of the total.
      power: of the bracket.
      integer_zeros: count the zeros of a leaf as `floor(size * (1 - density))`, as rigl does.
      channel_axes: where in and out are; the last two axes of a Flax kernel.

    Raises:
      ValueError: as `uniform`, or a leaf with fewer than two axes.

    Source: Mocanu et al. (2018); the solve is that of Evci et al., Rigging the lottery (2020).

    >>> shapes = {"a": jax.ShapeDtypeStruct((100, 100), "float32"),
    ...           "b": jax.ShapeDtypeStruct((100, 10), "float32")}
    >>> {name: round(d, 4) for name, d in er(shapes, 0.1).items()}
    {'a': 0.071, 'b': 0.3903}
    """

    def bracket(shape: tuple[int, ...]) -> float:
        n_in, n_out = (shape[a] for a in channel_axes)
        return ((n_in + n_out) / (n_in * n_out)) ** power

    return _solve(shapes, density, custom, bracket, integer_zeros)


def erk(
    shapes: PyTree,
    density: float,
    *,
    custom: Mapping[str, float] | None = None,
    power: float = 1.0,
    integer_zeros: bool = False,
) -> PyTree:
    """Erdos-Renyi-kernel densities, proportional to `(sum(shape) / prod(shape)) ** power`.

    Args:
      shapes, density, custom, power, integer_zeros: see `er`.

    Raises:
      ValueError: as `er`.

    Source: Evci et al., Rigging the lottery (2020).
    """
    return _solve(
        shapes, density, custom, lambda s: (sum(s) / math.prod(s)) ** power, integer_zeros
    )


def uniform_plus(
    shapes: PyTree,
    density: float,
    *,
    custom: Mapping[str, float] | None = None,
    compat: bool = False,
    total: int | None = None,
) -> PyTree:
    """Uniform, with the first leaf dense and, at low density, the last one at 0.2.

    At a density of 0.2 or more all leaves but the first get it. Below, the last leaf gets 0.2 and
    the others what is left of `density * total`.

    Args:
      shapes, density, custom: see `uniform`.
      compat: divide what is left by `total`, as the published code does, instead of by the entries
        that share it.
      total: number of parameters counted; all of `shapes` by default.

    Raises:
      ValueError: as `uniform`, or nothing is left for the other leaves.

    Source: Liu et al., The unreasonable effectiveness of random pruning (2022), code.
    """
    names, sizes, given = _read(shapes, density, custom)
    everything = sum(sizes) if total is None else total
    densities = [density] * len(sizes)
    densities[0] = 1.0
    if density < 0.2 and len(sizes) > 1:
        left = density * everything - sizes[0] - 0.2 * sizes[-1]
        others = everything if compat else everything - sizes[0] - sizes[-1]
        share = left / others if others > 0 else 0.0
        densities = [1.0, *[share] * (len(sizes) - 2), 0.2]
    return _tree(shapes, [given.get(n, d) for n, d in zip(names, densities)])


def erk_plus(
    shapes: PyTree,
    density: float,
    *,
    custom: Mapping[str, float] | None = None,
    fc_density: float = 1.0,
    total: int | None = None,
) -> PyTree:
    """ERK with the density of the last leaf fixed.

    Args:
      shapes, density, custom: see `uniform`.
      fc_density: of the last leaf.
      total: number of parameters counted; all of `shapes` by default.

    Raises:
      ValueError: as `erk`, or nothing is left for the other leaves.

    Source: Liu et al., The unreasonable effectiveness of random pruning (2022), code.
    """
    names, sizes, given = _read(shapes, density, custom)
    if not 0 <= fc_density <= 1:
        raise ValueError(f"fc_density is {fc_density}; it must be in [0, 1]")
    everything = sum(sizes) if total is None else total
    if len(sizes) == 1:
        return _tree(shapes, [given.get(names[0], fc_density)])
    left = (density * everything - sizes[-1] * fc_density) / (everything - sizes[-1])
    if not 0 < left <= 1:
        raise ValueError(
            f"density is {density}: with the last leaf at {fc_density} the others would get "
            f"{left:.4g}"
        )
    first = dict(list(named_leaves(shapes))[:-1])
    solved = dict(named_leaves(erk(first, left)))
    return _tree(shapes, [given.get(n, float(solved.get(n) or fc_density)) for n in names])


def layer_densities(shapes: PyTree, density: float, kind: Kind, **options: Any) -> PyTree:
    """Densities by the name of the rule: uniform, uniform_plus, er, erk or erk_plus.

    Args:
      shapes, density: see `uniform`. kind: the rule. options: its own arguments.

    Raises:
      ValueError: an unknown rule, or as the rule.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind is {kind!r}; allowed are {', '.join(_KINDS)}")
    return _KINDS[kind](shapes, density, **options)


_KINDS = {
    "uniform": uniform,
    "uniform_plus": uniform_plus,
    "er": er,
    "erk": erk,
    "erk_plus": erk_plus,
}


def _solve(
    shapes: PyTree,
    density: float,
    custom: Mapping[str, float] | None,
    bracket: Any,
    integer_zeros: bool,
) -> PyTree:
    names, sizes, given = _read(shapes, density, custom)
    free = [i for i, name in enumerate(names) if name not in given]
    dims = [tuple(leaf.shape) for _, leaf in named_leaves(shapes)]
    for i in free:
        if len(dims[i]) < 2:
            raise ValueError(f"leaf {names[i]!r} has shape {dims[i]}; ER needs two axes or more")
    raw = {i: bracket(dims[i]) for i in free}
    zeros = {
        i: math.floor(sizes[i] * (1 - density)) if integer_zeros else sizes[i] * (1 - density)
        for i in free
    }
    dense: set[int] = set()
    scale = 0.0
    while len(dense) < len(free):
        open_ = [i for i in free if i not in dense]
        available = sum(sizes[i] - zeros[i] for i in open_) - sum(zeros[i] for i in dense)
        scale = available / sum(raw[i] * sizes[i] for i in open_)
        highest = max(raw[i] for i in open_)
        if highest * scale <= 1:
            break
        dense |= {i for i in open_ if raw[i] == highest}
    solved = {i: 1.0 if i in dense else scale * raw[i] for i in free}
    return _tree(shapes, [given.get(n, solved.get(i, 1.0)) for i, n in enumerate(names)])


def _read(
    shapes: PyTree, density: float, custom: Mapping[str, float] | None
) -> tuple[list[str], list[int], dict[str, float]]:
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}; it must be in (0, 1]")
    leaves = list(named_leaves(shapes))
    if not leaves:
        raise ValueError("shapes is an empty tree: there is nothing to allocate")
    given: dict[str, float] = {}
    for expression, value in (custom or {}).items():
        matched = [name for name, _ in leaves if re.search(expression, name)]
        if not matched:
            raise ValueError(f"custom: {expression!r} matches no leaf")
        given |= dict.fromkeys(matched, value)
    names = [name for name, _ in leaves]
    return names, [math.prod(leaf.shape) for _, leaf in leaves], given


def _tree(shapes: PyTree, densities: list[float]) -> PyTree:
    for (name, _), value in zip(named_leaves(shapes), densities):
        if not 0 <= value <= 1 + 1e-12:
            raise ValueError(f"leaf {name!r} would get density {value:.4g}, outside [0, 1]")
    return jax.tree.unflatten(jax.tree.structure(shapes), [min(float(d), 1.0) for d in densities])
