"""What a split caches, and what that saves."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from jtl.boundary import trace as tracing
from jtl.boundary.flops import flops, step_flops
from jtl.boundary.plan import Plan, share


class Stored(NamedTuple):
    """A value that is cached.

    Attributes:
      name: its entry in a cached batch.
      shape: of one example's share.
      dtype: as stored.
      nbytes: of one example's share, as stored.
      source: the primitive, module and source line that it comes from.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    nbytes: int
    source: str


class SplitReport(NamedTuple):
    """What a split caches, and what that saves. All counts are of one example.

    Attributes:
      stored: the cached values.
      passed: the batch's entries that training reads as they are.
      prefix_flops: floating-point operations of the first half.
      suffix_flops: of a training step of the second half, backward pass included.
      boundary: path of the first trained leaf that the examples meet.
      notes: what could be cached as well if the loss were written otherwise.
    """

    stored: tuple[Stored, ...]
    passed: tuple[str, ...]
    prefix_flops: float
    suffix_flops: float
    boundary: str
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes to store for an example."""
        return sum(value.nbytes for value in self.stored)

    def speedup(self, epochs: float) -> float:
        """How many times fewer operations that many epochs take with the cache, its filling included."""
        return epochs * (self.prefix_flops + self.suffix_flops) / (self.prefix_flops + epochs * self.suffix_flops)

    def __str__(self) -> str:
        lines = [
            f"{v.name}  {jnp.dtype(v.dtype).name} {list(v.shape)}  {v.nbytes:,} bytes  {v.source}" for v in self.stored
        ]
        work = f"{self.prefix_flops / 1e6:,.1f} MFLOP once, {self.suffix_flops / 1e6:,.1f} MFLOP a step"
        head = f"per example: {self.nbytes:,} bytes cached, {work}; training begins at {self.boundary}"
        lines += [f"from the batch: {', '.join(self.passed) or 'nothing'}", *self.notes]
        return "\n  ".join([head, *lines])


def report(plan: Plan, size: int, dtype: Any) -> SplitReport:
    """What a plan for a batch of this size stores, and what it saves."""
    program, cut = plan.program, plan.cut
    behind = {var: eqn for eqn in cut.prefix for var in eqn.outvars}
    stored = []
    for var in cut.stored:
        one = share(plan, var, dtype)
        nbytes = math.prod(one.shape) * one.dtype.itemsize
        stored.append(Stored(plan.names[var], one.shape, one.dtype, nbytes, tracing.where(behind[var])))

    def weight(eqn: Any) -> int:
        return step_flops(eqn, sum(bool(program.marks_of([atom]).trained) for atom in eqn.invars))

    meets = (program.marks_of(eqn.invars) for eqn in cut.suffix if program.marks_of(eqn.invars).batch)
    boundary = next((marks.trained for marks in meets if marks.trained), "")
    return SplitReport(
        tuple(stored),
        tuple(plan.names[var] for var in cut.passed),
        sum(map(flops, cut.prefix)) / size,
        sum(map(weight, cut.suffix)) / size,
        boundary,
        tuple(dict.fromkeys(program.notes)),
    )
