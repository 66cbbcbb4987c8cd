"""Batches as grain iterators: their state is a small dictionary that JSON holds.

An iterator that is given the state of another one made with the same arguments goes on with
exactly the batches that the other one would have yielded.
"""

import functools
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int, Int32

from experiments.harness.data.errors import DatasetError

if TYPE_CHECKING:
    import grain


def window_batches(
    tokens: Int[np.ndarray, "n"],
    *,
    seq_len: int,
    batch: int,
    seed: int,
    shard: tuple[int, int] = (0, 1),
) -> "grain.DatasetIterator[np.ndarray]":
    """Endless random windows of `seq_len + 1` tokens, int32 `[batch, seq_len + 1]`.

    A window may start at each of the `n - seq_len` offsets; an epoch shows every offset once, in
    an order that depends on `seed` and the epoch. `shard = (index, count)` is the process and
    the number of processes: each yields `batch` windows of its own, and the batches of all
    processes one below the other are the batch of one process with `batch * count`.
    """
    index, count = _check(batch, seed, shard)
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}: it must be 1 or more")
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens are {tokens.dtype}{list(tokens.shape)}: give one row of integers")
    offsets = len(tokens) - seq_len
    if offsets < batch * count:
        raise DatasetError(
            f"the text has {len(tokens)} tokens, a batch of {batch * count} windows of"
            f" {seq_len} + 1 tokens needs {batch * count + seq_len}"
        )
    if offsets > 2**32:
        raise ValueError(f"{len(tokens)} tokens are more than the 2**32 that can be shuffled")
    import grain

    windows = np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)
    # Numbers are batched first and windows cut after: one gather for the whole batch.
    order = grain.MapDataset.range(offsets).seed(seed).shuffle().repeat()
    rows = order.batch(batch, drop_remainder=True)[index::count]
    return _iterate(rows.map(lambda starts: windows[starts].astype(np.int32)))


def validation_windows(
    tokens: Int[np.ndarray, "n"], seq_len: int
) -> Int32[np.ndarray, "m seq_len+1"]:
    """Consecutive windows of `seq_len + 1` tokens that do not overlap; the remainder is dropped."""
    count = len(tokens) // (seq_len + 1)
    if not count:
        raise DatasetError(
            f"the text has {len(tokens)} tokens, a window of {seq_len} + 1 tokens needs"
            f" {seq_len + 1}"
        )
    return tokens[: count * (seq_len + 1)].reshape(count, seq_len + 1).astype(np.int32)


def epoch_batches(
    source_arrays: Mapping[str, np.ndarray],
    *,
    batch: int,
    seed: int,
    shuffle: bool = True,
    epochs: int | None = None,
    drop_remainder: bool = True,
    shard: tuple[int, int] = (0, 1),
) -> "grain.DatasetIterator[dict[str, np.ndarray]]":
    """Batches of arrays that share their first axis, epoch after epoch (endless without `epochs`).

    Each epoch has its own order. The records that do not fill a last batch are left out of that
    epoch, or come as a smaller batch with `drop_remainder=False`. `shard` is as in
    `window_batches`: each process yields `batch` records of its own.
    """
    index, count = _check(batch, seed, shard)
    sizes = {name: len(array) for name, array in source_arrays.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"the arrays must be of one length, these are {sizes or 'none'}")
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs is {epochs}: it must be 1 or more, or None for no end")
    if not drop_remainder and count > 1:
        raise ValueError("a smaller last batch cannot be shared among processes: drop_remainder")
    size = next(iter(sizes.values()))
    if size < (batch * count if drop_remainder else 1):
        raise DatasetError(f"the data has {size} records, a batch needs {batch * count}")
    import grain

    arrays = dict(source_arrays)
    whole = batch * count
    per_epoch = size // whole if drop_remainder else -(-size // whole)

    # grain shuffles number by number, which is slow for a small set: permute it as a whole.
    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        generator = np.random.default_rng((seed, epoch))
        return generator.permutation(size) if shuffle else np.arange(size)

    def rows(number: int) -> dict[str, np.ndarray]:
        epoch, step = divmod(int(number), per_epoch)
        start = step * whole + index * batch
        chosen = order(epoch)[start : start + batch]
        return {name: array[chosen] for name, array in arrays.items()}

    total = sys.maxsize if epochs is None else per_epoch * epochs
    return _iterate(grain.MapDataset.range(total).map(rows))


def _check(batch: int, seed: int, shard: tuple[int, int]) -> tuple[int, int]:
    index, count = shard
    if batch < 1:
        raise ValueError(f"batch is {batch}: it must be 1 or more")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}: it must be in 0 .. 2**32 - 1")
    if not 0 <= index < count:
        raise ValueError(f"shard is {shard}: it must be (index, count) with 0 <= index < count")
    return index, count


def _iterate(dataset: "grain.MapDataset") -> "grain.DatasetIterator":
    """In this thread: a batch takes less time than passing it from a thread would."""
    import grain

    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(dataset.to_iter_dataset(options))
