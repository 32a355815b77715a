"""`find_rate`: the learning-rate range test, and what reads a rate off its curve."""

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jtl import plots
from jtl.errors import ConfigError, DataError
from jtl.state import Frozen, TrainState, standard_promotion
from jtl.step import LossFn, checker, train_step
from jtl.typing import Batch

MakeTx = Callable[..., optax.GradientTransformation]

SMOOTHING = 0.98
"""How much of the average loss before stays in the next one."""

DIVERGED = 4.0
"""How many times the best smoothed loss ends the test."""

_TAIL = 5
"""Points at the end that no suggestion looks at: there the loss diverges."""

_INTERVAL = 15
"""The points that `slide` looks across."""


class RangeTest(NamedTuple):
    """What a range test saw: a point for each update whose loss was finite.

    Attributes:
      rates: `[n]`, rising exponentially.
      losses: `[n]`, of each batch, before the update with its rate.
      smoothed: `[n]`, their running average.
      suggestions: learning rates by the name of what suggests them: `valley`, `slide`, `minimum`, `steep`. `slide`
        is left out where the curve is too short for it.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    suggestions: dict[str, float]

    def plot(self, path: str | Path) -> Path:
        """Write a picture of the curve and of the suggestions.

        Args:
          path: of the file; its suffix is the format, such as `.png` or `.svg`.

        Returns:
          The path.

        Raises:
          MissingExtraError: matplotlib is not installed.
        """
        figure = plots.figure(7.0, 4.0)
        axes = figure.add_subplot(xscale="log", xlabel="learning rate", ylabel="loss")
        axes.plot(self.rates, self.losses, color="0.8", label="loss of a batch")
        axes.plot(self.rates, self.smoothed, color="C0", label="smoothed")
        # What diverges at the end would flatten all that matters.
        low, high = float(self.smoothed.min()), float(self.smoothed[: -_TAIL or None].max())
        axes.set_ylim(low - 0.1 * (high - low or 1), high + 0.3 * (high - low or 1))
        for number, (name, rate) in enumerate(self.suggestions.items(), 1):
            axes.axvline(rate, color=f"C{number}", linestyle="--", label=f"{name}: {rate:.2g}")
        axes.legend()
        figure.savefig(path)
        return Path(path)


def find_rate(
    loss_fn: LossFn,
    make_tx: MakeTx,
    state: TrainState,
    frozen: Frozen,
    batches: Iterable[Batch],
    *,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
) -> RangeTest:
    """The learning-rate range test: train while the rate rises exponentially, and look where the loss falls.

    It trains a copy of the trained leaves, one update a rate. It ends early where the smoothed loss has risen to 4
    times its least value, or the loss is not finite.

        found = jtl.find_rate(loss_fn, optax.adamw, state, frozen, batches)
        tx = optax.adamw(found.suggestions["valley"])

    The frozen half is run only once with a cache:

        prepared = jtl.cache.prepare(loss_fn, state, frozen, batches)
        found = jtl.find_rate(prepared.loss_fn, optax.adamw, state, frozen, prepared.batches)

    Args:
      loss_fn: the loss.
      make_tx: `make_tx(learning_rate=rate)` gives the transform, as for `jtl.sweep`. It is called while the step is
        traced, with a scalar, so that all rates share one compilation.
      state: where to start; it stays as it is. Its optimizer state is not used.
      frozen: the frozen half.
      batches: gone through again where there are fewer than `steps`, if they can be.
      low: the first rate.
      high: the last rate.
      steps: the number of rates.

    Returns:
      The curve, and suggestions: see `suggest`.

    Raises:
      ConfigError: rates that do not rise, fewer than 10 steps, or a loss that diverges before there is a curve.
      DataError: there is no batch, or one that the loss cannot take.

    References:
      Smith, Cyclical learning rates for training neural networks, WACV 2017 (arXiv 1506.01186).
      Howard and Gugger, fastai, 2020 (arXiv 2002.04688), for the end of the test and the suggestions.
    """
    if not 0 < low < high < np.inf:
        raise ConfigError(f"low={low}, high={high}: expected 0 < low < high")
    if steps < 10:
        raise ConfigError(f"steps={steps}: expected 10 or more, or there is no curve to read a rate off")
    check, step = checker(loss_fn, state, frozen), _compiled_step(loss_fn, make_tx)
    rates, losses, best = np.geomspace(low, high, steps), [], np.inf
    current = _start(make_tx)(jax.tree.map(jnp.array, state._replace(opt_state=())), jnp.float32(low))
    for rate, batch in zip(rates, _again(batches), strict=False):
        check(batch)
        current, metrics = step(current, jnp.float32(rate), frozen, batch)
        loss = float(metrics["loss"])
        if not np.isfinite(loss):
            break
        losses.append(loss)
        average = smooth(losses)[-1]
        best = min(best, average)
        if average > DIVERGED * best:
            break
    else:
        if not losses:
            raise DataError("there is no batch to train on: the data set is empty, or smaller than one batch")
    count = len(losses)
    first = steps // 10
    if count < first + _TAIL + 2:
        raise ConfigError(
            f"the range test ended after {count} of {steps} updates, at the rate {rates[max(count - 1, 0)]:.2g}, too "
            f"early to read a rate off: lower low={low:g}, give more batches, or see whether the loss is finite at all"
        )
    smoothed = smooth(losses)
    suggestions = suggest(rates[first : count - _TAIL], smoothed[first : count - _TAIL])
    return RangeTest(rates[:count], np.asarray(losses), smoothed, suggestions)


def smooth(losses: Iterable[float]) -> np.ndarray:
    """The running average of losses, without a bias to zero at its beginning.

    Args:
      losses: `[n]`.

    Returns:
      `[n]` float64.

    >>> smooth([2.0, 2.0]).round(6).tolist()
    [2.0, 2.0]
    """
    total, averages = 0.0, []
    for number, loss in enumerate(losses, 1):
        total = SMOOTHING * total + (1 - SMOOTHING) * loss
        averages.append(total / (1 - SMOOTHING**number))
    return np.asarray(averages)


def suggest(rates: np.ndarray, losses: np.ndarray) -> dict[str, float]:
    """All suggestions for a curve, by name; without `slide` where it has fewer than 16 points.

    Args:
      rates: `[n]`, rising.
      losses: `[n]`, smoothed; the beginning, where nothing is learnt, and the end, where they diverge, cut off.
    """
    found = {"valley": valley(rates, losses)}
    if len(rates) > _INTERVAL:
        found["slide"] = slide(rates, losses)
    return {**found, "minimum": minimum(rates, losses), "steep": steep(rates, losses)}


def valley(rates: np.ndarray, losses: np.ndarray) -> float:
    """The rate in the middle of the longest descent: fastai's default.

    The longest subsequence of falling losses, of those equally long the one that ends first, counts as if its points
    stood side by side before its end.

    Args:
      rates: `[n]`, rising.
      losses: `[n]`, smoothed.

    References:
      Howard and Gugger, fastai, 2020 (arXiv 2002.04688).
    """
    losses = np.asarray(losses)
    length = np.ones(len(losses), int)
    for i in range(1, len(losses)):
        length[i] += length[:i].max(where=losses[i] < losses[:i], initial=0)
    end = int(length.argmax())
    start = end - int(length[end]) if end else 0
    third = (end - start) / 3
    return float(rates[max(start + int(third) + int(third / 2), 0)])


def slide(rates: np.ndarray, losses: np.ndarray, *, threshold: float = 0.005) -> float:
    """The rate left of the end by an interval that slides down until the slope is alike on both sides of it.

    Args:
      rates: `[n]`, rising; n at least 16.
      losses: `[n]`, smoothed.
      threshold: how alike, in the loss's units a point.

    Raises:
      ConfigError: the curve is shorter than the interval.

    References:
      Howard and Gugger, fastai, 2020 (arXiv 2002.04688), after ESRI's interval slide rule.
    """
    last = len(rates) - 1 - _INTERVAL
    if last < 0:
        raise ConfigError(f"slide needs {_INTERVAL + 1} points or more, this curve has {len(rates)}")
    slopes = np.gradient(np.asarray(losses))
    alike = np.abs(slopes[_INTERVAL:] - slopes[:-_INTERVAL]) <= threshold
    # From the right, the interval before the first one whose ends are alike; without one, the leftmost.
    stops = np.flatnonzero(alike)
    return float(rates[min(stops[-1] + 1, last) if stops.size else 0])


def minimum(rates: np.ndarray, losses: np.ndarray) -> float:
    """A tenth of the rate with the least loss.

    Args:
      rates: `[n]`, rising.
      losses: `[n]`, smoothed.
    """
    return float(rates[int(np.argmin(losses))]) / 10


def steep(rates: np.ndarray, losses: np.ndarray) -> float:
    """The rate from which the loss falls fastest, over the logarithm of the rate.

    Args:
      rates: `[n]`, rising.
      losses: `[n]`, smoothed.
    """
    return float(rates[int(np.argmin(np.diff(losses) / np.diff(np.log(rates))))])


def _again(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Batches, over and over if they can be."""
    more = True
    while more:
        more = False
        for batch in batches:
            more = True
            yield batch


def _start(make_tx: MakeTx) -> Any:
    """The state with its optimizer state; jitted, so that its leaves are buffers of their own."""

    def start(state: TrainState, rate: jax.Array) -> TrainState:
        with standard_promotion():
            return state._replace(opt_state=make_tx(learning_rate=rate).init(state.params))

    return jax.jit(start)


@functools.lru_cache(maxsize=16)
def _compiled_step(loss_fn: LossFn, make_tx: MakeTx) -> Any:
    """The same objects give the same step, so that a second test compiles nothing again."""

    def step(state: TrainState, rate: jax.Array, frozen: Frozen, batch: Batch) -> Any:
        return train_step(loss_fn, make_tx(learning_rate=rate))(state, frozen, batch)

    return jax.jit(step, donate_argnums=0)
