"""Pickles read as data: no code of a file is imported or called.

A pickle is a program for a small stack machine; Python's own reader imports whatever it names and calls it. This one
runs the instructions that plain values need, builds tensors by a table of its own functions, describes instances of
other allowed classes as `Instance`, and refuses everything else by its name. A `pickle.Unpickler` with another
`find_class` would not do: it allocates a memo as large as a file says, and sets attributes on what a name stands for.
"""

import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from cm_core.formats.base import UnreadableCheckpoint


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names; it stands for nothing."""

    text: str


@dataclass(eq=False)
class Instance:
    """An instance of a class: its name, its constructor's arguments, its attributes."""

    class_name: str
    arguments: tuple[Any, ...] = ()
    state: Any = field(default_factory=dict)


class Blob:
    """Long bytes of a pickle, which are given up when a storage is made of them: memory then holds one of the two."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def take(self) -> bytes:
        data, self.data = self.data, b""
        return data


Call = Callable[..., Any]
LITERALS = {  # instructions whose argument is their value
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    "SHORT_BINBYTES",
}
BLOBS = {"BINBYTES", "BINBYTES8"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
KEY_TYPES = (str, int, float, bool, type(None))  # of dicts and sets: hashing a deep tuple would overflow C's stack
MARK = object()
MOST_VALUES = 10_000  # of the description of a model, each as often as it is reached
MOST_DIMENSIONS = 8  # of a tensor
ZIP = b"PK\x03\x04"  # first bytes of what torch.save writes today
MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    StopIteration,
    TypeError,
    ValueError,
)


def read_pickle(file: BinaryIO, calls: Mapping[str, Call], classes: Sequence[str] = ()) -> Any:
    """Return the value of a pickle: plain values, what `calls` {name: function} return, Instances of `classes`.

    Raises UnreadableCheckpoint for another name or instruction, and the errors of `MALFORMED` for a malformed file.
    """
    return _Machine(calls, classes).run(_Bounded(file))


def refuse_endless(value: Any) -> None:
    """Raise UnreadableCheckpoint for a value of a pickle that is cyclic, or a tree of more than MOST_VALUES.

    Lists that hold one another twice are few in a file and in memory, and 2^n where they are hashed or written out.
    """
    left, seen = [value], 0
    while left:
        one = left.pop()
        seen += 1
        if seen + len(left) > MOST_VALUES:
            raise UnreadableCheckpoint(f"its model is described by more than {MOST_VALUES:,} values")
        if isinstance(one, Instance):
            left += [one.arguments, one.state]
        elif isinstance(one, dict):
            left += one.values()
        elif isinstance(one, list | tuple | set):
            left += one


class _Bounded:
    """A file of which no more is asked than it holds: `read` allocates what is asked."""

    def __init__(self, file: BinaryIO) -> None:
        self.size = file.seek(0, io.SEEK_END)
        file.seek(0)
        self.tell, self.readline, self._read = file.tell, file.readline, file.read

    def read(self, count: int) -> bytes:
        return self._read(min(count, self.size - self.tell()))


class _Machine:
    """The pickle machine: a stack, the positions of its marks, and a memo."""

    def __init__(self, calls: Mapping[str, Call], classes: Sequence[str]) -> None:
        self.calls, self.classes = calls, classes
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: Any) -> Any:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                return self.stack.pop()
            if opcode.name in LITERALS:
                self.stack.append(argument)
            elif opcode.name in BLOBS:
                self.stack.append(Blob(argument or b""))
            elif opcode.name in CONSTANTS:
                self.stack.append(CONSTANTS[opcode.name])
            elif opcode.name in EMPTY:
                self.stack.append(EMPTY[opcode.name]())
            elif opcode.name in TUPLES:
                self.stack.append(tuple(self.pop(TUPLES[opcode.name])))
            elif opcode.name not in ("PROTO", "FRAME"):
                step = getattr(self, f"do_{opcode.name.lower()}", None)
                if step is None:
                    raise UnreadableCheckpoint(f"its pickle has the instruction {opcode.name}, which plain data lack")
                step(argument)
        raise UnreadableCheckpoint("its pickle has no end")

    def pop(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise UnreadableCheckpoint("its pickle takes more than there is")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def pop_to_mark(self) -> list[Any]:
        start = next(i for i in reversed(range(len(self.stack))) if self.stack[i] is MARK)
        values = self.stack[start + 1 :]
        del self.stack[start:]
        return values

    def do_mark(self, _: None) -> None:
        self.stack.append(MARK)

    def do_pop(self, _: None) -> None:
        self.pop(1)

    def do_pop_mark(self, _: None) -> None:
        self.pop_to_mark()

    def do_tuple(self, _: None) -> None:
        self.stack.append(tuple(self.pop_to_mark()))

    def do_list(self, _: None) -> None:
        self.stack.append(self.pop_to_mark())

    def do_append(self, _: None) -> None:
        (value,) = self.pop(1)
        self.extend([value])

    def do_appends(self, _: None) -> None:
        self.extend(self.pop_to_mark())

    def do_additems(self, _: None) -> None:
        self.update(dict.fromkeys(map(_key, self.pop_to_mark())), set)

    def do_setitem(self, _: None) -> None:
        key, value = self.pop(2)
        self.update({_key(key): value}, dict)

    def do_setitems(self, _: None) -> None:
        values = self.pop_to_mark()
        self.update({_key(key): value for key, value in zip(values[::2], values[1::2], strict=True)}, dict)

    def extend(self, values: list[Any]) -> None:
        self.top(list).extend(values)

    def update(self, values: dict[Any, Any], kind: type) -> None:
        self.top(kind).update(values)

    def top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise UnreadableCheckpoint(f"its pickle fills a {kind.__name__} where there is none")
        return self.stack[-1]

    def do_memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def do_put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def do_get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    do_binput = do_long_binput = do_put
    do_binget = do_long_binget = do_get

    def do_global(self, argument: str) -> None:
        self.name(*argument.split(" ", 1))

    def do_stack_global(self, _: None) -> None:
        self.name(*self.pop(2))

    def name(self, module: Any, qualname: Any) -> None:
        if type(module) is not str or type(qualname) is not str:
            raise UnreadableCheckpoint("its pickle names what is no text")
        text = f"{module}.{qualname}"
        if text not in self.calls and text not in self.classes:
            raise UnreadableCheckpoint(f"it names {text[:100]!r}, which is neither a tensor nor a plain value")
        self.stack.append(Name(text))

    def do_reduce(self, _: None) -> None:
        function, arguments = self.pop(2)
        if not isinstance(function, Name) or type(arguments) is not tuple:
            raise UnreadableCheckpoint("its pickle calls what is no function")
        if function.text in self.classes:
            self.stack.append(Instance(function.text, arguments))
        else:
            self.stack.append(self.calls[function.text](*arguments))

    do_newobj = do_reduce

    def do_build(self, _: None) -> None:
        instance, state = self.pop(2)
        if not isinstance(instance, Instance):
            raise UnreadableCheckpoint("its pickle gives a state to a plain value")
        instance.state = state
        self.stack.append(instance)


def _key(value: Any) -> Any:
    if not isinstance(value, KEY_TYPES):
        raise UnreadableCheckpoint(f"its pickle has a key of type {type(value).__name__}")
    return value


def load_storage(data: Blob | bytes) -> Tensor:
    """Return a storage, as a vector, from the bytes that `torch.save` made of it; they hold pickles of their own.

    Pickles have its old format. Zips are refused, which may unpack to a thousand times their size.
    """
    data = data.take() if isinstance(data, Blob) else data
    if data.startswith(ZIP):
        raise UnreadableCheckpoint("a storage is a zip, which PyTorch never pickles")
    storage = load_torch(io.BytesIO(data), torch.TypedStorage)
    return torch.tensor([], dtype=storage.dtype).set_(storage)


def load_torch(file: Any, kind: type, *, mmap: bool = False) -> Any:
    """Read what `torch.save` wrote, by PyTorch's own restricted reader; it must be of a kind."""
    try:
        value = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, LookupError, TypeError, OSError) as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {named[1]!r}, which is neither a tensor nor a plain value" if named else "no whole file"
        raise UnreadableCheckpoint(f"PyTorch's restricted reader refuses it: {reason}") from error
    if not isinstance(value, kind):
        raise UnreadableCheckpoint(f"it holds a {type(value).__name__}, where a {kind.__name__} is expected")
    return value


def rebuild_tensor(storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> Tensor:
    """Return a view of a storage; it may not repeat elements, so that a small file stays small."""
    possible = all(type(number) is int and 0 <= number < 1 << 63 for number in (offset, *size, *stride))
    if not possible or len(size) > MOST_DIMENSIONS:  # before anything is calculated with them
        raise UnreadableCheckpoint("it has a tensor of no possible shape")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if math.prod(size) > len(storage) or last >= max(len(storage), 1):
        raise UnreadableCheckpoint(f"it has a tensor of shape {tuple(size)} over {len(storage)} numbers")
    return storage.as_strided(size, stride, offset)


def numpy_scalar(dtype: Instance, data: bytes) -> float | int | bool:
    """Return a NumPy number as a plain one."""
    order, kind = dtype.state[1], dtype.arguments[0]
    if type(order) is not str or type(kind) is not str:
        raise UnreadableCheckpoint("it has a number of no plain type")
    return np.frombuffer(data, order + kind)[0].item()


TENSORS: dict[str, Call] = {
    "collections.OrderedDict": lambda: {},  # filled by instructions
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch.storage._load_from_bytes": load_storage,
    "numpy.core.multiarray.scalar": numpy_scalar,
    "numpy._core.multiarray.scalar": numpy_scalar,
}
CLASSES = ("numpy.dtype", "torch.nn.modules.container.ModuleDict")
