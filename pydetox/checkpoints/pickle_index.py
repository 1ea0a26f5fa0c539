"""What the pickle inside a ``.pt`` file describes, found without unpickling it.

A pickle is a program. This module reads the few instructions that ``torch.save`` emits and builds
inert descriptions from them: nothing is imported, called or instantiated by a name in the file.

Which names it may hold: :mod:`pydetox.checkpoints.pickle_globals`.

Instruction set: CPython ``Lib/pickletools.py``.
"""

from __future__ import annotations

import pickletools
import struct
from dataclasses import dataclass
from typing import Final

from pydetox.checkpoints.index import (
    ITEM_SIZES,
    Findings,
    TensorEntry,
    check_extents,
    check_view,
    quote,
)
from pydetox.checkpoints.pickle_globals import DTYPES, MAX_NAME_BYTES, STORAGES, check_global
from pydetox.errors import CheckpointError, UnsafeCheckpointError

#: An open_clip checkpoint with optimizer state has a pickle of about 0.5 MB and 0.1 million
#: instructions.
MAX_PICKLE_BYTES = 16 << 20
MAX_INSTRUCTIONS = 500_000


class Mapping:
    """A dictionary in the pickle, as pairs: hashing a key from it could already be an attack."""

    __slots__ = ("pairs",)

    def __init__(self) -> None:
        self.pairs: list[tuple[object, object]] = []

    def get(self, name: str) -> object:
        """Return the last value stored under the string ``name``, or ``None``."""
        for key, value in reversed(self.pairs):
            if isinstance(key, str) and key == name:
                return value
        return None


@dataclass(frozen=True, slots=True)
class Opaque:
    """A value that was allowed, but not built; ``name`` is the global it would have come from."""

    name: str


@dataclass(frozen=True, slots=True)
class _Global:
    name: str


@dataclass(frozen=True, slots=True)
class StorageUse:
    """A reference to a record of weights: its key and its claimed size in bytes."""

    key: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor in the pickle, with the claim that it makes about its storage."""

    entry: TensorEntry
    storage: StorageUse


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: str
    count: int


class _Mark:
    pass


_MARK = _Mark()


def read_pickle(data: bytes, findings: Findings | None = None) -> object:
    """Interpret ``data`` and return its inert root value (a :class:`Mapping` for a checkpoint).

    Args:
        data: The pickle.
        findings: Takes the names of unknown packages.

    Raises:
        UnsafeCheckpointError: It names something that could run code, uses an instruction that no
            checkpoint needs, or is built to exhaust memory.
        CheckpointError: It is truncated or makes no sense.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise UnsafeCheckpointError(
            f"its pickle has {len(data)} bytes, at most {MAX_PICKLE_BYTES} are accepted"
        )
    try:
        return _Reader(data, findings if findings is not None else Findings()).run()
    except (struct.error, IndexError, UnicodeDecodeError):
        raise CheckpointError("its pickle is truncated or damaged") from None


class _Reader:
    def __init__(self, data: bytes, findings: Findings) -> None:
        self.data = data
        self.findings = findings
        self.position = 0
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        data = self.data
        for count in range(MAX_INSTRUCTIONS):
            code = data[self.position]
            self.position += 1
            if code == 0x2E:  # STOP
                if self.position != len(data):
                    raise UnsafeCheckpointError(
                        f"its pickle is followed by {len(data) - self.position} hidden bytes"
                    )
                return self._pop()
            action = _ACTIONS.get(code)
            if action is None:
                raise UnsafeCheckpointError(
                    f"its pickle uses the instruction {_instruction_name(code)}, which no "
                    "checkpoint needs"
                )
            action(self, count)
        raise UnsafeCheckpointError(
            f"its pickle has more than {MAX_INSTRUCTIONS} instructions, far more than a checkpoint "
            "needs"
        )

    # Arguments of instructions

    def _take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise CheckpointError("its pickle is truncated or damaged")
        part = self.data[self.position : end]
        self.position = end
        return part

    def _number(self, form: str) -> int:
        (value,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return int(value)

    def _line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + MAX_NAME_BYTES)
        if end < 0:
            raise CheckpointError("its pickle is truncated or damaged: a name without an end")
        line = self.data[self.position : end].decode("utf-8")
        self.position = end + 1
        return line

    def _pop(self) -> object:
        value = self.stack.pop()
        if value is _MARK:
            raise CheckpointError("its pickle is damaged: a value is missing")
        return value

    def _pop_mark(self) -> list[object]:
        stack = self.stack
        for start in range(len(stack) - 1, -1, -1):
            if stack[start] is _MARK:
                items = stack[start + 1 :]
                del stack[start:]
                return items
        raise CheckpointError("its pickle is damaged: a mark is missing")

    # Instructions; each gets the number of instructions before it

    def proto(self, _: int) -> None:
        version = self._number("<B")
        if version > 5:
            raise CheckpointError(f"its pickle has protocol {version}, known are 0 to 5")

    def frame(self, _: int) -> None:
        self._take(8)

    def mark(self, _: int) -> None:
        self.stack.append(_MARK)

    def none(self, _: int) -> None:
        self.stack.append(None)

    def true(self, _: int) -> None:
        self.stack.append(True)

    def false(self, _: int) -> None:
        self.stack.append(False)

    def int1(self, _: int) -> None:
        self.stack.append(self._number("<B"))

    def int2(self, _: int) -> None:
        self.stack.append(self._number("<H"))

    def int4(self, _: int) -> None:
        self.stack.append(self._number("<i"))

    def long1(self, _: int) -> None:
        self.stack.append(int.from_bytes(self._take(self._number("<B")), "little", signed=True))

    def float8(self, _: int) -> None:
        self.stack.append(struct.unpack(">d", self._take(8))[0])

    def text1(self, _: int) -> None:
        self.stack.append(self._take(self._number("<B")).decode("utf-8", "surrogatepass"))

    def text4(self, _: int) -> None:
        self.stack.append(self._take(self._number("<I")).decode("utf-8", "surrogatepass"))

    def bytes1(self, _: int) -> None:
        self.stack.append(self._take(self._number("<B")))

    def bytes4(self, _: int) -> None:
        self.stack.append(self._take(self._number("<I")))

    def empty_list(self, _: int) -> None:
        self.stack.append([])

    def empty_dict(self, _: int) -> None:
        self.stack.append(Mapping())

    def empty_tuple(self, _: int) -> None:
        self.stack.append(())

    def empty_set(self, _: int) -> None:
        self.stack.append(Opaque("builtins.set"))

    def tuple_of_mark(self, _: int) -> None:
        items = self._pop_mark()
        self.stack.append(tuple(items))

    def tuple1(self, _: int) -> None:
        self.stack.append((self._pop(),))

    def tuple2(self, _: int) -> None:
        second, first = self._pop(), self._pop()
        self.stack.append((first, second))

    def tuple3(self, _: int) -> None:
        third, second, first = self._pop(), self._pop(), self._pop()
        self.stack.append((first, second, third))

    def append(self, _: int) -> None:
        self._extend([self._pop()])

    def appends(self, _: int) -> None:
        self._extend(self._pop_mark())

    def _extend(self, items: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Opaque):
            raise CheckpointError("its pickle is damaged: it appends to something that is no list")

    def set_item(self, _: int) -> None:
        value, key = self._pop(), self._pop()
        self._update([key, value])

    def set_items(self, _: int) -> None:
        self._update(self._pop_mark())

    def _update(self, items: list[object]) -> None:
        target = self.stack[-1]
        if len(items) % 2:
            raise CheckpointError("its pickle is damaged: a key without a value")
        if isinstance(target, Mapping):
            target.pairs.extend(zip(items[::2], items[1::2], strict=True))
        elif not isinstance(target, Opaque):
            raise CheckpointError(
                "its pickle is damaged: it sets items of something that is no dictionary"
            )

    def put1(self, count: int) -> None:
        self._remember(self._number("<B"), count)

    def put4(self, count: int) -> None:
        self._remember(self._number("<I"), count)

    def memoize(self, count: int) -> None:
        self._remember(len(self.memo), count)

    def _remember(self, index: int, count: int) -> None:
        # CPython's unpickler allocates a table as long as the largest index; picklers count them up
        # one by one.
        if index > count:
            raise UnsafeCheckpointError(
                f"its pickle stores memo number {index} at instruction {count}: a memo bomb"
            )
        if self.stack[-1] is _MARK:
            raise CheckpointError("its pickle is damaged: a value is missing")
        self.memo[index] = self.stack[-1]

    def get1(self, _: int) -> None:
        self._recall(self._number("<B"))

    def get4(self, _: int) -> None:
        self._recall(self._number("<I"))

    def _recall(self, index: int) -> None:
        if index not in self.memo:
            raise CheckpointError(
                f"its pickle is damaged: it uses memo number {index}, which it never stored"
            )
        self.stack.append(self.memo[index])

    def global_(self, _: int) -> None:
        module = self._line()
        self.stack.append(_named(module, self._line(), self.findings))

    def stack_global(self, _: int) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise CheckpointError("its pickle is damaged: a global without a name")
        self.stack.append(_named(module, name, self.findings))

    def instance(self, _: int) -> None:
        # INST calls what it names. torch never writes it: refused even for an allowed name.
        module = self._line()
        found = _named(module, self._line(), self.findings)
        raise UnsafeCheckpointError(
            f"its pickle creates {quote(found.name)} by the instruction INST, which no checkpoint "
            "needs"
        )

    def new_object(self, _: int) -> None:
        self._pop()
        made_from = self._pop()
        if not isinstance(made_from, _Global):
            raise CheckpointError(
                "its pickle is damaged: it creates an object of something that is no class"
            )
        self.stack.append(Opaque(made_from.name))

    def build(self, _: int) -> None:
        self._pop()
        if not isinstance(self.stack[-1], (Opaque, Mapping, PickledTensor)):
            raise CheckpointError(
                "its pickle is damaged: it sets the state of something that has none"
            )

    def reduce(self, _: int) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise CheckpointError("its pickle is damaged: it calls something that is no function")
        self.stack.append(_call(function.name, arguments))

    def persistent(self, _: int) -> None:
        self.stack.append(_storage(self._pop()))


_ACTIONS: Final = {
    0x80: _Reader.proto,
    0x95: _Reader.frame,
    0x28: _Reader.mark,
    0x4E: _Reader.none,
    0x88: _Reader.true,
    0x89: _Reader.false,
    0x4B: _Reader.int1,
    0x4D: _Reader.int2,
    0x4A: _Reader.int4,
    0x8A: _Reader.long1,
    0x47: _Reader.float8,
    0x8C: _Reader.text1,
    0x58: _Reader.text4,
    0x55: _Reader.bytes1,  # SHORT_BINSTRING
    0x43: _Reader.bytes1,
    0x42: _Reader.bytes4,
    0x5D: _Reader.empty_list,
    0x7D: _Reader.empty_dict,
    0x29: _Reader.empty_tuple,
    0x8F: _Reader.empty_set,
    0x74: _Reader.tuple_of_mark,
    0x85: _Reader.tuple1,
    0x86: _Reader.tuple2,
    0x87: _Reader.tuple3,
    0x61: _Reader.append,
    0x65: _Reader.appends,
    0x90: _Reader.appends,  # ADDITEMS, of a set
    0x73: _Reader.set_item,
    0x75: _Reader.set_items,
    0x71: _Reader.put1,
    0x72: _Reader.put4,
    0x94: _Reader.memoize,
    0x68: _Reader.get1,
    0x6A: _Reader.get4,
    0x63: _Reader.global_,
    0x93: _Reader.stack_global,
    0x69: _Reader.instance,
    0x81: _Reader.new_object,
    0x62: _Reader.build,
    0x52: _Reader.reduce,
    0x51: _Reader.persistent,
}


def _instruction_name(code: int) -> str:
    known = next((op for op in pickletools.opcodes if op.code == chr(code)), None)
    return f"{known.name} (0x{code:02x})" if known else f"0x{code:02x}, which does not exist"


def _named(module: str, name: str, findings: Findings) -> _Global:
    """Describe the global of that name; nothing is looked up."""
    return _Global(check_global(module, name, findings))


def _storage(identity: object) -> _Storage:
    """Describe the record that a persistent id names.

    It has the form ``("storage", storage type, key, location, number of elements)``.
    """
    if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
        raise CheckpointError("its pickle is damaged: an external reference that is no storage")
    _, kind, key, _location, count = identity
    if not isinstance(kind, _Global) or kind.name not in STORAGES:
        found = quote(kind.name) if isinstance(kind, _Global) else "something else"
        raise CheckpointError(f"holds a storage of the unsupported type {found}")
    if not isinstance(key, str) or type(count) is not int or count < 0:
        raise CheckpointError("its pickle is damaged: a storage without a key or size")
    return _Storage(key, STORAGES[kind.name], count)


def _call(name: str, arguments: tuple[object, ...]) -> object:
    """Describe what a call stands for: a tensor, a dictionary, or something that stays opaque."""
    if name == "collections.OrderedDict":
        # Python 3 fills it afterwards. Pairs as an argument could be the same long list each time.
        if arguments:
            raise CheckpointError("its pickle is damaged: an OrderedDict that is not made empty")
        return Mapping()
    if name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
        return _tensor(arguments, None)
    if name == "torch._utils._rebuild_tensor_v3":
        return _tensor(arguments, _dtype(arguments[6:7]))
    if name.startswith("torch._utils._rebuild_parameter") and arguments:
        return arguments[0]
    return Opaque(name)


def _dtype(argument: tuple[object, ...]) -> str:
    found = argument[0] if argument else None
    if not isinstance(found, _Global) or found.name not in DTYPES:
        raise CheckpointError("holds a tensor of an unsupported dtype")
    return DTYPES[found.name]


def _tensor(arguments: tuple[object, ...], dtype: str | None) -> PickledTensor:
    """Describe a tensor from ``(storage, offset, size, stride, …)`` and its dtype, if given."""
    if len(arguments) < 4 or not isinstance(arguments[0], _Storage):
        raise CheckpointError("its pickle is damaged: a tensor without a storage")
    storage = arguments[0]
    label = f"a tensor of record {quote('data/' + storage.key)}"
    shape = check_extents(label, arguments[2], "shape")
    strides = check_extents(label, arguments[3], "stride")
    (offset,) = check_extents(label, arguments[1:2], "offset")
    nbytes = storage.count * ITEM_SIZES[storage.dtype]
    kind = dtype or storage.dtype
    available, rest = divmod(nbytes, ITEM_SIZES[kind])
    if rest:
        raise CheckpointError(f"{label}: {nbytes} bytes are no whole number of {kind}")
    check_view(label, shape, strides, offset, available)
    return PickledTensor(
        TensorEntry(kind, shape, strides, storage.key, offset), StorageUse(storage.key, nbytes)
    )
