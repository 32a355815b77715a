"""jtl: JAX transfer learning. A pretrained model is a pure function and a pytree; one mask decides the rest.

Names are imported when they are first used, so that `import jtl` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jtl import augment as augment
    from jtl import boundary as boundary
    from jtl import cache as cache
    from jtl import comparing as comparing
    from jtl import data as data
    from jtl import errors as errors
    from jtl import generation as generation
    from jtl import heads as heads
    from jtl import losses as losses
    from jtl import masks as masks
    from jtl import metrics as metrics
    from jtl import mixout as mixout
    from jtl import models as models
    from jtl import parallel as parallel
    from jtl import peft as peft
    from jtl import precision as precision
    from jtl import rates as rates
    from jtl import report as report
    from jtl import rules as rules
    from jtl import runs as runs
    from jtl import soups as soups
    from jtl import strategies as strategies
    from jtl import surgery as surgery
    from jtl import transforms as transforms
    from jtl import tree as tree
    from jtl import weights as weights
    from jtl.auditing import Audit as Audit
    from jtl.auditing import audit as audit
    from jtl.boundary import Split as Split
    from jtl.boundary import split as split
    from jtl.comparing import Arm as Arm
    from jtl.comparing import Comparison as Comparison
    from jtl.comparing import compare as compare
    from jtl.compiling import keep_compiled as keep_compiled
    from jtl.export import save as save
    from jtl.generation import generate as generate
    from jtl.interop import from_function as from_function
    from jtl.interop import from_nnx as from_nnx
    from jtl.loop import Report as Report
    from jtl.loop import evaluate as evaluate
    from jtl.loop import fit as fit
    from jtl.masks import Mask as Mask
    from jtl.masks import everything as everything
    from jtl.masks import select as select
    from jtl.masks import where as where
    from jtl.memory import MemoryEstimate as MemoryEstimate
    from jtl.memory import memory_estimate as memory_estimate
    from jtl.objective import supervised as supervised
    from jtl.overfitting import overfit_warning as overfit_warning
    from jtl.overfitting import watch_overfit as watch_overfit
    from jtl.pairs import contrastive as contrastive
    from jtl.precision import mixed_precision as mixed_precision
    from jtl.pretrained import load as load
    from jtl.rates import RangeTest as RangeTest
    from jtl.rates import find_rate as find_rate
    from jtl.rules import label as label
    from jtl.runs import Interrupted as Interrupted
    from jtl.runs import Run as Run
    from jtl.runs import graft as graft
    from jtl.schedule import Phase as Phase
    from jtl.schedule import Plateau as Plateau
    from jtl.schedule import Progress as Progress
    from jtl.schedule import Strategy as Strategy
    from jtl.state import Frozen as Frozen
    from jtl.state import TrainState as TrainState
    from jtl.state import change as change
    from jtl.state import init as init
    from jtl.state import variables as variables
    from jtl.step import Aux as Aux
    from jtl.step import eval_step as eval_step
    from jtl.step import finetune as finetune
    from jtl.step import train_step as train_step
    from jtl.stopping import Best as Best
    from jtl.stopping import early_stopping as early_stopping
    from jtl.sweeps import Stopping as Stopping
    from jtl.sweeps import sweep as sweep
    from jtl.tree import combine as combine
    from jtl.tree import partition as partition

__version__ = "0.1.0"

_MODULES = (
    "augment",
    "boundary",
    "cache",
    "comparing",
    "data",
    "errors",
    "generation",
    "heads",
    "losses",
    "masks",
    "metrics",
    "mixout",
    "models",
    "parallel",
    "peft",
    "precision",
    "rates",
    "report",
    "rules",
    "runs",
    "soups",
    "strategies",
    "surgery",
    "transforms",
    "tree",
    "weights",
)

_NAMES = {
    "Audit": "auditing",
    "audit": "auditing",
    "Arm": "comparing",
    "Comparison": "comparing",
    "compare": "comparing",
    "Aux": "step",
    "Best": "stopping",
    "Frozen": "state",
    "Mask": "masks",
    "Phase": "schedule",
    "Plateau": "schedule",
    "Progress": "schedule",
    "Interrupted": "runs",
    "RangeTest": "rates",
    "Report": "loop",
    "Run": "runs",
    "Strategy": "schedule",
    "TrainState": "state",
    "change": "state",
    "combine": "tree",
    "contrastive": "pairs",
    "early_stopping": "stopping",
    "eval_step": "step",
    "evaluate": "loop",
    "everything": "masks",
    "find_rate": "rates",
    "finetune": "step",
    "fit": "loop",
    "from_function": "interop",
    "from_nnx": "interop",
    "generate": "generation",
    "graft": "runs",
    "init": "state",
    "keep_compiled": "compiling",
    "label": "rules",
    "load": "pretrained",
    "memory_estimate": "memory",
    "MemoryEstimate": "memory",
    "mixed_precision": "precision",
    "overfit_warning": "overfitting",
    "partition": "tree",
    "save": "export",
    "select": "masks",
    "Split": "boundary",
    "split": "boundary",
    "Stopping": "sweeps",
    "supervised": "objective",
    "sweep": "sweeps",
    "train_step": "step",
    "variables": "state",
    "watch_overfit": "overfitting",
    "where": "masks",
}

__all__ = [*_MODULES, *_NAMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"jtl.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"jtl.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'jtl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
