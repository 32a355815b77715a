"""The formats that are fuzzed: their sound files, how these are mutated, and what reads them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import mutations, seeds


class Format(NamedTuple):
    """One format.

    Attributes:
      seeds: makes the sound folders.
      mutate: one of them, changed.
      load: makes the function that reads a folder.
      memory: bytes that reading may take beside four times the folder's.
    """

    seeds: Callable[[], list[seeds.Files]]
    mutate: Callable[[random.Random, seeds.Files], seeds.Files]
    load: Callable[[], Callable[[Path], None]]
    memory: int = 4 << 20


def _one(change):
    """Change one file of a folder, by `change(rng, name, data)`."""

    def mutate(rng, files):
        name = rng.choice(sorted(files))
        return {**files, name: change(rng, name, files[name])}

    return mutate


def _weights(rng, name, data):
    if name.endswith(".json"):
        return mutations.json_text(rng, data)
    return mutations.safetensors(rng, data)


# Readers


def _tensors():
    import numpy as np

    from jtl.weights.tensors import open_tensors

    def load(folder):
        found = open_tensors(folder)
        for name, (shape, dtype) in found.signatures.items():
            array = found[name]
            assert (array.shape, array.dtype.name) == (shape, np.dtype(dtype).name)
        with found.memory():
            pass

    return load


def _model(every: int):
    """Recognise a checkpoint, and load one of so many whole: tracing takes long."""
    from jtl import pretrained
    from jtl.models import recognise
    from jtl.weights.source import Source

    numbers = iter(range(10**9))

    def load(folder):
        recognise.opened(Source(str(folder), "folder", folder, None), {})
        if not next(numbers) % every:
            pretrained.load(folder)

    return load


def _settings():
    """Recognise settings without weights, and trace the model of one in so many."""
    from jtl import pretrained
    from jtl.models import recognise
    from jtl.weights.source import Source

    numbers = iter(range(10**9))

    def load(folder):
        found = recognise.opened(Source(str(folder), "folder", folder, None), {}, weights=False)
        if not next(numbers) % 20 and _small(found.config):
            pretrained.shapes(found.family, found.family.build(found.config, found.head))

    return load


def _small(config):
    """Whether tracing takes well under a second: the usual EfficientNet has fifty blocks, and takes two."""
    found = [getattr(config, name, None) or 0 for name in _blocks()]
    blocks = sum(sum(value) if isinstance(value, tuple) else value for value in found)
    return blocks * getattr(config, "depth_coefficient", 1.0) < 30


def _blocks():
    from jtl.models import recognise

    return recognise._BLOCKS


def _adapter():
    import tempfile

    import jax

    import jtl
    from jtl.peft import store

    with tempfile.TemporaryDirectory() as place:
        for name, data in seeds.transformers().items():
            (Path(place) / name).parent.mkdir(exist_ok=True)
            (Path(place) / name).write_bytes(data)
        model, variables = jtl.load(place)
    del jax
    return lambda folder: store.load(folder, model, variables)


def _tokenizer():
    from transformers import AutoTokenizer

    from jtl.data import text

    del AutoTokenizer  # its import takes longer than any file may

    def load(folder):
        found = text.tokenizer(folder)
        text.encode(found, ["good film", "bad"], max_length=16)

    return load


def _data():
    from jtl.data import read

    def load(folder):
        (path,) = folder.iterdir()
        found = read(path)
        assert found.size

    return load


# Mutations of whole folders


def _own(rng, files):
    name = rng.choice(["jtl.json"] * 3 + ["model.safetensors"])
    return {**files, name: _weights(rng, name, files[name])}


def _config(rng, files):
    name = rng.choice(["config.json"] * 5 + sorted(files))
    return {**files, name: _weights(rng, name, files[name])}


def _settings_files():
    return [
        {"config.json": json.dumps(settings).encode()}
        for settings in (*seeds.configs().values(), *seeds.timm().values())
    ]


def _torch_known():
    return [mutations.torch_mutations.Seed(data) for data in mutations.torch_mutations.hand_written()]


def _mutate_torch():
    known = []

    def mutate(rng, files):
        if not known:
            known.extend(_torch_known())
        return dict.fromkeys(files, mutations.torch(rng, known))

    return mutate


def _keras_seeds():
    return [seeds.keras(), seeds.keras("latest"), seeds.keras("earliest", True), seeds.keras("latest", True)]


FORMATS = {
    "safetensors": Format(lambda: [seeds.single()], _one(_weights), _tensors),
    "sharded": Format(lambda: [seeds.sharded()], _one(_weights), _tensors),
    "keras": Format(_keras_seeds, _one(lambda rng, name, data: mutations.keras(rng, data)), _tensors),
    "torch": Format(seeds.torch, _mutate_torch(), _tensors),
    "own": Format(lambda: [seeds.own(family) for family in seeds.configs()], _own, lambda: _model(25), 16 << 20),
    "config": Format(lambda: [seeds.transformers()], _config, lambda: _model(25), 16 << 20),
    "settings": Format(_settings_files, _config, _settings, 16 << 20),
    "adapter": Format(lambda: [seeds.adapter()], _one(_weights), _adapter, 16 << 20),
    "tokenizer": Format(
        lambda: [{n: d for n, d in seeds.transformers().items() if n.startswith("tokenizer")}],
        _one(_weights),
        _tokenizer,
        64 << 20,
    ),
    "data": Format(lambda: list(seeds.tables()), _one(mutations.table), _data, 16 << 20),
}
