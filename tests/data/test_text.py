import inspect
import itertools
import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jtl import errors
from jtl.data import text

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=raw, model_input_names=inputs, **names).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return text.tokenizer(folder)


def rows(ragged):
    return [part.tolist() for part in np.split(ragged.values, ragged.offsets[1:-1])]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 9)), min_size=1))
def test_ragged_holds_its_rows(data):
    made = text.ragged(data, pad=3)
    assert rows(made) == data
    assert made.lengths.tolist() == [len(row) for row in data]
    assert (made.values.dtype, made.offsets.dtype, made.pad) == (np.int32, np.int64, 3)


def test_texts_are_encoded_without_padding(tokenizer):
    encoded = text.encode(tokenizer, ["a b", "c", "a b c zebra"], max_length=5)
    assert rows(encoded.input_ids) == [[2, 4, 5, 3], [2, 6, 3], [2, 4, 5, 6, 3]]
    assert rows(encoded.token_type_ids) == [[0] * 4, [0] * 3, [0] * 5]
    assert encoded.truncated == 1
    assert encoded.input_ids.pad == 0


def test_pairs_are_encoded_together(tokenizer):
    encoded = text.encode(tokenizer, ["a", "a"], pairs=["b c", "b"], max_length=8)
    assert rows(encoded.input_ids) == [[2, 4, 3, 5, 6, 3], [2, 4, 3, 5, 3]]
    assert rows(encoded.token_type_ids) == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert encoded.truncated == 0


def test_many_texts_are_encoded_in_order(tokenizer, monkeypatch):
    monkeypatch.setattr(text, "CHUNK", 3)
    texts = ["a " * (i % 5 + 1) for i in range(11)]
    encoded = text.encode(tokenizer, texts, max_length=6)
    assert encoded.input_ids.lengths.tolist() == [min(i % 5 + 3, 6) for i in range(11)]
    assert encoded.truncated == 2


@pytest.mark.parametrize(
    ("texts", "pairs", "max_length", "error", "message"),
    [
        ([], None, 8, errors.DataError, "no texts"),
        (["a", None], None, 8, errors.DataError, r"texts\[1\] is None"),
        (["a"], [3], 8, errors.DataError, r"pairs\[0\] is 3"),
        (["a"], ["b", "c"], 8, errors.DataError, "2 second texts for 1"),
        (["a", "b", ""], None, 8, errors.DataError, "text 2 is '', of which the tokenizer makes no token"),
        ([" \n"], None, 8, errors.DataError, r"text 0 is ' \\n', of which"),
        (["a", ""], ["b", ""], 8, errors.DataError, "text 1 is ''"),
        (["a"], None, 2, errors.ConfigError, "max_length=2: expected above 2"),
        (["a"], ["b"], 3, errors.ConfigError, "max_length=3: expected above 3"),
    ],
)
def test_bad_texts_are_refused(tokenizer, texts, pairs, max_length, error, message):
    with pytest.raises(error, match=message):
        inspect.unwrap(text.encode)(
            tokenizer, texts, pairs=pairs, max_length=max_length
        )  # past the suite's type checks


def test_slow_tokenizers_are_refused():
    with pytest.raises(errors.ConfigError, match="object has no fast"):
        text.encode(object(), ["a"], max_length=8)


def test_a_tokenizer_with_code_of_its_own_is_refused(tmp_path):
    settings = {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(errors.ConfigError, match="never run"):
        text.tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(errors.SourceNotFoundError, match="no such folder"):
        text.tokenizer(tmp_path / "none")
    with pytest.raises(errors.ConfigError, match="cannot load a tokenizer"):
        text.tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(errors.ConfigError, match="cannot load a tokenizer"):
        text.tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(errors.ConfigError, match="not JSON"):
        text.tokenizer(tmp_path)


def test_without_transformers_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(errors.MissingExtraError, match=r"jtl\[text\]"):
        text.tokenizer(folder)


CANDIDATES = (8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128)


def padded(lengths, sizes):
    return sum(min(size for size in sizes if size >= length) for length in lengths)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 128), min_size=1, max_size=40), st.integers(1, 3))
def test_buckets_waste_the_fewest_tokens(lengths, most):
    found = text.buckets(np.array(lengths), max_length=128, max_buckets=most)
    last = next(size for size in CANDIDATES if size >= max(lengths))
    choices = [
        (*chosen, last)
        for count in range(most)
        for chosen in itertools.combinations([s for s in CANDIDATES if s < last], count)
    ]
    assert found in choices
    assert padded(lengths, found) == min(padded(lengths, choice) for choice in choices)


@pytest.mark.parametrize(
    ("lengths", "max_length", "expected"),
    [
        ([3], 128, (8,)),
        ([3], 8, (8,)),
        ([20, 20], 40, (20,)),
        ([33], 40, (40,)),
        ([39], 40, (40,)),
        ([600], 4096, (640,)),
    ],
)
def test_buckets_use_only_what_is_needed(lengths, max_length, expected):
    assert text.buckets(np.array(lengths), max_length=max_length) == expected


def test_bad_lengths_are_refused():
    with pytest.raises(errors.DataError, match="row 1 has 9 tokens"):
        text.buckets(np.array([1, 9]), max_length=8)
    with pytest.raises(errors.DataError, match="no rows"):
        text.buckets(np.array([], int), max_length=8)
    with pytest.raises(errors.ConfigError, match="max_buckets=0"):
        text.buckets(np.array([1]), max_length=8, max_buckets=0)
