"""Random search for sparse sub-networks at initialisation, the null hypothesis of any search.

Many masks of one size are drawn for one initialised network, scored without training, and the best
is kept. A search method is worth its cost if what it finds trains better than a random mask of the
same counts; `paired_comparison` says whether it does.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import betainc
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from sparsejax.core.dtypes import widen
from sparsejax.core.ranking import random_masks
from sparsejax.core.selection import Where, is_array, is_concrete, named_leaves
from sparsejax.core.topk import exact_topk_mask

Sampler = Callable[[PRNGKeyArray], PyTree]


class SearchResult(NamedTuple):
    """What `random_search` found.

    Attributes:
      best_masks: of the candidate with the lowest score.
      best_index: which one that is; the first among equals.
      scores: of all candidates, non-finite ones as they were.
    """

    best_masks: PyTree
    best_index: Int[Array, ""]
    scores: Float[Array, "trials"]


def sample_node_masks(
    key: PRNGKeyArray, layer_sizes: tuple[int, ...], *, sparsity: float
) -> tuple[list[Bool[Array, "_"]], list[Bool[Array, "_ _"]]]:
    """Draws which hidden nodes of a feed-forward network stay, exactly so many a layer.

    A hidden layer of h nodes keeps `max(1, round(h * (1 - sparsity)))` of them (half to even), all
    subsets equally likely; inputs and outputs always stay. A weight stays if both of its ends do,
    so a dropped node sends nothing, whatever its bias and activation. Node sparsity s is weight
    sparsity `1 - (1 - s)**2` between two hidden layers, and s at both ends of the network.

    Args:
      key: PRNG key.
      layer_sizes: nodes of all layers from input to output; static.
      sparsity: share of the hidden nodes that is dropped, in [0, 1); static.

    Returns:
      `(keeps, kernel_masks)`: one vector for each hidden layer, and one mask `(in, out)` for each
      kernel, the outer product of its two ends.

    Raises:
      ValueError: a sparsity outside [0, 1), no hidden layer, or a layer without nodes.

    Source: Farahani, Random search as a baseline for sparse neural network architecture search
    (2024).

    >>> keeps, masks = sample_node_masks(jax.random.key(0), (3, 8, 2), sparsity=0.75)
    >>> [int(keep.sum()) for keep in keeps], [int(mask.sum()) for mask in masks]
    ([2], [6, 4])
    """
    _check_sparsity(sparsity)
    if len(layer_sizes) < 3:
        raise ValueError(
            f"layer_sizes is {layer_sizes}: it has no hidden layer; give input, hidden and output"
        )
    if min(layer_sizes) < 1:
        raise ValueError(f"layer_sizes is {layer_sizes}; every layer needs a node")
    hidden = layer_sizes[1:-1]
    keeps = []
    for layer_key, size in zip(jax.random.split(key, len(hidden)), hidden):
        count = max(1, round(size * (1 - sparsity)))  # on the host, in double precision
        noise = jax.random.uniform(layer_key, (size,), jnp.float32)
        keeps.append(exact_topk_mask(noise, count, axis=None))
    ends = [jnp.ones(layer_sizes[0], bool), *keeps, jnp.ones(layer_sizes[-1], bool)]
    return keeps, [before[:, None] & after[None, :] for before, after in itertools.pairwise(ends)]


def sample_edge_masks(
    key: PRNGKeyArray, params: PyTree, *, sparsity: float, where: Where = None
) -> PyTree:
    """Draws which weights stay, exactly `max(1, round(size * (1 - sparsity)))` a leaf.

    Args:
      key: PRNG key.
      params: gives paths and shapes.
      sparsity: share of the weights that is dropped, in [0, 1), the same in every leaf; static.
      where: which leaves are sparse, see `selected_paths`; the others get the scalar True.

    Returns:
      The mask tree.

    Raises:
      ValueError: a sparsity outside [0, 1), or `where` matches nothing.
    """
    _check_sparsity(sparsity)
    return random_masks(key, params, 1 - sparsity, where=where)


def node_sampler(params: PyTree, *, kernels: Sequence[str], sparsity: float) -> Sampler:
    """A sampler of node masks for a network with these kernels, see `sample_node_masks`.

    Args:
      params: gives paths and shapes; arrays or `jax.ShapeDtypeStruct`s.
      kernels: paths of the kernels `(in, out)` in order, from the input to the output.
      sparsity: share of the hidden nodes that is dropped, in [0, 1); static.

    Returns:
      Function of a key that gives a mask tree in the structure of `params`: the kernels' masks,
      and the scalar True for every other leaf.

    Raises:
      ValueError: a sparsity outside [0, 1), a path that is not in `params`, a kernel named twice or
        without exactly two axes, fewer than two kernels (no hidden layer), or kernels whose shapes
        do not chain.

    >>> params = {"a": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)},
    ...           "b": {"kernel": jnp.ones((4, 2))}}
    >>> draw = node_sampler(params, kernels=["a/kernel", "b/kernel"], sparsity=0.5)
    >>> masks = draw(jax.random.key(0))
    >>> int(masks["a"]["kernel"].sum()), masks["a"]["bias"].shape
    (6, ())
    """
    _check_sparsity(sparsity)
    shapes = {path: leaf.shape for path, leaf in named_leaves(params) if is_array(leaf)}
    for path in kernels:
        if path not in shapes:
            raise ValueError(f"kernels: no leaf {path!r}; the tree has {', '.join(shapes)}")
        if len(shapes[path]) != 2:
            raise ValueError(f"kernels: {path!r} has shape {shapes[path]}; it needs (in, out)")
    if len(set(kernels)) != len(kernels):
        raise ValueError(f"kernels are {list(kernels)}; one of them is named twice")
    if len(kernels) < 2:
        raise ValueError(f"kernels are {list(kernels)}: no hidden layer; give two or more")
    for before, after in itertools.pairwise(kernels):
        if shapes[before][1] != shapes[after][0]:
            raise ValueError(
                f"kernels do not chain: {before!r} has shape {shapes[before]} and {after!r} "
                f"{shapes[after]}; the outputs of one are the inputs of the next"
            )
    sizes = (shapes[kernels[0]][0], *(shapes[path][1] for path in kernels))
    paths = [path for path, _ in named_leaves(params)]
    structure = jax.tree.structure(params)

    def sample(key: PRNGKeyArray) -> PyTree:
        drawn = dict(zip(kernels, sample_node_masks(key, sizes, sparsity=sparsity)[1]))
        return jax.tree.unflatten(structure, [drawn.get(p, jnp.asarray(True)) for p in paths])

    return sample


def random_search(
    key: PRNGKeyArray,
    params: PyTree,
    *,
    sampler: Sampler,
    score_fn: Callable[[PyTree, PyTree], Float[Array, ""]],
    trials: int,
    chunk: int = 32,
) -> SearchResult:
    """Draws masks for one set of parameters, scores each, and keeps the best.

    Candidate t is `sampler(jax.random.split(key, trials)[t])`. Nothing is trained, and all
    candidates share the parameters. Draw masks of equal counts: otherwise the search mostly finds
    denser networks.

    Args:
      key: PRNG key.
      params: at initialisation; never changed.
      sampler: key -> mask tree; `node_sampler`, or any function that `vmap` takes.
      score_fn: `(params, masks) -> scalar`, lower is better; it applies the masks itself
        (`apply_masks`), on training data. A score that is not finite never wins.
      trials: how many candidates; static.
      chunk: how many are scored at once, memory against speed; static.

    Returns:
      The best masks, their index (the first among equals) and all scores.

    Raises:
      ValueError: trials or chunk below 1, a score that is no floating-point scalar, or (outside
        `jit`) no finite score at all; under `jit` the index is then 0.

    Source: Farahani (2024).

    >>> params = {"kernel": jnp.asarray([[3.0], [1.0], [2.0]])}
    >>> found = random_search(
    ...     jax.random.key(0),
    ...     params,
    ...     sampler=lambda key: sample_edge_masks(key, params, sparsity=0.7),
    ...     score_fn=lambda p, m: jnp.sum(jnp.where(m["kernel"], p["kernel"], 0.0)),
    ...     trials=30,
    ... )
    >>> found.best_masks["kernel"][:, 0], float(found.scores[found.best_index])
    (Array([False,  True, False], dtype=bool), 1.0)
    """
    for name, value in (("trials", trials), ("chunk", chunk)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    keys = jax.random.split(key, trials)

    def score(candidate: PRNGKeyArray) -> Array:
        value = score_fn(params, sampler(candidate))
        if not is_array(value) or value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
            kind = f"{value.dtype}{list(value.shape)}" if is_array(value) else type(value).__name__
            raise ValueError(f"score_fn gives {kind}; it must give one floating-point number")
        return value

    scores = lax.map(score, keys, batch_size=min(chunk, trials))
    finite = jnp.isfinite(scores)
    if is_concrete(scores) and not bool(finite.any()):
        raise ValueError(f"none of the {trials} scores is finite: there is no best candidate")
    best = jnp.argmin(jnp.where(finite, scores, jnp.inf))
    return SearchResult(sampler(keys[best]), best, scores)


def paired_comparison(
    a: Float[Array, "seeds"], b: Float[Array, "seeds"]
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Mean difference of two arms that share their seeds, and a paired t-test of it.

    Args:
      a, b: one figure a seed, in the same order of seeds; in float32 at least.

    Returns:
      `(mean, se, p)`: mean of `a - b`, its standard error (deviation with n - 1 over the root of
      n), and the two-sided p-value of Student's t with n - 1 degrees of freedom. If all differences
      are equal, se is 0, and p is 1 for a mean of zero, 0 for any other.

    Raises:
      ValueError: arrays of several lengths, or fewer than two seeds.

    >>> [round(float(x), 4) for x in paired_comparison(jnp.asarray([3.0, 5.0, 4.0]), jnp.ones(3))]
    [3.0, 0.5774, 0.0351]
    """
    if a.shape != b.shape:
        raise ValueError(f"a and b have shapes {a.shape} and {b.shape}; give one value a seed each")
    if a.ndim != 1 or len(a) < 2:
        raise ValueError(f"a and b have shape {a.shape}; a paired comparison needs two seeds")
    seeds = len(a)
    differences = widen(a) - widen(b)
    equal = jnp.all(differences == differences[0])
    mean = jnp.where(equal, differences[0], jnp.mean(differences))
    se = jnp.where(equal, 0.0, jnp.std(differences, ddof=1) / seeds**0.5)
    squared = (mean / jnp.where(equal, 1.0, se)) ** 2
    degrees = seeds - 1
    half = jnp.asarray(0.5, mean.dtype)
    tail = betainc(degrees * half, half, degrees / (degrees + squared))
    certain = jnp.where(mean == 0, 1.0, 0.0).astype(mean.dtype)
    return mean, se, jnp.where(equal, certain, tail)


def _check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; it must be in [0, 1)")
