"""Blocks as a loop, or computed twice: the same values, the same modes, one block's worth of program."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

import jtl
from jtl import peft, tree
from jtl.errors import ConfigError
from jtl.models.bert import Bert, BertConfig

CONFIG = BertConfig(
    vocab_size=11,
    hidden_size=8,
    num_hidden_layers=4,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=8,
    initializer_range=0.5,
)
HOW = {"scan": {"scan": True}, "remat": {"remat": True}, "both": {"scan": True, "remat": True}}
MASKS = {
    "head": jtl.select("head"),
    "last two": jtl.select("head", "encoder/layer_2", "encoder/layer_3"),
    "one in the middle": jtl.select("encoder/layer_1"),
    "biases": jtl.masks.biases(),
    "all": jtl.everything(),
}
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile, not to run


def batch():
    ids = jax.random.randint(jax.random.key(3), (4, 6), 1, 11)
    mask = (jnp.arange(6)[None] < jnp.array([[6], [4], [2], [5]])).astype(jnp.int32)
    return {"input_ids": ids, "attention_mask": mask, "label": jnp.array([0, 1, 2, 1])}


@functools.cache
def built():
    model = Bert(CONFIG, jtl.heads.classifier(3, scale=0.5))
    return model, jax.jit(model.init)(jax.random.key(7), jnp.zeros((1, 2), jnp.int32))


def grads(model, variables, mask):
    """Of the trained leaves, through the step's own partition and modes; one step of SGD with a rate of 1."""
    tx, loss_fn = optax.sgd(1.0), jtl.supervised(model, jtl.losses.cross_entropy)
    state, frozen = jtl.init(variables, tx, trainable=mask, key=jax.random.key(1))
    step = jax.jit(jtl.train_step(loss_fn, tx), compiler_options=QUICK)
    after, metrics = step(state, frozen, batch())
    return metrics["loss"], jax.tree.map(jnp.subtract, state.params, after.params)


def still(model):
    return model.clone(config=CONFIG.__class__(**{**vars(CONFIG), **NO_DROPOUT}))


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@functools.cache
def written_out(mask):
    model, variables = built()
    return grads(still(model), variables, MASKS[mask])


@pytest.mark.parametrize(("how", "mask"), [*(("scan", mask) for mask in MASKS), ("remat", "last two"), ("both", "all")])
def test_loss_and_gradients_are_those_of_blocks_written_out(how, mask):
    model, variables = built()
    (loss, plain), (same, found) = written_out(mask), grads(still(model).clone(**HOW[how]), variables, MASKS[mask])
    np.testing.assert_allclose(same, loss, rtol=1e-6)
    for (path, a), b in zip(tree.leaves_with_paths(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6, err_msg=path)


def drops(model, variables, mask):
    """How many values of each shape are drawn in a training step: dropout that is on."""
    tx, loss_fn = optax.sgd(1.0), jtl.supervised(model, jtl.losses.cross_entropy)
    state, frozen = jtl.init(variables, tx, trainable=mask, key=jax.random.key(1))
    jaxpr = jax.make_jaxpr(jtl.train_step(loss_fn, tx))(state, frozen, batch())
    return _drawn(jaxpr.jaxpr, 1)


def _drawn(jaxpr, times):
    count = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "random_bits":
            count += times
        inner = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        count += sum(_drawn(sub, inner) for sub in jaxprs_in_params(eqn.params))
    return count


@pytest.mark.parametrize(("mask", "blocks"), [("head", 0), ("last two", 2), ("one in the middle", 1), ("all", 4)])
def test_dropout_is_on_in_trained_blocks_alone(mask, blocks):
    model, variables = built()
    written, looped = (drops(m, variables, MASKS[mask]) for m in (model, model.clone(scan=True)))
    assert looped == written
    assert written == 3 * blocks + (mask == "all")  # of a block: attention's weights and two sums; the embeddings'


def test_blocks_of_a_loop_drop_other_values():
    class Kept(nn.Module):
        @nn.compact
        def __call__(self, x, *, deterministic):
            x = x + self.param("zero", nn.initializers.zeros_init(), (1,))
            return jtl.models.layers.Dropout(0.5)(x, deterministic=deterministic)

    class Blocks(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jtl.models.stack.stack(self, Kept, 3, x, scan=True, deterministic=False)

    variables = Blocks().init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, jnp.ones(4000))
    y = Blocks().apply(variables, jnp.ones(4000), rngs={"dropout": jax.random.key(2)})
    assert abs(np.mean(y != 0) - 0.125) < 4 * np.sqrt(0.125 * 0.875 / 4000)  # half of half of half


def products(jaxpr):
    inner = sum(products(sub) for eqn in jaxpr.eqns for sub in jaxprs_in_params(eqn.params))
    return inner + sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns)


def test_a_loop_is_as_long_as_one_block():
    counts = []
    for depth in (1, 4, 12):
        model = Bert(BertConfig(**{**vars(CONFIG), "num_hidden_layers": depth}), jtl.heads.classifier(3), scan=True)
        variables = jax.eval_shape(model.init, jax.random.key(7), jnp.zeros((1, 2), jnp.int32))
        counts.append(products(jax.make_jaxpr(model.apply)(variables, batch()["input_ids"]).jaxpr))
    assert counts[0] == counts[1] == counts[2] > 0


@pytest.mark.parametrize("kind", ["lora", "ia3", "bottleneck"])
def test_adapters_run_beside_the_dense_layers_of_a_loop(kind):
    model, variables = built()
    adapter = {
        "lora": lambda: peft.lora(["**/query", "**/value"], rank=2),
        "ia3": lambda: peft.ia3(["**/key", "**/value", "**/down"]),
        "bottleneck": lambda: peft.bottleneck(["**/mlp"], width=3),
    }[kind]()
    attached = peft.attach(adapter, variables, key=jax.random.key(5))
    moved = jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), attached)
    ids = batch()["input_ids"]
    expected = peft.adapted(model, adapter).apply(moved, ids)
    beside = adapter._replace(merge=_must_not_be_called)
    np.testing.assert_allclose(
        peft.adapted(model.clone(scan=True), beside).apply(moved, ids), expected, rtol=1e-4, atol=1e-5
    )
    assert np.abs(expected - model.apply(peft.detach(adapter, moved)[0], ids)).max() > 1e-3


def _must_not_be_called(params, delta):
    raise AssertionError("merged")


def test_alphas_that_differ_within_a_loop_are_refused():
    model, variables = built()
    adapter = peft.lora(["**/query"], rank=2, alpha=[("encoder/layer_0", 1.0), ("**", 2.0)])
    attached = peft.attach(adapter, variables, key=jax.random.key(5))
    with pytest.raises(ConfigError, match="several alphas"):
        peft.adapted(model.clone(scan=True), adapter).apply(attached, batch()["input_ids"])


@pytest.mark.parametrize(("mask", "blocks"), [("head", 4), ("last two", 2)])
def test_a_loop_is_split_where_the_mask_says(mask, blocks):
    model, variables = built()
    model = still(model).clone(scan=True)
    tx, loss_fn = optax.sgd(1.0), jtl.supervised(model, jtl.losses.cross_entropy)
    state, frozen = jtl.init(variables, tx, trainable=MASKS[mask], key=jax.random.key(1))
    cut = jtl.split(loss_fn, state, frozen, batch())
    written = jtl.supervised(still(built()[0]), jtl.losses.cross_entropy)
    work = jtl.split(written, state, frozen, batch()).report
    # In blocks as small as these, stacking the leaves counts for more than 1%.
    assert work.prefix_flops <= cut.report.prefix_flops <= 1.02 * work.prefix_flops
    # The first block of a trained loop is differentiated by its input too, as those after it.
    block = work.prefix_flops / blocks if blocks < 4 else 0
    assert work.suffix_flops <= cut.report.suffix_flops <= 1.02 * work.suffix_flops + block
    cache = jtl.cache.build(cut.prefix, state, frozen, [batch()])
    (cached,) = cache.batches(batch_size=4, epochs=1, key=jax.random.key(0))
    after, metrics = jax.jit(jtl.train_step(cut.suffix, tx))(state, frozen, cached)
    whole, expected = jax.jit(jtl.train_step(loss_fn, tx))(state, frozen, batch())
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)
