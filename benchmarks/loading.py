"""Loading a ViT-B/16 checkpoint by `jtl.load`, against reading the same file by safetensors alone.

Command: python benchmarks/loading.py --out benchmarks/results
Bars: parameters on the device in under 1.5x the time of `safetensors.numpy.load_file`, with peak memory under 1.3x the
file, each for the layouts of timm and of transformers.

The values are random, float32, 346 MB. Every figure is from a fresh process, whose imports and whose backend of JAX
come before the clock starts; rounds alternate between the arms and the file is in the page cache. "time" is the median
of the first call in a process, until the arrays are ready, "again" that of a second call in it, when the model's shapes
are known. Memory is the growth of the process's peak over the first call (`ru_maxrss`), over the size of the file.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import reporting

MODEL, OUTPUTS = "vit_base_patch16_224", 1000
ARMS = ("load_file", "jtl.load")
LAYOUTS = ("timm", "transformers")

PROBE = """
import json, resource, sys, time
import jax, numpy, jtl
from safetensors.numpy import load_file
jtl.load, jax.block_until_ready(jax.numpy.zeros(1))
run = {"load_file": lambda folder: load_file(f"{folder}/model.safetensors"), "jtl.load": jtl.load}[sys.argv[1]]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, seconds = peak(), []
for _ in range(2):
    started = time.perf_counter()
    result = jax.block_until_ready(run(sys.argv[2])[1:] if sys.argv[1] == "jtl.load" else run(sys.argv[2]))
    seconds.append(time.perf_counter() - started)
    after = peak() if len(seconds) == 1 else after
    del result
figures = {"first": seconds[0], "again": seconds[1], "memory": after - before}
print(json.dumps(figures | {"platform": jax.devices()[0].platform}))
"""


def write(folder: Path, layout: str) -> None:
    """A random checkpoint with a classifier, as timm or transformers writes it."""
    import jax
    import numpy as np

    import jtl
    from jtl.models import registry
    from jtl.weights import convert, safetensors

    head = jtl.heads.classifier(OUTPUTS)
    model, variables = jtl.load(MODEL, head, key=jax.random.key(0), pretrained=False)
    if layout == "transformers":
        jtl.save(folder, model, variables, format="transformers")
        return
    family, rng = registry.of_architecture(MODEL), np.random.default_rng(0)
    keys = next(each for each in family.layouts if each.name == layout).keys(model.config)
    tensors = {}
    for path, leaf in jtl.tree.leaves_with_paths(variables["params"]):
        source, axes = convert.locate(path, keys)
        shape = axes.write(np.broadcast_to(np.float32(0), leaf.shape)).shape
        tensors[source] = rng.normal(0, 0.02, shape).astype(np.float32)
    folder.mkdir(parents=True)
    safetensors.write_tensors(folder / safetensors.SINGLE, tensors, metadata={"format": "pt"})
    settings = {"architecture": MODEL, "num_classes": OUTPUTS, "pretrained_cfg": {"input_size": [3, 224, 224]}}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")


def measured(arm: str, folder: Path) -> dict[str, Any]:
    """Seconds and bytes of one fresh process."""
    done = subprocess.run([sys.executable, "-c", PROBE, arm, str(folder)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(folder: Path, layout: str, rounds: int) -> list[dict[str, Any]]:
    """One row for each arm."""
    size = (folder / "model.safetensors").stat().st_size
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for _ in range(rounds):
        for arm in ARMS:
            runs[arm].append(measured(arm, folder))

    def median(arm: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[arm])

    rows = []
    for arm in ARMS:
        row = {"layout": layout, "arm": arm, "file MB": round(size / 1e6)}
        row |= {"time ms": round(1e3 * median(arm, "first")), "again ms": round(1e3 * median(arm, "again"))}
        row["fastest ms"] = round(1e3 * min(run["first"] for run in runs[arm]))
        row["time/load_file"] = round(median(arm, "first") / median("load_file", "first"), 2)
        row["again/load_file"] = round(median(arm, "again") / median("load_file", "again"), 2)
        row |= {"memory/file": round(median(arm, "memory") / size, 2), "platform": runs[arm][0]["platform"]}
        rows.append(row)
        reporting.show(row)
    return rows


def main() -> None:
    """Measure, print, and write one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--folder", type=Path, help="keep the checkpoints here, or take those of a run before")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rows = []
        for layout in args.layouts:
            folder = (args.folder or Path(temporary)) / layout
            if not folder.exists():
                # In a process of its own, so that this one is small when it starts the others.
                code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import loading; from pathlib"
                subprocess.run(
                    [sys.executable, "-c", f"{code} import Path; loading.write(Path({str(folder)!r}), {layout!r})"],
                    check=True,
                )
            rows += compare(folder, layout, args.rounds)
    reporting.write(args.out, "loading", rows, "jax", "flax", "safetensors", "numpy")


if __name__ == "__main__":
    main()
