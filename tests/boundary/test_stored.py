"""What is stored, what is left to compute, and what the report says of it."""

import functools
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtl
from jtl.boundary import SplitReport
from jtl.models.bert import Bert, BertConfig

from .cases import KEY, TX, assert_near, compiled, differentiated, leaf, loss, ready, sequences, shapes, vectors

PARAMS = {"stem": leaf(1, 4, 5), "mid": leaf(2, 5, 5), "head": leaf(3, 5, 3)}
SETTINGS = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
MASKS = {
    "head": ("head",),
    "last block": ("head", "encoder/layer_1"),
    "biases": ("head", "**/bias"),
}


def forward(params, batch, key):
    return jnp.tanh(jnp.tanh(batch["x"] @ params["stem"]) @ params["mid"]) @ params["head"]


@functools.cache
def bert(pool):
    config = BertConfig(**SETTINGS, intermediate_size=16, max_position_embeddings=16, pool=pool)
    model = Bert(config, jtl.heads.classifier(3))
    ids = jnp.ones((2, 6), jnp.int32)
    return jtl.supervised(model, jtl.losses.cross_entropy), jax.jit(model.init)(jax.random.key(0), ids)


def tokens(size=4, length=6):
    ids = jax.random.randint(jax.random.key(1), (size, length), 1, 20)
    return {"input_ids": ids, "attention_mask": (ids > 3).astype(jnp.int32), "label": jnp.arange(size) % 3}


@pytest.mark.parametrize(
    ("pool", "mask", "stored", "passed"),
    [
        ("pooler", "head", [(8,)], ("label",)),
        ("cls", "head", [(8,)], ("label",)),
        ("mean", "head", [(8,)], ("label",)),
        ("cls", "last block", [(6, 8)], ("attention_mask", "label")),
        ("mean", "biases", [(6, 8)], ("attention_mask", "label")),
    ],
)
def test_bert_stores_one_value_of_the_width_it_is_cut_at(pool, mask, stored, passed):
    loss_fn, variables = bert(pool)
    state, frozen = ready(variables, MASKS[mask])
    report = jtl.split(loss_fn, state, frozen, tokens()).report
    assert (sorted(value.shape for value in report.stored), report.passed) == (stored, passed)
    assert report.nbytes == 4 * np.prod(stored[0])
    assert all(path in str(report) for path in passed)


def test_a_pre_layer_norm_block_stores_its_input_alone():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.LayerNorm(name="norm")(x)
            return x + nn.Dense(4, name="up")(y)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name in ("first", "last"):
                x = Block(name=name)(x)
            return nn.Dense(3, name="head")(x.mean(axis=1))

    batch = sequences()
    state, frozen = ready(Net().init(jax.random.key(0), batch["x"]), ("head", "last/up"))
    assert shapes(jtl.split(jtl.supervised(Net(), jtl.losses.cross_entropy), state, frozen, batch)) == [(5, 4)]


def test_labels_and_weights_come_from_the_batch_and_unused_entries_do_not():
    batch = {**tokens(), "weight": jnp.ones(4)}
    loss_fn, variables = bert("cls")
    loss_fn = jtl.supervised(loss_fn.model, jtl.losses.cross_entropy, inputs=("input_ids", "attention_mask"))
    state, frozen = ready(variables, ("head",))
    cut = jtl.split(loss_fn, state, frozen, {**batch, "source": jnp.arange(4)})
    assert cut.report.passed == ("label", "weight")


def test_a_name_that_the_batch_has_taken():
    state, frozen = ready({"params": PARAMS}, ("head",))
    cut = jtl.split(
        loss(lambda p, b, k: forward(p, {"x": b["x"]}, k) + b["cut/0"]),
        state,
        frozen,
        {**vectors(), "cut/0": jnp.ones((6, 3))},
    )
    assert sorted(cut.prefix(frozen, {}, {**vectors(), "cut/0": jnp.ones((6, 3))})) == ["cut/0", "cut/1", "label"]


def test_a_split_suffix_splits_into_itself():
    loss_fn, variables = bert("cls")
    for mask in ("last block",):
        state, frozen = ready(variables, MASKS[mask])
        cut = jtl.split(loss_fn, state, frozen, tokens())
        cached = cut.prefix(frozen, {}, tokens())
        again = jtl.split(cut.suffix, state, frozen, cached)
        assert again.report.stored == ()
        assert again.report.prefix_flops == 0
        passed = again.prefix(frozen, {}, cached)
        assert sorted(passed) == sorted(cached)
        assert all(np.array_equal(passed[name], cached[name]) for name in cached)
        ours, theirs = (
            compiled(lambda s, f, b, fn=fn: differentiated(fn, s, f, b, KEY))(state, frozen, cached)
            for fn in (again.suffix, cut.suffix)
        )
        assert_near(ours, theirs)


@pytest.mark.parametrize("mask", ["last block"])
def test_five_steps_from_the_cache_are_five_steps(mask):
    loss_fn, variables = bert("cls")
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.3, momentum=0.9))
    state, frozen = jtl.init(variables, tx, trainable=jtl.select(*MASKS[mask]), key=KEY)
    cut = jtl.split(loss_fn, state, frozen, tokens())
    prefix, ours, theirs = (
        compiled(cut.prefix),
        compiled(jtl.train_step(cut.suffix, tx)),
        compiled(jtl.train_step(loss_fn, tx)),
    )
    cached_state = state
    for _ in range(5):
        cached_state, ours_metrics = ours(cached_state, frozen, prefix(frozen, {}, tokens()))
        state, metrics = theirs(state, frozen, tokens())
    assert_near(cached_state.params, state.params, rtol=1e-5)
    assert_near(ours_metrics, metrics, rtol=1e-5)


def flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def wide(depth=4, width=64):
    """A deep network whose products dominate, and the same cut by hand."""
    params = {f"layer_{i}": leaf(i, width, width, scale=0.1) for i in range(depth)} | {"head": leaf(9, width, 3)}

    def layers(params, x, start):
        for i in range(start, depth):
            x = jnp.tanh(x @ params[f"layer_{i}"])
        return x @ params["head"]

    return params, layers, {"x": leaf(1, 32, width), "label": jnp.arange(32) % 3}


@pytest.mark.parametrize("first", [1, 3, 4])
def test_the_compiled_step_has_no_frozen_work(first):
    params, layers, batch = wide()
    trained = ("head", *(f"layer_{i}" for i in range(first, 4)))
    state, frozen = ready({"params": params}, trained)
    cut = jtl.split(loss(lambda p, b, _: layers(p, b["x"], 0)), state, frozen, batch)
    cached = cut.prefix(frozen, {}, batch)
    by_hand = loss(
        lambda p, b, _: layers(
            p, jnp.tanh(b["cut/0"]) if "tanh" not in cut.report.stored[0].source else b["cut/0"], first
        )
    )
    step, hand_step = jtl.train_step(cut.suffix, TX), jtl.train_step(by_hand, TX)
    assert flops(step, state, frozen, cached) == pytest.approx(flops(hand_step, state, frozen, cached), rel=0.01)
    # The report counts products as XLA does; elementwise functions it counts by formulas of its own.
    assert 32 * cut.report.suffix_flops == pytest.approx(flops(step, state, frozen, cached), rel=0.15)
    assert 32 * cut.report.prefix_flops == pytest.approx(flops(cut.prefix, frozen, {}, batch), rel=0.05)


def test_flops_of_convolutions():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(16, (3, 3), padding="VALID", name="stem")(x))
            x = nn.relu(nn.Conv(32, (3, 3), padding="VALID", feature_group_count=2, name="grouped")(x))
            return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))

    batch = {"x": leaf(1, 4, 16, 16, 8), "label": jnp.arange(4) % 3}
    state, frozen = ready(Net().init(jax.random.key(0), batch["x"]), ("head",))
    cut = jtl.split(jtl.supervised(Net(), jtl.losses.cross_entropy), state, frozen, batch)
    assert 4 * cut.report.prefix_flops == pytest.approx(flops(cut.prefix, frozen, {}, batch), rel=0.05)


def test_the_speed_up_of_many_epochs_is_that_of_the_suffix_alone():
    report = SplitReport((), (), prefix_flops=30.0, suffix_flops=10.0, boundary="head")
    assert report.speedup(1.0) == pytest.approx(1.0)
    assert report.speedup(2.0) == pytest.approx(80 / 50)
    assert report.speedup(1e9) == pytest.approx(4.0)


def test_half_precision_is_off_by_half_precision():
    loss_fn, variables = bert("cls")
    state, frozen = ready(variables, MASKS["last block"])
    exact, short = (jtl.split(loss_fn, state, frozen, tokens(), dtype=dtype) for dtype in (None, jnp.bfloat16))
    cached, whole = short.prefix(frozen, {}, tokens()), exact.prefix(frozen, {}, tokens())
    assert cached["cut/0"].dtype == jnp.bfloat16
    assert {name: value.dtype for name, value in cached.items() if name != "cut/0"} == {
        name: value.dtype for name, value in whole.items() if name != "cut/0"
    }
    assert short.report.nbytes * 2 == exact.report.nbytes
    (ours, _), grads = compiled(lambda s, b: differentiated(short.suffix, s, frozen, b, KEY))(state, cached)
    (theirs, _), reference = compiled(lambda s, b: differentiated(exact.suffix, s, frozen, b, KEY))(state, whole)
    off = [
        np.max(np.abs(a - b)) / np.max(np.abs(b))
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(reference), strict=True)
        if np.max(np.abs(b)) > 1e-6
    ]
    # bfloat16 keeps 8 bits: rounding is at most 2 ** -9 of a value, and a few layers add some of them up.
    assert ours == pytest.approx(float(theirs), rel=2**-6)
    assert 2**-12 < max(off) < 2**-3


DIGEST = """
import jax, jax.numpy as jnp, jtl
from flax import linen as nn
class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.gelu(nn.Dense(4, name="stem")(x)))
batch = {"x": jnp.ones((3, 4)), "label": jnp.zeros(3, jnp.int32)}
import optax
variables = Net().init(jax.random.key(0), batch["x"])
state, frozen = jtl.init(variables, optax.sgd(0.1), trainable=jtl.select("head"), key=jax.random.key(0))
print(jtl.split(jtl.supervised(Net(), jtl.losses.cross_entropy), state, frozen, batch).prefix.digest(batch))
"""


def test_a_digest_is_the_same_in_every_process():
    found = [
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(p for p in sys.path if p)},
        ).stdout
        for seed in ("1", "2")
    ]
    assert found[0] == found[1]
    assert len(found[0].strip()) == 64


def digest(forward, batch=None, trainable=("head",), params=PARAMS, **options):
    state, frozen = ready({"params": params}, trainable)
    batch = vectors() if batch is None else batch
    return jtl.split(loss(forward), state, frozen, batch, **options).prefix.digest(batch)


def test_a_digest_tells_computations_apart():
    big = np.linspace(0, 1, 5000, dtype=np.float32)
    other = big.copy()
    other[2500] += 1  # in the middle, where printing leaves it out

    def features(change):
        return lambda p, b, k: change(jnp.tanh(b["x"] @ p["stem"]) @ p["mid"]) @ p["head"]

    changes = {
        "plain": lambda h: h,
        "constant": lambda h: jnp.tanh(h + 0.1),
        "another constant": lambda h: jnp.tanh(h + np.float32(0.10000001)),
        "array": lambda h: jnp.tanh(h) * jnp.asarray(big)[:, None].sum(),
        "another array": lambda h: jnp.tanh(h) * jnp.asarray(other)[:, None].sum(),
        "axis": lambda h: (
            jax.nn.softmax(h @ h[..., None] * jnp.ones((1, 5)), axis=-1) if h.ndim == 3 else jnp.cumsum(h, axis=1)
        ),
        "reverse": lambda h: jax.lax.cumsum(h, axis=1, reverse=True),
        "relu": jax.nn.relu,
        "gelu": jax.nn.gelu,
        "tanh gelu": functools.partial(jax.nn.gelu, approximate=False),
    }
    found = {name: digest(features(change)) for name, change in changes.items()}
    found["width"] = digest(features(lambda h: h), {"x": leaf(1, 6, 7, 4), "label": jnp.zeros((6, 7), jnp.int32)})
    found["bfloat16"] = digest(features(lambda h: h), dtype=jnp.bfloat16)
    assert len(set(found.values())) == len(found)


def test_a_digest_does_not_depend_on_the_batch_size_or_on_what_is_behind_the_cut():
    assert digest(forward) == digest(forward, vectors(9))
    assert digest(forward) == digest(lambda p, b, k: 2 * forward(p, b, k))


def test_the_leaves_that_a_prefix_reads():
    state, frozen = ready({"params": {**PARAMS, "spare": leaf(1, 2)}}, ("head",))
    cut = jtl.split(loss(forward), state, frozen, vectors())
    assert sorted(cut.prefix.reads(vectors())) == [("params", "mid"), ("params", "stem")]


def test_equal_callbacks_that_close_over_different_values_are_not_one():
    def tripled(factor):
        return lambda x: np.asarray(factor * x, np.float32)

    def loss_fn(params, collections, batch, *, key):
        shape = jax.ShapeDtypeStruct((5, 3), jnp.float32)
        weights = [jax.pure_callback(tripled(f), shape, params["mid"][:, :3]) for f in (1.0, 3.0)]
        value = jnp.sum(params["head"] * weights[0]) + jnp.mean(batch["x"]) * jnp.sum(params["head"] * weights[1])
        return value, jtl.Aux({}, {})

    state, frozen = ready({"params": PARAMS}, ("head",))
    cut = jtl.split(loss_fn, state, frozen, vectors())
    cached = cut.prefix(frozen, {}, vectors())
    assert_near(
        differentiated(cut.suffix, state, frozen, cached, KEY), differentiated(loss_fn, state, frozen, vectors(), KEY)
    )
