"""BERT against its reference implementation, against numpy, and against what sentence-transformers publishes."""

import contextlib
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtl
from jtl.errors import ConfigError, WeightsError
from jtl.models import bert, bert_config
from jtl.weights.source import resolve

from ..covering import long_but  # noqa: TID252
from . import checkpoints
from .text_parity import check_gradients, check_step, loaded, randomised, reference_gradients, to_torch

# Each draw has its own head count, width, depth, activation, token types, padding id and epsilon.
DRAWS = range(10)
ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu")


def _draw(seed):
    """A random configuration, as keyword arguments of `transformers.BertConfig`."""
    rng = np.random.default_rng(seed)
    heads = [1, 2, 3, 5, 7][seed % 5]
    vocabulary = int(rng.integers(12, 40))
    return {
        "vocab_size": vocabulary,
        "hidden_size": heads * int(rng.integers(2, 9)),
        "num_hidden_layers": (1, 2, 1, 3, 1, 2, 1, 4, 1, 2)[seed],
        "num_attention_heads": heads,
        "intermediate_size": int(rng.integers(5, 40)),
        "hidden_act": ACTIVATIONS[seed % 4],
        "type_vocab_size": 1 + seed % 3,
        "pad_token_id": [0, None, vocabulary // 2][seed % 3],
        "layer_norm_eps": [1e-12, 1e-5, 1e-2][int(rng.integers(3))],
        "max_position_embeddings": 11,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def _inputs(config, seed):
    """Rows of full length, padded, of a single token, and of padding alone; padding ids are real tokens too."""
    rng = np.random.default_rng(seed)
    shape = (5, 9)
    ids = rng.integers(0, config["vocab_size"], shape)
    if config["pad_token_id"] is not None:
        ids[:, 2] = config["pad_token_id"]
    mask = np.arange(9)[None] < np.array([9, 6, 1, 4, 0])[:, None]
    types = rng.integers(0, config["type_vocab_size"], shape)
    whole = {"input_ids": ids, "attention_mask": mask.astype(int), "token_type_ids": types}
    return {name: value.astype(np.int32) for name, value in whole.items()}


def _apply(model, variables, *args, **inputs):
    return jax.jit(model.apply)(variables, *args, **inputs)


ABSENT = ((), ("attention_mask",), ("token_type_ids",), ("attention_mask", "token_type_ids"))


@pytest.mark.torch
@pytest.mark.parametrize("seed", long_but(DRAWS, range(5)))
def test_outputs_and_gradients_are_those_of_the_reference(seed, tmp_path):
    """A row of padding alone has no weight in the loss: what it attends to is a convention."""
    torch = pytest.importorskip("torch")
    config = _draw(seed)
    inputs = {name: value for name, value in _inputs(config, seed).items() if name not in ABSENT[seed % 4]}
    reference = randomised("BertModel", config, seed)
    model, variables = loaded(reference, tmp_path)
    rng, width = np.random.default_rng(seed), config["hidden_size"]
    scale = {"last_hidden_state": rng.normal(size=(5, 9, width)), "pooler_output": rng.normal(size=(5, width))}
    for values in scale.values():
        values[4] = 0

    def loss(params):
        out = model.apply({"params": params}, **jax.tree.map(jnp.array, inputs))
        total = sum(jnp.sum(x * y.astype("f4")) for x, y in zip(out, scale.values(), strict=True))
        return total, out

    (_, got), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    expected = reference(**to_torch(inputs))
    for x, name in zip(got, scale, strict=True):
        np.testing.assert_allclose(x, expected[name].detach().numpy(), rtol=0, atol=1e-5, err_msg=name)

    def total(reference):
        out = reference(**to_torch(inputs))
        return sum((out[name] * torch.from_numpy(values)).sum() for name, values in scale.items())

    check_gradients(gradients, reference_gradients(model, reference, total))
    if config["pad_token_id"] is not None:
        assert not np.any(gradients["embeddings"]["word"]["embedding"][config["pad_token_id"]])


@pytest.mark.torch
def test_padding_below_zero_is_counted_from_the_last_word(tmp_path):
    """Its embedding is not trained, as that of PyTorch's `padding_idx`."""
    torch = pytest.importorskip("torch")
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    config = {name: checkpoints.CONFIG[name] for name in sizes} | {"pad_token_id": -1, "num_hidden_layers": 1}
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    reference = randomised("BertModel", config, 0)
    model, variables = loaded(reference, tmp_path)
    inputs = {"input_ids": np.array([[39, 3, 39, 4]], np.int32)}
    scale = np.random.default_rng(0).normal(size=(1, 4, 12))

    def loss(params):
        out = model.apply({"params": params}, jnp.array(inputs["input_ids"]))
        return jnp.sum(out.sequence * scale.astype("f4")) + jnp.sum(out.pooled)

    def total(reference):
        out = reference(**to_torch(inputs))
        return (out.last_hidden_state * torch.from_numpy(scale)).sum() + out.pooler_output.sum()

    gradients = jax.jit(jax.grad(loss))(variables["params"])
    right = reference_gradients(model, reference, total)
    assert not np.any(gradients["embeddings"]["word"]["embedding"][39])
    check_gradients(gradients, right)


@pytest.mark.torch
@pytest.mark.parametrize("seed", [0, 2])
def test_one_adamw_step_of_a_classifier_is_that_of_the_reference(seed, tmp_path):
    config = _draw(seed)
    inputs = _inputs(config, seed)
    inputs["attention_mask"][4] = 1
    reference = randomised("BertForSequenceClassification", config | {"num_labels": 3}, seed)
    model, variables = loaded(reference, tmp_path)
    check_step(reference, model, variables, inputs, np.array([0, 2, 1, 1, 2], np.int32))


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_checkpoints_keep_their_values(dtype, tmp_path):
    torch = pytest.importorskip("torch")
    config = _draw(3)
    reference = randomised("BertModel", config, 3).to(getattr(torch, dtype))
    model, kept = loaded(reference, tmp_path, dtype=None)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(kept)} == {dtype}
    widened = jtl.load(tmp_path)[1]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(widened)} == {"float32"}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype("f4"), b), kept, widened)
    inputs = _inputs(config, 3)
    expected = reference.float()(**to_torch(inputs)).last_hidden_state.detach().numpy()
    inputs = jax.tree.map(jnp.array, inputs)
    np.testing.assert_allclose(_apply(model, widened, **inputs).sequence, expected, rtol=0, atol=1e-5)
    with jax.numpy_dtype_promotion("standard"):  # linen's LayerNorm counts on it
        low = _apply(model, kept, **inputs).sequence
    assert low.dtype.name == dtype
    np.testing.assert_allclose(low.astype("f4"), expected, rtol=0, atol=60 * float(jnp.finfo(dtype).eps))


def test_default_settings_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    reference, ours = transformers.BertConfig(), dataclasses.asdict(bert.BertConfig())
    ours.pop("pool")  # BertModel pools by its pooler
    assert ours == {name: getattr(reference, name) for name in ours}


# The packaged checkpoint

SENTENCES = ("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.")


def _tokens(folder):
    tokenizer = jtl.data.tokenizer(folder)
    encoded = tokenizer(list(SENTENCES), padding=True, return_tensors="np")
    return {name: np.asarray(value, np.int32) for name, value in encoded.items()}


@pytest.mark.assets
def test_minilm_gives_the_similarities_that_sentence_transformers_documents():
    folder = resolve("minilm-l6").path
    model, variables = jtl.load("minilm-l6")
    pooled = _apply(model, variables, **jax.tree.map(jnp.array, _tokens(folder))).pooled
    unit = np.asarray(pooled) / np.linalg.norm(pooled, axis=1, keepdims=True)
    documented = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    np.testing.assert_allclose(unit @ unit.T, documented, rtol=0, atol=1e-4)


@pytest.mark.assets
@pytest.mark.torch
def test_minilm_is_that_of_the_reference():
    pytest.importorskip("torch")
    import transformers

    folder = resolve("minilm-l6").path
    inputs = _tokens(folder)
    reference = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    hidden = reference(**to_torch(inputs)).last_hidden_state.detach().numpy()
    keep = inputs["attention_mask"][..., None]
    model, variables = jtl.load("minilm-l6")
    got = _apply(model, variables, **jax.tree.map(jnp.array, inputs))
    np.testing.assert_allclose(got.sequence, hidden, rtol=0, atol=1e-5)
    np.testing.assert_allclose(got.pooled, (hidden * keep).sum(1) / keep.sum(1), rtol=0, atol=1e-5)


# Pooling

POOLED_BY_NUMPY = {
    "mean": lambda rows: rows.mean(0),
    "max": lambda rows: rows.max(0),
    "cls": lambda rows: rows[0],
}
IDS = jnp.array(np.random.default_rng(0).integers(4, 40, (3, 7)), jnp.int32)
LENGTHS = (7, 4, 1)
MASK = jnp.array(np.arange(7)[None] < np.array(LENGTHS)[:, None], jnp.int32)


@pytest.fixture
def folder(tmp_path):
    return checkpoints.write(tmp_path / "tiny")


@pytest.mark.parametrize("pool", POOLED_BY_NUMPY)
def test_pooling_sees_the_real_tokens_alone(folder, pool):
    model, variables = jtl.load(folder, pool=pool)
    got = _apply(model, variables, IDS, MASK)
    expected = [
        POOLED_BY_NUMPY[pool](row[:length]) for row, length in zip(np.asarray(got.sequence), LENGTHS, strict=True)
    ]
    np.testing.assert_allclose(got.pooled, expected, rtol=1e-6, atol=1e-6)
    assert "pooler" not in variables["params"]


def test_the_mean_of_no_token_is_zero(folder):
    model, variables = jtl.load(folder, pool="mean")
    assert not np.any(_apply(model, variables, IDS, jnp.zeros_like(IDS)).pooled)


def test_padding_changes_no_real_token(folder):
    model, variables = jtl.load(folder, pool="mean")
    whole = _apply(model, variables, IDS * MASK, MASK)
    for i, length in enumerate(LENGTHS):
        alone = _apply(model, variables, IDS[i : i + 1, :length])
        np.testing.assert_allclose(alone.sequence[0], whole.sequence[i, :length], rtol=0, atol=1e-5)
        np.testing.assert_allclose(alone.pooled[0], whole.pooled[i], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("mode", "pool"), [("mean_tokens", "mean"), ("cls_token", "cls"), ("max_tokens", "max")])
def test_the_pooling_of_sentence_transformers_is_honoured(folder, mode, pool):
    checkpoints.write_pooling(folder, mode)
    assert jtl.load(folder)[0].config.pool == pool
    assert jtl.load(folder, pool="pooler")[0].config.pool == "pooler"


@pytest.mark.parametrize("modes", [(), ("mean_tokens", "max_tokens"), ("lasttoken",), ("mean_tokens", "lasttoken")])
def test_pooling_that_there_is_not_is_refused_unless_the_caller_chooses(folder, modes):
    checkpoints.write_pooling(folder, *modes)
    with pytest.raises(ConfigError, match=r"1_Pooling.*set pool="):
        jtl.load(folder)
    assert jtl.load(folder, pool="mean")[0].config.pool == "mean"


def test_a_damaged_pooling_layer_is_refused_by_name(folder):
    checkpoints.write_pooling(folder, "mean_tokens")
    (folder / "1_Pooling" / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"1_Pooling.*not valid JSON"):
        jtl.load(folder)


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"is_decoder": True}, "is_decoder=True"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"hidden_act": "swiglu"}, "'swiglu' is not among"),
        ({"num_attention_heads": 0}, "num_attention_heads must be an integer above 0, got 0"),
        ({"num_attention_heads": 5}, "hidden_size 12 is not a multiple of num_attention_heads 5"),
    ],
)
def test_settings_that_the_family_does_not_have_are_refused(tmp_path, settings, message):
    checkpoints.write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(checkpoints.CONFIG | settings))
    with pytest.raises(ConfigError, match=message):
        jtl.load(tmp_path)


def test_an_unknown_override_is_refused_with_the_nearest_field(folder):
    with pytest.raises(ConfigError, match=r"no field 'pooling'; nearest: pool"):
        jtl.load(folder, pooling="mean")
    with pytest.raises(ConfigError, match=r"pool 'sum' is not among"):
        jtl.load(folder, pool="sum")


def test_an_override_changes_the_model(folder):
    assert (
        jtl.load(folder, num_hidden_layers=1, pretrained=False, key=jax.random.key(0))[0].config.num_hidden_layers == 1
    )
    with pytest.raises(WeightsError, match=r"encoder\.layer\.1\..* has no place in the model"):
        jtl.load(folder, num_hidden_layers=1)


@pytest.mark.parametrize("length", [15, 16, 17])
def test_inputs_beyond_the_last_position_are_refused(folder, length):
    model, variables = jtl.load(folder)
    refused = pytest.raises(ConfigError, match="inputs of length 17 are longer than the 16 positions")
    with refused if length > 16 else contextlib.nullcontext():
        _apply(model, variables, jnp.ones((1, length), jnp.int32))


def test_dropout_is_random_in_training_and_off_otherwise(tmp_path):
    config = checkpoints.CONFIG | {
        "num_hidden_layers": 1,
        "hidden_dropout_prob": 0.5,
        "attention_probs_dropout_prob": 0.5,
    }
    model, variables = jtl.load(checkpoints.write(tmp_path, config))
    first, again, other = (
        jax.jit(functools.partial(model.apply, deterministic=False))(
            variables, IDS, rngs={"dropout": jax.random.key(seed)}
        ).sequence
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    np.testing.assert_array_equal(_apply(model, variables, IDS).sequence, _apply(model, variables, IDS).sequence)


def test_depth_groups_cover_every_leaf_once(folder):
    for pool in bert_config.POOLS:
        model, variables = jtl.load(folder, jtl.heads.classifier(2), key=jax.random.key(0), pool=pool)
        masks = [jtl.select(*group)(variables["params"]) for group in bert.depth_groups(model)]
        assert set(jax.tree.leaves(jax.tree.map(lambda *taken: sum(taken), *masks))) == {1}
