"""RoBERTa and XLM-RoBERTa: BERT's modules, with positions counted from the ids; DistilRoBERTa has fewer blocks.

The tree is that of BERT. Positions count the ids that are not padding, and begin behind the number of padding, whose
own position is that of every padded place.

References:
  Liu et al, RoBERTa, 2019 (arXiv 1907.11692); Conneau et al, Unsupervised cross-lingual representation learning at
  scale, 2019 (arXiv 1911.02116); Sanh et al, DistilBERT, 2019 (arXiv 1910.01108), for how DistilRoBERTa was made.
  Code and weights of RoBERTa are under MIT.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jtl import heads
from jtl.errors import ConfigError
from jtl.models import bert_config, bert_layouts
from jtl.models.bert import Bert, Embeddings, depth_groups, example
from jtl.models.bert_config import BertConfig
from jtl.models.bert_layouts import WORDS, dense, masked_words
from jtl.models.family import Family, KeyLayout, Task

CLASSES = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
"""What the names of transformers' classes begin with, by model type."""


@dataclasses.dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """The settings of a RoBERTa model, named as in `config.json`, with the same defaults.

    `pool` is as in `BertConfig`. None leaves it to the checkpoint: its pooler where it has one, else the first token,
    which its classifier reads too.
    """

    vocab_size: int = 50265
    pad_token_id: int | None = 1
    pool: str | None = None
    model_type: str = "roberta"

    kind: ClassVar[str] = "RoBERTa"
    pools: ClassVar[tuple[str | None, ...]] = (*bert_config.POOLS, None)

    def __post_init__(self):
        super().__post_init__()
        if self.model_type not in CLASSES:
            raise ConfigError(f"model_type {self.model_type!r} is not among {sorted(CLASSES)}")
        if not isinstance(self.pad_token_id, int) or not 0 <= self.pad_token_id < self.max_position_embeddings - 1:
            raise ConfigError(
                f"pad_token_id must be an integer from 0 to {self.max_position_embeddings - 2}, got "
                f"{self.pad_token_id!r}: positions begin behind it, and max_position_embeddings is "
                f"{self.max_position_embeddings}"
            )

    @property
    def max_length(self) -> int:
        """The most tokens of an input."""
        return self.max_position_embeddings - (self.pad_token_id or 0) - 1


def parse(settings: Mapping[str, Any], folder: Path | None, overrides: Mapping[str, Any]) -> RobertaConfig:
    """The configuration of a checkpoint; see `bert_config.parse`."""
    defaults = {"vocab_size": BertConfig.vocab_size} if settings.get("model_type") == "xlm-roberta" else {}
    return bert_config.parsed(RobertaConfig, {**defaults, **settings}, folder, overrides)


def settle(config: RobertaConfig, tensors: Mapping[str, Any]) -> RobertaConfig:
    """The pooling of a checkpoint, where nothing says it.

    Args:
      config: from `parse`.
      tensors: by name. A classifier reads the first token, whether there is a pooler beside it or not.
    """
    if config.pool is not None:
        return config
    pooler = "pooler.dense.weight" in tensors and "classifier.dense.weight" not in tensors
    return dataclasses.replace(config, pool="pooler" if pooler else "cls")


class RobertaEmbeddings(Embeddings):
    """Sum of word, position and token-type embeddings, normalised."""

    def positions(self, input_ids: jax.Array) -> tuple[jax.Array, int | None]:
        """The position of each id, `[batch, length]`, and that of padding."""
        padding = self.config.pad_token_id or 0
        real = (input_ids != padding).astype(input_ids.dtype)
        return jnp.cumsum(real, axis=1) * real + padding, padding


class Roberta(Bert):
    """A RoBERTa encoder, with or without a head; see `Bert`."""

    embeddings: ClassVar[type[Embeddings]] = RobertaEmbeddings


def ignored(config: BertConfig) -> Sequence[str]:
    """Source tensors without a place in the tree: buffers, copies of tied tensors, a pooler that is not used."""
    del config
    return ("embeddings/position_ids", "lm_head/decoder", "pooler")


TASKS = {
    **bert_layouts.TASKS,
    "ForSequenceClassification": Task(
        lambda config, outputs: heads.Hidden(outputs, config.head_dropout, config.initializer_range),
        lambda config: [*dense("head/hidden", "classifier.dense"), *dense("head/out", "classifier.out_proj")],
        "head/out/kernel",
    ),
    "ForMaskedLM": Task(
        lambda config, outputs: heads.MaskedWords("gelu", config.layer_norm_eps, config.initializer_range),
        lambda config: masked_words("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
        None,
        copies={"lm_head.decoder.weight": WORDS, "lm_head.decoder.bias": "lm_head.bias"},
    ),
}

FAMILY = Family(
    name="roberta",
    modality="text",
    parse=parse,
    build=lambda config, head: Roberta(config, head),
    example=example,
    layouts=(
        KeyLayout(
            "transformers",
            bert_layouts.key_rules,
            ignored,
            functools.partial(bert_layouts.rename, prefix="roberta."),
            tasks=TASKS,
        ),
    ),
    depth_groups=depth_groups,
    paper="arXiv 1907.11692",
    head=TASKS["ForSequenceClassification"].head,
    settings=bert_config.settings,
    settle=settle,
    classes=CLASSES,
    needs={"Model": {"pool": ("pooler",)}, "ForSequenceClassification": {"pool": ("cls", None)}},
    backbone="roberta.",
    licence="MIT",
)
