"""Data: labelled examples, where they come from, and the input pipeline.

`examples` holds labelled examples and splits them, `checks` compares the parts; `sources` and `folders` read
files, `tfds` reads TensorFlow Datasets, `corpus` texts of any number; `text` encodes texts, `windows` long ones,
`tagging` words with tags, `answers` questions with their contexts, and `packing` puts several texts into a row;
`pictures` decodes, `preprocess` makes of a picture what a model takes; `batches` makes batches.
Importing this package imports numpy alone: Pillow, transformers, pyarrow, grain and tensorflow-datasets are imported
by the functions that need them.
"""

from jtl.data import answers, corpus, packing, tagging, windows
from jtl.data.checks import Report, compare, duplicates
from jtl.data.examples import Examples, Skipped, check, per_class, split, subset, take
from jtl.data.pictures import load_image
from jtl.data.pipeline import Batches, batches
from jtl.data.preprocess import picture_batches, picture_transform, preprocess
from jtl.data.sources import read
from jtl.data.text import Encoded, Ragged, buckets, encode, ragged, tokenizer

__all__ = [
    "Batches",
    "batches",
    "Encoded",
    "Examples",
    "Ragged",
    "Report",
    "Skipped",
    "answers",
    "buckets",
    "check",
    "compare",
    "corpus",
    "duplicates",
    "encode",
    "load_image",
    "packing",
    "per_class",
    "picture_batches",
    "picture_transform",
    "preprocess",
    "ragged",
    "read",
    "split",
    "subset",
    "tagging",
    "take",
    "tokenizer",
    "windows",
]
