"""Training steps of BERT-base and MiniLM against PyTorch: the head alone, the last two blocks, everything.

Command: PYTHONPATH=. python benchmarks/text_speed.py --out benchmarks/results
On a GPU: PYTHONPATH=. python benchmarks/text_speed.py --dtype bfloat16 --compiled --batch 64 --rounds 5 --calls 10
Needs: PyTorch and transformers.

Random weights, random ids of one length on the device already, no padding, AdamW, dropout .1 in what is trained and
none in what is frozen, on both sides; the same batch for both; compilation is left out. Arms take turns, each in a
process of its own, and a figure is the median of all calls but the first of a turn. PyTorch: eager, transformers'
default attention (`--compiled`: torch.compile), frozen parameters without gradients, under autocast in bfloat16; jtl
computes in bfloat16 from float32 parameters.

Bars: on CPU at least 0.95 of eager PyTorch in each row; on a GPU, BERT-base, length 128, bfloat16, at least 1.0 of
compiled PyTorch.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from reporting import medians, process, show, write

import jtl

RATE, CLASSES, VOCABULARY = 1e-4, 2, 30522
NETWORKS = {
    "BERT-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "MiniLM-L6": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
}
LENGTHS = {"BERT-base": 128, "MiniLM-L6": 64}
TRAINED = ("head", "last two", "all")


def texts(name: str, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids `[batch, length]` and labels."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, VOCABULARY, (batch, LENGTHS[name])).astype(np.int32)
    return ids, rng.integers(0, CLASSES, batch).astype(np.int32)


def our_step(name: str, trained: str, batch: int, dtype: Any) -> Callable[[], Any]:
    """A compiled step."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps({"model_type": "bert", **NETWORKS[name]}))
        head = jtl.heads.classifier(CLASSES, dropout=0.1)
        model, variables = jtl.load(folder, head, key=jax.random.key(0), pretrained=False)
    model = model if dtype == jnp.float32 else model.clone(dtype=dtype)
    last = NETWORKS[name]["num_hidden_layers"]
    masks = {
        "head": jtl.select("head", "pooler"),
        "last two": jtl.select("head", "pooler", f"encoder/layer_{last - 1}", f"encoder/layer_{last - 2}"),
        "all": jtl.everything(),
    }
    tx, loss_fn = optax.adamw(RATE), jtl.supervised(model, jtl.losses.cross_entropy)
    state, frozen = jtl.init(variables, tx, trainable=masks[trained], key=jax.random.key(1))
    step = jax.jit(jtl.train_step(loss_fn, tx), donate_argnums=0)
    ids, labels = map(jax.device_put, texts(name, batch))
    given = {"input_ids": ids, "attention_mask": jnp.ones_like(ids), "label": labels}

    def run() -> None:
        nonlocal state
        state, metrics = step(state, frozen, given)
        jax.block_until_ready((state, metrics))

    return run


def their_step(name: str, trained: str, batch: int, dtype: Any, *, compiled: bool) -> Callable[[], Any]:
    """A step of PyTorch."""
    import torch
    import transformers

    torch.manual_seed(0)
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    config = transformers.BertConfig(**NETWORKS[name], num_labels=CLASSES)
    model = transformers.BertForSequenceClassification(config).train().to(device)
    if trained != "all":
        kept = 0 if trained == "head" else 2
        for part in (model.bert.embeddings, *model.bert.encoder.layer[: config.num_hidden_layers - kept]):
            part.requires_grad_(False).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    forward = torch.compile(model) if compiled else model
    ids, labels = (torch.from_numpy(x).long().to(device) for x in texts(name, batch))
    mask = torch.ones_like(ids)

    def run() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == jnp.bfloat16):
            loss = forward(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def compare(name: str, trained: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    shared = name, trained, args.batch, jnp.dtype(args.dtype)
    with process(our_step, *shared) as jtl_run, process(their_step, *shared, compiled=args.compiled) as torch_run:
        arms = {"jtl": jtl_run, "torch": torch_run}
        found = medians(arms, rounds=args.rounds, warm=2, settle=1, calls=args.calls)
    row = {"network": name, "trained": trained, "batch": args.batch, "length": LENGTHS[name], "dtype": args.dtype}
    row |= {"torch compiled": args.compiled}
    row |= {f"{arm} ms": round(1000 * median, 1) for arm, median in found.items()}
    return {**row, "jtl/torch": round(found["torch"] / found["jtl"], 2)}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--trained", nargs="+", choices=TRAINED, default=list(TRAINED))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compiled", action="store_true", help="torch.compile instead of eager")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--calls", type=int, default=3, help="of each arm in a round, after one that does not count")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for name in args.networks:
        for trained in args.trained:
            rows.append(compare(name, trained, args))
            show(rows[-1])
    write(args.out, f"text_speed-{args.dtype}", rows)


if __name__ == "__main__":
    main()
