"""The freeze boundary: what a loss computes that no trained leaf can change, and what it leaves to train."""

from jtl.boundary.report import SplitReport, Stored
from jtl.boundary.split import Prefix, Split, Suffix, split

__all__ = ["Prefix", "Split", "SplitReport", "Stored", "Suffix", "split"]
