"""What a command is given: labelled examples, and a model that takes them."""

import functools
import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.markup import escape

import jtl
from jtl.cache.auto import room
from jtl.data import Batches, Examples, compare, examples, picture_batches, read, text, tfds
from jtl.errors import ConfigError, DataError
from jtl.pretrained import build
from jtl.recipes import goals, texts, training
from jtl.recipes.settings import AugmentName, Data, TaskName
from jtl.weights.source import Source, resolve


class Task(NamedTuple):
    """Examples, and a model under a new head for their classes.

    Attributes:
      train: to train on.
      held_out: to evaluate on.
      source: of the model.
      modality: "text" or "image".
      model: a linen module.
      variables: its pretrained ones.
      tokenizer: of a text model.
      goal: what is learnt.
    """

    train: Examples
    held_out: Examples
    source: Source
    modality: str
    model: Any
    variables: dict[str, Any]
    tokenizer: Any
    goal: goals.Goal


def task(
    settings: Data,
    seed: int,
    console: Console,
    *,
    augment: str = "none",
    kind: TaskName = "classification",
    separator: str = ",",
) -> Task:
    """Read examples and model, and say what was found.

    Args:
      settings: where they are.
      seed: of the split, and of the head.
      console: where to print.
      augment: how training examples are augmented; only pictures can be.
      kind: of labels.
      separator: between labels of an example.

    Raises:
      JtlError: whatever is wrong with either.
    """
    check_seed(seed)
    if settings.batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {settings.batch_size}")
    train, held_out = _examples(settings, seed, kind, separator)
    _report(train, held_out, console)
    goal = goals.goal(train)
    if goal.rounded():
        console.print(goal.rounded(), markup=False, soft_wrap=True)
    with console.status(f"loading {escape(settings.model)}"):
        source = resolve(settings.model, revision=settings.revision)
        modality = _check_modality(source, train, augment)
        model, variables = jtl.load(source.path, goal.head, key=jax.random.split(jax.random.key(seed))[0])
        tokenizer = _tokenizer(source, model.config) if modality == "text" else None
    for line in _compared(train, held_out):
        console.print(line, markup=False, soft_wrap=True)
    train, held_out = goal.learnt(train), goal.learnt(held_out)
    return Task(train, held_out, source, modality, model, variables, tokenizer, goal)


def check_seed(seed: int, count: int = 1) -> None:
    """Refuse seeds of which a generator of random numbers would take nothing, or a part.

    Args:
      seed: the first.
      count: how many follow each other.

    Raises:
      ConfigError: one is not in 32 bits.
    """
    if not 0 <= seed <= 2**32 - count:
        raise ConfigError(f"seed must be from 0 to {2**32 - count}, got {seed}")


def batches(
    settings: Data,
    given: Task,
    held_out: Sequence[Examples],
    console: Console,
    *,
    seed: int,
    epochs: int,
    augment: AugmentName = "none",
    stride: int | None = None,
    keep: bool = False,
) -> tuple[Batches, Any, list[Any]]:
    """Batches to train on, what is to be done to them on the device, and batches to evaluate on.

    Args:
      settings: sizes.
      given: what is trained on.
      held_out: parts to evaluate on, each by itself.
      console: where to print.
      seed: of the order.
      epochs: passes over the training examples.
      augment: of pictures.
      stride: tokens that windows of a long text have in common; None to cut it. What is evaluated is `Windowed` then.
      keep: decode pictures once and keep them, where a quarter of the free memory holds them.
    """
    size = settings.batch_size
    if given.modality == "image":
        if stride is not None:
            raise ConfigError(f"stride={stride} is of windows of long texts; {given.source.name} takes pictures")
        spec, count = given.model.config.input, sum(part.size for part in (given.train, *held_out))
        keep = keep and count * math.prod(spec.size) * len(spec.mean) <= room(None)
        train, change = training.training_pictures(
            given.train, spec, augment, seed=seed, epochs=epochs, batch_size=size, keep=keep
        )
        console.print(f"{len(train)} steps of pictures of {spec.size[0]}x{spec.size[1]} pixels")
        return train, change, [picture_batches(part, spec, batch_size=size, keep=keep) for part in held_out]
    most = given.model.config.max_length
    longest = settings.max_length if most is None else min(settings.max_length, most)
    known = inspect.signature(type(given.model).__call__).parameters
    sizes: dict[str, Any] = {"max_length": longest, "max_buckets": settings.lengths, "batch_size": size}
    sizes["types"] = "token_type_ids" in known
    encode = functools.partial(texts.text_batches, given.tokenizer, stride=stride, **sizes)
    train = encode(given.train, seed=seed, epochs=epochs)
    tests = [encode(part, known=train.batches.layout.buckets, numbered=stride is not None) for part in held_out]
    _report_lengths(train, tests, longest, console)
    if stride is None:
        return train.batches, None, [test.batches for test in tests]
    counts = " and ".join(str(len(part.text)) for part in (train, *tests))
    console.print(f"the texts make {counts} windows of at most {longest} tokens")
    parts = zip(tests, held_out, strict=True)
    return train.batches, None, [texts.Windowed(test.batches, test.text, part.labels) for test, part in parts]


def _report_lengths(train: texts.Encoded, tests: list[texts.Encoded], longest: int, console: Console) -> None:
    found = train.batches.shapes
    shapes = ", ".join(f"{rows}x{length} ({count})" for (rows, length), count in sorted(found.items()))
    console.print(f"{len(train.batches)} steps in {len(found)} shapes: {shapes}; {_waste(train.batches):.1%} padding")
    cut_tests = sum(test.truncated for test in tests)
    if train.truncated or cut_tests:
        console.print(f"{train.truncated} training and {cut_tests} held-out texts were cut to {longest} tokens")


def _waste(run: Batches) -> float:
    """The share of an epoch's positions that hold no token."""
    tokens = int(next(c for c in run.columns.values() if isinstance(c, text.Ragged)).offsets[-1])
    return 1 - tokens / sum(rows * length * count for (rows, length), count in run.shapes.items())


def _examples(settings: Data, seed: int, kind: TaskName, separator: str) -> tuple[Examples, Examples]:
    whole = _read(settings, settings.data, settings.classes, kind, separator, held_out=False)
    share = _share(settings.held_out)
    if share is None:
        train, held_out = whole, _read(settings, settings.held_out, whole.classes, kind, separator, held_out=True)
    else:
        train, held_out = examples.split(whole, [1 - share, share], seed=seed)
    if settings.labels_per_class is not None:
        train = examples.per_class(train, settings.labels_per_class, seed=seed)
    return examples.check(train), held_out


def _read(
    settings: Data, place: str, classes: tuple[str, ...], kind: TaskName, separator: str, *, held_out: bool
) -> Examples:
    how: dict[str, Any] = {name: getattr(settings, name) for name in ("text", "label", "second", "group")}
    how["held_out"] = held_out
    if not place.startswith("tfds:"):
        how |= {"task": kind, "separator": separator, "skip_bad": settings.skip_bad}
        return read(place, classes=classes or None, **how)
    if kind != "classification":
        raise ConfigError(
            f"{place}: TFDS data sets are read with one class for each example; task={kind!r} needs a table"
        )
    name, _, split = place.removeprefix("tfds:").partition(":")
    found = tfds.load(name, split or "train", **how)
    if classes and found.classes != classes:
        raise DataError(f"{place} has the classes {found.classes}, expected {classes}")
    return found


def _share(held_out: str) -> float | None:
    try:
        share = float(held_out)
    except ValueError:
        return None
    if not 0 < share < 1:
        raise ConfigError(f"held_out is a share between 0 and 1, or a file, folder or tfds:NAME:SPLIT; got {held_out}")
    return share


def _check_modality(source: Source, data: Examples, augment: str) -> str:
    modality = build(source, None, {})[0].modality
    if modality not in data.columns:
        raise ConfigError(f"{source.name} takes {modality}; {data.name} holds {', '.join(data.columns)}")
    if augment != "none" and modality != "image":
        raise ConfigError(f"augment={augment!r} changes pictures; {source.name} takes {modality}")
    return modality


def _tokenizer(source: Source, config: Any) -> Any:
    found = text.tokenizer(source.path)
    text.check_vocabulary(found, config)
    return found


def _compared(train: Examples, held_out: Examples) -> list[str]:
    found = compare(train, held_out)
    # What was left out of the training file is listed already; parts of one file have it in common.
    left_out = {} if held_out.skipped is train.skipped else {held_out.name: len(held_out.skipped)}
    return found._replace(skipped=left_out).lines()


def _report(train: Examples, held_out: Examples, console: Console) -> None:
    counts = f"{train.size} examples to train on, {held_out.size} held out"
    lowest, highest = train.labels.min(), train.labels.max()
    what = f"classes {', '.join(train.classes)}" if train.classes else f"numbers from {lowest:g} to {highest:g}"
    console.print(f"{counts}, {what}", markup=False)
    for skipped in train.skipped:
        console.print(f"skipped {skipped.file}, row {skipped.row}: {skipped.reason}", markup=False, soft_wrap=True)
    if train.skipped:
        console.print(f"{len(train.skipped)} rows skipped")
