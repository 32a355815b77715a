"""The opcodes of pickle that a dict of tensors is written with; every other one is refused by its name.

The program of a PyTorch file runs on a `Machine` that can neither import nor call. What comes out is dicts, lists,
tuples, text, numbers and the records of `torch_rebuild`. Nothing recurses, and each opcode takes time in proportion
to the values that it takes from the stack, or to the memory that it pays for.
"""

import struct
import sys
from collections.abc import Callable
from typing import Any

from jtl.errors import WeightsError
from jtl.weights import torch_rebuild
from jtl.weights.torch_machine import TENSORS, Machine, Source, decoded
from jtl.weights.torch_rebuild import OPAQUE, Ordered, Storage

_Handler = Callable[[Machine], None]

_STOP = b"."


def run(source: Source) -> tuple[Any, dict[str, Storage]]:
    """Run one pickle program.

    Args:
      source: stands at the program, and afterwards behind it.

    Returns:
      The program's value, and the whole storages that it refers to, by key.

    Raises:
      WeightsError: the program is damaged, or does what no dict of tensors needs.
    """
    machine = Machine(source)
    while (code := source.take(1)) != _STOP:
        handler = _HANDLERS.get(code)
        if handler is None:
            raise _refusal(machine, code)
        handler(machine)
    (value,) = machine.pop(1)
    if machine.stack or machine.marks:
        raise machine.refusal("leaves values behind")
    machine.forget()
    return value, machine.storages


def _refusal(machine: Machine, code: bytes) -> WeightsError:
    name = _REFUSED.get(code)
    if name is None:
        return machine.refusal(f"has the byte 0x{code.hex()} in place of an opcode")
    return machine.refusal(f"has the opcode {name}, which a dict of tensors does not need", TENSORS)


def _protocol(machine: Machine) -> None:
    protocol = machine.source.number(1)
    if not 2 <= protocol <= 5:
        raise machine.refusal(f"is of protocol {protocol}, expected one of 2 to 5")


def _frame(machine: Machine) -> None:
    length = machine.source.number(8)
    if length > machine.source.left:
        raise machine.refusal(f"announces {length} bytes where {machine.source.left} are left")


# Values. The second argument of `push` is what CPython takes for an object of the kind, rounded up.


def _constant(value: object) -> _Handler:
    return lambda machine: machine.push(value)


def _byte(machine: Machine) -> None:
    machine.push(machine.source.number(1))  # CPython has one object for each of these


def _short(machine: Machine) -> None:
    machine.push(machine.source.number(2), 32)


def _signed(machine: Machine) -> None:
    machine.push(int.from_bytes(machine.source.take(4), "little", signed=True), 32)


def _long(machine: Machine) -> None:
    data = machine.source.take(machine.source.number(1))
    machine.push(int.from_bytes(data, "little", signed=True), 32 + 2 * len(data))


def _float(machine: Machine) -> None:
    machine.push(struct.unpack(">d", machine.source.take(8))[0], 32)


def _text(width: int) -> _Handler:
    def handler(machine: Machine) -> None:
        source = machine.source
        length = source.number(width)
        # For a moment there are the bytes beside the text, which may have four bytes for each of them.
        if length <= source.left and 6 * length > source.allowance.left:
            machine.pay(6 * length)
        text = decoded(source.take(length))
        machine.push(text, sys.getsizeof(text) + 16)

    return handler


def _bytes(width: int) -> _Handler:
    def handler(machine: Machine) -> None:
        machine.source.skip(machine.source.number(width))
        machine.push(OPAQUE)

    return handler


def _empty_dict(machine: Machine) -> None:
    machine.push({}, 64)


def _empty_list(machine: Machine) -> None:
    machine.push([], 64)


def _tuple(count: int) -> _Handler:
    return lambda machine: machine.push(tuple(machine.pop(count)), 48 + 8 * count)


def _marked_tuple(machine: Machine) -> None:
    values = machine.marked()
    machine.push(tuple(values), 48 + 8 * len(values))


# Containers


def _append(machine: Machine) -> None:
    _extend(machine, machine.pop(1))


def _appends(machine: Machine) -> None:
    _extend(machine, machine.marked())


def _extend(machine: Machine, values: list[Any]) -> None:
    target = machine.top()
    if type(target) is not list:
        raise machine.refusal("appends to something that is not a list")
    machine.pay(24 * len(values))
    target.extend(values)


def _set_item(machine: Machine) -> None:
    key, value = machine.pop(2)
    torch_rebuild.set_item(machine, machine.top(), key, value)


def _set_items(machine: Machine) -> None:
    values = machine.marked()
    target = machine.top()
    if len(values) % 2:
        raise machine.refusal("sets a key without a value")
    for key, value in zip(values[::2], values[1::2], strict=True):
        torch_rebuild.set_item(machine, target, key, value)


def _build(machine: Machine) -> None:
    """The state of a `state_dict()`: the versions of its modules, under `_metadata`; they are not needed."""
    (state,) = machine.pop(1)
    known = type(state) is dict and len(state) == 1 and "_metadata" in state
    if type(machine.top()) is not Ordered or not known:
        raise machine.refusal("has the opcode BUILD for something other than the metadata of a state dict", TENSORS)


# The memo


def _put(width: int) -> _Handler:
    return lambda machine: machine.keep(machine.source.number(width))


def _memoize(machine: Machine) -> None:
    machine.keep(len(machine.memo))


def _get(width: int) -> _Handler:
    return lambda machine: machine.push(machine.kept(machine.source.number(width)))


# Names and references


def _global(machine: Machine) -> None:
    module = machine.source.line()
    machine.push(torch_rebuild.marker(machine, module, machine.source.line()))


def _stack_global(machine: Machine) -> None:
    module, name = machine.pop(2)
    if type(module) is not str or type(name) is not str:
        raise machine.refusal("asks for a name that is not text")
    machine.push(torch_rebuild.marker(machine, module, name))


def _reduce(machine: Machine) -> None:
    function, arguments = machine.pop(2)
    machine.push(torch_rebuild.apply(machine, function, arguments))


def _reference(machine: Machine) -> None:
    machine.push(torch_rebuild.storage(machine, machine.pop(1)[0]))


_HANDLERS: dict[bytes, _Handler] = {
    b"\x80": _protocol,
    b"\x95": _frame,
    b"(": Machine.mark,
    b"N": _constant(None),
    b"\x88": _constant(True),
    b"\x89": _constant(False),
    b"K": _byte,
    b"M": _short,
    b"J": _signed,
    b"\x8a": _long,
    b"G": _float,
    b"X": _text(4),
    b"\x8c": _text(1),
    b"\x8d": _text(8),
    b"T": _text(4),
    b"U": _text(1),
    b"B": _bytes(4),
    b"C": _bytes(1),
    b"\x8e": _bytes(8),
    b"\x96": _bytes(8),
    b"}": _empty_dict,
    b"]": _empty_list,
    b")": _constant(()),
    b"t": _marked_tuple,
    b"\x85": _tuple(1),
    b"\x86": _tuple(2),
    b"\x87": _tuple(3),
    b"a": _append,
    b"e": _appends,
    b"s": _set_item,
    b"u": _set_items,
    b"b": _build,
    b"q": _put(1),
    b"r": _put(4),
    b"\x94": _memoize,
    b"h": _get(1),
    b"j": _get(4),
    b"c": _global,
    b"\x93": _stack_global,
    b"R": _reduce,
    b"Q": _reference,
}

_REFUSED = {
    b"i": "INST",
    b"o": "OBJ",
    b"\x81": "NEWOBJ",
    b"\x92": "NEWOBJ_EX",
    b"\x82": "EXT1",
    b"\x83": "EXT2",
    b"\x84": "EXT4",
    b"P": "PERSID",
    b"\x97": "NEXT_BUFFER",
    b"\x98": "READONLY_BUFFER",
    b"0": "POP",
    b"1": "POP_MARK",
    b"2": "DUP",
    b"d": "DICT",
    b"l": "LIST",
    b"\x8f": "EMPTY_SET",
    b"\x90": "ADDITEMS",
    b"\x91": "FROZENSET",
    b"g": "GET",
    b"p": "PUT",
    b"I": "INT",
    b"L": "LONG",
    b"\x8b": "LONG4",
    b"F": "FLOAT",
    b"S": "STRING",
    b"V": "UNICODE",
}
