"""Nine ways of adapting MobileNetV2 to emoji, at 50, 200 and 1,000 labels, and under a shift of style.

Command: python experiments/ways_on_emoji.py    (--tune for how the rates were chosen)
"""

import dataclasses
import functools
import json

import _pictures
import _ways
import jax
import numpy as np
from PIL import Image

import jtl
from jtl import strategies
from jtl.data import Batches
from jtl.data.preprocess import normalize

ROWS, SIZE = 10, 64
RATES = dict.fromkeys(_ways.WAYS, 3e-4) | {"probe": 1e-2, "BitFit": 3e-3, "LoRA": 1e-3}
VERSION = "16.0.0"
STYLES = {
    "google": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "twitter": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
}


def main() -> None:
    """Run what the command line asks for."""
    settings = _ways.parser().parse_args()
    images, labels = emoji()
    head, key = jtl.heads.classifier(int(labels.max()) + 1), jax.random.key(0)
    spec = jtl.load("mobilenet-v2", head, key=key)[0].config.input
    spec = dataclasses.replace(spec, size=(SIZE, SIZE), resize_to=SIZE)
    # So few steps need statistics that follow quickly.
    model, variables = jtl.load("mobilenet-v2", head, key=key, input=spec, batch_norm_momentum=0.9)
    order = np.random.default_rng(0).permutation(len(labels))
    test, validation, rest = order[:600], order[600:850], order[850:]
    prepared = functools.partial(_normalized, spec=spec)

    def batches(style: str, rows: np.ndarray) -> Batches:
        columns = {"image": images[style][rows]}
        return jtl.data.batches(columns, labels[rows], batch_size=ROWS, transform=prepared)

    def sample(count: int, seed: int) -> Batches:
        return batches("google", np.random.default_rng(seed).permutation(rest)[:count])

    held_out = [tuple(batches(style, rows) for style in STYLES) for rows in (test, validation)]
    width = variables["params"]["head"]["kernel"].shape[0]
    groups = strategies.depth_groups(model)
    task = _ways.Task(model, variables, groups, ["**/kernel"], RATES, width, int(labels.max()) + 1)
    _ways.run(task, _ways.Data(sample, *held_out), settings)


def _normalized(batch: dict[str, np.ndarray], spec: object) -> dict[str, np.ndarray]:
    return {**batch, "image": normalize(batch["image"], spec)}


def emoji() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Pictures of each style, uint8 `[N, 64, 64, 3]` on white, and their categories."""
    folders = {style: _pictures.npm(f"emoji-datasource-{style}", VERSION, digest) for style, digest in STYLES.items()}
    known = json.loads((folders["google"] / "emoji.json").read_text(encoding="utf-8"))
    known = [one for one in known if one["category"] != "Component" and all(one[f"has_img_{s}"] for s in STYLES)]
    names = sorted({one["category"] for one in known})
    images = {
        style: np.stack([_on_white(folder / "img" / style / str(SIZE) / one["image"]) for one in known])
        for style, folder in folders.items()
    }
    return images, np.array([names.index(one["category"]) for one in known], np.int32)


def _on_white(path: object) -> np.ndarray:
    picture = Image.open(path).convert("RGBA").resize((SIZE, SIZE))
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB"))


if __name__ == "__main__":
    main()
