"""Laws of the guard: what is finite passes unchanged, what is not leaves no trace but a count."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import jtl
from jtl import errors, schedule, strategies, transforms
from jtl.models.convolution import BatchNorm
from jtl.state import standard_promotion
from jtl.transforms import guard

PARAMS = {"w": jnp.array([1.0, -0.0, -2.0]), "b": jnp.array(0.5)}
GRADS = {"w": jnp.array([0.1, 0.2, -0.3]), "b": jnp.array(0.4)}
LOSS = jnp.array(1.0)
ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))


def bits(tree):
    """Every leaf's dtype, shape and bytes: NaN equals NaN, and 0.0 is not -0.0."""
    plain = lambda leaf: (  # noqa: E731
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    )
    return [
        (path, str(leaf.dtype), leaf.shape, leaf.tobytes())
        for path, leaf in ((path, np.asarray(plain(leaf))) for path, leaf in jtl.tree.leaves_with_paths(tree))
    ]


def applied(tx, jit=jax.jit):
    """`(params, state, grads, loss)` to the params and the state after an update, compiled."""

    @jit
    def run(params, state, grads, loss):
        with standard_promotion():
            updates, state = optax.with_extra_args_support(tx).update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    return run


def one_by_one(function):
    """Not compiled as a whole: each operation rounds.

    In one program the guard's select stands between a product and a sum that LLVM would contract to one rounding
    without it, so the last bit can differ.
    """
    return function


def start(tx, params=PARAMS):
    with standard_promotion():
        return params, tx.init(params)


def poisoned(leaf, value):
    return {**GRADS, leaf: jnp.full_like(GRADS[leaf], 0.1).at[...].set(value)}


# What is finite


CHAINS = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw, clipped": lambda: optax.chain(optax.clip_by_global_norm(0.3), optax.adamw(0.1)),
    "a schedule": lambda: optax.adam(optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, 9)),
    "joining": lambda: transforms.joining(optax.adam(0.1), [jtl.select("w"), jtl.select("b")]),
    "an average": lambda: transforms.exponential_average(optax.adam(0.1)),
    "takes the loss": lambda: optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau(patience=1, cooldown=0)),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1)),
    "amsgrad": lambda: optax.amsgrad(0.1),
    "parts": lambda: optax.partition({"x": optax.adam(0.1), "y": optax.sgd(0.1)}, {"w": "x", "b": "y"}),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("spike", [None, 6.0])
def test_finite_updates_are_those_of_the_chain_alone_bit_for_bit(name, spike):
    plain, guarded = CHAINS[name](), guard(CHAINS[name](), spike=spike)
    one, two = start(plain), start(guarded)
    run, run_guarded = applied(plain, one_by_one), applied(guarded, one_by_one)
    for i in range(4):
        grads = jax.tree.map(lambda g, i=i: g * (1 + i), GRADS)
        one, two = run(*one, grads, LOSS / (1 + i)), run_guarded(*two, grads, LOSS / (1 + i))
        assert bits(two[0]) == bits(one[0])
        assert bits(two[1].inner) == bits(one[1])
    assert (int(two[1].skipped), int(two[1].in_a_row), bool(two[1].ok)) == (0, 0, True)


@pytest.mark.parametrize("name", CHAINS)
def test_a_skipped_update_leaves_no_trace_but_its_count(name):
    tx = guard(CHAINS[name]())
    run = applied(tx)
    params, state = run(*start(tx), GRADS, LOSS)
    after, skipped = run(params, state, poisoned("b", jnp.nan), LOSS)
    assert bits(after) == bits(params)
    assert bits(skipped.inner) == bits(state.inner)
    assert (int(skipped.skipped), int(skipped.in_a_row), bool(skipped.ok)) == (1, 1, False)
    # and the run goes on as if it had never been
    assert bits(run(after, skipped, GRADS, LOSS)[0]) == bits(run(params, state, GRADS, LOSS)[0])


@pytest.mark.parametrize(
    ("grads", "loss"),
    [
        (GRADS, jnp.nan),
        (GRADS, jnp.inf),
        (GRADS, -jnp.inf),
        (poisoned("w", jnp.nan), 1.0),
        (poisoned("b", jnp.inf), 1.0),
        (poisoned("w", -jnp.inf), 1.0),
    ],
)
@pytest.mark.parametrize("make", [optax.sgd, optax.adam, optax.sign_sgd, lambda r: optax.set_to_zero()])
def test_a_loss_or_a_gradient_that_is_not_finite(make, grads, loss):
    tx = guard(make(0.1))
    params, state = applied(tx)(*start(tx), grads, jnp.array(loss))
    assert bits(params) == bits(PARAMS)
    assert int(state.skipped) == 1


def test_without_a_loss_the_gradients_tell():
    tx = guard(optax.sgd(0.1))
    for grads, skipped in ((GRADS, 0), (poisoned("b", jnp.nan), 1)):
        assert int(tx.update(grads, tx.init(PARAMS), PARAMS)[1].skipped) == skipped


def test_squares_that_overflow_in_the_state_alone():
    """Adam divides by the root of infinity: the update is a finite zero, and the moment is lost for ever."""
    huge = poisoned("b", 1e30)
    bare = optax.adam(0.1)
    params, state = applied(bare)(*start(bare), huge, LOSS)
    assert np.isfinite(params["b"])
    assert np.isinf(state[0].nu["b"])
    tx = guard(bare)
    params, state = applied(tx)(*start(tx), huge, LOSS)
    assert bits(params) == bits(PARAMS)
    assert bits(state.inner) == bits(start(bare)[1])
    assert int(state.skipped) == 1


def test_a_leaf_that_overflows_by_a_finite_update():
    tx = guard(optax.sgd(1.0))
    params = {"w": jnp.array([3e38, 1.0])}
    after, state = applied(tx)(*start(tx, params), {"w": jnp.array([-3e38, 0.1])}, LOSS)
    assert bits(after) == bits(params)
    assert int(state.skipped) == 1


def test_huge_gradients_that_a_clip_tames_are_taken():
    # The square of the norm would overflow in float32; no norm is asked for here.
    tx = guard(optax.chain(optax.clip(1.0), optax.adam(0.1)))
    params, state = applied(tx)(*start(tx), poisoned("w", 1e38), LOSS)
    assert int(state.skipped) == 0
    assert bits(params) != bits(PARAMS)


def test_infinities_that_a_state_starts_with_are_no_reason():
    tx = guard(optax.contrib.reduce_on_plateau())
    _, state = start(tx)
    assert any(np.isinf(leaf).any() for leaf in jax.tree.leaves(state.inner))  # the best loss so far
    assert int(applied(tx)(*start(tx), GRADS, LOSS)[1].skipped) == 0


def test_none_is_ever_taken_however_many_are_skipped():
    limited, tx = optax.apply_if_finite(optax.sgd(0.1), 3), guard(optax.sgd(0.1), spike=2.0, window=2)
    theirs, ours = start(limited), start(tx)
    run, run_guarded = applied(limited), applied(tx)
    for i in range(40):
        theirs = run(*theirs, poisoned("w", jnp.nan), LOSS)
        ours = run_guarded(*ours, poisoned("w", jnp.nan), LOSS)
        assert (int(ours[1].skipped), int(ours[1].in_a_row)) == (i + 1, i + 1)
    assert np.isnan(theirs[0]["w"]).all()  # what the guard is there to prevent
    assert bits(ours[0]) == bits(PARAMS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "complex64", "complex128"])
def test_every_dtype(dtype):
    with jax.enable_x64(dtype in ("float64", "complex128")):
        params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), dtype), PARAMS)
        grads = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), dtype), GRADS)
        bad = {**grads, "b": grads["b"] * jnp.array(np.nan, dtype)}
        plain, tx = optax.adam(0.1), guard(optax.adam(0.1), spike=3.0, window=2)
        run, bare = applied(tx, one_by_one), applied(plain, one_by_one)
        loss = jnp.ones((), jnp.finfo(dtype).dtype)  # the real type
        once, expected = run(*start(tx, params), grads, loss), bare(*start(plain, params), grads, loss)
        assert bits(once[0]) == bits(expected[0])
        assert bits(once[1].inner) == bits(expected[1])
        twice = run(*once, bad, loss)
        assert bits(twice[0]) == bits(once[0])
        assert bits(twice[1].inner) == bits(once[1].inner)
        assert int(twice[1].skipped) == 1
        assert twice[1].skipped.dtype == twice[1].in_a_row.dtype == jnp.int32


PATTERNS = st.lists(st.sampled_from(["fine", "nan", "inf", "loss", "huge"]), min_size=1, max_size=25)


@functools.cache
def _compiled():
    tx = guard(optax.chain(optax.clip(1e20), optax.adam(0.1)))
    return tx, applied(tx)


@settings(max_examples=60, deadline=None)
@given(PATTERNS, st.integers(0, 2**31))
@example(["nan"] * 25, 0)
@example(["fine", "huge", "fine"], 0)
def test_any_pattern_of_bad_batches_is_the_run_without_them(pattern, seed):
    tx, run = _compiled()
    rng = np.random.default_rng(seed)
    clean, found, in_a_row = start(tx), start(tx), 0
    for kind in pattern:
        grads = jax.tree.map(lambda g: jnp.asarray(rng.normal(size=g.shape), g.dtype), PARAMS)
        loss = jnp.array(np.inf if kind == "loss" else 1.0, jnp.float32)
        value = {"nan": jnp.nan, "inf": -jnp.inf, "huge": 1e30}.get(kind)
        bad = grads if value is None else {**grads, "w": grads["w"].at[1].set(value)}
        found = run(*found, bad, loss)
        if kind == "fine":
            clean = run(*clean, grads, loss)
        in_a_row = 0 if kind == "fine" else in_a_row + 1
        assert int(found[1].in_a_row) == in_a_row
    assert bits(found[0]) == bits(clean[0])
    assert bits(found[1].inner) == bits(clean[1].inner)
    assert (int(found[1].skipped), int(clean[1].skipped)) == (sum(kind != "fine" for kind in pattern), 0)


# Spikes


def losses(tx, values):
    """Which updates are taken, by the losses, and the last state."""
    run, (params, state), taken = applied(tx), start(tx), []
    for value in values:
        params, state = run(params, state, GRADS, jnp.asarray(value))
        taken.append(bool(state.ok))
    return taken, state


def test_a_spike_is_judged_by_the_losses_of_the_last_updates_taken():
    rng = np.random.default_rng(0)
    values = (1 + 0.1 * rng.normal(size=200)).astype(np.float32)
    values[[60, 61, 130]] = [1.8, 5.0, 1e30]
    values[131] = 0.1  # a fall is no spike
    expected, kept = [], []
    for value in values:
        recent = np.array(kept[-20:], np.float64)
        high = len(recent) == 20 and value > recent.mean() + 4 * recent.std()
        expected.append(not high)
        kept += [] if high else [value]
    taken, state = losses(guard(optax.sgd(0.1), spike=4.0, window=20), values)
    assert taken == expected
    assert [i for i, one in enumerate(taken) if not one][:2] == [60, 61]
    assert not taken[130]
    assert taken[131]
    np.testing.assert_array_equal(state.recent.losses, np.array(kept[-20:], np.float32))


def test_nothing_is_a_spike_before_the_window_is_full():
    taken, _ = losses(guard(optax.sgd(0.1), spike=2.0, window=5), [1.0, 1e6, 1.0, np.nan, 1e9, 1.0, 1e12])
    assert taken == [True, True, True, False, True, True, False]


def test_equal_losses_have_no_spread_and_rounding_makes_none():
    taken, _ = losses(guard(optax.sgd(0.1), spike=0.01, window=7), [0.1] * 30 + [0.2, 0.1])
    assert taken == [True] * 30 + [False, True]


def test_a_level_that_stays_is_no_spike():
    """A window of refused losses in a row starts the window anew, or a run would wait for ever."""
    values = [1.0, 1.1, 0.9, 1.0] + [9.0] * 3 + [1.0] + [9.0, np.nan, 9.0, 9.0, 9.0] + [9.0, 9.1, 8.9, 9.0, 1e3]
    taken, _ = losses(guard(optax.sgd(0.1), spike=6.0, window=4), values)
    assert taken == [True] * 4 + [False] * 3 + [True] + [False] * 5 + [True] * 4 + [False]


def test_losses_near_the_end_of_float32_have_a_spread():
    taken, _ = losses(guard(optax.sgd(0.1), spike=3.0, window=4), [1e30, 1.1e30, 0.9e30, 1e30, 3e30, 1e30])
    assert taken == [True] * 4 + [False, True]


def test_a_resumed_run_skips_as_the_uninterrupted_one():
    tx = guard(optax.adam(0.1), spike=3.0, window=4)
    run, values = applied(tx), [1.0, 1.2, 0.9, 1.0, 9.0, 1.1, 7.0, 0.8]
    whole = start(tx)
    for value in values:
        whole = run(*whole, GRADS, jnp.array(value))
    part = start(tx)
    for value in values[:5]:
        part = run(*part, GRADS, jnp.array(value))
    part = jax.tree.map(lambda leaf: jnp.asarray(np.array(leaf)), part)  # as a file would give it back
    for value in values[5:]:
        part = run(*part, GRADS, jnp.array(value))
    assert bits(part) == bits(whole)
    assert int(whole[1].skipped) == 2


@pytest.mark.parametrize("options", [{"spike": 0.0}, {"spike": -1.0}, {"spike": float("nan")}, {"window": 1}])
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(errors.ConfigError, match=next(iter(options))):
        guard(optax.sgd(0.1), **options)


def test_an_update_needs_params_and_for_spikes_the_loss():
    tx = guard(optax.sgd(0.1), spike=2.0)
    with pytest.raises(errors.ConfigError, match="needs the params"):
        tx.update(GRADS, tx.init(PARAMS))
    with pytest.raises(errors.ConfigError, match="needs the loss"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)


# In a step


class Net(nn.Module):
    """Two layers with batch normalisation and dropout between them."""

    width: int = 6

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Dense(self.width, name="stem")(x)
        x = BatchNorm(name="norm")(x, use_running_average=not train)
        x = nn.Dropout(0.3, name="drop")(nn.tanh(x), deterministic=not train)
        return nn.Dense(3, name="head")(x)


RNG = np.random.default_rng(0)
BATCHES = [
    {"x": RNG.normal(size=(8, 5)).astype(np.float32), "label": RNG.integers(0, 3, 8).astype(np.int32)} for _ in range(6)
]
LOSS_FN = jtl.supervised(Net(), jtl.losses.cross_entropy)


def poison(batch, kind):
    x = batch["x"].copy()
    if kind == "weight":
        return {**batch, "weight": np.array([1, 1, np.inf, 1, 1, 1, 1, 1], np.float32)}
    x[2, 3] = {"nan": np.nan, "huge": 3e38, "inf": np.inf}[kind]
    return {**batch, "x": x, "weight": np.ones(8, np.float32)}


def with_weights(batch):
    return {**batch, "weight": np.ones(8, np.float32)}


def begin(tx, mask=None, model=None):
    variables = (model or Net()).init(jax.random.key(0), jnp.asarray(BATCHES[0]["x"]))
    return jtl.init(variables, tx, trainable=mask or jtl.everything(), key=jax.random.key(1))


@pytest.mark.parametrize("kind", ["nan", "huge", "inf", "weight"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_poisoned_batch_leaves_params_statistics_and_optimizer_alone(kind, accumulate):
    tx = guard(ADAM)
    step = jax.jit(jtl.train_step(LOSS_FN, tx, accumulate=accumulate))
    state, frozen = begin(tx)
    state, metrics = step(state, frozen, with_weights(BATCHES[0]))
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (0, 0)
    after, metrics = step(state, frozen, poison(BATCHES[1], kind))
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (1, 1)
    assert metrics["skipped"].dtype == metrics["skipped_in_a_row"].dtype == jnp.int32
    assert bits((after.params, after.collections)) == bits((state.params, state.collections))
    assert bits(after.opt_state.inner) == bits(state.opt_state.inner)
    # Batches and keys go on: the count of steps is the place in the data.
    assert int(after.step) == int(state.step) + 1
    assert bits(after.key) != bits(state.key)


def test_statistics_that_overflow_under_a_finite_loss():
    """The variance of a huge input is infinite; normalised by it, it is zero, and the loss is fine."""
    batch = {**BATCHES[0], "x": BATCHES[0]["x"] * np.float32(1e25)}
    loose = optax.chain(optax.zero_nans(), optax.sgd(0.1))
    state, frozen = begin(loose)
    bare, metrics = jax.jit(jtl.train_step(LOSS_FN, loose))(state, frozen, batch)
    assert np.isfinite(metrics["loss"])
    assert not np.isfinite(bare.collections["batch_stats"]["norm"]["var"]).all()
    tx = guard(loose)
    state, frozen = begin(tx)
    after, metrics = jax.jit(jtl.train_step(LOSS_FN, tx))(state, frozen, batch)
    assert int(metrics["skipped"]) == 1
    assert bits((after.params, after.collections)) == bits((state.params, state.collections))


def test_finite_batches_are_those_of_the_unguarded_step():
    for accumulate in (1, 2):
        ends = []
        for tx in (ADAM, guard(ADAM)):
            state, frozen = begin(tx)
            step = jax.jit(jtl.train_step(LOSS_FN, tx, accumulate=accumulate))
            for batch in BATCHES:
                state, _ = step(state, frozen, batch)
            ends.append(state)
        assert bits((ends[1].params, ends[1].collections)) == bits((ends[0].params, ends[0].collections))
        assert bits(ends[1].opt_state.inner) == bits(ends[0].opt_state)


def test_an_unguarded_step_says_nothing_of_it():
    state, frozen = begin(ADAM)
    assert set(jax.jit(jtl.train_step(LOSS_FN, ADAM))(state, frozen, BATCHES[0])[1]) == {"loss"}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.identity(), guard(tx)),
        lambda tx: guard(transforms.exponential_average(tx)),
        lambda tx: guard(guard(tx)),
        lambda tx: optax.partition(
            {"x": guard(tx), "y": guard(optax.sgd(0.1))}, {"head": "x", "norm": "y", "stem": "x"}
        ),
    ],
)
def test_a_guard_is_found_wherever_it_is(wrap):
    tx = wrap(ADAM)
    state, frozen = begin(tx)
    after, metrics = jax.jit(jtl.train_step(LOSS_FN, tx))(state, frozen, poison(BATCHES[0], "nan"))
    assert int(metrics["skipped"]) == 1
    assert bits((after.params, after.collections)) == bits((state.params, state.collections))


def test_denormal_params_are_not_flushed_by_a_skipped_step():
    tx = guard(optax.sgd(0.1))
    state, frozen = begin(tx)
    tiny = np.full((3,), np.float32(1e-40))
    state.params["head"]["bias"] = jnp.asarray(tiny)
    after, _ = jax.jit(jtl.train_step(LOSS_FN, tx))(state, frozen, poison(BATCHES[0], "nan"))
    assert np.asarray(after.params["head"]["bias"]).tobytes() == tiny.tobytes()


def test_members_of_a_sweep_are_guarded_one_by_one():
    def make_tx(learning_rate):
        return guard(optax.sgd(learning_rate))

    mask = jtl.select("head", "stem")
    states = [begin(optax.identity(), mask)[0] for _ in range(3)]
    _, frozen = begin(optax.identity(), mask)
    rates = np.array([0.1, np.inf, 0.1], np.float32)  # the second would not be finite at once
    result = jtl.sweep(LOSS_FN, make_tx, states, frozen, BATCHES, hyperparameters={"learning_rate": rates}, cache="off")
    skipped = np.asarray(result.states.opt_state.skipped)
    assert skipped[0] == skipped[2] == 0
    assert skipped[1] == len(BATCHES)
    assert bits(result.state(1).params) == bits(states[1].params)
    assert bits(result.state(0).params) == bits(result.state(2).params) != bits(states[0].params)


def test_counts_go_on_through_the_phases_of_a_strategy():
    groups = [("stem",), ("norm",), ("head",)]
    strategy = strategies.guarded(strategies.gradual_unfreezing(optax.adam(0.1), groups, every=2), spike=6.0, window=4)
    variables = Net().init(jax.random.key(0), jnp.asarray(BATCHES[0]["x"]))
    state, frozen = jtl.init(variables, strategy, key=jax.random.key(1))
    poisons = [poison(batch, "nan") if i in (1, 2, 5) else with_weights(batch) for i, batch in enumerate(BATCHES)]

    def unchecked(params, collections, batch, *, key):  # jtl.supervised refuses such inputs on the host
        return LOSS_FN(params, collections, batch, key=key)

    reports = [
        (report.step, int(report.metrics["skipped"]), int(report.state.opt_state.skipped), report.progress.phase)
        for report in jtl.fit(unchecked, strategy, state, frozen, poisons, cache="off")
    ]
    assert [row[0] for row in reports] == [1, 2, 3, 4, 5, 6]
    assert [row[1] for row in reports] == [0, 1, 1, 0, 0, 1]
    assert [row[2] for row in reports] == [0, 1, 2, 2, 2, 3]
    assert [row[3] for row in reports] == [0, 0, 1, 1, 2, 2]


def test_a_guarded_strategy_is_the_strategy():
    strategy = strategies.lp_ft(optax.sgd(0.1), optax.adam(0.1), steps=2)
    found = strategies.guarded(strategy)
    assert isinstance(found, schedule.Strategy)
    assert [phase._replace(tx=None) for phase in found.phases] == [phase._replace(tx=None) for phase in strategy.phases]


@pytest.mark.parametrize("mask", [jtl.select("head"), jtl.select("head", "norm"), jtl.everything()])
@pytest.mark.parametrize("spike", [None, 6.0])
def test_the_audit_of_a_guarded_step(mask, spike):
    """64 operations a trained value are the optimizer's; the window of losses is a number of its own, not too few."""
    tx, model = guard(ADAM, spike=spike), Net(64)
    state, frozen = begin(tx, mask, model)
    loss_fn = jtl.supervised(model, jtl.losses.cross_entropy)
    step = jax.jit(jtl.train_step(loss_fn, tx, grad_norm=True), donate_argnums=0)
    batch = jax.tree.map(jnp.asarray, with_weights(BATCHES[0]))
    jtl.audit(step, state, frozen, batch, loss_fn=loss_fn).require()


def test_a_compiled_guard_grows_with_the_leaves_and_not_with_their_square():
    def lines(count):
        params = {str(i): jax.ShapeDtypeStruct((4, i + 1), jnp.float32) for i in range(count)}
        tx = guard(optax.adamw(0.1))
        update = jax.jit(lambda grads, state, params, value: tx.update(grads, state, params, value=value))
        state = jax.eval_shape(tx.init, params)
        with standard_promotion():
            program = update.lower(params, state, params, jax.ShapeDtypeStruct((), jnp.float32)).compile()
        return len(program.as_text().splitlines())

    assert lines(32) < 2.2 * lines(16)
