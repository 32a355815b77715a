"""Writing text: a GPT-2 of the smallest size in jtl and in transformers.

Command: PYTHONPATH=. python benchmarks/generation.py --out benchmarks/results
Needs: PyTorch and transformers.

The same random weights in both, float32, prompts of equal length, the likeliest token at each step, no end before the
last one. Both keep keys and values. Arms take turns, each in a process of its own; a figure is the median of all calls
but the first of a turn, and compilation is left out. transformers: its own `generate`, PyTorch on CPU with fused
attention (sdpa). Tokens are the new ones of all rows together. The prompts' own cost is in the time.

Bar: at least 1.0x transformers.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from reporting import medians, process, show, write

import jtl


def checkpoint(folder: Path) -> Path:
    """A GPT-2 of 124 million random parameters, as transformers writes it."""
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config()).save_pretrained(folder)
    return folder


def prompts(batch: int, length: int) -> np.ndarray:
    """Random words `[batch, length]`."""
    return np.random.default_rng(0).integers(0, 50000, (batch, length))


def ours(folder: Path, batch: int, length: int, new: int, beams: int) -> Callable[[], Any]:
    """A call of jtl's `generate`."""
    model, variables = jtl.load(folder)
    inputs = {"input_ids": prompts(batch, length)}
    settings = {"max_new_tokens": new, "beams": beams, "eos_token_id": ()}
    return lambda: jax.block_until_ready(jtl.generate(model, variables, inputs, **settings))


def theirs(folder: Path, batch: int, length: int, new: int, beams: int) -> Callable[[], Any]:
    """A call of transformers' `generate`."""
    import torch
    import transformers

    model = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    ids = torch.from_numpy(prompts(batch, length))
    settings = {"max_new_tokens": new, "num_beams": beams, "do_sample": False, "use_cache": True, "pad_token_id": 0}

    def run() -> None:
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        if out.shape != (batch, length + new):
            raise RuntimeError(f"transformers ended early: {tuple(out.shape)}")

    return run


def compare(folder: Path, beams: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    shape = (args.batch, args.prompt, args.new, beams)
    with process(ours, folder, *shape) as jtl_run, process(theirs, folder, *shape) as their_run:
        arms = {"jtl": jtl_run, "transformers": their_run}
        found = medians(arms, rounds=args.rounds, warm=args.warm, settle=1, calls=args.calls)
    rates = {arm: args.batch * args.new / median for arm, median in found.items()}
    row = {"network": "GPT-2", "batch": args.batch, "prompt": args.prompt, "new": args.new, "beams": beams}
    row |= {f"{arm} tokens/s": round(rate, 1) for arm, rate in rates.items()}
    return {**row, "jtl/transformers": round(rates["jtl"] / rates["transformers"], 2)}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--beams", type=int, nargs="+", default=[1], help="1 takes the likeliest token at each step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=2, help="of each arm in a round, after one that does not count")
    parser.add_argument("--warm", type=int, default=1, help="calls of each arm before all")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(Path(folder))
        for beams in args.beams:
            rows.append(compare(Path(folder), beams, args))
            show(rows[-1])
    write(args.out, "generation", rows)


if __name__ == "__main__":
    main()
