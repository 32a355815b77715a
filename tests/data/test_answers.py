import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jtl import errors
from jtl.data import answers, batches

from .tokenizers_by_hand import PIECES, of_bytes, wordpiece

CONTEXT = "New York is bigers a b c d e"


@pytest.fixture(scope="module")
def tokenizer():
    return wordpiece()


def rows(ragged):
    return [[PIECES[i] for i in part] for part in np.split(ragged.values, ragged.offsets[1:-1])]


def logits(windows, *peaks):
    """Zeros but for a begin and an end with a sum of their own in some windows."""
    found = np.zeros((len(windows.example), 2, int(windows.input_ids.lengths.max()) + 3), np.float32)
    for row, begin, end, value in peaks:
        found[row, 0, begin] += value / 2
        found[row, 1, end] += value / 2
    return found


# Windows


def test_windows_hold_the_question_and_the_place_of_the_answer(tokenizer):
    found = answers.windows(tokenizer, ["a ?"], [CONTEXT], [(4, "York is bigers")], max_length=16, stride=2)
    tokens = rows(found.input_ids)
    assert tokens[0] == "[CLS] a ? [SEP] new york is big ##er ##s a b c d e [SEP]".split()
    assert found.span.tolist() == [[5, 9]]
    assert found.token_type_ids.values.tolist() == [0] * 4 + [1] * 12
    assert found.characters[:4].tolist() == [[-1, -1]] * 4
    assert found.characters[7:10].tolist() == [[12, 15], [15, 17], [17, 18]]
    assert found.unreached == 0


def test_a_window_without_the_whole_answer_points_to_the_first_token(tokenizer):
    contexts = ["new york a b c a b c d e"] * 2 + [CONTEXT]
    given = [(contexts[0].index("b c"), "b c"), None, (0, "New York is bigers a b")]
    found = answers.windows(tokenizer, ["a", "b", "c"], contexts, given, max_length=8, stride=3)
    # Windows of four words, each of which begins a word later; the other "b c" is not the place.
    assert [row[3:-1] for row in rows(found.input_ids)[:2]] == ["new york a b".split(), "york a b c".split()]
    first = [(0, 0), (5, 6), (4, 5), (3, 4), (0, 0), (0, 0), (0, 0)]
    assert [tuple(span) for span in found.span[found.example == 0].tolist()] == first
    assert not found.span[found.example > 0].any()
    assert np.bincount(found.example).tolist() == [7, 7, 8]
    assert found.unreached == 1  # eight tokens, of windows with four


def test_an_answer_is_placed_where_it_is_said_to_be(tokenizer):
    found = answers.windows(tokenizer, ["a"], ["a b a b"], [(4, "a ")], max_length=12, stride=0)
    assert found.span.tolist() == [[5, 5]]  # the second "a", without the blank


def test_part_of_a_token_is_answered_by_the_token(tokenizer):
    found = answers.windows(tokenizer, ["a"], [CONTEXT], [(5, "or")], max_length=16, stride=0)
    assert found.span.tolist() == [[4, 4]]


def test_without_answers_there_are_no_spans(tokenizer):
    found = answers.windows(tokenizer, ["a"], [CONTEXT], None, max_length=16, stride=0)
    assert found.span is None
    assert set(found.columns) == {"input_ids", "token_type_ids"}
    found = answers.windows(tokenizer, ["a"], [CONTEXT], None, max_length=16, stride=0, types=False)
    assert set(found.columns) == {"input_ids"}


def test_spans_are_labels_of_batches(tokenizer):
    found = answers.windows(tokenizer, ["a", "a"], ["a b", "b"], [(2, "b"), None], max_length=16, stride=0)
    (batch,) = batches(found.columns, batch_size=2)
    assert batch["label"].tolist() == [[4, 4], [0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0]]


def test_tokenizers_of_bytes_answer_with_whole_characters():
    found = answers.windows(of_bytes(), ["q"], ["an été in"], [(3, "été")], max_length=32, stride=0)
    begin, end = found.span[0].tolist()
    assert answers.best_answers(logits(found, (0, begin, end, 4)), found) == ["été"]


WORDS = ["a", "b", "c", "d", "e", "new", "york", "biger", "zz"]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=20), st.data())
def test_the_labelled_span_gives_the_answer_back(words, data):
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, min(first + 1, len(words) - 1)))
    context = "  ".join(words)
    answer = "  ".join(words[first : last + 1])
    start = len("  ".join(words[:first])) + 2 * bool(first)
    found = answers.windows(wordpiece(), ["a b"], [context], [(start, answer)], max_length=12, stride=4)
    assert found.unreached == 0  # at most four tokens, and so many are in common
    holding = [row for row in range(len(found.example)) if found.span[row].any()]
    peaks = [(row, *found.span[row].tolist(), 6) for row in holding[:1]]
    assert answers.best_answers(logits(found, *peaks), found) == [answer]


# Answers


def test_the_best_span_of_all_windows_is_the_answer(tokenizer):
    found = answers.windows(tokenizer, ["a", "a"], [CONTEXT, "b c"], None, max_length=10, stride=2)
    assert found.example.tolist() == [0, 0, 0, 1]
    values = logits(found, (0, 3, 4, 2), (1, 5, 6, 3), (3, 4, 4, 1))
    assert answers.best_answers(values, found) == ["a b", "c"]
    order = [3, 2, 1, 0]
    assert answers.best_answers(values[order], found, rows=order) == ["a b", "c"]
    assert answers.best_answers([row[:, :10] for row in values], found) == ["a b", "c"]


def test_an_answer_is_in_the_context_in_order_and_short_enough(tokenizer):
    found = answers.windows(tokenizer, ["a"], ["a b c d e"], None, max_length=16, stride=0)
    # [CLS] a [SEP] a b c d e [SEP]: the question, the special tokens and the padding cannot answer.
    outside = logits(found, (0, 0, 0, 9), (0, 1, 1, 9), (0, 8, 8, 9), (0, 10, 10, 9), (0, 4, 5, 4))
    assert answers.best_answers(outside, found) == ["b c"]
    backwards = logits(found, (0, 6, 3, 8), (0, 6, 7, 1))  # from d to a, which is before it; from d to e is next
    assert answers.best_answers(backwards, found) == ["d e"]
    long = logits(found, (0, 3, 6, 8))
    assert answers.best_answers(long, found) == ["a b c d"]
    assert answers.best_answers(long, found, max_answer_length=4) == ["a b c d"]
    assert len(answers.best_answers(long, found, max_answer_length=3)[0].split()) <= 3


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(0, 10_000))
def test_the_answer_is_that_of_a_search_over_all_spans(most, seed):
    found = answers.windows(wordpiece(), ["a ?"], ["a b c d e"], None, max_length=16, stride=0)
    values = np.random.default_rng(seed).normal(size=(1, 2, 10)).astype(np.float32)
    spans = [(i, j) for i in range(4, 9) for j in range(i, min(i + most, 9))]
    begin, end = max(spans, key=lambda span: values[0, 0, span[0]] + values[0, 1, span[1]])
    expected = " ".join("abcde"[begin - 4 : end - 3])
    assert answers.best_answers(values, found, max_answer_length=most) == [expected]


def test_no_answer_where_the_first_token_is_better_by_a_threshold(tokenizer):
    found = answers.windows(tokenizer, ["a"], ["a b c d e a b"], None, max_length=8, stride=0)
    assert len(found.example) == 2
    values = logits(found, (0, 3, 4, 4), (0, 0, 0, 5), (1, 0, 0, 9))
    # The least over the windows, 5, is by 1 better than 4.
    assert answers.best_answers(values, found, threshold=0.5) == [""]
    assert answers.best_answers(values, found, threshold=1.5) == ["a b"]
    assert answers.best_answers(values, found) == ["a b"]


@pytest.mark.parametrize(
    ("answer", "true", "exact", "f1"),
    [
        ("the Cat!", ["cat"], 1, 1),
        ("a cat  sat", ["the cat sat."], 1, 1),
        ("cat sat", ["cat sat down"], 0, 0.8),  # 2 of 2 and 2 of 3
        ("cat cat", ["cat"], 0, 2 / 3),  # 1 of 2 and 1 of 1
        ("dog", ["cat", "hot dog"], 0, 2 / 3),
        ("dog", ["cat"], 0, 0),
        ("", [], 1, 1),
        ("dog", [""], 0, 0),
        ("", ["dog"], 0, 0),
        ("theatre", ["atre"], 0, 0),  # an article is a word
        ("U.S.", ["us"], 1, 1),
        ("", ["the", "Paris"], 0, 0),  # of "the" nothing is left
        ("", ["the", "..."], 1, 1),
    ],
)
def test_scores_are_those_of_squad(answer, true, exact, f1):
    assert answers.exact_match(answer, true) == exact
    assert answers.answer_f1(answer, true) == pytest.approx(f1)


# Refusals


@pytest.mark.parametrize(
    ("questions", "contexts", "given", "message"),
    [
        ([], [], None, "no texts"),
        (["a"], [], None, "0 second texts for 1"),
        (["a", ""], ["b", "b"], None, "question 1 is ''"),
        (["a", "a"], ["b", " "], None, "context 1 is ' '"),
        (["a"], ["b"], [], "0 answers for 1"),
        (["a"], ["b c"], [(1, "c")], "answer 0 is 'c' at character 1, where the context has ' '"),
        (["a"], ["b c"], [(-1, "c")], "answer 0 is 'c' at character -1"),
        (["a"], ["b c"], [(0, "")], "answer 0 is ''"),
        (["a"], ["b c"], [{"text": ["c"], "answer_start": [2]}], r"answer 0 is {.*; expected .*; of a record of SQuAD"),
        (["a"], ["b c"], [(2.0, "c")], r"answer 0 is \(2.0, 'c'\); expected its first character, an integer"),
        (["a"], ["b c"], ["c"], "answer 0 is 'c'; expected"),
        (["a", "a b c d e a b"], ["b", "b"], None, "question 1 has 7 tokens, which leaves 2 for its context.*stride=2"),
    ],
)
def test_bad_rows_are_named(tokenizer, questions, contexts, given, message):
    with pytest.raises(errors.DataError, match=message):
        inspect.unwrap(answers.windows)(tokenizer, questions, contexts, given, max_length=12, stride=2)


def test_sizes_that_cannot_work_are_refused(tokenizer):
    with pytest.raises(errors.ConfigError, match="max_length=3"):
        answers.windows(tokenizer, ["a"], ["a"], None, max_length=3, stride=0)
    with pytest.raises(errors.ConfigError, match="stride=-1"):
        answers.windows(tokenizer, ["a"], ["a"], None, max_length=9, stride=-1)
    found = answers.windows(tokenizer, ["a"], ["a"], None, max_length=9, stride=0)
    with pytest.raises(errors.ConfigError, match="max_answer_length=0"):
        answers.best_answers(logits(found), found, max_answer_length=0)


def test_bad_logits_are_refused(tokenizer):
    found = answers.windows(tokenizer, ["a", "a"], ["a", "b"], None, max_length=9, stride=0)
    refused = [
        (np.zeros((2, 2, 4)), None, r"window 0 are \[2, 4\]; expected \[2, 5 or more\]"),
        (np.full((2, 2, 5), np.nan), None, "window 0 are not finite"),
        (np.zeros((1, 2, 5)), None, "question 1 has no window"),
        (np.zeros((1, 2, 5)), [0, 1], "logits of 1 windows for 2 rows"),
    ]
    for values, order, message in refused:
        with pytest.raises(errors.DataError, match=message):
            inspect.unwrap(answers.best_answers)(values, found, rows=order)
