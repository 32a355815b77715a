"""Pairs against PyTorch's cross-entropy of cosines, and what must not be compared with what."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtl
from jtl import errors
from jtl.models.family import Features
from jtl.models.layers import masked_mean
from jtl.step import checker

RNG = np.random.default_rng(0)


class Words(nn.Module):
    """The mean of words that are no padding, with dropout."""

    rate: float

    @nn.compact
    def __call__(self, input_ids, attention_mask, deterministic: bool):
        words = nn.Embed(30, 6, name="table")(input_ids)
        words = nn.Dropout(self.rate)(words, deterministic=deterministic)
        return words, masked_mean(words, jnp.asarray(attention_mask, bool))


class Embed(nn.Module):
    """Features of words, under a dense layer."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, input_ids, attention_mask, deterministic: bool = True):
        words, pooled = Words(self.rate, name="words")(input_ids, attention_mask, deterministic)
        return Features(words, nn.Dense(5, name="out")(pooled))


def texts(prefix, size, length):
    lengths = RNG.integers(2, length + 1, (size, 1))  # of single words, some pairs would be the same
    ids = RNG.integers(0, 30, (size, length)).astype(np.int32)
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": (np.arange(length)[None] < lengths).astype(np.int32)}


SIZE = 5
BATCH = {**texts("", SIZE, 7), **texts("pair_", SIZE, 4)}  # the two sides are of other lengths
WRONG = texts("negative_", SIZE, 3)
MODEL = Embed()
PARAMS = MODEL.init(jax.random.key(0), BATCH["input_ids"], BATCH["attention_mask"])["params"]


def value(loss_fn, batch):
    return jax.jit(lambda: loss_fn(PARAMS, {}, batch, key=None)[0])()


def sides(params, batch):
    for prefix in ("", "pair_", "negative_"):
        if f"{prefix}input_ids" in batch:
            inputs = [jnp.array(batch[f"{prefix}{name}"]) for name in ("input_ids", "attention_mask")]
            yield MODEL.apply({"params": params}, *inputs).pooled


def reference(torch, embeddings, *, scale=20.0, normalize=True, symmetric=False):
    """The loss as sentence-transformers has it, of torch tensors of the two sides and of further negatives."""
    if normalize:
        embeddings = [torch.nn.functional.normalize(side, dim=1) for side in embeddings]
    left, right = embeddings[0], torch.cat(embeddings[1:])
    scores, answers = scale * left @ right.T, torch.arange(len(left))
    loss = torch.nn.functional.cross_entropy(scores, answers)
    if symmetric:
        loss = (loss + torch.nn.functional.cross_entropy(scores[:, : len(left)].T, answers)) / 2
    return loss, (scores.argmax(1) == answers).double().mean()


@pytest.mark.torch
@pytest.mark.parametrize(
    ("settings", "negatives"),
    [
        ({}, {}),
        ({"scale": 3.0}, WRONG),
        ({"scale": 3.0, "symmetric": True}, WRONG),
        ({"scale": 0.5, "normalize": False}, {}),
    ],
    ids=["pairs", "negatives", "symmetric", "products"],
)
def test_it_is_the_cross_entropy_of_the_matrix_of_scores(settings, negatives):
    torch = pytest.importorskip("torch")
    batch = BATCH | negatives
    embeddings, pull_back = jax.vjp(jax.jit(lambda params: list(sides(params, batch))), PARAMS)
    leaves = [torch.tensor(np.asarray(side, np.float64), requires_grad=True) for side in embeddings]
    expected, nearest = reference(torch, leaves, **settings)
    expected.backward()
    gradient = pull_back([jnp.array(leaf.grad.numpy(), jnp.float32) for leaf in leaves])[0]
    loss_fn = jtl.contrastive(MODEL, **settings)
    (loss, aux), grads = jax.jit(jax.value_and_grad(lambda p: loss_fn(p, {}, batch, key=None), has_aux=True))(PARAMS)
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, gradient)
    found = jtl.metrics.compute(aux.metrics)
    np.testing.assert_allclose(found["accuracy"], nearest.item(), rtol=1e-6)
    np.testing.assert_allclose(found["loss"], expected.item(), rtol=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_filler_rows_are_no_answer_to_any_other(symmetric):
    loss_fn = jtl.contrastive(MODEL, symmetric=symmetric)
    whole = BATCH | WRONG
    # The last rows of a data set are filled up with copies, which as answers would be as near as the right ones.
    padded = {name: np.concatenate([values, values[:3]]) for name, values in whole.items()}
    padded["weight"] = np.array([1] * SIZE + [0] * 3, np.float32)
    both = [jax.jit(jax.value_and_grad(lambda p, b=b: loss_fn(p, {}, b, key=None)[0]))(PARAMS) for b in (padded, whole)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *both)


def test_filler_alone_has_loss_zero_and_finite_gradients():
    loss_fn, batch = jtl.contrastive(MODEL, symmetric=True), {**BATCH, **WRONG, "weight": np.zeros(SIZE, np.float32)}
    loss, grads = jax.jit(jax.value_and_grad(lambda p: loss_fn(p, {}, batch, key=None)[0]))(PARAMS)
    assert loss == 0
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(grads))


def test_embeddings_of_zeros_have_finite_gradients():
    loss_fn = jtl.contrastive(MODEL)
    grads = jax.jit(jax.grad(lambda p: loss_fn(p, {}, BATCH, key=None)[0]))(jax.tree.map(jnp.zeros_like, PARAMS))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))


SAME = BATCH | {f"pair_{name}": BATCH[name] for name in ("input_ids", "attention_mask")}


def test_each_side_has_dropout_of_its_own():
    """Of the same text and the same dropout, the two sides would be the same, and each other's nearest."""
    loss_fn = jtl.contrastive(Embed(rate=0.5))
    accuracy = jax.jit(lambda key: loss_fn(PARAMS, {}, SAME, key=key)[1].metrics["accuracy"].compute())
    assert accuracy(None) == 1
    assert np.mean([accuracy(jax.random.key(i)) for i in range(4)]) < 1


@pytest.mark.parametrize(("mask", "active"), [(jtl.select("out"), False), (jtl.everything(), True)], ids=["out", "all"])
def test_dropout_follows_the_mask(mask, active):
    loss_fn, tx = jtl.contrastive(Embed(rate=0.5)), optax.identity()
    state, frozen = jtl.init({"params": PARAMS}, tx, trainable=mask, key=jax.random.key(0))
    _, report = jax.jit(jtl.train_step(loss_fn, tx))(state, frozen, BATCH)
    still = float(value(loss_fn, BATCH))
    assert (float(report["loss"]) != pytest.approx(still, rel=1e-5)) == active


def test_frozen_words_can_be_computed_once():
    loss_fn, tx = jtl.contrastive(MODEL), optax.sgd(0.1)
    state, frozen = jtl.init({"params": PARAMS}, tx, trainable=jtl.select("out"), key=jax.random.key(0))
    batch = {**BATCH, "weight": np.array([1, 1, 1, 1, 0], np.float32)}
    cut = jtl.split(loss_fn, state, frozen, batch)
    cached = cut.prefix(frozen, {}, batch)
    whole, parts = (
        jax.jit(jtl.train_step(fn, tx))(state, frozen, given) for fn, given in ((loss_fn, batch), (cut.suffix, cached))
    )
    np.testing.assert_allclose(parts[1]["loss"], whole[1]["loss"], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), parts[0].params, whole[0].params)


def test_it_trains_and_evaluates():
    loss_fn, tx = jtl.contrastive(MODEL), optax.adam(0.05)
    state, frozen = jtl.init({"params": PARAMS}, tx, trainable=jtl.everything(), key=jax.random.key(0))
    report = list(jtl.fit(loss_fn, tx, state, frozen, [BATCH] * 40, held_out=lambda: [BATCH]))[-1]
    assert set(report.evaluation) == {"loss", "accuracy"}
    assert report.evaluation["accuracy"] == 1
    assert report.evaluation["loss"] < 0.1


def test_entries_can_be_named_and_a_model_may_give_embeddings_alone():
    model = jtl.from_function(lambda params, ids, mask: MODEL.apply({"params": params}, ids, mask).pooled)
    named = jtl.contrastive(model, inputs=("input_ids", "attention_mask"))
    batch = {**BATCH, "label": np.arange(SIZE), "pair_id": np.arange(SIZE)}
    np.testing.assert_allclose(value(named, batch), value(jtl.contrastive(MODEL), BATCH), rtol=1e-6)


def without(*names):
    return {name: values for name, values in BATCH.items() if name not in names}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([1], "a mapping of arrays by name, got list"),
        (without("pair_attention_mask"), r"lacks \['pair_attention_mask'\]"),
        (without("attention_mask"), r"lacks \['attention_mask'\]"),
        (without("pair_input_ids", "pair_attention_mask"), r"lacks \['pair_input_ids', 'pair_attention_mask'\]"),
        (without("input_ids", "attention_mask"), "no input for the model"),
        ({**BATCH, "negative_input_ids": BATCH["input_ids"]}, r"lacks \['negative_attention_mask'\]"),
        ({**BATCH, **texts("pair_", SIZE + 1, 4)}, "different lengths"),
        ({name: values[:1] for name, values in BATCH.items()}, "a batch of one pair"),
        ({name: values[:0] for name, values in BATCH.items()}, "no example"),
    ],
)
def test_batches_that_cannot_be_are_refused(batch, message):
    state, frozen = jtl.init({"params": PARAMS}, optax.identity(), trainable=jtl.everything(), key=jax.random.key(0))
    with pytest.raises(errors.DataError, match=message):
        checker(jtl.contrastive(MODEL), state, frozen)(batch)


def test_models_check_both_sides():
    @dataclasses.dataclass(frozen=True)
    class Careful:
        seen: list

        def __call__(self, input_ids, attention_mask): ...

        def apply(self, variables, input_ids, attention_mask, **settings):
            return MODEL.apply(variables, input_ids, attention_mask)

        def check_batch(self, batch):
            self.seen.append(batch["input_ids"].shape)

    model = Careful([])
    state, frozen = jtl.init({"params": PARAMS}, optax.identity(), trainable=jtl.everything(), key=jax.random.key(0))
    checker(jtl.contrastive(model), state, frozen)(BATCH | WRONG)
    assert model.seen == [(SIZE, 7), (SIZE, 4), (SIZE, 3)]


def test_a_model_without_embeddings_and_a_scale_of_zero_are_refused():
    tags = jtl.from_function(lambda params, input_ids, attention_mask: jnp.zeros((*input_ids.shape, 2)))
    with pytest.raises(errors.ConfigError, match=r"\(5, 7, 2\): expected embeddings"):
        jtl.contrastive(tags)({}, {}, BATCH, key=None)
    with pytest.raises(errors.ConfigError, match=r"scale=0\.0"):
        jtl.contrastive(MODEL, scale=0.0)
    with pytest.raises(errors.ConfigError, match="needs apply"):
        jtl.contrastive(object())
