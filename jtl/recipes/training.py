"""One training run: compile, train, evaluate, and count what it cost."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import optax

import jtl
from jtl import augment as jaugment
from jtl import tree as jtree
from jtl.cache import Mode, Prepared, prepare
from jtl.data import Batches, Examples, picture_batches, plans
from jtl.errors import ConfigError
from jtl.loop import compiled_eval, compiled_train
from jtl.models.family import ImageInput
from jtl.recipes.settings import AugmentName
from jtl.recipes.texts import Windowed
from jtl.runs import Session
from jtl.state import Frozen, TrainState, freeze
from jtl.typing import PyTree


class Outcome(NamedTuple):
    """What a run reached, and what it cost.

    Attributes:
      trained: number of trained parameters.
      state_bytes: bytes of optimizer state.
      gflops: compiled floating-point operations of the run, in 1e9 per example and epoch, by XLA's count at the
        most frequent length. What is computed once and cached is spread over the epochs.
      compile_seconds: tracing and compilation, all shapes.
      seconds: training, the filling of a cache included, without compilation and evaluation.
      examples_per_second: real examples, without compilation.
      scores: the metrics on the held-out examples.
    """

    trained: int
    state_bytes: int
    gflops: float
    compile_seconds: float
    seconds: float
    examples_per_second: float
    scores: Mapping[str, float]


class Run(NamedTuple):
    """A finished run: the trained state, its outcome, and what was said of a cache."""

    state: TrainState
    frozen: Frozen
    outcome: Outcome
    why: str


def training_pictures(
    examples: Examples, spec: ImageInput, augment: AugmentName = "none", **settings: Any
) -> tuple[Batches, jaugment.Augmentation | None]:
    """Batches of pictures to train on, and what is to be done to them on the device.

    Args:
      examples: labelled pictures, in the column `image`.
      spec: what the model takes.
      augment: "flip"; "crop-flip", for a random part of at least a quarter of the picture as well; "randaugment",
        for RandAugment after both.
      **settings: of `jtl.data.batches`.

    Returns:
      The batches, and an augmentation that ends with their normalisation; None with "none", where they are
      normalised already.
    """
    if augment == "none":
        return picture_batches(examples, spec, **settings), None
    steps: list[jaugment.Augmentation] = [jaugment.flip()]
    taken = spec
    if augment != "flip":
        method = spec.interpolation if spec.interpolation in ("bilinear", "bicubic") else "bilinear"
        steps.insert(0, jaugment.random_resized_crop(spec.size, scale=(0.25, 1.0), interpolation=method))
        taken = _with_margin(spec)
    if augment == "randaugment":
        steps.append(jaugment.rand_augment())
    data = picture_batches(examples, taken, normalized=False, **settings)
    return data, jaugment.compose(*steps, jaugment.normalize(spec))


def _with_margin(spec: ImageInput) -> ImageInput:
    """The same, before the crop to the centre, for random crops to be taken from."""
    if spec.resize == "none":
        return spec
    share = 8 / 7 if spec.resize == "exact" or not spec.resize_to else max(1.0, spec.resize_to / min(spec.size))
    return dataclasses.replace(spec, size=(round(spec.size[0] * share), round(spec.size[1] * share)))


def run(
    loss_fn: Any,
    strategy: jtl.Strategy,
    variables: Mapping[str, PyTree],
    train: Batches,
    held_out: Batches | Windowed,
    *,
    key: jax.Array,
    mesh: Any = None,
    cache: Mode = "auto",
    augment: jaugment.Augmentation | None = None,
    on_step: Callable[[dict[str, Any]], None] = lambda metrics: None,
    session: Session | None = None,
) -> Run:
    """Train on all batches, or those that an earlier session left, then evaluate.

    Args:
      loss_fn: from `jtl.supervised`.
      strategy: what is trained, and how; its phases last for numbers of updates.
      variables: where to start.
      train: batches to train on.
      held_out: batches to evaluate on, or the windows of texts.
      key: the random key of the run.
      mesh: the devices to split batches over.
      cache: as in `jtl.fit`; there is none with an augmentation.
      augment: of the pictures of every batch to train on, with keys that follow from `key`.
      on_step: called with the metrics of every step.
      session: of a run in a folder, which goes on from where it is.

    Returns:
      The state after the last step, and the outcome, with the bytes and the trained leaves of the last phase; what it
      cost is what this session did.

    Raises:
      ConfigError: `cache` is "require" with an augmentation, or the run is too short for the strategy; or as
        `jtl.fit` with a run.
    """
    if augment is not None:
        check_cache(cache)
    parts = _parts(strategy, train)
    state, frozen = jtl.init(variables, strategy, key=key)
    if mesh is not None:
        jtl.parallel.shard_batch(next(iter(train)), mesh)  # a size that does not fit is refused before any work
    data_key = jax.random.split(key, 3)[2]  # a step splits its key in two
    first = begun = 0
    if session is not None:
        place = session.enter(strategy, state, frozen, train, augmented=augment is not None)
        state, frozen, first = place.state, place.frozen, place.progress.phase if place.progress else 0
        begun = int(state.step)
    costs, steps, why = [_Cost(0.0, 0.0, 0.0)], [0], ""
    for number, (phase, part) in list(enumerate(parts))[first:]:
        if number > first:
            state, frozen = jtl.change(state, frozen, phase)
        progress, part = jtl.Progress(number, part.start), part.at(max(part.start, train.start + begun))
        if not len(part):
            continue
        started = time.perf_counter()
        mode = cache if session is None else session.cache(cache, progress)
        prepared = _prepared(loss_fn, state, frozen, part, mode, augment, data_key)
        if session is not None:
            session.cached(prepared.cache is not None)
        after = None if session is None else functools.partial(_after, session, progress, train.start + len(train))
        why = why or prepared.why
        state, cost = _phase(prepared, phase.tx, state, frozen, part, mesh, on_step, started, after)
        costs.append(cost)
        steps.append(len(part))
    scores = _scores(loss_fn, *freeze(state, frozen), held_out, mesh)
    seconds = sum(cost.seconds for cost in costs)
    outcome = Outcome(
        trained=jtree.size(state.params),
        state_bytes=jtree.nbytes(state.opt_state),
        gflops=sum(cost.gflops * count for cost, count in zip(costs, steps, strict=True)) / max(1, sum(steps)),
        compile_seconds=sum(cost.compile_seconds for cost in costs),
        seconds=seconds,
        examples_per_second=_examples(train) * sum(steps) / len(train) / seconds if seconds else 0.0,
        scores=scores,
    )
    return Run(state, frozen, outcome, why)


def _after(session: Session, progress: jtl.Progress, end: int, report: jtl.Report) -> None:
    session.after(report._replace(progress=progress), last=report.step == end)


def _scores(loss_fn: Any, state: TrainState, frozen: Frozen, held_out: Batches | Windowed, mesh: Any) -> Any:
    if isinstance(held_out, Windowed):
        return held_out.scores(loss_fn, state, frozen, mesh=mesh)
    return jtl.evaluate(compiled_eval(loss_fn), state, frozen, held_out, mesh=mesh)


class _Cost(NamedTuple):
    """What a phase took; GFLOP per example."""

    gflops: float
    compile_seconds: float
    seconds: float


def _parts(strategy: jtl.Strategy, train: Batches) -> list[tuple[jtl.Phase, Batches]]:
    """The batches of each phase."""
    parts, start = [], train.start
    for phase in strategy.phases:
        if isinstance(phase.until, jtl.Plateau):
            raise ConfigError(f"{strategy.name!r} waits for a plateau, which only jtl.fit does")
        stop = train.total if phase.until is None else start + phase.until
        if stop > train.total or start >= train.total:
            raise ConfigError(
                f"{strategy.name!r} has {len(strategy.phases)} phases, and the run {len(train)} steps; "
                "give it more epochs, or shorter phases"
            )
        parts.append((phase, train.at(start).until(stop)))
        start = stop
    return parts


def _prepared(
    loss_fn: Any, state: TrainState, frozen: Frozen, part: Batches, cache: Mode, augment: Any, key: jax.Array
) -> Prepared:
    if augment is None:
        return prepare(loss_fn, state, frozen, part, mode=cache)
    why = "no cache: the pictures are augmented anew in each epoch" if cache == "auto" else ""
    return Prepared(loss_fn, jaugment.augmented(part, augment, key), None, why)


def _phase(
    prepared: Prepared,
    tx: optax.GradientTransformation,
    state: TrainState,
    frozen: Frozen,
    part: Batches,
    mesh: Any,
    on_step: Callable[[dict[str, Any]], None],
    started: float,
    after: Callable[[jtl.Report], None] | None,
) -> tuple[TrainState, _Cost]:
    """Compile, then train; filling the cache is part of the training that it saves."""
    filled = time.perf_counter()
    gflops = _compile(prepared, tx, state, frozen, part, mesh)
    compiled = time.perf_counter()
    for report in jtl.fit(prepared.loss_fn, tx, state, frozen, prepared.batches, mesh=mesh, cache="off"):
        on_step(report.metrics)
        state = report.state
        if after is not None:
            after(report)
    jax.block_until_ready(state.params)
    done = time.perf_counter()
    once = prepared.cache.prefix.seconds if prepared.cache else 0.0
    return state, _Cost(gflops, compiled - filled + once, done - compiled + filled - started - once)


def check_cache(cache: Mode) -> None:
    """Refuse to require a cache of pictures that are augmented.

    Raises:
      ConfigError: `cache` is "require".
    """
    if cache == "require":
        raise ConfigError(
            "cache='require' with an augmentation: a cache holds what is computed of each picture once, and "
            "augmented pictures differ in each epoch; pass cache 'auto' or 'off', or augment 'none'"
        )


def _examples(data: Batches) -> int:
    return data.epochs * len(data.layout.bucket_of_row)


def _compile(prepared: Prepared, tx: Any, state: TrainState, frozen: Frozen, train: Batches, mesh: Any) -> float:
    """Compile every shape that will occur; GFLOP per example and epoch of the most frequent one."""
    if mesh is not None:
        state, frozen = jtl.parallel.replicate(state, mesh), jtl.parallel.replicate(frozen, mesh)
    lowered: dict[tuple[int, ...], Any] = {}
    for batch, step in zip(prepared.batches, range(train.start, train.start + len(train)), strict=False):
        shape = _shape(train, step)
        if shape not in lowered:
            placed = batch if mesh is None else jtl.parallel.shard_batch(batch, mesh)
            lowered[shape] = compiled_train(prepared.loss_fn, tx).lower(state, frozen, placed)
        if len(lowered) == len(train.shapes):
            break
    with ThreadPoolExecutor() as pool:  # XLA compiles one program mostly on one core
        compiled = dict(zip(lowered, pool.map(lambda step: step.compile(), lowered.values()), strict=True))
    frequent = max(train.shapes, key=lambda shape: train.shapes[shape])
    flops = compiled[frequent].cost_analysis()["flops"]
    if prepared.cache is not None:
        flops += prepared.cache.prefix.flops_at(frequent) * train.steps_per_epoch / len(train)
    return flops / frequent[0] / 1e9


def _shape(run: Batches, step: int) -> tuple[int, ...]:
    """The leading shape of a batch of a run, as `run.shapes` has it."""
    plan = run.plan(step)
    rows = len(plans.local(run.layout, plan, run.shard)[1])
    return (rows, plan.length) if plan.length else (rows,)


@functools.lru_cache(maxsize=32)  # the same object for the same numbers, so that the same compiled step
def optimizer(peak: float, steps: int) -> optax.GradientTransformation:
    """AdamW behind a clip, on the learning rates of `schedule`.

    Args:
      peak: the highest learning rate.
      steps: of the whole run.
    """
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule(peak, steps)))


def schedule(peak: float, steps: int, warmup: float = 0.1) -> optax.Schedule:
    """Linear warm-up over a share of the steps, then linear decay to zero.

    Args:
      peak: the highest learning rate.
      steps: of the whole run.
      warmup: share of the steps.
    """
    rise = max(1, round(warmup * steps))
    return optax.schedules.join_schedules(
        [
            optax.schedules.linear_schedule(0.0, peak, rise),
            optax.schedules.linear_schedule(peak, 0.0, max(1, steps - rise)),
        ],
        [rise],
    )
