"""The settings of a GPT-2, from and to those of transformers."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jtl.activations import ACTIVATIONS
from jtl.errors import ConfigError
from jtl.models.family import check_overrides, fields_from_json, renamed
from jtl.weights.convert import equal

ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
"""Other names of fields in `config.json`."""

_SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The settings of a GPT-2 model, named as in `config.json`, with the same defaults: those of the smallest one.

    `n_inner` is the width inside a block's two dense layers, by default four times `n_embd`. The two settings of
    attention that later models brought are `scale_attn_by_inverse_layer_idx`, which divides the scores of the k-th
    block by k, and `reorder_and_upcast_attn`, which computes attention in float32 whatever the rest has.
    `classifier_dropout` is the rate of a checkpoint's own classifier of tokens, by default 0.1. The ids of special
    tokens are read by nothing in the model: they are kept for those who generate with it.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True
    classifier_dropout: float | None = None

    def __post_init__(self):
        for name in _SIZES if self.n_inner is None else (*_SIZES, "n_inner"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be an integer above 0, got {value!r}")
        if self.n_embd % self.n_head:
            raise ConfigError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.activation_function not in ACTIVATIONS:
            raise ConfigError(f"activation_function {self.activation_function!r} is not among {sorted(ACTIVATIONS)}")

    @property
    def max_length(self) -> int:
        """The most tokens of an input."""
        return self.n_positions

    @property
    def head_dropout(self) -> float:
        """The rate of the checkpoint's own classifier of tokens."""
        return 0.1 if self.classifier_dropout is None else self.classifier_dropout

    @property
    def inner(self) -> int:
        """The width inside a block's two dense layers."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    def scale(self, layer: int) -> float:
        """What the scores of a layer, counted from 0, are multiplied by."""
        scale = (self.n_embd // self.n_head) ** -0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale


VARIANTS: dict[str, GPT2Config] = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "distilgpt2": GPT2Config(n_layer=6),
}
"""The four sizes of the paper, and the one distilled from the smallest, by the names of their checkpoints."""


def parse(settings: Mapping[str, Any], folder: Path | None, overrides: Mapping[str, Any]) -> GPT2Config:
    """The configuration of a checkpoint.

    Args:
      settings: the parsed `config.json`.
      folder: where it lies; not looked into.
      overrides: fields that the caller sets.

    Raises:
      ConfigError: settings that this family does not have, such as cross-attention.
    """
    del folder
    check_overrides(GPT2Config, overrides)
    if settings.get("add_cross_attention", False):
        raise ConfigError(
            "config.json sets add_cross_attention=True; jtl's GPT-2 has only add_cross_attention=False: it is the "
            "decoder of an encoder-decoder model, not a model of its own"
        )
    if settings.get("classifier_dropout") is None:  # transformers reads another name that is no alias
        settings = {**settings, "classifier_dropout": settings.get("hidden_dropout")}
    return GPT2Config(**fields_from_json(GPT2Config, {**renamed(settings, ALIASES), **overrides}))


def settle(config: GPT2Config, tensors: Mapping[str, np.ndarray]) -> GPT2Config:
    """The configuration of a checkpoint whose settings say that it is tied, or nothing.

    As in transformers a second table counts all the same, where it differs from that of the words. Older files of
    PyTorch hold the one table under both names.

    Args:
      config: from `parse`.
      tensors: the checkpoint's, by name.
    """
    names = ("wte.weight", "lm_head.weight")
    if not config.tie_word_embeddings or not all(name in tensors for name in names):
        return config
    return dataclasses.replace(config, tie_word_embeddings=equal(tensors, *names))


def settings(config: GPT2Config, outputs: int | None) -> dict[str, Any]:
    """The `config.json` of transformers, without the name of a class."""
    del outputs
    fields = dataclasses.asdict(config)
    if config.classifier_dropout is None:
        del fields["classifier_dropout"]  # which transformers' class does not have by itself
    return {"model_type": "gpt2", **fields}
