"""What a weights file holds: an index of its tensors, made without reading a weight.

Both formats are brought to the same form: *storages* (spans of bytes in the file) and *tensors*
(views of a storage). The modules that build an index (this one, ``zip_index``, ``pickle_index``,
``torch_index``, ``safetensors_index``) import nothing but the standard library and
``pydetox.errors``, so that they can run in a small child process.
"""

from __future__ import annotations

import os
import reprlib
import stat
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

from pydetox.errors import CheckpointError

Format = Literal["safetensors", "torch"]

#: Bytes per element of every dtype that can be read, by the name that torch gives it.
ITEM_SIZES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "uint16": 2,
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "uint32": 4,
    "int32": 4,
    "float32": 4,
    "uint64": 8,
    "int64": 8,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}

_MAX_DIMENSIONS = 64  # torch's own limit
_MAX_EXTENT = 1 << 40


@dataclass(frozen=True, slots=True)
class Span:
    """``nbytes`` bytes of the file from ``offset`` on, with their CRC-32 if there is one."""

    offset: int
    nbytes: int
    crc32: int | None = None


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A view of a storage; ``offset`` and ``strides`` count elements, as in torch."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    storage: str
    offset: int = 0


@dataclass(frozen=True)
class FileIndex:
    """The contents of one weights file.

    Attributes:
        format: ``"safetensors"`` or ``"torch"`` (the zip archive that ``torch.save`` writes).
        tensors: Name to view, in the file's order.
        storages: Key to span; the spans do not overlap.
        others: Spans that hold no weights of the model; only their checksums are looked at.
        metadata: The text metadata of a safetensors file, empty otherwise.
        parsed: The bytes this index was made from, by their offset. Whoever reads the weights
            compares them again, so that index, weights and hash belong to the same bytes.
    """

    format: Format
    tensors: dict[str, TensorEntry]
    storages: dict[str, Span]
    others: tuple[Span, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    parsed: dict[int, bytes] = field(default_factory=dict)


class WeightsFile:
    """A regular file that is opened once, by descriptor, and read at offsets.

    Args:
        path: The file; symbolic links are followed.

    Raises:
        CheckpointError: It is missing, unreadable, or not a regular file (opening a FIFO must not
            hang).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"cannot be opened: {error.strerror}") from error
        status = os.fstat(self.descriptor)
        self.size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise CheckpointError("is not a regular file")

    def read_at(self, offset: int, count: int, what: str) -> bytes:
        """Read exactly ``count`` bytes; ``what`` names them in the error."""
        if offset < 0 or count < 0 or offset + count > self.size:
            raise CheckpointError(
                f"is truncated or damaged: {what} should be at bytes {offset}..{offset + count}, "
                f"but the file has {self.size}"
            )
        parts = []
        while count:
            part = os.pread(self.descriptor, count, offset)
            if not part:
                raise CheckpointError(f"shrank while it was read (at {what})")
            parts.append(part)
            offset += len(part)
            count -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        """Close the descriptor; may be called twice."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def quote(text: object) -> str:
    """Make text from a file harmless for a one-line message.

    Newlines, ANSI sequences and anything else beyond ASCII are escaped; 80 characters are kept.
    """
    # Cut first: the text may be megabytes, and anything else may be nested too deep for repr().
    shown = ascii(text[:81] if isinstance(text, str) else reprlib.repr(text))
    return shown if len(shown) <= 80 else f"{shown[:76]}...'"


def check_extents(label: str, values: object, what: str) -> tuple[int, ...]:
    """Return ``values`` as a tuple of sizes or strides, or raise: the file may hold anything.

    Args:
        label: Names the tensor in the error.
        values: What the file has.
        what: Which property it is.
    """
    if not isinstance(values, (list, tuple)):
        raise CheckpointError(f"{label}: its {what} is not a list of integers")
    if len(values) > _MAX_DIMENSIONS:
        raise CheckpointError(
            f"{label}: has {len(values)} dimensions, at most {_MAX_DIMENSIONS} are possible"
        )
    for value in values:
        if type(value) is not int or not 0 <= value <= _MAX_EXTENT:
            raise CheckpointError(
                f"{label}: its {what} holds something that is not an integer in 0..{_MAX_EXTENT}"
            )
    return tuple(values)
