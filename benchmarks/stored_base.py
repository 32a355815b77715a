"""A frozen base in few bits under LoRA: bytes held, temporary memory of a step, and its time.

Command: python benchmarks/stored_base.py --out benchmarks/results
A random model of BERT-base's shape, or of the first layers of it (`--layers`); LoRA of rank 8 on queries and values,
Adam. Bytes are those of the leaves; temporary memory is XLA's count for the compiled step.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from reporting import medians, show, write

import jtl
from jtl import peft
from jtl.models.bert import Bert, BertConfig

FORMATS = ("float32", "bfloat16", "int8", "int4", "nf4")


def arm(model: Any, variables: Any, batch: Any, format: str) -> tuple[Callable[[], Any], dict[str, Any]]:
    """A step over a base in one format, and what it holds."""
    if format != "float32":
        variables = peft.quantize(variables, format, trainable=jtl.select("head"))
    adapter = peft.lora(["**/query", "**/value"], rank=8)
    attached = peft.attach(adapter, variables, key=jax.random.key(1))
    loss_fn = jtl.supervised(peft.adapted(model, adapter), jtl.losses.cross_entropy)
    tx = optax.adam(1e-3)
    state, frozen = jtl.init(attached, tx, trainable=jtl.select("**/lora", "head"), key=jax.random.key(2))
    step = jax.jit(jtl.train_step(loss_fn, tx)).lower(state, frozen, batch).compile()
    held = {"base": frozen, "trained": state.params, "optimizer": state.opt_state}
    row = {f"{name} bytes": jtl.tree.nbytes(part) for name, part in held.items()}
    return lambda: jax.block_until_ready(step(state, frozen, batch)), {**row, "temp bytes": temporary(step)}


def temporary(step: Any) -> int:
    """Bytes of a compiled step's temporary memory."""
    return step.memory_analysis().temp_size_in_bytes


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model = Bert(BertConfig(num_hidden_layers=args.layers), jtl.heads.classifier(2))
    ids = jax.random.randint(jax.random.key(0), (args.batch, args.length), 1, 1000, jnp.int32)
    batch = {"input_ids": ids, "attention_mask": jnp.ones_like(ids), "label": jnp.arange(args.batch) % 2}
    variables = jax.jit(model.init)(jax.random.key(0), ids, batch["attention_mask"])
    arms = {format: arm(model, variables, batch, format) for format in FORMATS}
    times = medians({format: run for format, (run, _) in arms.items()}, rounds=args.rounds)
    rows = [
        {
            "layers": args.layers,
            "base": format,
            **row,
            "step ms": round(1e3 * times[format], 1),
            "step/float32": round(times[format] / times["float32"], 3),
        }
        for format, (_, row) in arms.items()
    ]
    for row in rows:
        show(row)
    write(args.out, "stored_base", rows, "jax", "flax", "optax")


if __name__ == "__main__":
    main()
