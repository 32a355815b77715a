"""Where the tensors of a GPT-2, and of the heads that it comes with, are in the checkpoints of transformers."""

from collections.abc import Sequence

from jtl import heads
from jtl.models.bert_layouts import dense, norm
from jtl.models.family import KeyLayout, Task
from jtl.models.gpt2_config import GPT2Config
from jtl.weights.convert import KEEP, TRANSPOSE, KeyRule

_TABLES = {"word": "wte", "position": "wpe"}
_LAYER = {
    "attention/qkv": "attn.c_attn",
    "attention/output": "attn.c_proj",
    "mlp/up": "mlp.c_fc",
    "mlp/down": "mlp.c_proj",
}
_NORMS = {"decoder/layer_*/attention_norm": "h.{}.ln_1", "decoder/layer_*/mlp_norm": "h.{}.ln_2", "norm": "ln_f"}


def key_rules(config: GPT2Config) -> Sequence[KeyRule]:
    """Where each leaf's tensor is in a Hugging Face checkpoint, without the prefix `transformer.`.

    GPT-2's dense layers are stored as convolutions of width one, `[in, out]`, the axes that the kernels have here.
    """
    del config  # the same names for every size
    rules = [KeyRule(f"embeddings/{path}/embedding", f"{name}.weight", KEEP) for path, name in _TABLES.items()]
    for path, name in _LAYER.items():
        module, source = f"decoder/layer_*/{path}", f"h.{{}}.{name}"
        rules += [KeyRule(f"{module}/kernel", f"{source}.weight", KEEP)]
        rules += [KeyRule(f"{module}/bias", f"{source}.bias", KEEP)]
    return [*rules, *(rule for path, name in _NORMS.items() for rule in norm(path, name))]


def ignored(config: GPT2Config) -> Sequence[str]:
    """Source tensors without a place in the tree: causal masks, copies of the tied table, heads of no task."""
    del config
    return ("h/*/attn/bias", "h/*/attn/masked_bias", "lm_head", "multiple_choice_head")


def rename(name: str) -> str:
    """A source tensor's name without task prefix.

    >>> rename("transformer.h.3.attn.c_attn.weight")
    'h.3.attn.c_attn.weight'
    """
    return name.removeprefix("transformer.")


def _words(config: GPT2Config, outputs: int) -> heads.Tied | heads.Tokens:
    del outputs  # those of the vocabulary
    return heads.Tied() if config.tie_word_embeddings else heads.Tokens(config.vocab_size, use_bias=False)


TASKS = {
    "LMHeadModel": Task(
        _words,
        lambda config: [] if config.tie_word_embeddings else [KeyRule("head/kernel", "lm_head.weight", TRANSPOSE)],
        None,
    ),
    "ForSequenceClassification": Task(
        lambda config, outputs: heads.Linear(outputs, use_bias=False),
        lambda config: [KeyRule("head/kernel", "score.weight", TRANSPOSE)],
    ),
    "ForTokenClassification": Task(
        lambda config, outputs: heads.Tokens(outputs, config.head_dropout),
        lambda config: dense("head", "classifier"),
    ),
    "ForQuestionAnswering": Task(lambda config, outputs: heads.Span(), lambda config: dense("head", "qa_outputs")),
}

LAYOUT = KeyLayout("transformers", key_rules, ignored, rename, tasks=TASKS)
