import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jtl import errors
from jtl.data import batches, text, windows

from .tokenizers_by_hand import PIECES, wordpiece


@pytest.fixture(scope="module")
def tokenizer():
    return wordpiece()


def rows(ragged):
    return [" ".join(PIECES[i] for i in part) for part in np.split(ragged.values, ragged.offsets[1:-1])]


def test_a_long_text_becomes_windows_that_share_a_stride(tokenizer):
    found = windows.encode(tokenizer, ["a b c d e", "new york"], max_length=5, stride=1)
    assert rows(found.input_ids) == ["[CLS] a b c [SEP]", "[CLS] c d e [SEP]", "[CLS] new york [SEP]"]
    assert found.text.tolist() == [0, 0, 1]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.sampled_from("abcde"), min_size=1, max_size=20), min_size=1, max_size=4), st.integers(0, 3))
def test_windows_cover_each_text_once_but_for_what_they_share(data, stride):
    tokenizer = wordpiece()
    found = windows.encode(tokenizer, [" ".join(row) for row in data], max_length=6, stride=stride)
    texts = [row.split()[1:-1] for row in rows(found.input_ids)]
    for i, row in enumerate(data):
        first, *others = [t for t, owner in zip(texts, found.text, strict=True) if owner == i]
        assert first + [word for other in others for word in other[stride:]] == row
        assert all(len(other) > stride for other in others)


def test_many_texts_are_cut_in_order(tokenizer, monkeypatch):
    texts = ["a b c d e", "a", "b c d e a b", "c"]
    whole = windows.encode(tokenizer, texts, max_length=5)
    monkeypatch.setattr(windows, "CHUNK", 3)
    parts = windows.encode(tokenizer, texts, max_length=5)
    assert rows(parts.input_ids) == rows(whole.input_ids)
    assert parts.text.tolist() == whole.text.tolist() == [0, 0, 1, 2, 2, 3]


def test_windows_train_as_rows_with_the_labels_of_their_texts(tokenizer):
    found = windows.encode(tokenizer, ["a b c d", "e"], max_length=5)
    labels = np.array([1, 0])
    (batch,) = batches({"input_ids": found.input_ids}, labels[found.text], batch_size=3)
    assert batch["label"].tolist() == [1, 1, 0]


def test_the_mean_is_over_the_windows_of_each_text():
    logits = np.array([[1, 2], [0, 8], [3, 4], [5, 0]], np.float32)
    found = windows.mean(logits, np.array([0, 1, 0, 0]), 2)
    assert found.tolist() == [[3, 2], [0, 8]]
    assert found.dtype == np.float32
    assert windows.mean(np.array([1.0, 3.0]), np.array([0, 0]), 1).tolist() == [2]


@pytest.mark.parametrize(
    ("outputs", "owners", "count", "message"),
    [
        (np.zeros((2, 2)), [0], 1, "2 outputs for 1 windows"),
        (np.zeros((2, 2)), [0, 2], 3, "text 1 has no window"),
        (np.zeros((2, 2)), [0, 3], 2, "a window is of text 3"),
    ],
)
def test_outputs_that_are_not_of_the_windows_are_refused(outputs, owners, count, message):
    with pytest.raises(errors.DataError, match=message):
        windows.mean(outputs, np.array(owners), count)


@pytest.mark.parametrize(
    ("texts", "sizes", "error", "message"),
    [
        ([], {"max_length": 5}, errors.DataError, "no texts"),
        (["a", " "], {"max_length": 5}, errors.DataError, "text 1 is ' ', of which the tokenizer makes no token"),
        (["a", 3], {"max_length": 5}, errors.DataError, r"texts\[1\] is 3"),
        (["a"], {"max_length": 2}, errors.ConfigError, "max_length=2"),
        (["a"], {"max_length": 5, "stride": 3}, errors.ConfigError, "stride=3: expected 0 to 2"),
        (["a"], {"max_length": 5, "stride": -1}, errors.ConfigError, "stride=-1"),
    ],
)
def test_bad_texts_and_sizes_are_refused(tokenizer, texts, sizes, error, message):
    with pytest.raises(error, match=message):
        inspect.unwrap(windows.encode)(tokenizer, texts, **sizes)


def test_cutting_leaves_no_trace_in_the_tokenizer(tokenizer):
    windows.encode(tokenizer, ["a b c d e"], max_length=4, stride=1)
    assert text.encode(tokenizer, ["a b c d e"], max_length=9).input_ids.lengths.tolist() == [7]
