"""How much of a batch of real reviews is padding, for so many padded lengths.

Command: PYTHONPATH=. python benchmarks/padding.py --out benchmarks/results

The training films of the reviews that jtl's quickstart fetches, in batches of 32, cut at 40 tokens as in the quickstart
and the experiments, and uncut (78 at most). Each length is one shape to compile. "least" is what the best lengths of
all, of any whole numbers, would waste, if every row were padded to its own.

Bar: under 10% with at most 6 lengths.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
from reporting import show, write

from jtl.data import batches, text, tfds
from jtl.weights import assets


def least(lengths: np.ndarray, count: int) -> float:
    """The smallest share of padding that `count` lengths can have."""
    sizes = np.arange(1, lengths.max() + 1)
    below = np.searchsorted(np.sort(lengths), sizes, side="right")
    best = (below * sizes).astype(float)
    for _ in range(count - 1):  # best[j]: tokens of the rows up to sizes[j], which is the last length
        more = [min(best[i] + (below[j] - below[i]) * sizes[j] for i in range(j)) for j in range(1, len(sizes))]
        best = np.minimum(best, [best[0], *more])
    return 1 - lengths.sum() / best[-1]


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args, rows = parser.parse_args(), []
    tokenizer = text.tokenizer(assets.fetch("minilm-l6"))
    texts = list(tfds.load("rotten-tomatoes", "train").columns["text"])
    for longest, count in itertools.product((40, 128), (1, 3, 6)):
        ids = text.encode(tokenizer, texts, max_length=longest).input_ids
        buckets = text.buckets(ids.lengths, max_length=longest, max_buckets=count)
        run = batches({"input_ids": ids}, batch_size=32, seed=0, buckets=buckets)
        positions = sum(size * length * number for (size, length), number in run.shapes.items())
        row = {"cut at": longest, "lengths": count, "shapes": len(run.shapes), "which": " ".join(map(str, buckets))}
        row |= {"padding": round(1 - ids.lengths.sum() / positions, 3), "least": round(least(ids.lengths, count), 3)}
        show(row)
        rows.append(row)
    write(args.out, "padding", rows)


if __name__ == "__main__":
    main()
