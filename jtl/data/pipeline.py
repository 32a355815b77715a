"""The input pipeline: shuffled, bucketed, padded and prefetched batches that resume exactly."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jtl import errors
from jtl.data import plans
from jtl.data.text import Ragged

Batch = dict[str, np.ndarray]
Column = np.ndarray | Ragged

_MADE = ("attention_mask", "label", "weight")
"""What a batch holds beside its columns."""


def batches(
    columns: Mapping[str, Column],
    labels: np.ndarray | None = None,
    *,
    batch_size: int,
    seed: int | None = None,
    epochs: int = 1,
    remainder: Literal["pad", "drop", "keep"] = "pad",
    buckets: Sequence[int] | None = None,
    start: int = 0,
    shard: tuple[int, int] = (0, 1),
    prefetch: int = 2,
    transform: Callable[[Batch], Batch] | None = None,
    balance: bool = False,
) -> "Batches":
    """Batches of N examples in memory.

    A batch is a dict of arrays that lead with the batch axis, B = `batch_size`:

    - each array column `[B, ...]`, each ragged column int32 `[B, L]`, L a bucket's length;
    - `attention_mask` int32 `[B, L]`, 1 on tokens, where there is a ragged column;
    - `label` int32 `[B]`, where there are labels; targets of another kind are a column of this name, such as a tag
      for each token, ragged like the tokens, numbers `[N, ...]` (of float64, float32 is made), or begin and end of a
      span `[N, 2]`;
    - `weight` float32 `[B]`: 1, or 0 on the rows that only fill up the last batch (copies of a real row).

    With a seed, each epoch has its own order of rows and of batches, a function of seed and epoch alone.
    Without, rows stand in file order, within each bucket if there are several; a column
    `{"row": np.arange(N)}` tells which is which. Each epoch holds every row once. The longest rows
    of a bucket that are left over are padded to the next one's length, in every epoch the same, so that an epoch
    has at most one incomplete batch, whatever the number of buckets.

    Args:
      columns: inputs by name: arrays `[N, ...]`, or `Ragged` of N rows with the same lengths.
      labels: integers `[N]`, one class of each row.
      batch_size: rows of a batch, in this process.
      seed: of the order; None for no shuffling.
      epochs: passes over the data.
      remainder: fill the incomplete batch up with rows of weight 0, drop it, or keep it short.
      buckets: the padded lengths to use, as `text.buckets` chooses them; by default one, the longest row's.
      start: batches already consumed.
      shard: `(i, n)`: the i-th of n processes. Processes get disjoint rows, and as many batches of
        the same shapes in the same order, as collectives need.
      prefetch: batches made ahead, by as many threads; 0 makes them in the caller's thread.
      transform: applied to each batch in the prefetching threads, e.g. to decode pictures from paths.
      balance: draw each class equally often, give or take one row: an epoch has as many rows as before, of which
        those of rare classes come several times, and of frequent ones a part, each epoch another. With several
        buckets, how many batches have which length differs between epochs.

    Raises:
      ConfigError: sizes or a combination of settings that give no batches, or `balance` without labels or seed.
      DataError: no rows, columns or labels that do not match, or a row that is empty or longer than the
        largest bucket; with `balance`, a class without rows.

    References:
      Kang et al, Decoupling representation and classifier for long-tailed recognition, ICLR 2020 (arXiv 1910.09217),
      for class-balanced sampling.

    >>> data = batches({"x": np.arange(3.0)}, np.array([0, 1, 0]), batch_size=2)
    >>> [batch["weight"].tolist() for batch in data]
    [[1.0, 1.0], [1.0, 0.0]]
    """
    labels = None if labels is None else np.asarray(labels)
    rows = _check_columns(columns, labels)
    lengths = _lengths(columns)
    if balance:
        _check_classes(labels, seed)
    layout = plans.layout(rows, lengths, batch_size=batch_size, buckets=buckets, remainder=remainder, shards=shard[1])
    layout = layout._replace(classes=labels.astype(np.int64) if balance and labels is not None else None)
    run = Batches(
        {name: _single(name, column) for name, column in columns.items()},
        labels,
        layout,
        seed,
        epochs,
        shard[0],
        start,
        prefetch,
        transform,
    )
    _check_settings(run, shard)
    return run


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """Batches to iterate over, as often as needed; `batches` makes it.

    `len()` is the number of batches from `start` to `stop`, by default the end of the last epoch.
    """

    columns: dict[str, Column]
    labels: np.ndarray | None
    layout: plans.Layout
    seed: int | None
    epochs: int
    shard: int
    start: int
    prefetch: int
    transform: Callable[[Batch], Batch] | None
    stop: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        # A batch is gathered whole: passing each row through grain is some forty times slower. Its order
        # comes from a plan, not from grain's shuffle, which would mix lengths within a batch or, given one
        # data set a bucket, shuffle within buckets only. And the position is an index taken before
        # prefetching, not grain's iterator state, which a data set of another seed or size accepts silently.
        return self._prefetched(lambda step: self.assemble(self.plan(step)), self.start, self.start + len(self))

    def planned(self, batches: Sequence[plans.Batch]) -> Iterator[Batch]:
        """The batches of a plan of one's own, each filled up to the batch size."""
        filled = dataclasses.replace(self, layout=self.layout._replace(remainder="pad"))
        return self._prefetched(lambda step: filled.assemble(batches[step]), 0, len(batches))

    def in_order(self) -> Iterator[tuple[np.ndarray, Batch]]:
        """Every row once, in the order of the data, at the largest length, with the numbers of a batch's rows.

        Nothing where looking at each row would cost as much as training on it: with a transform, or where a column is
        mapped from a file.
        """
        values = [column.values if isinstance(column, Ragged) else column for column in self.columns.values()]
        if self.transform is not None or any(isinstance(array, np.memmap) for array in values):
            return
        for start in range(0, self.rows, self.layout.batch_size):
            rows = np.arange(start, min(start + self.layout.batch_size, self.rows))
            yield rows, self.alone(rows)

    def alone(self, rows: np.ndarray, length: int | None = None) -> Batch:
        """A batch of these rows, filled up with copies of weight 0; at most a batch's size.

        Args:
          rows: their numbers.
          length: that they are padded to; by default the largest of the run.
        """
        filled = dataclasses.replace(self, layout=self.layout._replace(remainder="pad", shards=1), shard=0)
        return filled.assemble(plans.Batch(max(self.layout.buckets) if length is None else length, rows))

    @property
    def lengths(self) -> np.ndarray | None:
        """int64 `[N]`, the length of each row; None where rows need no padding."""
        return _lengths(self.columns)

    def _prefetched(self, make: Callable[[int], Batch], start: int, stop: int) -> Iterator[Batch]:
        try:
            import grain
        except ImportError as error:
            raise errors.missing_extra("grain", "data") from error
        options = grain.ReadOptions(num_threads=self.prefetch, prefetch_buffer_size=self.prefetch)
        return iter(grain.MapDataset.range(start, stop).map(make).to_iter_dataset(options))

    def __len__(self) -> int:
        return (self.total if self.stop is None else self.stop) - self.start

    @property
    def total(self) -> int:
        """The number of batches of the whole run, from its beginning to the end of the last epoch."""
        return self.epochs * self.steps_per_epoch

    @property
    def rows(self) -> int:
        """The number of rows of the data, N."""
        return len(self.layout.bucket_of_row)

    @property
    def steps_per_epoch(self) -> int:
        """The number of batches of one epoch, the same in each process."""
        return sum(self.layout.batches)

    @property
    def shapes(self) -> dict[tuple[int, ...], int]:
        """How many batches of an epoch have each leading shape, `(B, L)` or `(B,)`: one compilation each.

        With `balance` and several buckets, of an epoch that has every row once.
        """
        return plans.shapes(self.layout)

    @property
    def fingerprint(self) -> str:
        """What decides the sequence of batches, for a checkpoint to compare before it resumes at `start`."""
        layout = self.layout
        buckets = ",".join(map(str, layout.buckets))
        return (
            f"rows={self.rows} batch={layout.batch_size} seed={self.seed} "
            f"shards={layout.shards} remainder={layout.remainder} buckets={buckets} "
            f"data={_digest(self.columns, self.labels)}{'' if layout.classes is None else ' balanced'}"
        )

    def at(self, start: int) -> "Batches":
        """The same run from its batch `start` on: `list(run)[n:]` equals `list(run.at(n))`.

        Args:
          start: batches consumed since the run's beginning, whatever this object's own `start`.

        Raises:
          ConfigError: the run has fewer batches.
        """
        moved = dataclasses.replace(self, start=start)
        _check_start(moved)
        return moved

    def until(self, stop: int) -> "Batches":
        """The same run, ended before its batch `stop`, counted from the run's beginning.

        Raises:
          ConfigError: that is before `start`, or after the end of the run.
        """
        cut = dataclasses.replace(self, stop=stop)
        _check_start(cut)
        return cut

    def plan(self, step: int) -> plans.Batch:
        """Which rows make up the batch of a step, counted from the run's beginning."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._plans(epoch)[position]

    @functools.cached_property
    def _plans(self) -> Callable[[int], list[plans.Batch]]:
        return functools.lru_cache(maxsize=2)(functools.partial(plans.epoch, self.layout, self.seed))

    def assemble(self, plan: plans.Batch) -> Batch:
        """The part of a planned batch that this process trains on."""
        length, rows, real = plans.local(self.layout, plan, self.shard)
        batch = _gather(self.columns, rows, length)
        if self.labels is not None:
            batch["label"] = self.labels[rows].astype(np.int32)
        batch["weight"] = (np.arange(len(rows)) < real).astype(np.float32)
        return batch if self.transform is None else self.transform(batch)


def _gather(columns: Mapping[str, Column], rows: np.ndarray, length: int) -> Batch:
    batch = {}
    for name, column in columns.items():
        if not isinstance(column, Ragged):
            batch[name] = column[rows]
            continue
        first, end = column.offsets[rows][:, None], column.offsets[rows + 1][:, None]
        positions = first + np.arange(length)
        mask = positions < end
        tokens = column.values[np.minimum(positions, end - 1)]
        batch[name] = np.where(mask, tokens, np.int32(column.pad))
        batch["attention_mask"] = mask.astype(np.int32)
    return batch


def _single(name: str, column: Column) -> Column:
    """Targets as models take them: examples keep numbers in float64 until they have been centred."""
    if name == "label" and isinstance(column, np.ndarray) and column.dtype == np.float64:
        return column.astype(np.float32)
    return column


def _rows(column: Column) -> int:
    return len(column.offsets) - 1 if isinstance(column, Ragged) else len(column)


def _check_columns(columns: Mapping[str, Any], labels: np.ndarray | None) -> int:
    """The number of rows, the same in all columns."""
    if not columns:
        raise errors.DataError("there are no columns; expected at least one input")
    for name, column in columns.items():
        if name in _MADE and not (name == "label" and labels is None):
            raise errors.ConfigError(f"a column is named {name!r}, which the batch makes itself; rename it")
        if isinstance(column, np.ndarray) and (not column.ndim or column.dtype.hasobject):
            raise errors.DataError(
                f"column {name!r} is {column.dtype} {column.shape}; expected [N, ...] of numbers or str"
            )
        if not isinstance(column, (np.ndarray, Ragged)):
            raise errors.DataError(f"column {name!r} is a {type(column).__name__}; expected a numpy array or Ragged")
    counts = {f"column {name!r}": _rows(column) for name, column in columns.items()}
    if labels is not None:
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise errors.DataError(f"labels are {labels.dtype} {labels.shape}; expected integers [N]")
        counts["labels"] = len(labels)
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{what} {count}" for what, count in counts.items())
        raise errors.DataError(f"numbers of rows differ: {listed}; expected one number")
    rows = next(iter(counts.values()))
    if not rows:
        raise errors.DataError("the data set is empty; expected at least one row")
    return rows


def _check_classes(labels: np.ndarray | None, seed: int | None) -> None:
    if labels is None or seed is None:
        raise errors.ConfigError(
            f"balance draws rows by their labels, at random: {'labels' if labels is None else 'a seed'} must be given"
        )
    if labels.min() < 0:
        raise errors.DataError(f"row {labels.argmin()} has the label {labels.min()}: balance needs classes from 0")
    empty = np.flatnonzero(np.bincount(labels.astype(np.int64)) == 0)
    if empty.size:
        raise errors.DataError(f"classes {empty[:5].tolist()} have no row: balance cannot draw from them")


def _lengths(columns: Mapping[str, Column]) -> np.ndarray | None:
    """The rows' lengths, the same in all ragged columns; None without one."""
    found = {name: column.lengths for name, column in columns.items() if isinstance(column, Ragged)}
    if not found:
        return None
    first, lengths = next(iter(found.items()))
    for name, others in found.items():
        differing = np.flatnonzero(others != lengths)
        if differing.size:
            row = differing[0]
            raise errors.DataError(
                f"row {row} has {lengths[row]} values in {first!r} and {others[row]} in {name!r}; expected as many"
            )
    if not lengths.min():
        raise errors.DataError(f"row {lengths.argmin()} of {first!r} is empty; expected at least one token")
    return lengths


def _check_settings(run: Batches, shard: tuple[int, int]) -> None:
    index, count = shard
    if not 0 <= index < count:
        raise errors.ConfigError(f"shard={shard}: expected (i, n) with 0 <= i < n")
    if run.epochs < 1:
        raise errors.ConfigError(f"epochs={run.epochs}: expected at least 1")
    if run.seed is not None and run.seed < 0:
        raise errors.ConfigError(f"seed={run.seed}: expected 0 or more, or None for no shuffling")
    if run.prefetch < 0:
        raise errors.ConfigError(f"prefetch={run.prefetch}: expected 0 or more")
    _check_start(run)


def _check_start(run: Batches) -> None:
    stop = run.total if run.stop is None else run.stop
    if not 0 <= stop <= run.total:
        raise errors.ConfigError(f"stop={stop}: expected 0 to {run.total}, the number of batches of the run")
    if not 0 <= run.start <= stop:
        raise errors.ConfigError(f"start={run.start}: expected 0 to {stop}, the number of batches of the run")


def _digest(columns: Mapping[str, Any], labels: np.ndarray | None) -> str:
    """A digest of names, types, tokens and labels, and of up to some hundred rows of each array column."""
    digest = hashlib.sha256()
    for name, column in columns.items():
        ragged = isinstance(column, Ragged)
        digest.update(f"{name}:{'ragged' if ragged else f'{column.dtype}{column.shape}'};".encode())
        sample = (column.offsets, column.values) if ragged else (column[:: len(column) // 128 + 1],)
        for array in sample:
            # Tokens may be mapped from a file, and more than fit into memory.
            digest.update(np.ascontiguousarray(array).data if ragged else array.tobytes())
    if labels is not None:
        digest.update(labels.astype("<i4").tobytes())
    return digest.hexdigest()[:16]
