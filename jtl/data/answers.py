"""Extractive question answering: windows of contexts with the place of the answer, and the answers that logits give."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jtl import errors
from jtl.data import text
from jtl.data import windows as jwindows
from jtl.data.text import Ragged


class Windows(NamedTuple):
    """W windows of the contexts of N questions, each with its question before it.

    Attributes:
      input_ids: the tokens of each window, special ones included, padding not.
      token_type_ids: 0 for the question and 1 for the context, or as the tokenizer tells them apart; or None.
      span: int32 `[W, 2]`, the positions of the answer's first and last token; both 0, the position of the token
        [CLS], where the window does not hold the whole answer. None where no answers were given.
      example: int64 `[W]`, which question a window is of.
      characters: int32 `[total, 2]`, where each token begins and ends in its context; -1 for tokens that are not of the
        context.
      contexts: the N contexts.
      unreached: how many answers are in no window, being longer than what windows have in common.
    """

    input_ids: Ragged
    token_type_ids: Ragged | None
    span: np.ndarray | None
    example: np.ndarray
    characters: np.ndarray
    contexts: Sequence[str]
    unreached: int

    @property
    def columns(self) -> dict[str, Ragged | np.ndarray]:
        """What `jtl.data.batches` takes."""
        types = {} if self.token_type_ids is None else {"token_type_ids": self.token_type_ids}
        return {"input_ids": self.input_ids, **types} | ({} if self.span is None else {"label": self.span})


def windows(
    tokenizer: Any,
    questions: Sequence[str],
    contexts: Sequence[str],
    answers: Sequence[tuple[int, str] | None] | None,
    *,
    max_length: int,
    stride: int,
    types: bool | None = None,
) -> Windows:
    """Encode N questions with their contexts, each context as so many overlapping windows as it needs.

    Args:
      tokenizer: a fast Hugging Face tokenizer.
      questions: N questions.
      contexts: the texts that answer them.
      answers: the first character of each answer in its context, and its text; None for a question that the context
        does not answer. None instead of all of them where they are not known.
      max_length: the most tokens of a window, question and special ones included.
      stride: how many tokens of the context a window has in common with the one before it.
      types: whether to tell question and context apart by `token_type_ids`, which models of BERT's kind need and
        others do not take; by default where the tokenizer says that its model does.

    Raises:
      ConfigError: the tokenizer is not a fast one, or `max_length` leaves no room beside the special tokens.
      DataError: no questions, other numbers of contexts or answers, an empty question or context, an answer that is
        not at its place, or a question that leaves no room for more than `stride` tokens; each by its row.

    References:
      Devlin et al, BERT, NAACL 2019 (arXiv 1810.04805), section 4.2.
    """
    text.check_room(tokenizer, max_length, pair=True)
    text.check_texts(questions, contexts)
    types = "token_type_ids" in tokenizer.model_input_names if types is None else types
    places = None if answers is None else _places(contexts, answers)
    _check_questions(tokenizer, questions, max_length, stride)
    ids, of_type, characters, spans, owners, unreached = [], [], [], [], [], 0
    given = jwindows.overflowing(tokenizer, questions, contexts, max_length=max_length, stride=stride)
    for start, encodings in given:
        for row, found in enumerate(encodings, start):
            ofs = [_characters(window) for window in found]
            if not (ofs[0] >= 0).any():
                raise errors.DataError(f"context {row} is {contexts[row]!r:.60}, of which there is no token")
            placed = [(0, 0) if places is None else _span(chars, places[row]) for chars in ofs]
            unreached += places is not None and places[row] is not None and not any(map(any, placed))
            characters += ofs
            spans += placed
            owners += [row] * len(found)
        ids.append([window.ids for found in encodings for window in found])
        of_type.append([window.type_ids for found in encodings for window in found])
    return Windows(
        input_ids=text.joined(ids, text.padding(tokenizer)),
        token_type_ids=text.joined(of_type, 0) if types else None,
        span=None if places is None else np.array(spans, np.int32),
        example=np.array(owners, np.int64),
        characters=np.concatenate(characters),
        contexts=contexts,
        unreached=unreached,
    )


def best_answers(
    logits: np.ndarray | Sequence[np.ndarray],
    windows: Windows,
    *,
    max_answer_length: int = 30,
    threshold: float | None = None,
    rows: Sequence[int] | np.ndarray | None = None,
) -> list[str]:
    """The text in each question's context whose begin and end have the largest sum of logits.

    All spans of the context's tokens that are not too long are compared, over all windows of a question.

    Args:
      logits: for each window, `[2, L]` floats, for the begin and for the end; L may be padded.
      windows: as `windows` gives them.
      max_answer_length: the most tokens of an answer.
      threshold: "" is the answer where the sum at position 0, the least over the windows, is larger than the best
        span's by more than this. None where each question has an answer.
      rows: which windows these are; by default the first, the second and so on.

    Returns:
      N texts.

    Raises:
      ConfigError: `max_answer_length` is below 1.
      DataError: logits of another shape or not finite, or a question without a window.

    References:
      Rajpurkar et al, SQuAD, EMNLP 2016 (arXiv 1606.05250); Devlin et al, BERT, NAACL 2019, section 4.3, for questions
      without an answer.
    """
    if max_answer_length < 1:
        raise errors.ConfigError(f"max_answer_length={max_answer_length}: expected at least 1")
    rows = np.arange(len(logits)) if rows is None else np.asarray(rows)
    if len(rows) != len(logits):
        raise errors.DataError(f"logits of {len(logits)} windows for {len(rows)} rows; expected as many")
    best: dict[int, tuple[float, str]] = {}
    none: dict[int, float] = {}
    for row, values in zip(rows.tolist(), logits, strict=True):
        example = int(windows.example[row])
        characters = windows.characters[windows.input_ids.offsets[row] : windows.input_ids.offsets[row + 1]]
        found = _checked(row, np.asarray(values, np.float32), len(characters))
        score, begin, end = _best(found, characters[:, 0] >= 0, max_answer_length)
        none[example] = min(none.get(example, np.inf), float(found[0, 0] + found[1, 0]))
        if example not in best or score > best[example][0]:
            answer = windows.contexts[example][characters[begin, 0] : characters[end, 1]].strip()
            best[example] = score, answer
    missing = sorted(set(range(len(windows.contexts))) - set(best))
    if missing:
        raise errors.DataError(f"question {missing[0]} has no window among the logits; expected all of its windows")
    found = [(*best[i], none[i]) for i in range(len(windows.contexts))]
    return ["" if threshold is not None and no - score > threshold else answer for score, answer, no in found]


def exact_match(answer: str, true: Sequence[str]) -> float:
    """1 if an answer equals a true one after SQuAD's normalisation, else 0.

    Case, punctuation, the articles a, an and the, and white space make no difference.

    Args:
      answer: what was predicted.
      true: the true answers; none, or "", where the question has none. Beside others, one of which nothing is left
        does not count.

    References:
      Rajpurkar et al, SQuAD, EMNLP 2016 (arXiv 1606.05250), section 6.1, and the evaluation of SQuAD 2.

    >>> exact_match("The Eiffel tower.", ["Eiffel Tower", "a tower"])
    1.0
    """
    return float(any(_words(answer) == one for one in _true(true)))


def answer_f1(answer: str, true: Sequence[str]) -> float:
    """F1 of an answer's words, the most over the true answers, after SQuAD's normalisation.

    Args:
      answer: what was predicted.
      true: the true answers; none, or "", where the question has none. Beside others, one of which nothing is left
        does not count.

    References:
      Rajpurkar et al, SQuAD, EMNLP 2016 (arXiv 1606.05250), section 6.1, and the evaluation of SQuAD 2.

    >>> round(answer_f1("in Paris, France", ["Paris"]), 6)
    0.5
    """
    return max(_f1(_words(answer), one) for one in _true(true))


def _true(answers: Sequence[str]) -> list[list[str]]:
    """The words of each true answer that has any, as SQuAD 2 evaluates; of no answer where none has."""
    return [words for words in map(_words, answers) if words] or [[]]


def _f1(left: list[str], right: list[str]) -> float:
    if not left or not right:
        return float(left == right)
    return 2 * (Counter(left) & Counter(right)).total() / (len(left) + len(right))


def _words(answer: str) -> list[str]:
    bare = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _places(contexts: Sequence[str], answers: Sequence[Any]) -> list[tuple[int, int] | None]:
    """The first character of each answer, and the one after its last, without blanks around it."""
    if len(answers) != len(contexts):
        raise errors.DataError(f"{len(answers)} answers for {len(contexts)} contexts; expected as many")
    found: list[tuple[int, int] | None] = []
    for row, (context, answer) in enumerate(zip(contexts, answers, strict=True)):
        if answer is None:
            found.append(None)
            continue
        start, given = _place(row, answer)
        there = context[max(0, start) : max(0, start) + len(given)]
        if not given.strip() or start < 0 or there != given:
            raise errors.DataError(
                f"answer {row} is {given!r:.60} at character {start}, where the context has {there!r:.60}; "
                "expected the place of the answer, or None for no answer"
            )
        begin = start + len(given) - len(given.lstrip())
        found.append((begin, begin + len(given.strip())))
    return found


def _place(row: int, answer: Any) -> tuple[int, str]:
    """An answer's first character and its text."""
    start, given = answer if isinstance(answer, (tuple, list)) and len(answer) == 2 else (None, None)
    if isinstance(start, bool) or not isinstance(start, (int, np.integer)) or not isinstance(given, str):
        record = "; of a record of SQuAD, its answer_start[0] and text[0]" if isinstance(answer, dict) else ""
        raise errors.DataError(
            f"answer {row} is {answer!r:.80}; expected its first character, an integer, and its text, or None for no "
            f"answer{record}"
        )
    return int(start), given


def _check_questions(tokenizer: Any, questions: Sequence[str], max_length: int, stride: int) -> None:
    """Whether each question leaves room for a window of its context."""
    if stride < 0:
        raise errors.ConfigError(f"stride={stride}: expected 0 or more")
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
    for start in range(0, len(questions), text.CHUNK):
        part = list(questions[start : start + text.CHUNK])
        for row, ids in enumerate(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"], start):
            if not ids:
                raise errors.DataError(f"question {row} is {questions[row]!r:.60}, of which there is no token")
            if room - len(ids) <= stride:
                raise errors.DataError(
                    f"question {row} has {len(ids)} tokens, which leaves {max(0, room - len(ids))} for its context in "
                    f"max_length={max_length}; expected more than stride={stride}"
                )


def _characters(window: Any) -> np.ndarray:
    """Where each token of a window lies in the context, `[L, 2]`."""
    found = np.array(window.offsets, np.int32).reshape(-1, 2)
    of_context = np.array([part == 1 for part in window.sequence_ids], bool)
    return np.where(of_context[:, None], found, np.int32(-1))


def _span(characters: np.ndarray, place: tuple[int, int] | None) -> tuple[int, int]:
    """The first and the last token of an answer, or twice 0 where the window does not hold all of it."""
    context = np.flatnonzero(characters[:, 0] >= 0)
    if place is None or not context.size:
        return 0, 0
    begin, end = place
    if begin < characters[context[0], 0] or end > characters[context[-1], 1]:
        return 0, 0
    first = context[characters[context, 1] > begin][0]
    last = context[characters[context, 0] < end][-1]
    return (int(first), int(last)) if first <= last else (0, 0)


def _checked(row: int, logits: np.ndarray, length: int) -> np.ndarray:
    if logits.ndim != 2 or logits.shape[0] != 2 or logits.shape[1] < length:
        raise errors.DataError(f"the logits of window {row} are {list(logits.shape)}; expected [2, {length} or more]")
    if not np.isfinite(logits[:, :length]).all():
        raise errors.DataError(f"the logits of window {row} are not finite")
    return logits[:, :length]


def _best(logits: np.ndarray, of_context: np.ndarray, most: int) -> tuple[float, int, int]:
    """The largest sum over the spans of at most so many tokens: its value, begin and end."""
    most = min(most, len(of_context))
    begin, end = np.where(of_context, logits, -np.inf)
    later = np.concatenate([end, np.full(most - 1, -np.inf, end.dtype)])
    sums = begin[:, None] + np.lib.stride_tricks.sliding_window_view(later, most)
    first, length = divmod(int(sums.argmax()), most)
    return float(sums[first, length]), first, first + length
