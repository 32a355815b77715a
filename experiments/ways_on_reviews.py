"""Nine ways of adapting MiniLM to film reviews, at 50, 200 and 1,000 labels, and under a shift of length.

Command: python experiments/ways_on_reviews.py    (--tune for how the rates were chosen)
Data: the reviews that jtl's quickstart fetches. A seed draws the labelled ones among those of at most the median number
of words; 300 others of that kind are tested, and 300 longer ones, cut at 40 tokens. Balanced accuracy, chance .500.
Mean and 95% t interval over seeds 0 to 4, each with its own labels, head and order; the gain over full fine-tuning is
paired by seed. 200 steps of 10 for every way, 1,000 for the head alone. Rates are the best of three, on 300
validation reviews and seeds of their own, at 200 labels; of the head, the last block, the last two, biases, layer-wise
decay, LP-FT and full fine-tuning the best was at the end of what was tried.

Claims:
- With 50 labels the head alone, of 770 parameters, is level with all 22.6 million within the interval: that few labels
  favour freezing is neither borne out nor refuted. What freezing costs grows with labels: of the head .02, .03, .06.
- Biases, and LoRA of rank 8 on queries and values, train .1% and .3%: level with full fine-tuning at 50 and 200
  labels, .02 below it at 1,000. The last two blocks and layer-wise decay are level throughout.
- Longer reviews cost every way .01 to .05. LP-FT has the best mean on them with 50 labels (+.02)
  and gains .01 with 200, both within the interval, and nothing with 1,000: not confirmed, and not contradicted as on
  emoji, where normalisation layers spoil it (`ways_on_emoji.py`).

Expected (jax 0.10.2, flax 0.12.8, optax 0.2.8, 2 CPU cores): share that is trained; then balanced accuracy and gain on
reviews of the same kind, and on longer ones. Some 50 minutes for each number of labels on one core.

    50 labels
    probe                0.00%   0.638 ± 0.006  -0.022 ± 0.084    0.596 ± 0.019  -0.020 ± 0.058
    last block           7.87%   0.623 ± 0.020  -0.037 ± 0.081    0.595 ± 0.033  -0.020 ± 0.069
    last two            15.73%   0.644 ± 0.038  -0.016 ± 0.077    0.612 ± 0.053  -0.004 ± 0.067
    gradual             15.73%   0.646 ± 0.029  -0.014 ± 0.075    0.611 ± 0.021  -0.005 ± 0.049
    BitFit               0.12%   0.651 ± 0.060  -0.009 ± 0.038    0.627 ± 0.050  +0.012 ± 0.046
    LoRA                 0.33%   0.661 ± 0.069  +0.001 ± 0.024    0.626 ± 0.073  +0.010 ± 0.018
    layer-wise decay   100.00%   0.642 ± 0.051  -0.019 ± 0.041    0.607 ± 0.076  -0.009 ± 0.044
    LP-FT              100.00%   0.679 ± 0.039  +0.019 ± 0.050    0.637 ± 0.056  +0.021 ± 0.043
    full               100.00%   0.660 ± 0.083  +0.000 ± 0.000    0.616 ± 0.069  +0.000 ± 0.000
    200 labels
    probe                0.00%   0.685 ± 0.013  -0.032 ± 0.038    0.662 ± 0.041  -0.038 ± 0.079
    last block           7.87%   0.673 ± 0.030  -0.045 ± 0.056    0.666 ± 0.026  -0.034 ± 0.052
    last two            15.73%   0.711 ± 0.037  -0.006 ± 0.027    0.689 ± 0.029  -0.010 ± 0.044
    gradual             15.73%   0.705 ± 0.020  -0.013 ± 0.038    0.676 ± 0.012  -0.023 ± 0.066
    BitFit               0.12%   0.729 ± 0.018  +0.011 ± 0.021    0.694 ± 0.039  -0.006 ± 0.045
    LoRA                 0.33%   0.732 ± 0.047  +0.014 ± 0.045    0.689 ± 0.053  -0.010 ± 0.030
    layer-wise decay   100.00%   0.721 ± 0.044  +0.004 ± 0.024    0.709 ± 0.048  +0.009 ± 0.043
    LP-FT              100.00%   0.725 ± 0.038  +0.008 ± 0.017    0.707 ± 0.033  +0.008 ± 0.028
    full               100.00%   0.718 ± 0.034  +0.000 ± 0.000    0.699 ± 0.056  +0.000 ± 0.000
    1000 labels
    probe                0.00%   0.733 ± 0.014  -0.057 ± 0.012    0.696 ± 0.015  -0.050 ± 0.015
    last block           7.87%   0.738 ± 0.011  -0.053 ± 0.017    0.727 ± 0.017  -0.019 ± 0.017
    last two            15.73%   0.775 ± 0.013  -0.015 ± 0.019    0.738 ± 0.012  -0.008 ± 0.017
    gradual             15.73%   0.735 ± 0.016  -0.055 ± 0.021    0.710 ± 0.016  -0.036 ± 0.016
    BitFit               0.12%   0.771 ± 0.017  -0.019 ± 0.017    0.734 ± 0.026  -0.012 ± 0.028
    LoRA                 0.33%   0.767 ± 0.014  -0.024 ± 0.014    0.733 ± 0.014  -0.013 ± 0.016
    layer-wise decay   100.00%   0.787 ± 0.018  -0.004 ± 0.014    0.754 ± 0.035  +0.008 ± 0.033
    LP-FT              100.00%   0.776 ± 0.006  -0.015 ± 0.008    0.741 ± 0.016  -0.005 ± 0.016
    full               100.00%   0.791 ± 0.007  +0.000 ± 0.000    0.746 ± 0.009  +0.000 ± 0.000
"""

import _ways
import jax
import numpy as np

import jtl
from jtl import strategies
from jtl.data import Batches, Examples, examples, text, tfds
from jtl.weights import assets

ROWS, LENGTH = 10, 40
RATES = {
    "probe": 3e-3,
    "last block": 6e-4,
    "last two": 6e-4,
    "gradual": 2e-4,
    "BitFit": 3e-3,
    "LoRA": 1e-3,
    "layer-wise decay": 6e-4,
    "LP-FT": 6e-5,
    "full": 6e-5,
}


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
