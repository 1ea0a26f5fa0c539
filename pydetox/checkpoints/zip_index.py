"""The members of a zip archive, as far as ``torch.save`` uses zip: stored, never compressed.

Only what torch writes is accepted. Compression (zip bombs), encryption, several disks, overlapping
or repeated members, names that leave the archive and data hidden before or after it are refused
before anything is read from a member. Format: PKWARE APPNOTE 6.3.
"""

from __future__ import annotations

import struct
from typing import NoReturn

from pydetox.checkpoints.index import Span, WeightsFile, quote
from pydetox.errors import CheckpointError, UnsafeCheckpointError

MAX_DIRECTORY_BYTES = 8 << 20
TORCHSCRIPT = (
    "is a TorchScript archive (as OpenAI's CLIP files are), which holds code beside its weights. "
    "Write the weights alone where you trust the file: "
    "torch.save(torch.jit.load(FILE, map_location='cpu').state_dict(), NEW_FILE)"
)
NOT_TORCH = (
    "is a zip archive, but not one of torch: expected one folder with a record data.pkl; if the "
    "weights are a file in it, unpack that"
)
_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_SIZES_FOLLOW = 0x0008  # sizes are in a descriptor behind the data; the local header holds zeros
_MAX_DESCRIPTOR = 24  # signature, checksum and two sizes of 8 bytes
_UTF8 = 0x0800
_KNOWN_FLAGS = _SIZES_FOLLOW | _UTF8  # others mean encryption or patches
_MAX_NAME = 511  # torch cuts longer ones off in some places
_DIRECTORY = 0x10  # an MS-DOS attribute; some readers take such a member for empty


def read_members(file: WeightsFile) -> tuple[dict[str, Span], dict[int, bytes]]:
    """List an archive's members.

    Returns:
        Member name to the span of its data, and the bytes of the directory that say so, by offset.

    Raises:
        CheckpointError: The archive is truncated, damaged or not of the kind torch writes.
        UnsafeCheckpointError: It is built to deceive: compressed or overlapping members, paths that
            escape.
    """
    start, size, count, parsed = _find_directory(file)
    directory = file.read_at(start, size, "the zip directory")
    parsed[start] = directory
    members: dict[str, Span] = {}
    regions: list[tuple[int, int, str, int]] = []
    position = 0
    spellings: dict[bytes, str] = {}
    compressed: tuple[str, int, int] | None = None
    torchscript = torch_pickle = False
    for _ in range(count):
        if position + _ENTRY.size > size:
            raise CheckpointError(f"is damaged: its zip directory ends before entry {len(members)}")
        fields = _ENTRY.unpack_from(directory, position)
        signature, _made, _needed, flags, method, _time, _date, crc, packed, unpacked = fields[:10]
        name_size, extra_size, comment_size, disk, _internal, attributes, offset = fields[10:]
        position += _ENTRY.size
        tail = position + name_size + extra_size + comment_size
        if signature != b"PK\x01\x02" or tail > size:
            raise CheckpointError(f"is damaged: its zip directory is wrong at entry {len(members)}")
        name = _member_name(directory[position : position + name_size])
        extra = directory[position + name_size : position + name_size + extra_size]
        position = tail
        packed, unpacked, offset = _zip64_sizes(name, extra, packed, unpacked, offset)
        torch_pickle = torch_pickle or name.endswith("/data.pkl")
        if method != 0 or packed != unpacked:
            compressed = compressed or (name, packed, unpacked)
            torchscript = torchscript or "/code/" in f"/{name}"
            continue
        if flags & ~_KNOWN_FLAGS or disk or attributes & _DIRECTORY:
            raise CheckpointError(
                f"record {quote(name)} is encrypted, a directory or on another disk"
            )
        if name in members:
            raise UnsafeCheckpointError(f"record {quote(name)} is in the zip archive twice")
        _check_unlike(name, spellings)
        data = _data_offset(file, name, offset, crc, unpacked, parsed)
        if data + unpacked > start:
            raise UnsafeCheckpointError(
                f"record {quote(name)} claims {unpacked} bytes, more than the file has"
            )
        members[name] = Span(data, unpacked, crc)
        regions.append((offset, data + unpacked, name, flags))
    if position != size:
        raise CheckpointError(f"is damaged: {size - position} stray bytes in its zip directory")
    if compressed is not None and not torch_pickle:
        raise CheckpointError(NOT_TORCH)
    if compressed is not None:
        _refuse_compressed(*compressed, torchscript=torchscript)
    _check_layout(regions, start)
    return members, parsed


def _check_unlike(name: str, spellings: dict[bytes, str]) -> None:
    """Refuse two records that torch takes for one: it ignores the case of ASCII letters."""
    other = spellings.setdefault(name.encode().lower(), name)
    if other != name:
        raise UnsafeCheckpointError(
            f"records {quote(other)} and {quote(name)} are the same to torch, which ignores case"
        )


def _refuse_compressed(name: str, packed: int, unpacked: int, *, torchscript: bool) -> NoReturn:
    if torchscript:
        raise CheckpointError(TORCHSCRIPT)
    raise UnsafeCheckpointError(
        f"record {quote(name)} is compressed ({packed} bytes claim to be {unpacked}); "
        "torch stores records uncompressed, so this may be a zip bomb"
    )


def _check_layout(regions: list[tuple[int, int, str, int]], directory: int) -> None:
    """Check that the members lie one behind the other from the first byte to the directory.

    Args:
        regions: First byte, byte after the last, name and flags of each member.
        directory: Where the directory begins.
    """
    position, slack, previous = 0, 0, "the start of the file"
    for begin, end, name, flags in [*sorted(regions), (directory, directory, "", 0)]:
        here = f"record {quote(name)}" if name else "the zip directory"
        if begin < position:
            raise UnsafeCheckpointError(f"{previous} and {here} overlap in the zip archive")
        if begin - position > slack:
            raise UnsafeCheckpointError(
                f"has {begin - position} hidden bytes between {previous} and {here}"
            )
        position, previous = end, here
        slack = _MAX_DESCRIPTOR if flags & _SIZES_FOLLOW else 0


def _find_directory(file: WeightsFile) -> tuple[int, int, int, dict[int, bytes]]:
    """Find offset, size and number of entries of the central directory."""
    end_at = file.size - _END.size
    end = file.read_at(end_at, _END.size, "the end of the zip archive")
    signature, disk, start_disk, here, count, size, start, comment = _END.unpack(end)
    if signature != b"PK\x05\x06" or comment:
        _explain_end(file)
    parsed = {end_at: end}
    directory_end = end_at
    locator_at = end_at - _END64_LOCATOR.size
    locator = (
        file.read_at(locator_at, _END64_LOCATOR.size, "the zip archive") if locator_at >= 0 else b""
    )
    if locator[:4] == b"PK\x06\x07":
        _, end64_disk, end64_at, disks = _END64_LOCATOR.unpack(locator)
        end64 = file.read_at(end64_at, _END64.size, "the zip64 end record")
        (signature64, size64, *_, disk, start_disk, here, count, size, start) = _END64.unpack(end64)
        if signature64 != b"PK\x06\x06" or size64 != _END64.size - 12:
            raise CheckpointError("is damaged: its zip64 end record is wrong")
        if end64_disk != 0 or disks != 1:  # torch refuses a number of 0, too
            raise CheckpointError("is damaged: a zip archive in several parts")
        if end64_at + _END64.size != locator_at:
            raise CheckpointError("is damaged: data between the end records of its zip archive")
        parsed[end64_at] = end64
        parsed[locator_at] = locator
        directory_end = end64_at
    if disk or start_disk or here != count:
        raise CheckpointError("is damaged: a zip archive in several parts")
    if start + size != directory_end:
        raise CheckpointError("is damaged: its zip directory is not where its end record says")
    if size > MAX_DIRECTORY_BYTES:
        raise UnsafeCheckpointError(
            f"has a zip directory of {size} bytes, at most {MAX_DIRECTORY_BYTES} are accepted"
        )
    return start, size, count, parsed


def _explain_end(file: WeightsFile) -> NoReturn:
    """Say why a file does not end with the end record of a zip archive."""
    tail_at = max(0, file.size - _END.size - 0xFFFF)
    tail = file.read_at(tail_at, file.size - tail_at, "the end of the zip archive")
    found = tail.rfind(b"PK\x05\x06")
    if 0 <= found <= len(tail) - _END.size:
        comment = int.from_bytes(tail[found + _END.size - 2 : found + _END.size], "little")
        behind = len(tail) - found - _END.size
        what = "a comment of " if comment == behind else ""
        raise CheckpointError(
            f"has {what}{behind} bytes behind the end of its zip archive, where torch.save writes "
            "nothing"
        )
    raise CheckpointError("is truncated or damaged: a zip archive without its end record")


def _member_name(raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"has a record whose name is not text: {quote(raw)}") from None
    if len(raw) > _MAX_NAME:
        raise UnsafeCheckpointError(
            f"record {quote(name)}: its name has {len(raw)} bytes, torch reads {_MAX_NAME} of them"
        )
    parts = name.split("/")
    if "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise UnsafeCheckpointError(
            f"record {quote(name)} has a name that is not a plain path inside the archive"
        )
    return name


def _zip64_sizes(
    name: str, extra: bytes, packed: int, unpacked: int, offset: int
) -> tuple[int, int, int]:
    """Replace what does not fit 32 bits by the zip64 extra field (APPNOTE 4.5.3)."""
    values = [unpacked, packed, offset]
    wanted = [i for i, value in enumerate(values) if value == 0xFFFFFFFF]
    if not wanted:
        return packed, unpacked, offset
    position, found = 0, 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        position += 4
        if kind == 0x0001:
            found += 1
            if 8 * len(wanted) <= length <= len(extra) - position:
                for i, slot in enumerate(wanted):
                    (values[slot],) = struct.unpack_from("<Q", extra, position + 8 * i)
            else:
                found = 2
        position += length
    if found != 1:  # of two, readers take the first or the last
        raise CheckpointError(f"is damaged: record {quote(name)} lacks its zip64 sizes")
    return values[1], values[0], values[2]


def _data_offset(
    file: WeightsFile, name: str, offset: int, crc: int, nbytes: int, parsed: dict[int, bytes]
) -> int:
    """Find a member's data, after checking its local header against the directory."""
    local = file.read_at(offset, _LOCAL.size, f"record {quote(name)}")
    signature, _needed, flags, method, _time, _date, *rest = _LOCAL.unpack(local)
    local_crc, packed, unpacked, name_size, extra_size = rest
    header = local + file.read_at(offset + _LOCAL.size, name_size, f"record {quote(name)}")
    if signature != b"PK\x03\x04" or header[_LOCAL.size :] != name.encode():
        raise CheckpointError(
            f"is damaged: record {quote(name)} is not where the zip directory says"
        )
    sizes_known = not flags & _SIZES_FOLLOW and 0xFFFFFFFF not in (packed, unpacked)
    if (
        method != 0
        or flags & ~_KNOWN_FLAGS
        or (sizes_known and (packed != nbytes or unpacked != nbytes or local_crc != crc))
    ):
        raise UnsafeCheckpointError(
            f"record {quote(name)} is described differently in the zip directory and at its data"
        )
    parsed[offset] = header
    return offset + len(header) + int(extra_size)
