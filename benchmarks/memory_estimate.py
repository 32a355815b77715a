"""`jtl.memory_estimate` against the memory that a step is seen to take.

Command: PYTHONPATH=. python benchmarks/memory_estimate.py --out benchmarks/results

Each case runs in a process of its own. On CPU, what is measured is the most that is resident while the step runs, from
the kernel's high-water mark, above what was resident without the step's arguments; on other devices, the allocator's
own peak. Random weights.

Bar: within 15%.
"""

import argparse
import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from reporting import show, write

import jtl

MASKS = {"head": jtl.select("head"), "all": jtl.everything()}
TX = optax.adamw(1e-3)


class Perceptron(nn.Module):
    """Eight wide layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits `[batch, 4]`."""
        for layer in range(8):
            x = nn.gelu(nn.Dense(512, name=f"block_{layer}")(x))
        return nn.Dense(4, name="head")(x)


def pretrained(config: dict[str, Any]) -> Any:
    """A model of jtl's families, and its variables."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        return jtl.load(folder, jtl.heads.classifier(2), key=jax.random.key(0), pretrained=False)


def ids(rows: int, length: int) -> dict[str, jax.Array]:
    """Texts of one length."""
    whole = jnp.ones((rows, length), jnp.int32)
    return {"input_ids": whole, "attention_mask": whole, "label": jnp.zeros(rows, jnp.int32)}


def perceptron() -> tuple[Any, Any, Any]:
    """8,192 rows through eight layers of 512."""
    batch = {"x": jnp.ones((8192, 512)), "label": jnp.zeros(8192, jnp.int32)}
    return Perceptron(), jax.jit(Perceptron().init)(jax.random.key(0), batch["x"][:1]), batch


def minilm() -> tuple[Any, Any, Any]:
    """BERT of the quickstart's size, 32 reviews of 64 tokens."""
    config = {"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
    return *pretrained({**config, "intermediate_size": 1536}), ids(32, 64)


def vit() -> tuple[Any, Any, Any]:
    """ViT-S/16, 16 pictures of 224 pixels."""
    config = {"model_type": "vit", "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
    batch = {"image": jnp.ones((16, 224, 224, 3)), "label": jnp.zeros(16, jnp.int32)}
    return *pretrained({**config, "intermediate_size": 1536, "image_size": 224, "patch_size": 16}), batch


CASES = {"perceptron": perceptron, "minilm": minilm, "vit": vit}


def _status(name: str) -> int:
    """A line of the process's status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise LookupError(name)


def _resident() -> int:
    """What is resident, after what is free was given back; the high-water mark begins anew."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def measure(case: str, trained: str) -> dict[str, int]:
    """Bytes, estimated and measured."""
    model, variables, batch = CASES[case]()
    start = jtl.init(variables, TX, trainable=MASKS[trained], key=jax.random.key(1))
    step = jax.jit(jtl.train_step(jtl.supervised(model, jtl.losses.cross_entropy), TX), donate_argnums=0)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (*start, batch))
    estimate = jtl.memory_estimate(step, *shapes).peak
    compiled = step.lower(*shapes).compile()
    # Copies: what is measured must be resident, and weights of one value may share pages.
    state, *rest = jax.tree.map(jnp.array, (*start, batch))
    del start, variables, batch
    state, _ = jax.block_until_ready(compiled(state, *rest))  # the first call brings code and threads
    device = jax.devices()[0]
    if device.platform != "cpu":
        return {"estimated": estimate, "measured": device.memory_stats()["peak_bytes_in_use"]}
    before = _resident() - sum(leaf.nbytes for leaf in jax.tree.leaves((state, rest)))
    jax.block_until_ready(compiled(state, *rest))
    return {"estimated": estimate, "measured": _status("VmHWM") - before}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, help="a case and what is trained, in this process")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one)))
        return
    rows = []
    for case in args.cases:
        for trained in MASKS:
            line = [sys.executable, __file__, "--one", case, trained]
            done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            row = {"case": case, "trained": trained}
            row |= {f"{name} MB": round(value / 1e6, 1) for name, value in found.items()}
            rows.append({**row, "estimated/measured": round(found["estimated"] / found["measured"], 3)})
            show(rows[-1])
    write(args.out, "memory_estimate", rows, "jax", "flax", "optax")


if __name__ == "__main__":
    main()
