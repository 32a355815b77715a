"""Adapters in the format of the PEFT library, both ways."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtl
from jtl import errors, peft, tree

torch = pytest.importorskip("torch")
hf_peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
# What PEFT warns of is its own use of transformers.
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::RuntimeWarning")]

BERT = {
    "vocab_size": 23,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
    "initializer_range": 0.4,
}
VIT = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "image_size": 16,
    "patch_size": 8,
    "initializer_range": 0.4,
}


def base(kind, folder):
    torch.manual_seed(0)
    if kind == "bert":
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**BERT, num_labels=3))
    else:
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, num_labels=3))
    model.save_pretrained(folder)
    return model.eval()


def inputs(kind):
    rng = np.random.default_rng(0)
    if kind == "vit":
        return {"images": rng.normal(size=(3, 16, 16, 3)).astype(np.float32)}
    mask = np.arange(7) < np.array([[7], [5], [2]])
    return {"input_ids": rng.integers(1, 23, (3, 7)).astype(np.int32), "attention_mask": mask.astype(np.int32)}


def theirs(model, kind):
    given = inputs(kind)
    with torch.no_grad():
        if kind == "vit":
            return model(pixel_values=torch.from_numpy(given["images"]).permute(0, 3, 1, 2)).logits.numpy()
        return model(**{name: torch.from_numpy(value).long() for name, value in given.items()}).logits.numpy()


def learnt(model):
    """Random values in all that PEFT would train."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                near = 1.0 if "magnitude" in name else 0.0
                parameter.copy_(near * parameter + 0.2 * torch.randn_like(parameter))
    return model.eval()


CASES = {
    "plain": {"target_modules": {"bert": ["query", "value"], "vit": ["q_proj", "v_proj", "query", "value"]}},
    "every dense layer, scaled": {"target_modules": "all-linear", "lora_alpha": 5, "use_rslora": True},
    "patterns": {
        "target_modules": {"bert": ["query", "dense"], "vit": ["query", "q_proj", "dense", "fc1", "fc2", "o_proj"]},
        "rank_pattern": {r"(layer|layers)\.0\..*": 2},
        "alpha_pattern": {r"(layer|layers)\.1\..*": 9},
    },
    "dora": {"target_modules": {"bert": ["query", "value"], "vit": ["query", "q_proj", "value"]}, "use_dora": True},
    "embedding": {"target_modules": {"bert": ["word_embeddings"], "vit": ["projection"]}},
    "whole head": {"target_modules": {"bert": ["key"], "vit": ["key", "k_proj"]}, "modules_to_save": ["classifier"]},
    "dropout": {"target_modules": {"bert": ["query"], "vit": ["query", "q_proj"]}, "lora_dropout": 0.3},
}


def settings(kind, case):
    chosen = {"r": 4, "lora_alpha": 6, **CASES[case]}
    targets = chosen["target_modules"]
    return hf_peft.LoraConfig(**{**chosen, "target_modules": targets[kind] if isinstance(targets, dict) else targets})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_an_adapter_of_peft_gives_the_same_outputs_here_and_back_again(kind, case, tmp_path):
    model = learnt(hf_peft.get_peft_model(base(kind, tmp_path / "base"), settings(kind, case)))
    model.save_pretrained(tmp_path / "adapter")
    expected = theirs(model, kind)
    ours, variables = jtl.load(tmp_path / "base")
    adapter, attached = peft.load(tmp_path / "adapter", ours, variables)
    found, merged, plain = (
        jax.jit(model.apply)(tree, **inputs(kind))
        for model, tree in (
            (peft.adapted(ours, adapter), attached),
            (ours, peft.merge(adapter, attached)),
            (ours, variables),
        )
    )
    assert np.abs(plain - expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-5)

    whole = ("head",) if case == "whole head" else ()
    peft.save(tmp_path / "written", ours, adapter, attached, base=str(tmp_path / "base"), whole=whole)
    back = hf_peft.PeftModel.from_pretrained(base(kind, tmp_path / "again"), tmp_path / "written").eval()
    np.testing.assert_allclose(theirs(back, kind), expected, rtol=1e-5, atol=1e-5)
    again, same = peft.load(tmp_path / "written", ours, variables)
    assert tree.digest(same) == tree.digest(attached)
    assert again.name == adapter.name


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    model = hf_peft.get_peft_model(base("bert", folder / "base"), settings("bert", "plain"))
    model.save_pretrained(folder / "adapter")
    return folder, *jtl.load(folder / "base")


def changed(folder, tmp_path, edit_settings=None, edit_tensors=None):
    from jtl.weights import safetensors

    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    tensors = safetensors.read_tensors(folder / "adapter" / "adapter_model.safetensors")
    if edit_settings:
        edit_settings(config)
    if edit_tensors:
        edit_tensors(tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    safetensors.write_tensors(tmp_path / "adapter_model.safetensors", tensors)
    return tmp_path


FIRST = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"


@pytest.mark.parametrize(
    ("edit_settings", "edit_tensors", "message"),
    [
        (lambda c: c.update(peft_type="LOHA"), None, "type 'LOHA'"),
        (lambda c: c.update(bias="all"), None, "bias='all'"),
        (lambda c: c.update(init_lora_weights="pissa"), None, "changes the base model's weights"),
        (None, lambda t: t.update({FIRST.replace("query", "qurey"): t.pop(FIRST)}), "qurey.* has no place"),
        (None, lambda t: t.pop(FIRST), r"query/kernel has \['b'\] of an adapter"),
        (None, lambda t: t.update({FIRST: np.ones((4, 13), np.float32)}), r"shape \(13, 4\), expected \(12, 4\)"),
        (None, lambda t: t.update({FIRST: np.full((4, 12), np.nan, np.float32)}), "not finite"),
    ],
)
def test_a_faulty_adapter_is_refused(written, tmp_path, edit_settings, edit_tensors, message):
    folder, model, variables = written
    with pytest.raises(errors.JtlError, match=message):
        peft.load(changed(folder, tmp_path, edit_settings, edit_tensors), model, variables)


def test_other_folders_are_refused(written, tmp_path):
    folder, model, variables = written
    with pytest.raises(errors.SourceNotFoundError, match=r"has no adapter_config\.json"):
        peft.load(folder / "base", model, variables)
    adapter, attached = peft.load(folder / "adapter", model, variables)
    with pytest.raises(errors.ConfigError, match="not empty"):
        peft.save(folder / "base", model, adapter, attached)
    with pytest.raises(errors.ConfigError, match="'haed' is no module"):
        peft.save(tmp_path / "new", model, adapter, attached, whole=("haed",))
    assert not (tmp_path / "new").exists()
    with pytest.raises(errors.ConfigError, match="merge or detach it"):
        peft.attach(adapter, attached, key=jax.random.key(0))
    assert jnp.isfinite(attached["params"]["head"]["kernel"]).all()
