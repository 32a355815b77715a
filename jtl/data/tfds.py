"""TensorFlow Datasets without TensorFlow: what is prepared on disk, as examples in memory."""

import os
import re
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jtl import errors
from jtl.data import tables
from jtl.data.examples import Examples, check
from jtl.data.pictures import Record
from jtl.data.targets import class_names

OWN = "rotten-tomatoes"
"""The data set that jtl prepares itself, by `jtl.data.rotten_tomatoes`."""


def load(
    name: str,
    split: str,
    *,
    text: str = "text",
    label: str = "label",
    second: str | None = None,
    group: str | None = None,
    image: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    held_out: bool = False,
) -> Examples:
    """Load a split of a prepared TFDS data set.

    Args:
      name: `"rotten-tomatoes"`, which is prepared on first use and grouped by film; or a TFDS name such as
        `"imdb_reviews"` or `"glue/sst2:2.0.0"` that you have prepared; or a folder with `dataset_info.json`.
      split: a split or slice, `"train"`, `"test[:10%]"`, `"train[100:]+validation"`.
      text: the feature of input texts.
      label: the feature of labels, a ClassLabel or an integer.
      second: the feature of second texts, where examples are pairs.
      group: a feature whose values must not be in two parts of a split.
      image: the feature of pictures, when these are the inputs, not texts. They stay on disk until
        `load_image` wants them.
      data_dir: where the data is prepared; by default where TFDS does.
      held_out: whether examples are only evaluated, for which one class will do.

    Returns:
      Examples with `columns={"text": [...]}`, and perhaps "second", or `{"image": [...]}` of what `load_image` takes;
      of a feature that is an array, not an encoded picture, uint8 `[H, W, C]` arrays.

    Raises:
      SourceNotFoundError: no data set has this name, or it is not prepared.
      ConfigError: a name or split that TFDS cannot read, or a community data set.
      DataError: it was prepared as tfrecord, lacks a feature, has pictures of floats, or has no two classes
        (unless `held_out`).
      MissingExtraError: tensorflow-datasets is not installed.
    """
    builder = _builder(name, data_dir)
    group = "movie" if name == OWN and group is None else group
    column, feature = ("text", text) if image is None else ("image", image)
    _check_features(name, builder.info.features, [f for f in (feature, label, second, group) if f is not None])
    encoded = image is not None and _is_encoded(name, builder.info.features[image])
    source = _source(builder, name, split, data_dir)
    inputs, rows = [], []
    for i, row in enumerate(source):
        value = row.pop(feature) if image is not None else row[feature]
        inputs.append(Record(source, i, feature, f"{name}:{split}", zlib.crc32(value)) if encoded else value)
        rows.append(row)
    if image is None:
        inputs = _strings(name, feature, inputs)
    columns: dict[str, Any] = {column: inputs}
    if second is not None:
        columns["second"] = _strings(name, second, (row[second] for row in rows))
    groups = None if group is None else np.array(_strings(name, group, (row[group] for row in rows)))
    labels, classes = _labels(builder.info.features[label], [int(row[label]) for row in rows])
    return check(Examples(columns, labels, classes, groups, f"{name}:{split}"), held_out=held_out)


class Texts(NamedTuple):
    """The texts of a split, read one after another.

    Attributes:
      rows: iterates over them.
      files: what they are read from.
    """

    rows: Iterable[str]
    files: tuple[Path, ...]


def texts(name: str, split: str, *, text: str = "text", data_dir: str | os.PathLike[str] | None = None) -> Texts:
    """The texts of a split of a prepared TFDS data set, which stay on disk until they are asked for.

    Args:
      name: as in `load`.
      split: as in `load`.
      text: the feature of texts.
      data_dir: as in `load`.

    Raises:
      JtlError: as `load` does.
    """
    builder = _builder(name, data_dir)
    _check_features(name, builder.info.features, [text])
    source = _source(builder, name, split, data_dir)
    files = tuple(Path(path) for path in builder.info.splits[split].filepaths)
    return Texts((_string(name, text, row, value[text]) for row, value in enumerate(source)), files)


def _tfds() -> Any:
    try:
        import importlib_resources  # noqa: F401 - used by tensorflow-datasets, which does not declare it
        import tensorflow_datasets
    except ImportError as error:
        raise errors.missing_extra(error.name or "tensorflow-datasets", "data") from error
    return tensorflow_datasets


def _builder(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    tfds = _tfds()
    if name == OWN:
        from jtl.data import rotten_tomatoes

        return rotten_tomatoes.builder(data_dir)
    folder = Path(data_dir or "") / name
    if (folder / "dataset_info.json").is_file():
        return tfds.builder_from_directory(str(folder))
    if re.match(r"\w+:(?!\d)", name):
        raise errors.ConfigError(
            f"{name!r} names a community data set, which needs the network; pass the folder where it is prepared"
        )
    try:
        return tfds.builder(name, data_dir=None if data_dir is None else str(data_dir))
    except tfds.core.DatasetNotFoundError as error:
        raise errors.SourceNotFoundError(
            f"no data set is named {name!r}, and none of this name is prepared in {_place(data_dir)}{_hint(name)}"
        ) from error
    except (ValueError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise errors.ConfigError(f"tensorflow-datasets cannot load {name!r}: {reason}{_hint(name)}") from error


def _hint(name: str) -> str:
    base = re.split("[/:]", name)[0]
    # Without this argument list_builders would ask a server.
    known = [OWN, *_tfds().list_builders(with_community_datasets=False)]
    return "" if base in known else tables.nearest(base, known)


def _place(data_dir: str | os.PathLike[str] | None) -> str:
    return "the default folder of tensorflow-datasets" if data_dir is None else str(data_dir)


def _check_features(name: str, features: Any, wanted: Sequence[str]) -> None:
    for feature in wanted:
        if feature not in features:
            raise errors.DataError(
                f"{name} has no feature {feature!r}; it has {', '.join(features)}"
                f"{tables.nearest(feature, list(features))}"
            )


def _is_encoded(name: str, feature: Any) -> bool:
    """Whether a feature of pictures is stored as PNG or JPEG, which is then decoded where it is needed."""
    if not isinstance(feature, _tfds().features.Image):
        return False
    if feature.np_dtype not in (np.uint8, np.uint16):
        raise errors.DataError(f"{name}: the pictures are {feature.np_dtype.__name__}; expected uint8 or uint16")
    return True


def _source(builder: Any, name: str, split: str, data_dir: str | os.PathLike[str] | None) -> Iterable[dict[str, Any]]:
    tfds, features = _tfds(), builder.info.features
    skip = {key: tfds.decode.SkipDecoding() for key in features if isinstance(features[key], tfds.features.Image)}
    try:
        return builder.as_data_source(split=split, **({"decoders": skip} if skip else {}))
    except NotImplementedError as error:
        if builder.is_prepared():
            raise errors.DataError(
                f"{name} is prepared as {builder.info.file_format.value} in {builder.data_dir}, which only "
                "TensorFlow reads; prepare it as array_record in another folder, and pass that as data_dir"
            ) from error
        raise _unprepared(name, data_dir) from error
    except (ValueError, KeyError, AssertionError) as error:
        splits = list(builder.info.splits)
        if not splits:
            raise _unprepared(name, data_dir) from error
        raise errors.ConfigError(
            f"{name}: the split {split!r} cannot be read; expected a slice of {', '.join(splits)}"
        ) from error


def _unprepared(name: str, data_dir: str | os.PathLike[str] | None) -> errors.SourceNotFoundError:
    where = "" if data_dir is None else f", data_dir={str(data_dir)!r}"
    return errors.SourceNotFoundError(
        f"{name} is not prepared in {_place(data_dir)}; prepare it once, with the network:\n"
        f'  python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}{where})'
        ".download_and_prepare(file_format='array_record')\""
    )


def _strings(name: str, feature: str, values: Iterable[Any]) -> list[str]:
    return [_string(name, feature, row, value) for row, value in enumerate(values)]


def _string(name: str, feature: str, row: int, value: Any) -> str:
    """A text as TFDS stores it, bytes of UTF-8, as a string."""
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise errors.DataError(f"{name}: {feature!r} of example {row} is not UTF-8: {error}; expected text") from error


def _labels(feature: Any, values: list[int]) -> tuple[np.ndarray, tuple[str, ...]]:
    if isinstance(feature, _tfds().features.ClassLabel):
        return np.array(values, np.int32), tuple(feature.names)
    classes = class_names(map(str, values))
    index = {int(name): i for i, name in enumerate(classes)}
    return np.array([index[value] for value in values], np.int32), classes
