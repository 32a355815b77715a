"""`jtl sweep` on real reviews and real pictures, against the same runs without sharing.

Command: PYTHONPATH=. python benchmarks/sweep_sharing.py --out benchmarks/results
Needs: the stamps as a folder of classes, as `experiments/stamps.py` leaves them in jtl's cache, or --stamps FOLDER.

The grid is the command's own. Without sharing, each run is computed and compiled by itself, whatever the runs before it
did: what `jtl finetune`, called for each, would do after its data and weights are read. Those runs cost the same for
each seed, so they are timed for one and multiplied.

Bars: under 15 minutes, and at least 5 times faster than without sharing, on 2 CPU cores.
"""

import argparse
import dataclasses
from pathlib import Path

from reporting import show, write
from rich.console import Console

from jtl.recipes import sweep
from jtl.recipes.settings import Sweep
from jtl.weights import assets


def settings(stamps: Path) -> dict[str, Sweep]:
    """What is swept."""
    common = {"seeds": 3, "epochs": 4, "minutes": 60.0}
    reviews = Sweep(data="tfds:rotten-tomatoes", labels_per_class=200, held_out="0.1", max_length=40, **common)
    pictures = Sweep(data=str(stamps), model="mobilenet-v2", labels_per_class=15, held_out="0.4", **common)
    return {"reviews": reviews, "pictures": pictures}


def main() -> None:
    """Print and write one row for each data set."""
    line = argparse.ArgumentParser()
    line.add_argument("--out", type=Path)
    line.add_argument("--stamps", type=Path, default=assets.cache_dir() / "stamps")
    line.add_argument("--only", default="")
    line.add_argument("--shared-only", action="store_true")
    asked, console, rows = line.parse_args(), Console(width=110), []
    for name, chosen in settings(asked.stamps).items():
        if asked.only not in name:
            continue
        shared = sweep.run(chosen, console)
        row = {
            "data": name,
            "runs": len(shared.trials),
            "shared s": round(shared.seconds),
            "of it compilation s": round(shared.compile_seconds),
        }
        if not asked.shared_only:
            alone = sweep.run(dataclasses.replace(chosen, share=False, seeds=1), console)
            row |= {
                "alone s": round(alone.seconds * chosen.seeds),
                "of it compilation s (alone)": round(alone.compile_seconds * chosen.seeds),
                "gain": f"{alone.seconds * chosen.seeds / shared.seconds:.2f}",
            }
        show(row)
        rows.append(row)
    write(asked.out, "sweep_sharing", rows)


if __name__ == "__main__":
    main()
