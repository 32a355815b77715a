"""Data: labelled examples, where they come from, and the input pipeline.

`examples` holds labelled examples and splits them; `sources` and `folders` read files, `tfds` reads
TensorFlow Datasets; `text` encodes; `batches` makes batches. Importing this package imports numpy alone:
Pillow, transformers, grain and tensorflow-datasets are imported by the functions that need them.
"""

from jtl.data.examples import Examples, Skipped, check, split, subset, take
from jtl.data.folders import load_image
from jtl.data.pipeline import Batches, batches
from jtl.data.sources import read
from jtl.data.text import Encoded, Ragged, buckets, encode, ragged, tokenizer

__all__ = [
    "Batches",
    "batches",
    "Encoded",
    "Examples",
    "Ragged",
    "Skipped",
    "buckets",
    "check",
    "encode",
    "load_image",
    "ragged",
    "read",
    "split",
    "subset",
    "take",
    "tokenizer",
]
