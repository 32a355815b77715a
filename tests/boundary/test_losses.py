"""Losses that researchers write: both halves are the whole, and the cut lies where it should."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jtl

from .cases import assert_exact, assert_near, leaf, loss, mean_loss, ready, sequences, shapes, vectors

DENSE = {"stem": leaf(1, 4, 5), "mid": leaf(2, 5, 5), "head": leaf(3, 5, 3)}


def dense(params, x):
    return jnp.tanh(jnp.tanh(x @ params["stem"]) @ params["mid"])


def test_a_head_stores_its_features():
    cut = assert_exact(
        loss(lambda p, b, _: dense(p, b["x"]) @ p["head"]),
        {"params": DENSE},
        ("head",),
        vectors(6),
        vectors(9, seed=1),
    )
    assert shapes(cut) == [(5,)]
    assert cut.report.passed == ("label",)
    assert cut.report.boundary == "head"


def test_a_nested_batch_of_two_inputs_through_shared_weights_and_auxiliary_outputs():
    def loss_fn(params, collections, batch, *, key):
        left, right = dense(params, batch["pair"][0]["x"]), dense(params, batch["pair"][1]["x"])
        scores = jnp.sum((left @ params["head"]) * (right @ params["head"]), axis=-1)
        value = jnp.mean(jnp.square(scores - batch["score"]))
        return value, jtl.Aux({"scores": scores, "left": left, "most": jnp.max(jnp.mean(left, axis=0))}, {})

    def batch(size):
        return {"pair": (vectors(size), vectors(size, seed=1)), "score": leaf(7, size)}

    cut = assert_exact(loss_fn, {"params": DENSE}, ("head",), batch(6), batch(3))
    assert shapes(cut) == [(5,), (5,)]


def test_a_batch_that_is_one_array():
    def loss_fn(params, collections, batch, *, key):
        return jnp.mean(jnp.square(dense(params, batch) @ params["head"])), jtl.Aux({}, {})

    assert_exact(loss_fn, {"params": DENSE}, ("head",), vectors()["x"])


def test_a_tied_embedding():
    params = {"embedding": leaf(1, 7, 4), "mid": leaf(2, 4, 4), "scale": jnp.ones(4)}

    def forward(params, batch, key):
        x = jnp.tanh(params["embedding"][batch["ids"]] @ params["mid"]) * jnp.expand_dims(params["scale"], 0)
        return x @ params["embedding"].T

    batch = {"ids": jnp.arange(6) % 5, "label": jnp.arange(6) % 7}
    assert shapes(assert_exact(loss(forward), {"params": params}, ("scale",), batch)) == [(4,)]
    assert shapes(assert_exact(loss(forward), {"params": params}, ("embedding",), batch)) == []


def test_gradients_stop_where_the_loss_says():
    def forward(params, batch, key):
        x = dense(params, batch["x"])
        return x @ params["head"] + lax.stop_gradient(x @ params["head"] * 3)

    assert_exact(loss(forward), {"params": DENSE}, ("head",), vectors())


def test_constants_of_every_size_that_the_loss_closes_over():
    table, offset = leaf(8, 2000), 0.25

    def forward(params, batch, key):
        x = dense(params, batch["x"]) + jnp.expand_dims(table[:5], 0) + table.sum() + offset
        return x @ params["head"] + jnp.expand_dims(table[5:8], 0)

    assert_exact(loss(forward), {"params": DENSE}, ("head",), vectors())


@pytest.mark.parametrize("wrap", [jax.checkpoint, jax.jit, jax.vmap], ids=["checkpoint", "jit", "vmap"])
def test_layers_under_a_transform(wrap):
    def forward(params, batch, key):
        axes = {"in_axes": (None, 0)} if wrap is jax.vmap else {}
        return (
            wrap(lambda p, x: dense(p, jnp.atleast_2d(x)).reshape(*x.shape[:-1], 5), **axes)(params, batch["x"])
            @ params["head"]
        )

    assert shapes(assert_exact(loss(forward), {"params": DENSE}, ("head",), vectors())) == [(5,)]


def test_a_checkpoint_around_frozen_and_trained_layers_is_opened():
    forward = jax.checkpoint(lambda params, batch, key: dense(params, batch["x"]) @ params["head"])
    assert shapes(assert_exact(loss(forward), {"params": DENSE}, ("head",), vectors())) == [(5,)]


@jax.custom_jvp
def doubled(x):
    return 2 * x


doubled.defjvp(lambda primals, tangents: (doubled(*primals), 7 * tangents[0]))


@jax.custom_vjp
def tripled(x):
    return 3 * x


tripled.defvjp(lambda x: (tripled(x), None), lambda _, g: (11 * g,))


@pytest.mark.parametrize("rule", [doubled, tripled])
@pytest.mark.parametrize("trained", ["head", "mid"])
def test_derivatives_of_ones_own_survive(rule, trained):
    def forward(params, batch, key):
        return rule(jnp.tanh(rule(batch["x"] @ params["stem"]) @ params["mid"])) @ params["head"]

    assert_exact(loss(forward), {"params": DENSE}, (trained,), vectors())


def test_loops_and_branches_that_no_example_decides():
    params = {"stack": leaf(1, 3, 4, 4), "gate": jnp.float32(0.3), "head": leaf(2, 4, 3)}

    def forward(params, batch, key):
        x, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), batch["x"], params["stack"])
        x = lax.cond(params["gate"] > 0, lambda h: h * 2, lambda h: h - 1, x)
        x = lax.fori_loop(0, 4, lambda i, h: jnp.sin(h) + params["gate"], x)
        _, x = lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ params["stack"][c[0]]), (0, x))
        return x @ params["head"]

    cut = assert_exact(loss(forward), {"params": params}, ("head",), vectors(), vectors(9))
    assert shapes(cut) == [(4,)]


def test_the_last_token_of_each_example():
    params = {"stem": leaf(1, 4, 5), "head": leaf(2, 5, 3)}

    def forward(params, batch, key):
        h = jnp.tanh(batch["x"] @ params["stem"])
        return h[jnp.arange(h.shape[0]), batch["last"]] @ params["head"]

    def batch(size, length):
        return {**sequences(size, length), "last": jnp.arange(size) % length}

    cut = assert_exact(loss(forward), {"params": params}, ("head",), batch(6, 5), batch(3, 8))
    assert shapes(cut) == [(5,)]


def test_places_along_another_axis():
    params = {"stem": leaf(1, 4, 5), "head": leaf(2, 5, 3)}

    def forward(params, batch, key):
        h = jnp.tanh(batch["x"] @ params["stem"])
        best = jnp.argmax(h[..., 0], axis=1)
        found = jnp.take_along_axis(h, best[:, None, None], axis=1)[:, 0]
        order = jnp.argsort(h[..., 1], axis=1)
        return (found + jnp.take_along_axis(h, order[:, :, None], axis=1)[:, 0]) @ params["head"]

    assert shapes(assert_exact(loss(forward), {"params": params}, ("head",), sequences(), sequences(3))) == [(5,)]


def test_the_batch_axis_in_other_places_and_merged_with_others():
    params = {"stem": leaf(1, 4, 4), "mix": leaf(3, 5, 5), "head": leaf(2, 4, 3)}

    def forward(params, batch, key):
        h = batch["x"].transpose(1, 2, 0)  # [length, width, batch]
        h = jnp.einsum("swb,wv->svb", h, params["stem"])
        h = jnp.tanh(h.transpose(2, 0, 1).reshape(-1, 4) @ params["stem"])  # [batch * length, width]
        h = jnp.einsum("bsw,st->btw", h.reshape(-1, 5, 4), params["mix"])
        h = h.transpose(1, 0, 2).reshape(-1, 4)  # [length * batch, width]
        logits = (h @ params["head"]).reshape(5, -1, 3)
        return logits.mean(axis=0)

    cut = assert_exact(loss(forward), {"params": params}, ("head",), sequences(6), sequences(5))
    assert shapes(cut) == [(5, 4)]


def test_convolutions_and_pooling():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3), name="stem")(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
            x = nn.GroupNorm(2, name="norm")(x)
            x = lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 1, 1, 1), "VALID")
            x = nn.Conv(4, (3, 3), feature_group_count=4, name="depthwise")(x)
            return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))

    def batch(size):
        return {"x": leaf(size, size, 8, 8, 3), "label": jnp.arange(size) % 3}

    variables = Net().init(jax.random.key(0), batch(2)["x"])
    loss_fn = jtl.supervised(Net(), jtl.losses.cross_entropy)
    cut = assert_exact(loss_fn, variables, ("head", "depthwise"), batch(4), batch(3))
    assert shapes(cut) == [(3, 3, 4)]


def test_linen_attention_with_dropout_and_rematerialised_blocks():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic):
            y = nn.LayerNorm(name="norm")(x)
            x = x + nn.MultiHeadDotProductAttention(2, dropout_rate=0.3, name="attention")(
                y, deterministic=deterministic
            )
            return x + nn.Dropout(0.2)(nn.Dense(4, name="mlp")(x), deterministic=deterministic)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic=True):
            for name in ("first", "last"):
                x = nn.remat(Block, static_argnums=(2,))(name=name)(x, deterministic)
            return nn.Dense(3, name="head")(x.mean(axis=1))

    variables = Net().init(jax.random.key(0), sequences()["x"])
    loss_fn = jtl.supervised(Net(), jtl.losses.cross_entropy)
    cut = assert_exact(loss_fn, variables, ("head", "last"), sequences(4))
    assert shapes(cut) == [(5, 4)]


def test_statistics_and_dropout_of_a_trained_head_directly_on_frozen_features():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=True):
            x = nn.relu(nn.Dense(5, name="stem")(x))
            x = nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(x)
            x = nn.Dropout(0.5, deterministic=not train)(x)
            return nn.Dense(3, name="head")(x)

    variables = Net().init(jax.random.key(0), vectors()["x"], train=False)
    loss_fn = jtl.supervised(Net(), jtl.losses.cross_entropy)
    assert shapes(assert_exact(loss_fn, variables, ("head", "norm"), vectors(6), vectors(8))) == [(5,)]
    assert shapes(assert_exact(loss_fn, variables, ("norm/bias",), vectors(6))) == [(5,)]


def test_dropout_of_a_head_without_leaves_of_its_own():
    def forward(params, batch, key):
        x = dense(params, batch["x"])
        if key is not None:
            x = x * jax.random.bernoulli(key, 0.5, x.shape).astype(x.dtype)
        return x @ params["head"]

    assert shapes(assert_exact(loss(forward), {"params": DENSE}, ("head",), vectors())) == [(5,)]


def test_statistics_of_frozen_features_over_the_batch_are_computed_in_every_step():
    def loss_fn(params, collections, batch, *, key):
        x = dense(params, batch["x"])
        value = mean_loss(x @ params["head"], batch["label"])
        spread = jnp.mean(jnp.square(x - jnp.mean(x, axis=0, keepdims=True)))
        return value + 0 * spread, jtl.Aux({"spread": spread, "size": jnp.float32(x.shape[0])}, {})

    assert shapes(assert_exact(loss_fn, {"params": DENSE}, ("head",), vectors(6), vectors(7))) == [(5,)]


def test_widths_that_equal_the_batch_size():
    for size in (4, 5):
        # What is as wide as the batch at one size is not at another.
        assert_exact(loss(lambda p, b, k: dense(p, b["x"]) @ p["head"]), {"params": DENSE}, ("head",), vectors(size))


def test_what_evaluation_alone_needs_is_stored_too():
    def forward(params, batch, key):
        x = jnp.tanh(batch["x"] @ params["stem"])
        x = x @ params["mid"]
        return (x if key is None else jnp.sum(x, axis=1, keepdims=True)) * jnp.ones((1, 5)) @ params["head"]

    assert shapes(assert_exact(loss(forward), {"params": DENSE}, ("head",), vectors())) == [(5,)]


@functools.cache
def scanned():
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(nn.Dense(4, name="dense")(x)), jnp.mean(x, axis=-1)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4, name="stem")(x)
            stack = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            x, means = stack(name="stack")(x, None)
            return nn.Dense(3, name="head")(x) + jnp.sum(means, axis=0)[:, None]

    return Net(), Net().init(jax.random.key(0), vectors()["x"])


def test_layers_stacked_by_linen():
    model, variables = scanned()
    loss_fn = jtl.supervised(model, jtl.losses.cross_entropy)
    assert shapes(assert_exact(loss_fn, variables, ("head",), vectors(6), vectors(4))) == [(1,), (4,)]
    assert shapes(assert_exact(loss_fn, variables, ("head", "stack"), vectors())) == [(4,)]
    assert shapes(assert_exact(loss_fn, variables, ("**/bias",), vectors())) == [(4,)]


def test_a_trained_leaf_that_meets_the_examples_only_in_the_sum():
    def loss_fn(params, collections, batch, *, key):
        frozen = jnp.mean(dense(params, batch["x"]))
        return frozen + jnp.sum(jnp.square(params["head"])), jtl.Aux({"frozen": frozen}, {})

    cut = assert_exact(loss_fn, {"params": DENSE}, ("head",), vectors())
    assert (shapes(cut), cut.report.boundary) == ([(5,)], "head")


def test_a_batch_of_one_is_cached_like_any_other():
    loss_fn = loss(lambda p, b, _: dense(p, b["x"]) @ p["head"])
    state, frozen = ready({"params": DENSE}, ("head",))
    prefix = jtl.split(loss_fn, state, frozen, vectors(1)).prefix
    many, first = (prefix(frozen, {}, batch) for batch in (vectors(6), jax.tree.map(lambda x: x[:1], vectors(6))))
    assert_near(first, jax.tree.map(lambda x: x[:1], many))


def test_entries_of_no_size_integers_and_bools():
    def forward(params, batch, key):
        keep = jnp.where(batch["keep"][:, None], dense(params, batch["x"]), 0)
        return keep @ params["head"] + jnp.sum(batch["none"], axis=1, keepdims=True) + batch["count"][:, None]

    batch = {**vectors(), "keep": jnp.arange(6) % 2 == 0, "none": jnp.zeros((6, 0)), "count": jnp.arange(6.0)}
    assert_exact(loss(forward), {"params": DENSE}, ("head",), batch)


def test_a_random_key_of_its_own_for_each_example():
    def forward(params, batch, key):
        noise = jax.vmap(lambda k: jax.random.normal(k, (5,)))(batch["keys"])
        return (dense(params, batch["x"]) + noise) @ params["head"]

    batch = {**vectors(), "keys": jax.random.split(jax.random.key(1, impl="unsafe_rbg"), 6)}
    assert assert_exact(loss(forward), {"params": DENSE}, ("head",), batch).report.passed == ("keys", "label")


def test_entries_in_numpy_of_other_dtypes():
    batch = {"x": np.ones((6, 4)), "label": np.arange(6) % 3}
    state, frozen = ready({"params": DENSE}, ("head",))
    loss_fn = loss(lambda p, b, _: dense(p, jnp.asarray(b["x"], jnp.float32)) @ p["head"])
    cut = jtl.split(loss_fn, state, frozen, batch)
    value, _ = cut.suffix({**DENSE}, {}, cut.prefix(frozen, {}, batch), key=None)
    assert_near(value, loss_fn(DENSE, {}, jax.tree.map(jnp.asarray, batch), key=None)[0])


def test_a_split_made_while_a_step_is_traced():
    state, frozen = ready({"params": DENSE}, ("head",))
    loss_fn = loss(lambda p, b, _: dense(p, b["x"])[jnp.arange(b["x"].shape[0]), b["label"], None] * p["head"][:1])
    batch, other = vectors(6), vectors(5)
    cut = jtl.split(loss_fn, state, frozen, batch)
    value, _ = jax.jit(lambda b: cut.suffix(DENSE, {}, cut.prefix(frozen, {}, b), key=None))(other)
    assert_near(value, loss_fn(DENSE, {}, other, key=None)[0])
