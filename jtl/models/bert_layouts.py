"""Where the tensors of a BERT, and of the heads that it comes with, are in the checkpoints of transformers."""

from collections.abc import Sequence

from jtl import heads
from jtl.models.bert_config import BertConfig
from jtl.models.family import KeyLayout, Task
from jtl.weights.convert import KEEP, TRANSPOSE, KeyRule

_DENSE = (("kernel", "weight", TRANSPOSE), ("bias", "bias", KEEP))
_NORM = (("scale", "weight", KEEP), ("bias", "bias", KEEP))
_LAYER = {
    "attention/query": ("attention.self.query", _DENSE),
    "attention/key": ("attention.self.key", _DENSE),
    "attention/value": ("attention.self.value", _DENSE),
    "attention/output": ("attention.output.dense", _DENSE),
    "attention_norm": ("attention.output.LayerNorm", _NORM),
    "mlp/up": ("intermediate.dense", _DENSE),
    "mlp/down": ("output.dense", _DENSE),
    "mlp_norm": ("output.LayerNorm", _NORM),
}


def key_rules(config: BertConfig) -> Sequence[KeyRule]:
    """Where each leaf's tensor is in a Hugging Face checkpoint, without the prefix `bert.`."""
    del config  # the same names for every size
    rules = [
        KeyRule(f"embeddings/{kind}/embedding", f"embeddings.{kind}_embeddings.weight", KEEP)
        for kind in ("word", "position", "token_type")
    ]
    modules = {"embeddings/norm": ("embeddings.LayerNorm", _NORM), "pooler": ("pooler.dense", _DENSE)}
    modules |= {
        f"encoder/layer_*/{path}": (f"encoder.layer.{{}}.{name}", kind) for path, (name, kind) in _LAYER.items()
    }
    for path, (name, leaves) in modules.items():
        rules += [KeyRule(f"{path}/{leaf}", f"{name}.{suffix}", layout) for leaf, suffix, layout in leaves]
    return rules


def ignored(config: BertConfig) -> Sequence[str]:
    """Source tensors without a place in the tree: buffers, copies of tied tensors, and heads that no task has."""
    del config
    return ("embeddings/position_ids", "cls/seq_relationship", "cls/predictions/decoder", "pooler")


def rename(name: str) -> str:
    """A source tensor's name without task prefix, and with today's names for LayerNorm's leaves.

    >>> rename("bert.encoder.layer.0.output.LayerNorm.gamma")
    'encoder.layer.0.output.LayerNorm.weight'
    """
    name = name.removeprefix("bert.")
    stem, _, leaf = name.rpartition(".")
    return f"{stem}.{ {'gamma': 'weight', 'beta': 'bias'}.get(leaf, leaf) }" if stem else name


def dense(path: str, source: str) -> list[KeyRule]:
    """The rules of a dense layer."""
    return [KeyRule(f"{path}/{leaf}".strip("/"), f"{source}.{name}", layout) for leaf, name, layout in _DENSE]


def norm(path: str, source: str) -> list[KeyRule]:
    """The rules of a layer norm."""
    return [KeyRule(f"{path}/{leaf}", f"{source}.{name}", layout) for leaf, name, layout in _NORM]


def _masked_words(config: BertConfig) -> list[KeyRule]:
    del config
    words = "cls.predictions.transform"
    own = [KeyRule("head/bias", "cls.predictions.bias", KEEP)]
    return [*dense("head/dense", f"{words}.dense"), *norm("head/norm", f"{words}.LayerNorm"), *own]


TASKS = {
    "ForSequenceClassification": Task(
        lambda config, outputs: heads.Linear(outputs, config.hidden_dropout_prob),
        lambda config: dense("head", "classifier"),
    ),
    "ForTokenClassification": Task(
        lambda config, outputs: heads.Tokens(outputs, config.hidden_dropout_prob),
        lambda config: dense("head", "classifier"),
    ),
    "ForQuestionAnswering": Task(lambda config, outputs: heads.Span(), lambda config: dense("head", "qa_outputs")),
    "ForMaskedLM": Task(
        lambda config, outputs: heads.MaskedWords(config.hidden_act, config.layer_norm_eps, config.initializer_range),
        _masked_words,
        None,
    ),
}

LAYOUT = KeyLayout("transformers", key_rules, ignored, rename, tasks=TASKS)
