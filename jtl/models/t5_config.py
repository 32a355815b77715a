"""The settings of a T5, from and to those of transformers."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jtl.activations import ACTIVATIONS
from jtl.errors import ConfigError, WeightsError
from jtl.models.family import check_overrides, fields_from_json, renamed
from jtl.weights.convert import equal

_SIZES = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads")
_ENCODERS = ("EncoderModel", "ForTokenClassification")
"""The ends of the names of transformers' classes that have no decoder."""


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The settings of a T5 model, named as in `config.json`, with the same defaults.

    `feed_forward_proj` is the activation between a block's dense layers, such as "relu" (version 1.0) or "gated-gelu"
    (1.1, FLAN-T5, mT5), whose GELU is that of `gelu_new`. `dense_act_fn` is the activation where it is another one than
    that says, and else None. `num_decoder_layers` is by default `num_layers`, and `decoder_start_token_id` by default
    the padding. `tie_word_embeddings` says whether the head of the checkpoint's own is the table of words, and
    `scale_decoder_outputs` whether the decoder's outputs are divided by the root of `d_model` before such a head. The
    model of version 1.0 has both, later ones neither, and mT5 never scales.

    With `encoder_only` there is no decoder, as in `T5EncoderModel`; `jtl.load(source, encoder_only=True)` leaves that
    of a checkpoint out.
    """

    model_type: str = "t5"
    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    pad_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    decoder_start_token_id: int | None = None
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool = True
    classifier_dropout: float = 0.0
    dense_act_fn: str | None = None
    encoder_only: bool = False

    def __post_init__(self):
        derived = {"num_decoder_layers": self.num_layers, "decoder_start_token_id": self.pad_token_id}
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name, least in {**dict.fromkeys(_SIZES, 1), "decoder_start_token_id": 0}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
        self._check_choices()
        if self.dense_act_fn == _activation(self.feed_forward_proj):
            object.__setattr__(self, "dense_act_fn", None)  # or equal models would have unequal settings
        self._check_distances()

    def _check_choices(self) -> None:
        if self.model_type not in CLASSES:
            raise ConfigError(f"model_type {self.model_type!r} is not among {sorted(CLASSES)}")
        if self.model_type == "mt5" and self.scale_decoder_outputs:
            raise ConfigError("scale_decoder_outputs=True: mT5's outputs are never scaled, set it to False")
        if self.dense_act_fn is not None and self.dense_act_fn not in ACTIVATIONS:
            raise ConfigError(f"dense_act_fn {self.dense_act_fn!r} is not among {sorted(ACTIVATIONS)}")
        gate, _, activation = self.feed_forward_proj.rpartition("-")
        if gate not in ("", "gated") or activation not in ACTIVATIONS:
            raise ConfigError(
                f"feed_forward_proj {self.feed_forward_proj!r}: expected one of {sorted(ACTIVATIONS)}, or 'gated-' and "
                "one of them"
            )

    def _check_distances(self) -> None:
        count, furthest = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if not isinstance(count, int) or count < 4:
            raise ConfigError(
                f"relative_attention_num_buckets={count!r}: expected an integer of at least 4, two for each direction"
            )
        if not isinstance(furthest, int) or furthest <= count // 2:
            raise ConfigError(
                f"relative_attention_max_distance={furthest!r}: expected an integer above {count // 2}, as half of the "
                f"{count} buckets hold one distance each"
            )

    @property
    def gated(self) -> bool:
        """Whether the first of a block's dense layers is multiplied by another one."""
        return self.feed_forward_proj.startswith("gated-")

    @property
    def activation(self) -> str:
        """By its name in `jtl.activations`."""
        return self.dense_act_fn or _activation(self.feed_forward_proj)

    @property
    def max_length(self) -> None:
        """The most tokens of an input: any number, positions are relative."""
        return None


CLASSES = {"t5": "T5", "mt5": "MT5"}
"""What the names of transformers' classes begin with, by model type."""

ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "head_dim": "d_kv",
}
"""Other names of fields in `config.json`."""

MT5: dict[str, Any] = {
    "model_type": "mt5",
    "vocab_size": 250112,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
    "scale_decoder_outputs": False,
}
"""The defaults of mT5 where they are not those of T5. Its outputs are never scaled."""


def parse(settings: Mapping[str, Any], folder: Path | None, overrides: Mapping[str, Any]) -> T5Config:
    """The configuration of a checkpoint.

    Whether outputs are scaled has been a setting of its own since version 5 of transformers; before, a T5 that is not
    tied was not scaled.

    Args:
      settings: the parsed `config.json`.
      folder: where it lies; not looked into.
      overrides: fields that the caller sets.

    Raises:
      ConfigError: settings that this family does not have.
    """
    del folder
    check_overrides(T5Config, overrides)
    architecture = str(next(iter(settings.get("architectures") or ()), ""))
    chosen: dict[str, Any] = {
        "scale_decoder_outputs": settings.get("tie_word_embeddings") is not False,
        "encoder_only": architecture.endswith(_ENCODERS),
        **(MT5 if settings.get("model_type") == "mt5" else {}),
    }
    chosen |= settings
    if settings.get("model_type") == "mt5":
        chosen["scale_decoder_outputs"] = False  # which transformers does not read for it
    if settings.get("num_hidden_layers") is not None and chosen.get("num_decoder_layers") is None:
        # transformers has settled it by then, with the number that the other name replaces.
        chosen["num_decoder_layers"] = chosen.get("num_layers", T5Config.num_layers)
    if "feed_forward_proj" in overrides:
        chosen.pop("dense_act_fn", None)
        chosen.pop("is_gated_act", None)
    fields = fields_from_json(T5Config, {**renamed(chosen, ALIASES), **overrides})
    return T5Config(**fields | _feed_forward(fields, chosen))


def _activation(feed_forward_proj: str) -> str:
    """The activation that goes with it, by its name in `jtl.activations`."""
    return "gelu_new" if feed_forward_proj == "gated-gelu" else feed_forward_proj.removeprefix("gated-")


def _feed_forward(fields: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of what is between the dense layers.

    transformers derives `dense_act_fn` and `is_gated_act` from `feed_forward_proj`, and obeys them where they are
    written beside it.
    """
    named = fields.get("feed_forward_proj", T5Config.feed_forward_proj)
    activation = fields.get("dense_act_fn") or _activation(named)
    gated = bool(settings.get("is_gated_act", named.startswith("gated-")))
    if (activation, gated) == (_activation(named), named.startswith("gated-")):
        return {}
    return {"feed_forward_proj": f"{'gated-' if gated else ''}{activation}", "dense_act_fn": activation}


def settle(config: T5Config, tensors: Mapping[str, np.ndarray]) -> T5Config:
    """The configuration of a checkpoint whose settings say that it is tied.

    Version 5 of transformers says so whatever there is, and writes a second table where the two differ. Older files of
    PyTorch hold the one table under both names.

    Args:
      config: from `parse`.
      tensors: the checkpoint's, by name.

    Raises:
      WeightsError: a stack has a table of words that is no copy of the shared one.
    """
    for stack in ("encoder",) if config.encoder_only else ("encoder", "decoder"):
        copy, table = f"{stack}.embed_tokens.weight", "shared.weight"
        if copy in tensors and table in tensors and not equal(tensors, copy, table):
            raise WeightsError(f"{copy} differs from {table}: jtl's T5 has one table of words for both stacks")
    names = ("shared.weight", "lm_head.weight")
    if not config.tie_word_embeddings or config.encoder_only or not all(name in tensors for name in names):
        return config
    return dataclasses.replace(config, tie_word_embeddings=equal(tensors, *names))


def settings(config: T5Config, outputs: int | None) -> dict[str, Any]:
    """The `config.json` of transformers, without the name of a class."""
    del outputs
    ours = ["encoder_only"]
    ours += ["scale_decoder_outputs"] if config.model_type == "mt5" else []
    ours += ["dense_act_fn"] if config.dense_act_fn is None else []
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in ours}
    return {**fields, "is_encoder_decoder": not config.encoder_only}
