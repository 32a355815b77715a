"""Tiny BERT checkpoints as other libraries write them: names and layouts by hand, values random."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": 40,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
}

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "fine", "great", "nice", "bad", "poor", "awful", "dull", "film")


def tensors(config: dict[str, Any] = CONFIG, seed: int = 0) -> dict[str, np.ndarray]:
    """The tensors of `BertModel.state_dict()`, without a prefix."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], width),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], width),
        **_norm("embeddings", width),
        **_dense("pooler.dense", width, width),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= _dense(f"{layer}.attention.{name}", width, width)
        shapes |= _norm(f"{layer}.attention.output", width) | _norm(f"{layer}.output", width)
        shapes |= _dense(f"{layer}.intermediate.dense", width, inner) | _dense(f"{layer}.output.dense", inner, width)
    rng = np.random.default_rng(seed)
    centre = {name: float(name.endswith("LayerNorm.weight")) for name in shapes}
    return {name: rng.normal(centre[name], 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def _dense(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.LayerNorm.weight": (width,), f"{name}.LayerNorm.bias": (width,)}


def write(folder: Path, config: dict[str, Any] = CONFIG, values: dict[str, np.ndarray] | None = None) -> Path:
    """A checkpoint folder without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors(config) if values is None else values, folder / "model.safetensors")
    return folder


def write_pooling(folder: Path, *modes: str) -> Path:
    """The pooling layer of sentence-transformers, with these modes on."""
    known = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    settings = {"word_embedding_dimension": CONFIG["hidden_size"], "include_prompt": True}
    settings |= {f"pooling_mode_{mode}": mode in modes for mode in known}
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    return folder


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer of whole words, with the special tokens of BERT."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    raw.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
