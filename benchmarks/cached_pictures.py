"""Training on pictures from cached features, against the same training uncached and against PyTorch.

Command: PYTHONPATH=. python benchmarks/cached_pictures.py --out benchmarks/results
Needs: PyTorch, and transformers for the import of the pairs.

Pictures of noise, 224 x 224, already decoded; batch 32, AdamW. "cached" is a whole `jtl.fit(..., cache="require")` of
all epochs, extraction included; the others cost the same in every epoch, so they are timed for some. Compilation is
left out. PyTorch: eager, channels last, `requires_grad=False` and evaluation mode for what is frozen.

A frozen backbone of E epochs is computed once instead of E times, so that E bounds every gain. "by operations" is
(prefix + suffix) / (prefix / E + suffix), with the operations that `jtl.split` counts; the gain in time is above it
where the frozen layers do fewer of them a second than the trained ones, as depthwise convolutions do.
Bar: 7x for the head in 10 epochs.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import vision_pairs as pairs
from reporting import medians, show, write

import jtl

BATCH = 32


def mask(model: Any, groups: int) -> jtl.Mask:
    """The head, or the last depth groups, which include it."""
    return jtl.select("head") if groups == 0 else jtl.masks.depth(jtl.strategies.depth_groups(model), -groups)


def our_run(model: Any, variables: Any, groups: int, data: Any, cache: str) -> Callable[[], Any]:
    """A whole training from the same start."""
    loss_fn, tx = jtl.supervised(model, jtl.losses.cross_entropy), optax.adamw(pairs.RATE)
    state, frozen = jtl.init(variables, tx, trainable=mask(model, groups), key=jax.random.key(1))

    def run() -> Any:
        *_, report = jtl.fit(loss_fn, tx, state, frozen, data, cache=cache, say=lambda line: None)
        return jax.block_until_ready(report.state.params)

    return run


def expected(model: Any, variables: Any, groups: int, data: Any, epochs: int) -> float:
    """The gain by the operations of both halves."""
    loss_fn, tx = jtl.supervised(model, jtl.losses.cross_entropy), optax.adamw(pairs.RATE)
    state, frozen = jtl.init(variables, tx, trainable=mask(model, groups), key=jax.random.key(1))
    return jtl.split(loss_fn, state, frozen, next(iter(data))).report.speedup(epochs)


def their_run(name: str, data: Any) -> Callable[[], Any]:
    """The head on a frozen backbone in PyTorch."""
    import torch

    model = pairs.theirs(name).requires_grad_(False).eval()
    head = [part for part in model.modules() if isinstance(part, torch.nn.Linear)][-1].requires_grad_(True)
    optimizer = torch.optim.AdamW(head.parameters(), lr=pairs.RATE)

    def run() -> None:
        for batch in data:
            pixels = torch.from_numpy(np.ascontiguousarray(batch["images"])).permute(0, 3, 1, 2).to(pairs.device())
            labels = torch.from_numpy(batch["label"]).long().to(pairs.device())
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(pixels), labels).backward()
            optimizer.step()
        pairs.wait()

    return run


def compare(name: str, groups: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    images, labels = pairs.pictures(args.examples)
    model, variables = pairs.ours(name)

    def batches(epochs: int) -> Any:
        return jtl.data.batches({"images": images}, labels, batch_size=BATCH, seed=0, epochs=epochs)

    arms = {
        "uncached": our_run(model, variables, groups, batches(args.timed), "off"),
        "cached": our_run(model, variables, groups, batches(args.epochs), "require"),
    }
    if groups == 0:
        arms["torch"] = their_run(name, batches(args.timed))
    found = medians(arms, rounds=args.rounds)
    epochs = {"uncached": args.timed, "cached": args.epochs, "torch": args.timed}
    rates = {arm: args.examples * epochs[arm] / time for arm, time in found.items()}
    gain, counted = rates["cached"] / rates["uncached"], expected(model, variables, groups, batches(1), args.epochs)
    row = {"network": name, "trained": "head" if groups == 0 else f"last {groups} groups", "epochs": args.epochs}
    row |= {f"{arm} pictures/s": round(rates[arm], 1) if arm in rates else "" for arm in epochs}
    row |= {"cached/uncached": round(gain, 2), "by operations": round(counted, 2)}
    return {**row, "cached/torch": round(rates["cached"] / rates["torch"], 2) if "torch" in rates else ""}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(pairs.VARIANTS), default=list(pairs.VARIANTS)[:2])
    parser.add_argument(
        "--groups",
        type=int,
        nargs="+",
        default=[0, 1, 3],
        help="how many of the last groups are trained; 0 for the head",
    )
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--timed", type=int, default=1, help="epochs of the arms that cost the same in each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for name in args.networks:
        for groups in args.groups:
            rows.append(compare(name, groups, args))
            show(rows[-1])
    write(args.out, "cached_pictures", rows)


if __name__ == "__main__":
    main()
