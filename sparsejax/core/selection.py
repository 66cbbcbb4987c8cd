"""Which leaves of a tree are sparse: normalised paths, `where`, and one walk over any PyTree.

A path is the keys from the root to a leaf joined by `/`, the same for a Flax NNX `State` or module,
a Linen dict, an Equinox module or a hand-made tree, so that one mask tree serves a model however
it is wrapped.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

Where: TypeAlias = str | re.Pattern[str] | Callable[[str, Array], bool] | None
"""A regular expression searched in the path, a predicate `(path, leaf)`, or None (default)."""

_KERNEL_NAMES = ("kernel", "weight")
_DENSE_BY_DEFAULT = re.compile(r"embed|norm", re.IGNORECASE)


def path_name(path: tuple[Any, ...]) -> str:
    """Joins a JAX key path by `/`, without the `value` that NNX puts below every variable.

    Args:
      path: keys as `jax.tree_util.tree_leaves_with_path` gives them.

    Returns:
      For example `blocks/attention/q_proj/kernel`; the empty string for a tree that is a leaf.
    """
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return "/".join(jax.tree_util.keystr((key,), simple=True) for key in path)


def is_array(leaf: Any) -> bool:
    """True for anything with a shape and a dtype: arrays, tracers and `jax.ShapeDtypeStruct`."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def is_concrete(x: Any) -> bool:
    """True where the value of `x` can be looked at: outside a trace."""
    return not isinstance(x, Tracer | jax.ShapeDtypeStruct)


def named_leaves(tree: PyTree) -> Iterator[tuple[str, Any]]:
    """Yields `(path, leaf)` for every leaf of `tree`, in tree order."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield path_name(path), leaf


def default_where(path: str, leaf: Any) -> bool:
    """The leaves that are sparse unless told otherwise.

    Every leaf named `kernel` or `weight` with two axes or more, except below a name that contains
    `embed` or `norm`.
    """
    name = path.rsplit("/", 1)[-1]
    return name in _KERNEL_NAMES and leaf.ndim >= 2 and not _DENSE_BY_DEFAULT.search(path)


def selected_paths(tree: PyTree, where: Where = None) -> tuple[str, ...]:
    """The paths of the leaves that `where` chooses, in tree order.

    Args:
      tree: any PyTree; leaves that are no arrays (functions, None) are never chosen.
      where: a regular expression searched in the joined path, a predicate `(path, leaf) -> bool`,
        or None for `default_where`.

    Raises:
      ValueError: when nothing is chosen, or the regular expression does not compile.
      TypeError: when `where` is none of the three.
    """
    chooses = _predicate(where)
    leaves = [(path, leaf) for path, leaf in named_leaves(tree) if is_array(leaf)]
    chosen = tuple(path for path, leaf in leaves if chooses(path, leaf))
    if not chosen:
        wanted = "the default (kernel or weight with two axes)" if where is None else repr(where)
        known = ", ".join(path or "<root>" for path, _ in leaves[:8]) or "none"
        more = f" and {len(leaves) - 8} more" if len(leaves) > 8 else ""
        raise ValueError(f"where matches no leaf: {wanted}; the tree's arrays are {known}{more}")
    return chosen


def map_selected(
    function: Callable[..., Any],
    tree: PyTree,
    *rest: PyTree,
    where: Where = None,
    otherwise: Callable[[Any], Any] = lambda leaf: leaf,
) -> PyTree:
    """Maps `function(path, leaf, *rest_leaves)` over the chosen leaves, `otherwise` over the rest.

    Args:
      function: called with the path first.
      tree: gives the structure of the result.
      *rest: trees with the same paths as `tree`, however they are wrapped.
      where: see `selected_paths`.
      otherwise: applied to each leaf of `tree` that is not chosen; the identity by default.

    Raises:
      ValueError: `where` matches nothing, or a tree of `rest` has other paths.
    """
    chosen = set(selected_paths(tree, where))
    others = [jax.tree.leaves(align(other, tree)) for other in rest]
    leaves, structure = jax.tree.flatten(tree)
    out = [
        function(path, leaf, *(other[i] for other in others)) if path in chosen else otherwise(leaf)
        for i, ((path, _), leaf) in enumerate(zip(named_leaves(tree), leaves))
    ]
    return jax.tree.unflatten(structure, out)


def align(tree: PyTree, like: PyTree, *, name: str = "masks") -> PyTree:
    """Gives the leaves of `tree` the structure of `like`, matching them by path.

    Args:
      tree: a tree with the paths of `like`, in any order and any container; a flat
        `{path: leaf}` will do.
      like: the tree whose structure is wanted.
      name: what `tree` is called in an error.

    Returns:
      The leaves of `tree` in the containers of `like`.

    Raises:
      ValueError: naming the paths that are missing or too many.
    """
    structure = jax.tree.structure(like)
    if jax.tree.structure(tree) == structure:
        return tree
    given = dict(named_leaves(tree))
    wanted = [path for path, _ in named_leaves(like)]
    missing = [path for path in wanted if path not in given]
    extra = sorted(set(given) - set(wanted))
    if missing or extra:
        parts = [f"no {missing[:4]}"] if missing else []
        parts += [f"unknown {extra[:4]}"] if extra else []
        raise ValueError(f"{name} do not have the structure of the parameters: {', '.join(parts)}")
    return jax.tree.unflatten(structure, [given[path] for path in wanted])


def is_dense(mask: Any) -> bool:
    """True for the scalar that stands in a mask tree for a leaf without zeros."""
    return np.ndim(mask) == 0


def _predicate(where: Where) -> Callable[[str, Any], bool]:
    if where is None:
        return default_where
    if isinstance(where, str):
        try:
            where = re.compile(where)
        except re.error as error:
            raise ValueError(f"where is no regular expression: {where!r} ({error})") from error
    if isinstance(where, re.Pattern):
        expression = where
        return lambda path, leaf: expression.search(path) is not None
    if callable(where):
        return where
    raise TypeError(f"where must be a str, a predicate or None, not {type(where).__name__}")
