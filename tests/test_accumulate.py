"""Microbatches: the update of the large batch, in the memory of a small one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtl
from jtl import data, errors, loop, strategies
from jtl.models.convolution import BatchNorm
from jtl.step import microbatches

from .cache.cases import Case
from .runs import resuming, victim
from .test_memory import small

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(12, 5)), RNG.integers(0, 3, 12).astype(np.int32)
WEIGHTS = np.array([1, 0.5, 2, 1, 0, 3, 1, 0.25, 1, 0, 0, 0])  # unequal, and filler rows at the end
MASK = jtl.select("head", "middle")


class Net(nn.Module):
    """Three layers; with `norm`, batch normalisation between them."""

    norm: bool = False

    @nn.compact
    def __call__(self, x, train: bool = False):
        dense = lambda width, name: nn.Dense(width, name=name, param_dtype=x.dtype)  # noqa: E731
        x = nn.tanh(dense(7, "middle")(nn.tanh(dense(6, "stem")(x))))
        x = BatchNorm(name="norm")(x, use_running_average=not train) if self.norm else x
        return dense(3, "head")(x)


METRICS = {"accuracy": jtl.metrics.accuracy, "balanced": jtl.metrics.balanced_accuracy}
TX = optax.chain(optax.clip_by_global_norm(0.3), optax.sgd(0.5, momentum=0.9))


def start(model, dtype=jnp.float32, mask=MASK):
    return jtl.init(model.init(jax.random.key(0), jnp.asarray(X, dtype)), TX, trainable=mask, key=jax.random.key(1))


def batch(dtype=jnp.float32, **entries):
    entries = {"x": X, "label": Y, "weight": WEIGHTS, **entries}
    whole = jnp.int64 if dtype == jnp.float64 else jnp.int32  # what argmax gives
    return {
        name: jnp.asarray(value, whole if name == "label" else dtype)
        for name, value in entries.items()
        if value is not None
    }


def run(loss_fn, state, frozen, batches, **options):
    step, seen = jax.jit(jtl.train_step(loss_fn, TX, grad_norm=True, **options)), []
    for one in batches:
        state, metrics = step(state, frozen, one)
        seen.append(metrics)
    return state, seen


def close(left, right, tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), left, right)


PLAIN, CLASSES = jtl.losses.cross_entropy, jtl.losses.weighted(jtl.losses.focal, [0.3, 2.0, 1.0])


@pytest.mark.parametrize(
    ("count", "loss", "entries"),
    [(2, PLAIN, {}), (12, PLAIN, {}), (3, PLAIN, {"weight": None}), (6, CLASSES, {}), (4, CLASSES, {"weight": None})],
)
def test_the_update_is_that_of_the_large_batch(count, loss, entries):
    loss_fn = jtl.supervised(Net(), loss, metrics=METRICS)
    for wide, dtype, tolerance in ((False, jnp.float32, 1e-6), (True, jnp.float64, 1e-12)):
        with jax.enable_x64(wide):
            state, frozen = start(Net(), dtype)
            batches = [batch(dtype, **entries), batch(dtype, x=X[::-1], **entries)]
            expected, whole = run(loss_fn, state, frozen, batches)
            found, parts = run(loss_fn, state, frozen, batches, accumulate=count)
            assert jax.tree.leaves(found.params)[0].dtype == dtype
            close((found.params, found.opt_state), (expected.params, expected.opt_state), tolerance)
            close(parts, whole, 10 * tolerance)
            assert int(found.step) == 2  # one update a batch


def by_hand(params, collections, batch, *, key):
    """A weighted mean that reports no mean, and is 0/0 for filler rows alone."""
    errors = jnp.square(batch["x"] @ params["w"] - batch["y"])
    loss = jnp.sum(errors * batch["weight"]) / jnp.sum(batch["weight"])
    return loss, jtl.Aux({"rmse": jnp.sum(errors * batch["weight"]) / jnp.sum(batch["weight"])}, {})


def test_without_a_reported_mean_the_entry_weight_counts():
    state, frozen = jtl.init({"params": {"w": jnp.ones(5)}}, TX, trainable={"w": True}, key=jax.random.key(0))
    # Microbatches have every sixth row, so that the fifth has rows of weight 0 alone.
    weights = np.where(np.arange(12) % 6 == 4, 0, np.maximum(WEIGHTS, 0.1))
    given = {name: jnp.asarray(v, jnp.float32) for name, v in {"x": X, "y": X[:, 0] * 3, "weight": weights}.items()}
    expected, (whole,) = run(by_hand, state, frozen, [given])
    found, (parts,) = run(by_hand, state, frozen, [given], accumulate=6)
    close(found.params, expected.params, 1e-6)
    close(parts, whole, 1e-5)


def test_statistics_move_once_for_each_microbatch_in_order():
    loss_fn = jtl.supervised(Net(norm=True), jtl.losses.cross_entropy)
    state, frozen = start(Net(norm=True), mask=jtl.everything())
    found, _ = run(loss_fn, state, frozen, [batch(weight=None)], accumulate=3)
    still = optax.set_to_zero()
    state, frozen = jtl.init(jtl.variables(state, frozen), still, trainable=jtl.everything(), key=jax.random.key(1))
    step = jax.jit(jtl.train_step(loss_fn, still))
    for i in range(3):
        state, _ = step(state, frozen, batch(x=X[i::3], label=Y[i::3], weight=None))
    close(found.collections, state.collections, 1e-6)


def test_every_microbatch_has_a_key_of_its_own():
    def noise(params, collections, batch, *, key):
        drawn = jax.random.normal(key)
        return jnp.sum(params["w"]) * drawn, jtl.Aux({"square": jnp.square(drawn)}, {})

    state, frozen = jtl.init({"params": {"w": jnp.ones(1)}}, TX, trainable={"w": True}, key=jax.random.key(0))
    _, (metrics,) = run(noise, state, frozen, [batch()], accumulate=4)
    assert abs(float(metrics["square"]) - float(metrics["loss"]) ** 2) > 1e-3  # the draws have a variance


def test_memory_falls_to_that_of_a_microbatch():
    class Tall(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(6):
                x = nn.tanh(nn.Dense(16, name=f"layer_{i}")(x))
            return nn.Dense(3, name="head")(x)

    loss_fn = jtl.supervised(Tall(), jtl.losses.cross_entropy)
    given = {"x": jnp.ones((4096, 16)), "label": jnp.zeros(4096, jnp.int32)}
    state, frozen = jtl.init(
        Tall().init(jax.random.key(0), given["x"]), TX, trainable=jtl.everything(), key=jax.random.key(1)
    )
    sizes = []
    for count in (1, 4, 16):
        compiled = jax.jit(jtl.train_step(loss_fn, TX, accumulate=count)).lower(state, frozen, given).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    # The split batch itself is a copy, of the size of one layer's outputs.
    copy = 4 * 4096 * 17
    assert sizes[1] < 0.4 * sizes[0] + copy
    assert sizes[2] < 0.2 * sizes[0] + copy
    assert sizes[0] > sizes[1] > sizes[2]


def test_the_suffix_of_a_split_loss_and_its_cache():
    case, count = Case(), 2
    run = case.run(epochs=2)
    *_, expected = jtl.fit(case.loss_fn, case.tx, case.state, case.frozen, run, cache="off")
    for cache in ("off", "require"):
        *_, found = jtl.fit(
            case.loss_fn, case.tx, case.state, case.frozen, run, cache=cache, accumulate=count, say=lambda line: None
        )
        assert found.step == len(run)
        close(found.state.params, expected.state.params, 1e-5)


def test_the_phases_of_a_strategy():
    strategy = strategies.lp_ft(optax.adam(1e-2), optax.sgd(1e-2, momentum=0.9), steps=4)
    loss_fn = jtl.supervised(Net(), jtl.losses.cross_entropy)
    variables = Net().init(jax.random.key(0), jnp.asarray(X, jnp.float32))
    state, frozen = jtl.init(variables, strategy, key=jax.random.key(1))
    batches = data.batches({"x": X.astype(np.float32)}, Y, batch_size=4, seed=0, epochs=3)
    ends = [list(jtl.fit(loss_fn, strategy, state, frozen, batches, cache="off", accumulate=n))[-1] for n in (1, 2)]
    assert ends[0].progress == ends[1].progress
    close(ends[1].state.params, ends[0].state.params, 1e-5)


def test_a_frozen_leaf_stays_frozen():
    loss_fn = jtl.supervised(Net(norm=True), jtl.losses.cross_entropy)
    state, frozen = start(Net(norm=True), mask=jtl.select("head"))
    step = jax.jit(jtl.train_step(loss_fn, TX, accumulate=3), donate_argnums=0)
    jtl.audit(step, state, frozen, batch(), loss_fn=loss_fn).require()


@pytest.mark.parametrize(
    ("given", "count", "message"),
    [
        ({}, 5, "a batch of 12 cannot be split into accumulate=5"),
        ({}, 24, "a batch of 12 cannot be split"),
        ({"temperature": np.float32(2)}, 3, r"do not share: .*'temperature': \(\)"),
        ({"table": np.zeros((3, 12))}, 3, r"do not share: .*'table': \(3, 12\)"),
        ({"x": X[:0], "label": Y[:0], "weight": WEIGHTS[:0]}, 3, "a batch of 0 cannot be split"),
    ],
)
def test_a_batch_that_cannot_be_split_is_refused(given, count, message):
    loss_fn = jtl.supervised(Net(), jtl.losses.cross_entropy, inputs=["x"])
    state, frozen = start(Net())
    with pytest.raises(errors.DataError, match=message):
        jax.jit(jtl.train_step(loss_fn, TX, accumulate=count)).lower(state, frozen, batch(**given))


def test_fit_refuses_a_run_that_cannot_be_split_before_any_work():
    def never(params, collections, batch, *, key):
        raise NotImplementedError

    state, frozen = start(Net())
    x = {"x": X.astype(np.float32)}
    with pytest.raises(errors.DataError, match="a batch of 8 cannot be split into accumulate=3"):
        next(jtl.fit(never, TX, state, frozen, data.batches(x, Y, batch_size=8), accumulate=3))
    with pytest.raises(errors.DataError, match="a batch of 4 cannot be split into accumulate=8"):
        next(jtl.fit(never, TX, state, frozen, data.batches(x, Y, batch_size=8, remainder="keep"), accumulate=8))
    with pytest.raises(errors.ConfigError, match="accumulate=0"):
        next(jtl.fit(jtl.supervised(Net(), jtl.losses.cross_entropy), TX, state, frozen, [batch()], accumulate=0))


def test_nested_batches_are_split_leaf_by_leaf():
    parts = microbatches({"a": (jnp.arange(6), jnp.ones((6, 2)))}, 3)
    assert parts["a"][0].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert parts["a"][1].shape == (3, 2, 2)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs several devices: JTL_TEST_DEVICES=8")
def test_devices_without_room_share_microbatches_that_they_can_split(monkeypatch):
    expected = victim.train(strategy="full", accumulate=4, mesh=resuming.mesh(2))
    monkeypatch.setattr(loop, "compiled_train", small(3))
    assert victim.train(strategy="full", mesh=resuming.mesh(2)) == expected
    monkeypatch.setattr(loop, "compiled_train", small(1))
    with pytest.raises(errors.OutOfMemoryError, match="2 of 8 examples on 2 devices"):
        victim.train(strategy="full", mesh=resuming.mesh(2))
