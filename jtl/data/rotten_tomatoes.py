"""Rotten Tomatoes reviews as a TFDS data set that is split by film, prepared without TensorFlow.

Import this module only where tensorflow-datasets is installed: a TFDS builder must be a class of a module, so
the import cannot wait. `jtl.data.tfds.load("rotten-tomatoes", split)` does that, and names the extra if need be.
"""

import bz2
import contextlib
import csv
import hashlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from jtl.weights import assets

CLASSES = ("rotten", "fresh")

_DESCRIPTION = """\
Sentences of film reviews from 2002, "rotten" or "fresh" by their critic's verdict, after Pang and Lee.
No film is in two splits: a split by row would let a classifier score with the names of actors.
Plot summaries are left out, and so are 3 repeats of a text, one of them across films.
"""


class RottenTomatoesByMovie(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Builder of 4,863 reviews of 156 films in the splits train, validation and test."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "text": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=list(CLASSES)),
                "movie": tfds.features.Text(),
            }
        )
        return tfds.core.DatasetInfo(builder=self, description=_DESCRIPTION, features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        path = assets.fetch("rotten-tomatoes") / "rotten_tomatoes_corpus.csv.bz2"
        return {name: self._generate_examples(path, name) for name in ("train", "validation", "test")}

    def _generate_examples(self, path: Path, split: str) -> Iterator[tuple[int, dict[str, str]]]:
        for key, row in enumerate(reviews(path)):
            if split_of(row["movie"]) == split:
                yield key, row


def builder(data_dir: str | os.PathLike[str] | None = None) -> RottenTomatoesByMovie:
    """The builder, with its data prepared.

    Args:
      data_dir: where the prepared files are, or go; by default in jtl's cache.

    Raises:
      SourceNotFoundError: the reviews must be fetched and cannot be.
    """
    root = assets.cache_dir() / "tfds" if data_dir is None else Path(data_dir)
    made = RottenTomatoesByMovie(data_dir=str(root), file_format="array_record")
    if not made.is_prepared():
        # It prints its progress; stdout belongs to the program's own output.
        with contextlib.redirect_stdout(sys.stderr):
            made.download_and_prepare()
    return made


def reviews(path: Path) -> Iterator[dict[str, str]]:
    """The reviews of the corpus: `text`, `label` and `movie` of each, each text once.

    Args:
      path: `rotten_tomatoes_corpus.csv.bz2`.
    """
    seen = set()
    # newline="" hands line ends within quotes to the csv module as they are.
    with io.TextIOWrapper(bz2.open(path, "rb"), encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = row["text"].strip()
            if row["category"] in CLASSES and text not in seen:
                seen.add(text)
                yield {"text": text, "label": row["category"], "movie": row["movie_name"]}


def split_of(movie: str) -> str:
    """The split of a film, by a digest of its name: about 60 % train, 10 % validation, 30 % test.

    >>> split_of("chicago")
    'train'
    """
    percentile = int.from_bytes(hashlib.sha256(movie.encode()).digest()) % 100
    if percentile < 60:
        return "train"
    return "validation" if percentile < 70 else "test"
