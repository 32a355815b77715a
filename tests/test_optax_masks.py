"""One mask object, in each place where optax takes one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtl
from jtl import tree

MASK = jtl.select("head") | jtl.masks.biases()
PARAMS = {
    "stem": {"kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]]), "bias": jnp.array([1.0, 2.0])},
    "head": {"kernel": jnp.array([[2.0], [4.0]]), "bias": jnp.array([-1.0])},
}
GRADS = jax.tree.map(lambda p: jnp.cos(3 * p), PARAMS)
TRUE = {"stem/bias", "head/kernel", "head/bias"}


def updates_of(tx):
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    return dict(tree.leaves_with_paths(updates))


@pytest.mark.parametrize(
    ("tx", "true", "false"),
    [
        # What optax itself says of masked: False leaves pass through.
        (optax.masked(optax.sgd(0.5), MASK), lambda g, p: -0.5 * g, lambda g, p: g),
        (
            optax.partition({True: optax.sgd(0.5), False: optax.set_to_zero()}, MASK),
            lambda g, p: -0.5 * g,
            lambda g, p: 0 * g,
        ),
        (optax.chain(optax.sgd(0.5), optax.freeze(~MASK)), lambda g, p: -0.5 * g, lambda g, p: 0 * g),
        (optax.add_decayed_weights(0.25, mask=MASK), lambda g, p: g + 0.25 * p, lambda g, p: g),
        (jtl.finetune(optax.sgd(0.5), trainable=MASK), lambda g, p: -0.5 * g, lambda g, p: 0 * g),
    ],
    ids=["masked", "partition", "freeze", "add_decayed_weights", "finetune"],
)
def test_one_mask_serves_every_transform(tx, true, false):
    updates, params, grads = updates_of(tx), *(dict(tree.leaves_with_paths(t)) for t in (PARAMS, GRADS))
    assert updates.keys() == params.keys()
    for path, update in updates.items():
        expected = (true if path in TRUE else false)(grads[path], params[path])
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=path)


def test_a_mask_inside_a_chain_means_the_same_on_the_trained_half_as_on_the_whole_tree():
    """The decay mask names leaves of which the trained half has only some."""
    decayed = jtl.select("stem", "head/kernel") & jtl.masks.kernels() | jtl.select("stem/bias")
    chain = optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.25, mask=decayed), optax.scale(-0.1))

    def loss_fn(params, collections, batch, *, key):
        return sum(jnp.sum(jnp.sin(3 * p) / 3) for p in jax.tree.leaves(params)), jtl.Aux({}, collections)

    state, frozen = jtl.init({"params": PARAMS}, chain, trainable=jtl.select("head"), key=jax.random.key(0))
    step, expected, momentum = jax.jit(jtl.train_step(loss_fn, chain)), PARAMS["head"], {"kernel": 0.0, "bias": 0.0}
    for _ in range(3):
        state, _ = step(state, frozen, {})
        momentum = {name: jnp.cos(3 * expected[name]) + 0.9 * momentum[name] for name in expected}
        decay = {"kernel": 0.25, "bias": 0.0}
        expected = {n: p - 0.1 * (momentum[n] + decay[n] * p) for n, p in expected.items()}
    assert state.params["stem"] == {"kernel": None, "bias": None}
    for name, leaf in expected.items():
        np.testing.assert_allclose(state.params["head"][name], leaf, rtol=1e-5)


@pytest.mark.parametrize(
    "rest",
    [optax.masked(optax.adam(0.1), MASK), optax.partition({True: optax.adam(0.1), False: optax.set_to_zero()}, MASK)],
    ids=["masked", "partition"],
)
def test_a_wrapper_keeps_no_state_for_false_leaves(rest):
    moments = [leaf for leaf in jax.tree.leaves(rest.init(PARAMS)) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * (2 + 2 + 1)
