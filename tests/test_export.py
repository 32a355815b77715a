"""`save` writes what `load` takes back, whole or not at all."""

import json
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtl
from jtl.errors import ConfigError
from jtl.weights import safetensors

from .models import checkpoints

IDS = jnp.array([[2, 5, 6, 3], [2, 7, 3, 0]], jnp.int32)
MASK = jnp.array([[1, 1, 1, 1], [1, 1, 1, 0]], jnp.int32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model with a head and mean pooling."""
    folder = checkpoints.write(tmp_path_factory.mktemp("source") / "tiny")
    model, variables = jtl.load(folder, jtl.heads.classifier(3, dropout=0.25), key=jax.random.key(0), pool="mean")
    return model, variables


def test_a_round_trip_changes_no_bit(trained, tmp_path):
    model, variables = trained
    jtl.save(tmp_path / "out", model, variables)
    again, loaded = jtl.load(tmp_path / "out")
    assert again == model
    assert jtl.tree.digest(loaded) == jtl.tree.digest(variables)
    outputs = (jax.jit(m.apply)(v, IDS, MASK) for m, v in ((model, variables), (again, loaded)))
    np.testing.assert_array_equal(*outputs)


def test_a_round_trip_keeps_each_leafs_dtype(trained, tmp_path):
    model, variables = trained
    mixed = jtl.tree.map_with_paths(lambda path, x: x if "head" in path else x.astype(jnp.bfloat16), variables)
    jtl.save(tmp_path / "out", model, mixed)
    assert jtl.tree.digest(jtl.load(tmp_path / "out", dtype=None)[1]) == jtl.tree.digest(mixed)


def test_a_model_without_a_head_stays_without(tmp_path):
    model, variables = jtl.load(checkpoints.write(tmp_path / "tiny"))
    jtl.save(tmp_path / "out", model, variables)
    again, loaded = jtl.load(tmp_path / "out")
    assert again == model
    assert again.head is None
    assert jtl.tree.digest(loaded) == jtl.tree.digest(variables)


def test_a_new_head_takes_the_place_of_the_saved_one(trained, tmp_path):
    model, variables = trained
    jtl.save(tmp_path / "out", model, variables)
    again, loaded = jtl.load(tmp_path / "out", jtl.heads.regressor(5), key=jax.random.key(1))
    assert loaded["params"]["head"]["kernel"].shape == (12, 5)
    rest = [{k: v for k, v in whole["params"].items() if k != "head"} for whole in (loaded, variables)]
    assert jtl.tree.digest(rest[0]) == jtl.tree.digest(rest[1])
    assert again.config == model.config


def test_classes_and_notes_are_kept(trained, tmp_path):
    jtl.save(tmp_path / "out", *trained, classes=("a", "b", "ü"), notes={"accuracy": 0.5})
    written = json.loads((tmp_path / "out" / "jtl.json").read_text(encoding="utf-8"))
    assert (written["classes"], written["notes"]) == (["a", "b", "ü"], {"accuracy": 0.5})


def test_an_empty_folder_is_filled_and_any_other_refused(trained, tmp_path):
    (tmp_path / "out").mkdir()
    jtl.save(tmp_path / "out", *trained)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "file").write_text("mine")
    for taken in ("out", "file"):
        with pytest.raises(ConfigError, match=f"{taken} exists and is not empty"):
            jtl.save(tmp_path / taken, *trained)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert (tmp_path / "file").read_text() == "mine"


class _Deeper(jtl.heads.Linear):
    """Not the head that its base class is."""


@pytest.mark.parametrize("head", [nn.Dense(3), _Deeper(3)])
def test_a_head_that_load_could_not_build_is_refused(tmp_path, head):
    model, variables = jtl.load(checkpoints.write(tmp_path / "tiny"), head, key=jax.random.key(0))
    with pytest.raises(ConfigError, match=f"not {type(head).__name__}: .*write_tensors"):
        jtl.save(tmp_path / "out", model, variables)
    assert not (tmp_path / "out").exists()


def test_a_model_of_no_family_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="Dense is not a model of jtl's families"):
        jtl.save(tmp_path / "out", nn.Dense(3), {"params": {}})
    assert not (tmp_path / "out").exists()


def _full_disk(*args, **kwargs):
    raise OSError("no space left on device")


@pytest.mark.parametrize("stage", ["tensors", "tokenizer", "settings", "rename"])
def test_an_interrupted_save_leaves_nothing(trained, tmp_path, monkeypatch, stage):
    tokenizer = None
    notes: dict[str, object] = {}
    if stage == "tensors":
        monkeypatch.setattr(safetensors, "save_file", _full_disk)
    elif stage == "tokenizer":
        tokenizer = type("Tokenizer", (), {"save_pretrained": _full_disk})()
    elif stage == "settings":
        notes = {"not JSON": object()}
    else:
        monkeypatch.setattr(os, "replace", _full_disk)
    with pytest.raises((OSError, TypeError)):
        jtl.save(tmp_path / "out", *trained, tokenizer=tokenizer, notes=notes)
    assert not list(tmp_path.iterdir())


def _described(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("problem", ["regression", "single_label_classification", "multi_label_classification"])
def test_transformers_is_told_what_the_outputs_are(problem, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, variables = jtl.load(
        checkpoints.write(tmp_path / "tiny"), jtl.heads.classifier(3), key=jax.random.key(0), pool="pooler"
    )
    jtl.save(tmp_path / "out", model, variables, format="transformers", problem_type=problem)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").problem_type == problem
    jtl.save(tmp_path / "unsaid", model, variables, format="transformers")
    assert "problem_type" not in _described(tmp_path / "unsaid")


def test_what_the_outputs_are_is_said_of_classifiers_in_the_format_of_transformers(tmp_path):
    model, variables = jtl.load(checkpoints.write(tmp_path / "tiny"), pool="pooler")
    with pytest.raises(ConfigError, match="expected one of single_label"):
        jtl.save(tmp_path / "out", model, variables, problem_type="regression")
    with pytest.raises(ConfigError, match="BertModel has none"):
        jtl.save(tmp_path / "out", model, variables, format="transformers", problem_type="regression")
