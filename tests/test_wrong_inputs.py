"""What users get wrong: each is refused on the host, before a training step is compiled, in words that help.

A row's words say what was given, what was expected, where, and what to do, as far as there is something to do.
"""

import dataclasses
import io
import json
from collections.abc import Callable
from inspect import unwrap
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import jtl
from jtl import data, errors, heads, losses, strategies
from jtl.data import text
from jtl.recipes import audit, finetune, inspect, models, sweep
from jtl.recipes.settings import Audit, Finetune, Inspect, Models, Sweep
from jtl.step import eval_step

from .models import checkpoints

TX = optax.adam(1e-2)
KEY = jax.random.key(0)
ROWS_OF_TEXT = [(f"{a} film {b}", name) for name in ("pos", "neg") for a in ("good", "fine") for b in ("bad", "dull")]


class Net(nn.Module):
    """A stem and a head, for rows `[batch, 5]`."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(jnp.tanh(nn.Dense(4, name="stem")(x)))


class World:
    """What there is to get wrong: rows, a small model, a checkpoint, a table of texts, an empty folder."""

    loss = jtl.supervised(Net(), losses.cross_entropy)
    x = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    y = np.random.default_rng(1).integers(0, 3, 20).astype(np.int32)

    def __init__(self, folder):
        self.folder = folder
        self.variables = Net().init(KEY, self.x[:1])
        self.bert = checkpoints.write_tokenizer(checkpoints.write(folder / "bert"))
        self.csv = self.table(ROWS_OF_TEXT)
        self.tokenizer = text.tokenizer(self.bert)
        self.model, self.bert_variables = jtl.load(self.bert, heads.classifier(2), key=KEY)
        self.bert_loss = jtl.supervised(self.model, losses.cross_entropy)
        (folder / "file").write_text("a file")

    def table(self, rows, header="text,label", name="data.csv"):
        path = self.folder / name
        path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
        return path

    def file(self, name, content):
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(content)
        return self.folder / name

    def settings(self, **changes):
        path = checkpoints.write(self.folder / "changed", checkpoints.CONFIG | changes)
        return path

    def start(self, variables=None, mask=None):
        return jtl.init(variables or self.variables, TX, trainable=mask or jtl.everything(), key=KEY)

    def fit(self, batch, loss=None, tx=TX, **options):
        return list(jtl.fit(loss or self.loss, tx, *self.start(), [batch], **options))

    def rows(self, x=None, y=None, **options):
        x, y = self.x if x is None else x, self.y if y is None else y
        return data.batches({"x": x}, y, **{"batch_size": 4, "seed": 0, "epochs": 2, **options})

    def train(self, x=None, y=None, loss=None, **options):
        return list(jtl.fit(loss or self.loss, TX, *self.start(), self.rows(x, y), **options))

    def read(self, ids, **others):
        batch = {"input_ids": np.asarray(ids), "label": np.zeros(len(ids), np.int32), **others}
        return list(jtl.fit(self.bert_loss, TX, *self.start(self.bert_variables), [batch]))

    def finetune(self, **settings):
        given = {"data": str(self.csv), "model": str(self.bert), "batch_size": 2, "max_length": 8, "epochs": 1}
        return finetune.run(Finetune(**{**given, **settings}), Console(file=io.StringIO()))

    def sweep(self, **settings):
        given = {"data": str(self.csv), "model": str(self.bert), "batch_size": 2, "max_length": 8, "epochs": 1}
        return sweep.run(Sweep(**{**given, **settings}), Console(file=io.StringIO()))

    def at(self, row, value, of=None):
        """The rows, or labels, with one value changed."""
        changed = np.array(self.y if of is None else of)
        changed[row] = value
        return changed


class Row(NamedTuple):
    """One mistake: what makes it, the class of the error, and what its message says."""

    name: str
    make: Callable[[World], Any]
    error: type[Exception]
    says: tuple[str, ...]


def _silent(recipe, settings):
    return recipe.run(settings, Console(file=io.StringIO()))


def _square(params, collections, batch, *, key):
    return jnp.square(batch["x"]), jtl.Aux({}, {})


E = errors
ROWS = (
    # Loading
    Row(
        "a folder that is not there",
        lambda w: jtl.load(w.folder / "none"),
        E.SourceNotFoundError,
        ("no such folder", "none", "check the path"),
    ),
    Row(
        "a misspelt asset",
        lambda w: jtl.load("minilm-l7"),
        E.SourceNotFoundError,
        ("minilm-l7", "did you mean", "minilm-l6"),
    ),
    Row(
        "a file that holds no weights",
        lambda w: jtl.load(w.csv),
        E.SourceNotFoundError,
        ("data.csv", "neither a folder nor a file of weights", "give the folder"),
    ),
    Row("an empty source", lambda w: jtl.load(""), E.SourceNotFoundError, ("the source is empty", "give a folder")),
    Row(
        "a folder without weights",
        lambda w: jtl.load(w.file("empty/config.json", json.dumps(checkpoints.CONFIG).encode()).parent),
        E.SourceNotFoundError,
        ("model.safetensors", "it holds: config.json"),
    ),
    Row(
        "a revision of a folder",
        lambda w: jtl.load(w.bert, revision="main"),
        E.ConfigError,
        ("revision='main'", "local path", "leave it out"),
    ),
    Row(
        "a new head without a key",
        lambda w: jtl.load(w.bert, heads.classifier(2)),
        E.ConfigError,
        ("key=", "jax.random.key(0)"),
    ),
    Row(
        "a setting that the family has not",
        lambda w: jtl.load(w.bert, pools="cls"),
        E.ConfigError,
        ("no field 'pools'", "nearest: pool"),
    ),
    Row(
        "a setting of another type",
        lambda w: jtl.load(w.bert, hidden_dropout_prob="0.1"),
        E.ConfigError,
        ("hidden_dropout_prob='0.1'", "expected float"),
    ),
    Row("a setting that is no choice", lambda w: jtl.load(w.bert, pool="best"), E.ConfigError, ("pool 'best'", "mean")),
    Row(
        "a family that there is not",
        lambda w: jtl.load(w.settings(model_type="bart")),
        E.ConfigError,
        ("'bart'", "families", "bert"),
    ),
    Row(
        "settings of another size than the weights",
        lambda w: jtl.load(w.bert, hidden_size=24),
        E.WeightsError,
        ("bert", "(12,)", "(24,)"),
    ),
    Row(
        "more layers than the weights have",
        lambda w: jtl.load(w.bert, num_hidden_layers=3),
        E.WeightsError,
        ("encoder/layer_2",),
    ),
    Row(
        "settings that ask for code",
        lambda w: jtl.load(w.settings(auto_map={"AutoModel": "x.Y"})),
        E.ConfigError,
        ("config.json", "auto_map", "never run", "take that out"),
    ),
    # Heads
    Row("a head without classes", lambda w: heads.classifier(0), E.ConfigError, ("got 0",)),
    Row("a head of a dropout rate of 1", lambda w: heads.classifier(2, dropout=1.0), E.ConfigError, ("[0, 1)", "1.0")),
    Row(
        "an activation that there is not",
        lambda w: heads.masked_language_model(activation="gulu"),
        E.ConfigError,
        ("'gulu'", "gelu"),
    ),
    # Masks
    Row("a pattern that matches nothing", lambda w: w.start(mask=jtl.select("hed")), E.PatternError, ("hed", "head")),
    Row(
        "a pattern with an empty segment",
        lambda w: jtl.select("head//kernel"),
        E.PatternError,
        ("head//kernel", "empty segment"),
    ),
    Row("no pattern", lambda w: jtl.select(), E.PatternError, ("at least one pattern", "everything()")),
    Row(
        "a list of patterns",
        lambda w: unwrap(jtl.select)(["head", "stem"]),
        E.PatternError,
        ("one by one", "['head', 'stem']"),
    ),
    Row("a mask joined to a text", lambda w: jtl.select("head") | "stem", E.MaskError, ("'stem'", "select('stem')")),
    Row("a text for a mask", lambda w: w.start(mask="head"), E.MaskError, ("the string 'head'", "select('head')")),
    Row("a mask of another tree", lambda w: w.start(mask={"head": True}), E.MaskError, ("structure",)),
    Row(
        "a mask of numbers",
        lambda w: w.start(mask=jax.tree.map(lambda _: 1, w.variables["params"])),
        E.MaskError,
        ("1", "expected a bool", "head/bias"),
    ),
    Row(
        "a mask that trains nothing",
        lambda w: w.start(mask=jtl.masks.nothing()),
        E.MaskError,
        ("trains none of the 4 leaves",),
    ),
    Row(
        "a mask that trains whole numbers",
        lambda w: jtl.init({"params": {"a": jnp.arange(3)}}, TX, trainable=jtl.everything(), key=KEY),
        E.MaskError,
        ("int32", "only floats"),
    ),
    # The state
    Row("no mask", lambda w: jtl.init(w.variables, TX, key=KEY), E.ConfigError, ("init needs a mask", "jtl.select")),
    Row(
        "a seed for a key",
        lambda w: unwrap(jtl.init)(w.variables, TX, trainable=jtl.everything(), key=0),
        E.ConfigError,
        ("typed random key", "jax.random.key(0)", "int"),
    ),
    Row(
        "params for variables",
        lambda w: jtl.init(w.variables["params"], TX, trainable=jtl.everything(), key=KEY),
        E.ConfigError,
        ("{'params': ...", "stem"),
    ),
    Row(
        "a strategy and a mask",
        lambda w: jtl.init(w.variables, strategies.feature_extraction(TX), trainable=jtl.everything(), key=KEY),
        E.ConfigError,
        ("masks of its own", "leave trainable= out"),
    ),
    Row(
        "a model that cannot be applied",
        lambda w: jtl.supervised(lambda x: x, losses.cross_entropy),
        E.ConfigError,
        ("apply", "function", "jtl.from_function"),
    ),
    # Batches
    Row("no label", lambda w: w.fit({"x": w.x}), E.DataError, ("lacks ['label']", "['x']")),
    Row(
        "entries of different lengths",
        lambda w: w.fit({"x": w.x, "label": w.y[:-1]}),
        E.DataError,
        ("different lengths", "19", "20"),
    ),
    Row("an empty batch", lambda w: w.fit({"x": w.x[:0], "label": w.y[:0]}), E.DataError, ("no example",)),
    Row("no batch", lambda w: list(jtl.fit(w.loss, TX, *w.start(), [])), E.DataError, ("no batch to train on",)),
    Row(
        "a single number among the entries",
        lambda w: w.fit({"x": w.x, "label": w.y, "weight": np.float32(1)}),
        E.DataError,
        ("different lengths", "weight"),
    ),
    Row(
        "inputs of another width",
        lambda w: w.fit({"x": w.x[:, :4], "label": w.y}),
        E.DataError,
        ("Net cannot take this batch", "x float32[20, 4]", "(5, 4)"),
    ),
    Row(
        "inputs that are texts",
        lambda w: w.fit({"x": np.array(["a"] * 20), "label": w.y}),
        E.DataError,
        ("'x' is <U1[20]", "expected numbers", "encode"),
    ),
    Row(
        "inputs that are objects",
        lambda w: w.fit({"x": np.array([None] * 20), "label": w.y}),
        E.DataError,
        ("'x' is object[20]", "expected numbers"),
    ),
    Row(
        "an input that is not finite",
        lambda w: w.fit({"x": w.at((7, 3), np.nan, w.x), "label": w.y}),
        E.DataError,
        ("'x' of example 7 has nan at [3]", "expected finite", "leave the example out"),
    ),
    Row(
        "an infinite input among the rows",
        lambda w: w.train(w.at((13, 0), -np.inf, w.x)),
        E.DataError,
        ("row 13 of the data", "'x'", "-inf at [0]", "expected finite"),
    ),
    Row(
        "a label past the classes",
        lambda w: w.train(y=w.at(7, 3)),
        E.DataError,
        ("row 7", "label 3", "3 classes", "0 to 2"),
    ),
    Row("a label below zero", lambda w: w.train(y=w.at(19, -1)), E.DataError, ("row 19", "label -1", "0 to 2")),
    Row("labels from one on", lambda w: w.train(y=w.y + 1), E.DataError, ("label 3", "0 to 2")),
    Row(
        "labels that are floats",
        lambda w: w.fit({"x": w.x, "label": w.y.astype("f4")}),
        E.DataError,
        ("labels have dtype float32", "expected integers from 0 to 2"),
    ),
    Row(
        "labels one-hot",
        lambda w: w.fit({"x": w.x, "label": np.eye(3, dtype=int)[w.y]}),
        E.DataError,
        ("labels have shape (20, 3)", "expected (20,)"),
    ),
    Row(
        "a weight below zero",
        lambda w: w.fit({"x": w.x, "label": w.y, "weight": w.at(4, -1, np.ones(20, "f4"))}),
        E.DataError,
        ("'weight' of example 4 is -1.0", "expected 0 or more"),
    ),
    Row(
        "a weight that is no number",
        lambda w: w.fit({"x": w.x, "label": w.y, "weight": w.at(4, np.nan, np.ones(20, "f4"))}),
        E.DataError,
        ("'weight' of example 4", "nan", "expected finite"),
    ),
    Row(
        "weights of another shape",
        lambda w: w.fit({"x": w.x, "label": w.y, "weight": np.ones((20, 1), "f4")}),
        E.DataError,
        ("'weight' has the shape [20, 1]", "[batch]"),
    ),
    Row(
        "a number to predict that is not finite",
        lambda w: w.fit(
            {"x": w.x, "label": w.at((3, 1), np.nan, np.ones((20, 3), "f4"))},
            jtl.supervised(Net(), losses.squared_error),
        ),
        E.DataError,
        ("target of example 3 is nan", "leave"),
    ),
    Row(
        "targets of another shape",
        lambda w: w.fit({"x": w.x, "label": np.ones((20, 2), "f4")}, jtl.supervised(Net(), losses.squared_error)),
        E.DataError,
        ("(20, 2)", "(20, 3)"),
    ),
    Row(
        "several labels past 1",
        lambda w: w.fit(
            {"x": w.x, "label": np.full((20, 3), 2.0, "f4")}, jtl.supervised(Net(), losses.binary_cross_entropy)
        ),
        E.DataError,
        ("[2.0, 2.0]", "expected [0, 1]"),
    ),
    Row(
        "class weights of another number",
        lambda w: w.fit(
            {"x": w.x, "label": w.y}, jtl.supervised(Net(), losses.weighted(losses.cross_entropy, [1.0, 2.0]))
        ),
        E.DataError,
        ("weights has 2 numbers", "3 classes"),
    ),
    Row(
        "class weights that are all 0",
        lambda w: losses.weighted(losses.cross_entropy, [0.0, 0.0]),
        E.ConfigError,
        ("[0. 0.]", "not all of them 0"),
    ),
    Row(
        "a class without examples to weigh",
        lambda w: losses.class_weights(np.array([0, 0, 2]), 3),
        E.DataError,
        ("classes [1]", "no example"),
    ),
    Row(
        "a loss that is no scalar",
        lambda w: w.fit({"x": w.x}, _square),
        E.ConfigError,
        ("a loss is a scalar", "(20, 5)", "take its mean"),
    ),
    Row(
        "a loss without its report",
        lambda w: w.fit({"x": w.x}, lambda p, c, batch, *, key: jnp.mean(batch["x"])),
        E.ConfigError,
        ("jtl.Aux(metrics, collections)",),
    ),
    Row(
        "a batch that does not split",
        lambda w: w.fit({"x": w.x, "label": w.y}, accumulate=3),
        E.DataError,
        ("20", "accumulate=3", "equal size"),
    ),
    Row(
        "no microbatch",
        lambda w: jtl.train_step(w.loss, TX, accumulate=0),
        E.ConfigError,
        ("accumulate=0", "1 or more"),
    ),
    Row(
        "a bad row of the held-out data",
        lambda w: jtl.evaluate(jax.jit(eval_step(w.loss)), *w.start(), []),
        E.DataError,
        ("no held-out batch",),
    ),
    # Texts
    Row(
        "an id past the vocabulary",
        lambda w: w.read([[2, 40, 3]]),
        E.DataError,
        ("input_ids of row 0 has 40 at position 1", "0 to 39", "tokenizer"),
    ),
    Row("an id below zero", lambda w: w.read([[2, -1, 3]]), E.DataError, ("has -1 at position 1", "0 to 39")),
    Row(
        "ids that are floats",
        lambda w: w.read([[2.0, 3.0]]),
        E.DataError,
        ("input_ids are float64[1, 2]", "expected integers"),
    ),
    Row(
        "a text longer than the positions",
        lambda w: w.read([[2] * 17]),
        E.DataError,
        ("17 long", "16 positions", "truncate"),
    ),
    Row(
        "a row of padding alone",
        lambda w: w.read([[2, 3], [0, 0]], attention_mask=np.array([[1, 1], [0, 0]])),
        E.DataError,
        ("row 1 has no token", "leave empty texts out"),
    ),
    Row(
        "a mask of another shape",
        lambda w: w.read([[2, 3]], attention_mask=np.ones((1, 3), int)),
        E.DataError,
        ("[1, 3]", "[1, 2]"),
    ),
    Row(
        "a token type that there is not",
        lambda w: w.read([[2, 3]], token_type_ids=np.array([[0, 2]])),
        E.DataError,
        ("token_type_ids", "0 to 1"),
    ),
    Row(
        "a length without room",
        lambda w: text.encode(w.tokenizer, ["a"], max_length=2),
        E.ConfigError,
        ("max_length=2", "above 2"),
    ),
    Row(
        "a text that is a number",
        lambda w: unwrap(text.encode)(w.tokenizer, ["a", 5], max_length=8),
        E.DataError,
        ("texts[1] is 5 (int)", "expected a string"),
    ),
    Row("no texts", lambda w: text.encode(w.tokenizer, [], max_length=8), E.DataError, ("no texts",)),
    Row(
        "a text without a token",
        lambda w: text.encode(w.tokenizer, ["good", " "], max_length=8),
        E.DataError,
        ("text 1", "no token", "leave it out"),
    ),
    # Pictures
    Row(
        "pictures that are bytes",
        lambda w: _pictures(w, np.zeros((2, 8, 8, 3), np.uint8)),
        E.DataError,
        ("uint8[2, 8, 8, 3]", "expected floats", "jtl.data.picture_batches"),
    ),
    Row(
        "pictures with channels first",
        lambda w: _pictures(w, np.zeros((2, 3, 8, 8), np.float32)),
        E.ConfigError,
        ("[batch, 8, 8, 3]", "[2, 3, 8, 8]"),
    ),
    Row(
        "a pixel that is no number",
        lambda w: _pictures(w, w.at((1, 2, 3, 0), np.nan, np.zeros((2, 8, 8, 3), np.float32))),
        E.DataError,
        ("example 1 has nan at [2, 3, 0]",),
    ),
    # The pipeline and the cache
    Row(
        "columns of different lengths",
        lambda w: data.batches({"x": w.x, "z": w.x[:3]}, batch_size=2),
        E.DataError,
        ("numbers of rows differ", "'z' 3"),
    ),
    Row(
        "a column that is a list",
        lambda w: unwrap(data.batches)({"x": [1, 2]}, batch_size=2),
        E.DataError,
        ("column 'x' is a list", "numpy array"),
    ),
    Row(
        "a column that the batch makes",
        lambda w: data.batches({"weight": w.x}, batch_size=2),
        E.ConfigError,
        ("'weight'", "rename it"),
    ),
    Row("no rows", lambda w: w.rows(w.x[:0], w.y[:0]), E.DataError, ("the data set is empty",)),
    Row("a batch of no rows", lambda w: w.rows(batch_size=0), E.ConfigError, ("batch_size=0",)),
    Row("no epoch", lambda w: w.rows(epochs=0), E.ConfigError, ("epochs=0", "at least 1")),
    Row("a place past the end", lambda w: w.rows(start=99), E.ConfigError, ("start=99", "0 to 10")),
    Row(
        "a balance without a seed",
        lambda w: w.rows(seed=None, balance=True),
        E.ConfigError,
        ("balance", "a seed must be given"),
    ),
    Row(
        "a cache mode that there is not",
        lambda w: _prepared(w, "always"),
        E.ConfigError,
        ("'always'", "auto, off, require"),
    ),
    Row(
        "a cache where nothing is frozen", lambda w: w.train(cache="require"), E.SplitError, ("nothing can be cached",)
    ),
    Row(
        "a cache below a file",
        lambda w: _cached(w, w.folder / "file" / "cache"),
        E.CacheError,
        ("file", "give another directory"),
    ),
    Row(
        "a cache in a file",
        lambda w: _built(w, w.folder / "file"),
        E.CacheError,
        ("cannot be kept there", "file", "a directory that can be written"),
    ),
    Row(
        "a cache larger than its limit",
        lambda w: _cached(w, None, cache_limit=10),
        E.CacheError,
        ("would take 480 bytes", "10 are allowed", "raise the limit"),
    ),
    # Strategies
    Row(
        "more blocks than there are",
        lambda w: strategies.last_blocks(TX, [("stem",), ("head",)], 5),
        E.ConfigError,
        ("last_blocks", "got 5"),
    ),
    Row(
        "a decay above 1",
        lambda w: strategies.layerwise_decay(TX, [("stem",), ("head",)], decay=1.5),
        E.ConfigError,
        ("decay=1.5", "at most 1"),
    ),
    Row(
        "phases that outlast the run",
        lambda w: list(jtl.fit(w.loss, _two(100), *jtl.init(w.variables, _two(100), key=KEY), w.rows())),
        E.ConfigError,
        ("100 more updates", "10 batches", "more epochs"),
    ),
    Row(
        "a phase of no updates",
        lambda w: jtl.init(w.variables, _two(0), key=KEY),
        E.ConfigError,
        ("0 updates", "1 or more"),
    ),
    # Files of data
    Row(
        "a table that is not there",
        lambda w: data.read(w.folder / "dat.csv"),
        E.SourceNotFoundError,
        ("dat.csv", "did you mean 'data.csv'"),
    ),
    Row(
        "a kind of file that is not read",
        lambda w: data.read(w.file("data.xlsx", b"x")),
        E.ConfigError,
        ("data.xlsx", ".csv, .tsv, .jsonl"),
    ),
    Row(
        "a column that there is not",
        lambda w: data.read(w.csv, label="lable"),
        E.DataError,
        ("no column 'lable'", "did you mean 'label'"),
    ),
    Row("a header alone", lambda w: data.read(w.table([])), E.DataError, ("data.csv", "no rows")),
    Row(
        "an empty file", lambda w: data.read(w.file("data.csv", b"")), E.DataError, ("the file is empty", "text, label")
    ),
    Row(
        "a row with a field too many",
        lambda w: data.read(w.table([("a", "x"), ("b", "c", "y")])),
        E.DataError,
        ("row 3", "3 fields; expected 2", "quotes"),
    ),
    Row(
        "an empty text",
        lambda w: data.read(w.table([("a", "x"), ("", "y")])),
        E.DataError,
        ("row 3", "'text' is empty"),
    ),
    Row(
        "one class",
        lambda w: data.read(w.table([("a", "x"), ("b", "x")])),
        E.DataError,
        ("the class 'x'", "at least two classes"),
    ),
    Row(
        "a class that was not declared",
        lambda w: data.read(w.csv, classes=("pos", "negative")),
        E.DataError,
        ("label 'neg'", "declared", "negative"),
    ),
    Row(
        "a number that is none",
        lambda w: data.read(w.table([("a", "1.5"), ("b", "nan")]), task="regression"),
        E.DataError,
        ("row 3", "'nan'", "expected a number"),
    ),
    Row(
        "bytes of another encoding",
        lambda w: data.read(w.file("data.csv", b"text,label\ncaf\xe9,a\nx,b\n")),
        E.DataError,
        ("row 2", "0xE9", "UTF-8"),
    ),
    Row(
        "lines that are no JSON",
        lambda w: data.read(w.file("data.jsonl", b'{"text": "a", "label": "x"}\n{text}\n')),
        E.DataError,
        ("row 2", "not JSON"),
    ),
    Row(
        "a folder without classes",
        lambda w: data.read(w.file("texts/a.txt", b"text").parent),
        E.DataError,
        ("one sub-folder for each class", "a.txt"),
    ),
    Row(
        "a picture that is none",
        lambda w: data.read(w.file("pictures/a/0.png", b"text").parent.parent),
        E.DataError,
        ("0.png", "cannot be read"),
    ),
    Row(
        "a split that does not add up",
        lambda w: data.split(data.read(w.csv), (0.5, 0.4), seed=0),
        E.ConfigError,
        ("(0.5, 0.4)", "0.9"),
    ),
    Row(
        "more examples than there are",
        lambda w: data.subset(data.read(w.csv), 99, seed=0),
        E.ConfigError,
        ("99", "1 to 8"),
    ),
    # Saving
    Row(
        "a folder that is taken",
        lambda w: jtl.save(w.bert, w.model, w.bert_variables),
        E.ConfigError,
        ("exists and is not empty", "name a new folder"),
    ),
    Row(
        "a format that there is not",
        lambda w: unwrap(jtl.save)(w.folder / "new", w.model, w.bert_variables, format="onnx"),
        E.ConfigError,
        ("'onnx'", "jtl or transformers"),
    ),
    Row(
        "names of other classes",
        lambda w: jtl.save(w.folder / "new", w.model, w.bert_variables, classes=("a", "b", "c")),
        E.ConfigError,
        ("3 names", "2 outputs"),
    ),
    Row(
        "a model of no family",
        lambda w: jtl.save(w.folder / "new", Net(), w.variables),
        E.ConfigError,
        ("Net", "families"),
    ),
    # Commands
    Row(
        "finetune: data that are not there",
        lambda w: w.finetune(data=str(w.folder / "none.csv")),
        E.SourceNotFoundError,
        ("none.csv",),
    ),
    Row(
        "finetune: a model that is not there",
        lambda w: w.finetune(model="./none"),
        E.SourceNotFoundError,
        ("none", "check the path"),
    ),
    Row(
        "finetune: a folder that is taken",
        lambda w: w.finetune(out=w.bert),
        E.ConfigError,
        ("not empty", "name a new folder"),
    ),
    Row(
        "finetune: a folder with one class",
        lambda w: w.finetune(data=str(w.file("one/a/0.txt", b"good").parent.parent)),
        E.DataError,
        ("the class 'a'", "two classes"),
    ),
    Row("finetune: no epoch", lambda w: w.finetune(epochs=0), E.ConfigError, ("epochs", "got 0")),
    Row(
        "finetune: a rate of 0",
        lambda w: w.finetune(learning_rate=0.0),
        E.ConfigError,
        ("learning_rate", "above 0", "0.0"),
    ),
    Row("finetune: a share above 1", lambda w: w.finetune(held_out="1.5"), E.ConfigError, ("between 0 and 1", "1.5")),
    Row(
        "finetune: more blocks than there are", lambda w: w.finetune(blocks=9), E.ConfigError, ("last_blocks", "got 9")
    ),
    Row(
        "finetune: a pattern that matches nothing",
        lambda w: w.finetune(trainable=("encodr",)),
        E.PatternError,
        ("encodr", "encoder"),
    ),
    Row(
        "finetune: factors that are none",
        lambda w: w.finetune(strategy="discriminative", factors=("head",)),
        E.ConfigError,
        ("PATTERN=FACTOR", "'head'"),
    ),
    Row("finetune: pictures of texts", lambda w: w.finetune(augment="flip"), E.ConfigError, ("augment='flip'", "text")),
    Row(
        "finetune: a rank of 0",
        lambda w: w.finetune(strategy="lora", rank=0),
        E.ConfigError,
        ("rank", "0", "from 1 on"),
    ),
    Row("sweep: no seed", lambda w: w.sweep(seeds=0), E.ConfigError, ("seeds", "above 0")),
    Row("sweep: a rate below 0", lambda w: w.sweep(rates=(-1.0,)), E.ConfigError, ("rates", "(-1.0,)")),
    Row(
        "audit: one step",
        lambda w: _silent(audit, Audit(model=str(w.bert), steps=1)),
        E.ConfigError,
        ("steps", "at least 2"),
    ),
    Row(
        "audit: a model that is not there",
        lambda w: _silent(audit, Audit(model=str(w.folder / "none"))),
        E.SourceNotFoundError,
        ("none",),
    ),
    Row(
        "inspect: a pattern that matches nothing",
        lambda w: _silent(inspect, Inspect(model=str(w.bert), trainable=("hed",))),
        E.PatternError,
        ("hed",),
    ),
    Row(
        "models: a name that there is not",
        lambda w: _silent(models, Models(pattern="minilm-7")),
        E.ConfigError,
        ("'minilm-7'", "nearest"),
    ),
)


def _two(updates):
    """A head, then everything, after so many updates."""
    first = jtl.Phase(jtl.select("head"), TX, updates)
    return jtl.Strategy("two", (first, jtl.Phase(jtl.everything(), TX)))


def _pictures(w, images):
    from jtl.models import registry

    found = registry.get("vit")
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 8}
    config = found.parse({"model_type": "vit", "image_size": 8, "patch_size": 4, **sizes}, None, {})
    model = found.build(config, heads.classifier(2))
    variables = model.init(KEY, jnp.zeros((1, 8, 8, 3)))
    state, frozen = jtl.init(variables, TX, trainable=jtl.select("head"), key=KEY)
    loss = jtl.supervised(model, losses.cross_entropy)
    return list(jtl.fit(loss, TX, state, frozen, [{"image": images, "label": np.zeros(len(images), np.int32)}]))


def _cached(w, directory, **options):
    state, frozen = w.start(mask=jtl.select("head"))
    return list(jtl.fit(w.loss, TX, state, frozen, w.rows(), cache="require", cache_directory=directory, **options))


def _prepared(w, mode):
    return unwrap(jtl.cache.prepare)(w.loss, *w.start(), w.rows(), mode=mode)


def _built(w, directory):
    state, frozen = w.start(mask=jtl.select("head"))
    cut = jtl.split(w.loss, state, frozen, next(iter(w.rows())))
    return jtl.cache.build(cut.prefix, state, frozen, w.rows(), directory=directory)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(shared, tmp_path):
    """The world, with files of its own for what a row writes."""
    copy = object.__new__(World)
    copy.__dict__ |= shared.__dict__ | {"folder": tmp_path}
    copy.csv = copy.table(ROWS_OF_TEXT)
    (tmp_path / "file").write_text("a file")
    return copy


@pytest.fixture
def compiled():
    """The names of the functions that were compiled."""
    names = []

    def listen(event, seconds, **named):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(named.get("fun_name", ""))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def test_the_listener_hears_a_step(world, compiled):
    world.fit({"x": world.x[:7], "label": world.y[:7]})
    assert "jit(step)" in compiled


def test_there_are_enough_rows():
    assert len({row.name for row in ROWS}) == len(ROWS) >= 60


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_it_is_refused_before_a_step_is_compiled(row, world, compiled):
    jtl.loop.compiled_train.cache_clear()  # a step of another test would not be heard
    with pytest.raises(row.error) as caught:
        row.make(world)
    assert isinstance(caught.value, errors.JtlError)
    message = str(caught.value)
    for part in row.says:
        assert part in message
    assert "jit(step)" not in compiled


def test_nothing_is_left_of_what_could_not_be_saved(world, monkeypatch):
    """A disk that is full while weights are written leaves neither the folder nor parts of it."""
    from jtl.weights import safetensors

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors, "save_file", full)
    with pytest.raises(errors.CheckpointError, match="could not be written: the disk is full"):
        jtl.save(world.folder / "new", world.model, world.bert_variables)
    assert {path.name for path in world.folder.iterdir()} == {"data.csv", "file"}


def test_a_cache_without_room_is_refused_before_anything_is_computed(world, monkeypatch):
    from jtl.cache import store

    monkeypatch.setattr(store.shutil, "disk_usage", lambda folder: dataclasses.make_dataclass("U", ["free"])(100))
    state, frozen = world.start(mask=jtl.select("head"))
    cut = jtl.split(world.loss, state, frozen, next(iter(world.rows())))
    with pytest.raises(errors.CacheError, match="needs 480 bytes more and 100 are free; free some"):
        jtl.cache.build(cut.prefix, state, frozen, world.rows(), directory=world.folder / "cache")
    assert not list((world.folder / "cache").rglob("shard-*"))


def test_auto_goes_on_without_a_cache_and_says_so(world):
    said = []
    state, frozen = world.start(mask=jtl.select("head"))
    run = world.rows(np.tile(world.x, (20, 1)), np.tile(world.y, 20), epochs=3)
    reports = jtl.fit(world.loss, TX, state, frozen, run, cache_directory=world.folder / "file", say=said.append)
    assert next(reports).step == 1
    (line,) = said
    assert line.startswith("no cache: ")
    assert "give another directory" in line
