"""Where the tensors of a BERT, and of the heads that it comes with, are in the checkpoints of transformers."""

from collections.abc import Callable, Mapping, Sequence

from jtl import heads
from jtl.models.bert_config import BertConfig
from jtl.models.family import KeyLayout, Task
from jtl.weights.convert import KEEP, TRANSPOSE, KeyRule


def dense(path: str, source: str) -> list[KeyRule]:
    """The rules of a dense layer."""
    return [KeyRule(f"{path}/kernel", f"{source}.weight", TRANSPOSE), KeyRule(f"{path}/bias", f"{source}.bias", KEEP)]


def norm(path: str, source: str) -> list[KeyRule]:
    """The rules of a layer norm."""
    return [KeyRule(f"{path}/scale", f"{source}.weight", KEEP), KeyRule(f"{path}/bias", f"{source}.bias", KEEP)]


def embeddings(*kinds: str) -> list[KeyRule]:
    """The rules of tables of embeddings, such as "word", and of the norm above them."""
    tables = [KeyRule(f"embeddings/{kind}/embedding", f"embeddings.{kind}_embeddings.weight", KEEP) for kind in kinds]
    return [*tables, *norm("embeddings/norm", "embeddings.LayerNorm")]


def blocks(source: str, names: Mapping[str, tuple[Callable[[str, str], list[KeyRule]], str]]) -> list[KeyRule]:
    """The rules of all blocks.

    Args:
      source: what the names of a block's tensors begin with; `{}` is its number.
      names: by a module's path in the block, `dense` or `norm`, and its name.
    """
    modules = [(f"encoder/layer_*/{path}", f"{source}.{name}", rules) for path, (rules, name) in names.items()]
    return [rule for path, name, rules in modules for rule in rules(path, name)]


_BLOCK = {
    "attention/query": (dense, "attention.self.query"),
    "attention/key": (dense, "attention.self.key"),
    "attention/value": (dense, "attention.self.value"),
    "attention/output": (dense, "attention.output.dense"),
    "attention_norm": (norm, "attention.output.LayerNorm"),
    "mlp/up": (dense, "intermediate.dense"),
    "mlp/down": (dense, "output.dense"),
    "mlp_norm": (norm, "output.LayerNorm"),
}


def key_rules(config: BertConfig) -> Sequence[KeyRule]:
    """Where each leaf's tensor is in a Hugging Face checkpoint, without the prefix `bert.`."""
    del config  # the same names for every size
    backbone = [*embeddings("word", "position", "token_type"), *blocks("encoder.layer.{}", _BLOCK)]
    return [*backbone, *dense("pooler", "pooler.dense")]


def ignored(config: BertConfig) -> Sequence[str]:
    """Source tensors without a place in the tree: buffers, copies of tied tensors, and heads that no task has."""
    del config
    return ("embeddings/position_ids", "cls/seq_relationship", "cls/predictions/decoder", "pooler")


def rename(name: str, prefix: str = "bert.") -> str:
    """A source tensor's name without task prefix, and with today's names for LayerNorm's leaves.

    >>> rename("bert.encoder.layer.0.output.LayerNorm.gamma")
    'encoder.layer.0.output.LayerNorm.weight'
    """
    name = name.removeprefix(prefix)
    stem, _, leaf = name.rpartition(".")
    return f"{stem}.{ {'gamma': 'weight', 'beta': 'bias'}.get(leaf, leaf) }" if stem else name


def masked_words(transform: str, layer_norm: str, bias: str) -> list[KeyRule]:
    """The rules of a head of masked words."""
    return [*dense("head/dense", transform), *norm("head/norm", layer_norm), KeyRule("head/bias", bias, KEEP)]


WORDS = "embeddings.word_embeddings.weight"
"""The table that a head of masked words shares."""

TASKS = {
    "ForSequenceClassification": Task(
        lambda config, outputs: heads.Linear(outputs, config.head_dropout),
        lambda config: dense("head", "classifier"),
    ),
    "ForTokenClassification": Task(
        lambda config, outputs: heads.Tokens(outputs, config.head_dropout),
        lambda config: dense("head", "classifier"),
    ),
    "ForQuestionAnswering": Task(lambda config, outputs: heads.Span(), lambda config: dense("head", "qa_outputs")),
    "ForMaskedLM": Task(
        lambda config, outputs: heads.MaskedWords(config.hidden_act, config.layer_norm_eps, config.initializer_range),
        lambda config: masked_words(
            "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"
        ),
        None,
        copies={
            "cls.predictions.decoder.weight": WORDS,
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
    ),
}

LAYOUT = KeyLayout("transformers", key_rules, ignored, rename, tasks=TASKS)
