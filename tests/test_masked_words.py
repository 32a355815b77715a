"""Masked words: the shares of what happens to them, what never does, and the training that guesses them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import jtl
from jtl import augment, errors
from jtl.labels import IGNORED
from jtl.step import checker

WORDS, MASK, SPECIAL = 1000, 4, (0, 1, 2, 4)
KEY = jax.random.key(3)
RNG = np.random.default_rng(0)
SHAPE = (200, 64)
IDS = jnp.array(RNG.integers(5, WORDS, SHAPE), jnp.int32)
NEVER = jnp.array(RNG.random(SHAPE) < 0.3)

hide = jax.jit(functools.partial(augment.mask_words, mask_id=MASK, vocab_size=WORDS), static_argnames="rate")


def likely(count, total, share, level=0.999):
    """Whether a count is within the middle of its binomial distribution, as much of it as the level says."""
    low, high = scipy.stats.binom.interval(level, total, share)
    return low <= count <= high


@pytest.mark.parametrize("rate", [0.15, 0.4, 1.0])
def test_the_shares_are_those_of_the_paper(rate):
    ids, labels = (np.asarray(x) for x in hide(IDS, NEVER, key=KEY, rate=rate))
    chosen = labels != IGNORED
    total = int((~NEVER).sum())
    assert likely(chosen.sum(), total, rate)  # of all of them, for a rate of 1
    before, after = np.asarray(IDS)[chosen], ids[chosen]
    assert likely((after == MASK).sum(), chosen.sum(), 0.8)
    assert likely((after == before).sum(), chosen.sum(), 0.1 + 0.1 / WORDS)
    drawn = after[(after != MASK) & (after != before)]
    assert scipy.stats.kstest(drawn / WORDS, "uniform").pvalue > 1e-3
    # Each row and each place is as likely as the others.
    for axis in (0, 1):
        counts, sizes = chosen.sum(axis), np.asarray(~NEVER).sum(axis)
        assert all(likely(count, size, rate, 1 - 1e-6) for count, size in zip(counts, sizes, strict=True))


def test_labels_are_the_words_that_were_chosen_and_nothing_else_changes():
    ids, labels = (np.asarray(x) for x in hide(IDS, NEVER, key=KEY))
    chosen = labels != IGNORED
    assert not chosen[np.asarray(NEVER)].any()
    np.testing.assert_array_equal(labels[chosen], np.asarray(IDS)[chosen])
    np.testing.assert_array_equal(ids[~chosen], np.asarray(IDS)[~chosen])
    assert ids.dtype == labels.dtype == np.int32


def test_a_key_decides():
    first, again, other = (hide(IDS, NEVER, key=key) for key in (KEY, KEY, jax.random.key(4)))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (np.asarray(first[1]) != np.asarray(other[1])).any()


class Guess(nn.Module):
    """Each position's word, of the mean of all."""

    @nn.compact
    def __call__(self, input_ids, attention_mask):
        x = nn.Embed(WORDS, 4, name="table")(input_ids)
        return nn.Dense(WORDS, name="head")(x + jnp.mean(x, axis=1, keepdims=True))


TEXTS = np.array(RNG.integers(5, WORDS, (8, 12)), np.int32)
TEXTS[:, 0], TEXTS[:, 7], TEXTS[3, 5] = 1, 2, MASK
PADDING = np.ones_like(TEXTS)
PADDING[:, 8:] = 0
BATCH = {"input_ids": TEXTS, "attention_mask": PADDING}
PARAMS = jax.jit(Guess().init)(KEY, TEXTS, PADDING)["params"]
PLAIN = jtl.supervised(Guess(), jtl.losses.per_token(), metrics={"right": jtl.metrics.token_accuracy})
LOSS = augment.masked(PLAIN, mask_id=MASK, vocab_size=WORDS, special_ids=SPECIAL)


def started(tx):
    return jtl.init({"params": PARAMS}, tx, trainable=jtl.everything(), key=KEY)


def test_the_loss_is_that_of_hidden_words():
    special = np.isin(TEXTS, SPECIAL) | (PADDING == 0)
    found, aux = jax.jit(LOSS)(PARAMS, {}, BATCH, key=KEY)
    ids, labels = hide(jnp.array(TEXTS), jnp.array(special), key=jax.random.split(KEY)[0], rate=0.15)
    assert (np.asarray(labels) != IGNORED).any()
    logits = jax.jit(Guess().apply)({"params": PARAMS}, ids, jnp.array(PADDING))
    expected = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.where(labels == IGNORED, 0, labels))
    np.testing.assert_allclose(found, np.asarray(expected)[np.asarray(labels) != IGNORED].mean(), rtol=1e-5)
    assert set(aux.metrics) == {"loss", "right"}


def test_training_hides_others_each_time_and_evaluation_the_same():
    tx = optax.sgd(0.0)
    state, frozen = started(tx)
    reports = list(jtl.fit(LOSS, tx, state, frozen, [BATCH] * 4, held_out=lambda: [BATCH], evaluate_every=1))
    assert len({float(report.metrics["loss"]) for report in reports}) == 4
    assert len({report.evaluation["loss"] for report in reports}) == 1


def test_labels_that_a_batch_has_are_not_read():
    state, frozen = started(optax.identity())
    labelled = {**BATCH, "label": np.full(8, 99, np.int32)}
    checker(LOSS, state, frozen)(labelled)
    np.testing.assert_array_equal(*(jax.jit(LOSS)(PARAMS, {}, batch, key=KEY)[0] for batch in (labelled, BATCH)))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"attention_mask": PADDING}, "lacks 'input_ids'; it has"),
        ({**BATCH, "input_ids": TEXTS + WORDS}, "label .* of example 0 at position 0"),
        ({**BATCH, "attention_mask": np.zeros_like(PADDING)}, "no label of the batch counts"),
    ],
)
def test_batches_that_cannot_be_are_refused(batch, message):
    state, frozen = started(optax.identity())
    with pytest.raises(errors.DataError, match=message):
        checker(LOSS, state, frozen)(batch)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 0.0}, "rate=0.0"),
        ({"rate": 1.5}, "rate=1.5"),
        ({"mask_id": WORDS}, r"ids \[1000\] are outside"),
        ({"special_ids": (0, -1)}, r"ids \[-1\]"),
        ({"loss_fn": lambda *a, key: 0}, "needs a loss function of jtl.supervised"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    given = {"loss_fn": PLAIN, "mask_id": MASK, "vocab_size": WORDS, "special_ids": SPECIAL} | settings
    with pytest.raises(errors.ConfigError, match=message):
        augment.masked(given.pop("loss_fn"), **given)
