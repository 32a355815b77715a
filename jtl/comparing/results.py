"""What a comparison found."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jtl.metrics import interval


class Trial(NamedTuple):
    """One run.

    Attributes:
      arm: its name.
      seed: of head, order and dropout.
      factor: of the learning rates.
      trained: parameters trained in the last phase.
      share: of all parameters.
      chosen: metrics on the examples that choose.
      scores: metrics on the examples that are reported.
      seconds: of training and evaluation, without waiting for compilation; of runs side by side, each one's share.
    """

    arm: str
    seed: int
    factor: float
    trained: int
    share: float
    chosen: Mapping[str, float]
    scores: Mapping[str, float]
    seconds: float


class Row(NamedTuple):
    """An arm at its best factor.

    Attributes:
      arm: its name.
      trained: parameters.
      share: of all parameters.
      factor: the best on the examples that choose, in the mean over seeds.
      scores: on the examples that are reported, one a seed.
      mean: of the scores.
      half: half-width of their 95% t interval; NaN with one seed.
      seconds: of a run.
    """

    arm: str
    trained: int
    share: float
    factor: float
    scores: tuple[float, ...]
    mean: float
    half: float
    seconds: float


class Comparison(NamedTuple):
    """What `compare` found.

    Attributes:
      metric: that is compared.
      higher_is_better: of it.
      trials: every run.
      left_out: (arm, seed) for which there was no time.
      seconds: of everything.
      compile_seconds: of them, waiting for compilation; some of it is done beside training.
    """

    metric: str
    higher_is_better: bool
    trials: tuple[Trial, ...]
    left_out: tuple[tuple[str, int], ...]
    seconds: float
    compile_seconds: float

    @property
    def rows(self) -> tuple[Row, ...]:
        """Each arm at its best factor, by trained parameters."""
        names = dict.fromkeys(trial.arm for trial in self.trials)
        return tuple(sorted((self._row(name) for name in names), key=lambda row: row.trained))

    @property
    def spot(self) -> Row:
        """The sweet spot: the fewest trained parameters within one standard error of the best mean.

        References:
          Breiman et al, Classification and regression trees, 1984 (the rule of one standard error).
        """
        sign = 1 if self.higher_is_better else -1
        best = max(self.rows, key=lambda row: sign * row.mean)
        error = np.std(best.scores, ddof=1) / len(best.scores) ** 0.5 if len(best.scores) > 1 else 0.0
        return next(row for row in self.rows if sign * row.mean >= sign * best.mean - error)

    def _row(self, name: str) -> Row:
        trials = [trial for trial in self.trials if trial.arm == name]
        sign = 1 if self.higher_is_better else -1
        by_factor = {f: [t for t in trials if t.factor == f] for f in dict.fromkeys(t.factor for t in trials)}
        factor = max(by_factor, key=lambda f: sign * np.mean([t.chosen[self.metric] for t in by_factor[f]]))
        chosen = by_factor[factor]
        scores = tuple(trial.scores[self.metric] for trial in chosen)
        seconds = float(np.mean([trial.seconds for trial in trials]))
        return Row(name, chosen[0].trained, chosen[0].share, factor, scores, *interval(scores), seconds)
