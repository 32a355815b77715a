import inspect
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jtl import errors
from jtl.data import batches, tagging
from jtl.labels import IGNORED

from .tokenizers_by_hand import PIECES, of_bytes, wordpiece

CLASSES = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
X = IGNORED


@pytest.fixture(scope="module")
def tokenizer():
    return wordpiece()


def rows(ragged):
    return [part.tolist() for part in np.split(ragged.values, ragged.offsets[1:-1])]


# Words to tokens


def test_a_word_has_its_label_at_its_first_piece_alone(tokenizer):
    sentences = [["New", "York", "is", "bigers"], ["a", "bigs"]]
    tags = [["B-LOC", "I-LOC", "O", 3], ["O", "B-PER"]]
    tagged = tagging.encode_words(tokenizer, sentences, tags, classes=CLASSES, max_length=16)
    pieces = [[PIECES[i] for i in row] for row in rows(tagged.input_ids)]
    assert pieces[0] == ["[CLS]", "new", "york", "is", "big", "##er", "##s", "[SEP]"]
    assert pieces[1] == ["[CLS]", "a", "big", "##s", "[SEP]"]
    assert rows(tagged.label) == [[X, 1, 2, 0, 3, X, X, X], [X, 0, 3, X, X]]
    assert rows(tagged.word) == [[-1, 0, 1, 2, 3, -1, -1, -1], [-1, 0, 1, -1, -1]]
    assert tagged.counts.tolist() == [4, 2]
    assert (tagged.truncated, tagged.lost) == (0, 0)


def test_words_that_are_cut_off_are_counted(tokenizer):
    sentences = [["a", "bigers", "b", "c"], ["a", "b"]]
    tagged = tagging.encode_words(tokenizer, sentences, [["O"] * 4, ["O"] * 2], classes=CLASSES, max_length=5)
    assert rows(tagged.input_ids)[0] == [2, 10, 7, 8, 3]  # big ##er of bigers
    assert rows(tagged.label) == [[X, 0, 0, X, X], [X, 0, 0, X]]
    assert (tagged.truncated, tagged.lost) == (1, 2)


def test_without_tags_there_are_no_labels(tokenizer):
    tagged = tagging.encode_words(tokenizer, [["a"]], None, classes=CLASSES, max_length=5)
    assert tagged.label is None
    assert set(tagged.columns) == {"input_ids"}


def test_batches_pad_labels_with_what_losses_leave_out(tokenizer):
    sentences = [["a", "b", "c"], ["a"]]
    tagged = tagging.encode_words(tokenizer, sentences, [["O", "B-LOC", "O"], ["B-PER"]], classes=CLASSES, max_length=8)
    (batch,) = batches(tagged.columns, batch_size=2)
    assert batch["label"].tolist() == [[X, 0, 1, 0, X], [X, 3, X, X, X]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch["label"].dtype == np.int32


def test_tokenizers_of_bytes_see_the_spaces_that_sentences_have():
    tokenizer = of_bytes()
    tagged = tagging.encode_words(tokenizer, [["ab", "c"]], [[0, 1]], classes=("x", "y"), max_length=8)
    assert rows(tagged.input_ids) == [tokenizer("ab c")["input_ids"]]
    assert rows(tagged.label) == [[0, X, 1, X]]  # a, b, the space and c


def test_many_sentences_are_encoded_in_order(tokenizer, monkeypatch):
    sentences = [["a", "b", "bigers"][: i % 3 + 1] for i in range(7)]
    tags = [[(i + k) % 5 for k in range(len(row))] for i, row in enumerate(sentences)]
    whole = tagging.encode_words(tokenizer, sentences, tags, classes=CLASSES, max_length=8)
    monkeypatch.setattr("jtl.data.text.CHUNK", 2)
    parts = tagging.encode_words(tokenizer, sentences, tags, classes=CLASSES, max_length=8)
    assert rows(whole.label) == rows(parts.label)
    assert [[label for label in row if label != X] for row in rows(parts.label)] == tags


# Tokens to words

WORDS = st.sampled_from(["a", "b", "bigers", "newyork", "new"])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.tuples(WORDS, st.sampled_from(CLASSES)), min_size=1, max_size=6), min_size=1, max_size=4))
def test_labels_as_predictions_give_the_tags_back(data):
    tokenizer = wordpiece()
    sentences, tags = [[w for w, _ in row] for row in data], [[t for _, t in row] for row in data]
    tagged = tagging.encode_words(tokenizer, sentences, tags, classes=CLASSES, max_length=64)
    length = int(tagged.input_ids.lengths.max()) + 2
    predictions = np.full((len(data), length), 4)  # wrong wherever no word begins
    for i, row in enumerate(rows(tagged.label)):
        predictions[i, : len(row)] = np.where(np.array(row) == X, 4, row)
    assert tagging.of_words(predictions, tagged, classes=CLASSES) == tags
    order = list(range(len(data)))[::-1]
    found = tagging.of_words(predictions[order], tagged, classes=CLASSES, rows=order)
    assert found == tags[::-1]


def test_words_that_were_cut_off_are_outside(tokenizer):
    tagged = tagging.encode_words(tokenizer, [["a", "b", "c"]], None, classes=CLASSES, max_length=4)
    found = tagging.of_words(np.array([[0, 1, 2, 0]]), tagged, classes=CLASSES)
    assert found == [["B-LOC", "I-LOC", "O"]]


@pytest.mark.parametrize(
    ("predictions", "rows", "message"),
    [
        (np.zeros((1, 2), int), None, "sentence 0 are int64.2.; expected a class for each of its 4 tokens"),
        (np.zeros((1, 4)), None, "sentence 0 are float64"),
        (np.full((1, 4), 5), None, "for sentence 0 is 5; expected 0 to 4"),
        (np.zeros((1, 4), int), [0, 1], "1 rows of predictions for 2"),
    ],
)
def test_bad_predictions_are_refused(tokenizer, predictions, rows, message):
    tagged = tagging.encode_words(tokenizer, [["a", "b"]], None, classes=CLASSES, max_length=8)
    with pytest.raises(errors.DataError, match=message):
        tagging.of_words(predictions, tagged, classes=CLASSES, rows=rows)


# Entities

PARSED = [
    ("IOB2", "O O", []),
    ("IOB2", "B-A I-A B-A", [("A", 0, 2), ("A", 2, 3)]),
    ("IOB2", "B-A I-B O I-B", [("A", 0, 1), ("B", 1, 2), ("B", 3, 4)]),
    ("IOB1", "I-A I-A B-A O", [("A", 0, 2), ("A", 2, 3)]),
    ("IOBES", "S-A B-A I-A E-A O", [("A", 0, 1), ("A", 1, 4)]),
    ("IOBES", "B-A E-A I-A", [("A", 0, 2), ("A", 2, 3)]),
    ("BILOU", "U-A U-A B-B L-B", [("A", 0, 1), ("A", 1, 2), ("B", 2, 4)]),
    ("IOB2", "B-a-b I-a-b", [("a-b", 0, 2)]),
]


@pytest.mark.parametrize(("scheme", "tags", "expected"), PARSED)
def test_tags_mark_entities(scheme, tags, expected):
    assert [tuple(entity) for entity in tagging.entities(tags.split(), scheme)] == expected


# Three true entities, of which one is found, one has other words and one another kind; and one is made up.
TRUE = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "O", "O"]]
FOUND = [["B-PER", "I-PER", "O", "B-PER"], ["B-LOC", "I-LOC", "B-PER"]]


def test_scores_are_those_worked_out_by_hand():
    scores = tagging.entity_scores(TRUE, FOUND)
    assert scores.overall == (1 / 4, 1 / 3, pytest.approx(2 / 7), 4, 3)
    assert scores.kinds["PER"] == (1 / 3, 1.0, 0.5, 3, 1)
    assert scores.kinds["LOC"] == (0.0, 0.0, 0.0, 1, 2)
    # The same words whatever the kind: 2 of 4 and of 3. Half for the one whose words overlap.
    assert tagging.entity_scores(TRUE, FOUND, match="exact").overall[:2] == (2 / 4, pytest.approx(2 / 3))
    assert tagging.entity_scores(TRUE, FOUND, match="partial").overall[:2] == (2.5 / 4, pytest.approx(2.5 / 3))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.tuples(*[st.sampled_from(CLASSES)] * 2), min_size=1), min_size=1, max_size=4))
def test_strict_scores_count_what_both_sets_of_entities_have(data):
    true, found = [[t for t, _ in row] for row in data], [[p for _, p in row] for row in data]
    sets = [{(i, *e) for i, row in enumerate(part) for e in tagging.entities(row)} for part in (true, found)]
    score, both = tagging.entity_scores(true, found).overall, len(sets[0] & sets[1])
    assert (score.true, score.predicted) == (len(sets[0]), len(sets[1]))
    assert score.precision == pytest.approx(both / max(1, len(sets[1])))
    assert score.recall == pytest.approx(both / max(1, len(sets[0])))
    assert score.f1 == pytest.approx(2 * both / max(1, len(sets[0]) + len(sets[1])))


@pytest.mark.parametrize(
    ("true", "found", "message"),
    [
        ([], [], "at least one"),
        ([["O"]], [], "0 predicted sentences for 1"),
        ([["O", "O"]], [["O"]], "sentence 0 has 2 words and 1"),
        ([["O"], ["E-A"]], [["O"], ["O"]], "sentence 1: the tag 'E-A' of word 0 is not one of IOB2"),
        ([["PER"]], [["O"]], "the tag 'PER' of word 0"),
        ([["O-PER"]], [["O"]], "the tag 'O-PER'"),
    ],
)
def test_bad_tags_are_refused(true, found, message):
    with pytest.raises(errors.DataError, match=message):
        tagging.entity_scores(true, found)


def test_schemes_and_matches_are_named():
    with pytest.raises(errors.ConfigError, match="scheme='IOB3'"):
        inspect.unwrap(tagging.entities)(["O"], "IOB3")
    with pytest.raises(errors.ConfigError, match="match='loose': expected one of strict"):
        inspect.unwrap(tagging.entity_scores)([["O"]], [["O"]], match="loose")


def test_without_nervaluate_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nervaluate", None)
    with pytest.raises(errors.MissingExtraError, match=r"jtl\[text\]"):
        tagging.entity_scores([["O"]], [["O"]])


# Refusals


@pytest.mark.parametrize(
    ("sentences", "tags", "message"),
    [
        ([], [], "no sentences"),
        (["a b"], [["O"]], "sentence 0 is a string"),
        ([["a"], []], [["O"], []], "sentence 1 has no words"),
        ([["a", " "]], [["O", "O"]], "word 1 of sentence 0 is ' '"),
        ([["a", "\u200b"]], [["O", "O"]], "word 1 of sentence 0 is '.u200b', of which the tokenizer makes no token"),
        ([["a", "b"]], [["O"]], "sentence 0 has 2 words and 1 tags"),
        ([["a"]], [["O"], ["O"]], "2 rows of tags for 1"),
        ([["a"]], [["B-LOCK"]], "'B-LOCK' of word 0 of sentence 0, 'a', is not a class.*did you mean 'B-LOC'"),
        ([["a"]], [[5]], "the tag 5 of word 0 of sentence 0"),
        ([["a"]], [[-1]], "the tag -1 of word 0"),
        ([["a", "b"]], [[0, None]], "the tag None of word 1 of sentence 0"),
        ([["a", "b"]], [[0, ["O"]]], r"the tag \['O'\] of word 1"),
        ([["a", "b"]], [[0, float("nan")]], "the tag nan of word 1"),
        ([["a", "b"]], [[0, 1.7]], "the tag 1.7 of word 1"),
        ([["a", "b"]], [[0, True]], "the tag True of word 1"),
        ([["a"]], [None], "the tags of sentence 0 are None"),
        ([["a", "b"]], ["OO"], "the tags of sentence 0 are 'OO'"),
    ],
)
def test_bad_sentences_are_refused_by_row_and_word(tokenizer, sentences, tags, message):
    with pytest.raises(errors.DataError, match=message):
        inspect.unwrap(tagging.encode_words)(tokenizer, sentences, tags, classes=CLASSES, max_length=8)


def test_tokenizers_that_cannot_work_are_refused(tokenizer, monkeypatch):
    with pytest.raises(errors.ConfigError, match="max_length=2"):
        tagging.encode_words(tokenizer, [["a"]], None, classes=CLASSES, max_length=2)
    with pytest.raises(errors.ConfigError, match="no fast"):
        tagging.encode_words(object(), [["a"]], None, classes=CLASSES, max_length=8)
    with pytest.raises(errors.ConfigError, match="classes O, O: a name is there twice"):
        tagging.encode_words(tokenizer, [["a"]], [["O"]], classes=("O", "O"), max_length=8)
    monkeypatch.setattr(tokenizer, "truncation_side", "left")
    with pytest.raises(errors.ConfigError, match="cuts on the left"):
        tagging.encode_words(tokenizer, [["a"]], None, classes=CLASSES, max_length=8)
