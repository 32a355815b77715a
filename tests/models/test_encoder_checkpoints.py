"""What BERT, RoBERTa and DistilBERT make of a checkpoint's settings and names, and what they refuse."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jtl
from jtl import heads
from jtl.errors import ConfigError, WeightsError
from jtl.models import bert, bert_config, distilbert, gpt2, gpt2_config, naming, registry, roberta
from jtl.pretrained import shapes

from . import checkpoints

SMALL = {"vocab_size": 7, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}

# Settings


@pytest.mark.parametrize("model_type", ["bert", "roberta", "xlm-roberta", "distilbert"])
def test_default_settings_are_those_of_transformers(model_type):
    transformers = pytest.importorskip("transformers")
    family = registry.get(model_type)
    ours = family.settings(family.parse({"model_type": model_type}, None, {}), None)
    reference = transformers.CONFIG_MAPPING[model_type]()
    assert ours == {name: getattr(reference, name) for name in ours}
    assert type(family.build(family.parse({}, None, {}), None)).__module__ == registry.FAMILIES[model_type]


CLASSIFIER = {
    "classifier.dense.weight": np.eye(12, dtype=np.float32),
    "classifier.dense.bias": np.zeros(12, np.float32),
    "classifier.out_proj.weight": np.ones((3, 12), np.float32),
    "classifier.out_proj.bias": np.zeros(3, np.float32),
}
"""Of RoBERTa."""
NAMED = {"id2label": {"0": "a", "1": "b", "2": "c"}}


def _roberta(folder, *, pooler, classifier=False, prefix="roberta.", **settings):
    tensors = {prefix + name: value for name, value in checkpoints.tensors().items() if pooler or "pooler" not in name}
    architecture = "RobertaForSequenceClassification" if classifier else "RobertaModel"
    config = checkpoints.CONFIG | {"model_type": "roberta", "architectures": [architecture], **settings}
    return checkpoints.write(folder, config, tensors | (CLASSIFIER if classifier else {}))


@pytest.mark.parametrize(
    ("pooler", "classifier", "pool"), [(True, False, "pooler"), (False, False, "cls"), (True, True, "cls")]
)
def test_roberta_pools_as_its_checkpoint_does_unless_the_caller_chooses(pooler, classifier, pool, tmp_path):
    folder = _roberta(tmp_path / "tiny", pooler=pooler, classifier=classifier, pad_token_id=1, **NAMED)
    model, variables = jtl.load(folder)
    assert model.config.pool == pool
    assert ("pooler" in variables["params"]) == (pool == "pooler")
    assert jtl.load(folder, pool="max")[0].config.pool == "max"
    jtl.save(tmp_path / "own", model, variables)
    assert jtl.load(tmp_path / "own")[0].config.pool == pool
    checkpoints.write_pooling(folder, "mean_tokens")
    assert jtl.load(folder)[0].config.pool == "mean"


def test_without_tensors_roberta_reads_the_first_token():
    model = roberta.Roberta(roberta.RobertaConfig(**SMALL))
    out, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((2, 3), jnp.int32))
    assert out.pooled.shape == (2, 4)
    assert "pooler" not in variables["params"]


def test_positions_of_roberta_count_what_is_not_padding():
    config = roberta.RobertaConfig(pad_token_id=1, max_position_embeddings=10)
    assert config.max_length == 8
    ids = jnp.array([[0, 5, 1, 6, 1, 1], [7, 7, 7, 7, 7, 7]], jnp.int32)
    positions, padding = roberta.RobertaEmbeddings(config).positions(ids)
    np.testing.assert_array_equal(positions, [[2, 3, 1, 4, 1, 1], [2, 3, 4, 5, 6, 7]])
    assert padding == 1


def test_inputs_beyond_the_last_position_of_roberta_are_refused(tmp_path):
    model, variables = jtl.load(_roberta(tmp_path, pooler=True, pad_token_id=1))
    jax.eval_shape(model.apply, variables, jnp.zeros((1, 14), jnp.int32))
    with pytest.raises(ConfigError, match="inputs of length 15 are longer than the 14 positions"):
        jax.eval_shape(model.apply, variables, jnp.zeros((1, 15), jnp.int32))


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        ("roberta", {"is_decoder": True}, "is_decoder=True; jtl's RoBERTa has only is_decoder=False"),
        ("xlm-roberta", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ("roberta", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ("roberta", {"pad_token_id": None}, "pad_token_id must be an integer from 0 to 14, got None"),
        ("roberta", {"pad_token_id": 15}, "pad_token_id must be an integer from 0 to 14, got 15"),
        ("bert", {"pad_token_id": 40}, "pad_token_id must be one of the 40 tokens, or below 0 .*, got 40"),
        ("distilbert", {"pad_token_id": -41}, "pad_token_id must be one of the 40 tokens, or below 0 .*, got -41"),
        ("distilbert", {"activation": "swiglu"}, r"hidden_act \(activation in config\.json\) 'swiglu' is not among"),
        ("distilbert", {"num_attention_heads": 5}, r"\(dim in .*\) 12 is not a multiple of .* \(n_heads in .*\) 5"),
        ("distilbert", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
    ],
)
def test_settings_that_a_family_does_not_have_are_refused(model_type, settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        jtl.load(checkpoints.write(tmp_path, checkpoints.CONFIG | {"model_type": model_type, **settings}))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"pool": "pooler"}, "pool 'pooler' is not among"),
        ({"layer_norm_eps": 1e-5}, "DistilBERT has only layer_norm_eps=1e-12, got 1e-05"),
        ({"type_vocab_size": 2}, "DistilBERT has only type_vocab_size=0"),
        ({"dim": 4}, "DistilBertConfig has no field 'dim'"),
    ],
)
def test_what_distilbert_does_not_have_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        distilbert.parse({}, None, overrides)


def test_distilbert_is_named_as_transformers_names_it_alone():
    """Names of BERT's in a `config.json` of DistilBERT, which transformers would not read either, or does."""
    config = distilbert.parse({"model_type": "distilbert", "dim": 24, "n_heads": 3, "layer_norm_eps": 0.1}, None, {})
    assert (config.hidden_size, config.num_attention_heads, config.layer_norm_eps) == (24, 3, 1e-12)
    other = distilbert.parse({"model_type": "distilbert", "hidden_size": 24, "num_attention_heads": 3}, None, {})
    assert other == config
    assert distilbert.parse(dataclasses.asdict(config), None, {}) == config


# Checkpoints that do not hold what they say


def test_wrong_numbers_of_classes_and_missing_heads_are_refused(tmp_path):
    folder = _roberta(tmp_path / "wrong", pooler=False, classifier=True, id2label={"0": "a", "1": "b"})
    with pytest.raises(WeightsError, match=r"declares 2 classes, and classifier\.out_proj\.weight has 3 outputs"):
        jtl.load(folder)
    assert jtl.load(folder, jtl.heads.classifier(5), key=jax.random.key(0))[0].head.outputs == 5
    folder = _roberta(tmp_path / "missing", pooler=False)
    for task in roberta.TASKS:
        settings = json.loads((folder / "config.json").read_text()) | {"architectures": [f"Roberta{task}"]}
        (folder / "config.json").write_text(json.dumps(settings))
        message = "head/dense/kernel needs the tensor" if task == "ForMaskedLM" else "are missing; pass head= for a new"
        with pytest.raises(WeightsError, match=message):
            jtl.load(folder)


def test_classes_of_another_model_type_are_no_head(tmp_path):
    """XLM-RoBERTa's settings with RoBERTa's class: the name is not of the model type."""
    folder = _roberta(tmp_path, pooler=False, classifier=True, model_type="xlm-roberta", **NAMED)
    assert jtl.load(folder)[0].head is None


def test_bert_without_a_pooler_is_refused_unless_nothing_needs_it(tmp_path):
    tensors = {f"bert.{name}": value for name, value in checkpoints.tensors().items() if "pooler" not in name}
    folder = checkpoints.write(tmp_path, values=tensors)
    with pytest.raises(WeightsError, match=r"pooler/kernel needs the tensor pooler\.dense\.weight"):
        jtl.load(folder)
    for settings in ({"pool": "mean"}, {"head": jtl.heads.token_classifier(3), "key": jax.random.key(0)}):
        assert "pooler" not in jtl.load(folder, **settings)[1]["params"]


def _masked(folder, model_type):
    """A checkpoint of masked words, with random values."""
    family, named = registry.get(model_type), {"model_type": model_type} if "roberta" in model_type else {}
    config = family.parse({**SMALL, **named, "max_position_embeddings": 6}, None, {})
    model, rng = family.build(config, family.layouts[0].tasks["ForMaskedLM"].head(config, 0)), np.random.default_rng(0)
    like = shapes(family, model)
    variables = jax.tree.map(lambda leaf: jnp.array(rng.normal(size=leaf.shape), leaf.dtype), like)
    jtl.save(folder, model, variables, format="transformers")
    return model, variables


@pytest.mark.parametrize(
    ("model_type", "copy", "original"),
    [
        ("bert", "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("bert", "cls.predictions.decoder.bias", "cls.predictions.bias"),
        ("roberta", "lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
        ("roberta", "lm_head.decoder.bias", "lm_head.bias"),
        ("xlm-roberta", "lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
        ("distilbert", "vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),
    ],
)
def test_what_is_no_copy_of_the_tensor_that_it_is_tied_to_is_refused(model_type, copy, original, tmp_path):
    """transformers does not tie them, jtl has no head of two. A copy changes nothing, nor does what is not read."""
    model, variables = _masked(tmp_path, model_type)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, copy: tensors[original]}, file)
    same, again = jtl.load(tmp_path)
    assert jtl.tree.digest(again) == jtl.tree.digest(variables)
    assert naming.like(same.head, model.head)
    other = tensors[original].copy()
    other[-1] += 1
    save_file({**tensors, copy: other}, file)
    with pytest.raises(WeightsError, match=rf"{copy} differs from .*{original[-12:]}: .* head="):
        jtl.load(tmp_path)
    assert jtl.load(tmp_path, jtl.heads.token_classifier(3), key=jax.random.key(0))[0].head.outputs == 3


# Where transformers has no such model

HIDDEN = heads.Hidden(2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (bert.Bert(bert.BertConfig(pool="mean", **SMALL)), "BertModel has only pool='pooler', this model pool='mean'"),
        (bert.Bert(bert.BertConfig(pool="cls", **SMALL), heads.Linear(2)), "BertForSequenceClassification has only"),
        (roberta.Roberta(roberta.RobertaConfig(**SMALL)), "RobertaModel has only pool='pooler', this model pool=None"),
        (
            roberta.Roberta(roberta.RobertaConfig(pool="pooler", model_type="xlm-roberta", **SMALL), HIDDEN),
            "XLMRobertaForSequenceClassification has only pool='cls'",
        ),
        (roberta.Roberta(roberta.RobertaConfig(**SMALL), heads.Linear(2)), "no Roberta with the head Linear; it has"),
        (
            distilbert.DistilBert(distilbert.DistilBertConfig(pool="max", **SMALL)),
            "DistilBertModel has only pool='cls'",
        ),
        (
            distilbert.DistilBert(distilbert.DistilBertConfig(**SMALL), HIDDEN),
            "no DistilBert with the head Hidden; it has DistilBertForSequenceClassification",
        ),
        (
            gpt2.GPT2(gpt2_config.GPT2Config(vocab_size=7, n_embd=8, n_layer=1, n_head=2), heads.Linear(2)),
            r"GPT2ForSequenceClassification \(use_bias=False\)",
        ),
    ],
)
def test_what_transformers_does_not_have_is_not_saved_for_it(model, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        jtl.save(tmp_path / "out", model, {"params": {}}, format="transformers")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pool", bert_config.POOLS)
def test_pooling_does_not_matter_to_heads_of_single_positions(pool):
    for head in (heads.Tokens(2), heads.Span(), heads.masked_language_model()):
        model = bert.Bert(bert.BertConfig(pool=pool, **SMALL), head)
        assert naming.naming(model)("head/bias")[0]
