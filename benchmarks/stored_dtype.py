"""What storing features in bfloat16 changes: the loss and the gradient of one step.

Command: python benchmarks/stored_dtype.py --out benchmarks/results
MiniLM, 128 real reviews in batches of 32; the largest relative difference over the batches between a suffix that
reads float32 features and one that reads bfloat16 ones. The gradient's is the norm of the difference over the norm.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from cached_training import MASKS, batches, mask
from reporting import show, write

import jtl


def difference(model: Any, variables: Any, trained: int) -> dict[str, Any]:
    """One row of the table."""
    loss_fn, run = jtl.supervised(model, jtl.losses.cross_entropy), batches(128, 1)
    state, frozen = jtl.init(variables, optax.sgd(0.1), trainable=mask(trained), key=jax.random.key(1))
    cuts = [jtl.split(loss_fn, state, frozen, next(iter(run)), dtype=dtype) for dtype in (None, jnp.bfloat16)]
    losses, gradients = [], []
    for batch in run:
        results = []
        for cut in cuts:
            cached = jax.jit(cut.prefix)(frozen, frozen.collections, batch)
            step = jtl.train_step(cut.suffix, optax.sgd(1.0))  # one step of rate 1 is the gradient
            after, metrics = jax.jit(step)(state, frozen, cached)
            gradient = jax.tree.map(jnp.subtract, state.params, after.params)
            results.append((float(metrics["loss"]), gradient))
        (exact, gradient), (loss, other) = results
        losses.append(abs(loss - exact) / exact)
        norm = optax.tree.norm(jax.tree.map(jnp.subtract, gradient, other)) / optax.tree.norm(gradient)
        gradients.append(float(norm))
    nbytes = [cut.report.nbytes for cut in cuts]
    return {"float32 bytes": nbytes[0], "bfloat16 bytes": nbytes[1], "loss": max(losses), "gradient": max(gradients)}


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, variables = jtl.load("minilm-l6", jtl.heads.classifier(2), key=jax.random.key(0))
    rows = [{"trained": name, **difference(model, variables, trained)} for name, trained in MASKS.items()]
    for row in rows:
        show(row)
    write(args.out, "stored_dtype", rows, "jax", "flax")


if __name__ == "__main__":
    main()
