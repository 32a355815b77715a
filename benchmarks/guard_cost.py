"""What `jtl.transforms.guard` adds to a step of the quickstart's model.

Command: PYTHONPATH=. python benchmarks/guard_cost.py --out benchmarks/results

MiniLM's size with random weights, batches of 32 texts of 40 tokens, AdamW behind a clip. Arms take turns: the plain
transform, the guard, and the guard that also skips spikes of the loss; of each also the seconds of compiling its step.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from memory_estimate import ids, pretrained
from reporting import medians, show, write
from save_stall import CONFIG, MASKS, TX

import jtl

ARMS = {"plain": TX, "guard": jtl.transforms.guard(TX), "guard, spikes": jtl.transforms.guard(TX, spike=6.0)}


def step_of(loss_fn: Any, variables: Any, tx: Any, trained: str) -> tuple[Callable[[], Any], float]:
    """A compiled step that goes on from its own state, and the seconds of its compilation."""
    state, frozen = jtl.init(variables, tx, trainable=MASKS[trained], key=jax.random.key(1))
    state = jax.tree.map(jnp.array, state)  # it is donated
    batch = ids(32, 40)
    traced = jax.jit(jtl.train_step(loss_fn, tx), donate_argnums=0).lower(state, frozen, batch)
    began = time.perf_counter()
    step = traced.compile()
    seconds = time.perf_counter() - began

    def run() -> None:
        nonlocal state
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready((state, metrics))

    return run, seconds


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, variables = pretrained({**CONFIG, "intermediate_size": 1536})
    loss_fn = jtl.supervised(model, jtl.losses.cross_entropy)
    rows = []
    for trained in MASKS:
        made = {name: step_of(loss_fn, variables, tx, trained) for name, tx in ARMS.items()}
        found = medians({name: step for name, (step, _) in made.items()}, rounds=args.rounds, warm=2, calls=3)
        row = {"trained": trained, "plain ms": round(1000 * found["plain"], 1)}
        rows.append(row | {f"{name}/plain": round(found[name] / found["plain"], 3) for name in list(ARMS)[1:]})
        rows[-1] |= {f"{name}, compile s": round(seconds, 1) for name, (_, seconds) in made.items()}
        show(rows[-1])
    write(args.out, "guard_cost", rows, "jax", "flax", "optax")


if __name__ == "__main__":
    main()
