"""What a weights file holds: an index of its tensors, made without reading a weight.

Both formats are brought to the same form: *storages* (spans of bytes in the file) and *tensors*
(views of a storage). The modules that build an index (this one, ``zip_index``, ``pickle_index``,
``torch_index``, ``safetensors_index``) import nothing but the standard library and
``pydetox.errors``, so that they can run in a small child process.
"""

from __future__ import annotations

import hashlib
import math
import os
import reprlib
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

from pydetox.errors import CheckpointError, UnsafeCheckpointError

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
_MAX_NAME = 4096
_MAX_SHARING = 16  # tied weights appear two or three times
_MAX_EXPANDED = 16 << 20  # bytes: what a few expanded numbers (`zeros(1).expand(n)`) may become


@dataclass(frozen=True, slots=True)
class Span:
    """``nbytes`` bytes of the file from ``offset`` on, with their CRC-32 if there is one."""

    offset: int
    nbytes: int
    crc32: int | None = None


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A view of a storage; ``offset`` and ``strides`` count elements, as in torch.

    ``conjugate`` and ``negative`` are torch's bits of lazy views: the values are the complex
    conjugates, or the negatives, of those that are stored.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    storage: str
    offset: int = 0
    conjugate: bool = False
    negative: bool = False


Rule = Literal[
    "chosen-weights",
    "duplicate-key",
    "mixed-prefix",
    "non-finite",
    "overlapping-storage",
    "several-weights",
    "suspicious-name",
    "unknown-global",
    "unknown-record",
]

#: The rules of findings with which another loader may take other weights than those that are read
#: here. A verdict about such a file might concern other weights than those that run.
AMBIGUOUS_RULES: frozenset[Rule] = frozenset({"mixed-prefix", "several-weights"})


@dataclass(frozen=True, slots=True)
class Finding:
    """Something odd about a file that does not prevent reading it.

    Attributes:
        rule: The kind of finding. These identifiers stay the same from version to version.
        message: One printable line that describes the finding.
    """

    rule: Rule
    message: str


def refuse_ambiguous(findings: Iterable[Finding]) -> None:
    """Raise CheckpointError for a finding of ``AMBIGUOUS_RULES``."""
    for finding in findings:
        if finding.rule in AMBIGUOUS_RULES:
            raise CheckpointError(
                f"{finding.message}; write the weights that are meant to a file of their own "
                "(pydetox convert) and use that"
            )


class Findings:
    """Collects findings; the first few of each rule, so that no file can flood a report."""

    _KEPT = 10

    def __init__(self) -> None:
        self._messages: dict[Rule, dict[str, None]] = {}
        self._more: set[Rule] = set()

    def add(self, rule: Rule, message: str) -> None:
        """Add a finding; one that is there already is not added again."""
        messages = self._messages.setdefault(rule, {})
        if message in messages:
            return
        if len(messages) < self._KEPT:
            messages[message] = None
        else:
            self._more.add(rule)

    def result(self) -> tuple[Finding, ...]:
        """All of them, by rule."""
        found = [Finding(rule, m) for rule, messages in self._messages.items() for m in messages]
        found += [Finding(rule, "and more of this kind") for rule in self._more]
        return tuple(sorted(found, key=lambda finding: finding.rule))


@dataclass(frozen=True)
class FileIndex:
    """The contents of one weights file.

    Attributes:
        format: ``"safetensors"`` or ``"torch"`` (the zip archive that ``torch.save`` writes).
        tensors: Name to view, in the file's order.
        storages: Key to span; the spans do not overlap.
        others: Spans that hold no weights of the model; only their checksums are looked at.
        metadata: The text metadata of a safetensors file. Of a pickle, the entries of BackdoorBench
            that name the architecture and the data set: ``model_name`` and ``clean_data``.
        findings: What is odd about the file.
        weights_key: Under which key of the pickled dictionary the weights are, with a slash between
            the keys of nested ones; empty for the dictionary itself, and for safetensors.
        parsed: Where the bytes are that this index was made from, by offset.
        parsed_sha256: SHA-256 of all of those bytes, in that order. Whoever reads the weights
            computes it again, so that index, weights and hash belong to the same bytes.
    """

    format: Format
    tensors: dict[str, TensorEntry]
    storages: dict[str, Span]
    others: tuple[Span, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    weights_key: str = ""
    parsed: tuple[Span, ...] = ()
    parsed_sha256: str = hashlib.sha256().hexdigest()


def fingerprint(parsed: Mapping[int, bytes]) -> tuple[tuple[Span, ...], str]:
    """``parsed`` and ``parsed_sha256`` of a :class:`FileIndex`, from bytes by their offset."""
    hasher = hashlib.sha256()
    spans = []
    for offset, data in sorted(parsed.items()):
        hasher.update(data)
        spans.append(Span(offset, len(data)))
    return tuple(spans), hasher.hexdigest()


class WeightsFile:
    """A regular file that is opened once, by descriptor, and read at offsets.

    Args:
        path: The file; symbolic links are followed.
        descriptor: The file, if it is open already; it is closed with this object.

    Raises:
        CheckpointError: It is missing, unreadable, or not a regular file (opening a FIFO must not
            hang).
    """

    def __init__(self, path: str | os.PathLike[str], descriptor: int | None = None) -> None:
        self.path = os.fspath(path)
        if descriptor is None:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise CheckpointError(f"cannot be opened: {reason}") from error
        self.descriptor = descriptor
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


def check_view(
    label: str, shape: tuple[int, ...], strides: tuple[int, ...], offset: int, available: int
) -> None:
    """Raise unless a view stays inside a storage of ``available`` elements of its dtype."""
    if len(shape) != len(strides):
        raise CheckpointError(f"{label}: {len(shape)} dimensions, but {len(strides)} strides")
    elements = math.prod(shape)
    if offset > available or (elements and _last(shape, strides, offset) >= available):
        raise UnsafeCheckpointError(
            f"{label}: shape {list(shape)} reaches beyond the {available} elements of its storage"
        )
    if elements and _own(shape, strides) > available:
        raise UnsafeCheckpointError(
            f"{label}: shape {list(shape)} repeats a storage of {available} elements"
        )


def check_sharing(tensors: Iterable[TensorEntry], storages: Mapping[str, Span]) -> None:
    """Refuse a small file whose tensors, all views of the same weights, are huge together.

    A view that repeats a few bytes takes any size as soon as somebody copies it.
    """
    own = claimed = 0
    for entry in tensors:
        own += _own(entry.shape, entry.strides) * ITEM_SIZES[entry.dtype]
        claimed += math.prod(entry.shape) * ITEM_SIZES[entry.dtype]
    available = sum(span.nbytes for span in storages.values())
    if own > _MAX_SHARING * available or claimed > max(_MAX_SHARING * available, _MAX_EXPANDED):
        raise UnsafeCheckpointError(
            f"its tensors have {claimed} bytes together, but are all views of {available} bytes"
        )


def check_name(name: str, findings: Findings) -> None:
    """Note a tensor's name that is no name; refuse one that is far too long."""
    if len(name) > _MAX_NAME:
        raise UnsafeCheckpointError(
            f"tensor {quote(name)}: its name has {len(name)} characters, at most {_MAX_NAME} are "
            "accepted"
        )
    if not name.isprintable():
        findings.add("suspicious-name", f"tensor {quote(name)}: control characters in its name")
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or (len(parts) > 1 and (not parts[0] or parts[0][1:] == ":")):
        findings.add("suspicious-name", f"tensor {quote(name)}: its name is like a path")


def note_overlaps(tensors: Mapping[str, TensorEntry], findings: Findings) -> None:
    """Note tensors that share some of their weights without being the same view (tied weights)."""
    by_storage: dict[str, dict[tuple[object, ...], tuple[int, int, str]]] = {}
    for name, entry in tensors.items():
        if not math.prod(entry.shape):
            continue
        if _may_overlap_itself(entry):
            findings.add("overlapping-storage", f"tensor {quote(name)}: overlaps itself")
        size = ITEM_SIZES[entry.dtype]
        end = (_last(entry.shape, entry.strides, entry.offset) + 1) * size
        view = (entry.dtype, entry.shape, entry.strides, entry.offset)
        views = by_storage.setdefault(entry.storage, {})
        views.setdefault(view, (entry.offset * size, end, name))
    for different in by_storage.values():
        spans = sorted(different.values())
        reached = spans[0]
        for span in spans[1:]:
            if span[0] < reached[1]:
                findings.add(
                    "overlapping-storage",
                    f"tensors {quote(reached[2])} and {quote(span[2])}: their storages overlap",
                )
            reached = max(reached, span, key=lambda each: each[1])


def _own(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """The elements of a view without the dimensions that `Tensor.expand` repeats (stride 0)."""
    return math.prod(extent for extent, step in zip(shape, strides, strict=True) if step)


def _last(shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> int:
    """The largest element that a view with at least one element reaches."""
    return offset + sum((extent - 1) * step for extent, step in zip(shape, strides, strict=True))


def _may_overlap_itself(entry: TensorEntry) -> bool:
    reach = 0
    for step, extent in sorted(zip(entry.strides, entry.shape, strict=True)):
        if extent > 1 and step:  # expanded dimensions are no oddity
            if step <= reach:
                return True
            reach += step * (extent - 1)
    return False
