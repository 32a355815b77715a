"""What freezing saves in the compiled step: partition before `grad`, against masks in the optimizer.

Command: python benchmarks/compiled_cost.py --out benchmarks/results
Model: a 6-layer BERT of MiniLM's size with random weights and a new head, batch 16 x 64, head only.

GFLOP are XLA's count for one step: a ratio within one version, not a rate. "partition" is
`jtl.train_step`; "masked" is the same loss, differentiated whole, with the mask inside the optax chain.
Bars: a head-only step at most 0.36 of full fine-tuning, and within 1% with clip, finite guard and
gradient norm on.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from reporting import write

import jtl
from jtl.models.bert import Bert, BertConfig

CONFIG = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, pool="mean")
GUARDED = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def partitioned(loss_fn: Any, variables: Any, mask: Any, tx: Any, **options: Any) -> tuple[Callable[..., Any], Any]:
    """A step of jtl, and its state."""
    state, frozen = jtl.init(variables, tx, trainable=mask, key=jax.random.key(1))
    step = jtl.train_step(loss_fn, tx, **options)
    return lambda state, batch: step(state, frozen, batch), state


def masked(loss_fn: Any, variables: Any, mask: Any, tx: Any, before: Any = None) -> tuple[Callable[..., Any], Any]:
    """The usual step: differentiate everything, let the optimizer drop what is frozen."""
    chain = optax.partition({True: tx, False: optax.set_to_zero()}, mask)
    chain = chain if before is None else optax.chain(before, chain)

    def step(state: Any, batch: Any) -> Any:
        params, opt_state, key = state
        grads = jax.grad(lambda p: loss_fn(p, {}, batch, key=key)[0])(params)
        updates, opt_state = chain.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, key

    params = variables["params"]
    return step, (params, chain.init(params), jax.random.key(1))


def measure(step: Callable[..., Any], state: Any, batch: Any) -> tuple[float, int]:
    """GFLOP of the compiled step, and bytes of optimizer state."""
    cost = jax.jit(step).lower(state, batch).compile().cost_analysis()
    opt_state = state.opt_state if isinstance(state, jtl.TrainState) else state[1]
    return cost["flops"] / 1e9, jtl.tree.nbytes(opt_state)


def rows() -> list[dict[str, Any]]:
    """Every arrangement."""
    model = Bert(CONFIG, jtl.heads.classifier(2))
    ids = np.ones((16, 64), np.int32)
    batch = {"input_ids": ids, "attention_mask": ids, "label": np.zeros(16, np.int32)}
    variables = jax.jit(model.init)(jax.random.key(0), jnp.asarray(ids))
    loss_fn = jtl.supervised(model, jtl.losses.cross_entropy)
    head, last = jtl.select("head"), jtl.select("head", "encoder/layer_[45]")
    finite = optax.apply_if_finite(GUARDED, 3)
    arrangements = {
        "full, partition": partitioned(loss_fn, variables, jtl.everything(), optax.adamw(1e-3)),
        "last two blocks, partition": partitioned(loss_fn, variables, last, optax.adamw(1e-3)),
        "head, partition": partitioned(loss_fn, variables, head, optax.adamw(1e-3)),
        "head, partition + clip, finite guard, norm": partitioned(loss_fn, variables, head, finite, grad_norm=True),
        "head, masked": masked(loss_fn, variables, head, optax.adamw(1e-3)),
        "head, masked + clip before": masked(
            loss_fn, variables, head, optax.adamw(1e-3), optax.clip_by_global_norm(1.0)
        ),
    }
    found = []
    for name, (step, state) in arrangements.items():
        gflop, state_bytes = measure(step, state, batch)
        ratio = gflop / found[0]["gflop"] if found else 1.0
        found.append({"arrangement": name, "gflop": gflop, "of_full": ratio, "optimizer_bytes": state_bytes})
    return found


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    found = rows()
    for row in found:
        print(f"{row['arrangement']:44s} {row['gflop']:8.2f} {row['of_full']:6.3f} {row['optimizer_bytes']:12,}")
    write(out, "compiled_cost", found, "jax", "flax", "optax")


if __name__ == "__main__":
    main()
