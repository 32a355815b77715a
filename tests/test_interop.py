"""NNX modules and plain functions through the same state and step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jtl
from jtl import errors

X = jax.random.normal(jax.random.key(3), (8, 4)) * 2 + 1
BATCH = {"x": X, "label": jnp.arange(8) % 3}


class Block(nnx.Module):
    """Dense, BatchNorm, dropout."""

    def __init__(self, rngs, rate):
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.8, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        return self.dropout(nnx.relu(self.norm(self.dense(x))))


class Net(nnx.Module):
    """Two blocks in a list, and a head."""

    def __init__(self, rate=0.5):
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([Block(rngs, rate), Block(rngs, rate)])
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def losses(mask, steps=6):
    """The losses of steps that change nothing, so that only randomness and statistics can move them."""
    model, variables = jtl.from_nnx(Net())
    tx = optax.set_to_zero()
    loss_fn = jtl.supervised(model, jtl.losses.cross_entropy)
    state, frozen = jtl.init(variables, tx, trainable=mask, key=jax.random.key(1))
    step, found = jax.jit(jtl.train_step(loss_fn, tx)), []
    for _ in range(steps):
        state, metrics = step(state, frozen, BATCH)
        found.append(float(metrics["loss"]))
    return found, jtl.variables(state, frozen), variables


def test_a_frozen_trunk_has_neither_dropout_nor_moving_statistics():
    found, after, before = losses(jtl.select("head"))
    assert len(set(found)) == 1
    assert jtl.tree.digest(after["batch_stats"]) == jtl.tree.digest(before["batch_stats"])


def test_a_trained_block_has_both_and_the_frozen_one_below_it_neither():
    found, after, before = losses(jtl.select("head", "blocks/1"))
    assert len(set(found)) > 1
    still, moved = (jtl.tree.digest(after["batch_stats"]["blocks"][i]) for i in (0, 1))
    assert still == jtl.tree.digest(before["batch_stats"]["blocks"][0])
    assert moved != jtl.tree.digest(before["batch_stats"]["blocks"][1])


def test_running_statistics_move_as_the_module_itself_moves_them():
    module = Net(rate=0.0)
    _, after, _ = losses(jtl.everything(), steps=1)
    module.train()
    module(X)
    expected = module.blocks[0].norm.mean[...]
    np.testing.assert_allclose(after["batch_stats"]["blocks"][0]["norm"]["mean"], expected, rtol=1e-5)


def test_gradients_equal_those_of_nnx():
    module = Net(rate=0.0)
    model, variables = jtl.from_nnx(module)
    loss_fn = jtl.supervised(model, jtl.losses.cross_entropy)
    collections = {"batch_stats": variables["batch_stats"]}
    found = jax.grad(lambda p: loss_fn(p, collections, BATCH, key=jax.random.key(0))[0])(variables["params"])
    module.train()
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    expected = nnx.grad(lambda m: jnp.mean(cross_entropy(m(X), BATCH["label"])))(module)
    expected = dict(jtl.tree.leaves_with_paths(nnx.to_pure_dict(nnx.state(expected, nnx.Param))))
    for path, leaf in jtl.tree.leaves_with_paths(found):
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-4, atol=1e-6, err_msg=path)


def test_the_module_that_was_adapted_is_left_as_it_was():
    module = Net()
    before = jtl.tree.digest(jax.tree.map(lambda leaf: leaf, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))))
    model, variables = jtl.from_nnx(module)
    model.apply(variables, X, rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"])
    assert jtl.tree.digest(nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))) == before


def test_evaluation_is_deterministic():
    model, variables = jtl.from_nnx(Net())
    step = jax.jit(jtl.eval_step(jtl.supervised(model, jtl.losses.cross_entropy)))
    state, frozen = jtl.init(variables, optax.sgd(1.0), trainable=jtl.everything(), key=jax.random.key(1))
    module = Net()
    module.eval()
    expected = optax.losses.softmax_cross_entropy_with_integer_labels(module(X), BATCH["label"]).mean()
    np.testing.assert_allclose(step(state, frozen, BATCH)["loss"].compute(), expected, rtol=1e-6)


def test_a_function_is_given_its_key_and_mode():
    seen = []

    def forward(params, x, *, key, train):
        seen.append((key is not None, train))
        return x @ params["w"]

    loss_fn = jtl.supervised(jtl.from_function(forward), jtl.losses.cross_entropy)
    tx = optax.sgd(0.1)
    state, frozen = jtl.init({"params": {"w": jnp.ones((4, 3))}}, tx, trainable=jtl.everything(), key=jax.random.key(0))
    jtl.train_step(loss_fn, tx)(state, frozen, BATCH)
    jtl.eval_step(loss_fn)(state, frozen, BATCH)
    assert seen == [(True, True), (False, False)]


def test_what_cannot_be_applied_is_refused_with_the_adapters_named():
    with pytest.raises(errors.ConfigError, match=r"from_nnx.*from_function"):
        jtl.supervised(lambda x: x, jtl.losses.cross_entropy)
