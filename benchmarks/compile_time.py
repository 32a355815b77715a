"""Seconds to compile BERT-base: written out, as a loop over blocks, and read back from disk.

Command: PYTHONPATH=. python benchmarks/compile_time.py --out benchmarks/results

Each figure is the median of `--rounds` processes, from shapes alone: tracing and lowering, and compilation, of a call
in evaluation and of a training step of the head and of everything, batch 32, length 128. "warm" finds the program in
the folder of `jtl.keep_compiled`, which a process before it filled.

Bars: at most 1.7 s cold with the loop, and 0.3 s warm.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from reporting import show, write

import jtl
from jtl.models.bert import Bert, BertConfig

KINDS = ("forward", "head", "all")


def lowered(kind: str, scan: bool) -> Callable[[], Any]:
    """A function that traces and lowers a program of BERT-base."""
    model = Bert(BertConfig(), jtl.heads.classifier(2), scan=scan)
    shape = jax.ShapeDtypeStruct((32, 128), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), shape)
    inputs = {"input_ids": shape, "attention_mask": shape}
    if kind == "forward":
        return lambda: jax.jit(model.apply).lower(variables, **inputs)
    mask = {"head": jtl.select("head", "pooler"), "all": jtl.everything()}[kind]
    tx, loss_fn = optax.adamw(1e-4), jtl.supervised(model, jtl.losses.cross_entropy)
    start = lambda variables: jtl.init(variables, tx, trainable=mask, key=jax.random.key(1))  # noqa: E731
    state, frozen = jax.eval_shape(start, variables)
    batch = {**inputs, "label": jax.ShapeDtypeStruct((32,), jnp.int32)}
    return lambda: jax.jit(jtl.train_step(loss_fn, tx), donate_argnums=0).lower(state, frozen, batch)


def once(kind: str, scan: bool, folder: str | None) -> tuple[float, float]:
    """Seconds of tracing with lowering, and of compilation, in this process."""
    if folder is not None:
        jtl.keep_compiled(folder)
    jax.jit(lambda x: x + 1)(jnp.ones(1))  # what the first program of a process pays
    trace = lowered(kind, scan)
    began = time.perf_counter()
    program = trace()
    traced = time.perf_counter()
    program.compile()
    return traced - began, time.perf_counter() - traced


def measured(kind: str, scan: bool, warm: bool, rounds: int) -> dict[str, Any]:
    """One row."""
    with tempfile.TemporaryDirectory() as folder, get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        kept = folder if warm else None
        runs = [pool.apply(once, (kind, scan, kept)) for _ in range(rounds + warm)][int(warm) :]
    traced, compiled = (statistics.median(values) for values in zip(*runs, strict=True))
    row = {"program": kind, "blocks": "loop" if scan else "written out", "cache": "warm" if warm else "none"}
    return {**row, "trace s": round(traced, 2), "compile s": round(compiled, 2), "sum s": round(traced + compiled, 2)}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args, rows = parser.parse_args(), []
    for kind in args.kinds:
        for scan, warm in ((False, False), (True, False), (False, True), (True, True)):
            rows.append(measured(kind, scan, warm, args.rounds))
            show(rows[-1])
    write(args.out, "compile_time", rows)


if __name__ == "__main__":
    main()
