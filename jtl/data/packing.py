"""Several texts in one row, so that hardly any of a batch is padding."""

import bisect
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jtl import errors
from jtl.data.text import Ragged, ragged
from jtl.labels import IGNORED


class Plan(NamedTuple):
    """Which part of which text lies where, in P rows of equal length.

    Attributes:
      pieces: int64 `[M, 3]`: the text, its first token, and the one after its last; in the order of the rows.
      offsets: int64 `[P + 1]`: row i has the pieces `offsets[i]:offsets[i + 1]`.
      length: of the rows.
    """

    pieces: np.ndarray
    offsets: np.ndarray
    length: int

    @property
    def waste(self) -> float:
        """The share of padding among all tokens."""
        used = int((self.pieces[:, 2] - self.pieces[:, 1]).sum())
        return 1 - used / ((len(self.offsets) - 1) * self.length)

    @property
    def cut(self) -> int:
        """How many texts were longer than a row, and are in several."""
        return int(np.count_nonzero(np.bincount(self.pieces[:, 0]) > 1))


class Packed(NamedTuple):
    """P rows of L tokens.

    Attributes:
      input_ids: int32 `[P, L]`.
      segment_ids: int32 `[P, L]`: 1, 2, 3, ... for the texts of a row, and 0 for padding.
      position_ids: int32 `[P, L]`, from 0 in each text; 0 for padding.
      label: int32 `[P, L]`, the tokens themselves, for a loss that compares each with what is said one position before
        it; `IGNORED` at the first token of each text, which nothing of that text precedes, and at padding.
      waste: the share of padding.
      cut: how many texts were longer than a row.
    """

    input_ids: np.ndarray
    segment_ids: np.ndarray
    position_ids: np.ndarray
    label: np.ndarray
    waste: float
    cut: int

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """What `jtl.data.batches` takes."""
        return {name: getattr(self, name) for name in ("input_ids", "segment_ids", "position_ids", "label")}


def pack(rows: Ragged | Iterable[Sequence[int]], length: int, *, pad: int = 0) -> Packed:
    """Pack texts into rows of one length.

    Args:
      rows: the tokens of N texts; a text that is longer than a row is split, and a part of it is a text of its own.
      length: tokens of a row.
      pad: what fills a row up, where `rows` does not say.

    Raises:
      ConfigError: `length` is below 2, with which no token would precede another.
      DataError: no texts, or one without a token.

    References:
      Raffel et al, Exploring the limits of transfer learning with a unified text-to-text transformer, JMLR 2020
      (arXiv 1910.10683), section 2.4, for packing; Krell et al, Efficient sequence packing without
      cross-contamination, 2021 (arXiv 2107.02027), for masks and positions that keep texts apart, and for best fit.

    >>> packed = pack([[5, 6, 7], [8, 9], [4]], 4)
    >>> packed.input_ids.tolist(), packed.segment_ids.tolist()
    ([[5, 6, 7, 4], [8, 9, 0, 0]], [[1, 1, 1, 2], [1, 1, 0, 0]])
    """
    rows = rows if isinstance(rows, Ragged) else ragged(rows, pad)
    chosen = plan(rows.lengths, length)
    made = fill(rows, chosen, np.arange(len(chosen.offsets) - 1))
    return Packed(**made, waste=chosen.waste, cut=chosen.cut)


def plan(lengths: np.ndarray, length: int) -> Plan:
    """Choose where each text goes: the longest first, each into the fullest row that still has room for it.

    Args:
      lengths: int `[N]`, tokens of each text.
      length: tokens of a row.

    Raises:
      ConfigError: `length` is below 2.
      DataError: no texts, or one without a token.
    """
    lengths = np.asarray(lengths, np.int64)
    if length < 2:
        raise errors.ConfigError(f"length={length}: expected at least 2, a token and the one that it predicts")
    if not lengths.size or not lengths.min():
        found = f"text {lengths.argmin()} has no token; leave it out" if lengths.size else "there are no texts"
        raise errors.DataError(f"{found}; expected texts to pack")
    pieces = _pieces(lengths, length)
    pieces = pieces[np.argsort(pieces[:, 1] - pieces[:, 2], kind="stable")]
    row_of = _best_fit((pieces[:, 2] - pieces[:, 1]).tolist(), length)
    counts = np.bincount(row_of)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Plan(pieces[np.argsort(row_of, kind="stable")], offsets, length)


def fill(rows: Ragged, plan: Plan, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Some of the rows of a plan; only their tokens are read, as from a corpus that is larger than memory.

    Args:
      rows: the tokens of all texts.
      plan: from `plan(rows.lengths, length)`.
      chosen: int `[B]`, which rows of the plan.

    Returns:
      Arrays `[B, L]` by name, as `Packed` has them.
    """
    shape = len(chosen), plan.length
    ids, segments = np.full(shape, rows.pad, np.int32), np.zeros(shape, np.int32)
    positions, label = np.zeros(shape, np.int32), np.full(shape, IGNORED, np.int32)
    for at, row in enumerate(np.asarray(chosen).tolist()):
        begin = 0
        of_row = plan.pieces[plan.offsets[row] : plan.offsets[row + 1]].tolist()
        for number, (text, first, stop) in enumerate(of_row, start=1):
            place, origin = slice(begin, begin + stop - first), int(rows.offsets[text])
            ids[at, place] = rows.values[origin + first : origin + stop]
            segments[at, place] = number
            positions[at, place] = np.arange(stop - first)
            label[at, begin + 1 : place.stop] = ids[at, begin + 1 : place.stop]
            begin = place.stop
    return {"input_ids": ids, "segment_ids": segments, "position_ids": positions, "label": label}


def segment_mask(segment_ids: Any) -> Any:
    """Which positions may attend to which: those of the same text, and padding to padding.

    Nothing else keeps the texts of a row apart. A causal model's own mask comes on top of it. In `batches` it is best
    made on the device, of `segment_ids`, for it is as large as the scores of the attention.

    Args:
      segment_ids: integers `[B, L]`, an array of numpy or jax.

    Returns:
      bool `[B, L, L]`.

    References:
      Krell et al, Efficient sequence packing without cross-contamination, 2021 (arXiv 2107.02027), section 3.2.

    >>> segment_mask(np.array([[1, 1, 2]]))[0].astype(int).tolist()
    [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """
    return segment_ids[:, :, None] == segment_ids[:, None, :]


def _pieces(lengths: np.ndarray, length: int) -> np.ndarray:
    """Each text in parts of at most `length` tokens, `[M, 3]`."""
    parts = -(-lengths // length)
    text = np.repeat(np.arange(len(lengths)), parts)
    number = np.arange(len(text)) - np.repeat(np.cumsum(parts) - parts, parts)
    first = number * length
    return np.stack([text, first, np.minimum(first + length, lengths[text])], axis=1)


def _best_fit(sizes: list[int], length: int) -> np.ndarray:
    """The row of each size, for sizes in decreasing order."""
    open_rows: list[list[int]] = [[] for _ in range(length + 1)]  # by the room that they have
    rooms: list[int] = []  # those that some row has, in order: there are few, so that a search is short
    found, rows = np.empty(len(sizes), np.int64), 0
    for i, size in enumerate(sizes):
        at = bisect.bisect_left(rooms, size)
        if at == len(rooms):
            row, room, rows = rows, length, rows + 1
        else:
            room = rooms[at]
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms.pop(at)
        found[i], room = row, room - size
        if room:
            if not open_rows[room]:
                bisect.insort(rooms, room)
            open_rows[room].append(row)
    return found
