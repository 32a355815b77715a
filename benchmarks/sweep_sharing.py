"""`jtl sweep` on real reviews and real pictures, against the same runs without sharing.

Command: PYTHONPATH=. python benchmarks/sweep_sharing.py --out benchmarks/results
Needs: the stamps as a folder of classes, as `experiments/stamps.py` leaves them in jtl's cache, or --stamps FOLDER.

The grid is the command's own. Without sharing, each run is computed and compiled by itself, whatever the runs before it
did: what `jtl finetune`, called for each, would do after its data and weights are read. Those runs cost the same for
each seed, so they are timed for one and multiplied.

Bars: under 15 minutes, and at least 5 times faster than without sharing, on 2 CPU cores.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from reporting import show, write

from jtl import cli
from jtl.weights import assets

SEEDS = 3
COMMON = ("--epochs", "4", "--minutes", "120")
REVIEWS = ("--data", "tfds:rotten-tomatoes", "--labels-per-class", "200", "--held-out", "0.1", "--max-length", "40")
PICTURES = ("--model", "mobilenet-v2", "--labels-per-class", "15", "--held-out", "0.4")


def sweep(*flags: str, seeds: int) -> dict[str, Any]:
    """What a sweep writes down."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        cli.main(["sweep", *flags, *COMMON, "--seeds", str(seeds), "--out", str(out)])
        return json.loads((out / "sweep.json").read_text(encoding="utf-8"))


def main() -> None:
    """Print and write one row for each data set."""
    line = argparse.ArgumentParser()
    line.add_argument("--out", type=Path)
    line.add_argument("--stamps", type=Path, default=assets.cache_dir() / "stamps")
    line.add_argument("--only", default="", help="reviews or pictures")
    asked, rows = line.parse_args(), []
    for name, flags in {"reviews": REVIEWS, "pictures": ("--data", str(asked.stamps), *PICTURES)}.items():
        if asked.only not in name:
            continue
        shared, alone = sweep(*flags, seeds=SEEDS), sweep(*flags, "--no-share", seeds=1)
        row = {
            "data": name,
            "runs": len(shared["trials"]),
            "shared s": round(shared["seconds"]),
            "its compilation s": round(shared["compile_seconds"]),
            "alone s": round(SEEDS * alone["seconds"]),
            "their compilation s": round(SEEDS * alone["compile_seconds"]),
            "gain": round(SEEDS * alone["seconds"] / shared["seconds"], 2),
        }
        show(row)
        rows.append(row)
    write(asked.out, "sweep_sharing", rows)


if __name__ == "__main__":
    main()
