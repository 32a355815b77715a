"""The settings of a BERT, and of the families that have its modules, from and to those of transformers."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from jtl.activations import ACTIVATIONS
from jtl.errors import ConfigError
from jtl.models.family import check_overrides, fields_from_json
from jtl.weights.json_file import read_json

POOLS = ("pooler", "mean", "cls", "max")

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The settings of a BERT model, named as in `config.json`, with the same defaults.

    `pool` says where pooled features come from: `pooler` (dense and tanh on the first token,
    as BERT was trained), `mean` or `max` (over unpadded positions) or `cls` (the first token). `classifier_dropout` is
    the rate of the checkpoint's own head, by default `hidden_dropout_prob`.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    classifier_dropout: float | None = None
    pool: str | None = "pooler"

    kind: ClassVar[str] = "BERT"
    pools: ClassVar[tuple[str | None, ...]] = POOLS
    fixed: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Fields of which the family has but one value."""
    names: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """What `config.json` calls the fields that have another name there."""

    def __post_init__(self):
        for name, value in self.fixed.items():
            if getattr(self, name) != value:
                raise ConfigError(f"{self.kind} has only {name}={value!r}, got {getattr(self, name)!r}")
        for name in _SIZES:
            value = getattr(self, name)
            if name not in self.fixed and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"{self._called(name)} must be an integer above 0, got {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"{self._called('hidden_size')} {self.hidden_size} is not a multiple of "
                f"{self._called('num_attention_heads')} {self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ConfigError(f"{self._called('hidden_act')} {self.hidden_act!r} is not among {sorted(ACTIVATIONS)}")
        padding, count = self.pad_token_id, self.vocab_size
        if padding is not None and not (isinstance(padding, int) and -count <= padding < count):
            raise ConfigError(
                f"pad_token_id must be one of the {count} tokens, or below 0 to count from the last, got {padding!r}"
            )
        if self.pool not in self.pools:
            raise ConfigError(f"pool {self.pool!r} is not among {self.pools}")

    def _called(self, name: str) -> str:
        """A field's name, and that which it has in `config.json`."""
        return f"{name} ({self.names[name]} in config.json)" if name in self.names else name

    @property
    def padding(self) -> int | None:
        """The row of the words' table that is not trained; as in PyTorch one below 0 counts from the last."""
        return None if self.pad_token_id is None else self.pad_token_id % self.vocab_size

    @property
    def head_dropout(self) -> float:
        """The rate of the checkpoint's own head."""
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout

    @property
    def max_length(self) -> int:
        """The most tokens of an input."""
        return self.max_position_embeddings


def parse(settings: Mapping[str, Any], folder: Path | None, overrides: Mapping[str, Any]) -> BertConfig:
    """The configuration of a checkpoint.

    Args:
      settings: the parsed `config.json`.
      folder: where it lies; a sentence-transformers pooling layer beside it decides `pool`.
      overrides: fields that the caller sets.

    Raises:
      ConfigError: settings that this family does not have, such as relative positions.
    """
    return parsed(BertConfig, settings, folder, overrides)


_SUPPORTED = {
    "is_decoder": False,
    "add_cross_attention": False,
    "position_embedding_type": "absolute",
    "tie_word_embeddings": True,
}
"""Settings of which jtl has but one value."""


def parsed(
    config: type[BertConfig], settings: Mapping[str, Any], folder: Path | None, overrides: Mapping[str, Any]
) -> Any:
    """As `parse`, for the configuration of a family that has BERT's modules."""
    check_overrides(config, overrides)
    for name, value in _SUPPORTED.items():
        if settings.get(name, value) != value:
            raise ConfigError(
                f"config.json sets {name}={settings[name]!r}; jtl's {config.kind} has only {name}={value!r}"
            )
    pooling = None if folder is None or "pool" in overrides else _sentence_pooling(folder)
    chosen = fields_from_json(config, settings) | ({"pool": pooling} if pooling else {})
    return config(**fields_from_json(config, {**chosen, **overrides}))


def _sentence_pooling(folder: Path) -> str | None:
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return None
    settings = read_json(path)
    modes = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_max_tokens": "max",
    }
    # Each mode that is on counts, those that jtl lacks too: several are concatenated.
    chosen = [name for name, on in settings.items() if name.startswith("pooling_mode_") and on]
    if len(chosen) != 1 or chosen[0] not in modes:
        raise ConfigError(f"{path} asks for the pooling modes {chosen}; jtl has one of {sorted(modes)}: set pool=")
    return modes[chosen[0]]


def settings(config: BertConfig, outputs: int | None) -> dict[str, Any]:
    """The `config.json` of transformers, without the name of a class."""
    del outputs
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name != "pool"}
    return {"model_type": "bert", **fields}  # where it is a field, that of the configuration
