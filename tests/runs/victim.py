"""A real training run to be interrupted: small, of every part that a checkpoint holds.

As a script, `python victim.py` serves: it imports all once, and forks a process for each line of JSON that it reads,
`{"folder": ..., **settings of train}`. It writes a line for each process that begins, and one for each that ends.
"""

import json
import os
import select
import signal
import struct
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax

import jtl
from jtl import strategies

STEPS, ROWS = 60, 64


class Net(nn.Module):
    """Statistics, dropout, and three blocks to freeze."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False, name="norm")(x))
        x = nn.relu(nn.Dense(8, name="middle")(x))
        x = nn.Dropout(0.1, deterministic=False)(x)
        return nn.Dense(2, name="head")(x)


TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(2e-2, 1e-3, STEPS)))
LOSS = jtl.supervised(Net(), jtl.losses.cross_entropy, metrics={"accuracy": jtl.metrics.accuracy})
ADAPTER = jtl.peft.lora(["stem", "middle"], rank=2)
ADAPTED = jtl.supervised(jtl.peft.adapted(Net(), ADAPTER), jtl.losses.cross_entropy)
GROUPS = [["stem", "norm"], ["middle"], ["head"]]
# The last one's second phase holds still what its first one trained: it is of neither the base nor the trained half.
SWITCH = (
    jtl.Phase(jtl.select("head"), TX, until=20),
    jtl.Phase(jtl.select("stem", "norm"), TX, until=20),
    jtl.Phase(jtl.everything(), TX),
)
STRATEGIES = {
    "feature extraction": strategies.feature_extraction(TX),
    "last blocks": strategies.last_blocks(TX, GROUPS, 1),
    "full": strategies.full(TX),
    "LoRA": strategies.fine_tune(TX, jtl.select("**/lora", "head"), "LoRA"),
    "gradual": strategies.gradual_unfreezing(TX, GROUPS, every=20),
    "switch": jtl.Strategy("switch", SWITCH),
}


def arrays():
    """Inputs `[64, 4]` and classes."""
    x = np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32)
    return x, (x.sum(axis=1) > 0).astype(np.int64)


def data(**changes):
    """Seven and a half epochs."""
    x, y = arrays()
    settings = {"batch_size": 8, "seed": 1, "epochs": 8, **changes}
    return jtl.data.batches({"x": x}, y, **settings).until(STEPS)


def start(name):
    """A strategy, its loss, and the two halves."""
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = jax.jit(Net().init)(keys, arrays()[0][:1])
    loss_fn = ADAPTED if name == "LoRA" else LOSS
    if name == "LoRA":
        variables = jtl.peft.attach(ADAPTER, variables, key=jax.random.key(2))
    return STRATEGIES[name], loss_fn, *jtl.init(variables, STRATEGIES[name], key=jax.random.key(3))


def digest(report):
    """Of all that a resumed run must have in common with one that was never interrupted."""
    state = report.state
    return jtl.tree.digest(
        (jtl.variables(state, report.frozen), state.opt_state, state.key, state.step, tuple(report.progress[:2]))
    )


def train(folder=None, strategy="gradual", *, stop=None, on_step=lambda step: None, **settings):
    """Train, and return the digest at the end; None where it was stopped."""
    settings = {"cache": "auto", **settings}
    strategy, loss_fn, state, frozen = start(strategy)
    run = None if folder is None else jtl.Run(folder, {"of": "a victim"}, **settings.pop("run", {}))
    for report in jtl.fit(loss_fn, strategy, state, frozen, data(), run=run, say=lambda line: None, **settings):
        on_step(report.step)
        if report.step == stop:
            return None
    return digest(report)


def _child(order):
    folder, pause = Path(order.pop("folder")), order.pop("pause", 0.0)
    progress = os.open(folder.with_suffix(".progress"), os.O_CREAT | os.O_WRONLY)

    def on_step(step):
        os.pwrite(progress, struct.pack("q", step), 0)
        time.sleep(pause)

    if order.pop("compiled", None):
        jtl.keep_compiled(folder.with_suffix(".compiled"))
    found = train(folder, on_step=on_step, cache_directory=folder.with_suffix(".cache"), **order)
    folder.with_suffix(".digest").write_text(found)


def serve():
    """Fork for each line."""
    jtl.runs.Steps(Path("unused"))  # imports orbax, and makes nothing
    running = {}
    while True:
        ready = select.select([sys.stdin], [], [], 0.005)[0]
        if ready:
            line = sys.stdin.readline()
            if not line:
                return
            pid = os.fork()
            if pid == 0:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                sys.stdout = sys.stderr
                _child(json.loads(line))
                sys.exit(0)  # as a program ends: what is being written comes to its end
            running[pid] = True
            print(json.dumps({"began": pid}), flush=True)
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            del running[pid]
            print(json.dumps({"ended": pid, "code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    serve()
