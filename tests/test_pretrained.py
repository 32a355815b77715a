"""`load`: from every kind of source, with every kind of head, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import huggingface_hub.constants
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jtl
from jtl.errors import ConfigError, SourceNotFoundError, WeightsError
from jtl.weights import source

from .models import checkpoints
from .weights.hub import Commit, Hub

ROOT = Path(__file__).parent.parent
IDS = jnp.array([[2, 5, 6, 3]], jnp.int32)


@pytest.fixture
def folder(tmp_path):
    return checkpoints.write(tmp_path / "tiny")


def _word(variables):
    return np.asarray(variables["params"]["embeddings"]["word"]["embedding"])


WORD = checkpoints.tensors()["embeddings.word_embeddings.weight"]


# Sources


def test_a_folder_and_its_weights_file_are_the_same_model(folder):
    by_folder, by_file = jtl.load(folder), jtl.load(str(folder / "model.safetensors"))
    assert by_folder[0] == by_file[0]
    assert jtl.tree.digest(by_folder[1]) == jtl.tree.digest(by_file[1])
    np.testing.assert_array_equal(_word(by_folder[1]), WORD)


def test_shards_are_the_same_model(folder, tmp_path):
    whole, sharded = checkpoints.tensors(), tmp_path / "sharded"
    sharded.mkdir()
    (sharded / "config.json").write_bytes((folder / "config.json").read_bytes())
    names = sorted(whole)
    shards = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for shard, held in shards.items():
        save_file({name: whole[name] for name in held}, sharded / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert jtl.tree.digest(jtl.load(sharded)[1]) == jtl.tree.digest(jtl.load(folder)[1])


def test_a_hub_repository_is_loaded_at_the_revision_asked_for(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("JTL_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    newer = checkpoints.write(tmp_path / "newer", values=checkpoints.tensors(seed=1))
    commits = [
        Commit(letter * 40, {path.name: path.read_bytes() for path in place.iterdir()}, (name,))
        for letter, place, name in (("a", folder, "v1"), ("b", newer, "main"))
    ]
    with Hub({"org/tiny": tuple(commits)}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        old, new = jtl.load("org/tiny", revision="v1")[1], jtl.load("org/tiny")[1]
        with pytest.raises(SourceNotFoundError, match="has no revision 'v9'"):
            jtl.load("org/tiny", revision="v9")
    assert jtl.tree.digest(old) == jtl.tree.digest(jtl.load(folder)[1])
    assert jtl.tree.digest(new) == jtl.tree.digest(jtl.load(newer)[1])
    assert jtl.tree.digest(old) != jtl.tree.digest(new)


@pytest.mark.assets
def test_an_asset_is_loaded_by_its_name():
    by_name, by_folder = jtl.load("minilm-l6"), jtl.load(source.resolve("minilm-l6").path)
    assert by_name[0] == by_folder[0]
    assert by_name[0].config.pool == "mean"
    assert jtl.tree.digest(by_name[1]) == jtl.tree.digest(by_folder[1])


# What is refused


def _without_config(folder):
    (folder / "config.json").unlink()


def _without_weights(folder):
    (folder / "model.safetensors").unlink()


def _truncated(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _config(text):
    return lambda folder: (folder / "config.json").write_bytes(text)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_without_config, WeightsError, r"config\.json does not exist"),
        (_without_weights, SourceNotFoundError, r"neither model\.safetensors nor"),
        (_truncated, WeightsError, r"model\.safetensors is damaged or not a safetensors file"),
        (_config(b'{"model_type": "bert",'), WeightsError, r"config\.json is not valid JSON"),
        (_config(b"\xff\xfe{}"), WeightsError, r"config\.json is not valid JSON"),
        (_config(b'["bert"]'), WeightsError, r"config\.json holds a list, expected an object"),
        (_config(b'{"model_type": "mamba"}'), ConfigError, r"model type 'mamba' is not among .*'bert'"),
        (_config(b'{"model_type": ["bert"]}'), ConfigError, r"model type \['bert'\] is not among"),
        (_config(b"{}"), ConfigError, r"model type None is not among"),
    ],
)
def test_a_damaged_folder_is_refused_with_the_file_and_what_it_is(folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message):
        jtl.load(folder)


def test_a_folder_that_there_is_not(tmp_path):
    with pytest.raises(SourceNotFoundError, match="no such folder or file"):
        jtl.load(tmp_path / "absent")


def test_what_is_new_needs_a_key(folder):
    for arguments in ({"head": jtl.heads.classifier(2)}, {"pretrained": False}):
        with pytest.raises(ConfigError, match=r"need key=, such as jax\.random\.key\(0\)"):
            jtl.load(folder, **arguments)


# Heads, random weights, dtypes


@pytest.mark.parametrize(
    ("head", "shapes"),
    [
        (jtl.heads.classifier(4), {"kernel": (12, 4), "bias": (4,)}),
        (jtl.heads.regressor(), {"kernel": (12, 1), "bias": (1,)}),
        (nn.Dense(3), {"kernel": (12, 3), "bias": (3,)}),
        (nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(2, use_bias=False)]), None),
    ],
)
def test_any_module_is_a_head_on_the_pooled_features(folder, head, shapes):
    model, variables = jtl.load(folder, head, key=jax.random.key(0))
    own = variables["params"]["head"]
    assert shapes is None or jax.tree.map(jnp.shape, own) == shapes
    plain, rest = jtl.load(folder)
    pooled = jax.jit(plain.apply)(rest, IDS).pooled
    outputs = jax.jit(model.apply)(variables, IDS)
    np.testing.assert_allclose(
        outputs, head.clone(parent=None, name=None).apply({"params": own}, pooled), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(_word(variables), WORD)


def test_a_head_is_decided_by_its_key(folder):
    kernels = [
        np.asarray(jtl.load(folder, jtl.heads.classifier(2), key=jax.random.key(seed))[1]["params"]["head"]["kernel"])
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert not np.any(kernels[0] == kernels[2])


def test_random_weights_have_the_same_shapes_and_are_decided_by_their_key(folder):
    trained = jtl.load(folder)[1]
    first, again, other = (jtl.load(folder, pretrained=False, key=jax.random.key(seed))[1] for seed in (0, 0, 1))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), first) == jax.tree.map(lambda x: (x.shape, x.dtype), trained)
    assert jtl.tree.digest(first) == jtl.tree.digest(again)
    words = [_word(variables) for variables in (first, other)]
    assert not np.any(words[0] == words[1])
    assert abs(words[0].std() - 0.02) < 0.005  # initializer_range


@pytest.mark.parametrize("arguments", [{}, {"pretrained": False}])
def test_a_dtype_is_that_of_every_parameter(folder, arguments):
    variables = jtl.load(folder, jtl.heads.classifier(2), key=jax.random.key(0), dtype=jnp.bfloat16, **arguments)[1]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"bfloat16"}


def test_loading_works_where_torch_does_not(folder):
    code = f"""
import sys
for name in ("torch", "transformers", "tensorflow"):
    sys.modules[name] = None
import jax, jtl
model, variables = jtl.load({str(folder)!r}, jtl.heads.classifier(2), key=jax.random.key(0))
print(model.apply(variables, jax.numpy.ones((2, 3), int)).shape)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert result.stdout.strip() == "(2, 2)", result.stderr
