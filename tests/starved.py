"""A run in a process whose memory is limited, against the same run without a limit; the last line is JSON."""

import ctypes
import json
import resource
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jtl

WIDTH, LAYERS, ROWS = 512, 8, 4096


class Net(nn.Module):
    """Activations weigh more than weights."""

    @nn.compact
    def __call__(self, x):
        for layer in range(LAYERS):
            x = nn.gelu(nn.Dense(WIDTH, name=f"block_{layer}")(x))
        return nn.Dense(4, name="head")(x)


TX = optax.sgd(0.1, momentum=0.9)
LOSS = jtl.supervised(Net(), jtl.losses.cross_entropy)


def data(rows, epochs=1):
    """Of one class after the other."""
    x = np.random.default_rng(0).normal(size=(rows, WIDTH)).astype(np.float32)
    return jtl.data.batches({"x": x}, np.arange(rows) % 4, batch_size=ROWS, epochs=epochs, prefetch=0)


def reserved():
    """Bytes of address space that the process has taken."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmSize"):
            return 1024 * int(line.split()[1])
    raise LookupError("VmSize")


def limited():
    """The same run free, in microbatches, and with less address space left than a whole batch takes."""
    variables = jax.jit(Net().init)(jax.random.key(0), jnp.ones((1, WIDTH)))
    state, frozen = jtl.init(variables, TX, trainable=jtl.everything(), key=jax.random.key(1))
    run = data(2 * ROWS, epochs=2)

    def train(**settings):
        said = []
        *_, report = jtl.fit(LOSS, TX, state, frozen, run, cache="off", say=said.append, **settings)
        return report.step, jax.tree.map(np.array, report.state.params), said

    free, halves = train(), train(accumulate=2)
    needed = jtl.memory_estimate(jtl.train_step(LOSS, TX), state, frozen, next(iter(run))).temporary
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (reserved() + int(0.8 * needed), hard))
    tight = train()
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))

    def apart(one, other):
        return max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))

    return {
        "steps": [free[0], tight[0]],
        "said": [free[2], tight[2]],
        "from free": apart(free[1], tight[1]),
        "halves from free": apart(free[1], halves[1]),
        "moved": apart(free[1], jax.tree.map(np.array, state.params)),
    }


if __name__ == "__main__":
    print(json.dumps(limited()))
