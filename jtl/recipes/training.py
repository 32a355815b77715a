"""One training run: compile, train, evaluate, and count what it cost."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import jtl
from jtl import tree as jtree
from jtl.data import Batches, Examples, batches, text
from jtl.loop import compiled_eval, compiled_train
from jtl.state import Frozen, TrainState, freeze
from jtl.typing import PyTree


class Outcome(NamedTuple):
    """What a run reached, and what it cost.

    Attributes:
      trained: number of trained parameters.
      state_bytes: bytes of optimizer state.
      gflops: compiled floating-point operations of a step, in 1e9 per example, by XLA's count.
      compile_seconds: tracing and compilation, all shapes.
      seconds: training, without compilation and evaluation.
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
    """A finished run: the trained state, and its outcome."""

    state: TrainState
    frozen: Frozen
    outcome: Outcome


def text_batches(
    tokenizer: Any, examples: Examples, *, max_length: int, max_buckets: int = 3, **settings: Any
) -> tuple[Batches, int]:
    """Batches of token ids padded to length buckets.

    Args:
      tokenizer: a fast tokenizer of Hugging Face.
      examples: labelled texts, in the column `text`.
      max_length: longer texts are cut.
      max_buckets: the most padded lengths, each of which is compiled once.
      **settings: of `jtl.data.pipeline.batches`.

    Returns:
      The batches, and how many texts were cut.
    """
    encoded = text.encode(tokenizer, list(examples.columns["text"]), max_length=max_length)
    buckets = text.buckets(encoded.input_ids.lengths, max_length=max_length, max_buckets=max_buckets)
    columns = {"input_ids": encoded.input_ids}
    return batches(columns, examples.labels, buckets=buckets, **settings), encoded.truncated


def run(
    loss_fn: Any,
    tx: optax.GradientTransformation,
    variables: Mapping[str, PyTree],
    trainable: jtl.Mask,
    train: Batches,
    held_out: Batches,
    *,
    key: jax.Array,
    mesh: Any = None,
    on_step: Callable[[dict[str, Any]], None] = lambda metrics: None,
) -> Run:
    """Train on all batches, then evaluate.

    Args:
      loss_fn: from `jtl.supervised`.
      tx: the optimizer.
      variables: where to start.
      trainable: the mask.
      train: batches to train on.
      held_out: batches to evaluate on.
      key: the random key of the run.
      mesh: the devices to split batches over.
      on_step: called with the metrics of every step.

    Returns:
      The state after the last step, and the outcome.
    """
    state, frozen = jtl.init(variables, tx, trainable=trainable, key=key)
    trained, state_bytes = jtree.size(state.params), jtree.nbytes(state.opt_state)
    started = time.perf_counter()
    gflops = _compile(loss_fn, tx, state, frozen, train, mesh)
    compile_seconds = time.perf_counter() - started
    started = time.perf_counter()
    for report in jtl.fit(loss_fn, tx, state, frozen, train, mesh=mesh):
        on_step(report.metrics)
        state = report.state
    jax.block_until_ready(state.params)
    seconds = time.perf_counter() - started
    scores = jtl.evaluate(compiled_eval(loss_fn), *freeze(state, frozen), held_out, mesh=mesh)
    rate = _examples(train) / seconds
    return Run(state, frozen, Outcome(trained, state_bytes, gflops, compile_seconds, seconds, rate, scores))


def _examples(data: Batches) -> int:
    return data.epochs * len(data.layout.bucket_of_row)


def _compile(loss_fn: Any, tx: Any, state: TrainState, frozen: Frozen, train: Batches, mesh: Any) -> float:
    """Compile every shape that will occur; GFLOP per example of the most frequent one."""
    if mesh is not None:
        state, frozen = jtl.parallel.replicate(state, mesh), jtl.parallel.replicate(frozen, mesh)
    lowered: dict[tuple[int, ...], Any] = {}
    for batch in train:
        shape = np.shape(next(iter(batch.values())))[:2]
        if shape not in lowered:
            placed = batch if mesh is None else jtl.parallel.shard_batch(batch, mesh)
            lowered[shape] = compiled_train(loss_fn, tx).lower(state, frozen, placed)
        if len(lowered) == len(train.shapes):
            break
    with ThreadPoolExecutor() as pool:  # XLA compiles one program mostly on one core
        compiled = dict(zip(lowered, pool.map(lambda step: step.compile(), lowered.values()), strict=True))
    frequent = max(train.shapes, key=lambda shape: train.shapes[shape])
    return compiled[frequent].cost_analysis()["flops"] / frequent[0] / 1e9


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
