"""Words with tags as tokens with labels, tags of words from predictions, and scores of the entities that they mark."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jtl import errors
from jtl.data import tables, text
from jtl.data.text import Ragged
from jtl.labels import IGNORED

PREFIXES = {"IOB1": "BI", "IOB2": "BI", "IOBES": "BIES", "BILOU": "BILU"}
"""What stands before an entity's kind, as in B-PER, by scheme; O is outside of any entity."""


class Tagged(NamedTuple):
    """N sentences of words as tokens.

    Attributes:
      input_ids: the tokens, special ones included, padding not.
      label: the class of a word at the first of its tokens, `IGNORED` elsewhere; None where no tags were given.
      word: which word a token is the first one of; -1 at all other tokens.
      counts: int64 `[N]`, words of each sentence.
      truncated: how many sentences were cut to `max_length`.
      lost: how many words were cut off.
    """

    input_ids: Ragged
    label: Ragged | None
    word: Ragged
    counts: np.ndarray
    truncated: int
    lost: int

    @property
    def columns(self) -> dict[str, Ragged]:
        """What `jtl.data.batches` takes."""
        return {"input_ids": self.input_ids} | ({} if self.label is None else {"label": self.label})


class Entity(NamedTuple):
    """A run of words of one kind: those from `begin` up to, not including, `end`."""

    kind: str
    begin: int
    end: int


class Score(NamedTuple):
    """Precision, recall and their harmonic mean, each 0 where it would be 0/0, and the numbers behind them.

    Attributes:
      precision: share of what was predicted that is true.
      recall: share of what is true that was predicted.
      f1: their harmonic mean.
      predicted: how many entities were predicted.
      true: how many there are.
    """

    precision: float
    recall: float
    f1: float
    predicted: int
    true: int


class EntityScores(NamedTuple):
    """Scores over all entities together, and of each kind by its name."""

    overall: Score
    kinds: dict[str, Score]


def encode_words(
    tokenizer: Any,
    sentences: Sequence[Sequence[str]],
    tags: Sequence[Sequence[str | int]] | None,
    *,
    classes: Sequence[str],
    max_length: int,
) -> Tagged:
    """Encode N sentences that are split into words, each word with a tag.

    A word has its label once, at the first of its tokens, as in the first of the references; its other tokens and the
    special ones are not trained on.

    Args:
      tokenizer: a fast Hugging Face tokenizer.
      sentences: the words of each.
      tags: for each word, one of `classes` or its index; None where there are none.
      classes: the names of the tags in order.
      max_length: the most tokens of a sentence, special ones included; what is longer is cut, and counted.

    Raises:
      ConfigError: the tokenizer is not a fast one or cuts on the left, `max_length` leaves no room, or a class is
        there twice.
      DataError: no sentences, one without words, other numbers of tags than words, a tag that is not among the
        classes, or a word of which the tokenizer makes no token; each by sentence and word.

    References:
      Devlin et al, BERT, NAACL 2019 (arXiv 1810.04805), section 5.3.
      Ramshaw and Marcus, Text chunking using transformation-based learning, 1995 (arXiv cmp-lg/9505040), for tags.
    """
    text.check_room(tokenizer, max_length)
    if getattr(tokenizer, "truncation_side", "right") != "right":
        raise errors.ConfigError("the tokenizer cuts on the left, within words; set its truncation_side to 'right'")
    _check_sentences(sentences)
    labels = None if tags is None else _labels(sentences, tags, classes)
    spaced = _spaced(tokenizer)
    ids, firsts, truncated = [], [], 0
    for start in range(0, len(sentences), text.CHUNK):
        rows = [_with_spaces(row) if spaced else list(row) for row in sentences[start : start + text.CHUNK]]
        batch = tokenizer(rows, is_split_into_words=True, truncation=True, max_length=max_length, padding=False)
        ids.append(batch["input_ids"])
        firsts.append([_first_pieces(encoding.word_ids) for encoding in batch.encodings])
        truncated += sum(bool(encoding.overflowing) for encoding in batch.encodings)
        for number, (found, encoding) in enumerate(zip(firsts[-1], batch.encodings, strict=True), start):
            _check_words(number, sentences[number], found, bool(encoding.overflowing))
    word, counts = text.joined(firsts, -1), np.array([len(row) for row in sentences], np.int64)
    lost = int(counts.sum() - np.count_nonzero(word.values >= 0))
    label = None if labels is None else _label(word, labels, counts)
    return Tagged(text.joined(ids, text.padding(tokenizer)), label, word, counts, truncated, lost)


def of_words(
    predictions: Sequence[np.ndarray] | np.ndarray,
    tagged: Tagged,
    *,
    classes: Sequence[str],
    rows: Sequence[int] | np.ndarray | None = None,
    outside: str = "O",
) -> list[list[str]]:
    """A tag for each word, from predictions for tokens.

    Args:
      predictions: for each of these sentences, the class of each token, integers `[L]`; L may be padded.
      tagged: the sentences, as `encode_words` gives them.
      classes: the names of the tags in order.
      rows: which sentences these are; by default the first, the second and so on.
      outside: the tag of words that were cut off.

    Raises:
      DataError: fewer predictions than tokens, or one that is no class.
    """
    rows = np.arange(len(predictions)) if rows is None else np.asarray(rows)
    if len(rows) != len(predictions):
        raise errors.DataError(f"{len(predictions)} rows of predictions for {len(rows)} sentences; expected as many")
    found = []
    for row, predicted in zip(rows.tolist(), predictions, strict=True):
        word = tagged.word.values[tagged.word.offsets[row] : tagged.word.offsets[row + 1]]
        chosen = _chosen(row, np.asarray(predicted), word, len(classes))
        names = [outside] * int(tagged.counts[row])
        for at, label in zip(word[word >= 0].tolist(), chosen.tolist(), strict=True):
            names[at] = classes[label]
        found.append(names)
    return found


def entities(tags: Sequence[str], scheme: Literal["IOB1", "IOB2", "IOBES", "BILOU"] = "IOB2") -> list[Entity]:
    """The entities that a sentence's tags mark.

    Tags that break the scheme, as a model may predict them, are read as the CoNLL shared tasks read them: an entity
    begins wherever one goes on that had not begun.

    Args:
      tags: of each word, such as B-PER, I-PER and O.
      scheme: how they are written.

    Raises:
      DataError: a tag that the scheme does not have.

    References:
      Tjong Kim Sang and De Meulder, Introduction to the CoNLL-2003 shared task, 2003 (arXiv cs/0306050).

    >>> entities(["B-PER", "I-PER", "O", "I-LOC"])
    [Entity(kind='PER', begin=0, end=2), Entity(kind='LOC', begin=3, end=4)]
    """
    if scheme not in PREFIXES:
        raise errors.ConfigError(f"scheme={scheme!r}: expected one of {', '.join(PREFIXES)}")
    found: list[Entity] = []
    going_on = False
    for at, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-")
        if prefix not in ("O", *PREFIXES[scheme]) or (prefix == "O" and kind):
            raise errors.DataError(f"the tag {tag!r} of word {at} is not one of {scheme}; expected O, B-..., I-...")
        if prefix == "O":
            going_on = False
        elif prefix in "BSU" or not going_on or found[-1].kind != kind:
            found.append(Entity(kind, at, at + 1))
        else:
            found[-1] = found[-1]._replace(end=at + 1)
        going_on = prefix in ("B", "I")
    return found


def entity_scores(
    true: Sequence[Sequence[str]],
    predicted: Sequence[Sequence[str]],
    scheme: Literal["IOB1", "IOB2", "IOBES", "BILOU"] = "IOB2",
    *,
    match: Literal["strict", "exact", "partial", "ent_type"] = "strict",
) -> EntityScores:
    """Precision, recall and F1 of entities, not of words.

    Args:
      true: the tags of each sentence's words.
      predicted: likewise.
      scheme: how tags are written; see `entities`.
      match: "strict" counts an entity of the same words and kind, as CoNLL does; "exact" one of the same words;
        "partial" counts half an entity where words overlap; "ent_type" one of the same kind where words overlap. These
        are the measures of SemEval 2013.

    Raises:
      DataError: no sentences, different numbers of sentences or words, or a tag that the scheme does not have.
      MissingExtraError: nervaluate is not installed.

    References:
      Segura-Bedmar et al, SemEval-2013 task 9, 2013.
    """
    _check_pairs(true, predicted)
    try:
        from nervaluate import Evaluator
    except ImportError as error:
        raise errors.missing_extra("nervaluate", "text") from error
    parts = [[_plain(sentence, row, scheme) for row, sentence in enumerate(part)] for part in (true, predicted)]
    kinds = sorted({entity["label"] for part in parts for sentence in part for entity in sentence})
    found = Evaluator(parts[0], parts[1], tags=kinds, loader="dict").evaluate()
    if match not in found["overall"]:
        raise errors.ConfigError(f"match={match!r}: expected one of {', '.join(found['overall'])}")
    scores = {kind: _score(found["entities"][kind][match]) for kind in kinds}
    return EntityScores(_score(found["overall"][match]), scores)


def _score(found: Any) -> Score:
    return Score(float(found.precision), float(found.recall), float(found.f1), found.actual, found.possible)


def _plain(tags: Sequence[str], row: int, scheme: Any) -> list[dict[str, Any]]:
    """Entities as nervaluate takes them: with their last word."""
    try:
        found = entities(tags, scheme)
    except errors.DataError as error:
        raise errors.DataError(f"sentence {row}: {error}") from error
    return [{"label": entity.kind, "start": entity.begin, "end": entity.end - 1} for entity in found]


def _check_pairs(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> None:
    if not len(true) or len(true) != len(predicted):
        raise errors.DataError(
            f"{len(predicted)} predicted sentences for {len(true)} true ones; expected as many, and at least one"
        )
    for row, (left, right) in enumerate(zip(true, predicted, strict=True)):
        if len(left) != len(right):
            raise errors.DataError(f"sentence {row} has {len(left)} words and {len(right)} predicted tags")


def _check_sentences(sentences: Sequence[Sequence[str]]) -> None:
    if not len(sentences):
        raise errors.DataError("there are no sentences to encode; expected at least one")
    for row, words in enumerate(sentences):
        if isinstance(words, str):
            raise errors.DataError(f"sentence {row} is a string; expected a list of its words")
        if not len(words):
            raise errors.DataError(f"sentence {row} has no words; leave it out")
        for at, word in enumerate(words):
            if not isinstance(word, str) or not word.strip():
                raise errors.DataError(f"word {at} of sentence {row} is {word!r}; expected a string that is not empty")


def _labels(sentences: Sequence[Sequence[str]], tags: Sequence[Any], classes: Sequence[str]) -> np.ndarray:
    """The classes of all words, end to end."""
    if len(tags) != len(sentences):
        raise errors.DataError(f"{len(tags)} rows of tags for {len(sentences)} sentences; expected as many")
    index = {name: i for i, name in enumerate(classes)}
    if len(index) != len(classes):
        raise errors.ConfigError(f"classes {', '.join(classes)}: a name is there twice; expected distinct names")
    found = []
    for row, (words, given) in enumerate(zip(sentences, tags, strict=True)):
        if isinstance(given, str) or not hasattr(given, "__len__"):
            raise errors.DataError(f"the tags of sentence {row} are {given!r}; expected a list, a tag for each word")
        if len(words) != len(given):
            raise errors.DataError(f"sentence {row} has {len(words)} words and {len(given)} tags; expected as many")
        for at, tag in enumerate(given):
            label = index.get(tag, -1) if isinstance(tag, str) else _index(tag)
            if not 0 <= label < len(classes):
                hint = tables.nearest(tag, classes) if isinstance(tag, str) else f", or 0 to {len(classes) - 1}"
                raise errors.DataError(
                    f"the tag {tag!r} of word {at} of sentence {row}, {words[at]!r}, is not a class; expected "
                    f"{', '.join(classes)}{hint}"
                )
            found.append(label)
    return np.array(found, np.int32)


def _index(tag: Any) -> int:
    """A tag that is an index, or -1: 1.7, True or NaN are none, though `int` would take some of them."""
    return int(tag) if isinstance(tag, (int, np.integer)) and not isinstance(tag, bool) else -1


def _spaced(tokenizer: Any) -> bool:
    """Whether words need the space before them, as tokenizers of bytes do that were trained on whole sentences."""
    words = ["the", "the"]
    plain = tokenizer(" ".join(words), truncation=False)["input_ids"]
    split = [tokenizer(list(given), is_split_into_words=True)["input_ids"] for given in (words, _with_spaces(words))]
    return plain != split[0] and plain == split[1]


def _with_spaces(words: Sequence[str]) -> list[str]:
    return [word if at == 0 else f" {word}" for at, word in enumerate(words)]


def _first_pieces(word_ids: Iterable[int | None]) -> list[int]:
    """The word at the first of its tokens, -1 elsewhere."""
    found, last = [], None
    for word in word_ids:
        found.append(-1 if word is None or word == last else word)
        last = last if word is None else word
    return found


def _check_words(row: int, words: Sequence[str], first: Sequence[int], cut: bool) -> None:
    """Whether each word has a token, but for those that were cut off."""
    present = [word for word in first if word >= 0]
    expected = range(max(present, default=-1) + 1 if cut else len(words))
    missing = sorted(set(expected) - set(present))
    if missing or not present:
        at = missing[0] if missing else 0
        raise errors.DataError(
            f"word {at} of sentence {row} is {words[at]!r}, of which the tokenizer makes no token; leave it out, or "
            "write its unknown token in its place"
        )


def _label(word: Ragged, labels: np.ndarray, counts: np.ndarray) -> Ragged:
    begin = np.repeat(np.cumsum(counts) - counts, word.lengths)
    at = np.where(word.values >= 0, begin + word.values, 0)
    return Ragged(np.where(word.values >= 0, labels[at], np.int32(IGNORED)), word.offsets, IGNORED)


def _chosen(row: int, predicted: np.ndarray, word: np.ndarray, classes: int) -> np.ndarray:
    """The predictions for the first tokens of a sentence's words."""
    if predicted.ndim != 1 or len(predicted) < len(word) or not np.issubdtype(predicted.dtype, np.integer):
        raise errors.DataError(
            f"the predictions for sentence {row} are {predicted.dtype}{list(predicted.shape)}; expected a class for "
            f"each of its {len(word)} tokens"
        )
    chosen = predicted[: len(word)][word >= 0]
    wrong = np.flatnonzero((chosen < 0) | (chosen >= classes))
    if wrong.size:
        raise errors.DataError(f"a prediction for sentence {row} is {chosen[wrong[0]]}; expected 0 to {classes - 1}")
    return chosen
