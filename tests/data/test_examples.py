import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jtl import errors
from jtl.data.examples import Examples, check, per_class, split, subset, take

quick = settings(max_examples=60, deadline=None)
FRACTIONS = st.sampled_from([(0.5, 0.5), (0.6, 0.1, 0.3), (0.8, 0.1, 0.1), (0.34, 0.33, 0.33)])


def make(labels, groups=None, classes=("a", "b", "c")):
    labels = np.asarray(labels, np.int32)
    columns = {"text": [f"t{i}" for i in range(len(labels))], "row": np.arange(len(labels))}
    return Examples(columns, labels, classes, None if groups is None else np.asarray(groups))


def rows(examples):
    return examples.columns["row"].tolist()


def test_take_keeps_columns_labels_and_groups_together():
    taken = take(make([0, 1, 2], ["x", "y", "z"]), np.array([2, 0, 0]))
    assert taken.columns["text"] == ["t2", "t0", "t0"]
    assert taken.labels.tolist() == [2, 0, 0]
    assert taken.groups.tolist() == ["z", "x", "x"]


@quick
@given(st.lists(st.integers(0, 2), min_size=30, max_size=120), FRACTIONS, st.integers(0, 99))
def test_split_is_disjoint_covers_and_repeats(labels, fractions, seed):
    examples = make(labels)
    parts = split(examples, fractions, seed=seed)
    assert sorted(row for part in parts for row in rows(part)) == list(range(len(labels)))
    assert all(rows(part) == sorted(rows(part)) for part in parts)
    again = split(examples, fractions, seed=seed)
    assert [rows(part) for part in parts] == [rows(part) for part in again]


@quick
@given(st.integers(0, 99))
def test_split_holds_classes_in_proportion(seed):
    examples = make([0] * 60 + [1] * 30 + [2] * 10)
    for part, share in zip(split(examples, (0.6, 0.4), seed=seed), (0.6, 0.4), strict=True):
        counts = np.bincount(part.labels, minlength=3)
        assert np.abs(counts - share * np.array([60, 30, 10])).max() <= 2


def test_another_seed_splits_otherwise():
    examples = make([0, 1] * 50)
    assert rows(split(examples, (0.5, 0.5), seed=0)[0]) != rows(split(examples, (0.5, 0.5), seed=1)[0])


def test_sizes_are_exact():
    assert [part.size for part in split(make([0, 1] * 20), (33, 7), seed=0)] == [33, 7]


@quick
@given(st.lists(st.integers(0, 15), min_size=40, max_size=120), FRACTIONS, st.integers(0, 99))
def test_no_group_is_in_two_parts(group_of, fractions, seed):
    examples = make([0] * len(group_of), [f"g{group}" for group in group_of])
    if len(set(group_of)) < len(fractions):
        with pytest.raises(errors.DataError, match="groups cannot fill"):
            split(examples, fractions, seed=seed)
        return
    parts = split(examples, fractions, seed=seed)
    assert sorted(row for part in parts for row in rows(part)) == list(range(len(group_of)))
    names = [set(part.groups.tolist()) for part in parts]
    assert len(set.union(*names)) == sum(map(len, names))


def test_group_split_meets_the_fractions():
    examples = make([0] * 1000, [f"g{i // 10}" for i in range(1000)])
    sizes = [part.size for part in split(examples, (0.6, 0.1, 0.3), seed=0)]
    assert np.abs(np.array(sizes) - [600, 100, 300]).max() <= 10


def test_by_group_false_ignores_groups():
    parts = split(make([0, 1] * 10, ["one"] * 20), (10, 10), seed=0, by_group=False)
    assert [part.size for part in parts] == [10, 10]


@pytest.mark.parametrize(
    ("parts", "groups", "by_group", "error", "message"),
    [
        ((0.5, 0.6), None, None, errors.ConfigError, "sum to 1.1, not to 1"),
        ((1.0,), None, None, errors.ConfigError, "two or more parts"),
        ((1.0, 0.0), None, None, errors.ConfigError, "above zero"),
        ((3, 2), None, None, errors.ConfigError, "sum to 5, not to 4"),
        ((2, 2), "abab", None, errors.ConfigError, "pass fractions"),
        ((0.5, 0.5), None, True, errors.ConfigError, "have no groups"),
        ((0.99, 0.01), None, None, errors.DataError, "part 1 of the split"),
        ((0.5, 0.5), "aaaa", None, errors.DataError, "1 groups cannot fill 2 parts"),
    ],
)
def test_bad_splits_are_refused(parts, groups, by_group, error, message):
    examples = make([0, 1, 0, 1], None if groups is None else list(groups))
    with pytest.raises(error, match=message):
        split(examples, parts, seed=0, by_group=by_group)


@quick
@given(st.lists(st.integers(0, 2), min_size=10, max_size=80), st.data())
def test_subset_is_exact_nested_and_has_every_class(labels, data):
    examples = make(labels)
    size = data.draw(st.integers(len(set(labels)), len(labels)))
    few = subset(examples, size, seed=3)
    assert few.size == size
    assert set(few.labels) == set(labels)
    assert set(rows(few)) <= set(rows(subset(examples, len(labels), seed=3)))
    assert set(rows(subset(examples, size - 1, seed=3))) < set(rows(few)) if size > 1 else True


def test_subset_of_balanced_classes_is_balanced():
    assert np.bincount(subset(make([0, 1] * 500), 100, seed=5).labels).tolist() == [50, 50]


@pytest.mark.parametrize("size", [0, 5, -1])
def test_subset_size_must_be_available(size):
    with pytest.raises(errors.ConfigError, match="expected 1 to 4"):
        subset(make([0, 1, 0, 1]), size, seed=0)


def test_check_returns_good_examples():
    examples = make([0, 1])
    assert check(examples) is examples


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (make([]), "is empty"),
        (make([1, 1]), "all 2 examples are of the class 'b'"),
        (make([0, 3, -1]), "example 1 has label 3; expected 0 to 2"),
        (make([0, -1]), "example 1 has label -1"),
        (make([0, 1])._replace(labels=np.array([0.0, 1.0])), "labels are float64"),
        (make([0, 1])._replace(columns={"text": ["one"]}), "column 'text' has 1 entries; expected 2"),
        (make([0, 1])._replace(groups=np.array(["g"])), "groups has 1 entries; expected 2"),
        (make([0, 1])._replace(labels=np.zeros((2, 2))), r"labels are float64 .2, 2.; expected 0 and 1 .2, 3."),
        (make([0, 1])._replace(labels=np.full((2, 3), 0.5)), "expected 0 and 1"),
        (make([0, 1])._replace(labels=np.ones((2, 3))), "all 2 examples have the same labels"),
        (make([0, 1], classes=()), "labels are int32"),
        (make([0, 1], classes=())._replace(labels=np.array([0.5, np.inf])), "example 1 has the label inf"),
        (make([0, 1], classes=())._replace(labels=np.array([0.5, -1e39])), "label -1e.39; expected .* float32"),
        (make([0, 1], classes=())._replace(labels=np.array([0.5, 0.5])), "all 2 examples have the label 0.5"),
    ],
)
def test_check_names_what_is_wrong(examples, message):
    with pytest.raises(errors.DataError, match=message):
        check(examples)


@pytest.mark.parametrize(
    "examples",
    [
        make([1, 1]),
        make([0, 1])._replace(labels=np.ones((2, 3))),
        make([0, 1], classes=())._replace(labels=np.array([0.5, 0.5])),
    ],
)
def test_what_is_only_evaluated_may_all_be_alike(examples):
    assert check(examples, held_out=True) is examples


def numbers(count):
    return make(range(count), classes=())._replace(labels=np.linspace(0, 1, count))


def several(count):
    return make(range(count))._replace(labels=np.eye(3, dtype=np.float32)[np.arange(count) % 3])


@pytest.mark.parametrize("examples", [numbers(20), several(20)], ids=["numbers", "several labels"])
def test_examples_without_one_class_each_are_split_at_random(examples):
    parts = split(check(examples), (0.5, 0.25, 0.25), seed=1)
    assert [part.size for part in parts] == [10, 5, 5]
    assert sorted(row for part in parts for row in rows(part)) == list(range(20))
    assert rows(parts[0]) == rows(split(examples, (0.5, 0.25, 0.25), seed=1)[0]) != list(range(10))
    for part in parts:
        assert np.array_equal(part.labels, examples.labels[rows(part)])
    assert set(rows(subset(examples, 5, seed=2))) < set(rows(subset(examples, 9, seed=2)))
    with pytest.raises(errors.ConfigError, match="have not one each"):
        per_class(examples, 2, seed=0)
