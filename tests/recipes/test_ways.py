"""Every strategy of the command line trains what its name says, and leaves the rest bit for bit."""

import csv
import typing

import numpy as np
import pytest
from rich.console import Console

import jtl
from jtl import errors, rules, tree
from jtl.recipes import finetune
from jtl.recipes.settings import Finetune, StrategyName

from ..covering import long_but  # noqa: TID252
from ..models import checkpoints  # noqa: TID252

ROWS = [("good film", "pos"), ("great fun", "pos"), ("bad film", "neg"), ("dull plot", "neg")] * 3
LAST, EVERYTHING = ["head", "pooler", "encoder/layer_1"], ["head", "pooler", "encoder", "embeddings"]

TRAINED = {
    "feature-extraction": (["head"], {}),
    "last-blocks": (LAST, {"blocks": 1}),
    "first-blocks": (["head", "embeddings"], {"blocks": 1}),
    "full": (EVERYTHING, {}),
    "lp-ft": (EVERYTHING, {}),
    "gradual": (LAST, {"blocks": 1}),
    "discriminative": (LAST, {"factors": ("encoder/layer_0=0", "embeddings=0", "**=1")}),
    "layerwise-decay": (EVERYTHING, {}),
    "bitfit": (["**/bias", "head"], {}),
    "l2-sp": (EVERYTHING, {}),
    "lora": (["head", "**/query/kernel", "**/value/kernel"], {}),
}
LONG = ("first-blocks", "full", "layerwise-decay", "bitfit")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = checkpoints.CONFIG | {"num_hidden_layers": 2}
    return checkpoints.write_tokenizer(checkpoints.write(tmp_path_factory.mktemp("tiny"), config))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *ROWS])
    return str(path)


def moved(data, model, out, **settings):
    """The paths of the leaves that training changed, and what it printed."""
    console, common = Console(record=True, width=200), {"held_out": data, "batch_size": 4, "max_length": 16}
    finetune.run(Finetune(data=data, model=str(model), out=out, epochs=3, **common, **settings), console)
    before, after = jtl.load(model)[1], jtl.load(out)[1]
    old = dict(tree.leaves_with_paths(before["params"]))
    pairs = tree.leaves_with_paths(after["params"])
    return (
        {path for path, leaf in pairs if path not in old or not np.array_equal(leaf, old[path])},
        set(tree.paths(after["params"])),
        console.export_text(),
    )


# Those whose masks the laws of strategies know already are long.
@pytest.mark.parametrize("name", long_but(TRAINED, [name for name in TRAINED if name not in LONG]))
def test_a_strategy_trains_what_its_name_says(name, data, model, tmp_path):
    patterns, settings = TRAINED[name]
    found, paths, _ = moved(data, model, tmp_path / "out", strategy=name, learning_rate=1e-2, **settings)
    allowed = {path for path in paths if any(rules.matches(pattern, path) for pattern in patterns)}
    assert found <= allowed
    assert {path.split("/")[0] for path in found} == {path.split("/")[0] for path in allowed}


def test_norms_alone(data, model, tmp_path):
    found, *_ = moved(data, model, tmp_path / "out", strategy="norms", learning_rate=1e-2)
    assert found
    assert all(path.startswith("head/") or "norm" in path for path in found)


def test_surgical_trains_as_many_blocks_as_asked_and_names_them(data, model, tmp_path):
    found, _, printed = moved(data, model, tmp_path / "out", strategy="surgical", blocks=1, learning_rate=1e-2)
    groups = ("embeddings/", "encoder/layer_0/", "encoder/layer_1/", "pooler/")
    assert "of 4" in printed
    assert sum(any(path.startswith(group) for path in found) for group in groups) == 1


def test_each_name_has_a_row_here():
    assert set(typing.get_args(StrategyName)) == {*TRAINED, "norms", "surgical"}


@pytest.mark.parametrize("factors", [(), ("head",), ("=1",), ("**=-1",), ("**=nan",), ("head=1",)])
def test_factors_that_are_none_are_refused(factors, data, model):
    with pytest.raises(errors.JtlError):
        moved(data, model, None, strategy="discriminative", factors=factors)
