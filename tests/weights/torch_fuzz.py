"""Mutated and swollen PyTorch files, read in a process of its own; what happened is printed as JSON.

    python -m weights.torch_fuzz mutate SEED COUNT [FILE ...]     mutations of files written by hand and of those named
    python -m weights.torch_fuzz swell                            small files that describe much

A process of its own, so that a crash, a hang or a warning is that of the reader alone, and so that the annotations of
the library need not be checked at each opcode; `--typed` at the end checks them, which takes many times as long.
"""

import base64
import collections
import io
import json
import random
import re
import struct
import sys
import time
import traceback
import tracemalloc
import warnings
from pathlib import Path

from . import torch_bytes as tb
from . import torch_mutations as mutations

TYPED = sys.argv[-1] == "--typed"
if TYPED:
    from jaxtyping import install_import_hook

    install_import_hook("jtl", "beartype.beartype")
    sys.argv.pop()

from jtl.errors import WeightsError  # noqa: E402
from jtl.weights.torch_file import array, arrays, views  # noqa: E402

SAMPLED = 100  # of so many inputs, the memory of one is measured: that is slow


def replay(data: bytes) -> str:
    """Read a file in each way there is.

    Returns:
      `"read"`, or why it was refused.
    """
    file = io.BytesIO(data)
    try:
        found = views(file)
        together = arrays(file, found)
    except WeightsError as error:
        return str(error)
    for name, view in found.items():
        alone = array(file, view)
        assert (alone.shape, alone.dtype.name) == view.signature == (together[name].shape, together[name].dtype.name)
        assert alone.tobytes() == together[name].tobytes()
    return "read"


# Nothing may be imported, compiled, opened or run while a file is read

_EVENTS: list[str] = []
_HARMLESS = {"builtins.id", "object.__getattr__", "sys._getframe"}


def _listen(event, arguments):
    if _EVENTS and event not in _HARMLESS:
        _EVENTS.append(event)


def _watched(data):
    """The outcome and the seconds, where nothing was heard meanwhile."""
    _EVENTS[:] = ["armed"]
    start = time.perf_counter()
    try:
        outcome = replay(data)
    finally:
        seconds = time.perf_counter() - start
        heard, _EVENTS[:] = _EVENTS[1:], []
    assert not heard, heard
    return outcome, seconds


def _peak(data):
    """The most memory that was held at once, numpy's among it."""
    tracemalloc.start()
    replay(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


# The two kinds of input


def mutate(start, count, files):
    """Read mutations, and report how they went."""
    random_ = random.Random(start)
    seeds = [mutations.Seed(data) for data in (*mutations.hand_written(), *files)]
    for seed in seeds:
        assert replay(seed.data) == replay(seed.built(random_, seed.ops)) == "read", replay(seed.data)
    outcomes, slowest, most = collections.Counter(), 0.0, 0.0
    for index in range(count):
        data = mutations.mutated(random_, seeds)
        try:
            outcome, seconds = _watched(data)
            if not index % SAMPLED:
                most = max(most, _peak(data) - 4 * len(data))
        except Exception:
            return {"failure": traceback.format_exc(), "input": base64.b85encode(data).decode()}
        outcomes[re.sub(r"'.*'|\d+|\(.*\)", "#", outcome)[:60]] += 1
        slowest = max(slowest, seconds)
    return {"count": count, "read": outcomes["read"], "kinds": len(outcomes), "slowest": slowest, "memory": most}


# Small files that describe much

_LONG = 200_000


def _swollen():
    """Programs of the same length, each of one thing that takes many times its own length."""

    def filled(start, part, end=b"", batch=1000):
        count = _LONG // len(part)
        return start + b"".join(b"(" + part * min(batch, count - i) + end for i in range(0, count, batch))

    def keyed(value):
        return b"}" + b"".join(
            b"(" + b"".join(tb.text(str(i)) + value for i in range(j, j + 500)) + b"u" for j in range(0, 12000, 500)
        )

    vector = tb.vector("0", 3)
    arguments = tb.group(tb.storage("0", 3), tb.number(0), tb.numbers((3,)), tb.numbers((1,)), tb.FALSE, tb.NONE)
    reference = tb.group(
        tb.text("storage"), tb.name("torch", "FloatStorage"), tb.text("0"), tb.text("cpu"), tb.number(3)
    )
    yield "lists", filled(b"]", b"]", b"e")
    yield "dicts", filled(b"]", b"}", b"e")
    yield "dicts as arguments", filled(b"]", tb.name("collections", "OrderedDict") + b")R", b"e")
    yield "OrderedDicts", b"](" + tb.name("collections", "OrderedDict") + b"q\0e" + filled(b"", b"h\0)R", b"e")
    yield "nested tuples", b")" + b"\x85" * _LONG
    yield "nested lists", b"]q\0" + filled(b"", b"h\0", b"e")
    yield "tuples", filled(b"]", b"NNN\x87", b"e")
    yield "long tuples", b"](" + b"N" * 1000 + b"tq\0" + filled(b"a", b"h\0", b"t" + b"a")
    yield "the memo", b"]" + b"\x94" * _LONG
    yield "the memo, from afar", b"]" + b"".join(b"r" + struct.pack("<I", i) for i in range(_LONG // 5))
    yield "numbers", filled(b"]", b"M\xff\xff", b"e")
    yield "floats", filled(b"]", b"G" + bytes(8), b"e")
    yield "long numbers", filled(b"]", b"\x8a\xff" + b"\x7f" * 255, b"e")
    yield "texts", filled(b"]", b"\x8c\1a", b"e")
    yield "a wide text", tb.text("a" * _LONG + "😀")
    yield "wide texts", filled(b"]", tb.text("a" * 1000 + "😀"), b"e")
    yield "a text that is kept", b"](" + tb.text("a" * 1000) + b"q\0e" + filled(b"", b"h\0", b"e")
    yield "keys", keyed(b"N")
    yield "names of one tensor, read", keyed(b"h\0").replace(b"h\0", vector + b"q\0", 1)
    yield "number keys", b"}" + b"".join(b"J" + struct.pack("<I", i << 14) + b"Ns" for i in range(_LONG // 7))
    colliding = range(2**61 - 1, 2**66, 2**61 - 1)
    yield "number keys that collide", b"}" + b"".join(tb.number(key) + b"Ns" for key in colliding) * 600
    yield "one item again and again", b"}" + b"NNs" * (_LONG // 3)
    yield "tensors", b"](" + tb.name(*tb.REBUILD) + b"q\0" + arguments + b"q\1e" + filled(b"", b"h\0h\1R", b"e")
    yield "references", b"](" + reference + b"q\0e" + filled(b"", b"h\0Q", b"e")
    pairs = b"](" + b"]q\1NaNa" + b"h\1" * 10000 + b"e\x85q\2"
    yield (
        "one list of pairs, often",
        b"](" + tb.name("collections", "OrderedDict") + b"q\0" + pairs + b"e" + filled(b"", b"h\0h\2R", b"e"),
    )
    inner = b"](" + b"N" * 15000 + b"eq\0"
    many = b"".join(
        b"(" + b"".join(tb.text(f"{i}") + b"h\0" for i in range(j, j + 500)) + b"u" for j in range(0, 12000, 500)
    )
    yield "one list in many items", b"}" + tb.text("l") + inner + b"s" + tb.text("w") + vector + b"s" + many
    sizes = b"(" + tb.number(1) * 64 + b"t\x85q\0" + tb.name("torch", "Size") + b"q\1"
    yield "sizes", b"](" + sizes + b"e" + filled(b"", b"h\1h\0R", b"e")
    yield "marks", b"(" * _LONG
    yield "values", b"N" * _LONG


def swell():
    """Read each, and report how it went: bytes, seconds, and the memory at the peak."""
    code = tb.program(tb.mapping({"w": tb.vector("0", 3)}))
    files = {name: tb.zipped(tb.program(body), {"0": bytes(12)}) for name, body in _swollen()}
    short = [tb.Member(f"archive/.{i}", b"") for i in range(4000)]
    files["members"] = tb.archive([*tb.members(code, {"0": bytes(12)}), *short])
    files["members without bodies"] = tb.archive([*tb.members(code, {"0": bytes(12)}), *short], count=2**20)
    long = [
        tb.Member(f"archive/data/{i}", b"", extra=b"\2\0\0\0" * 16000, size=2**32 - 1, packed=2**32 - 1)
        for i in range(9)
    ]
    files["extra fields"] = tb.archive([*tb.members(code, {"0": bytes(12)}), *long])
    report = {}
    for name, data in files.items():
        outcome, seconds = _watched(data)
        report[name] = {"outcome": outcome[:200], "bytes": len(data), "seconds": seconds, "peak": _peak(data)}
    return report


if __name__ == "__main__":
    warnings.simplefilter("error")
    replay(next(mutations.hand_written()))  # numpy imports parts of itself when they are first needed
    if not TYPED:  # the annotations are compiled when they are first needed
        sys.addaudithook(_listen)
    if sys.argv[1] == "swell":
        print(json.dumps(swell()))
    else:
        named = [Path(path).read_bytes() for path in sys.argv[4:]]
        print(json.dumps(mutate(int(sys.argv[2]), int(sys.argv[3]), named)))
