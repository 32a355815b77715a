"""What the laws are checked on: random trees, and tables of models, masks and optimizer chains.

A new family or chain joins every law by one more row in `CASES` or `CHAINS`.
"""

import collections
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from hypothesis import settings
from hypothesis import strategies as st

import jtl
from jtl.models.bert import Bert, BertConfig
from jtl.models.distilbert import DistilBert, DistilBertConfig
from jtl.models.gpt2 import GPT2
from jtl.models.gpt2_config import GPT2Config
from jtl.models.roberta import Roberta, RobertaConfig
from jtl.models.t5 import T5
from jtl.models.t5_config import T5Config

from ..covering import covering  # noqa: TID252
from . import pictures

Pair = collections.namedtuple("Pair", "left right")
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile, not to run
quick = settings(max_examples=50, deadline=None)
NAMES = ["head", "lora", "notlora", "bias", "kernel", "layer_0", "layer_1", "layer_10", "x"]


def leaves():
    """Arrays of zero to two axes, each an object of its own."""
    return st.integers(0, 2).map(lambda axes: np.zeros((2,) * axes))


def trees():
    """Nested dicts, lists and named tuples with leaves, `None` and empty containers in them."""
    return st.recursive(
        leaves() | st.none(),
        lambda inner: (
            st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
            | st.lists(inner, max_size=3)
            | st.builds(Pair, inner, inner)
        ),
        max_leaves=12,
    )


@st.composite
def masked_trees(draw, count: int = 1):
    """A tree, and as many random masks for it as asked."""
    tree = draw(trees())
    return tree, *(jax.tree.map(lambda _: draw(st.booleans()), tree) for _ in range(count))


class Block(nn.Module):
    """Dense, batch normalisation, dropout: it knows nothing of masks."""

    train: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, use_bias=False, name="dense")(x)
        x = nn.BatchNorm(use_running_average=not self.train, momentum=0.8, name="norm")(x)
        return nn.Dropout(0.4, deterministic=not self.train)(nn.tanh(x))


class Scanned(Block):
    """The same block as the body of a scan."""

    def __call__(self, x, _):
        return Block.__call__(self, x), None


class Net(nn.Module):
    """Two blocks and a head; `wrap` is a lifted transform of the blocks."""

    wrap: Callable[..., Any] = staticmethod(lambda block: block)

    @nn.compact
    def __call__(self, x, train: bool = True):
        for name in ("stem", "last"):
            x = self.wrap(Block)(train, name=name)(x)
        return nn.Dense(3, name="head")(x)


class ScanNet(nn.Module):
    """Three blocks stacked by `nn.scan`, and a head."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        axes = {"params": 0, "batch_stats": 0}
        stack = nn.scan(Scanned, variable_axes=axes, split_rngs={"params": True, "dropout": True}, length=3)
        x, _ = stack(train, name="last")(nn.Dense(6, name="stem")(x), None)
        return nn.Dense(3, name="head")(x)


class NnxBlock(nnx.Module):
    """The same block in NNX."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(6, 6, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(6, momentum=0.8, rngs=rngs)
        self.dropout = nnx.Dropout(0.4, rngs=rngs)

    def __call__(self, x):
        return self.dropout(nnx.tanh(self.norm(self.dense(x))))


class NnxNet(nnx.Module):
    """A list of blocks and a head."""

    def __init__(self, rngs):
        self.blocks = nnx.List([NnxBlock(rngs), NnxBlock(rngs)])
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Case(NamedTuple):
    """A model, its masks by name, and batches by seed.

    `flat` names the leaves that the loss does not depend on, so that their gradients are only noise.
    """

    build: Callable[[], tuple[Any, dict[str, Any]]]
    batch: Callable[[int], dict[str, jax.Array]]
    masks: dict[str, jtl.Mask]
    flat: tuple[str, ...] = ()


def vectors(seed: int) -> dict[str, jax.Array]:
    a, b = jax.random.split(jax.random.key(seed))
    return {"x": 2 * jax.random.normal(a, (8, 6)) + 1, "label": jax.random.randint(b, (8,), 0, 3)}


def tokens(seed: int) -> dict[str, jax.Array]:
    a, b = jax.random.split(jax.random.key(seed))
    ids = jax.random.randint(a, (4, 5), 1, 11)
    return {"input_ids": ids, "attention_mask": jnp.ones_like(ids), "label": jax.random.randint(b, (4,), 0, 3)}


def linen(model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    keys = dict(zip(("params", "dropout"), jax.random.split(jax.random.key(7)), strict=True))
    return model, model.init(keys, vectors(0)["x"])


def bert() -> tuple[Any, dict[str, Any]]:
    config = BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        initializer_range=0.5,
    )
    return started(Bert(config, jtl.heads.classifier(3, dropout=0.2, scale=0.5)))


def roberta() -> tuple[Any, dict[str, Any]]:
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    config = RobertaConfig(
        **sizes, num_hidden_layers=1, max_position_embeddings=8, pool="cls", pad_token_id=1, initializer_range=0.5
    )
    return started(Roberta(config, jtl.heads.classifier(3, dropout=0.2, scale=0.5)))


def distilbert() -> tuple[Any, dict[str, Any]]:
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    config = DistilBertConfig(**sizes, num_hidden_layers=1, max_position_embeddings=8, initializer_range=0.5)
    return started(DistilBert(config, jtl.heads.classifier(3, dropout=0.2, scale=0.5)))


def gpt2() -> tuple[Any, dict[str, Any]]:
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, initializer_range=0.5)
    return started(GPT2(config, jtl.heads.classifier(3, dropout=0.2, scale=0.5)))


def t5() -> tuple[Any, dict[str, Any]]:
    config = T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2)
    return started(T5(config, jtl.heads.classifier(3, dropout=0.2, scale=0.5)))


def started(model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    inputs = {name: value for name, value in tokens(0).items() if name != "label"}
    return model, jax.jit(model.init)(jax.random.key(7), **inputs)


def function() -> tuple[Any, dict[str, Any]]:
    def forward(params, x, *, key, train):
        x = jnp.tanh(x @ params["stem"]["kernel"])
        x = x * jax.random.bernoulli(key, 0.5, x.shape).astype(x.dtype) if train else x / 2
        return x @ params["last"]["kernel"] + jnp.expand_dims(params["head"]["bias"], 0)

    keys = jax.random.split(jax.random.key(7))
    kernels = [("stem", (6, 6)), ("last", (6, 3))]
    params = {name: {"kernel": jax.random.normal(key, shape)} for (name, shape), key in zip(kernels, keys, strict=True)}
    return jtl.from_function(forward), {"params": {**params, "head": {"bias": jnp.zeros(3)}}}


HEAD = jtl.select("head")
BLOCKS = {
    "head": HEAD,
    "last block": HEAD | jtl.select("last"),
    "stem": jtl.select("stem"),
    "everything": jtl.everything(),
}
NORMS = {"norms": HEAD | jtl.masks.norms(), "biases": jtl.masks.biases()}

CASES = {
    "linen": Case(lambda: linen(Net()), vectors, BLOCKS | NORMS),
    "remat": Case(lambda: linen(Net(nn.remat)), vectors, BLOCKS | NORMS),
    "scan": Case(lambda: linen(ScanNet()), vectors, BLOCKS | NORMS),
    "bert": Case(
        bert,
        tokens,
        {
            "head": HEAD,
            "last block": HEAD | jtl.select("encoder/layer_0"),
            "embeddings": jtl.select("embeddings/word"),
            "everything": jtl.everything(),
            **NORMS,
        },
        # Softmax takes no notice of what is added to every score of a row.
        flat=("encoder/layer_*/attention/key/bias",),
    ),
    **{
        name: Case(
            build,
            tokens,
            {"head": HEAD, "last block": HEAD | jtl.select("encoder/layer_0"), "everything": jtl.everything()},
            flat=("encoder/layer_*/attention/key/bias",),
        )
        for name, build in {"roberta": roberta, "distilbert": distilbert}.items()
    },
    "gpt2": Case(
        gpt2,
        tokens,
        {"head": HEAD, "last block": HEAD | jtl.select("decoder/layer_0"), "everything": jtl.everything()},
        flat=("decoder/layer_*/attention/qkv/bias",),
    ),
    "t5": Case(
        t5,
        tokens,
        {"head": HEAD, "decoder": HEAD | jtl.select("decoder"), "everything": jtl.everything()},
    ),
    "nnx": Case(
        lambda: jtl.from_nnx(NnxNet(nnx.Rngs(7))),
        vectors,
        {"head": HEAD, "last block": HEAD | jtl.select("blocks/1"), "everything": jtl.everything(), **NORMS},
    ),
    "function": Case(function, vectors, BLOCKS),
}
CASES |= {
    name: Case(
        functools.partial(pictures.build, name),
        pictures.pictures,
        pictures.masks(name),
        flat=("encoder/layer_*/attention/key/bias",) if name == "vit" else (),
    )
    for name in pictures.CONFIGS
}

CHAINS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "clip, adamw": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1)),
    "momentum": lambda: optax.sgd(1e-2, momentum=0.9),
    "ema": lambda: optax.chain(optax.sgd(1e-2), optax.ema(0.9)),
    "apply_if_finite": lambda: optax.apply_if_finite(CHAINS["clip, adamw"](), max_consecutive_errors=2),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-2, weight_decay=0.1),
    "multi_steps": lambda: optax.MultiSteps(optax.adamw(1e-2), every_k_schedule=2).gradient_transformation(),
}

# Every model with every mask, and every model with every chain. Each model, each mask and each chain is in two of those
# that run every time.
HARDEST = "apply_if_finite"
MASKED = [(case, mask) for case in CASES for mask in CASES[case].masks]
ONCE = (*pictures.CONFIGS, "roberta", "distilbert", "gpt2", "t5")  # chains know no model
CHAINED = [
    (case, list(CASES[case].masks)[1], chain)
    for case in CASES
    for chain in CHAINS
    if chain != HARDEST and case not in ONCE
]
RUNS = [*covering([(*pair, HARDEST) for pair in MASKED], times=2), *covering(CHAINED, times=2)]


@functools.cache
def built(case: str) -> tuple[Any, dict[str, Any]]:
    """The model and variables of a case."""
    return CASES[case].build()
