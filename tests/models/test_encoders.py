"""BERT, RoBERTa, XLM-RoBERTa and DistilBERT with the heads of transformers' classes: there, here, and back again."""

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jtl
from jtl.models import registry

from ..covering import covering  # noqa: TID252
from .text_parity import check_gradients, check_step, loaded, randomised, reference_gradients, to_jax, to_torch

# Odd numbers of heads; rates above zero, which show in the heads alone as long as nothing is trained.
BERT = {
    "vocab_size": 23,
    "hidden_size": 15,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.2,
    "attention_probs_dropout_prob": 0.1,
}
DISTIL = {
    "vocab_size": 23,
    "dim": 15,
    "n_layers": 1,
    "n_heads": 3,
    "hidden_dim": 20,
    "max_position_embeddings": 16,
    "dropout": 0.3,
    "attention_dropout": 0.1,
    "qa_dropout": 0.4,
    "seq_classif_dropout": 0.25,
}
ROBERTA = BERT | {"type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}
SETTINGS = {
    "Bert": BERT | {"hidden_act": "relu", "classifier_dropout": 0.35},
    "Roberta": ROBERTA | {"hidden_act": "relu", "classifier_dropout": 0.0},
    "XLMRoberta": ROBERTA | {"num_attention_heads": 5, "pad_token_id": 4},
    "DistilBert": DISTIL | {"activation": "relu", "sinusoidal_pos_embds": True},
}
OTHERS = {
    "Roberta": BERT | {"num_attention_heads": 5, "num_hidden_layers": 3, "pad_token_id": 0, "hidden_act": "gelu_new"},
    "DistilBert": DISTIL | {"n_heads": 5, "n_layers": 2, "pad_token_id": 5},
}
TASKS = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")
LENGTHS = np.array([9, 6, 1, 4])


def _inputs(prefix, settings):
    """Rows of full length, padded, and of a single token; the padding id among the real tokens too."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, settings["vocab_size"], (4, 9))
    mask = np.arange(9)[None] < LENGTHS[:, None]
    ids[1, 6:] = settings.get("pad_token_id", 0)
    ids[0, 2] = ids[3, :2] = settings.get("pad_token_id", 0)
    inputs = {"input_ids": ids, "attention_mask": mask.astype(int)}
    if settings.get("type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = rng.integers(0, settings["type_vocab_size"], (4, 9))
    return {name: value.astype(np.int32) for name, value in inputs.items()}


class Case(NamedTuple):
    """A reference, the folder that it wrote, and what `jtl.load` made of that."""

    kind: str
    inputs: dict[str, np.ndarray]
    reference: Any
    folder: Any
    model: Any
    variables: Any


def _case(prefix, task, settings, folder):
    labels = {"num_labels": 3} if "Classification" in task else {}
    reference = randomised(prefix + task, settings | labels, seed=len(task))
    return Case(prefix + task, _inputs(prefix, settings), reference, folder, *loaded(reference, folder))


KINDS = [(prefix, task, 0) for prefix in SETTINGS for task in TASKS] + [(prefix, "Model", 1) for prefix in OTHERS]


# Each family with two of the heads, and each head with two of the families, run every time.
RUN = covering(KINDS, times=2, fixture=True)


GRADIENTS = [(prefix, "Model", draw) for prefix in OTHERS for draw in (0, 1)]
GRADIENTS += [("Bert", "Model", 0), ("Bert", "ForMaskedLM", 0), ("Roberta", "ForMaskedLM", 0)]


def _named(kind):
    return f"{kind[0]}{kind[1]}-{kind[2]}"


@pytest.fixture(scope="module", params=RUN, ids=_named)
def case(request, tmp_path_factory):
    prefix, task, draw = request.param
    return _case(prefix, task, (SETTINGS, OTHERS)[draw][prefix], tmp_path_factory.mktemp("encoders") / "reference")


def _theirs(reference, inputs):
    """What the class gives, in the form in which ours does."""
    out = reference(**to_torch(inputs))
    if "start_logits" in out:
        import torch

        return (torch.stack([out.start_logits, out.end_logits], 1),)
    if "logits" in out:
        return (out.logits,)
    pooled = out.get("pooler_output")
    return out.last_hidden_state, out.last_hidden_state[:, 0] if pooled is None else pooled


def _tuple(outputs):
    return tuple(outputs) if isinstance(outputs, tuple) else (outputs,)


# Sizes by the names that transformers calls standard, what they replace, and others of which it obeys one.
BY_OTHER_NAMES = {
    "GPT2Model": ({"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 2, "max_position_embeddings": 9},),
    "GPT2Model, twice": ({"num_attention_heads": 3, "n_head": 4}, {"n_embd": 12, "n_layer": 1, "n_positions": 9}),
    "DistilBertModel": ({"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 2}, {"hidden_dim": 9}),
    "DistilBertModel, twice": ({"num_attention_heads": 3, "n_heads": 4}, {"dim": 12, "n_layers": 1, "hidden_dim": 9}),
    "T5EncoderModel": (
        {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 2, "head_dim": 4},
        {"d_ff": 9, "num_decoder_layers": 1},
    ),
    "T5Model": ({"num_attention_heads": 3, "num_heads": 4}, {"d_model": 12, "d_kv": 4, "d_ff": 9, "num_layers": 1}),
    "T5Model, layers": ({"num_hidden_layers": 2, "num_layers": 1}, {"d_model": 12, "d_kv": 4, "d_ff": 9}),
}


@pytest.mark.torch
@pytest.mark.parametrize("name", BY_OTHER_NAMES)
def test_other_names_of_settings_mean_what_they_mean_in_transformers(name, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    kind, (named, *rest) = name.partition(",")[0], BY_OTHER_NAMES[name]
    family = kind.removesuffix("EncoderModel").removesuffix("Model")
    settings = {"vocab_size": 23, **named, **(rest[0] if rest else {})}
    torch.manual_seed(0)
    reference = getattr(transformers, kind)(getattr(transformers, f"{family}Config")(**settings)).eval()
    reference.save_pretrained(tmp_path)
    model_type = {"model_type": family.lower(), "architectures": [kind]}
    (tmp_path / "config.json").write_text(json.dumps({**settings, **model_type}))
    ids = np.random.default_rng(0).integers(2, 23, (2, 6)).astype(np.int32)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :4]} if kind == "T5Model" else {})
    model, variables = jtl.load(tmp_path)
    with torch.no_grad():
        expected = reference(**to_torch(inputs)).last_hidden_state.numpy()
    got = model.apply(variables, **to_jax(inputs)).sequence
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.torch
def test_outputs_are_those_of_the_reference(case):
    # Not compiled as a whole: the cases have most operations in common, which are compiled once.
    got = _tuple(case.model.apply(case.variables, **to_jax(case.inputs)))
    for ours, theirs in zip(got, _theirs(case.reference, case.inputs), strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=0, atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("case", GRADIENTS, ids=_named, indirect=True)
def test_gradients_are_those_of_the_reference(case):
    """Of the backbone, and of the head that shares its table; those of other heads are in the training step."""
    import torch

    shapes = [value.shape for value in _theirs(case.reference, case.inputs)]
    scale = [np.random.default_rng(1).normal(size=shape) for shape in shapes]

    def loss(params):
        out = _tuple(case.model.apply({"params": params}, **to_jax(case.inputs)))
        return sum(jnp.sum(x * y.astype("f4")) for x, y in zip(out, scale, strict=True))

    def total(reference):
        out = _theirs(reference, case.inputs)
        return sum((x * torch.from_numpy(y)).sum() for x, y in zip(out, scale, strict=True))

    right = reference_gradients(case.model, case.reference, total)
    check_gradients(jax.grad(loss)(case.variables["params"]), right)


@pytest.mark.torch
def test_saved_for_transformers_it_is_the_folder_that_transformers_wrote(case, tmp_path):
    import transformers

    jtl.save(tmp_path / "out", case.model, case.variables, format="transformers")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", case.folder))
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    kind = getattr(transformers, case.kind)
    again, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    written, wanted = again.config.to_dict(), case.reference.config.to_dict()
    assert {name for name in wanted if written[name] != wanted[name]} <= {"_name_or_path", "transformers_version"}
    for name, value in case.reference.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], value, err_msg=name)


@pytest.mark.torch
def test_a_round_trip_changes_no_bit(case, tmp_path):
    jtl.save(tmp_path / "out", case.model, case.variables)
    model, variables = jtl.load(tmp_path / "out")
    assert model == case.model
    assert jtl.tree.digest(variables) == jtl.tree.digest(case.variables)


@pytest.mark.torch
def test_the_head_is_thinned_as_the_reference_thins_its_own(case):
    import torch

    prefix = case.reference.base_model_prefix
    rates = {
        module.p
        for name, module in case.reference.named_modules()
        if isinstance(module, torch.nn.Dropout) and case.reference is not case.reference.base_model
        if not name.startswith(prefix)
    }
    assert rates <= {getattr(case.model.head, "dropout", 0.0)}
    assert rates or not getattr(case.model.head, "dropout", 0.0)


@pytest.mark.torch
def test_depth_groups_cover_every_leaf_once(case):
    params = case.variables["params"]
    groups = registry.of_model(case.model).depth_groups(case.model)
    assert [*map(bool, groups)] == [True] * (len(groups) - 1) + [case.model.head is not None or "pooler" in params]
    masks = [jtl.select(*group)(params) for group in groups if group]
    assert set(jax.tree.leaves(jax.tree.map(lambda *taken: sum(taken), *masks))) == {1}


NEW_HEADS = {
    "Bert": (jtl.heads.classifier(4), (4, 4)),
    "Roberta": (jtl.heads.masked_language_model(), (4, 9, 23)),
    "XLMRoberta": (jtl.heads.token_classifier(4), (4, 9, 4)),
    "DistilBert": (jtl.heads.span(), (4, 2, 9)),
}


@pytest.mark.torch
@pytest.mark.parametrize("prefix", NEW_HEADS)
def test_a_new_head_takes_the_place_of_any(prefix, tmp_path):
    head, shape = NEW_HEADS[prefix]
    case = _case(prefix, "ForSequenceClassification", SETTINGS[prefix], tmp_path)
    model, variables = jtl.load(case.folder, head, key=jax.random.key(0), pool="mean")
    assert jax.eval_shape(model.apply, variables, **to_jax(case.inputs)).shape == shape
    kept, again = (
        {name: tree for name, tree in whole["params"].items() if name not in ("head", "pooler")}
        for whole in (case.variables, variables)
    )
    assert jtl.tree.digest(kept) == jtl.tree.digest(again)


@pytest.mark.torch
@pytest.mark.parametrize("prefix", ["Roberta", "DistilBert"])
def test_one_adamw_step_of_a_classifier_is_that_of_the_reference(prefix, tmp_path):
    off = {name: 0.0 for name in SETTINGS[prefix] if "dropout" in name}
    case = _case(prefix, "ForSequenceClassification", SETTINGS[prefix] | off, tmp_path)
    check_step(case.reference, case.model, case.variables, case.inputs, np.array([0, 2, 1, 1], np.int32))
