"""Steps against optax and hand-computed values; the whole-tree form `finetune`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtl
from jtl import errors

PARAMS = {"stem": jnp.array([3.0, 4.0]), "head": jnp.array([1.0, 2.0])}
HEAD = {"stem": False, "head": True}
X = jnp.array([0.5, -1.0])


def loss_fn(params, collections, batch, *, key):
    value = jnp.sum(jnp.square(params["stem"] * params["head"] * batch["x"]))
    return value, jtl.Aux({"seen": jnp.float32(key is not None)}, {})


def steps(tx, count, mask=HEAD, **options):
    state, frozen = jtl.init({"params": PARAMS}, tx, trainable=mask, key=jax.random.key(0))
    step = jax.jit(jtl.train_step(loss_fn, tx, **options))
    metrics = {}
    for _ in range(count):
        state, metrics = step(state, frozen, {"x": X})
    return jtl.variables(state, frozen)["params"], metrics


def head_gradient(head):
    return 2 * np.asarray(head) * np.square(np.asarray(PARAMS["stem"]) * np.asarray(X))


def test_a_step_is_the_update_of_the_trained_leaves_worked_out_by_hand():
    after, metrics = steps(optax.sgd(0.01), 1, grad_norm=True)
    gradient = head_gradient(PARAMS["head"])
    np.testing.assert_allclose(after["head"], PARAMS["head"] - 0.01 * gradient, rtol=1e-6)
    np.testing.assert_array_equal(after["stem"], PARAMS["stem"])
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-6)


def test_the_clip_norm_is_that_of_trained_leaves():
    after, _ = steps(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), 1)
    gradient = head_gradient(PARAMS["head"])
    np.testing.assert_allclose(PARAMS["head"] - after["head"], gradient / np.linalg.norm(gradient), rtol=1e-5)


@pytest.mark.parametrize(
    "tx",
    [
        optax.adamw(0.1, weight_decay=0.1),
        optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1)),
        optax.sgd(0.01, momentum=0.9, nesterov=True),
    ],
    ids=["adamw", "clip", "momentum"],
)
def test_finetune_in_a_loop_of_ones_own_equals_train_step(tx):
    whole, params = jtl.finetune(tx, trainable=HEAD), PARAMS
    opt_state = whole.init(params)
    for _ in range(4):
        grads = jax.grad(lambda p: loss_fn(p, {}, {"x": X}, key=None)[0])(params)
        updates, opt_state = whole.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    for name, leaf in steps(tx, 4)[0].items():
        np.testing.assert_allclose(params[name], leaf, rtol=1e-6)


def test_finetune_gives_zero_updates_and_keeps_no_state_for_frozen_leaves():
    tx = jtl.finetune(optax.adam(0.1), trainable=jtl.select("head"))
    opt_state = tx.init(PARAMS)
    grads = {"stem": jnp.array([7.0, 7.0]), "head": jnp.array([1.0, 1.0])}
    updates, opt_state = tx.update(grads, opt_state)
    np.testing.assert_array_equal(updates["stem"], np.zeros(2))
    assert np.all(np.abs(updates["head"]) > 0)
    assert jtl.tree.nbytes(opt_state) == jtl.tree.nbytes(optax.adam(0.1).init({"head": PARAMS["head"]}))


def test_finetune_passes_extra_arguments_on():
    seen = []

    def update(updates, state, params=None, *, value, **extra):
        seen.append(value)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = jtl.finetune(inner, trainable=HEAD)
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=3.0)
    assert seen == [3.0]


def test_finetune_refuses_a_mask_that_does_not_fit():
    with pytest.raises(errors.MaskError, match="structures differ"):
        jtl.finetune(optax.sgd(0.1), trainable={"head": True}).init(PARAMS)


def test_transforms_that_ask_for_the_loss_are_given_it():
    tx = optax.chain(optax.sgd(1e-3), optax.contrib.reduce_on_plateau(factor=0.5, patience=1))
    after, _ = steps(tx, 2)
    assert np.all(after["head"] != PARAMS["head"])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda params, collections, batch, *, key: jnp.sum(params["head"]), r"returns \(loss, jtl\.Aux"),
        (lambda params, collections, batch, *, key: (jnp.sum(params["head"]), {}), r"returns \(loss, jtl\.Aux"),
        (lambda params, collections, batch, *, key: (params["head"], jtl.Aux({}, {})), r"scalar.*\(2,\)"),
    ],
    ids=["bare", "dict", "vector"],
)
def test_a_loss_of_the_wrong_form_is_refused(bad, message):
    tx = optax.sgd(0.1)
    state, frozen = jtl.init({"params": PARAMS}, tx, trainable=HEAD, key=jax.random.key(0))
    with pytest.raises(errors.ConfigError, match=message):
        jax.jit(jtl.train_step(bad, tx))(state, frozen, {"x": X})


def test_collections_that_a_loss_drops_are_missed():
    tx = optax.sgd(0.1)
    variables = {"params": PARAMS, "stats": {"head": {"mean": jnp.zeros(1)}}}
    mask = {"stem": True, "head": True}

    def drops(params, collections, batch, *, key):
        return jnp.sum(params["head"]), jtl.Aux({}, {"stats": {}})

    state, frozen = jtl.init(variables, tx, trainable=mask, key=jax.random.key(0))
    with pytest.raises(errors.ConfigError, match=r"without \['stats/head/mean'\]"):
        jtl.train_step(drops, tx)(state, frozen, {})


def test_every_step_has_a_key_of_its_own_and_evaluation_has_none():
    tx = optax.sgd(0.0)
    state, frozen = jtl.init({"params": PARAMS}, tx, trainable=HEAD, key=jax.random.key(0))

    def noise(params, collections, batch, *, key):
        drawn = jnp.float32(0) if key is None else jax.random.normal(key)
        return jnp.sum(params["head"]), jtl.Aux({"drawn": drawn}, {})

    step, seen = jax.jit(jtl.train_step(noise, tx)), []
    for _ in range(3):
        state, metrics = step(state, frozen, {})
        seen.append(float(metrics["drawn"]))
    assert len(set(seen)) == 3
    assert float(jtl.eval_step(noise)(state, frozen, {})["drawn"].compute()) == 0.0
