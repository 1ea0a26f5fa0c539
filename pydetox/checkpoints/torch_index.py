"""Index of a ``.pt`` file: the zip archive that ``torch.save`` has written since torch 1.6."""

from __future__ import annotations

import zlib
from collections.abc import Mapping as MappingType

from pydetox.checkpoints.index import (
    FileIndex,
    Findings,
    Span,
    WeightsFile,
    check_name,
    check_sharing,
    fingerprint,
    note_overlaps,
    quote,
)
from pydetox.checkpoints.pickle_index import (
    MAX_PICKLE_BYTES,
    Mapping,
    Opaque,
    PickledTensor,
    read_pickle,
)
from pydetox.checkpoints.zip_index import read_members
from pydetox.errors import CheckpointError, UnsafeCheckpointError

# Where training scripts keep the weights, most common first; open_clip writes "state_dict".
_WEIGHT_ENTRIES = ("state_dict", "model_state_dict", "model")
# Wrappers (DistributedDataParallel, torch.compile) put these in front of every name.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
_MAX_VERSION = 10
_MAX_SMALL_RECORD = 64
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


def index_torch(file: WeightsFile) -> FileIndex:
    """Index the model's tensors in a ``.pt`` file; epoch, optimizer and the like are left out.

    Raises:
        CheckpointError: The file is damaged, TorchScript, or holds no dictionary of tensors.
        UnsafeCheckpointError: The file would run code elsewhere, or lies about its sizes.
    """
    findings = Findings()
    members, parsed = read_members(file)
    root = _archive_root(members)
    _check_records(file, members, root, parsed)
    for member in members:
        record = member.removeprefix(f"{root}/")
        if record not in _RECORDS and not record.startswith("data/"):
            findings.add("unknown-record", f"record {quote(member)}: torch.save writes no such")
    pickled = read_pickle(_record(file, members, f"{root}/data.pkl", parsed), findings)
    tensors = _model_tensors(pickled, findings)
    storages: dict[str, Span] = {}
    for name, tensor in tensors.items():
        key, claimed = tensor.storage.key, tensor.storage.nbytes
        span = members.get(f"{root}/data/{key}")
        if span is None:
            raise CheckpointError(f"tensor {quote(name)}: its record data/{quote(key)} is missing")
        if span.nbytes != claimed:
            raise UnsafeCheckpointError(
                f"tensor {quote(name)}: claims a storage of {claimed} bytes, but its record has "
                f"{span.nbytes}"
            )
        storages[key] = span
    entries = {name: tensor.entry for name, tensor in tensors.items()}
    check_sharing(entries.values(), storages)
    note_overlaps(entries, findings)
    wanted = {span.offset for span in storages.values()} | parsed.keys()
    spans, digest = fingerprint(parsed)
    return FileIndex(
        format="torch",
        tensors=entries,
        storages=storages,
        others=tuple(s for s in members.values() if s.offset not in wanted),
        findings=findings.result(),
        parsed=spans,
        parsed_sha256=digest,
    )


def strip_prefixes(names: list[str]) -> list[str]:
    """Remove the wrapper prefixes that *every* name carries, each once and in any order."""
    left = list(_WRAPPER_PREFIXES)
    while names:
        prefix = next((p for p in left if all(name.startswith(p) for name in names)), None)
        if prefix is None:
            break
        left.remove(prefix)
        names = [name[len(prefix) :] for name in names]
    return names


def _archive_root(members: MappingType[str, Span]) -> str:
    roots = {name.split("/", 1)[0] for name in members}
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1 or len(pickles) != 1:
        raise CheckpointError(
            "is a zip archive, but not one of torch: expected one folder with a record data.pkl"
        )
    root = roots.pop()
    if f"{root}/constants.pkl" in members or any(n.startswith(f"{root}/code/") for n in members):
        raise CheckpointError(
            "is a TorchScript archive, which holds code. Convert it where you trust it: "
            "torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)"
        )
    return root


def _check_records(
    file: WeightsFile, members: MappingType[str, Span], root: str, parsed: dict[int, bytes]
) -> None:
    """Check format version and byte order as torch's own reader does."""
    name = f"{root}/version" if f"{root}/version" in members else f"{root}/.data/version"
    version = _record(file, members, name, parsed, _MAX_SMALL_RECORD).strip()
    if not version.isdigit() or not 1 <= int(version) <= _MAX_VERSION:
        raise CheckpointError(
            f"has format version {quote(version)}, expected a number from 1 to {_MAX_VERSION}"
        )
    if f"{root}/byteorder" in members:
        order = _record(file, members, f"{root}/byteorder", parsed, _MAX_SMALL_RECORD)
        if order != b"little":
            raise CheckpointError(f"has byte order {quote(order)}, expected 'little'")


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


def _model_tensors(value: object, findings: Findings) -> dict[str, PickledTensor]:
    weights = value
    if isinstance(value, Mapping):
        nested = (value.get(name) for name in _WEIGHT_ENTRIES)
        weights = next((entry for entry in nested if isinstance(entry, Mapping)), value)
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"holds {_describe(value)}, expected a dictionary of tensors")
    found: dict[str, PickledTensor] = {}
    for key, entry in weights.pairs:
        if not isinstance(key, str):
            raise CheckpointError(f"has an entry whose name is {_describe(key)}, expected text")
        if not isinstance(entry, PickledTensor):
            raise CheckpointError(f"entry {quote(key)} is {_describe(entry)}, expected a tensor")
        if key in found:
            findings.add(
                "duplicate-key", f"tensor {quote(key)}: is there twice; the last one counts"
            )
        check_name(key, findings)
        found[key] = entry
    if not found:
        raise CheckpointError("holds no tensors")
    return dict(zip(strip_prefixes(list(found)), found.values(), strict=True))


def _describe(value: object) -> str:
    if isinstance(value, Mapping):
        return "a dictionary"
    if isinstance(value, Opaque):
        return f"an object of {quote(value.name)}"
    if isinstance(value, PickledTensor):
        return "a tensor"
    if value is None or isinstance(value, (bool, int, float, str, bytes, list, tuple)):
        return f"of type {type(value).__name__}"
    return "part of a tensor"
