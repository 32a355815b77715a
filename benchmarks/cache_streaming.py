"""How fast a cache on disk gives batches, in random order, against how fast a suffix takes them.

Command: python benchmarks/cache_streaming.py --gigabytes 2
Writes that much of random float32 features `[24, 384]` (MiniLM's, a length bucket of the reviews) in shards of
64 MB to a temporary folder, verifies them on opening, and reads an epoch of shuffled batches of 32. The operating
system may hold the files in memory; `--drop` asks it to forget them first (Linux, as root).
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from jtl.cache.store import Store

SHAPE = (24, 384)


def write(store: Store, rows: int, shard: int) -> float:
    """Commit shards of random rows; seconds."""
    rng, started = np.random.default_rng(0), time.perf_counter()
    features = rng.normal(size=(shard, *SHAPE)).astype(np.float32)
    for number, first in enumerate(range(0, rows, shard)):
        ids = np.arange(first, min(first + shard, rows))
        store.commit(number, number + 1, ids, {"cut/0": features[: len(ids)], "label": ids.astype(np.int32)})
    return time.perf_counter() - started


def forget() -> None:
    """Make the operating system drop its copies of files."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--drop", action="store_true")
    args = parser.parse_args()
    size = int(np.prod(SHAPE)) * 4
    rows, shard = int(args.gigabytes * 1e9 / size), (64 << 20) // size
    with tempfile.TemporaryDirectory() as folder:
        written = write(Store(Path(folder)), rows, shard)
        if args.drop:
            forget()
        store, started = Store(Path(folder)), time.perf_counter()
        store.load()
        opened = time.perf_counter() - started
        if args.drop:
            forget()
        (group,) = store.groups
        order, started = np.random.default_rng(1).permutation(rows), time.perf_counter()
        for first in range(0, rows, 32):
            store.rows(group, order[first : first + 32])
        read = time.perf_counter() - started
    total = rows * size / 1e9
    print(
        f"{rows:,} rows, {total:.2f} GB: written and synced {total / written:.2f} GB/s, verified {total / opened:.2f}"
    )
    print(f"shuffled batches of 32: {rows / read:,.0f} rows/s, {total / read:.2f} GB/s")


if __name__ == "__main__":
    main()
