"""A progress bar for jobs of more than two seconds."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

OnStep = Callable[[dict[str, Any]], None]


@contextlib.contextmanager
def steps(console: Console) -> Iterator[Callable[[str, int], OnStep]]:
    """One bar at a time, for one run after another.

    Args:
      console: where to draw; nothing is drawn where it is not a terminal.

    Yields:
      `start(description, total) -> on_step`: a bar takes the place of the one before it, and
      `on_step(metrics)` moves it on.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:

        def start(description: str, total: int) -> OnStep:
            for task in bars.task_ids:
                bars.remove_task(task)
            task = bars.add_task(description, total=total)
            return lambda metrics: bars.advance(task)

        yield start
