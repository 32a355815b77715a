"""What saving costs a run: the quickstart's model, all of it trained, with and without a run's folder.

Command: PYTHONPATH=. python benchmarks/save_stall.py --out benchmarks/results

MiniLM's size with random weights, batches of 32 texts of 40 tokens, AdamW behind a clip; the state that is saved is
three times the model. Two arms take turns, in stretches from one save to the next, which is half of `every`: the loop
of `jtl.fit`, and the same with `run=`. "stall" is what the loop waits for, within a step, for a save to begin; "whole"
compares the medians of the stretches, so that the work of the threads that write is in it. On two cores those threads
take what XLA would use.

Bar: the stall at most 1% of the time of the steps.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from memory_estimate import pretrained
from reporting import show, write

import jtl
from jtl import runs

CONFIG = {"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
MASKS = {
    "head": jtl.select("head"),
    "last two": jtl.select("head", "pooler", "encoder/layer_4", "encoder/layer_5"),
    "all": jtl.everything(),
}
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5))


def texts(steps: int) -> jtl.data.Batches:
    """A run of so many batches."""
    ids = np.random.default_rng(0).integers(1000, 30522, (32 * steps, 40)).astype(np.int32)
    return jtl.data.batches({"input_ids": jtl.data.ragged(ids)}, ids[:, 0] % 2, batch_size=32, buckets=[40], prefetch=0)


class Stretches:
    """The seconds of stretches of steps, and what of them the session's own part took."""

    def __init__(self, loss_fn: Any, start: Any, steps: int, stretch: int, folder: Path | None):
        run = None if folder is None else jtl.Run(folder, every=2 * stretch)
        self.reports: Any = jtl.fit(
            loss_fn, TX, start[0], start[1], texts(steps), run=run, cache="off", say=lambda line: None
        )
        self.stretch, self.seconds = stretch, []
        next(self.reports)  # compiles

    def go(self) -> None:
        """One more."""
        began = time.perf_counter()
        report = None
        for _ in range(self.stretch):
            report = next(self.reports)
        jax.block_until_ready(report)
        self.seconds.append(time.perf_counter() - began)

    def close(self) -> None:
        """Let what is being written end."""
        self.reports.close()


def counted(seconds: list[float]) -> Any:
    """The session's part of a step, timed."""
    after = runs.Session.after

    def timed(self: Any, report: Any, last: bool) -> None:
        # What the device still computes is not the save's: it is waited for in any case.
        jax.block_until_ready(report.state)
        began = time.perf_counter()
        after(self, report, last)
        seconds.append(time.perf_counter() - began)

    return timed


def compare(trained: str, rounds: int, stretch: int) -> dict[str, Any]:
    """One row."""
    model, variables = pretrained({**CONFIG, "intermediate_size": 1536})
    loss_fn = jtl.supervised(model, jtl.losses.cross_entropy)
    start = jtl.init(variables, TX, trainable=MASKS[trained], key=jax.random.key(1))
    waited: list[float] = []
    runs.Session.after = counted(waited)
    steps = 2 + rounds * stretch
    with tempfile.TemporaryDirectory() as folder:
        arms = [Stretches(loss_fn, start, steps, stretch, where) for where in (None, Path(folder, "run"))]
        for _ in range(rounds):
            for arm in arms:
                arm.go()
        for arm in arms:
            arm.close()
    plain, saving = (statistics.median(arm.seconds) / stretch for arm in arms)
    return {
        "trained": trained,
        "MB": round(jtl.tree.nbytes(start[0]) / 1e6, 1),
        "steps between saves": stretch,
        "step ms": round(1000 * plain, 1),
        "stall ms of a step": round(1000 * sum(waited) / len(waited), 3),
        "longest stall ms": round(1000 * max(waited), 1),
        "stall %": round(100 * sum(waited) / len(waited) / plain, 2),
        "whole %": round(100 * (saving / plain - 1), 2),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", nargs="+", choices=list(MASKS), default=list(MASKS))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--stretch", type=int, default=50, help="steps from one save to the next")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for trained in args.trained:
        rows.append(compare(trained, args.rounds, args.stretch))
        show(rows[-1])
    write(args.out, "save_stall", rows, "jax", "flax", "optax", "orbax-checkpoint")


if __name__ == "__main__":
    main()
