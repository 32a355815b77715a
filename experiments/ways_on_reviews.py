"""Nine ways of adapting MiniLM to film reviews, at 50, 200 and 1,000 labels, and under a shift of length.

Command: python experiments/ways_on_reviews.py    (--tune for how the rates were chosen)
"""

import _ways
import jax
import numpy as np

import jtl
from jtl import strategies
from jtl.data import Batches, Examples, examples, text, tfds
from jtl.weights import assets

ROWS, LENGTH = 10, 40
RATES = dict.fromkeys(_ways.WAYS, 2e-4) | {"probe": 1e-2, "BitFit": 1e-3, "LoRA": 1e-3}


def main() -> None:
    """Run what the command line asks for."""
    settings = _ways.parser().parse_args()
    folder = assets.fetch("minilm-l6")
    model, variables = jtl.load(folder, jtl.heads.classifier(2), key=jax.random.key(0))
    tokenizer = text.tokenizer(folder)
    parts = {name: tfds.load("rotten-tomatoes", name) for name in ("train", "validation", "test")}
    middle = np.median(_words(parts["train"]))
    short = {name: _where(part, _words(part) <= middle) for name, part in parts.items()}
    long = {name: _where(part, _words(part) > middle) for name, part in parts.items()}

    def batches(part: Examples) -> Batches:
        encoded = text.encode(tokenizer, list(part.columns["text"]), max_length=LENGTH)
        return jtl.data.batches({"input_ids": encoded.input_ids}, part.labels, batch_size=ROWS, buckets=[LENGTH])

    def sample(count: int, seed: int) -> Batches:
        return batches(examples.subset(short["train"], count, seed=seed))

    def some(part: Examples) -> Batches:
        return batches(examples.subset(part, min(300, part.size), seed=0))

    data = _ways.Data(sample, *((some(short[name]), some(long[name])) for name in ("test", "validation")))
    groups = strategies.depth_groups(model)
    task = _ways.Task(model, variables, groups, ["**/query", "**/value"], RATES, model.config.hidden_size, 2)
    _ways.run(task, data, settings)


def _words(part: Examples) -> np.ndarray:
    return np.array([len(each.split()) for each in part.columns["text"]])


def _where(part: Examples, chosen: np.ndarray) -> Examples:
    return examples.take(part, np.flatnonzero(chosen))


if __name__ == "__main__":
    main()
