"""Partitions of parameters from what their axes mean."""

from collections.abc import Mapping
from typing import cast

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from sparsejax.core.selection import path_name
from sparsejax.models.llama_config import require

Axes = Mapping[str, tuple[str, ...]]
"""What each axis of a parameter means, by the last two parts of its path, without `layers`."""
Rules = Mapping[str, str | tuple[str, ...] | None]
"""Logical axis to mesh axis or axes; what it does not name is replicated."""


def axes_of(path: str, ndim: int, table: Axes, owner: str) -> tuple[str, ...]:
    """Names of the axes of the parameter at `path`, with `layers` in front in a stack.

    owner: who has the parameters of `table`, for errors.

    Raises ValueError for an unknown parameter, or one with another number of axes.
    """
    known = f"the parameters of {owner} end in {', '.join(table)}."
    names = table.get("/".join(path.split("/")[-2:]))
    require(names is not None, f"path is {path!r}; {known}")
    names = cast(tuple[str, ...], names)
    extra = ndim - len(names)
    require(
        extra in (0, 1),
        f"{path} has {ndim} axes; it must be {names} or ('layers', *{names}); {known}",
    )
    return ("layers",) * extra + names


def specs_of(params: PyTree, rules: Rules, table: Axes, owner: str) -> PyTree:
    """The PartitionSpec of every leaf, in the structure of `params`; scalars are replicated.

    Raises ValueError for an unknown logical axis, or as `axes_of`.
    """
    known = {"layers"}.union(*table.values())
    require(
        set(rules) <= known,
        f"rules names {sorted(set(rules) - known)}; logical axes are {', '.join(sorted(known))}.",
    )

    def spec(path, leaf) -> PartitionSpec:
        if np.ndim(leaf) == 0:
            return PartitionSpec()
        names = axes_of(path_name(path), np.ndim(leaf), table, owner)
        return PartitionSpec(*(rules.get(name) for name in names))

    return jax.tree_util.tree_map_with_path(spec, params)
