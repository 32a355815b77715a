"""What a model learns of labelled examples: its head, its loss, and what it is measured by."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

import jtl
from jtl.data import Examples
from jtl.typing import Variables


class Goal(NamedTuple):
    """What is learnt.

    Attributes:
      head: a new head with an output for each class, or one for numbers.
      loss: of single examples.
      metrics: by name.
      centre: what is taken from numbers before they are learnt.
      scale: what they are divided by then.
    """

    head: nn.Module
    loss: Any
    metrics: Mapping[str, Any]
    centre: float = 0.0
    scale: float = 1.0

    def learnt(self, examples: Examples) -> Examples:
        """Examples with numbers of mean 0 and standard deviation 1, as learning rates suit them; or as they are."""
        if examples.task != "regression":
            return examples
        labels = (examples.labels.astype(np.float64) - self.centre) / self.scale
        return examples._replace(labels=labels.astype(np.float32))

    def rounded(self) -> str:
        """What a user should know of numbers that hardly differ beside their size, or ""."""
        step = float(np.spacing(np.float32(abs(self.centre))))
        if self.scale > 16 * step:
            return ""
        return (
            f"numbers about {self.centre:g} that vary by {self.scale:g} are learnt and scored as they are, but a saved "
            f"model tells them in float32, in steps of {step:g}: take a constant from the labels"
        )

    def told(self, variables: Variables) -> dict[str, Any]:
        """The variables of the model that tells the numbers themselves: its head undoes what `learnt` did."""
        if self.centre == 0 and self.scale == 1:
            return dict(variables)
        head = dict(variables["params"]["head"])
        head["kernel"] = head["kernel"] * self.scale
        head["bias"] = head["bias"] * self.scale + self.centre
        return {**variables, "params": {**variables["params"], "head": head}}


def goal(train: Examples) -> Goal:
    """The goal that examples to train on call for.

    Args:
      train: what is trained on.
    """
    match train.task:
        case "regression":
            return _numbers(train)
        case "multilabel":
            metrics = {
                "all labels right": jtl.metrics.multilabel_accuracy,
                "F1": jtl.metrics.f1,
                "macro F1": jtl.metrics.macro_f1,
            }
            return Goal(jtl.heads.Linear(len(train.classes)), jtl.losses.binary_cross_entropy, metrics)
    metrics = {"accuracy": jtl.metrics.accuracy, "balanced accuracy": jtl.metrics.balanced_accuracy}
    return Goal(jtl.heads.classifier(len(train.classes)), jtl.losses.cross_entropy, metrics)


def _numbers(train: Examples) -> Goal:
    labels = train.labels.astype(np.float64)
    centre, scale = float(labels.mean()), float(labels.std())

    def squared_error(outputs: jax.Array, targets: jax.Array, weight: jax.Array) -> Any:
        return jtl.metrics.mean_squared_error(outputs * scale, targets * scale, weight)

    metrics = {
        "mean squared error": squared_error,
        "R squared": jtl.metrics.r_squared,
        "correlation": jtl.metrics.pearson,
    }
    return Goal(jtl.heads.regressor(), jtl.losses.squared_error, metrics, centre, scale)
