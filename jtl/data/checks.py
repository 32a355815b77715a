"""What to know of two parts of a data set before training: classes, their counts, and what is in both."""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jtl import errors
from jtl.data.examples import Examples
from jtl.data.pictures import content, load_image


class Duplicate(NamedTuple):
    """An example that both parts hold.

    Attributes:
      train: its index in the part that is trained on.
      held_out: its index in the other.
      names: what the two are called: the files, or the beginnings of the texts.
      labels: the class names that they have.
    """

    train: int
    held_out: int
    names: tuple[str, str]
    labels: tuple[str, str]


class Report(NamedTuple):
    """What `compare` found.

    Attributes:
      counts: by the name of a part, the examples of each class, those without any included; none where examples have
        not one class each.
      untrained: classes that are held out, but not trained on.
      missing: classes that are trained on, but not held out.
      duplicates: examples that are in both parts.
      skipped: by the name of a part, how many files or rows its reader left out.
      unused: classes without an example in either part.
    """

    counts: dict[str, dict[str, int]]
    untrained: tuple[str, ...]
    missing: tuple[str, ...]
    duplicates: tuple[Duplicate, ...]
    skipped: dict[str, int]
    unused: tuple[str, ...] = ()

    def lines(self, most: int = 5) -> list[str]:
        """What a user should read: one line for each part, then one for each problem.

        Args:
          most: how many duplicates are named.
        """
        found = [f"{part}: {sum(counts.values())} examples; {_listed(counts)}" for part, counts in self.counts.items()]
        found += [f"{part}: {count} left out as bad" for part, count in self.skipped.items() if count]
        if self.untrained:
            found.append(f"never trained on, so never right: {', '.join(self.untrained)}")
        if self.missing:
            found.append(f"without a held-out example, so not evaluated: {', '.join(self.missing)}")
        if self.unused:
            found.append(f"without any example, so not learnt: {', '.join(self.unused)}")
        if self.duplicates:
            found.append(
                f"{len(self.duplicates)} held-out examples are in the training data, which flatters the scores"
            )
            found += [_line(duplicate) for duplicate in self.duplicates[:most]]
        return found


def compare(train: Examples, held_out: Examples, *, pixels: bool = False) -> Report:
    """Compare the part that is trained on with the one that is held out.

    Args:
      train: examples.
      held_out: examples with the same classes.
      pixels: as in `duplicates`.

    Raises:
      DataError: the classes, or the kinds of labels, differ, so that labels would mean two things; or as `duplicates`.
    """
    if train.classes != held_out.classes:
        raise errors.DataError(
            f"{train.name} has the classes {', '.join(train.classes)}, {held_out.name} has "
            f"{', '.join(held_out.classes)}; read the second with the classes of the first"
        )
    if train.task != held_out.task:
        raise errors.DataError(f"{train.name} is for {train.task}, {held_out.name} for {held_out.task}; expected one")
    names, counts = _part_names(train, held_out), [_counts(part) for part in (train, held_out)]
    by_name = {name: dict(zip(train.classes, found, strict=True)) for name, found in zip(names, counts, strict=True)}
    pairs = list(zip(train.classes, *counts, strict=True))
    return Report(
        counts=by_name if train.task == "classification" else {},
        untrained=tuple(name for name, trained, held in pairs if held and not trained),
        missing=tuple(name for name, trained, held in pairs if trained and not held),
        duplicates=duplicates(train, held_out, pixels=pixels),
        skipped={name: len(part.skipped) for name, part in zip(names, (train, held_out), strict=True)},
        unused=tuple(name for name, trained, held in pairs if not trained and not held),
    )


def _counts(examples: Examples) -> list[int]:
    """How many examples have each class, or label; nothing of numbers."""
    if examples.task == "regression":
        return []
    if examples.task == "multilabel":
        return examples.labels.astype(np.int64).sum(axis=0).tolist()
    return np.bincount(examples.labels, minlength=len(examples.classes)).tolist()


def duplicates(train: Examples, held_out: Examples, *, pixels: bool = False) -> tuple[Duplicate, ...]:
    """The held-out examples whose content is in the training data, by SHA-256.

    Args:
      train: examples.
      held_out: examples with the same columns.
      pixels: compare decoded pictures, so that a copy in another lossless format counts; by default the
        bytes of the files.

    Returns:
      For each such held-out example, in order, the first example to train on that equals it.

    Raises:
      DataError: the columns differ, or a file cannot be read.
    """
    if set(train.columns) != set(held_out.columns):
        columns = [f"{part.name} has {', '.join(part.columns)}" for part in (train, held_out)]
        raise errors.DataError(f"the columns differ: {'; '.join(columns)}")
    first: dict[bytes, int] = {}
    for i, digest in enumerate(_digests(train, pixels)):
        first.setdefault(digest, i)
    return tuple(
        _duplicate(train, held_out, first[digest], j)
        for j, digest in enumerate(_digests(held_out, pixels))
        if digest in first
    )


def _digests(examples: Examples, pixels: bool) -> Iterator[bytes]:
    names = sorted(examples.columns)
    for i in range(examples.size):
        found = hashlib.sha256()
        for name in names:
            value = examples.columns[name][i]
            found.update(_content(value) if name != "image" else _picture(value, pixels))
            found.update(b"\0")
        yield found.digest()


def _content(value: Any) -> bytes:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind != "U":
        return f"{value.dtype}{value.shape}".encode() + value.tobytes()
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")


def _picture(value: Any, pixels: bool) -> bytes:
    if isinstance(value, np.ndarray):
        return _content(value)
    return _content(load_image(value)) if pixels else content(value)


def _duplicate(train: Examples, held_out: Examples, i: int, j: int) -> Duplicate:
    parts = ((train, i), (held_out, j))
    names = [_short(next(iter(part.columns.values()))[row], row) for part, row in parts]
    labels = [_label(part, row) for part, row in parts]
    return Duplicate(i, j, (names[0], names[1]), (labels[0], labels[1]))


def _label(part: Examples, row: int) -> str:
    label = part.labels[row]
    if part.task == "classification":
        return part.classes[label]
    if part.task == "regression":
        return f"{label:g}"
    return ", ".join(name for name, there in zip(part.classes, label, strict=True) if there)


def _short(value: Any, row: int) -> str:
    text = f"example {row}" if isinstance(value, bytes | np.ndarray) else " ".join(str(value).split())
    return text if len(text) <= 80 else text[:39] + " ... " + text[-36:]


def _part_names(train: Examples, held_out: Examples) -> tuple[str, str]:
    if train.name != held_out.name:
        return train.name, held_out.name
    return f"{train.name} (train)", f"{held_out.name} (held out)"


def _listed(counts: dict[str, int], most: int = 20) -> str:
    listed = ", ".join(f"{name} {count}" for name, count in list(counts.items())[:most])
    return listed if len(counts) <= most else f"{listed}, and {len(counts) - most} more classes"


def _line(duplicate: Duplicate) -> str:
    (left, right), (trained, held) = duplicate.names, duplicate.labels
    differing = "" if trained == held else f", labelled {trained!r} and {held!r}"
    return f"  {right} is {left}{differing}"
