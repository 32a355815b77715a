"""Runs that go on after whatever ended them: a folder with checkpoints, metrics, and what the run is."""

from jtl.runs.graft import graft
from jtl.runs.session import Session, metrics, opened
from jtl.runs.settings import Run, check
from jtl.runs.signals import EXIT, Interrupted
from jtl.runs.steps import Restored, Steps

__all__ = ["EXIT", "Interrupted", "Restored", "Run", "Session", "Steps", "check", "graft", "metrics", "opened"]
