"""Transforms against hand-computed values and against PyTorch's optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtl
from jtl import errors, transforms
from jtl.state import standard_promotion

PARAMS = {"head": {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([0.5])}, "stem": {"kernel": jnp.array([3.0])}}
GRADS = jax.tree.map(lambda x: 0.1 * x + 0.2, PARAMS)


@pytest.fixture(autouse=True)
def _promotion():
    with standard_promotion():  # as jtl's steps call transforms: optax's own need it
        yield


def steps(tx, params, count, grads=lambda i, params: GRADS):
    state = tx.init(params)
    for i in range(count):
        updates, state = tx.update(grads(i, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def same(a, b, rtol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol), a, b)


# Learning rates that differ


@pytest.mark.parametrize("make", [lambda r: optax.adamw(r, weight_decay=0.1), lambda r: optax.sgd(r, momentum=0.9)])
def test_a_factor_is_a_factor_of_the_learning_rate(make):
    scaled, _ = steps(optax.chain(make(0.1), transforms.scale_by_rules([("stem", 0.3), ("**", 1.0)])), PARAMS, 5)
    labels = jtl.label(PARAMS, [("stem", "low"), ("**", "high")])
    expected, _ = steps(optax.partition({"low": make(0.03), "high": make(0.1)}, labels), PARAMS, 5)
    same(scaled, expected)


@pytest.mark.parametrize("factor", [-0.1, float("nan"), float("inf"), "half"])
def test_a_factor_is_a_number_that_is_not_negative(factor):
    with pytest.raises(errors.ConfigError, match="the factor of 'head'"):
        transforms.scale_by_rules([("head", factor)])


def test_a_rule_that_matches_nothing_is_refused():
    tx = transforms.scale_by_rules([("haed", 1.0), ("**", 0.1)])
    with pytest.raises(errors.PatternError, match="haed"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)


def test_patterns_may_name_frozen_leaves():
    tx = transforms.scale_by_rules([("stem", 0.5), ("head", 2.0)])
    half = {**GRADS, "stem": {"kernel": None}}
    updates, _ = tx.update(half, tx.init(half), half)
    same(updates["head"], jax.tree.map(lambda g: 2 * g, GRADS["head"]))


# Pulling to the start


def test_pull_is_the_gradient_of_the_l2_sp_penalty():
    start = jax.tree.map(lambda x: x + 0.3, PARAMS)
    tx = transforms.pull_to_start(0.2, new=jtl.select("head"), new_rate=0.05)
    state = tx.init(start)

    def penalty(params):
        near = sum(
            jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (params["stem"], start["stem"])), strict=True)
        )
        return 0.2 / 2 * near + 0.05 / 2 * sum(jnp.sum(a**2) for a in jax.tree.leaves(params["head"]))

    updates, _ = tx.update(GRADS, state, PARAMS)
    same(updates, jax.tree.map(jnp.add, GRADS, jax.grad(penalty)(PARAMS)))
    assert jtl.tree.paths(state.start) == ["stem/kernel"]


def test_decoupled_decay_goes_to_the_pretrained_point():
    with pytest.raises(errors.ConfigError, match="needs the params"):
        transforms.pull_to_start(0.1).update(GRADS, transforms.pull_to_start(0.1).init(PARAMS))
    tx = optax.chain(optax.set_to_zero(), transforms.pull_to_start(1.0), optax.scale(-0.5))
    state = tx.init(PARAMS)
    moved = jax.tree.map(lambda x: x + 1.0, PARAMS)
    updates, _ = tx.update(GRADS, state, moved)
    same(optax.apply_updates(moved, updates), jax.tree.map(lambda x: x + 0.5, PARAMS))
    with pytest.raises(errors.ConfigError, match="rates -1"):
        transforms.pull_to_start(-1.0)


# Averages


def states(tx, count):
    variables = {"params": PARAMS}
    state, _ = jtl.init(variables, tx, trainable=jtl.select("head"), key=jax.random.key(0))
    params, opt_state, seen = state.params, state.opt_state, []
    for i in range(count):
        grads = jax.tree.map(lambda x, i=i: jnp.sin(x + i), params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return state._replace(params=params, opt_state=opt_state), seen


def test_the_stochastic_average_is_the_mean_of_what_was_chosen():
    state, seen = states(transforms.stochastic_average(optax.sgd(0.1), start=3, every=2), 8)
    expected = jax.tree.map(lambda *x: np.mean(x, axis=0), seen[2], seen[4], seen[6])
    same(transforms.averaged(state).params, expected)
    assert jtl.tree.paths(transforms.averaged(state).params) == ["head/bias", "head/kernel"]


def test_the_exponential_average_follows_its_recursion():
    state, seen = states(optax.chain(optax.clip(1.0), transforms.exponential_average(optax.sgd(0.1), 0.6)), 30)
    average = None
    for n, params in enumerate(seen):
        keep = min(0.6, n / (n + 9))
        average = jax.tree.map(
            lambda a, b, keep=keep: keep * a + (1 - keep) * b, params if average is None else average, params
        )
    same(transforms.averaged(state).params, average, rtol=1e-5)


def test_a_state_without_average_is_refused():
    state, _ = states(optax.sgd(0.1), 1)
    with pytest.raises(errors.ConfigError, match="holds 0 averages"):
        transforms.averaged(state)
    with pytest.raises(errors.ConfigError, match=r"decay=1\.0"):
        transforms.exponential_average(optax.sgd(0.1), 1.0)
    with pytest.raises(errors.ConfigError, match="every=0"):
        transforms.stochastic_average(optax.sgd(0.1), start=1, every=0)


# Leaves that join


def noisy(i, params):
    return jax.tree.map(lambda x: jnp.cos(x * (i + 1)), params)


def joined_run(tx, join, count):
    """The head alone for `join` steps, then both."""
    masks = [jtl.select("head"), jtl.everything()]
    early, late = transforms.joining(tx, masks[:1]), transforms.joining(tx, masks)
    state, frozen = jtl.init({"params": PARAMS}, early, trainable=masks[0], key=jax.random.key(0))
    params = PARAMS
    for i in range(count):
        if i == join:
            state, frozen = jtl.change(state, frozen, jtl.Phase(masks[1], late))
        now = early if i < join else late
        grads = jtl.partition(noisy(i, params), masks[0] if i < join else masks[1])[0]
        updates, opt_state = now.update(grads, state.opt_state, state.params)
        state = state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)
        params = jtl.variables(state, frozen)["params"]
    return params


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "tx", "settings"),
    [
        ("AdamW", optax.adamw(0.01, weight_decay=0.1), {"weight_decay": 0.1}),
        ("Adam", optax.adam(0.01), {}),
        ("SGD", optax.sgd(0.01, momentum=0.9), {"momentum": 0.9}),
    ],
)
def test_a_leaf_that_joins_is_treated_as_by_pytorch(name, tx, settings):
    import torch

    found = joined_run(tx, 4, 9)
    tensors = {
        path: torch.nn.Parameter(torch.tensor(np.asarray(leaf))) for path, leaf in jtl.tree.leaves_with_paths(PARAMS)
    }
    early = [tensors["head/kernel"], tensors["head/bias"]]
    optimizer = getattr(torch.optim, name)(early, lr=0.01, **settings)
    for i in range(9):
        if i == 4:
            optimizer.add_param_group({"params": [tensors["stem/kernel"]]})
        for tensor in tensors.values():
            tensor.grad = torch.cos(tensor.detach() * (i + 1))
        optimizer.step()
    for path, leaf in jtl.tree.leaves_with_paths(found):
        np.testing.assert_allclose(leaf, tensors[path].detach().numpy(), rtol=2e-5)


def test_the_norm_of_a_clip_is_over_all_groups_and_the_schedule_is_common():
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(schedule))
    found, expected = joined_run(tx, 4, 8), PARAMS
    for i in range(8):
        grads = noisy(i, expected)
        chosen = grads if i >= 4 else {"head": grads["head"]}
        norm = max(1.0, float(optax.tree.norm(chosen)) / 0.5)
        moved = jax.tree.map(lambda p, g, n=norm, i=i: p - schedule(i) * g / n, expected, grads)
        expected = moved if i >= 4 else {**expected, "head": moved["head"]}
    same(found, expected, rtol=1e-5)


def test_joining_needs_a_mask_for_each_leaf():
    with pytest.raises(errors.ConfigError, match="at least one mask"):
        transforms.joining(optax.sgd(0.1), [])
    with pytest.raises(errors.ConfigError, match="none of the 1 masks has the leaves"):
        transforms.joining(optax.sgd(0.1), [jtl.select("head")]).init(PARAMS)
