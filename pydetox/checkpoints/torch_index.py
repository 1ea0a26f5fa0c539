"""Index of a ``.pt`` file: the zip archive that ``torch.save`` has written since torch 1.6."""

from __future__ import annotations

import zlib
from collections.abc import Mapping as MappingType

from pydetox.checkpoints.index import (
    FileIndex,
    Findings,
    Span,
    WeightsFile,
    check_sharing,
    fingerprint,
    note_overlaps,
    quote,
)
from pydetox.checkpoints.pickle_index import MAX_PICKLE_BYTES, read_pickle
from pydetox.checkpoints.pickle_values import PickledTensor
from pydetox.checkpoints.weight_sets import choose_weights, strip_prefixes, text_notes
from pydetox.checkpoints.zip_index import NOT_TORCH, TORCHSCRIPT, read_members
from pydetox.errors import CheckpointError, UnsafeCheckpointError

__all__ = ["index_torch", "lay_out", "strip_prefixes"]

_MAX_VERSION = 10
_MAX_SMALL_RECORD = 64
# What small records may say: the only values that torch has ever written, but for the alignment.
_SETTINGS = {
    "byteorder": (b"little",),
    ".format_version": (b"1",),
    ".storage_alignment": tuple(b"%d" % (1 << power) for power in (6, *range(6), *range(7, 17))),
}
_TORCHSCRIPT_RECORDS = frozenset({"constants.pkl"})
# What torch.save has written beside `data/`, over its versions.
_RECORDS = frozenset(
    {
        ".data/serialization_id",
        ".data/version",
        ".format_version",
        ".storage_alignment",
        "byteorder",
        "data.pkl",
        "version",
    }
)


def index_torch(file: WeightsFile, weights_key: str | None = None) -> FileIndex:
    """Index the model's tensors in a ``.pt`` file; epoch, optimizer and the like are left out.

    Args:
        file: The file.
        weights_key: Which dictionary holds the weights (see :func:`choose_weights`).

    Raises:
        CheckpointError: The file is damaged, TorchScript, or holds no dictionary of tensors.
        UnsafeCheckpointError: The file would run code elsewhere, or lies about its sizes.
    """
    findings = Findings()
    members, parsed = read_members(file)
    root = _archive_root(members)
    _check_names(members, root)
    _check_records(file, members, root, parsed)
    content = read_pickle(_record(file, members, f"{root}/data.pkl", parsed), findings)
    key, tensors = choose_weights(content.root, findings, weights_key)
    storages: dict[str, Span] = {}
    for name, tensor in tensors.items():
        record = f"{root}/data/{tensor.storage.key}"
        storages[tensor.storage.key] = _storage_span(name, tensor, members.get(record))
    known = {f"{root}/{record}" for record in _RECORDS}
    known |= {f"{root}/data/{storage}" for storage in content.storages}
    for member in members:
        if member not in known:
            findings.add(
                "unknown-record",
                f"record {quote(member)}: torch.save writes no such, or nothing refers to it",
            )
    wanted = {span.offset for span in storages.values()} | parsed.keys()
    others = tuple(span for span in members.values() if span.offset not in wanted)
    notes = {} if weights_key else text_notes(content.root)
    return lay_out(key, tensors, storages, others, findings, parsed, notes)


def lay_out(
    weights_key: str,
    tensors: dict[str, PickledTensor],
    storages: dict[str, Span],
    others: tuple[Span, ...],
    findings: Findings,
    parsed: dict[int, bytes],
    notes: dict[str, str] | None = None,
) -> FileIndex:
    """Make the index of a pickled checkpoint from its parts, after the last checks."""
    entries = {name: tensor.entry for name, tensor in tensors.items()}
    check_sharing(entries.values(), storages)
    note_overlaps(entries, findings)
    spans, digest = fingerprint(parsed)
    return FileIndex(
        format="torch",
        tensors=entries,
        storages=storages,
        others=others,
        metadata=notes or {},
        findings=findings.result(),
        weights_key=weights_key,
        parsed=spans,
        parsed_sha256=digest,
    )


def _storage_span(name: str, tensor: PickledTensor, span: Span | None) -> Span:
    key, claimed = tensor.storage.key, tensor.storage.nbytes
    if span is None:
        raise CheckpointError(f"tensor {quote(name)}: its record data/{quote(key)} is missing")
    if span.nbytes != claimed:
        raise UnsafeCheckpointError(
            f"tensor {quote(name)}: claims a storage of {claimed} bytes, but its record has "
            f"{span.nbytes}"
        )
    return span


def _archive_root(members: MappingType[str, Span]) -> str:
    roots = {name.split("/", 1)[0] for name in members}
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1 or len(pickles) != 1:
        raise CheckpointError(NOT_TORCH)
    return roots.pop()


def _check_names(members: MappingType[str, Span], root: str) -> None:
    """Refuse a record that torch's reader finds under another name: case is the same to it."""
    for member in members:
        record = member.removeprefix(f"{root}/")
        lower = record.encode().lower().decode()  # ASCII letters only, as in miniz
        if record != lower and (lower in _RECORDS or lower in _TORCHSCRIPT_RECORDS):
            raise UnsafeCheckpointError(
                f"record {quote(member)}: torch finds it as {quote(lower)} as well"
            )
        if record in _TORCHSCRIPT_RECORDS or record.startswith("code/"):
            raise CheckpointError(TORCHSCRIPT)


def _check_records(
    file: WeightsFile, members: MappingType[str, Span], root: str, parsed: dict[int, bytes]
) -> None:
    """Check format version, byte order and layout as torch's own reader does."""
    names = [n for n in (f"{root}/version", f"{root}/.data/version") if n in members]
    for name in names or [f"{root}/.data/version"]:
        version = _record(file, members, name, parsed, _MAX_SMALL_RECORD).strip()
        if not version.isdigit() or not 1 <= int(version) <= _MAX_VERSION:
            raise CheckpointError(
                f"has format version {quote(version)}, expected a number from 1 to {_MAX_VERSION}"
            )
    for record, accepted in _SETTINGS.items():
        if f"{root}/{record}" in members:
            value = _record(file, members, f"{root}/{record}", parsed, _MAX_SMALL_RECORD)
            if value not in accepted:
                what = "byte order" if record == "byteorder" else f"a record {record!r} of"
                raise CheckpointError(
                    f"has {what} {quote(value)}, expected {accepted[0].decode()!r}"
                )


def _record(
    file: WeightsFile,
    members: MappingType[str, Span],
    name: str,
    parsed: dict[int, bytes],
    limit: int = MAX_PICKLE_BYTES,
) -> bytes:
    span = members.get(name)
    if span is None:
        raise CheckpointError(f"is damaged: its record {quote(name)} is missing")
    if span.nbytes > limit:
        raise UnsafeCheckpointError(
            f"record {quote(name)} has {span.nbytes} bytes, at most {limit} are accepted"
        )
    data = file.read_at(span.offset, span.nbytes, f"record {quote(name)}")
    if zlib.crc32(data) != span.crc32:
        raise CheckpointError(f"is damaged: record {quote(name)} has a wrong checksum")
    parsed[span.offset] = data
    return data
