"""Losses of single examples: pure functions `(outputs, targets) -> [batch]`.

The mean over a batch, and the weights of its examples, are `jtl.supervised`'s business. A loss may be an object with
more to say, as `weighted` and `per_token` make:

    weigh(targets) -> [batch]         what each example counts in the mean, where that is not 1
    check(output_shape, targets)      on the host: `DataError` for targets that it would turn into nonsense

`check_targets` is what each loss demands of its targets, decided on the host; `check_entries` what all demand of a
batch.
"""

from jtl.losses.checks import check_entries, check_targets
from jtl.losses.examples import (
    Loss,
    binary_cross_entropy,
    binary_focal,
    cross_entropy,
    focal,
    span_cross_entropy,
    squared_error,
)
from jtl.losses.tokens import PerToken, per_token
from jtl.losses.weights import Weighted, class_weights, weighted

__all__ = [
    "Loss",
    "PerToken",
    "Weighted",
    "binary_cross_entropy",
    "binary_focal",
    "check_entries",
    "check_targets",
    "class_weights",
    "cross_entropy",
    "focal",
    "per_token",
    "span_cross_entropy",
    "squared_error",
    "weighted",
]
