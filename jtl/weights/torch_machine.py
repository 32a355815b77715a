"""The parts that run a pickle program of a PyTorch file: bytes with an end, an allowance of memory, and a stack.

A program is foreign input. Whatever it makes is paid for out of an `Allowance`, and a length is compared with what
is left before anything of that length is read, so that a small file cannot take much memory.
"""

import io
from typing import Any

from jtl.errors import WeightsError

DAMAGED = "the file is damaged, fetch it again"
"""The remedy where a file contradicts itself."""

TENSORS = "save a dict of tensors, model.state_dict(), best as safetensors"
"""The remedy where a file is whole, and holds something else."""

_DEPTH = 16384  # of the stack; torch writes long dicts in pieces of 2,000 values
_SLOT = 20  # bytes of a place in the memo, a list that may be copied as it grows
_NAME = 256  # bytes of a module's name, and of a name in it


class Allowance:
    """The memory that reading a file may still take, in bytes."""

    def __init__(self, left: int) -> None:
        self.left = left

    def pay(self, cost: int) -> None:
        """Take `cost` bytes, or refuse the file."""
        self.left -= cost
        if self.left < 0:
            raise WeightsError(f"what it describes would take several times its own size in memory: {TENSORS}")


class Source:
    """A part of an open file, read from front to back and never past its end."""

    def __init__(self, file: io.BufferedIOBase, start: int, end: int, allowance: Allowance) -> None:
        file.seek(start)
        self._file = file
        self.end = end
        self.left = end - start
        self.allowance = allowance

    @property
    def position(self) -> int:
        """Where in the file the next byte lies."""
        return self.end - self.left

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        self._count(count)
        data = self._file.read(count)
        if len(data) != count:
            raise WeightsError(f"it grew shorter while it was read: {DAMAGED}")
        return data

    def number(self, width: int) -> int:
        """The next `width` bytes as an unsigned integer."""
        return int.from_bytes(self.take(width), "little")

    def skip(self, count: int) -> None:
        """Leave out `count` bytes."""
        self._count(count)
        self._file.seek(self.position)

    def line(self) -> str:
        """The bytes up to the next line end, as text."""
        data = self._file.readline(min(_NAME, self.left))
        self.left -= len(data)
        if not data.endswith(b"\n"):
            raise WeightsError(f"a name in its pickle program has no end, at byte {self.position}: {DAMAGED}")
        return decoded(data[:-1])

    def _count(self, count: int) -> None:
        if count > self.left:
            raise WeightsError(f"{count} bytes are expected at byte {self.position}, found {self.left}: {DAMAGED}")
        self.left -= count


class Machine:
    """The stack of a program, the marks in it, the values kept for later, and the storages that were named."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        self.storages: dict[str, Any] = {}

    def pay(self, cost: int) -> None:
        """Pay for `cost` bytes of memory."""
        self.source.allowance.pay(cost)

    def push(self, value: Any, cost: int = 0) -> None:
        """Put a value on the stack and pay for the memory that it takes."""
        self.pay(cost)
        self._deepen()
        self.stack.append(value)

    def mark(self) -> None:
        """Mark where a tuple, or the items of a container, begin."""
        self._deepen()
        self.marks.append(len(self.stack))

    def pop(self, count: int) -> list[Any]:
        """The last `count` values, in the order in which they came."""
        self._require(count)
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def top(self) -> Any:
        """The last value, which stays."""
        self._require(1)
        return self.stack[-1]

    def marked(self) -> list[Any]:
        """All values since the last mark, which is gone afterwards."""
        if not self.marks:
            raise self.refusal("looks for a mark where there is none")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def keep(self, index: int) -> None:
        """Keep the last value in the memo."""
        value = self.top()
        if index == len(self.memo) + 1:  # the pickler of Python 2 counts from 1
            self.pay(_SLOT)
            self.memo.append(None)
        if index > len(self.memo):
            raise self.refusal(f"keeps a value under {index} when it has kept {len(self.memo)}")
        self.pay(_SLOT)
        self.memo[index : index + 1] = [value]

    def forget(self) -> None:
        """Empty the memo, whose memory may be taken again."""
        self.pay(-_SLOT * len(self.memo))
        self.memo.clear()

    def kept(self, index: int) -> Any:
        """A value of the memo."""
        if index >= len(self.memo):
            raise self.refusal(f"asks for its value {index} when it has kept {len(self.memo)}")
        return self.memo[index]

    def refusal(self, fault: str, remedy: str = DAMAGED) -> WeightsError:
        """An error that says what the program does, and where."""
        return WeightsError(f"its pickle program {fault}, at byte {self.source.position}: {remedy}")

    def _require(self, count: int) -> None:
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < count:
            raise self.refusal("takes a value where there is none")

    def _deepen(self) -> None:
        if len(self.stack) + len(self.marks) >= _DEPTH:
            raise self.refusal("keeps too many values open at once")


def decoded(data: bytes) -> str:
    """Text of a program.

    Args:
      data: UTF-8.

    Raises:
      WeightsError: it is not.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise WeightsError(f"a text in its pickle program is not UTF-8 ({error.reason}): {DAMAGED}") from None


def shown(text: str, limit: int = 80) -> str:
    """Foreign text in quotes, on one line and not too long.

    >>> print(shown("weight"), shown("weight", limit=4))
    'weight' 'weig'...
    """
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}..."
