"""What a command is given: labelled examples, and a model that takes them."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.markup import escape

import jtl
from jtl.data import Batches, Examples, compare, examples, picture_batches, read, text, tfds
from jtl.errors import ConfigError, DataError
from jtl.pretrained import build
from jtl.recipes import training
from jtl.recipes.settings import AugmentName, Data
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
    """

    train: Examples
    held_out: Examples
    source: Source
    modality: str
    model: Any
    variables: dict[str, Any]
    tokenizer: Any


def task(settings: Data, seed: int, console: Console, *, augment: str = "none") -> Task:
    """Read examples and model, and say what was found.

    Args:
      settings: where they are.
      seed: of the split, and of the head.
      console: where to print.
      augment: how training examples are augmented; only pictures can be.

    Raises:
      JtlError: whatever is wrong with either.
    """
    if settings.batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {settings.batch_size}")
    train, held_out = _examples(settings, seed)
    _report(train, held_out, console)
    head = jtl.heads.classifier(len(train.classes))
    with console.status(f"loading {escape(settings.model)}"):
        source = resolve(settings.model, revision=settings.revision)
        modality = _check_modality(source, train, augment)
        model, variables = jtl.load(source.path, head, key=jax.random.split(jax.random.key(seed))[0])
        tokenizer = text.tokenizer(source.path) if modality == "text" else None
    if modality == "image":
        for line in compare(train, held_out).lines():
            console.print(line, markup=False, soft_wrap=True)
    return Task(train, held_out, source, modality, model, variables, tokenizer)


def batches(
    settings: Data,
    given: Task,
    held_out: Sequence[Examples],
    console: Console,
    *,
    seed: int,
    epochs: int,
    augment: AugmentName = "none",
) -> tuple[Batches, Any, list[Batches]]:
    """Batches to train on, what is to be done to them on the device, and batches to evaluate on.

    Args:
      settings: sizes.
      given: what is trained on.
      held_out: parts to evaluate on, each by itself.
      console: where to print.
      seed: of the order.
      epochs: passes over the training examples.
      augment: of pictures.
    """
    size = settings.batch_size
    if given.modality == "image":
        spec = given.model.config.input
        train, change = training.training_pictures(
            given.train, spec, augment, seed=seed, epochs=epochs, batch_size=size
        )
        console.print(f"{len(train)} steps of pictures of {spec.size[0]}x{spec.size[1]} pixels")
        return train, change, [picture_batches(part, spec, batch_size=size) for part in held_out]
    longest = min(settings.max_length, given.model.config.max_position_embeddings)
    encode = functools.partial(training.text_batches, given.tokenizer, max_length=longest, batch_size=size)
    train, cut = encode(given.train, seed=seed, epochs=epochs)
    tests = [encode(part, known=train.layout.buckets) for part in held_out]
    shapes = ", ".join(f"{rows}x{length} ({count})" for (rows, length), count in sorted(train.shapes.items()))
    console.print(f"{len(train)} steps in {len(train.shapes)} shapes: {shapes}")
    cut_tests = sum(count for _, count in tests)
    if cut or cut_tests:
        console.print(f"{cut} training and {cut_tests} held-out texts were cut to {longest} tokens")
    return train, None, [test for test, _ in tests]


def _examples(settings: Data, seed: int) -> tuple[Examples, Examples]:
    whole = _read(settings, settings.data, settings.classes)
    share = _share(settings.held_out)
    if share is None:
        train, held_out = whole, _read(settings, settings.held_out, whole.classes)
    else:
        train, held_out = examples.split(whole, [1 - share, share], seed=seed)
    if settings.labels_per_class is not None:
        train = examples.per_class(train, settings.labels_per_class, seed=seed)
    return examples.check(train), held_out


def _read(settings: Data, place: str, classes: tuple[str, ...]) -> Examples:
    if not place.startswith("tfds:"):
        return read(
            place,
            text=settings.text,
            label=settings.label,
            group=settings.group,
            classes=classes or None,
            skip_bad=settings.skip_bad,
        )
    name, _, split = place.removeprefix("tfds:").partition(":")
    found = tfds.load(name, split or "train", text=settings.text, label=settings.label, group=settings.group)
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


def _report(train: Examples, held_out: Examples, console: Console) -> None:
    counts = f"{train.size} examples to train on, {held_out.size} held out"
    console.print(f"{counts}, classes {', '.join(train.classes)}", markup=False)
    for skipped in train.skipped:
        console.print(f"skipped {skipped.file}, row {skipped.row}: {skipped.reason}", markup=False, soft_wrap=True)
    if train.skipped:
        console.print(f"{len(train.skipped)} rows skipped")
