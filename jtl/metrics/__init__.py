"""Metrics that add up: each accumulator is a named tuple of sums, so merging two is adding them.

A metric is a function `(outputs, targets, weight) -> accumulator`; `weight` is `[batch]`, 0 for
the filler rows of a padded batch.
"""

from jtl.metrics.classes import (
    F1,
    MacroF1,
    Recalls,
    accuracy,
    balanced_accuracy,
    f1,
    macro_f1,
    multilabel_accuracy,
)
from jtl.metrics.core import Mean, accumulators, compute, interval, mean, merge, scaled
from jtl.metrics.language import Perplexity, perplexity, span_accuracy, token_accuracy
from jtl.metrics.numbers import Correlation, Explained, mean_squared_error, pearson, r_squared

__all__ = [
    "Correlation",
    "Explained",
    "F1",
    "MacroF1",
    "Mean",
    "Perplexity",
    "Recalls",
    "accumulators",
    "accuracy",
    "balanced_accuracy",
    "compute",
    "f1",
    "interval",
    "macro_f1",
    "mean",
    "mean_squared_error",
    "merge",
    "multilabel_accuracy",
    "pearson",
    "perplexity",
    "r_squared",
    "scaled",
    "span_accuracy",
    "token_accuracy",
]
