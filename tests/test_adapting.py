"""Soups, mixout and the choice of layers, against their definitions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtl
from jtl import errors, mixout, soups, strategies, surgery

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(16, 4)).astype(np.float32), RNG.integers(0, 3, 16).astype(np.int32)
BATCH = {"x": X, "label": Y}
GROUPS = [("stem",), ("block",), ("head",)]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name in ("stem", "block"):
            x = nn.tanh(nn.Dense(4, name=name)(x))
        return nn.Dense(3, name="head")(x)


LOSS = jtl.supervised(Net(), jtl.losses.cross_entropy)
VARIABLES = Net().init(jax.random.key(0), X[:1])


def moved(by):
    return {"params": jax.tree.map(lambda x: x + by, VARIABLES["params"])}


def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), a, b)


# Soups


def test_interpolation_is_the_line_between_two_models():
    same(soups.interpolate(VARIABLES, moved(2.0), 0.25), moved(0.5))
    same(soups.interpolate(VARIABLES, moved(2.0), 0.0), VARIABLES)
    shared = {"params": VARIABLES["params"], "counts": {"n": jnp.int32(3)}}
    found = soups.interpolate(shared, {**shared, "params": moved(1.0)["params"]}, 0.5)
    assert found["counts"]["n"] is shared["counts"]["n"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"params": {"head": jnp.ones(3)}}, "members 0 and 1 differ"),
        ({**VARIABLES, "counts": {"n": jnp.int32(4)}}, "members 0 and 1 differ"),
    ],
)
def test_other_trees_are_refused(other, message):
    with pytest.raises(errors.ConfigError, match=message):
        soups.interpolate(VARIABLES, other, 0.5)
    with pytest.raises(errors.ConfigError, match="has no mean"):
        soups.uniform_soup([{"params": {"n": jnp.int32(i)}} for i in (1, 2)])
    with pytest.raises(errors.ConfigError, match="at least one member"):
        soups.uniform_soup([])


def test_low_precision_is_averaged_in_float32():
    members = [{"params": {"w": jnp.full(3, value, jnp.bfloat16)}} for value in (1.0, 1.0078125, 1.015625)]
    found = soups.uniform_soup(members)["params"]["w"]
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(found, np.float32), 1.0078125)


def test_the_greedy_soup_leaves_out_what_makes_it_worse():
    target = moved(1.0)["params"]["head"]["bias"]

    def score(variables):
        return -float(jnp.sum((variables["params"]["head"]["bias"] - target) ** 2))

    soup = soups.greedy_soup([moved(by) for by in (5.0, 1.4, 0.8)], score)
    assert soup.chosen == (2, 1)  # 0.8, then the mean with 1.4 is 1.1; with 5 it would be 2.4
    same(soup.variables, moved(1.1))
    assert soup.score == pytest.approx(score(moved(1.1)), abs=1e-5)


# Mixout


def mixed(rate, seed, params):
    """What mixout calls the inner loss with."""
    seen = []

    def inner(params, collections, batch, *, key):
        seen.append((params, collections))
        return jnp.zeros(()), jtl.Aux({}, collections)

    start = mixout.with_start(VARIABLES, ~jtl.select("head"))
    collections = {mixout.START: start[mixout.START]}
    _, aux = mixout.mixout(inner, rate)(params, collections, {}, key=None if seed is None else jax.random.key(seed))
    assert mixout.START not in seen[0][1]
    assert seed is None or mixout.START in aux.collections
    return seen[0][0]


def test_mixout_goes_back_to_the_start_and_keeps_the_mean():
    params, start = moved(1.0)["params"], VARIABLES["params"]
    samples = [mixed(0.25, seed, params) for seed in range(400)]
    kernels = np.stack([np.asarray(sample["stem"]["kernel"]) - start["stem"]["kernel"] for sample in samples])
    share = np.isclose(kernels, 0, atol=1e-6)
    np.testing.assert_allclose(kernels[~share], 4 / 3, rtol=1e-5)
    assert abs(share.mean() - 0.25) < 0.02
    assert np.abs(kernels.mean(axis=0) - 1).max() < 0.15
    assert samples[0]["head"]["kernel"] is params["head"]["kernel"]


def test_mixout_leaves_alone_evaluation_and_what_has_not_moved():
    same(mixed(0.9, None, moved(1.0)["params"]), moved(1.0)["params"])
    same(mixed(0.9, 3, VARIABLES["params"]), VARIABLES["params"])


def test_mixout_trains_and_keeps_its_start():
    loss_fn, mask = mixout.mixout(LOSS, 0.5), ~jtl.select("stem")
    variables = mixout.with_start(VARIABLES, jtl.select("block"))
    strategy = strategies.fine_tune(optax.adam(1e-2), mask)
    state, frozen = jtl.init(variables, strategy, key=jax.random.key(0))
    *_, report = jtl.fit(loss_fn, strategy, state, frozen, [BATCH] * 5, held_out=lambda: [BATCH])
    whole = jtl.variables(report.state, report.frozen)
    jax.tree.map(np.testing.assert_array_equal, whole[mixout.START]["block"], VARIABLES["params"]["block"])
    plain = jtl.evaluate(jax.jit(jtl.eval_step(LOSS)), report.state, report.frozen, [BATCH])
    assert report.evaluation == plain


def test_mixout_refuses_what_it_cannot_do():
    with pytest.raises(errors.ConfigError, match=r"rate=1\.0"):
        mixout.mixout(LOSS, 1.0)
    strategy = strategies.full(optax.sgd(0.1))
    state, frozen = jtl.init(VARIABLES, strategy, key=jax.random.key(0))
    with pytest.raises(errors.ConfigError, match="with_start"):
        next(jtl.fit(mixout.mixout(LOSS, 0.5), strategy, state, frozen, [BATCH]))


# The choice of layers


def test_gradient_norms_are_relative_and_averaged_over_batches():
    halves = [{name: jnp.asarray(value[part]) for name, value in BATCH.items()} for part in (slice(8), slice(8, 16))]
    found = surgery.gradient_norms(LOSS, VARIABLES, halves, GROUPS, key=jax.random.key(0))

    def norm(tree):
        return float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree))))

    for number, (name,) in enumerate(GROUPS):
        values = []
        for half in halves:
            grads = jax.grad(lambda p, half=half: LOSS(p, {}, half, key=None)[0])(VARIABLES["params"])
            values.append(norm(grads[name]) / norm(VARIABLES["params"][name]))
        assert found[number] == pytest.approx(np.mean(values), rel=1e-5)


def test_the_layers_under_a_shift_of_the_inputs_are_chosen():
    """A trained net whose inputs are negated asks for another first layer, as in the paper's claim."""
    tx = optax.adam(3e-2)
    state, frozen = jtl.init(VARIABLES, strategies.full(tx), key=jax.random.key(0))
    labels = (X[:, 0] > 0).astype(np.int32) + (X[:, 1] > 0)
    *_, report = jtl.fit(LOSS, tx, state, frozen, [{"x": X, "label": labels}] * 300)
    trained = jtl.variables(report.state, report.frozen)
    norms = surgery.gradient_norms(LOSS, trained, [{"x": -X, "label": labels}], GROUPS, key=jax.random.key(0))
    strategy = strategies.surgical(tx, GROUPS[:2], norms[:2], 1)
    assert jtl.tree.paths(jtl.init(trained, strategy, key=jax.random.key(0))[0].params)[-1] == "stem/kernel"


def test_impossible_choices_are_refused():
    with pytest.raises(errors.DataError, match="no batch"):
        surgery.gradient_norms(LOSS, VARIABLES, [], GROUPS, key=jax.random.key(0))
    with pytest.raises(errors.PatternError, match="stme"):
        surgery.gradient_norms(LOSS, VARIABLES, [BATCH], [("stme",)], key=jax.random.key(0))
    for norms, count in (([1.0], 1), ([1.0, 2.0, 3.0], 4), ([1.0, 2.0, 3.0], 0)):
        with pytest.raises(errors.ConfigError, match="surgical chooses 1 to 3"):
            strategies.surgical(optax.sgd(0.1), GROUPS, norms, count)
    for make, message in (
        (lambda: strategies.first_blocks(optax.sgd(0.1), GROUPS, 3), "first_blocks trains 1 to 2"),
        (lambda: strategies.last_blocks(optax.sgd(0.1), GROUPS, 2), "last_blocks trains 1 to 1"),
        (lambda: strategies.gradual_unfreezing(optax.sgd(0.1), GROUPS, every=1, count=4), "trains 1 to 3 groups"),
        (lambda: strategies.layerwise_decay(optax.sgd(0.1), GROUPS, decay=0.0), r"decay=0\.0"),
    ):
        with pytest.raises(errors.ConfigError, match=message):
            make()
