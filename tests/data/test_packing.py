import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jtl import errors
from jtl.data import batches, packing, ragged
from jtl.labels import IGNORED

X = IGNORED
TEXTS = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=25), min_size=1, max_size=12)


def segments(packed):
    """The tokens of each text of each row."""
    return [
        packed.input_ids[i][packed.segment_ids[i] == number].tolist()
        for i in range(len(packed.input_ids))
        for number in range(1, packed.segment_ids[i].max() + 1)
    ]


def test_texts_are_packed_as_worked_out_by_hand():
    packed = packing.pack([[1, 2], [3, 4, 5, 6], [7, 8, 9], [10]], 5, pad=50)
    # Longest first: 4 opens a row, 3 another, 2 fits into that alone, 1 goes where it fits best.
    assert packed.input_ids.tolist() == [[3, 4, 5, 6, 10], [7, 8, 9, 1, 2]]
    assert packed.segment_ids.tolist() == [[1, 1, 1, 1, 2], [1, 1, 1, 2, 2]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1]]
    assert packed.label.tolist() == [[X, 4, 5, 6, X], [X, 8, 9, X, 2]]
    assert (packed.waste, packed.cut) == (0.0, 0)


def test_padding_is_counted_and_nowhere_a_target():
    packed = packing.pack([[1, 2, 3], [4, 5]], 4, pad=9)
    assert packed.input_ids.tolist() == [[1, 2, 3, 9], [4, 5, 9, 9]]
    assert packed.segment_ids.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert packed.label.tolist() == [[X, 2, 3, X], [X, 5, X, X]]
    assert packed.waste == pytest.approx(3 / 8)


def test_a_long_text_is_split():
    packed = packing.pack([list(range(1, 12))], 4)
    assert packed.input_ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 0]]
    assert packed.label[:, 0].tolist() == [X, X, X]
    assert packed.cut == 1


@settings(deadline=None)
@given(TEXTS, st.integers(2, 12))
def test_each_token_is_there_once_in_its_order(texts, length):
    packed = packing.pack(texts, length)
    parts = [text[i : i + length] for text in texts for i in range(0, len(text), length)]
    assert sorted(segments(packed)) == sorted(parts)
    used = sum(map(len, texts))
    assert packed.waste == pytest.approx(1 - used / packed.input_ids.size)
    assert packed.cut == sum(len(text) > length for text in texts)


@settings(deadline=None)
@given(TEXTS, st.integers(2, 12))
def test_a_target_is_predicted_from_its_own_text(texts, length):
    packed = packing.pack(texts, length)
    for ids, segment, position, label in zip(*packed.columns.values(), strict=True):
        for t in range(length):
            inside = t > 0 and segment[t] and segment[t] == segment[t - 1]
            assert label[t] == (ids[t] if inside else X)
            assert position[t] == (position[t - 1] + 1 if inside else 0)


@settings(deadline=None, max_examples=30)
@given(TEXTS, st.integers(2, 12))
def test_a_position_may_attend_to_its_own_text_alone(texts, length):
    packed = packing.pack(texts, length)
    mask = packing.segment_mask(packed.segment_ids)
    assert mask.any(axis=2).all()  # a softmax over nothing would be NaN
    for allowed, segment in zip(mask, packed.segment_ids, strict=True):
        assert np.array_equal(allowed, [[segment[s] == segment[t] for t in range(length)] for s in range(length)])


@settings(deadline=None)
@given(TEXTS, st.integers(2, 12))
def test_no_two_rows_would_fit_into_one(texts, length):
    packed = packing.pack(texts, length)
    filled = np.sort((packed.segment_ids > 0).sum(axis=1))
    assert len(filled) == 1 or filled[0] + filled[1] > length


def test_rows_of_a_plan_are_filled_as_they_are_needed():
    rows = ragged([[1, 2, 3], [4, 5], [6], [7, 8, 9, 10, 11]], pad=0)
    plan, packed = packing.plan(rows.lengths, 4), packing.pack(rows, 4)
    data = batches(
        {"row": np.arange(len(plan.offsets) - 1)},
        batch_size=2,
        transform=lambda batch: packing.fill(rows, plan, batch["row"]) | {"weight": batch["weight"]},
    )
    found = list(data)
    for name, column in packed.columns.items():
        assert np.concatenate([batch[name] for batch in found])[: len(column)].tolist() == column.tolist()


@pytest.mark.parametrize(
    ("rows", "length", "error", "message"),
    [
        ([], 4, errors.DataError, "no texts"),
        ([[1], []], 4, errors.DataError, "text 1 has no token"),
        ([[1]], 1, errors.ConfigError, "length=1"),
    ],
)
def test_what_cannot_be_packed_is_refused(rows, length, error, message):
    with pytest.raises(error, match=message):
        packing.pack(rows, length)
