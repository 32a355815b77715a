"""What the benchmarks share: arms timed in turns, tables printed and written."""

import contextlib
import csv
import datetime
import importlib.metadata
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

VERSIONS = ("jax", "flax", "optax", "torch", "transformers")


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of a call that waits for its result."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def medians(
    arms: Mapping[str, Callable[[], Any]], *, rounds: int, warm: int = 1, settle: int = 0, calls: int = 1
) -> dict[str, float]:
    """Median seconds of a call of each arm, in turns, so that none has the quiet minutes of the machine.

    Args:
      arms: what is timed, by name.
      rounds: how often each has its turn.
      warm: calls of each before all.
      settle: calls at the start of a turn that do not count: the threads of the arm before spin for a while.
      calls: of a turn that count.
    """
    for run in arms.values():
        for _ in range(warm):
            run()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, run in arms.items():
            for _ in range(settle):
                run()
            times[name].extend(seconds(run) for _ in range(calls))
    return {name: statistics.median(values) for name, values in times.items()}


@contextlib.contextmanager
def process(make: Callable[..., Callable[[], Any]], *arguments: Any, **settings: Any) -> Iterator[Callable[[], Any]]:
    """An arm in a process of its own, so that neither its threads nor its memory are the other arms'.

    Args:
      make: makes the run, in the process; a function of a module.
      *arguments: of `make`.
      **settings: of `make`.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    worker = context.Process(target=_serve, args=(there, make, arguments, settings), daemon=True)
    worker.start()

    def run() -> None:
        here.send(True)
        if here.recv() is not None:
            raise RuntimeError(f"{make.__name__}{arguments} failed in its process")

    try:
        yield run
    finally:
        worker.terminate()
        worker.join()


def _serve(pipe: Any, make: Callable[..., Callable[[], Any]], arguments: Any, settings: Any) -> None:
    failed = "failed"
    try:
        run = make(*arguments, **settings)
        while pipe.recv():
            run()
            pipe.send(None)
    except BaseException:
        pipe.send(failed)
        raise


def show(row: Mapping[str, Any]) -> None:
    """Print a row as soon as it is known."""
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def write(out: Path | None, table: str, rows: Sequence[Mapping[str, Any]], *packages: str) -> None:
    """Write a table as CSV, with the versions of packages in each row.

    The file's name has device, jax and date: `<table>-<device>-jax<version>-<date>.csv`.
    """
    if out is None:
        return
    device = jax.devices()[0].device_kind.replace(" ", "-").lower()
    versions = {name: importlib.metadata.version(name) for name in packages or VERSIONS if _installed(name)}
    today = datetime.datetime.now(datetime.UTC).date()
    path = out / f"{table}-{device}-jax{jax.__version__}-{today}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *versions])
        writer.writeheader()
        writer.writerows({**row, **versions} for row in rows)


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
