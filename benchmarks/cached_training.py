"""Training from cached features against the same training uncached, and against PyTorch.

Command: python benchmarks/cached_training.py --out benchmarks/results
Needs: the assets minilm-l6 and rotten-tomatoes, transformers, and PyTorch for its column.

MiniLM on real reviews, batch 32, AdamW. Every arm trains on the same padded batches on the same machine in one
run; rounds alternate between the arms, and rates are medians over rounds. "cached" is a whole
`jtl.fit(..., cache="require")` of 20 epochs, extraction included. The others have the same cost in every epoch, so
they are timed for some epochs. Compilation is left out everywhere. PyTorch: transformers' model,
`requires_grad=False` on frozen parameters, frozen modules in eval mode, eager.

The bound counts blocks: for k frozen blocks of L, of forward cost f each, an uncached epoch costs f(k + 3(L - k)), a
cached one f k / E + 3 f (L - k). Bars: head 14x (PyTorch 12x), last block 2x (1.7x), last two 1.4x (1.25x), each at
least 80% of the bound; 32 swept heads in a tenth of the time of 32 runs over the same cache.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from reporting import medians, seconds, show, write

import jtl
from jtl.data import tfds
from jtl.weights import assets

LAYERS, RATE = 6, 1e-3
MASKS = {"head": 0, "last block": 1, "last two blocks": 2}


def batches(examples: int, epochs: int) -> Any:
    """Padded batches of real reviews."""
    tokenizer = jtl.data.tokenizer(assets.fetch("minilm-l6"))
    data = jtl.data.subset(tfds.load("rotten-tomatoes", "train"), examples, seed=0)
    encoded = jtl.data.encode(tokenizer, list(data.columns["text"]), max_length=48)
    buckets = jtl.data.buckets(encoded.input_ids.lengths, max_length=48, max_buckets=3)
    columns = {"input_ids": encoded.input_ids}
    return jtl.data.batches(columns, data.labels, batch_size=32, seed=0, epochs=epochs, buckets=buckets)


def mask(trained: int) -> jtl.Mask:
    """The head, and the last blocks."""
    return jtl.select("head", *(f"encoder/layer_{LAYERS - 1 - k}" for k in range(trained)))


def jtl_run(loss_fn: Any, tx: Any, variables: Any, trained: int, data: Any, cache: str) -> Callable[[], Any]:
    """A whole training from the same start."""
    state, frozen = jtl.init(variables, tx, trainable=mask(trained), key=jax.random.key(1))

    def run() -> Any:
        *_, report = jtl.fit(loss_fn, tx, state, frozen, data, cache=cache, say=lambda line: None)
        return jax.block_until_ready(report.state.params)

    return run


def torch_run(trained: int, data: Any) -> Callable[[], Any]:
    """The same training in PyTorch."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModel.from_pretrained(str(assets.fetch("minilm-l6")))
    head = torch.nn.Linear(model.config.hidden_size, 2)
    model.requires_grad_(False).eval()
    for layer in model.encoder.layer[LAYERS - trained :]:
        layer.requires_grad_(True).train()
    learned = [p for p in (*model.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=RATE)

    def step(batch: dict[str, np.ndarray]) -> None:
        ids, keep, labels = (torch.from_numpy(batch[n]).long() for n in ("input_ids", "attention_mask", "label"))
        hidden = model(input_ids=ids, attention_mask=keep).last_hidden_state
        weight = keep[..., None].to(hidden.dtype)
        losses = torch.nn.functional.cross_entropy(
            head((hidden * weight).sum(1) / weight.sum(1)), labels, reduction="none"
        )
        rows = torch.from_numpy(batch["weight"])
        optimizer.zero_grad()
        ((losses * rows).sum() / rows.sum()).backward()
        optimizer.step()

    def run() -> None:
        for batch in data:
            step(batch)

    return run


def bound(trained: int, epochs: int) -> float:
    """The analytic speed-up of the cache."""
    frozen = LAYERS - trained
    return (frozen + 3 * trained) / (frozen / epochs + 3 * trained)


def compare(examples: int, epochs: int, timed: int, rounds: int, masks: list[str]) -> list[dict[str, Any]]:
    """One row for each mask."""
    model, variables = jtl.load("minilm-l6", jtl.heads.classifier(2), key=jax.random.key(0))
    loss_fn, tx = jtl.supervised(model, jtl.losses.cross_entropy), optax.adamw(RATE)
    long, short = batches(examples, epochs), batches(examples, timed)
    rows = []
    for name in masks:
        trained = MASKS[name]
        arms = {
            "uncached": (jtl_run(loss_fn, tx, variables, trained, short, "off"), timed),
            "cached": (jtl_run(loss_fn, tx, variables, trained, long, "require"), epochs),
        }
        warm = [arms["uncached"][0], jtl_run(loss_fn, tx, variables, trained, short, "require")]
        try:
            arms["torch"] = (torch_run(trained, short), timed)
            warm.append(arms["torch"][0])
        except ImportError:
            print("no PyTorch here: its column stays empty")
        for run in warm:  # compile all shapes
            run()
        times = medians({arm: run for arm, (run, _) in arms.items()}, rounds=rounds, warm=0)
        rates = {arm: examples * count / times[arm] for arm, (_, count) in arms.items()}
        gain, limit = rates["cached"] / rates["uncached"], bound(trained, epochs)
        row = {"trained": name, **{f"{arm} examples/s": round(value, 1) for arm, value in rates.items()}}
        row |= {"cached/uncached": round(gain, 2), "bound": round(limit, 2), "of bound": round(gain / limit, 2)}
        row["cached/torch"] = round(rates["cached"] / rates["torch"], 2) if "torch" in rates else ""
        rows.append(row)
        show(row)
    return rows


def sweeps(examples: int, epochs: int, members: int) -> dict[str, Any]:
    """A sweep over learning rates and heads, against as many runs one after another over the same cache."""
    model, variables = jtl.load("minilm-l6", jtl.heads.classifier(2), key=jax.random.key(0))
    loss_fn, data = jtl.supervised(model, jtl.losses.cross_entropy), batches(examples, epochs)
    tx, rates = optax.inject_hyperparams(optax.adamw)(RATE), np.geomspace(1e-4, 1e-1, members).astype(np.float32)
    states = []
    for member in range(members):
        head = model.head.init(jax.random.key(member), jnp.zeros((1, model.config.hidden_size)))["params"]
        start = {"params": {**variables["params"], "head": head}}
        state, frozen = jtl.init(start, tx, trainable=mask(0), key=jax.random.key(member))
        state.opt_state.hyperparams["learning_rate"] = jnp.asarray(rates[member])
        states.append(state)
    cut = jtl.split(loss_fn, states[0], frozen, next(iter(data)))
    cached = jtl.cache.follow(jtl.cache.build(cut.prefix, states[0], frozen, data), data)
    losses = []

    def together() -> None:
        values = {"learning_rate": rates}
        result = jtl.sweep(cut.suffix, optax.adamw, states, frozen, cached, hyperparameters=values, cache="off")
        jax.block_until_ready(result.states.params)
        losses.append(result.metrics["loss"])

    def one(state: Any) -> float:
        *_, report = jtl.fit(cut.suffix, tx, state, frozen, cached, cache="off")
        return float(report.metrics["loss"])

    together(), one(states[0])
    swept, apart = [], []
    for _ in range(3):
        swept.append(seconds(together))
        apart.append(seconds(lambda: losses.append(np.array([one(state) for state in states]))))
    difference = float(np.max(np.abs(losses[-1] - losses[-2])))
    row = {
        "members": members,
        "sweep s": round(statistics.median(swept), 2),
        "runs s": round(statistics.median(apart), 2),
    }
    row |= {
        "runs/sweep": round(statistics.median(apart) / statistics.median(swept), 1),
        "largest loss difference": difference,
    }
    show(row)
    return row


def main() -> None:
    """Measure, print, and write one file for each table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--timed", type=int, default=2, help="epochs of the arms that cost the same in each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--masks", nargs="+", choices=list(MASKS), default=list(MASKS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tables = {
        "cached_training": compare(args.examples, args.epochs, args.timed, args.rounds, args.masks),
        "cached_sweep": [sweeps(args.examples, args.epochs, 32)],
    }
    for name, rows in tables.items():
        write(args.out, name, rows)


if __name__ == "__main__":
    main()
