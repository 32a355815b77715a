"""Whether to train from a cache: decided from what the split predicts and what there is room for."""

import functools
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from jtl.boundary import Split, split
from jtl.cache.builder import Cache, build
from jtl.cache.follow import estimate, follow
from jtl.data import Batches
from jtl.errors import CacheError, ConfigError, SplitError
from jtl.state import Frozen, TrainState
from jtl.step import LossFn
from jtl.typing import Batch

Mode = Literal["auto", "off", "require"]

WORTHWHILE = 1.1
"""The least gain, in operations, that a cache is built for."""


class Prepared(NamedTuple):
    """What to train, and on what.

    Attributes:
      loss_fn: the suffix, or the loss itself.
      batches: cached ones, or the run itself.
      cache: what was built; None where no cache is used.
      why: one line that says what was decided; empty where there was nothing to decide.
      split: what the cache was built with, so that another can be built of held-out batches.
    """

    loss_fn: LossFn
    batches: Iterable[Batch]
    cache: Cache | None
    why: str
    split: Split | None = None


def prepare(
    loss_fn: LossFn,
    state: TrainState,
    frozen: Frozen,
    batches: Iterable[Batch],
    *,
    mode: Mode = "auto",
    directory: str | Path | None = None,
    limit: int | None = None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Prepared:
    """Build a cache and read the run from it, if that saves work.

    Args:
      loss_fn: the loss.
      state: the trained half.
      frozen: the frozen half.
      batches: the run; only a `jtl.data.Batches` says which rows come when.
      mode: "auto" uses a cache where the split predicts a gain of 10% or more for the epochs of
        the run and the limit holds it; "require" uses one, or raises; "off" does not.
      directory: where to keep it; in memory by default.
      limit: bytes that it may take; by default a quarter of the free memory, or half of the free disk.
      on_batch: called with the number of batches computed and of all.

    Raises:
      CacheError, ConfigError, SplitError: with "require", the reason why there can be no cache.
    """
    plain = Prepared(loss_fn, batches, None, "")
    if mode not in ("auto", "off", "require"):
        raise ConfigError(f"cache={mode!r}: expected one of auto, off, require")
    if mode == "off":
        return plain
    try:
        return _prepared(loss_fn, state, frozen, batches, mode == "require", directory, limit, on_batch) or plain
    except (SplitError, CacheError, _UnsuitedError) as error:
        if mode == "require":
            raise
        return plain._replace(why=f"no cache: {error}" if not isinstance(error, _UnsuitedError) else "")


class _UnsuitedError(ConfigError):
    """The run gives no occasion for a cache."""


def _prepared(
    loss_fn: LossFn,
    state: TrainState,
    frozen: Frozen,
    batches: Iterable[Batch],
    required: bool,
    directory: str | Path | None,
    limit: int | None,
    on_batch: Callable[[int, int], None],
) -> Prepared | None:
    if not isinstance(batches, Batches) or batches.layout.shards > 1:
        raise _UnsuitedError(
            "a cache needs batches of jtl.data.batches, of one process: only they say which rows come when"
        )
    epochs = len(batches) / batches.steps_per_epoch
    if not required and (epochs <= 1 or not jax.tree.leaves(frozen.params)):
        return None
    cut = _split(loss_fn, state, frozen, next(iter(batches)))
    gain = cut.report.speedup(epochs)
    if not cut.report.stored and required:
        raise SplitError("nothing can be cached: a trained leaf meets the examples first")
    if not cut.report.stored or (gain < WORTHWHILE and not required):
        return None
    size, most = estimate(cut.prefix, frozen, batches), room(directory) if limit is None else limit
    if size > most:
        allowed = "are allowed" if limit is not None else f"may be used of {directory or 'the memory'}"
        raise CacheError(
            f"the cache would take {size:,} bytes, and {most:,} {allowed}; raise the limit or give a directory with "
            "more room"
        )
    cache = build(cut.prefix, state, frozen, batches, directory=directory, on_batch=on_batch)
    where = "in memory" if directory is None else f"in {directory}"
    why = (
        f"cache: {size / 1e6:,.1f} MB {where}, computed once up to {cut.report.boundary}; "
        f"{gain:.1f} times fewer operations over {epochs:g} epochs"
    )
    return Prepared(cut.suffix, follow(cache, batches), cache, why, cut)


def _split(loss_fn: LossFn, state: TrainState, frozen: Frozen, batch: Batch) -> Split:
    """The split of a loss and a mask; the same object for the same shapes, so that it compiles once."""
    leaves, structure = jax.tree.flatten((state._replace(opt_state=()), frozen))
    return _split_of_shapes(loss_fn, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves), _Shapes(batch))


class _Shapes:
    """A batch that is equal to any other: a split takes batches of every shape."""

    def __init__(self, batch: Batch):
        self.batch = batch

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Shapes)

    def __hash__(self) -> int:
        return 0


@functools.lru_cache(maxsize=16)
def _split_of_shapes(loss_fn: LossFn, structure: Any, shapes: tuple[Any, ...], example: _Shapes) -> Split:
    state, frozen = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
    return split(loss_fn, state, frozen, example.batch)


def room(directory: str | Path | None) -> int:
    """Bytes that may be taken: half of what is free on the disk of a folder, or a quarter of the free memory."""
    if directory is None:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    path = Path(directory).absolute()
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise CacheError(f"{directory} is to hold a cache, and {path} is a file; give another directory")
    # What an earlier run has stored there needs no more room.
    stored = sum(file.stat().st_size for file in Path(directory).rglob("*.npy")) if Path(directory).is_dir() else 0
    return shutil.disk_usage(path).free // 2 + stored
