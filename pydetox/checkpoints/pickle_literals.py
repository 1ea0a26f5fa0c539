"""Values that stand in a pickle as they are: numbers, texts, bytes and empty containers.

Each is one instruction with its argument. Most are written by torch.save; those of protocol 0 are
accepted in the form that picklers write, because unpicklers take other forms in different ways.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Final

from pydetox.checkpoints.index import quote
from pydetox.checkpoints.pickle_globals import MAX_NAME_BYTES
from pydetox.checkpoints.pickle_values import Mapping, Opaque
from pydetox.errors import CheckpointError

_MAX_LINE = 1024
_INTEGER = re.compile(rb"-?(0|[1-9][0-9]*)")
_FRACTION = re.compile(rb"-?(inf|nan|[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?)")
_INDEX = re.compile(rb"0|[1-9][0-9]{0,8}")
_PLAIN_STRING = re.compile(rb"'[ -&(-\[\]-~]*'|\"[ !#-\[\]-~]*\"")  # ASCII without escapes


class PickleStream:
    """The bytes of a pickle, read from front to back.

    Attributes:
        data: The bytes.
        position: Of the next byte.
    """

    def __init__(self, data: bytes, position: int) -> None:
        self.data = data
        self.position = position

    def take(self, count: int) -> bytes:
        """Read exactly ``count`` bytes."""
        end = self.position + count
        if count < 0 or end > len(self.data):
            raise CheckpointError("its pickle is truncated or damaged")
        part = self.data[self.position : end]
        self.position = end
        return part

    def number(self, form: str) -> int:
        """Read an integer in a form of :mod:`struct`."""
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return int(value)

    def line(self, limit: int = MAX_NAME_BYTES) -> bytes:
        """Read up to the next newline, which is not part of the result."""
        end = self.data.find(b"\n", self.position, self.position + limit)
        if end < 0:
            raise CheckpointError("its pickle is truncated or damaged: a name without an end")
        line = self.data[self.position : end]
        self.position = end + 1
        return line

    def matched(self, pattern: re.Pattern[bytes]) -> str:
        """Read a line in the form that picklers write; unpicklers take other forms, too."""
        line = self.line(_MAX_LINE)
        if not pattern.fullmatch(line):
            raise CheckpointError(f"its pickle is damaged: {quote(line)} where a number or text is")
        return line.decode("ascii")

    def index(self) -> int:
        """Read the number of a memo entry, as protocol 0 writes it."""
        return int(self.matched(_INDEX))


def _long(raw: bytes) -> int:
    return int.from_bytes(raw, "little", signed=True)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")


def _int_line(stream: PickleStream) -> int:
    if stream.data[stream.position : stream.position + 3] in (b"00\n", b"01\n"):
        return stream.line() == b"01"  # how protocol 0 writes a bool
    return int(stream.matched(_INTEGER))


def _long_line(stream: PickleStream) -> int:
    line = stream.line(_MAX_LINE).removesuffix(b"L")
    if not _INTEGER.fullmatch(line):
        raise CheckpointError(f"its pickle is damaged: {quote(line)} where a number is")
    return int(line)


def _float8(stream: PickleStream) -> object:
    return struct.unpack(">d", stream.take(8))[0]


def _text_line(stream: PickleStream) -> str:
    line = stream.line(_MAX_LINE)
    if not line.isascii() or b"\\" in line:
        raise CheckpointError("its pickle holds text with escapes, in a way of protocol 0")
    return line.decode("ascii")


def _string(raw: bytes) -> object:
    # A string of Python 2. torch asks for UTF-8 unless the user names another encoding: as ASCII it
    # is the same text in all of them.
    if not raw.isascii():
        raise CheckpointError(
            "its pickle holds a string of Python 2 beyond ASCII, which readers take for different "
            "texts"
        )
    return raw.decode("ascii")


def _bytearray8(stream: PickleStream) -> Opaque:
    stream.take(stream.number("<Q"))
    return Opaque("builtins.bytearray")


#: Instruction to the function that reads its value.
LITERALS: Final[dict[int, Callable[[PickleStream], object]]] = {
    0x4E: lambda _: None,  # NONE
    0x88: lambda _: True,  # NEWTRUE
    0x89: lambda _: False,  # NEWFALSE
    0x4B: lambda stream: stream.number("<B"),  # BININT1
    0x4D: lambda stream: stream.number("<H"),  # BININT2
    0x4A: lambda stream: stream.number("<i"),  # BININT
    0x8A: lambda stream: _long(stream.take(stream.number("<B"))),  # LONG1
    0x8B: lambda stream: _long(stream.take(stream.number("<i"))),  # LONG4
    0x49: _int_line,  # INT
    0x4C: _long_line,  # LONG
    0x47: _float8,  # BINFLOAT
    0x46: lambda stream: float(stream.matched(_FRACTION)),  # FLOAT
    0x8C: lambda stream: _text(stream.take(stream.number("<B"))),  # SHORT_BINUNICODE
    0x58: lambda stream: _text(stream.take(stream.number("<I"))),  # BINUNICODE
    0x8D: lambda stream: _text(stream.take(stream.number("<Q"))),  # BINUNICODE8
    0x56: _text_line,  # UNICODE
    0x55: lambda stream: _string(stream.take(stream.number("<B"))),  # SHORT_BINSTRING
    0x54: lambda stream: _string(stream.take(stream.number("<i"))),  # BINSTRING
    0x53: lambda stream: _string(stream.matched(_PLAIN_STRING)[1:-1].encode("ascii")),  # STRING
    0x43: lambda stream: stream.take(stream.number("<B")),  # SHORT_BINBYTES
    0x42: lambda stream: stream.take(stream.number("<I")),  # BINBYTES
    0x8E: lambda stream: stream.take(stream.number("<Q")),  # BINBYTES8
    0x96: _bytearray8,  # BYTEARRAY8
    0x5D: lambda _: [],  # EMPTY_LIST
    0x7D: lambda _: Mapping(),  # EMPTY_DICT
    0x29: lambda _: (),  # EMPTY_TUPLE
    0x8F: lambda _: Opaque("builtins.set"),  # EMPTY_SET
}
