import collections
import inspect
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jtl import errors
from jtl.data.pipeline import batches
from jtl.data.text import Ragged, ragged

quick = settings(max_examples=40, deadline=None)


@st.composite
def runs(draw, remainders=("pad", "keep")):
    """The arguments of `batches` for rows whose tokens spell out their own number."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=40))
    # Not `ragged`: the suite's type checks sample the items of a list at random, which no strategy may.
    rows, offsets = np.arange(len(lengths)), np.concatenate([[0], np.cumsum(lengths)])
    columns = {"input_ids": Ragged(np.repeat(rows + 1, lengths).astype(np.int32), offsets, pad=-1), "row": rows}
    return columns, {
        "labels": np.arange(len(lengths)) % 3,
        "batch_size": draw(st.integers(1, 9)),
        "seed": draw(st.none() | st.integers(0, 5)),
        "epochs": draw(st.integers(1, 3)),
        "remainder": draw(st.sampled_from(remainders)),
        "buckets": draw(st.sampled_from([None, (12,), (4, 8, 12), (2, 3, 16, 99)])),
        "prefetch": draw(st.sampled_from([0, 2])),
    }


def real(batch):
    return batch["row"][batch["weight"] > 0].tolist()


def same(left, right):
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[key], b[key]) for key in a)


@quick
@given(runs())
def test_every_epoch_holds_each_row_once(run):
    columns, options = run
    data = batches(columns, **options)
    seen = list(data)
    assert len(seen) == len(data) == data.steps_per_epoch * options["epochs"]
    for first in range(0, len(seen), data.steps_per_epoch):
        epoch = seen[first : first + data.steps_per_epoch]
        assert sorted(row for batch in epoch for row in real(batch)) == list(range(len(columns["row"])))


@quick
@given(runs())
def test_a_batch_is_what_its_rows_say(run):
    columns, options = run
    lengths = columns["input_ids"].lengths
    for batch in batches(columns, **options):
        rows = batch["row"]
        size, length = batch["input_ids"].shape
        mask = np.arange(length) < lengths[rows][:, None]
        assert np.array_equal(batch["attention_mask"], mask)
        assert np.array_equal(batch["input_ids"], np.where(mask, rows[:, None] + 1, -1))
        assert np.array_equal(batch["label"], rows % 3)
        assert size == options["batch_size"] or options["remainder"] == "keep"
        assert length in (options["buckets"] or (lengths.max(),))
        assert set(batch["weight"]) <= {0.0, 1.0}
        kinds = {name: array.dtype for name, array in batch.items() if name != "row"}
        assert kinds == {"input_ids": "i4", "attention_mask": "i4", "label": "i4", "weight": "f4"}


@quick
@given(runs())
def test_at_most_one_batch_of_an_epoch_is_incomplete(run):
    columns, options = run
    data = batches(columns, **{**options, "epochs": 1})
    sizes = [int(batch["weight"].sum()) for batch in data]
    assert sum(size < options["batch_size"] for size in sizes) <= 1
    assert len(sizes) == -(-len(columns["row"]) // options["batch_size"])


@quick
@given(runs(("pad", "keep")))
def test_a_row_is_padded_to_one_length_in_all_epochs(run):
    columns, options = run
    lengths = {}
    for batch in batches(columns, **options):
        for row in batch["row"][batch["weight"] > 0]:
            lengths.setdefault(int(row), set()).add(batch["input_ids"].shape[1])
    assert all(len(found) == 1 for found in lengths.values())


@quick
@given(runs(("pad", "keep", "drop")), st.data())
def test_resuming_continues_exactly(run, data):
    columns, options = run
    options["batch_size"] = min(options["batch_size"], len(columns["row"]))
    whole = batches(columns, **options)
    seen = list(whole)
    start = data.draw(st.integers(0, len(seen)))
    same(seen[start:], whole.at(start))
    same(seen[start:], batches(columns, **options, start=start))
    same(seen, whole.at(start).at(0))
    assert len(whole.at(start)) == len(seen) - start


@quick
@given(runs())
def test_shapes_are_known_beforehand(run):
    columns, options = run
    data = batches(columns, **{**options, "epochs": 1})
    assert data.shapes == collections.Counter(batch["input_ids"].shape for batch in data)
    flat = batches({"x": columns["row"]}, batch_size=options["batch_size"], remainder=options["remainder"])
    assert flat.shapes == collections.Counter(batch["x"].shape for batch in flat)


@quick
@given(runs(("pad", "drop")), st.integers(1, 4))
def test_shards_are_disjoint_cover_and_agree_on_shapes(run, count):
    columns, options = run
    if options["remainder"] == "drop" and len(columns["row"]) < options["batch_size"] * count:
        return
    shards = [list(batches(columns, **{**options, "epochs": 1}, shard=(i, count))) for i in range(count)]
    shapes = [[batch["input_ids"].shape for batch in shard] for shard in shards]
    assert all(listed == shapes[0] for listed in shapes)
    found = [row for shard in shards for batch in shard for row in real(batch)]
    assert len(found) == len(set(found))
    dropped = len(columns["row"]) % (options["batch_size"] * count) if options["remainder"] == "drop" else 0
    assert len(found) == len(columns["row"]) - dropped


def test_shards_and_prefetching_do_not_change_the_fingerprint():
    x = {"x": np.arange(20)}
    prints = {batches(x, batch_size=2, shard=(i, 2), prefetch=i, epochs=i + 1).fingerprint for i in range(2)}
    assert len(prints) == 1


def test_fingerprints_tell_runs_apart():
    def tokens(n):
        return {"input_ids": ragged([[1] * (i % 3 + 1) for i in range(n)])}

    labels = np.arange(8) % 2
    variants = [
        batches(tokens(8), labels, batch_size=2, seed=0),
        batches(tokens(8), labels, batch_size=2, seed=1),
        batches(tokens(8), labels, batch_size=2),
        batches(tokens(8), labels, batch_size=4, seed=0),
        batches(tokens(8), labels, batch_size=2, seed=0, shard=(0, 2)),
        batches(tokens(8), labels, batch_size=2, seed=0, remainder="drop"),
        batches(tokens(8), labels, batch_size=2, seed=0, buckets=(2, 4)),
        batches(tokens(8), 1 - labels, batch_size=2, seed=0),
        batches(tokens(7), labels[:7], batch_size=2, seed=0),
        batches({"input_ids": ragged([[1]] * 8)}, labels, batch_size=2, seed=0, buckets=(3,)),
    ]
    assert len({run.fingerprint for run in variants}) == len(variants)


def test_fingerprints_see_the_values():
    def of(array):
        return batches({"x": array}, batch_size=2).fingerprint

    x = np.linspace(0, 1, 600).reshape(300, 2)
    assert of(x) == of(x.copy(order="F"))
    assert (
        len({of(array) for array in (x, x + 1, x.astype(np.float32), np.array(["a", "b"]), np.array(["a", "c"]))}) == 5
    )


def test_order_depends_on_seed_and_epoch():
    def order(**options):
        return [real(batch) for batch in batches({"row": np.arange(64)}, batch_size=8, **options)]

    first = order(seed=0, epochs=2)
    assert first == order(seed=0, epochs=2)
    assert first[:8] == order(seed=0)
    assert first[:8] != first[8:]
    assert first[:8] != order(seed=1)
    assert order() == [list(range(i, i + 8)) for i in range(0, 64, 8)]


def test_buckets_are_mixed_over_an_epoch():
    columns = {"input_ids": ragged([[1] * (4 if i < 64 else 8) for i in range(128)])}
    lengths = [b["input_ids"].shape[1] for b in batches(columns, batch_size=4, seed=0, buckets=(4, 8))]
    assert sorted(lengths) == [4] * 16 + [8] * 16
    assert lengths != sorted(lengths)


def test_filler_rows_repeat_a_real_row():
    *_, last = batches({"row": np.arange(5)}, batch_size=4)
    assert last["row"].tolist() == [4, 4, 4, 4]
    assert last["weight"].tolist() == [1, 0, 0, 0]
    (only,) = batches({"row": np.arange(1)}, batch_size=2, shard=(1, 2))
    assert only["row"].tolist() == [0, 0]
    assert only["weight"].tolist() == [0, 0]


def test_drop_leaves_the_incomplete_batch_out():
    data = batches({"row": np.arange(10)}, batch_size=4, remainder="drop", seed=0, epochs=2)
    assert (len(data), data.steps_per_epoch) == (4, 2)
    assert all(batch["weight"].all() for batch in data)


def test_transform_sees_each_batch():
    data = batches({"path": np.array(["a", "bb"])}, batch_size=2, transform=lambda b: {"n": np.char.str_len(b["path"])})
    assert [batch["n"].tolist() for batch in data] == [[1, 2]]


def test_numbers_are_batched_as_models_take_them():
    """Examples keep them in float64."""
    data = batches({"x": np.arange(2.0), "label": np.array([0.5, 2.0])}, batch_size=2)
    (batch,) = data
    assert (batch["label"].dtype, batch["label"].tolist()) == (np.float32, [0.5, 2.0])


def test_without_labels_there_is_no_label():
    assert [batch.keys() for batch in batches({"x": np.ones((2, 3))}, batch_size=2)] == [{"x", "weight"}]


X = {"x": np.arange(4)}
IDS = {"input_ids": ragged([[1], [1, 2, 3]])}


@pytest.mark.parametrize(
    ("columns", "options", "error", "message"),
    [
        (X, {"batch_size": 0}, errors.ConfigError, "batch_size=0"),
        (X, {"batch_size": 5, "remainder": "drop"}, errors.ConfigError, "leaves no batch: 4 rows"),
        (X, {"shard": (0, 3), "remainder": "drop"}, errors.ConfigError, "leaves no batch"),
        (X, {"remainder": "wrap"}, errors.ConfigError, "expected one of pad, drop, keep"),
        (X, {"remainder": "keep", "shard": (0, 2)}, errors.ConfigError, "different shapes"),
        (X, {"epochs": 0}, errors.ConfigError, "epochs=0"),
        (X, {"prefetch": -1}, errors.ConfigError, "prefetch=-1"),
        (X, {"seed": -1}, errors.ConfigError, "seed=-1"),
        (X, {"shard": (2, 2)}, errors.ConfigError, "expected .i, n. with 0 <= i < n"),
        (X, {"shard": (0, 0)}, errors.ConfigError, "0 shards"),
        (X, {"start": 3}, errors.ConfigError, "start=3: expected 0 to 2"),
        (X, {"buckets": (4,)}, errors.ConfigError, "no column is ragged"),
        (IDS, {"buckets": ()}, errors.ConfigError, "expected lengths of at least 1"),
        (IDS, {"buckets": (0, 4)}, errors.ConfigError, "expected lengths of at least 1"),
        (IDS, {"buckets": (2,)}, errors.DataError, "row 1 has 3 tokens; expected at most 2"),
        ({}, {}, errors.DataError, "no columns"),
        ({"x": np.zeros((0, 3))}, {}, errors.DataError, "is empty"),
        ({"x": np.array([None, 1])}, {}, errors.DataError, "column 'x' is object"),
        ({"x": np.array(1)}, {}, errors.DataError, r"column 'x' is int64 \(\)"),
        ({"x": [1, 2]}, {}, errors.DataError, "column 'x' is a list"),
        ({"weight": np.ones(2)}, {}, errors.ConfigError, "'weight', which the batch makes itself"),
        ({"x": np.ones(2), "y": np.ones(3)}, {}, errors.DataError, "column 'x' 2, column 'y' 3"),
        (X, {"labels": np.arange(3)}, errors.DataError, "column 'x' 4, labels 3"),
        (X, {"labels": np.ones(4)}, errors.DataError, "labels are float64"),
        ({"a": ragged([[1]]), "b": ragged([[1, 2]])}, {}, errors.DataError, "row 0 has 1 values in 'a' and 2 in 'b'"),
        ({"a": ragged([[1], []])}, {}, errors.DataError, "row 1 of 'a' is empty"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(columns, options, error, message):
    with pytest.raises(error, match=message):
        inspect.unwrap(batches)(columns, **{"batch_size": 2, **options})  # past the suite's own type checks


def test_without_grain_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(errors.MissingExtraError, match=r"jtl\[data\]"):
        iter(batches(X, batch_size=2))


def classes_of(run):
    columns, options = run
    return {**options, "labels": np.minimum(options["labels"], len(columns["row"]) - 1), "seed": options["seed"] or 0}


@quick
@given(runs(("pad", "keep", "drop")))
def test_a_balanced_epoch_draws_each_class_equally_often(run):
    columns, options = run
    options = {**classes_of(run), "balance": True}
    labels, rows = options["labels"], len(columns["row"])
    options["batch_size"] = min(options["batch_size"], rows)
    data = batches(columns, **options)
    seen = list(data)
    assert len(seen) == len(data) == data.steps_per_epoch * options["epochs"]
    for first in range(0, len(seen), data.steps_per_epoch):
        drawn = np.array([row for batch in seen[first : first + data.steps_per_epoch] for row in real(batch)])
        dropped = rows % options["batch_size"] if options["remainder"] == "drop" else 0
        assert len(drawn) == rows - dropped
        times = np.bincount(labels[drawn], minlength=labels.max() + 1)
        assert times.max() - times.min() <= 1 + dropped
        for own in range(labels.max() + 1):
            # A row comes again only after all of its class came.
            often = np.bincount(drawn, minlength=rows)[labels == own]
            assert often.max() - often.min() <= 1 + dropped


@quick
@given(runs(("pad", "keep")), st.data())
def test_a_balanced_run_resumes_exactly_and_its_rows_keep_their_labels(run, data):
    columns, options = run
    options = {**classes_of(run), "balance": True}
    whole = batches(columns, **options)
    seen = list(whole)
    start = data.draw(st.integers(0, len(seen)))
    same(seen[start:], whole.at(start))
    same(seen, batches(columns, **options))
    lengths = columns["input_ids"].lengths
    for batch in seen:
        assert np.array_equal(batch["label"], options["labels"][batch["row"]])
        assert (batch["input_ids"].shape[1] >= lengths[batch["row"]]).all()
        assert np.array_equal(batch["attention_mask"].sum(1), lengths[batch["row"]])


def test_balanced_epochs_show_all_of_a_frequent_class_in_time():
    labels = np.array([0] * 90 + [1] * 10)
    data = batches({"row": np.arange(100)}, labels, batch_size=10, seed=0, epochs=8, balance=True)
    epochs = np.array_split(np.concatenate([batch["row"] for batch in data]), 8)
    assert all(np.bincount(labels[rows]).tolist() == [50, 50] for rows in epochs)
    assert any(sorted(epochs[0]) != sorted(rows) for rows in epochs[1:])
    assert len(set(np.concatenate(epochs))) > 95
    other = batches({"row": np.arange(100)}, labels, batch_size=10, seed=0, epochs=8)
    assert data.fingerprint != other.fingerprint


@quick
@given(runs(("pad", "drop")), st.integers(1, 3))
def test_balanced_shards_agree_on_shapes_and_make_up_the_whole(run, count):
    columns, options = run
    options = {**classes_of(run), "balance": True, "epochs": 1}
    if options["remainder"] == "drop" and len(columns["row"]) < options["batch_size"] * count:
        return
    shards = [list(batches(columns, **options, shard=(i, count))) for i in range(count)]
    shapes = [[batch["input_ids"].shape for batch in shard] for shard in shards]
    assert all(listed == shapes[0] for listed in shapes)
    alone = batches(columns, **{**options, "batch_size": options["batch_size"] * count})
    for parts, batch in zip(zip(*shards, strict=True), alone, strict=True):
        assert sorted(row for part in parts for row in real(part)) == sorted(real(batch))


@pytest.mark.parametrize(
    ("labels", "seed", "kind", "message"),
    [
        (None, 0, errors.ConfigError, "labels must be given"),
        ([0, 1, 0, 1], None, errors.ConfigError, "a seed must be given"),
        ([0, 2, 0, 2], 0, errors.DataError, r"classes \[1\] have no row"),
        ([0, -1, 0, 1], 0, errors.DataError, "row 1 has the label -1"),
        ([0.0, 1.5, 2.0, 0.1], 0, errors.DataError, "expected integers"),
    ],
)
def test_what_cannot_be_balanced_is_refused(labels, seed, kind, message):
    labels = None if labels is None else np.array(labels)
    with pytest.raises(kind, match=message):
        batches({"x": np.arange(4)}, labels, batch_size=2, seed=seed, balance=True)
