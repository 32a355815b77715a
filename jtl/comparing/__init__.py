"""Strategies side by side: which one, how deep, at which learning rate."""

from jtl.comparing.comparison import compare
from jtl.comparing.results import Comparison, Row, Trial
from jtl.comparing.runner import Arm

__all__ = ["Arm", "Comparison", "Row", "Trial", "compare"]
