"""Labelled examples in memory: take, split and subset them, and check them before a run."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jtl import errors


class Skipped(NamedTuple):
    """A row or file that a reader left out because it was asked to skip bad ones.

    Attributes:
      file: the file it came from.
      row: its 1-based line number as an editor shows it; None when the whole file was left out.
      reason: what was wrong with it.
    """

    file: str
    row: int | None
    reason: str


class Examples(NamedTuple):
    """N labelled examples.

    `len()` of a named tuple counts its fields; the number of examples is `size`.

    Attributes:
      columns: inputs by name, each a list or an array of N entries: `{"text": [...]}`.
      labels: int32 `[N]`, indices into `classes`; or, of examples with any number of labels, float32
        `[N, len(classes)]`, each 0 or 1; or, where there are no classes, numbers to predict, float64 `[N]`, so that
        numbers that differ little beside their size still do when their mean is taken from them.
      classes: the class names.
      groups: str `[N]`, what must not be in two parts of a split (a film, a patient); or None.
      name: what reports call this data set.
      skipped: what the reader left out.
    """

    columns: dict[str, Sequence[Any] | np.ndarray]
    labels: np.ndarray
    classes: tuple[str, ...]
    groups: np.ndarray | None = None
    name: str = "examples"
    skipped: tuple[Skipped, ...] = ()

    @property
    def size(self) -> int:
        """The number of examples, N."""
        return len(self.labels)

    @property
    def task(self) -> str:
        """What the labels are for: "classification", "multilabel" or "regression"."""
        if not self.classes:
            return "regression"
        return "multilabel" if self.labels.ndim == 2 else "classification"


def take(examples: Examples, indices: np.ndarray) -> Examples:
    """The examples at `indices`, in that order.

    Args:
      examples: N examples.
      indices: int `[M]`, each in `range(N)`.

    >>> few = Examples({"text": ["a", "b", "c"]}, np.array([0, 1, 0], np.int32), ("x", "y"))
    >>> take(few, np.array([2, 0])).columns
    {'text': ['c', 'a']}
    """
    indices = np.asarray(indices, np.int64)
    columns = {
        name: column[indices] if isinstance(column, np.ndarray) else [column[i] for i in indices]
        for name, column in examples.columns.items()
    }
    groups = None if examples.groups is None else examples.groups[indices]
    return examples._replace(columns=columns, labels=examples.labels[indices], groups=groups)


def split(
    examples: Examples, parts: Sequence[float] | Sequence[int], *, seed: int, by_group: bool | None = None
) -> tuple[Examples, ...]:
    """Split into disjoint parts that cover everything, the same for the same seed.

    With groups, whole groups are dealt out: no group is in two parts, and part sizes are as close
    to the fractions as whole groups allow. Without, each part holds each class in proportion to
    within about one example, where each example has one class. Each part keeps the order of `examples`.

    Args:
      examples: N examples.
      parts: fractions that sum to 1, or integer sizes that sum to N.
      seed: of the random choice.
      by_group: keep groups together; by default exactly when there are groups.

    Returns:
      One `Examples` for each part.

    Raises:
      ConfigError: parts that do not add up, sizes for a split by group, or groups asked for where none are.
      DataError: a part would be empty.

    >>> few = Examples({"text": list("abcd")}, np.array([0, 1, 0, 1], np.int32), ("x", "y"))
    >>> [part.size for part in split(few, (0.5, 0.5), seed=0)]
    [2, 2]
    """
    if by_group is None:
        by_group = examples.groups is not None
    sizes = _sizes(parts, examples.size, by_group)
    rng = np.random.default_rng(seed)
    if by_group:
        indices = _deal_groups(examples, np.asarray(parts, float), rng)
    else:
        order = _order(examples, rng)
        indices = [np.sort(chunk) for chunk in np.split(order, np.cumsum(sizes)[:-1])]
    for i, chunk in enumerate(indices):
        if not len(chunk):
            raise errors.DataError(
                f"{examples.name}: part {i} of the split {tuple(parts)} is empty with "
                f"{examples.size} examples; ask for fewer or larger parts"
            )
    return tuple(take(examples, chunk) for chunk in indices)


def subset(examples: Examples, size: int, *, seed: int) -> Examples:
    """A random subset of exactly `size` examples with each class in proportion.

    A class has at least one example when `size` is at least the number of classes present. With one seed,
    a smaller subset lies inside a larger one, so that points of a learning curve differ by added
    examples only.

    Args:
      examples: N examples.
      size: how many to keep, from 1 to N.
      seed: of the random choice.

    Raises:
      ConfigError: `size` is not in 1..N.

    >>> few = Examples({"text": list("abcd")}, np.array([0, 1, 0, 1], np.int32), ("x", "y"))
    >>> sorted(subset(few, 2, seed=0).labels.tolist())
    [0, 1]
    """
    if not 1 <= size <= examples.size:
        raise errors.ConfigError(
            f"{examples.name}: a subset of {size} examples was asked for; expected 1 to {examples.size}, "
            "which is all there are"
        )
    order = _order(examples, np.random.default_rng(seed))
    return take(examples, np.sort(order[:size]))


def per_class(examples: Examples, count: int, *, seed: int) -> Examples:
    """A random subset with `count` examples of each class, or all of a class that has fewer.

    With one seed, a smaller subset lies inside a larger one. The order of `examples` is kept.

    Args:
      examples: N examples.
      count: how many of each class to keep, at least 1.
      seed: of the random choice.

    Raises:
      ConfigError: `count` is below 1, or examples do not have one class each.

    >>> few = Examples({"text": list("abcd")}, np.array([0, 0, 0, 1], np.int32), ("x", "y"))
    >>> per_class(few, 2, seed=0).labels.tolist()
    [0, 0, 1]
    """
    if count < 1:
        raise errors.ConfigError(f"{examples.name}: {count} examples of each class were asked for; expected 1 or more")
    if examples.task != "classification":
        raise errors.ConfigError(f"{examples.name}: examples of each class were asked for, and they have not one each")
    order = np.random.default_rng(seed).permutation(examples.size)
    kept = [order[examples.labels[order] == label][:count] for label in np.unique(examples.labels)]
    return take(examples, np.sort(np.concatenate(kept)))


def check(examples: Examples, *, held_out: bool = False) -> Examples:
    """Refuse examples that nothing can be learnt from.

    Args:
      examples: N examples.
      held_out: whether they are only evaluated, for which a single class or number will do.

    Returns:
      `examples`, unchanged.

    Raises:
      DataError: no examples, columns of different lengths, labels of another form than `Examples` says or out of
        range; or, unless `held_out`, fewer than two classes present, no label that differs between examples, or only
        one number.
    """
    if not examples.size:
        raise errors.DataError(f"{examples.name}: the data set is empty; expected at least one example of two classes")
    {"classification": _check_classes, "multilabel": _check_several, "regression": _check_numbers}[examples.task](
        examples
    )
    if not held_out:
        _check_varied(examples)
    return examples


def _check_classes(examples: Examples) -> None:
    name, labels, classes = examples.name, examples.labels, examples.classes
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise errors.DataError(f"{name}: labels are {labels.dtype} {labels.shape}; expected integers [N]")
    _check_lengths(examples)
    bad = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if bad.size:
        raise errors.DataError(
            f"{name}: example {bad[0]} has label {labels[bad[0]]}; expected 0 to {len(classes) - 1} "
            f"for the classes {', '.join(classes)}"
        )


def _check_several(examples: Examples) -> None:
    name, labels = examples.name, examples.labels
    expected = examples.size, len(examples.classes)
    if labels.shape != expected or not ((labels == 0) | (labels == 1)).all():
        raise errors.DataError(f"{name}: labels are {labels.dtype} {labels.shape}; expected 0 and 1 {expected}")
    _check_lengths(examples)


def _check_numbers(examples: Examples) -> None:
    name, labels = examples.name, examples.labels
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.floating):
        raise errors.DataError(f"{name}: labels are {labels.dtype} {labels.shape}; expected floats [N], or classes")
    _check_lengths(examples)
    bad = np.flatnonzero(~(np.abs(labels) <= np.finfo(np.float32).max))  # so is NaN
    if bad.size:
        raise errors.DataError(
            f"{name}: example {bad[0]} has the label {labels[bad[0]]}; expected a number within float32"
        )


def _check_varied(examples: Examples) -> None:
    labels = examples.labels
    if (labels != labels[:1]).any():
        return
    found, expected = {
        "classification": lambda: (f"are of the class {examples.classes[labels[0]]!r}", "at least two classes"),
        "multilabel": lambda: ("have the same labels", "some that differ"),
        "regression": lambda: (f"have the label {labels[0]:g}", "several"),
    }[examples.task]()
    raise errors.DataError(f"{examples.name}: all {examples.size} examples {found}; expected {expected}")


def _check_lengths(examples: Examples) -> None:
    lengths = {f"column {name!r}": len(column) for name, column in examples.columns.items()}
    if examples.groups is not None:
        lengths["groups"] = len(examples.groups)
    for what, length in lengths.items():
        if length != examples.size:
            raise errors.DataError(
                f"{examples.name}: {what} has {length} entries; expected {examples.size}, as many as labels"
            )


def _sizes(parts: Sequence[float] | Sequence[int], total: int, by_group: bool) -> list[int]:
    """The number of rows of each part, rounded so that they sum to `total`."""
    if len(parts) < 2 or min(parts) <= 0:
        raise errors.ConfigError(f"split into {tuple(parts)}: expected two or more parts, all above zero")
    if all(isinstance(part, (int, np.integer)) for part in parts):
        if by_group:
            raise errors.ConfigError(
                f"split into sizes {tuple(parts)}: whole groups cannot meet exact sizes; pass fractions, "
                "or by_group=False to let a group be in two parts"
            )
        if sum(parts) != total:
            raise errors.ConfigError(f"split into sizes {tuple(parts)}: they sum to {sum(parts)}, not to {total}")
        return [int(part) for part in parts]
    if abs(sum(parts) - 1) > 1e-6:
        raise errors.ConfigError(f"split into fractions {tuple(parts)}: they sum to {sum(parts):g}, not to 1")
    edges = np.rint(np.cumsum(parts) * total).astype(int)
    return np.diff(edges, prepend=0).tolist()


def _deal_groups(examples: Examples, fractions: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Give each group, in random order, to the part that is least filled for its fraction."""
    if examples.groups is None:
        raise errors.ConfigError(f"{examples.name}: by_group=True, but these examples have no groups")
    names, group_of, counts = np.unique(examples.groups, return_inverse=True, return_counts=True)
    part_of_group = np.zeros(len(names), np.int64)
    filled = np.zeros(len(fractions))
    for group in rng.permutation(len(names)):
        part = np.argmin(filled / fractions)
        part_of_group[group] = part
        filled[part] += counts[group]
    if len(names) < len(fractions):
        raise errors.DataError(
            f"{examples.name}: {len(names)} groups cannot fill {len(fractions)} parts; "
            "ask for fewer parts, or pass by_group=False to let a group be in two of them"
        )
    return [np.flatnonzero(part_of_group[group_of] == part) for part in range(len(fractions))]


def _order(examples: Examples, rng: np.random.Generator) -> np.ndarray:
    """A random order, in which every stretch holds the classes in proportion where each example has one."""
    if examples.task != "classification":
        return rng.permutation(examples.size)
    return _interleave_classes(examples.labels, rng)


def _interleave_classes(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order of which every stretch holds the classes in proportion.

    The k-th of a class's n examples (shuffled) stands at k/n of the way. A cut anywhere is therefore
    stratified and of exact size, and the first example of each class stands before every second one.
    """
    order = rng.permutation(len(labels))
    _, shuffled, counts = np.unique(labels[order], return_inverse=True, return_counts=True)
    by_class = np.argsort(shuffled, kind="stable")
    rank = np.empty(len(labels), np.int64)
    rank[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return order[np.argsort(rank / counts[shuffled], kind="stable")]
