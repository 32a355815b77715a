"""The names in a pickle program of a PyTorch file, and what their application means for a dict of tensors.

A name finds an inert `Marker` in a literal table or is refused; nothing is imported, and nothing that a file names
is ever called. What torch would rebuild becomes a `Tensor` record that says where in which storage its elements lie.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jtl.errors import WeightsError
from jtl.weights.torch_machine import TENSORS, Machine, shown

UNTYPED = "V1"
"""The dtype of bytes. A storage of them may lie beside tensors, but none is read from it."""

DTYPES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16).name,  # importing ml_dtypes makes numpy know the name
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.ComplexFloatStorage": "complex64",
    "torch.storage.UntypedStorage": UNTYPED,
}
"""The numpy name of each storage's dtype."""

_LARGEST = 2**63  # sizes, strides and offsets lie below
_DIMENSIONS = 64  # of a tensor, in torch and in numpy
_METADATA = 6  # the place of flags, and of the dtype, among the arguments of a tensor


class Marker(NamedTuple):
    """One of the names below, standing for something that is never imported."""

    name: str


class Opaque(NamedTuple):
    """A value that no tensor needs, dropped as it was read."""


OPAQUE = Opaque()


class Storage(NamedTuple):
    """A run of elements in the file, or a part of one."""

    key: str
    dtype: str

    numel: int
    """Elements of the whole run."""

    first: int
    """The first element of this part."""

    count: int
    """Elements of this part."""

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole run."""
        return self.numel * self.itemsize


class Tensor(NamedTuple):
    """Where the elements of a tensor lie; the offset and the strides are counted in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Ordered(dict[str | None, Any]):
    """An `OrderedDict` of a program."""

    __slots__ = ()


def marker(machine: Machine, module: str, name: str) -> Marker:
    """What stands for a name.

    Args:
      machine: stops at the name.
      module: its module.
      name: the name in it.

    Raises:
      WeightsError: a dict of tensors does not need it.
    """
    full = f"{module}.{name}"
    found = _MARKERS.get(full)
    if found is None:
        raise _foreign(machine, full)
    return found


def apply(machine: Machine, function: Any, arguments: Any) -> Any:
    """What the application of a name to a tuple stands for.

    Args:
      machine: stops behind the application.
      function: a marker that stands for a function.
      arguments: a tuple.

    Raises:
      WeightsError: it is neither of those, or the arguments do not describe a tensor.
    """
    rebuild = _FUNCTIONS.get(function.name) if type(function) is Marker else None
    if rebuild is None or type(arguments) is not tuple:
        raise machine.refusal("applies something that is not a function of tensors", TENSORS)
    return rebuild(machine, arguments)


def set_item(machine: Machine, target: Any, key: Any, value: Any) -> None:
    """Set an item of a dict of the program.

    Only text is hashed. A dict fed with chosen integers can take quadratic time, and the hash of nested tuples can
    exhaust the C stack; no tensor is asked for by such a key. The item is dropped, but a tensor stays under None,
    where it cannot be overlooked.
    """
    if type(target) is not dict and type(target) is not Ordered:
        raise machine.refusal("sets an item of something that is not a dict")
    if type(key) is not str:
        if type(value) is not Tensor:
            return
        key = None
    elif key in target:
        raise machine.refusal(f"sets the key {shown(key)} twice")
    machine.pay(72)
    target[key] = value


def storage(machine: Machine, reference: Any) -> Storage:
    """The storage that a program refers to.

    Args:
      machine: stops behind the reference, and learns the storage.
      reference: `("storage", type, key, device, elements)`, in the legacy layout with None or the part that is
        meant, `(key of the part, first element, elements)`.

    Raises:
      WeightsError: it is not of this form, or contradicts an earlier reference.
    """
    if type(reference) is not tuple or not 5 <= len(reference) <= 6 or not _is(reference[0], "storage"):
        raise machine.refusal("refers to something that is not a storage", TENSORS)
    kind, key, _, numel = reference[1:5]
    dtype = DTYPES.get(kind.name) if type(kind) is Marker else None
    if dtype is None or type(key) is not str or not _natural(numel):
        raise machine.refusal("refers to a storage without a type, a key and a size")
    machine.pay(272)  # with its places in two dicts
    whole = Storage(key, dtype, numel, 0, numel)
    if machine.storages.setdefault(key, whole) != whole:
        raise machine.refusal(f"refers to the storage {shown(key)} with two types or sizes")
    return whole if len(reference) == 5 else _part(machine, whole, reference[5])


def _part(machine: Machine, whole: Storage, part: Any) -> Storage:
    if part is None:
        return whole
    if type(part) is not tuple or len(part) != 3 or not (_natural(part[1]) and _natural(part[2])):
        raise machine.refusal("refers to a part of a storage that has no first element and no size")
    if part[1] + part[2] > whole.numel:
        raise machine.refusal(f"refers to a part that leads past the end of the storage {shown(whole.key)}")
    return whole._replace(first=part[1], count=part[2])


def _ordered(machine: Machine, arguments: tuple[Any, ...]) -> Ordered:
    items = arguments[0] if len(arguments) == 1 else []  # Python 2 gives the items here, others set them later
    if len(arguments) > 1 or type(items) is not list:
        raise machine.refusal("makes an OrderedDict of something that is not a list of pairs")
    machine.pay(64 + 24 * len(items))
    found = Ordered()
    for pair in items:
        if type(pair) is not list or len(pair) != 2:
            raise machine.refusal("makes an OrderedDict of something that is not a list of pairs")
        set_item(machine, found, pair[0], pair[1])
    return found


def _size(machine: Machine, arguments: tuple[Any, ...]) -> tuple[int, ...]:
    return _naturals(machine, arguments[0] if arguments else None)


def _device(machine: Machine, arguments: tuple[Any, ...]) -> Opaque:
    return OPAQUE


def _parameter(machine: Machine, arguments: tuple[Any, ...]) -> Tensor:
    if not arguments or type(arguments[0]) is not Tensor:
        raise machine.refusal("makes a parameter of something that is not a tensor")
    return arguments[0]


def _tensor_v2(machine: Machine, arguments: tuple[Any, ...]) -> Tensor:
    if len(arguments) > _METADATA and arguments[_METADATA]:
        fault = "has a tensor that is the conjugate or the negative of its storage"
        raise machine.refusal(fault, "save tensor.resolve_conj().resolve_neg()")
    return _tensor(machine, arguments)


def _tensor_v3(machine: Machine, arguments: tuple[Any, ...]) -> Tensor:
    dtype = arguments[_METADATA] if len(arguments) > _METADATA else None
    name = shown(dtype.name) if type(dtype) is Marker else "without a name"
    raise machine.refusal(f"has a tensor whose dtype {name} is not read", f"cast it, and {TENSORS}")


def _tensor(machine: Machine, arguments: tuple[Any, ...]) -> Tensor:
    if len(arguments) < 4 or type(arguments[0]) is not Storage or arguments[0].dtype == UNTYPED:
        raise machine.refusal("makes a tensor of something that is not a storage with a type")
    held, offset = arguments[:2]
    shape, strides = _naturals(machine, arguments[2]), _naturals(machine, arguments[3])
    if not _natural(offset) or len(shape) != len(strides):
        raise machine.refusal("makes a tensor whose offset, sizes and strides do not fit each other")
    if math.prod(max(size, 1) for size in shape) >= _LARGEST // 16:
        raise machine.refusal(f"makes a tensor of shape {shape}, which no memory holds")
    steps = ((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    end = 0 if 0 in shape else offset + 1 + sum(steps)  # the offset of an empty tensor means nothing
    if end > held.count:
        fault = f"makes a tensor of shape {shape} with strides {strides} at {offset} that leads past the end"
        raise machine.refusal(f"{fault} of the storage {shown(held.key)}, which has {held.count} elements")
    machine.pay(80)
    return Tensor(held, offset, shape, strides)


def _naturals(machine: Machine, value: Any) -> tuple[int, ...]:
    """Sizes or strides as they are, if that is what they are."""
    if type(value) is not tuple or len(value) > _DIMENSIONS or not all(map(_natural, value)):
        raise machine.refusal(f"has sizes or strides that are not at most {_DIMENSIONS} natural numbers")
    machine.pay(8 * len(value))  # no new memory, but so the time to look at them is bounded too
    return value


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is(value: Any, text: str) -> bool:
    return type(value) is str and value == text


def _foreign(machine: Machine, full: str) -> WeightsError:
    """The error for a name without a marker."""
    if (reason := _REASONS.get(full)) is not None:
        return machine.refusal(f"has {reason} ({full}), which are not read", TENSORS)
    if full.startswith("torch.") and full.endswith("Storage"):
        return machine.refusal(
            f"has tensors over a {shown(full)}, whose dtype is not read", f"cast them, and {TENSORS}"
        )
    # The class of a whole model is the first name in its program; in the legacy layout "module" comes before it.
    if not machine.stack or (len(machine.stack) == 1 and _is(machine.stack[0], "module")):
        return WeightsError(
            f"this file holds a whole pickled model, class {shown(full)}, or some other object; "
            "a dict of tensors is needed: save model.state_dict(), best as safetensors"
        )
    return machine.refusal(
        f"asks for {shown(full)}, which a dict of tensors does not need and which is never imported", TENSORS
    )


_FUNCTIONS: dict[str, Callable[[Machine, tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _ordered,
    "torch.Size": _size,
    "torch.device": _device,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}

_SCALARS = (
    *("float64", "float32", "float16", "bfloat16", "complex128", "complex64", "complex32"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
    *("bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"),
)

_MARKERS = {name: Marker(name) for name in (*_FUNCTIONS, *DTYPES, *(f"torch.{scalar}" for scalar in _SCALARS))}

# Why torch's other functions of tensors are refused.
_REASONS = {
    "torch._utils._rebuild_qtensor": "quantised tensors",
    "torch._utils._rebuild_sparse_tensor": "sparse tensors",
    "torch._utils._rebuild_nested_tensor": "nested tensors",
    "torch._utils._rebuild_meta_tensor_no_storage": "tensors of the meta device, without values",
    "torch._utils._rebuild_wrapper_subclass": "tensors of a class of their own",
    "torch._tensor._rebuild_from_type_v2": "tensors of a class or with attributes of their own",
    "torch.storage._load_from_bytes": "pickles inside its pickle",
}
