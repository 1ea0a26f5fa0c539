"""What the pickle inside a ``.pt`` file describes, found without unpickling it.

A pickle is a program. This module interprets it as torch's own unpickler and CPython's do, and
builds inert descriptions: nothing is imported, called or instantiated by a name in the file.

The model of the machine is total. Every instruction, and every call that can reach a weight, is
either reproduced (:mod:`pydetox.checkpoints.pickle_calls`) or refused, so that what is accepted
means the same tensors to every reader. Where the unpicklers differ, the file is refused.

Which names it may hold: :mod:`pydetox.checkpoints.pickle_globals`. Instruction set: CPython
``Lib/pickletools.py``; semantics: ``Modules/_pickle.c`` and ``torch/_weights_only_unpickler.py``.
"""

from __future__ import annotations

import pickletools
import struct
from dataclasses import dataclass
from typing import Final

from pydetox.checkpoints.index import Findings, quote
from pydetox.checkpoints.pickle_calls import Caller, check_state
from pydetox.checkpoints.pickle_globals import Global, resolve_global
from pydetox.checkpoints.pickle_literals import LITERALS, PickleStream
from pydetox.checkpoints.pickle_values import (
    MAPPING_KINDS,
    Mapping,
    Opaque,
    PickledTensor,
    Storage,
    describe,
)
from pydetox.errors import CheckpointError, UnsafeCheckpointError

__all__ = [
    "MAX_INSTRUCTIONS",
    "MAX_PICKLE_BYTES",
    "Mapping",
    "Opaque",
    "PickleContent",
    "PickledTensor",
    "Storage",
    "read_pickle",
]

#: An open_clip checkpoint with optimizer state has a pickle of about 0.5 MB and 0.1 million
#: instructions.
MAX_PICKLE_BYTES = 16 << 20
MAX_INSTRUCTIONS = 500_000

# What can be filled item by item although it is not built here.
_FILLED: Final = frozenset({"builtins.list", "builtins.set", "collections.deque"})


class _Mark:
    pass


_MARK = _Mark()


@dataclass(frozen=True, slots=True)
class PickleContent:
    """What one pickle describes.

    Attributes:
        root: Its value; a :class:`Mapping` for a checkpoint.
        storages: Key to storage, in the order in which the pickle refers to them first.
        end: Number of bytes up to its end.
    """

    root: object
    storages: dict[str, Storage]
    end: int


def read_pickle(
    data: bytes, findings: Findings | None = None, *, start: int = 0, legacy: bool = False
) -> PickleContent:
    """Interpret a pickle and describe its value.

    Args:
        data: Holds the pickle.
        findings: Takes the names of unknown packages.
        start: Where it begins.
        legacy: It is one of several that lie one behind the other (torch before 1.6). Otherwise
            bytes behind its end are refused.

    Raises:
        UnsafeCheckpointError: It names something that could run code, uses an instruction that no
            checkpoint needs, changes tensors in a way that readers see differently, or is built to
            exhaust memory.
        CheckpointError: It is truncated or makes no sense.
    """
    if len(data) > MAX_PICKLE_BYTES and not legacy:
        raise UnsafeCheckpointError(
            f"its pickle has {len(data)} bytes, at most {MAX_PICKLE_BYTES} are accepted"
        )
    reader = _Reader(data, findings if findings is not None else Findings(), start, legacy)
    try:
        root = reader.run()
    except (struct.error, IndexError, UnicodeDecodeError):
        raise CheckpointError("its pickle is truncated or damaged") from None
    except UnsafeCheckpointError:
        raise
    except CheckpointError:
        if reader.not_understood is not None:
            raise reader.not_understood from None
        raise
    if reader.not_understood is not None:
        raise reader.not_understood
    return PickleContent(root, reader.caller.storages, reader.stream.position)


class _Reader:
    def __init__(self, data: bytes, findings: Findings, start: int, legacy: bool) -> None:
        self.stream = PickleStream(data, start)
        self.findings = findings
        self.legacy = legacy
        self.protocol = 0
        self.caller = Caller(MAX_INSTRUCTIONS, legacy=legacy)
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}
        #: The first name that is refused, but not as an attack: one may still come.
        self.not_understood: CheckpointError | None = None

    def run(self) -> object:
        stream = self.stream
        for count in range(MAX_INSTRUCTIONS):
            code = stream.data[stream.position]
            stream.position += 1
            literal = LITERALS.get(code)
            if literal is not None:
                self.stack.append(literal(stream))
                continue
            if code == 0x2E:  # STOP
                hidden = len(stream.data) - stream.position
                if hidden and not self.legacy:
                    raise UnsafeCheckpointError(f"its pickle is followed by {hidden} hidden bytes")
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
        self.protocol = self.stream.number("<B")
        if self.protocol > 5:
            raise CheckpointError(f"its pickle has protocol {self.protocol}, known are 0 to 5")

    def frame(self, _: int) -> None:
        size = self.stream.number("<Q")
        if size > len(self.stream.data) - self.stream.position:
            raise CheckpointError("its pickle is truncated or damaged")

    def mark(self, _: int) -> None:
        self.stack.append(_MARK)

    def pop(self, _: int) -> None:
        self.stack.pop()  # a mark, too: so do CPython's

    def pop_mark(self, _: int) -> None:
        self._pop_mark()

    def frozenset_of_mark(self, _: int) -> None:
        self._pop_mark()
        self.stack.append(Opaque("builtins.frozenset"))

    def tuple_of_mark(self, _: int) -> None:
        items = self._pop_mark()
        self.stack.append(tuple(items))

    def list_of_mark(self, _: int) -> None:
        items = self._pop_mark()
        self.stack.append(items)

    def dict_of_mark(self, _: int) -> None:
        items = self._pop_mark()
        self.stack.append(Mapping())
        self._update(items)

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
        elif not (isinstance(target, Opaque) and (target.name in _FILLED or not target.known)):
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
        elif not _may_take_items(target):
            raise CheckpointError(
                "its pickle is damaged: it sets items of something that is no dictionary"
            )

    def put1(self, count: int) -> None:
        self._remember(self.stream.number("<B"), count)

    def put4(self, count: int) -> None:
        self._remember(self.stream.number("<I"), count)

    def put_text(self, count: int) -> None:
        self._remember(self.stream.index(), count)

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
        self._recall(self.stream.number("<B"))

    def get4(self, _: int) -> None:
        self._recall(self.stream.number("<I"))

    def get_text(self, _: int) -> None:
        self._recall(self.stream.index())

    def _recall(self, index: int) -> None:
        if index not in self.memo:
            raise CheckpointError(
                f"its pickle is damaged: it uses memo number {index}, which it never stored"
            )
        self.stack.append(self.memo[index])

    def global_(self, _: int) -> None:
        module = self.stream.line().decode("utf-8")
        self.stack.append(self._resolve(module, self.stream.line().decode("utf-8")))

    def stack_global(self, _: int) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise CheckpointError("its pickle is damaged: a global without a name")
        self.stack.append(self._resolve(module, name))

    def _resolve(self, module: str, name: str) -> Global:
        try:
            return resolve_global(module, name, self.protocol, self.findings)
        except UnsafeCheckpointError:
            raise
        except CheckpointError as error:
            self.not_understood = self.not_understood or error
            return Global(f"{module}.{name}", known=False)

    def instance(self, _: int) -> None:
        # INST calls what it names. torch never writes it: refused even for an allowed name.
        module = self.stream.line().decode("utf-8")
        found = self._resolve(module, self.stream.line().decode("utf-8"))
        raise UnsafeCheckpointError(
            f"its pickle creates {quote(found.name)} by the instruction INST, which no checkpoint "
            "needs"
        )

    def new_object(self, _: int) -> None:
        arguments, made_from = self._pop(), self._pop()
        self._create(made_from, arguments)

    def new_object_ex(self, _: int) -> None:
        keywords, arguments, made_from = self._pop(), self._pop(), self._pop()
        if not isinstance(keywords, Mapping):
            raise CheckpointError("its pickle is damaged: it calls something with no dictionary")
        if keywords.pairs and isinstance(made_from, Global) and made_from.name in MAPPING_KINDS:
            raise CheckpointError("its pickle is damaged: a dictionary made with keywords")
        self._create(made_from, arguments)

    def _create(self, made_from: object, arguments: object) -> None:
        if not isinstance(made_from, Global) or not isinstance(arguments, tuple):
            raise CheckpointError(
                "its pickle is damaged: it creates an object of something that is no class"
            )
        self.stack.append(self.caller.create(made_from, arguments))

    def build(self, _: int) -> None:
        state, target = self._pop(), self.stack[-1]
        _check_build(target, state)

    def reduce(self, _: int) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise CheckpointError("its pickle is damaged: it calls something that is no function")
        self.stack.append(self.caller.call(function, arguments))

    def persistent(self, _: int) -> None:
        self.stack.append(self.caller.storage(self._pop()))


def _may_take_items(target: object) -> bool:
    """Whether ``target[key] = value`` cannot reach a weight: a tensor's items are its weights."""
    return isinstance(target, Opaque) and not target.known


def _check_build(target: object, state: object) -> None:
    """Refuse to set the state of what would change tensors, classes or functions by it."""
    if isinstance(target, PickledTensor):
        raise UnsafeCheckpointError(
            "its pickle changes a tensor after it has made it (BUILD), which torch.save never does "
            "and which no two readers do in the same way"
        )
    if isinstance(target, Mapping) and target.kind in (
        "collections.OrderedDict",
        "collections.Counter",
    ):
        check_state(state, "a dictionary")
    elif not isinstance(target, Opaque) or (target.known and target.name.startswith("torch.")):
        raise CheckpointError(
            f"its pickle is damaged: it sets the state of {describe(target)}, which has none"
        )


_ACTIONS: Final = {
    0x80: _Reader.proto,
    0x95: _Reader.frame,
    0x28: _Reader.mark,
    0x30: _Reader.pop,
    0x31: _Reader.pop_mark,
    0x91: _Reader.frozenset_of_mark,
    0x74: _Reader.tuple_of_mark,
    0x6C: _Reader.list_of_mark,
    0x64: _Reader.dict_of_mark,
    0x85: _Reader.tuple1,
    0x86: _Reader.tuple2,
    0x87: _Reader.tuple3,
    0x61: _Reader.append,
    0x65: _Reader.appends,
    0x90: _Reader.appends,  # ADDITEMS, of a set
    0x73: _Reader.set_item,
    0x75: _Reader.set_items,
    0x70: _Reader.put_text,
    0x71: _Reader.put1,
    0x72: _Reader.put4,
    0x94: _Reader.memoize,
    0x67: _Reader.get_text,
    0x68: _Reader.get1,
    0x6A: _Reader.get4,
    0x63: _Reader.global_,
    0x93: _Reader.stack_global,
    0x69: _Reader.instance,
    0x81: _Reader.new_object,
    0x92: _Reader.new_object_ex,
    0x62: _Reader.build,
    0x52: _Reader.reduce,
    0x51: _Reader.persistent,
}


def _instruction_name(code: int) -> str:
    known = next((op for op in pickletools.opcodes if op.code == chr(code)), None)
    return f"{known.name} (0x{code:02x})" if known else f"0x{code:02x}, which does not exist"
