"""Adapters in the format of the PEFT library, both ways."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtl
from jtl import errors, peft, tree

from ..covering import covering, product  # noqa: TID252

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


ROBERTA = {**BERT, "pad_token_id": 1}
GPT2 = {"vocab_size": 23, "n_embd": 12, "n_layer": 2, "n_head": 3, "n_inner": 20, "n_positions": 16}
T5 = {"vocab_size": 23, "d_model": 12, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_heads": 3}
MODELS = {
    "bert": ("BertForSequenceClassification", "BertConfig", {**BERT, "num_labels": 3}),
    "vit": ("ViTForImageClassification", "ViTConfig", {**VIT, "num_labels": 3}),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**ROBERTA, "num_labels": 3}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**GPT2, "initializer_range": 0.4, "bos_token_id": 0, "eos_token_id": 0}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**T5, "initializer_factor": 1.0, "decoder_start_token_id": 0}),
}


def base(kind, folder):
    torch.manual_seed(0)
    model, config, settings = MODELS[kind]
    model = getattr(transformers, model)(getattr(transformers, config)(**settings))
    model.save_pretrained(folder)
    return model.eval()


def inputs(kind):
    rng = np.random.default_rng(0)
    if kind == "vit":
        return {"images": rng.normal(size=(3, 16, 16, 3)).astype(np.float32)}
    mask = np.arange(7) < np.array([[7], [5], [2]])
    ids = np.where(mask, rng.integers(2, 23, (3, 7)), 1)
    given = {"input_ids": ids.astype(np.int32), "attention_mask": mask.astype(np.int32)}
    return {**given, "decoder_input_ids": rng.integers(2, 23, (3, 4)).astype(np.int32)} if kind == "t5" else given


def theirs(model, kind):
    given = inputs(kind)
    with torch.no_grad():
        if kind == "vit":
            return model(pixel_values=torch.from_numpy(given["images"]).permute(0, 3, 1, 2)).logits.numpy()
        logits = model(**{name: torch.from_numpy(value).long() for name, value in given.items()}).logits.numpy()
    return seen(kind, logits)


def seen(kind, logits):
    """Without those of padding, which are a convention."""
    return np.asarray(logits) * inputs(kind)["attention_mask"][..., None] if kind == "gpt2" else logits


def learnt(model):
    """Random values in all that PEFT would train."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                near = 1.0 if "magnitude" in name or "ia3" in name else 0.0
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
OTHERS = {
    "roberta": {"lora": ["query", "dense"], "ia3": ["key", "value", "output.dense"], "inputs": ["output.dense"]},
    "gpt2": {"lora": ["c_attn", "c_fc"], "ia3": ["c_attn", "mlp.c_proj"], "inputs": ["mlp.c_proj"]},
    "t5": {"lora": ["q", "v", "wi"], "ia3": ["k", "v", "wo"], "inputs": ["wo"]},
    "bert": {"ia3": ["key", "value", "output.dense"], "inputs": ["output.dense"]},
}


def settings(kind, case):
    chosen = {"r": 4, "lora_alpha": 6, **CASES[case]}
    targets = chosen["target_modules"]
    return hf_peft.LoraConfig(**{**chosen, "target_modules": targets[kind] if isinstance(targets, dict) else targets})


@pytest.mark.parametrize(("kind", "case"), covering(product(["bert", "vit"], CASES)))
def test_an_adapter_of_peft_gives_the_same_outputs_here_and_back_again(kind, case, tmp_path):
    whole = ("head",) if case == "whole head" else ()
    both_ways(kind, settings(kind, case), tmp_path, whole)


@pytest.mark.parametrize(
    ("kind", "case"), covering((kind, case) for kind in OTHERS for case in OTHERS[kind] if case != "inputs")
)
def test_so_does_one_of_another_family(kind, case, tmp_path):
    chosen, turned = OTHERS[kind], {"fan_in_fan_out": kind == "gpt2"}
    if case == "ia3":
        both_ways(
            kind,
            hf_peft.IA3Config(target_modules=chosen[case], feedforward_modules=chosen["inputs"], **turned),
            tmp_path,
        )
    else:
        both_ways(kind, hf_peft.LoraConfig(r=3, lora_alpha=5, target_modules=chosen[case], **turned), tmp_path)


def both_ways(kind, config, tmp_path, whole=()):
    model = learnt(hf_peft.get_peft_model(base(kind, tmp_path / "base"), config))
    model.save_pretrained(tmp_path / "adapter")
    expected = theirs(model, kind)
    ours, variables = jtl.load(tmp_path / "base")
    adapter, attached = peft.load(tmp_path / "adapter", ours, variables)
    found, merged, plain = (
        seen(kind, jax.jit(model.apply)(tree, **inputs(kind)))
        for model, tree in (
            (peft.adapted(ours, adapter), attached),
            (ours, peft.merge(adapter, attached)),
            (ours, variables),
        )
    )
    assert np.abs(plain - expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-5)

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
