"""What cannot be cached exactly is refused, by the module or the line that is at fault."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.experimental import io_callback

import jtl
from jtl.errors import ConfigError, DataError, SplitError

from .cases import TX, leaf, loss, ready, sequences, vectors

PARAMS = {"stem": leaf(1, 4, 4), "mid": leaf(2, 4, 4), "head": leaf(3, 4, 3)}
HERE = r"test_refusals.py:\d+ \("


def split(forward, batch=None, params=PARAMS, **options):
    state, frozen = ready({"params": params}, ("head",))
    return jtl.split(loss(forward), state, frozen, vectors() if batch is None else batch, **options)


def between(change):
    """A frozen layer, something, a frozen layer, a trained one."""
    return lambda p, b, k: jnp.tanh(change(jnp.tanh(b["x"] @ p["stem"]), b, k, p) @ p["mid"]) @ p["head"]


def random_augmentation(h, batch, key, params):
    return h if key is None else h + jax.random.normal(key, h.shape)


def dropout_without_a_flag(h, batch, key, params):
    return h if key is None else jnp.where(jax.random.bernoulli(key, 0.5, h.shape), h, 0)


def dropped_weights(h, batch, key, params):
    return h if key is None else h @ (params["mid"] * jax.random.normal(key, (4, 4)))


CHANGES = {
    "random augmentation": (random_augmentation, "random key"),
    "dropout": (dropout_without_a_flag, "random key"),
    "dropped weights": (dropped_weights, "random key"),
    "batch statistics": (lambda h, *_: h - jnp.mean(h, axis=0, keepdims=True), "reduce_sum over the batch axis"),
    "attention over the batch": (lambda h, *_: jax.nn.softmax(h @ h.T) @ h, "every example with every other"),
    "roll": (lambda h, *_: jnp.roll(h, 1, axis=0), "batch axis"),
    "shift": (lambda h, *_: jnp.concatenate([h[1:], h[:1]]), "slice of the batch axis"),
    "reverse": (lambda h, *_: h[::-1], "rev along the batch axis"),
    "sort": (lambda h, *_: jnp.sort(h, axis=0), "sort along the batch axis"),
    "cumsum": (lambda h, *_: jnp.cumsum(h, axis=0), "cumsum along the batch axis"),
    "first example": (lambda h, *_: h - h[:1], "slice of the batch axis"),
    "lookup of others": (lambda h, b, *_: h[b["label"]], "size of the batch|looked up in one another"),
    "batch size": (lambda h, *_: h / h.shape[0], "size of the batch"),
    "batch size, of ones": (lambda h, *_: h / jnp.ones(h.shape[:1]).sum(), "size of the batch"),
    "batch size, whole": (lambda h, *_: h * jnp.int32(h.shape[0]).astype(h.dtype), "size of the batch"),
    "batch size, power": (lambda h, *_: h ** h.shape[0], "size of the batch"),
    "batch size, turns": (
        lambda h, *_: jax.lax.fori_loop(0, h.shape[0], lambda _, x: 2 * x, h),
        "size of the batch|depends|loop",
    ),
    "place in the batch": (lambda h, *_: h + jnp.arange(1.0 * h.shape[0])[:, None], "size of the batch|place"),
    "merged rows": (lambda h, *_: jnp.repeat(h.reshape(-1, 8).sum(axis=1), 2)[:, None] + h, "reshape|batch axis"),
    "loop over examples": (lambda h, *_: jax.lax.map(jnp.tanh, h), "loop over the batch axis"),
    "running loop": (lambda h, *_: jax.lax.scan(lambda c, x: (c + x, c), h[0] * 0, h)[1], "batch axis"),
    "branch": (lambda h, *_: jax.lax.cond(h.sum() > 0, lambda x: x, lambda x: -x, h), "batch axis"),
    "turns that an example decides": (
        lambda h, *_: jax.lax.while_loop(lambda x: jnp.max(x) < 3, lambda x: x + 1, h),
        "loop that an example ends",
    ),
    "print": (lambda h, *_: (jax.debug.print("{}", h), h)[1], "effect"),
    "io_callback": (lambda h, *_: io_callback(lambda x: x, jax.ShapeDtypeStruct(h.shape, h.dtype), h), "effect"),
    "pure_callback": (
        lambda h, *_: jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(h.shape, h.dtype), h),
        "does not know",
    ),
    "callback on weights": (
        lambda h, b, k, p: h @ jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct((4, 4), h.dtype), p["mid"]),
        "Python",
    ),
    "branches on the size": (lambda h, *_: h if h.shape[0] < 8 else -h, "other equations"),
    "loop over the size": (lambda h, *_: sum((h * 2 for _ in range(h.shape[0])), h), "other equations"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_refused(change):
    function, reason = CHANGES[change]
    with pytest.raises(SplitError, match=reason) as raised:
        split(between(function))
    if "other equations" not in reason:
        assert "test_refusals.py" in str(raised.value)


@pytest.mark.parametrize(
    "change", ["random augmentation", "batch statistics", "batch size", "sort", "place in the batch"]
)
def test_it_is_only_cut_before_it_where_no_frozen_layer_follows(change):
    function, _ = CHANGES[change]
    cut = split(lambda p, b, k: function(jnp.tanh(b["x"] @ p["stem"]), b, k, p) @ p["head"])
    assert [value.shape for value in cut.report.stored] == [(4,)]


def test_dropout_in_frozen_modules_if_it_is_asked_for():
    class Stem(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic):
            return nn.Dropout(0.5)(nn.Dense(4, name="dense")(x), deterministic=deterministic)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic=True):
            x = Stem(name="stem")(x, deterministic)
            return nn.Dense(3, name="head")(nn.Dense(4, name="mid")(x))

    variables = Net().init(jax.random.key(0), vectors()["x"])
    state, frozen = ready(variables, ("head",))
    loss_fn = jtl.supervised(Net(), jtl.losses.cross_entropy)
    jtl.split(loss_fn, state, frozen, vectors())
    with pytest.raises(SplitError, match=rf"random key .*Net/stem.*{HERE}.*Net/mid"):
        jtl.split(loss_fn, state, frozen, vectors(), frozen_dropout=True)


def test_a_norm_that_knows_no_flag_names_its_module():
    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x - jnp.mean(x, axis=0, keepdims=True)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = Norm(name="norm")(nn.Dense(4, name="stem")(x))
            return nn.Dense(3, name="head")(nn.Dense(4, name="mid")(x))

    state, frozen = ready(Net().init(jax.random.key(0), vectors()["x"]), ("head",))
    with pytest.raises(SplitError, match=rf"reduce_sum in Net/norm, .*{HERE}.*Net/mid"):
        jtl.split(jtl.supervised(Net(), jtl.losses.cross_entropy), state, frozen, vectors())


@pytest.mark.parametrize("entry", [jnp.zeros(5), jnp.float32(1), jnp.zeros((1, 6))])
def test_entries_that_do_not_lead_with_the_batch_axis(entry):
    with pytest.raises(DataError, match="leads with the batch axis"):
        split(between(lambda h, *_: h), {**vectors(), "other": entry})


def test_an_array_as_long_as_the_batch_that_the_loss_closes_over():
    with pytest.raises(SplitError, match="twice"):
        split(between(lambda h, *_: h + leaf(1, 6, 4)))


def test_a_suffix_given_something_else():
    cut = split(between(lambda h, *_: h))
    with pytest.raises(SplitError, match="not cached entries"):
        cut.suffix(PARAMS, {}, vectors(), key=None)
    cached = cut.prefix({"stem": PARAMS["stem"], "mid": PARAMS["mid"]}, {}, vectors())
    with pytest.raises(ConfigError, match="whole tree"):
        cut.suffix({"mid": PARAMS["mid"]}, {}, cached, key=None)


def test_a_suffix_trained_with_another_mask():
    cut = split(between(lambda h, *_: h))
    state, frozen = ready({"params": PARAMS}, ("head", "mid"))
    cached = cut.prefix(PARAMS, {}, vectors())
    with pytest.raises(ConfigError, match="split the loss again"):
        jtl.train_step(cut.suffix, TX)(state, frozen, cached)


def test_one_example_is_no_batch_to_train_on():
    cut = split(lambda p, b, k: jnp.tanh(b["x"] @ p["stem"] + p["mid"][:1]) @ p["head"])
    cached = cut.prefix(PARAMS, {}, vectors(1))
    with pytest.raises(SplitError, match="pad it"):
        cut.suffix(PARAMS, {}, cached, key=None)


def test_two_lengths_that_leave_the_same_shapes_for_different_computations():
    cut = split(
        lambda p, b, k: (jnp.tanh(b["x"] @ p["stem"]).mean(axis=1) @ p["head"]) / b["x"].shape[1], sequences(length=5)
    )
    with pytest.raises(SplitError, match="two different computations"):
        cut.prefix(PARAMS, {}, sequences(length=7))
