"""Vision networks against PyTorch: inference, and a whole step of full fine-tuning with AdamW.

Command: PYTHONPATH=. python benchmarks/vision_speed.py --out benchmarks/results
On a GPU: PYTHONPATH=. python benchmarks/vision_speed.py --dtype bfloat16 --compiled --batch 256 --rounds 5 --calls 10
Needs: PyTorch and transformers.

224 x 224 pictures already on the device, 10 classes, the same batch for both; compilation is left out. Arms take
turns, each in a process of its own, and a figure is the median of all calls but the first of a turn. PyTorch: eager
(`--compiled`: torch.compile), channels last, under autocast in bfloat16; jtl computes in bfloat16 from float32
parameters, ViT with cuDNN's attention.

Bars: on CPU at least 0.8 of PyTorch; on an H100 ViT-B/16 at least 1.0 of compiled PyTorch and 1,459 pictures/s.
"""

import argparse
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import vision_pairs as pairs
from reporting import medians, process, show, write


def compare(name: str, kind: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    dtype = jnp.dtype(args.dtype)
    ours, theirs = {
        "inference": (pairs.our_inference, pairs.their_inference),
        "step": (pairs.our_step, pairs.their_step),
    }[kind]
    with process(ours, name, batch, dtype) as jtl, process(theirs, name, batch, dtype, compiled=args.compiled) as torch:
        arms = {"jtl": jtl, "torch": torch}
        found = medians(arms, rounds=args.rounds, warm=args.warm, settle=1, calls=args.calls)
    rates = {arm: batch / median for arm, median in found.items()}
    row = {"network": name, "measured": kind, "batch": batch, "dtype": args.dtype, "torch compiled": args.compiled}
    row |= {f"{arm} pictures/s": round(rate, 1) for arm, rate in rates.items()}
    return {**row, "jtl/torch": round(rates["jtl"] / rates["torch"], 2)}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(pairs.VARIANTS), default=list(pairs.VARIANTS))
    parser.add_argument("--kinds", nargs="+", choices=["inference", "step"], default=["inference", "step"])
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compiled", action="store_true", help="torch.compile instead of eager")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--calls", type=int, default=3, help="of each arm in a round, after one that does not count")
    parser.add_argument("--warm", type=int, default=2, help="calls of each arm before all")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for name in args.networks:
        for kind in args.kinds:
            for batch in args.batch:
                rows.append(compare(name, kind, batch, args))
                show(rows[-1])
    write(args.out, f"vision_speed-{args.dtype}", rows)


if __name__ == "__main__":
    main()
