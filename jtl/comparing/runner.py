"""The runs of one arm, which share a cache, compiled steps and calls."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jtl import tree as jtree
from jtl.cache import Cache, Mode, Prepared, build, follow, prepare
from jtl.comparing.results import Trial
from jtl.data import Batches
from jtl.loop import evaluate
from jtl.schedule import Phase, Strategy
from jtl.state import Frozen, TrainState, change, freeze, init
from jtl.step import LossFn, checker, eval_step, train_step
from jtl.transforms import scale_by_factor, set_factor
from jtl.typing import Batch, Key, PyTree, Variables

LIGHT = 1e7
"""Operations of a training step, a row, below which runs are trained side by side: then calls cost more than work."""


class Arm(NamedTuple):
    """A way of adapting that is compared with others.

    Attributes:
      strategy: its phases last for numbers of updates.
      loss_fn: of its model.
      start: `key -> variables`, with a new head, and an adapter if there is one. Frozen leaves that are the same arrays
        for each key are recognised, and what they compute is shared.
      epochs: passes over the training examples.
      factors: of the strategy's learning rates, one run for each.
    """

    strategy: Strategy
    loss_fn: LossFn
    start: Callable[[Key], Variables]
    epochs: int
    factors: tuple[float, ...] = (1.0,)

    @property
    def name(self) -> str:
        """Of the strategy."""
        return self.strategy.name


class _Compiled:
    """A function compiled for each shape of batch, its last argument; the seconds that are waited for that count."""

    def __init__(self, function: Callable[..., Any], **settings: Any):
        self.seconds, self._jitted = 0.0, jax.jit(function, **settings)
        self._programs: dict[Any, Any] = {}

    def __call__(self, *args: Any) -> Any:
        shapes = _shapes(args[-1])
        found = self._programs.get(shapes)
        if found is None or isinstance(found, Future):
            with self._counted():
                found = self._jitted.lower(*args).compile() if found is None else found.result()
            self._programs[shapes] = found
        return found(*args)

    def ahead(self, pool: Executor, *args: Any) -> None:
        """Compile for these arguments in another thread."""
        shapes = _shapes(args[-1])
        if shapes not in self._programs:
            with self._counted():
                lowered = self._jitted.lower(*args)
            self._programs[shapes] = pool.submit(lowered.compile)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began


def _shapes(batch: Batch) -> Any:
    return tuple((np.shape(leaf), str(leaf.dtype)) for leaf in jax.tree.leaves(batch))


_Member = tuple[TrainState, Frozen]


class _Part(NamedTuple):
    """A phase, ready to be trained."""

    prepared: Prepared
    frozen: Frozen
    light: bool
    step: _Compiled
    together: _Compiled
    evaluator: _Compiled
    caches: tuple[Cache, ...]
    held_out: tuple[Any, ...]
    rows: tuple[Any, ...]
    check: Callable[[Batch], None]

    def batches(self, run: Batches) -> Iterator[Batch]:
        """Those of a run, from the cache if there is one."""
        if self.prepared.cache is not None:  # its rows were checked when it was built
            yield from follow(self.prepared.cache, run)
            return
        for batch in run:
            self.check(batch)
            yield batch


class Runner:
    """The runs of one arm; what they share is kept between them, unless `folder` is None."""

    def __init__(
        self,
        arm: Arm,
        sample: Callable[[int], Batches],
        held_out: tuple[Batches, Batches],
        folder: Path | None,
    ):
        phases = arm.strategy.phases
        phases = [phase._replace(tx=optax.chain(phase.tx, scale_by_factor())) for phase in phases]
        self.arm, self.phases, self.sample, self.held_out, self.folder = arm, phases, sample, held_out, folder
        self._parts: dict[int, _Part] = {}
        self._compile_seconds = 0.0

    @property
    def compile_seconds(self) -> float:
        """Waited for compilation so far."""
        return self._compile_seconds + sum(map(_compilation, self._parts.values()))

    def trials(self, seed: int) -> Iterator[Trial]:
        """The runs of a seed, one for each factor."""
        if self.folder is not None:
            yield from self._run(seed, self.arm.factors)
            return
        for factor in self.arm.factors:
            self._forget()
            yield from self._run(seed, (factor,))

    def ahead(self, seed: int, pool: Executor) -> None:
        """Compile, in other threads, the heavy phases whose frozen leaves are known before any run.

        Those are the first one, and later ones that hold nothing still. A phase that is compiled while others are
        trained costs the time of a core that they leave idle.
        """
        start_key, run_key = jax.random.split(jax.random.key(seed))
        run = dataclasses.replace(self.sample(seed), seed=seed, epochs=self.arm.epochs)
        first = self.phases[0]
        member = init(self.arm.start(start_key), first.tx, trainable=first.trainable, key=run_key)
        for number, (phase, part_of_run) in enumerate(self._stretches(run)):
            member = change(*member, phase) if number else member
            if number and jax.tree.leaves(member[1]):
                continue
            part = self._part(number, phase, *member, part_of_run)
            if not part.light:
                state = jax.tree.map(jnp.array, member[0])
                part.step.ahead(pool, state, part.frozen, next(part.batches(part_of_run)))
                whole = freeze(state, part.frozen)
                for batches in part.held_out:
                    part.evaluator.ahead(pool, *whole, next(iter(batches)))

    def _stretches(self, run: Batches) -> Iterator[tuple[Phase, Batches]]:
        """Each phase, and the part of a run that it has."""
        start = 0
        for phase in self.phases:
            stop = start + phase.until if isinstance(phase.until, int) else run.total
            yield phase, run.at(start).until(stop)
            start = stop

    def _forget(self) -> None:
        self._compile_seconds = self.compile_seconds
        self._parts.clear()

    def _run(self, seed: int, factors: tuple[float, ...]) -> Iterator[Trial]:
        began, compiled = time.perf_counter(), self.compile_seconds
        start_key, run_key = jax.random.split(jax.random.key(seed))
        variables = self.arm.start(start_key)
        run = dataclasses.replace(self.sample(seed), seed=seed, epochs=self.arm.epochs)
        first = self.phases[0]
        members: list[_Member] = [init(variables, first.tx, trainable=first.trainable, key=run_key)] * len(factors)
        for number, (phase, part_of_run) in enumerate(self._stretches(run)):
            if number:
                members = [change(*member, phase) for member in members]
            members = [_with_factor(*member, factor) for member, factor in zip(members, factors, strict=True)]
            members = self._phase(number, phase, members, part_of_run)
        part = self._parts[len(self.phases) - 1]
        scores = [self._scores(part, state, frozen) for state, frozen in members]
        seconds = time.perf_counter() - began - (self.compile_seconds - compiled)
        trained, whole = jtree.size(members[0][0].params), jtree.size(variables["params"])
        for factor, (chosen, reported) in zip(factors, scores, strict=True):
            yield Trial(self.arm.name, seed, factor, trained, trained / whole, chosen, reported, seconds / len(factors))

    def _phase(self, number: int, phase: Phase, members: Sequence[_Member], run: Batches) -> list[_Member]:
        # Of members with frozen leaves of their own, as after a phase that froze what it had trained, each is prepared.
        alike = all(_same(member[1], members[0][1]) for member in members)
        if alike and len(members) > 1 and self._part(number, phase, *members[0], run).light:
            part = self._part(number, phase, *members[0], run)
            states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(state for state, _ in members))
            for batch in part.batches(run):
                states, _ = part.together(states, part.frozen, batch)
            unstacked = (jax.tree.map(lambda leaf, n=n: leaf[n], states) for n in range(len(members)))
            return [(state, frozen) for state, (_, frozen) in zip(unstacked, members, strict=True)]
        done = []
        for state, frozen in members:
            part = self._part(number, phase, state, frozen, run)
            state = jax.tree.map(jnp.array, state)  # a step donates it
            for batch in part.batches(run):
                state, _ = part.step(state, frozen, batch)
            done.append((state, frozen))
        return done

    def _part(self, number: int, phase: Phase, state: TrainState, frozen: Frozen, run: Batches) -> _Part:
        found = self._parts.get(number)
        if found is not None and _same(found.frozen, frozen) and _same(found.rows, (run.columns, run.labels)):
            return found
        mode: Mode = "off" if self.folder is None else "auto"
        prepared = prepare(self.arm.loss_fn, state, frozen, run, mode=mode, directory=self.folder)
        step = train_step(prepared.loss_fn, phase.tx)
        look = checker(self.arm.loss_fn, state, frozen)
        light, caches, held_out = False, (), self.held_out
        if prepared.split is not None:
            light = prepared.split.report.suffix_flops < LIGHT
            prefix = prepared.split.prefix
            caches = tuple(build(prefix, state, frozen, part, directory=self.folder) for part in held_out)
            held_out = tuple(follow(cache, part) for cache, part in zip(caches, held_out, strict=True))
        if found is not None and found.prepared.loss_fn is prepared.loss_fn:
            programs = found.step, found.together, found.evaluator
            self._compile_seconds += _compilation_of_caches(found)
        else:
            self._compile_seconds += 0.0 if found is None else _compilation(found)
            programs = (
                _Compiled(step, donate_argnums=0),
                _Compiled(jax.vmap(step, in_axes=(0, None, None)), donate_argnums=0),
                _Compiled(eval_step(prepared.loss_fn)),
            )
        rows = run.columns, run.labels
        self._parts[number] = _Part(prepared, frozen, light, *programs, caches, held_out, rows, look)
        return self._parts[number]

    def _scores(self, part: _Part, state: TrainState, frozen: Frozen) -> list[dict[str, float]]:
        whole = freeze(state, frozen)
        return [evaluate(part.evaluator, *whole, batches) for batches in part.held_out]


def _compilation(part: _Part) -> float:
    return part.step.seconds + part.together.seconds + part.evaluator.seconds + _compilation_of_caches(part)


def _compilation_of_caches(part: _Part) -> float:
    own = () if part.prepared.cache is None else (part.prepared.cache,)
    return sum((cache.prefix.seconds for cache in (*own, *part.caches)), 0.0)


def _with_factor(state: TrainState, frozen: Frozen, factor: float) -> tuple[TrainState, Frozen]:
    return state._replace(opt_state=set_factor(state.opt_state, factor)), frozen


def _same(one: PyTree, other: PyTree) -> bool:
    """Whether they have the very same leaves."""
    pairs = jax.tree.leaves(one), jax.tree.leaves(other)
    return len(pairs[0]) == len(pairs[1]) and all(a is b for a, b in zip(*pairs, strict=True))
