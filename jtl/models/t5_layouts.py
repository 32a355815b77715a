"""Where the tensors of a T5, and of the heads that it comes with, are in the checkpoints of transformers."""

from collections.abc import Sequence

from jtl import heads
from jtl.models.bert_layouts import dense
from jtl.models.family import KeyLayout, Task
from jtl.models.t5_config import T5Config
from jtl.weights.convert import KEEP, TRANSPOSE, KeyRule

_ATTENTION = {"query": "q", "key": "k", "value": "v", "output": "o"}
_PLAIN = {"up": "wi", "down": "wo"}
_GATED = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
_BLOCKS = {
    "encoder": {"attention": "SelfAttention", "mlp": "DenseReluDense"},
    "decoder": {"attention": "SelfAttention", "cross_attention": "EncDecAttention", "mlp": "DenseReluDense"},
}
"""The parts of a block in their order: each is a `layer` of it in transformers, with a norm."""

_FIRST = "block.0.layer.0.SelfAttention.relative_attention_bias"


def key_rules(config: T5Config) -> Sequence[KeyRule]:
    """Where each leaf's tensor is in a Hugging Face checkpoint, without the prefix `transformer.`."""
    rules = [KeyRule("shared/embedding", "shared.weight", KEEP)]
    for stack, parts in _BLOCKS.items():
        rules.append(KeyRule(f"{stack}/relative_bias/embedding", f"{stack}.{_FIRST}.weight", KEEP))
        rules.append(KeyRule(f"{stack}/norm/scale", f"{stack}.final_layer_norm.weight", KEEP))
        for i, (part, module) in enumerate(parts.items()):
            path, source = f"{stack}/layer_*/{part}", f"{stack}.block.{{}}.layer.{i}"
            inner = _ATTENTION if part != "mlp" else _GATED if config.gated else _PLAIN
            rules.append(KeyRule(f"{path}_norm/scale", f"{source}.layer_norm.weight", KEEP))
            rules += [
                KeyRule(f"{path}/{leaf}/kernel", f"{source}.{module}.{name}.weight", TRANSPOSE)
                for leaf, name in inner.items()
            ]
    return rules


def ignored(config: T5Config) -> Sequence[str]:
    """Source tensors without a place in the tree: copies of the table, an unread bias, a decoder that is left out."""
    copies = ("encoder/embed_tokens", "decoder/embed_tokens")
    unread = ("decoder/block/0/layer/1/EncDecAttention/relative_attention_bias",)
    tied = ("lm_head",) if config.tie_word_embeddings or config.encoder_only else ()
    return (*copies, *unread, *tied, *(("decoder",) if config.encoder_only else ()))


def rename(name: str) -> str:
    """A source tensor's name without task prefix.

    >>> rename("transformer.encoder.block.0.layer.0.SelfAttention.q.weight")
    'encoder.block.0.layer.0.SelfAttention.q.weight'
    """
    return name.removeprefix("transformer.")


def gives_words(config: T5Config, head: object) -> bool:
    """Whether a head's outputs are the logits of words: the table's, or those of a dense layer of its own."""
    untied = isinstance(head, heads.Tokens) and not head.use_bias and head.outputs == config.vocab_size
    return isinstance(head, heads.Tied) or untied


def _words(config: T5Config, outputs: int) -> heads.Tied | heads.Tokens:
    del outputs  # those of the vocabulary
    if config.tie_word_embeddings:
        return heads.Tied()
    return heads.Tokens(config.vocab_size, scale=config.initializer_factor, use_bias=False)


def _classifier(config: T5Config, outputs: int) -> heads.Hidden:
    return heads.Hidden(outputs, config.classifier_dropout, config.initializer_factor * config.d_model**-0.5)


def _has_decoder(config: T5Config) -> bool:
    return not config.encoder_only


TASKS = {
    "ForConditionalGeneration": Task(
        _words,
        lambda config: [] if config.tie_word_embeddings else [KeyRule("head/kernel", "lm_head.weight", TRANSPOSE)],
        None,
        fits=_has_decoder,
    ),
    "ForSequenceClassification": Task(
        _classifier,
        lambda config: [
            *dense("head/hidden", "classification_head.dense"),
            *dense("head/out", "classification_head.out_proj"),
        ],
        "head/out/kernel",
        fits=_has_decoder,
        backbone="transformer.",
    ),
    "ForTokenClassification": Task(
        lambda config, outputs: heads.Tokens(outputs, config.classifier_dropout),
        lambda config: dense("head", "classifier"),
        fits=lambda config: config.encoder_only,
        backbone="transformer.",
    ),
    "ForQuestionAnswering": Task(
        lambda config, outputs: heads.Span(), lambda config: dense("head", "qa_outputs"), fits=_has_decoder
    ),
}

LAYOUT = KeyLayout("transformers", key_rules, ignored, rename, tasks=TASKS)
