"""`build`: the prefix of a split loss over a whole data set, once, kept where training can read it."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from jtl import tree as jtree
from jtl.boundary import Prefix
from jtl.cache import keys
from jtl.cache.store import Signature, Store, check_free, gaps, kept, row_bytes, signature
from jtl.data import Batches, plans
from jtl.errors import ConfigError, DataError
from jtl.state import Frozen, TrainState
from jtl.step import checker
from jtl.typing import Batch, Key

_SECONDS = 30.0
"""The most work that an interruption may cost."""


@runtime_checkable
class Augment(Protocol):
    """A random transform of batches."""

    def __call__(self, batch: Batch, *, key: Key) -> Batch:
        """A batch of the same shapes."""
        ...


class Source(NamedTuple):
    """A data set to be cached: batches by number with the ids of their real rows, and one batch of each shape."""

    rows: int
    batches: int
    read: Callable[[int, int], Iterator[tuple[np.ndarray, Batch]]]
    shapes: Callable[[], Iterable[Batch]]
    digest: str


@dataclasses.dataclass(frozen=True, eq=False)
class Cache:
    """Cached rows, and what is needed to compute those that are missing.

    Attributes:
      store: the rows; those of view v have the ids v * rows, v * rows + 1, ...
      rows: the number of rows of the data set.
      views: how many augmented views of each are stored.
      key: a digest of everything that the rows were computed from.
      prefix: `prefix(batch) -> cached`, compiled for each shape.
      prepare: `prepare(batch, view, number) -> batch`, the augmentation of a view.
    """

    store: Store
    rows: int
    views: int
    key: str
    prefix: "Compiled"
    prepare: Callable[[Batch, int, int], Batch]

    def compute(self, batch: Batch, view: int, number: int) -> dict[str, np.ndarray]:
        """The entries of a batch's rows, as they are stored."""
        return {name: np.asarray(value) for name, value in self.prefix(self.prepare(batch, view, number)).items()}

    def group_of(self, batch: Batch) -> Signature:
        """The group that rows of these shapes belong to."""
        return self.prefix.group_of(batch)

    def batches(
        self, *, batch_size: int, epochs: int = 1, key: Key | None = None, remainder: str | None = None
    ) -> "CachedBatches":
        """Batches for the suffix, each of rows of one shape.

        Args:
          batch_size: rows of a batch.
          epochs: passes over the data; with several views, epoch e trains on view e modulo their number.
          key: the random key of the order; None keeps the rows in order.
          remainder: "pad" fills an incomplete batch up with rows of weight 0, "drop" drops it, "keep"
            keeps it short. By default "pad" if the loss reads a weight, "keep" otherwise.

        Raises:
          ConfigError: settings that give no batches, or "pad" without a weight.
        """
        weighted = all(any(name == "weight" for name, *_ in group) for group in self.store.groups)
        remainder = remainder or ("pad" if weighted else "keep")
        if remainder == "pad" and not weighted:
            raise ConfigError("remainder='pad' needs an entry 'weight' that the loss reads; pass 'keep' or 'drop'")
        if epochs < 1:
            raise ConfigError(f"epochs={epochs}: expected at least 1")
        seed = None if key is None else int(jax.random.bits(key))
        layouts = {}
        for group, ids in self.store.groups.items():
            own = np.unique(ids[ids < self.rows])
            if remainder != "drop" or len(own) >= batch_size:
                layouts[group] = (own, plans.layout(len(own), None, batch_size=batch_size, remainder=remainder))
        if not layouts:
            raise ConfigError(f"remainder='drop' leaves no batch: {self.rows} rows, batch_size={batch_size}")
        return CachedBatches(self, layouts, epochs, seed)


class Compiled:
    """A prefix with its frozen leaves, compiled for each shape of batch when it first comes.

    Attributes:
      seconds: spent on compilation here; what another cache of the prefix has compiled is used again.
      flops: operations by the shapes of a batch's entries, as XLA counts them.
    """

    def __init__(self, prefix: Prefix, frozen: Frozen, collections: Any):
        self.seconds, self.flops = 0.0, {}
        self._arguments, self._jitted = (frozen, collections), jax.jit(prefix)
        self._programs = prefix.programs.setdefault(_kind(self._arguments), {})

    def __call__(self, batch: Batch) -> dict[str, jax.Array]:
        """The cached form of a batch."""
        shapes = _shapes(batch)
        if shapes not in self._programs:
            started = time.perf_counter()
            self._programs[shapes] = self._jitted.lower(*self._arguments, batch).compile()
            self.seconds += time.perf_counter() - started
        if shapes not in self.flops:
            self.flops[shapes] = (self._programs[shapes].cost_analysis() or {}).get("flops", 0.0)
        return self._programs[shapes](*self._arguments, batch)

    def flops_at(self, shape: tuple[int, ...]) -> float:
        """Operations for a batch with an entry of this leading shape; 0 if none was computed."""
        sizes = ((flops, [size for _, size, _ in entries]) for entries, flops in self.flops.items())
        return next((flops for flops, found in sizes if any(size[: len(shape)] == shape for size in found)), 0.0)

    def group_of(self, batch: Batch) -> Signature:
        """The group that rows of these shapes belong to."""
        return signature(jax.eval_shape(self._jitted, *self._arguments, batch))


def _kind(arguments: Any) -> Any:
    """What a program is compiled for."""
    leaves, structure = jax.tree.flatten(arguments)
    return structure, tuple((leaf.shape, str(leaf.dtype), getattr(leaf, "sharding", None)) for leaf in leaves)


def _shapes(batch: Batch) -> tuple[Any, ...]:
    return tuple((path, np.shape(leaf), str(leaf.dtype)) for path, leaf in jtree.leaves_with_paths(batch))


@dataclasses.dataclass(frozen=True, eq=False)
class CachedBatches:
    """Batches of a cache to iterate over, as often as needed; `Cache.batches` makes it."""

    cache: Cache
    layouts: dict[Any, tuple[np.ndarray, plans.Layout]]
    epochs: int
    seed: int | None

    def __len__(self) -> int:
        return self.epochs * sum(sum(layout.batches) for _, layout in self.layouts.values())

    def __iter__(self) -> Iterator[Batch]:
        for epoch in range(self.epochs):
            planned = [
                (group, own, layout, batch)
                for group, (own, layout) in self.layouts.items()
                for batch in plans.epoch(layout, self.seed, epoch)
            ]
            rng = None if self.seed is None else np.random.default_rng((self.seed, epoch, 1))
            order = range(len(planned)) if rng is None else rng.permutation(len(planned))
            for group, own, layout, batch in (planned[k] for k in order):
                _, rows, real = plans.local(layout, batch, 0)
                yield read(self.cache, group, own[rows], real, epoch % self.cache.views)


def read(cache: Cache, group: Any, rows: np.ndarray, real: int, view: int) -> Batch:
    """A batch of stored rows, of which the first `real` count."""
    batch = cache.store.rows(group, rows + view * cache.rows)
    if "weight" in batch:
        batch["weight"] = batch["weight"] * (np.arange(len(rows)) < real).astype(batch["weight"].dtype)
    return batch


def build(
    prefix: Prefix,
    state: TrainState,
    frozen: Frozen,
    batches: Batches | Iterable[Batch],
    *,
    directory: str | Path | None = None,
    views: int = 1,
    augment: Augment | None = None,
    key: Key | None = None,
    revision: str = "",
    settings: str = "",
    shard_bytes: int = 64 << 20,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Cache:
    """Compute the prefix of every row once.

    On disk, rows are found again by a key: the digests of the frozen leaves that the prefix reads, of
    its computation, of the data and how they are prepared, of dtype, views and augmentation. If any
    of them changed, nothing old is used. What is there already is verified and kept, so an interrupted
    call goes on where it stopped.

    Args:
      prefix: of `jtl.split`.
      state: the trained half, for the statistics that the prefix may read.
      frozen: the frozen half.
      batches: a `jtl.data.Batches`, of which every row is read once in its own bucket, or a list
        of batches, or anything else that can be iterated over twice.
      directory: where to store; in memory by default. Each key has a folder of its own in it.
      views: augmented views of each row to store.
      augment: what makes a view: `augment(batch, key=key) -> batch`, of the same shapes.
      key: the random key of the views; each view has one of its own.
      revision: of the data set, if it has one; a part of the key.
      settings: of preprocessing that cannot be seen in `batches`; a part of the key.
      shard_bytes: of a shard, about.
      on_batch: called with the number of batches done and of all.

    Returns:
      The cache, complete.

    Raises:
      CacheError: the disk has too little room, which is said before anything is computed, is full or refuses; what is
        stored stays valid.
      ConfigError: views without augmentation, or the other way round.
      DataError: no rows, or a batch that the loss cannot take.
    """
    _check(views, augment, key)
    source = _source(batches)
    collections = jtree.combine(state.collections, frozen.collections)

    def prepare(batch: Batch, view: int, number: int) -> Batch:
        if augment is None or key is None:
            return batch
        return augment(batch, key=jax.random.fold_in(jax.random.fold_in(key, view), number))

    digest, parts = _key(prefix, frozen, collections, source, revision, settings, views, augment, key)
    folder = None if directory is None else Path(directory) / digest[:32]
    store, found = Store(folder), []
    if folder is not None:
        with kept(folder):
            found = store.load()
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "key.json").write_text(json.dumps(parts, indent=1), "utf-8")
    cache = Cache(store, source.rows, views, digest, Compiled(prefix, frozen, collections), prepare)
    check, total = checker(prefix.boundary.loss_fn, state, frozen), views * source.batches
    missing = list(gaps(total, found))
    if folder is not None and missing:
        left = views * source.rows - sum(map(len, store.groups.values()))
        check_free(folder, left * min(row_bytes(cache.group_of(batch)) for batch in source.shapes()))
    done = total - sum(stop - start for start, stop in missing)
    for start, stop in missing:
        for _ in _fill(cache, source, start, stop, shard_bytes, check):
            done += 1
            on_batch(done, total)
    store.join()
    return cache


def _check(views: int, augment: Augment | None, key: Key | None) -> None:
    if views < 1:
        raise ConfigError(f"views={views}: expected at least 1")
    if (augment is None) != (key is None) or (views > 1 and augment is None):
        raise ConfigError("views, augment and key go together: several views need an augmentation and its random key")


def _fill(
    cache: Cache, source: Source, start: int, stop: int, shard_bytes: int, check: Callable[[Batch], None]
) -> Iterator[None]:
    """Compute the batches from `start` to `stop`, and commit them in shards."""
    held: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
    first, began = start, time.monotonic()

    def flush(stop: int) -> None:
        if held:
            ids, entries = zip(*held, strict=True)
            joined = {name: np.concatenate([one[name] for one in entries]) for name in entries[0]}
            cache.store.commit(first, stop, np.concatenate(ids), joined)
            held.clear()

    for number, (rows, batch) in zip(range(start, stop), _numbered(source, start, stop), strict=True):
        check(batch)
        view = number // source.batches
        computed = cache.compute(batch, view, number % source.batches)
        entries = {name: value[: len(rows)] for name, value in computed.items()}
        size = sum(array.nbytes for _, one in held for array in one.values())
        if held and (
            size >= shard_bytes or time.monotonic() - began > _SECONDS or signature(held[-1][1]) != signature(entries)
        ):
            flush(number)
            first, began = number, time.monotonic()
        held.append((rows + view * cache.rows, entries))
        yield
    flush(stop)


def _numbered(source: Source, start: int, stop: int) -> Iterator[tuple[np.ndarray, Batch]]:
    while start < stop:
        view = start // source.batches
        end = min(stop, (view + 1) * source.batches)
        yield from source.read(start - view * source.batches, end - view * source.batches)
        start = end


def _source(batches: Batches | Iterable[Batch]) -> Source:
    if isinstance(batches, Batches):
        return _source_of_run(batches)
    if iter(batches) is batches:
        raise ConfigError("batches can be read only once; pass a list, or jtl.data.batches")
    counts = [len(_real(batch)) for batch in batches]
    if not sum(counts):
        raise DataError("there is no row to cache: the data set is empty")
    first = np.concatenate([[0], np.cumsum(counts)])

    def at(start: int, stop: int) -> Iterator[tuple[np.ndarray, Batch]]:
        for number, batch in enumerate(batches):
            if start <= number < stop:
                kept = _real(batch)
                yield first[number] + np.arange(len(kept)), _front(batch, kept)

    return Source(int(first[-1]), len(counts), at, lambda: batches, keys.of_content(batches))


def _real(batch: Batch) -> np.ndarray:
    """The places of the rows that count."""
    leaf = jax.tree.leaves(batch)[0]
    weight = batch.get("weight") if isinstance(batch, dict) else None
    return np.arange(len(leaf)) if weight is None else np.flatnonzero(np.asarray(weight))


def _front(batch: Batch, kept: np.ndarray) -> Batch:
    """The rows that count first, so that results need only be cut."""
    size = len(jax.tree.leaves(batch)[0])
    order = np.concatenate([kept, np.setdiff1d(np.arange(size), kept)])
    return batch if len(kept) == size else jax.tree.map(lambda leaf: np.asarray(leaf)[order], batch)


def _source_of_run(run: Batches) -> Source:
    planned = extraction(run)

    def at(start: int, stop: int) -> Iterator[tuple[np.ndarray, Batch]]:
        for plan, batch in zip(planned[start:stop], run.planned(planned[start:stop]), strict=True):
            yield plan.rows, batch

    def shapes() -> Iterator[Batch]:  # not all batches: a transform may have to decode pictures
        return run.planned(list({plan.length: plan for plan in planned}.values()))

    return Source(len(run.layout.bucket_of_row), len(planned), at, shapes, keys.of_batches(run))


def extraction(run: Batches) -> Sequence[plans.Batch]:
    """Every row once, each in its own bucket."""
    size, found = run.layout.batch_size, []
    for bucket, length in enumerate(run.layout.buckets):
        rows = np.flatnonzero(run.layout.bucket_of_row == bucket)
        found += [plans.Batch(length, rows[at : at + size]) for at in range(0, len(rows), size)]
    return found


def _key(
    prefix: Prefix,
    frozen: Frozen,
    collections: Any,
    source: Source,
    revision: str,
    settings: str,
    views: int,
    augment: Augment | None,
    key: Key | None,
) -> tuple[str, dict[str, Any]]:
    """The key, and its parts for a reader."""
    shapes, reads = {}, {}
    for batch in source.shapes():
        if _shapes(batch) not in shapes:
            shapes[_shapes(batch)] = prefix.digest(batch)
            reads |= dict.fromkeys(prefix.reads(batch))
    leaves = {("params", path): leaf for path, leaf in jtree.leaves_with_paths(frozen.params)}
    leaves |= {("collections", path): leaf for path, leaf in jtree.leaves_with_paths(collections)}
    parts = {
        "leaves": keys.of_leaves({name: leaves[name] for name in reads}),
        "computation": sorted(shapes.values()),
        "data": source.digest,
        "revision": revision,
        "settings": settings,
        "views": views,
        "augment": keys.of_function(augment),
        "random": "" if key is None else jtree.digest(key),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(), parts
