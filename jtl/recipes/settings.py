"""What each command can be told; plain dataclasses, so that `--help` imports nothing heavy."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

StrategyName = Literal[
    "feature-extraction",
    "last-blocks",
    "first-blocks",
    "full",
    "lp-ft",
    "surgical",
    "gradual",
    "discriminative",
    "layerwise-decay",
    "bitfit",
    "norms",
    "l2-sp",
    "lora",
]
TaskName = Literal["classification", "multilabel", "regression"]
AugmentName = Literal["none", "flip", "crop-flip", "randaugment"]


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """Train MiniLM on real film reviews in three ways, beside two controls, and print one table."""

    labels: int = 1000
    """Labelled reviews to train on."""
    seeds: int = 3
    """Repetitions, each with a subset, initial head and order of its own."""
    batch_size: int = 32
    """Reviews of a batch."""
    max_length: int = 40
    """Tokens of a review; longer ones are cut, and counted."""
    held_out: int = 600
    """Reviews of other films to evaluate on, at most."""
    split: Literal["test", "validation"] = "test"
    """The films to evaluate on."""
    cache: Literal["auto", "off"] = "auto"
    """Whether to compute what no trained leaf can change once; auto does where that saves work."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """What is trained, and how."""

    strategy: StrategyName = "last-blocks"
    """What to train."""
    blocks: int = 2
    """How many blocks, for the strategies last-blocks, first-blocks and gradual, and surgical, which takes those whose
    gradients are largest beside their weights, under a head trained for an epoch."""
    factors: tuple[str, ...] = ()
    """Of the learning rate, for the strategy discriminative: "PATTERN=FACTOR", of which the first match counts, such as
    "encoder/layer_[45]=0.5" "head=1" "**=0.1"."""
    decay: float = 0.75
    """From one group of layers to the next one below it, for the strategy layerwise-decay."""
    pull: float = 1e-2
    """Of the weights towards the pretrained ones, for the strategy l2-sp."""
    rank: int = 8
    """Of the thin matrices, for the strategy lora."""
    targets: tuple[str, ...] = ()
    """Patterns of the layers that lora adapts; by default queries and values, or all kernels of a model without."""
    trainable: tuple[str, ...] = ()
    """Patterns of the leaves to train, instead of a strategy; see `jtl inspect`."""
    learning_rate: float | None = None
    """The highest learning rate; by default one that suits the strategy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Labelled texts or pictures, how they are read, and the model that reads them."""

    data: str
    """A CSV, TSV, JSONL or Parquet file, a folder or .zip with a sub-folder of pictures or .txt files a class, or
    tfds:NAME."""
    model: str = "minilm-l6"
    """A packaged model, a checkpoint folder, or a hub id such as org/name."""
    text: str = "text"
    """The column of texts."""
    second: str | None = None
    """The column of second texts, where examples are pairs, such as a premise and a hypothesis."""
    label: str = "label"
    """The column of labels."""
    group: str | None = None
    """A column whose values must not be both trained on and held out, such as an author."""
    classes: tuple[str, ...] = ()
    """The class names in order; any other label is an error. By default those that occur."""
    held_out: str = "0.2"
    """The share of examples to evaluate on, or another file, folder or tfds:NAME:SPLIT."""
    labels_per_class: int | None = None
    """Examples of each class to train on, at most; by default all that are not held out."""
    skip_bad: bool = False
    """Leave malformed rows out, and list them, where one would be an error."""
    batch_size: int = 32
    """Examples of a batch."""
    max_length: int = 128
    """Tokens of a text; longer ones are cut, and counted."""
    lengths: int = 3
    """Padded lengths of texts, at most. More of them waste less on padding, and each is compiled by itself."""
    revision: str | None = None
    """A branch, tag or commit of a hub repository."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetune(Way, Data):
    """Fine-tune a pretrained model on labelled texts or pictures of your own."""

    task: TaskName = "classification"
    """What a label is: one class, any number of labels, or a number to predict."""
    separator: str = ","
    """What stands between labels, where there may be several; a field of JSONL or Parquet may also be a list."""
    stride: int | None = None
    """Read longer texts as windows of --max-length tokens that have so many in common, each trained on with the label
    of its text; a text's prediction is the mean of its windows'. By default they are cut."""
    out: Path | None = None
    """A folder for the trained model, its scores and these settings, with checkpoints and metrics while it trains. The
    same command again goes on from where an interrupted one was; another one is refused."""
    every: int = 100
    """Updates that an interruption may cost, at most: checkpoints are begun twice as often."""
    keep: int = 1
    """The newest checkpoints to keep there."""
    watchdog: float | None = None
    """Write the stacks of all threads to stacks.txt there whenever no step ended for so many seconds."""
    spike: float | None = None
    """Skip steps whose loss lies so many standard deviations above the mean of the last 128; 6 is usual. Steps that
    are not finite are always skipped, and end the run after ten in a row."""
    epochs: int = 3
    """Passes over the training examples."""
    augment: AugmentName = "none"
    """What happens to training pictures at random, anew in each epoch: left and right exchanged; a part cut out,
    and that; or RandAugment after both. Needs --cache auto or off, for what changes cannot be cached."""
    seed: int = 0
    """Of the split, the initial head, the order, augmentation and dropout."""
    cache: Literal["auto", "off", "require"] = "auto"
    """Whether to compute what no trained leaf can change once; auto does where that saves work."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(Data):
    """Which layers to freeze? Strategies, depths, learning rates and seeds on your own data, in one table and picture.

    What frozen layers compute is computed once for all runs. Half of the held-out examples choose each strategy's
    learning rate, the other half is what the table reports.
    """

    strategies: tuple[StrategyName, ...] = ("feature-extraction", "last-blocks", "lora", "lp-ft", "full")
    """What to compare; last-blocks at each of the depths."""
    depths: tuple[int, ...] = (1, 2)
    """Blocks trained by last-blocks."""
    rates: tuple[float, ...] = ()
    """Multiples of each strategy's usual learning rate to try; by default more of them where a run costs less."""
    seeds: int = 3
    """Repetitions of each, with a head and an order of its own."""
    epochs: int = 4
    """Passes over the training examples; of feature extraction five times as many, for they cost next to nothing."""
    minutes: float = 15.0
    """Of training: what does not fit any more is left out, and named."""
    share: bool = True
    """Compute what several runs have in common once."""
    out: Path | None = None
    """A new folder for the table, all runs as JSON, and the picture."""
    seed: int = 0
    """Of the split, and the first of the seeds."""


@dataclasses.dataclass(frozen=True)
class Models:
    """List the packaged models and the families that load from a folder or the hub."""

    pattern: Annotated[str, tyro.conf.Positional] = "*"
    """A glob over names, such as 'minilm*'."""


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Show a model's parameters as a tree, with counts, and which of them a mask trains."""

    model: Annotated[str, tyro.conf.Positional]
    """A packaged model, a checkpoint folder, or a hub id."""
    trainable: tuple[str, ...] = ()
    """Patterns of trained leaves: 'head', 'encoder/layer_[45]', '**/bias'. By default the head, or all without one."""
    outputs: int = 2
    """Outputs of the new head; 0 for none."""
    depth: int = 3
    """How many levels of the tree to show."""
    revision: str | None = None
    """A branch, tag or commit of a hub repository."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Audit(Way):
    """Prove that a training step trains what its mask says and nothing else; ends with 1 where it does not."""

    model: Annotated[str, tyro.conf.Positional]
    """A packaged model, a checkpoint folder, or a hub id."""
    outputs: int = 2
    """Outputs of the new head."""
    steps: int = 3
    """How many to run."""
    batch_size: int = 4
    """Random examples of the batch."""
    length: int = 32
    """Tokens of a random text."""
    revision: str | None = None
    """A branch, tag or commit of a hub repository."""
