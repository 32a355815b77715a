"""Mixed precision: what is cast and what is not, and that the mask still decides."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtl
from jtl import errors, precision

from .cache.cases import Case

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(16, 12)).astype(np.float32), RNG.integers(0, 3, 16).astype(np.int32)
BATCH = {"x": jnp.asarray(X), "label": jnp.asarray(Y), "weight": jnp.linspace(0.1, 1.7, 16)}
TX = optax.adamw(1e-2)
HEAD = jtl.select("head")


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(12, name="dense")(x))
        return nn.Dropout(0.5, deterministic=not train, name="dropout")(nn.relu(x))


class Net(nn.Module):
    """Two layers with batch normalisation and dropout, and a head; `seen` are the dtypes of its values."""

    seen = ()

    @nn.compact
    def __call__(self, x, train: bool = False):
        for name in ("stem", "block"):
            x = Layer(name=name)(x, train)
        Net.seen += (x.dtype,)
        return nn.Dense(3, name="head")(x)


VARIABLES = Net().init(jax.random.key(0), X)
LOSS = jtl.supervised(Net(), jtl.losses.cross_entropy)
HALF = jtl.mixed_precision(LOSS)


def start(mask=HEAD, tx=TX):
    return jtl.init(VARIABLES, tx, trainable=mask, key=jax.random.key(1))


def dtypes(tree):
    return {leaf.dtype for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)}


def test_the_model_computes_in_bfloat16_and_is_trained_in_float32():
    state, frozen = start(jtl.everything())
    Net.seen = ()
    after, metrics = jax.jit(jtl.train_step(HALF, TX, grad_norm=True))(state, frozen, BATCH)
    assert set(Net.seen) == {jnp.dtype(jnp.bfloat16)}
    assert dtypes((after.params, after.opt_state, after.collections, metrics)) == {jnp.dtype(jnp.float32)}
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), after, state)
    # An update far below bfloat16's step of 2 ** -8 is kept by the float32 copy.
    tiny = optax.sgd(1e-6)
    state, frozen = start(HEAD, tiny)
    after, _ = jax.jit(jtl.train_step(HALF, tiny))(state, frozen, BATCH)
    moved = np.asarray(after.params["head"]["kernel"] - state.params["head"]["kernel"])
    assert 0 < np.abs(moved).max() < 1e-5


def test_loss_and_gradient_are_those_of_float32_within_the_rounding_of_bfloat16():
    def value(loss_fn):
        state, frozen = start(HEAD, optax.sgd(1.0))
        after, metrics = jax.jit(jtl.train_step(loss_fn, optax.sgd(1.0)))(state, frozen, BATCH)
        gradient = jax.tree.map(lambda a, b: a - b, state.params, after.params)
        return float(metrics["loss"]), np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])

    (loss, gradient), (close, near) = value(LOSS), value(HALF)
    assert abs(loss - close) < 2**-6 * loss  # some roundings of 2 ** -9 each
    assert np.linalg.norm(gradient - near) < 2**-5 * np.linalg.norm(gradient)
    assert loss != close


def test_weights_targets_and_statistics_are_not_cast():
    seen = {}

    def loss_fn(params, collections, batch, *, key):
        seen.update(params=params["w"].dtype, stats=collections["stats"]["w"]["mean"].dtype)
        seen.update({name: value.dtype for name, value in batch.items()})
        collections = {"stats": {"w": {"mean": collections["stats"]["w"]["mean"].astype(jnp.bfloat16)}}}
        return jnp.sum(params["w"] * batch["x"][0]), jtl.Aux({}, collections)

    variables = {"params": {"w": jnp.ones(12)}, "stats": {"w": {"mean": jnp.zeros(1)}}}
    state, frozen = jtl.init(variables, TX, trainable={"w": True}, key=jax.random.key(0))
    given = {**BATCH, "label": jnp.ones(16), "ids": jnp.arange(16)}
    after, metrics = jax.jit(jtl.train_step(jtl.mixed_precision(loss_fn), TX))(state, frozen, given)
    names = {name: dtype.name for name, dtype in seen.items()}
    assert names.pop("ids") == "int32"
    assert names == {"params": "bfloat16", "stats": "float32", "x": "bfloat16", "label": "float32", "weight": "float32"}
    assert metrics["loss"].dtype == after.collections["stats"]["w"]["mean"].dtype == jnp.float32
    seen.clear()
    regression = jtl.supervised(
        jtl.from_function(lambda params, x: x @ params["w"]), jtl.losses.squared_error, target="y"
    )
    half = jtl.mixed_precision(regression)
    # The targets have more digits than bfloat16: rounded, they would be 256.
    batch = {"x": jnp.zeros((2, 12)), "y": jnp.array([256.75, 256.75])}
    assert float(half({"w": jnp.ones(12)}, {}, batch, key=None)[0]) == pytest.approx(256.75**2, rel=1e-6)


def test_a_frozen_half_stored_in_bfloat16_is_half_as_large_and_is_not_cast_again():
    state, frozen = start()
    stored = precision.half(frozen)
    assert jtl.tree.nbytes(stored.params) * 2 == jtl.tree.nbytes(frozen.params)
    assert stored.collections is frozen.collections
    assert dtypes(stored.params) == {jnp.dtype(jnp.bfloat16)}
    step = jtl.train_step(HALF, TX)
    one, other = (jax.jit(step)(state, given, BATCH) for given in (frozen, stored))
    assert jtl.tree.digest(one) == jtl.tree.digest(other)
    assert casts_of(step, state, frozen) == len(jtl.tree.paths(frozen.params))
    assert casts_of(step, state, stored) == 0


def casts_of(step, state, frozen):
    """How many of the frozen leaves are cast as they come in."""
    closed = jax.make_jaxpr(lambda params: step(state, frozen._replace(params=params), BATCH))(frozen.params)
    given = set(closed.jaxpr.invars)
    return sum(eqn.primitive.name == "convert_element_type" and eqn.invars[0] in given for eqn in closed.jaxpr.eqns)


def subtree(params, collections, batch, *, key):
    """A loss that applies a model to a part of params, where no path lines up."""
    inner = {name: value["net"] for name, value in collections.items()}
    loss, aux = LOSS(params["net"], inner, batch, key=key)
    return loss, aux._replace(collections={name: {"net": value} for name, value in aux.collections.items()})


@pytest.mark.parametrize("mask", ["head", "block"])
@pytest.mark.parametrize("nested", [False, True])
def test_frozen_modules_stay_frozen(mask, nested):
    variables = {name: {"net": tree} for name, tree in VARIABLES.items()} if nested else VARIABLES
    trainable = jtl.select(*(f"net/{name}" if nested else name for name in (mask, "head")))
    loss_fn = jtl.mixed_precision(subtree if nested else LOSS)
    state, frozen = jtl.init(variables, TX, trainable=trainable, key=jax.random.key(1))
    step = jax.jit(jtl.train_step(loss_fn, TX))
    report = jtl.audit(step, state, precision.half(frozen), BATCH, loss_fn=loss_fn).require()
    found = {module.path: module.mode for module in report.modules}
    trains = {"stem": False, "block": mask == "block"}
    for name, trained in trains.items():
        assert found[f"{name}/norm"] == ("batch statistics" if trained else "running statistics")
        assert found[f"{name}/dropout"] == ("dropout on" if trained else "dropout off")
    after, metrics = step(state, frozen, BATCH)
    assert len(jax.tree.leaves(after.collections)) == 2 * trains["block"]
    _, again = step(state._replace(key=jax.random.key(7)), frozen, BATCH)
    assert (metrics["loss"] == again["loss"]) == (mask == "head")  # nothing else is random


def test_batches_are_checked_and_cached_as_before():
    case = Case()
    loss_fn = jtl.mixed_precision(case.loss_fn)
    frozen = precision.half(case.frozen)
    with pytest.raises(errors.DataError, match="label 7"):
        next(jtl.fit(loss_fn, case.tx, case.state, frozen, [{"x": case.x[:4], "label": np.full(4, 7)}]))
    runs = [
        list(jtl.fit(loss_fn, case.tx, case.state, frozen, case.run(), cache=mode, say=lambda line: None))
        for mode in ("off", "require")
    ]
    for plain, cached in zip(*runs, strict=True):
        np.testing.assert_allclose(plain.metrics["loss"], cached.metrics["loss"], rtol=2e-2)
    prepared = jtl.cache.prepare(loss_fn, case.state, frozen, case.run(), mode="require")
    stored = next(iter(prepared.batches))
    assert {value.dtype.name for name, value in stored.items() if name.startswith("cut/")} == {"bfloat16"}


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.int8, jnp.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(errors.ConfigError, match="expected bfloat16"):
        jtl.mixed_precision(LOSS, dtype)
