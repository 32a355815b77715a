"""`supervised`: which inputs a model gets, how examples are weighed, in which mode it is called."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtl
from jtl import errors


class Add(nn.Module):
    """Logits from two inputs."""

    @nn.compact
    def __call__(self, left, right):
        return nn.Dense(3, name="head")(left - 2 * right)


class Modes(nn.Module):
    """Records the mode it is called in."""

    seen: ClassVar[list] = []

    @nn.compact
    def __call__(self, x, train: bool, deterministic: bool = True):
        Modes.seen.append((train, deterministic))
        return nn.Dense(3, name="head")(x)


RNG = np.random.default_rng(0)
A, B = (jnp.array(RNG.normal(size=(4, 2)).astype(np.float32)) for _ in range(2))
Y = jnp.array([0, 1, 2, 0])
PARAMS = Add().init(jax.random.key(0), A, B)["params"]


def value(batch, **settings):
    loss_fn = jtl.supervised(Add(), jtl.losses.cross_entropy, **settings)
    return float(loss_fn(PARAMS, {}, batch, key=None)[0])


def expected(left, right, weight=None):
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(Add().apply({"params": PARAMS}, left, right), Y)
    return float(np.average(losses, weights=weight))


def test_several_inputs_go_by_keyword_or_in_the_order_that_is_named():
    assert value({"right": B, "left": A, "label": Y}) == pytest.approx(expected(A, B), rel=1e-6)
    swapped = value({"right": B, "left": A, "label": Y}, inputs=("right", "left"))
    assert swapped == pytest.approx(expected(B, A), rel=1e-6)
    unused = value({"left": A, "right": B, "id": Y, "label": Y}, inputs=("left", "right"))
    assert unused == pytest.approx(expected(A, B), rel=1e-6)


def test_weights_weigh_examples_and_rows_of_weight_zero_do_not_count():
    weight = jnp.array([1.0, 2.0, 0.0, 0.5])
    found = value({"left": A, "right": B, "label": Y, "weight": weight})
    assert found == pytest.approx(expected(A, B, weight), rel=1e-6)


def test_a_batch_of_filler_alone_has_loss_zero_and_finite_gradients():
    loss_fn = jtl.supervised(Add(), jtl.losses.cross_entropy)
    batch = {"left": A, "right": B, "label": Y, "weight": jnp.zeros(4)}
    loss, grads = jax.value_and_grad(lambda p: loss_fn(p, {}, batch, key=None)[0])(PARAMS)
    assert loss == 0
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(grads))


def test_another_target_can_be_named():
    assert value({"left": A, "right": B, "y": Y}, target="y") == pytest.approx(expected(A, B), rel=1e-6)


def test_the_mode_follows_the_key_unless_it_is_set():
    x = jnp.ones((1, 2))
    params = Modes().init(jax.random.key(0), x, True)["params"]
    Modes.seen.clear()
    batch = {"x": x, "label": jnp.array([0])}
    for call in ({}, {"train": False}):
        loss_fn = jtl.supervised(Modes(), jtl.losses.cross_entropy, call=call)
        for key in (jax.random.key(1), None):
            loss_fn(params, {}, batch, key=key)
    assert Modes.seen == [(True, False), (False, True), (False, False), (False, True)]


def test_a_missing_entry_is_named_with_what_there_is():
    with pytest.raises(errors.DataError, match=r"lacks \['label'\]; it has \['left', 'right'\]"):
        value({"left": A, "right": B})
    with pytest.raises(errors.DataError, match=r"lacks \['middle'\]"):
        value({"left": A, "label": Y}, inputs=("middle",))


def test_the_checker_traces_the_model_once_for_each_shape():
    traced = []
    model = jtl.from_function(lambda params, x: traced.append(x.shape) or x @ params["w"])
    check = jtl.supervised(model, jtl.losses.cross_entropy).checker({"w": jnp.ones((2, 3))}, {})
    for size in (4, 4, 2, 4):
        check({"x": A[:size], "label": Y[:size]})
    assert traced == [(4, 2), (2, 2)]


class Trains(nn.Module):
    """A model with training written into it."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(x)
        return nn.Dense(3, name="head")(nn.Dropout(0.5, deterministic=False)(x))


def test_the_checker_takes_a_model_with_training_written_into_it():
    keys = dict(zip(("params", "dropout"), jax.random.split(jax.random.key(0)), strict=True))
    variables = Trains().init(keys, A)
    check = jtl.supervised(Trains(), jtl.losses.cross_entropy).checker(
        variables["params"], {"batch_stats": variables["batch_stats"]}
    )
    check({"x": A, "label": Y})
    with pytest.raises(errors.DataError, match="label 3"):
        check({"x": A, "label": Y + 1})


def test_a_loss_of_ones_own_may_take_several_outputs():
    model = jtl.from_function(lambda params, x: (x @ params["w"], x))
    own = jtl.supervised(model, lambda outputs, labels: jtl.losses.cross_entropy(outputs[0], labels))
    own.checker({"w": jnp.ones((2, 3))}, {})({"x": A, "label": Y})
    with pytest.raises(errors.DataError, match="several"):
        jtl.supervised(model, jtl.losses.cross_entropy).checker({"w": jnp.ones((2, 3))}, {})({"x": A, "label": Y})
