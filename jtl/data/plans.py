"""Which rows make up which batch: computed for all processes at once, so that they agree."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jtl import errors

_REMAINDERS = ("pad", "drop", "keep")


class Layout(NamedTuple):
    """What the epochs of a run have in common.

    Attributes:
      bucket_of_row: int `[N]`, the bucket that each row is padded to.
      buckets: the padded lengths that are used; `(0,)` for rows without a length.
      batches: the number of batches of each bucket in an epoch.
      batch_size: rows of a batch in one process.
      remainder: what becomes of an epoch's incomplete batch: "pad", "drop" or "keep".
      shards: the number of processes.
      classes: int `[N]`, the class of each row, where an epoch draws all classes equally often; None where it
        has every row once.
    """

    bucket_of_row: np.ndarray
    buckets: tuple[int, ...]
    batches: tuple[int, ...]
    batch_size: int
    remainder: str
    shards: int
    classes: np.ndarray | None = None


class Batch(NamedTuple):
    """One batch of all processes: its padded length, and the rows that are in it (int `[R]`)."""

    length: int
    rows: np.ndarray


def layout(
    rows: int,
    lengths: np.ndarray | None,
    *,
    batch_size: int,
    buckets: Sequence[int] | None = None,
    remainder: str = "pad",
    shards: int = 1,
) -> Layout:
    """Deal rows out to buckets and count the batches of an epoch.

    Args:
      rows: the number of rows, N.
      lengths: int `[N]`; None for rows that need no padding.
      batch_size: rows of a batch in one process.
      buckets: padded lengths; by default the longest row's.
      remainder: what becomes of the incomplete batch.
      shards: the number of processes.

    Raises:
      ConfigError: an unknown remainder, one that gives no batches or unequal shapes, or a size below 1.
      DataError: a row is longer than the largest bucket.

    >>> layout(5, np.array([3, 9, 4, 2, 8]), batch_size=2, buckets=(4, 16)).batches
    (1, 2)
    """
    _check(batch_size, buckets, remainder, shards, lengths)
    if lengths is None:
        used, bucket_of_row = (0,), np.zeros(rows, np.int64)
    else:
        used, bucket_of_row = _assign(lengths, np.unique(buckets if buckets is not None else lengths.max()))
        bucket_of_row = _filled_up(bucket_of_row, lengths, len(used), batch_size * shards)
    counts = _count(np.bincount(bucket_of_row, minlength=len(used)), batch_size * shards, remainder)
    if not sum(counts):
        raise errors.ConfigError(
            f"remainder='drop' leaves no batch: {rows} rows are fewer than {batch_size} for each of "
            f"{shards} process(es); lower batch_size or pass remainder='pad'"
        )
    return Layout(bucket_of_row, used, counts, batch_size, remainder, shards)


def epoch(layout: Layout, seed: int | None, epoch: int) -> list[Batch]:
    """The batches of an epoch in order, a function of its arguments alone.

    Args:
      layout: of the run.
      seed: of the order of rows and batches; None keeps rows in order and takes short buckets first.
      epoch: its number, from 0.
    """
    rng = None if seed is None else np.random.default_rng((seed, epoch))
    size, counts, bucket_of_row = layout.batch_size * layout.shards, layout.batches, layout.bucket_of_row
    order = np.arange(len(bucket_of_row)) if rng is None else rng.permutation(len(bucket_of_row))
    if layout.classes is not None and rng is not None:
        order = balanced(layout.classes, rng)
    buckets = bucket_of_row[order]
    if layout.classes is not None:
        # Other rows in each epoch: what is left over in a bucket moves up anew, and the number of all batches stays.
        buckets = _filled_up(buckets, np.zeros(len(order)), len(layout.buckets), size)
        counts = _count(np.bincount(buckets, minlength=len(layout.buckets)), size, layout.remainder)
    planned = []
    for bucket, (length, count) in enumerate(zip(layout.buckets, counts, strict=True)):
        rows = order[buckets == bucket]
        planned += [Batch(length, rows[i * size : (i + 1) * size]) for i in range(count)]
    return planned if rng is None else [planned[i] for i in rng.permutation(len(planned))]


def balanced(classes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many rows as there are, of each class equally many, give or take one, in random order.

    No row comes again before each of its class has come as often.

    Args:
      classes: int `[N]`, from 0, none of them without a row.
      rng: decides which, and the order.

    Returns:
      int `[N]`, rows.

    >>> drawn = balanced(np.array([0, 0, 0, 0, 0, 1]), np.random.default_rng(0))
    >>> sorted(drawn.tolist())[-3:], len(set(drawn.tolist()))
    ([5, 5, 5], 4)
    """
    rows, counts = len(classes), np.bincount(classes)
    quotas = np.full(len(counts), rows // len(counts))
    quotas[rng.permutation(len(counts))[: rows % len(counts)]] += 1
    members = np.split(np.argsort(classes, kind="stable"), np.cumsum(counts)[:-1])
    rounds = [
        rng.permuted(np.tile(own, (-(-quota // len(own)), 1)), axis=1).ravel()[:quota]
        for own, quota in zip(members, quotas, strict=True)
    ]
    return rng.permutation(np.concatenate(rounds))


def local(layout: Layout, batch: Batch, shard: int) -> tuple[int, np.ndarray, int]:
    """One process's part of a batch.

    Returns:
      `(length, rows, real)`: the padded length, int `[B]` rows, and how many of them, from the
      front, are real; the others repeat a real row.
    """
    # Every n-th row, so that an incomplete batch is spread over all processes.
    rows = batch.rows[shard :: layout.shards]
    if layout.remainder == "keep":
        return batch.length, rows, len(rows)
    filler = np.full(layout.batch_size - len(rows), batch.rows[0])
    return batch.length, np.concatenate([rows, filler]), len(rows)


def shapes(layout: Layout) -> dict[tuple[int, ...], int]:
    """How many batches of an epoch have each leading shape, in one process.

    >>> shapes(layout(5, None, batch_size=2, remainder="keep"))
    {(2,): 2, (1,): 1}
    """
    found = {}
    for length, count in zip(layout.buckets, layout.batches, strict=True):
        if count:
            found[(layout.batch_size, length) if length else (layout.batch_size,)] = count
    short = len(layout.bucket_of_row) % layout.batch_size
    if layout.remainder == "keep" and short:
        *_, last = found
        found[last] -= 1
        found[(short, *last[1:])] = 1
    return {shape: count for shape, count in found.items() if count}


def _assign(lengths: np.ndarray, buckets: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """The buckets that hold a row, and the index of each row's: the shortest that fits."""
    if lengths.max() > buckets[-1]:
        raise errors.DataError(
            f"row {lengths.argmax()} has {lengths.max()} tokens; expected at most {buckets[-1]}, the largest bucket"
        )
    used, bucket_of_row = np.unique(np.searchsorted(buckets, lengths), return_inverse=True)
    return tuple(buckets[used].tolist()), bucket_of_row


def _filled_up(bucket_of_row: np.ndarray, lengths: np.ndarray, buckets: int, size: int) -> np.ndarray:
    """Whole batches in all buckets but the last: the longest rows of each that are left over move up.

    The same rows in every epoch, so that a cached row is needed in one length alone.
    """
    found = bucket_of_row.copy()
    for bucket in range(buckets - 1):
        rows = np.flatnonzero(found == bucket)
        left_over = len(rows) % size
        if left_over:
            found[rows[np.argsort(lengths[rows], kind="stable")[-left_over:]]] = bucket + 1
    return found


def _count(rows_of_bucket: np.ndarray, size: int, remainder: str) -> tuple[int, ...]:
    """Batches of each bucket; the last one's may be incomplete."""
    counts = [int(rows) // size for rows in rows_of_bucket]
    counts[-1] += bool(rows_of_bucket[-1] % size and remainder != "drop")
    return tuple(counts)


def _check(
    batch_size: int, buckets: Sequence[int] | None, remainder: str, shards: int, lengths: np.ndarray | None
) -> None:
    if batch_size < 1:
        raise errors.ConfigError(f"batch_size={batch_size}: expected at least 1")
    if shards < 1:
        raise errors.ConfigError(f"{shards} shards: expected at least 1")
    if remainder not in _REMAINDERS:
        raise errors.ConfigError(f"remainder={remainder!r}: expected one of {', '.join(_REMAINDERS)}")
    if remainder == "keep" and shards > 1:
        raise errors.ConfigError(
            f"remainder='keep' with {shards} shards would give processes batches of different shapes; "
            "pass 'pad' or 'drop'"
        )
    if buckets is not None and (not len(buckets) or min(buckets) < 1):
        raise errors.ConfigError(f"buckets={tuple(buckets)}: expected lengths of at least 1")
    if buckets is not None and lengths is None:
        raise errors.ConfigError(f"buckets={tuple(buckets)}, but no column is ragged; leave buckets out")
