"""The batches of a run, in the run's own order, read from a cache."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jtl.boundary import Prefix
from jtl.cache.builder import Cache, extraction, read
from jtl.cache.store import Signature, Store
from jtl.data import Batches, plans
from jtl.errors import ConfigError
from jtl.state import Frozen
from jtl.typing import Batch


@dataclasses.dataclass(frozen=True, eq=False)
class Following:
    """The same rows in the same batches as a run, for the suffix; `follow` makes it."""

    cache: Cache
    run: Batches
    more: Cache
    groups: dict[int, Signature] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.run)

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.run.start, self.run.start + len(self)):
            plan = self.run.plan(step)
            length, rows, real = plans.local(self.run.layout, plan, 0)
            view = step // self.run.steps_per_epoch % self.cache.views
            if length not in self.groups:
                self.groups[length] = self.cache.group_of(self.run.assemble(plan))
            group, ids = self.groups[length], rows + view * self.cache.rows
            stored = next((cache for cache in (self.cache, self.more) if cache.store.has(group, ids)), None)
            yield self._computed(plan, view, step) if stored is None else read(stored, group, rows, real, view)

    def _computed(self, plan: plans.Batch, view: int, step: int) -> Batch:
        """A batch with a row that is not stored in this length.

        The run has another batch size than the one that filled the cache: other rows of a bucket are left over.
        """
        cached = self.cache.compute(self.run.assemble(plan), view, step)
        _, rows, real = plans.local(self.run.layout, plan, 0)
        rows, first = np.unique(rows[:real], return_index=True)
        self.more.store.add(rows + view * self.cache.rows, {name: value[first] for name, value in cached.items()})
        return cached


def follow(cache: Cache, run: Batches) -> Following:
    """Read a run's batches from a cache of its data set.

    Args:
      cache: of the same rows, as `build` makes it of this run or of one that differs in order alone.
      run: of one process.

    Raises:
      ConfigError: the run is a part of a run of several processes, or has other rows.
    """
    if run.layout.shards > 1:
        raise ConfigError("a cache follows the batches of one process; this run is shared between several")
    if len(run.layout.bucket_of_row) != cache.rows:
        raise ConfigError(f"the run has {len(run.layout.bucket_of_row)} rows, the cache {cache.rows}")
    return Following(cache, run, dataclasses.replace(cache, store=Store()))


def estimate(prefix: Prefix, frozen: Frozen, run: Batches) -> int:
    """Bytes that the cache of a run will take."""
    total, seen = 0, {}
    for plan in extraction(run):
        if plan.length not in seen:
            batch = next(run.planned([plan]))
            shapes = jax.eval_shape(prefix, frozen, frozen.collections, batch)
            seen[plan.length] = sum(_row_bytes(shape) for shape in shapes.values())
        total += seen[plan.length] * len(plan.rows)
    return total


def _row_bytes(shape: Any) -> int:
    return int(np.prod(shape.shape[1:])) * shape.dtype.itemsize
