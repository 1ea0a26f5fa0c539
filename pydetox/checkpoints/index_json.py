"""A :class:`~pydetox.checkpoints.index.FileIndex` as JSON, on its way out of the sandbox.

The reader trusts nothing that it gets: a sandbox that was taken over must not be able to do more
than to describe another harmless file.
"""

from __future__ import annotations

import json
from typing import Any, get_args

from pydetox.checkpoints.index import (
    ITEM_SIZES,
    FileIndex,
    Finding,
    Format,
    Rule,
    Span,
    TensorEntry,
    check_extents,
    check_sharing,
    check_view,
)
from pydetox.errors import CheckpointError

_MAX_MESSAGE = 1000


def to_json(index: FileIndex) -> bytes:
    """Write an index as one JSON array."""
    number = {key: i for i, key in enumerate(index.storages)}
    content = [
        index.format,
        # A name can be long and may be used by thousands of tensors.
        [[key, *_of_span(span)] for key, span in index.storages.items()],
        [
            [name, entry.dtype, entry.shape, entry.strides, number[entry.storage], entry.offset]
            + ([entry.conjugate, entry.negative] if entry.conjugate or entry.negative else [])
            for name, entry in index.tensors.items()
        ],
        [_of_span(span) for span in index.others],
        index.metadata,
        [[finding.rule, finding.message] for finding in index.findings],
        index.weights_key,
        [_of_span(span) for span in index.parsed],
        index.parsed_sha256,
    ]
    return json.dumps(content, separators=(",", ":"), check_circular=False).encode()


def from_json(data: bytes, size: int) -> FileIndex:
    """Read what :func:`to_json` wrote for a file of ``size`` bytes.

    Raises:
        CheckpointError: It is anything but the index of such a file.
    """
    try:
        return _index(json.loads(data), size)
    except (
        AttributeError,
        IndexError,
        KeyError,
        RecursionError,
        TypeError,
        ValueError,
        CheckpointError,
    ) as error:
        raise CheckpointError(
            f"the sandbox gave a senseless answer ({type(error).__name__})"
        ) from error


def _of_span(span: Span) -> list[int | None]:
    return [span.offset, span.nbytes, span.crc32]


def _index(content: Any, size: int) -> FileIndex:
    kind, storages, tensors, others, metadata, findings, weights_key, parsed, digest = content
    if kind not in get_args(Format):
        raise ValueError("format")
    spans = {_text(key): _span(fields, size) for key, *fields in storages}
    keys = list(spans)
    entries = {_text(fields[0]): _entry(keys, spans, fields) for fields in tensors}
    rest = [_span(fields, size) for fields in others]
    seams = [_span(fields, size) for fields in parsed]
    if len(keys) != len(storages) or len(entries) != len(tensors) or not entries:
        raise ValueError("names")
    _check_apart([*spans.values(), *rest, *seams])
    check_sharing(entries.values(), spans)
    if len(bytes.fromhex(digest)) != 32:
        raise ValueError("digest")
    return FileIndex(
        format=kind,
        tensors=entries,
        storages=spans,
        others=tuple(rest),
        metadata={_text(key): _text(value) for key, value in metadata.items()},
        findings=tuple(_finding(*fields) for fields in findings),
        weights_key=_text(weights_key),
        parsed=tuple(seams),
        parsed_sha256=digest,
    )


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError("text")
    return value


def _number(value: Any, limit: int) -> int:
    if type(value) is not int or not 0 <= value <= limit:
        raise ValueError("number")
    return value


def _span(fields: Any, size: int) -> Span:
    offset, nbytes, crc32 = fields
    span = Span(
        _number(offset, size),
        _number(nbytes, size),
        None if crc32 is None else _number(crc32, 0xFFFFFFFF),
    )
    if span.offset + span.nbytes > size:
        raise ValueError("span")
    return span


def _entry(keys: list[str], spans: dict[str, Span], fields: Any) -> TensorEntry:
    name, dtype, shape, strides, number, offset, *bits = fields
    conjugate, negative = bits or (False, False)
    if type(conjugate) is not bool or type(negative) is not bool:
        raise TypeError("bits")
    key = keys[_number(number, len(keys) - 1)]
    sizes, steps = check_extents(name, shape, "shape"), check_extents(name, strides, "stride")
    (first,) = check_extents(name, [offset], "offset")
    available, rest = divmod(spans[key].nbytes, ITEM_SIZES[dtype])
    if rest:
        raise ValueError("storage")
    check_view(name, sizes, steps, first, available)
    return TensorEntry(dtype, sizes, steps, key, first, conjugate, negative)


def _check_apart(spans: list[Span]) -> None:
    end = 0
    for span in sorted(spans, key=lambda each: (each.offset, each.nbytes)):
        if span.nbytes:
            if span.offset < end:
                raise ValueError("overlap")
            end = span.offset + span.nbytes


def _finding(rule: Any, message: Any) -> Finding:
    if rule not in get_args(Rule) or len(message) > _MAX_MESSAGE or not message.isprintable():
        raise ValueError("finding")
    return Finding(rule, message)
