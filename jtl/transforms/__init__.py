"""Optax transforms that transfer learning asks for. Like any other, they see trained leaves alone."""

from jtl.transforms.anchors import PullState, pull_to_start
from jtl.transforms.averages import AverageState, averaged, exponential_average, stochastic_average
from jtl.transforms.guarding import GuardState, LossWindow, guard
from jtl.transforms.joining import JoinedState, joining
from jtl.transforms.scaling import FactorState, scale_by_factor, scale_by_rules, set_factor

__all__ = [
    "AverageState",
    "FactorState",
    "GuardState",
    "JoinedState",
    "LossWindow",
    "PullState",
    "averaged",
    "exponential_average",
    "guard",
    "joining",
    "pull_to_start",
    "scale_by_factor",
    "scale_by_rules",
    "set_factor",
    "stochastic_average",
]
