"""DistilBERT: BERT's modules without token types and pooler, half as many blocks.

The tree is that of BERT. Token types are accepted and take no effect, as the model has no table of them.

References:
  Sanh et al, DistilBERT, a distilled version of BERT, 2019 (arXiv 1910.01108). Code and weights are under Apache-2.0.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from jtl import heads
from jtl.models.bert import Bert, depth_groups, example
from jtl.models.bert_config import BertConfig, parsed
from jtl.models.bert_layouts import WORDS, blocks, dense, embeddings, masked_words, norm
from jtl.models.family import Family, KeyLayout, Task, renamed
from jtl.weights.convert import KeyRule

NAMES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
"""What `config.json` calls the fields that have another name in `BertConfig`."""

ALIASES = {"hidden_size": "dim", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers"}
"""Other names of settings in `config.json`; those of BERT's that are not here mean nothing there."""


@dataclasses.dataclass(frozen=True)
class DistilBertConfig(BertConfig):
    """The settings of a DistilBERT model, named as those of BERT, with the defaults of DistilBERT.

    `pool` is as in `BertConfig`, but there is no pooler. `seq_classif_dropout` and `qa_dropout` are the rates of the
    checkpoint's own heads for classes of texts and for spans. With `sinusoidal_pos_embds` the embeddings of positions
    were sines and cosines when their training began; they are read as a table, and new ones are random.
    """

    num_hidden_layers: int = 6
    type_vocab_size: int = 0
    pool: str | None = "cls"
    seq_classif_dropout: float = 0.2
    qa_dropout: float = 0.1
    sinusoidal_pos_embds: bool = False

    kind: ClassVar[str] = "DistilBERT"
    names: ClassVar[Mapping[str, str]] = MappingProxyType(NAMES)
    pools: ClassVar[tuple[str | None, ...]] = ("mean", "cls", "max")
    fixed: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"type_vocab_size": 0, "layer_norm_eps": 1e-12, "classifier_dropout": None}
    )


def parse(settings: Mapping[str, Any], folder: Path | None, overrides: Mapping[str, Any]) -> DistilBertConfig:
    """The configuration of a checkpoint; see `bert_config.parse`."""
    if "model_type" in settings:  # of transformers
        settings = renamed(settings, ALIASES)
        ours = {theirs: name for name, theirs in NAMES.items()}
        left_out = {*NAMES, *DistilBertConfig.fixed}
        settings = {ours.get(name, name): value for name, value in settings.items() if name not in left_out}
    return parsed(DistilBertConfig, settings, folder, overrides)


def settings(config: DistilBertConfig, outputs: int | None) -> dict[str, Any]:
    """The `config.json` of transformers, without the name of a class."""
    del outputs
    left_out = {"pool", *DistilBertConfig.fixed}
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in left_out}
    return {"model_type": "distilbert", **{NAMES.get(name, name): value for name, value in fields.items()}}


class DistilBert(Bert):
    """A DistilBERT encoder, with or without a head; see `Bert`."""


_BLOCK = {
    "attention/query": (dense, "attention.q_lin"),
    "attention/key": (dense, "attention.k_lin"),
    "attention/value": (dense, "attention.v_lin"),
    "attention/output": (dense, "attention.out_lin"),
    "attention_norm": (norm, "sa_layer_norm"),
    "mlp/up": (dense, "ffn.lin1"),
    "mlp/down": (dense, "ffn.lin2"),
    "mlp_norm": (norm, "output_layer_norm"),
}


def key_rules(config: BertConfig) -> Sequence[KeyRule]:
    """Where each leaf's tensor is in a Hugging Face checkpoint, without the prefix `distilbert.`."""
    del config  # the same names for every size
    return [*embeddings("word", "position"), *blocks("transformer.layer.{}", _BLOCK)]


TASKS = {
    "ForSequenceClassification": Task(
        lambda config, outputs: heads.Hidden(
            outputs, config.seq_classif_dropout, config.initializer_range, "relu", outer_dropout=False
        ),
        lambda config: [*dense("head/hidden", "pre_classifier"), *dense("head/out", "classifier")],
        "head/out/kernel",
    ),
    "ForTokenClassification": Task(
        lambda config, outputs: heads.Tokens(outputs, config.hidden_dropout_prob),
        lambda config: dense("head", "classifier"),
    ),
    "ForQuestionAnswering": Task(
        lambda config, outputs: heads.Span(dropout=config.qa_dropout),
        lambda config: dense("head", "qa_outputs"),
    ),
    "ForMaskedLM": Task(
        lambda config, outputs: heads.MaskedWords(config.hidden_act, config.layer_norm_eps, config.initializer_range),
        lambda config: masked_words("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),
        None,
        copies={"vocab_projector.weight": WORDS},
    ),
}

FAMILY = Family(
    name="distilbert",
    modality="text",
    parse=parse,
    build=lambda config, head: DistilBert(config, head),
    example=example,
    layouts=(
        KeyLayout(
            "transformers",
            key_rules,
            lambda config: ("embeddings/position_ids", "vocab_projector/weight"),
            lambda name: name.removeprefix("distilbert."),
            tasks=TASKS,
        ),
    ),
    depth_groups=depth_groups,
    paper="arXiv 1910.01108",
    head=TASKS["ForSequenceClassification"].head,
    settings=settings,
    classes="DistilBert",
    needs={"Model": {"pool": ("cls",)}, "ForSequenceClassification": {"pool": ("cls",)}},
    licence="Apache-2.0",
)
