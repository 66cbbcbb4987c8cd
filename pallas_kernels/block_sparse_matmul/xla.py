"""Block-sparse times dense as XLA compiles it well: gathered blocks of x, one batched product.

An activation is turned to its block columns, each contiguous in memory, so that a gather of them
copies long pieces; with features last that moves pieces of bk entries, once. The products contract
over the blocks of a list and their inputs together. The gradient of x scatters whole blocks, which
costs less on CPU than transposing the lists.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.block_sparse_matmul.layout import Features, accumulator, sizes
from pallas_kernels.block_sparse_matmul.lists import Lists
from pallas_kernels.dispatch import target

Blocks = None
"""XLA chooses its own."""
GATHERED = {"cpu": 2**21}
"""Bytes of gathered blocks that are held at a time, if one block row needs no more: on CPU as many
as stay in its caches, which at 1536 x 1536 x 1536 is five times as fast as all at once."""
ELSEWHERE = 2**28
"""The same on other platforms: a bound on memory."""
FORWARD: dict[Features, str] = {"first": "rsok,rskn->ron", "last": "rsnk,rsok->rno"}
DVALUES: dict[Features, str] = {"first": "ron,rskn->rsok", "last": "rno,rsnk->rsok"}
DX: dict[Features, str] = {"first": "rsok,ron->rskn", "last": "rno,rsok->rsnk"}


def reasons(values: Array, x: Array, features: Features, *, interpret: object = False) -> list[str]:
    """It runs everywhere."""
    return []


def forward(
    values: Array, lists: Lists, x: Array, features: Features, *, blocks: None, interpret: object
) -> Array:
    """Stored blocks times activations."""
    run = functools.partial(_forward, lists.keep(values), lists, features)
    if not _by_image(values, x, features):
        return run(x)
    return lax.map(lambda image: run(image[None])[0], x)


def backward(
    values: Array,
    lists: Lists,
    x: Array,
    dy: Array,
    features: Features,
    *,
    blocks: None,
    interpret: object,
) -> tuple[Array, Array]:
    """The gradients of stored blocks and activations."""
    run = functools.partial(_backward, lists.keep(values), lists, features)

    def add(total: Array, pair: tuple[Array, Array]) -> tuple[Array, Array]:
        dvalues, dx = run(*(image[None] for image in pair))
        return total + dvalues, dx[0]

    if _by_image(values, x, features):
        zero = jnp.zeros(values.shape, accumulator(values.dtype))
        dvalues, dx = lax.scan(add, zero, (x, dy))
    else:
        dvalues, dx = run(x, dy)
    return lists.keep(dvalues).astype(values.dtype), dx


def _forward(values: Array, lists: Lists, features: Features, x: Array) -> Array:
    columns = _split(x, values.shape[3], features)

    def rows(_: None, values: Array, at: Array) -> tuple[None, Array]:
        picked = columns.at[at].get(mode="promise_in_bounds")
        return None, _product(FORWARD, features, values, picked).astype(x.dtype)

    _, y = _by_rows(rows, None, columns, (values, lists.keep(lists.indices)))
    return _join(y, x, features)


def _backward(
    values: Array, lists: Lists, features: Features, x: Array, dy: Array
) -> tuple[Array, Array]:
    columns = _split(x, values.shape[3], features)
    # padding is read from the first block, and written nowhere
    reads, writes = lists.keep(lists.indices), lists.keep(lists.indices, len(columns))

    def rows(
        dx: Array, values: Array, reads: Array, writes: Array, dy: Array
    ) -> tuple[Array, Array]:
        picked = columns.at[reads].get(mode="promise_in_bounds")
        dvalues = _einsum(DVALUES[features], dy, picked)
        return dx.at[writes].add(_product(DX, features, values, dy), mode="drop"), dvalues

    dx = jnp.zeros(columns.shape, accumulator(x.dtype))
    arrays = (values, reads, writes, _split(dy, values.shape[2], features))
    dx, dvalues = _by_rows(rows, dx, columns, arrays)
    return dvalues, _join(dx.astype(x.dtype), x, features)


def _split(x: Array, size: int, features: Features) -> Array:
    """Blocks of features, of all images: `[c, size, b * n]`, or `[c, n, size]` if they are last."""
    b, k, n = sizes(x, features)
    if features == "first":
        return x.swapaxes(0, 1).reshape(k // size, size, b * n)
    return x.reshape(n, k // size, size).swapaxes(0, 1)


def _join(blocks: Array, x: Array, features: Features) -> Array:
    """The inverse of `_split`: activations at the positions of x."""
    b, _, n = sizes(x, features)
    if features == "first":
        return blocks.reshape(blocks.shape[0] * blocks.shape[1], b, n).swapaxes(0, 1)
    return blocks.swapaxes(0, 1).reshape(b, n, blocks.shape[0] * blocks.shape[2])


def _product(equations: dict[Features, str], features: Features, w: Array, x: Array) -> Array:
    """A product with the weight; its factors are in the order of the axes of the result."""
    return _einsum(equations[features], *((w, x) if features == "first" else (x, w)))


def _einsum(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=accumulator(a.dtype))


def _by_image(values: Array, x: Array, features: Features) -> bool:
    """Whether one image is multiplied after the other: on CPU, if all together leave its caches."""
    b, _, n = sizes(x, features)
    r, s, _, bk = values.shape
    platform = target().platform
    gathered = b * r * s * bk * n * x.dtype.itemsize
    return platform == "cpu" and b > 1 and gathered > GATHERED[platform]


def _by_rows(
    step: Callable[..., tuple[Any, Array]], carry: Any, columns: Array, arrays: tuple[Array, ...]
) -> tuple[Any, Array]:
    """All block rows at once, or as many at a time as `GATHERED` allows."""
    rows, listed = arrays[1].shape
    needed = listed * math.prod(columns.shape[1:]) * columns.dtype.itemsize
    most = max(1, GATHERED.get(target().platform, ELSEWHERE) // max(needed, 1))
    if rows <= most:
        return step(carry, *arrays)
    chunk = next(n for n in range(most, 0, -1) if rows % n == 0)
    pieces = tuple(v.reshape(-1, chunk, *v.shape[1:]) for v in arrays)
    carry, found = lax.scan(lambda carry, piece: step(carry, *piece), carry, pieces)
    return carry, found.reshape(rows, *found.shape[2:])
