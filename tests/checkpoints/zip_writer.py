"""A zip writer that can lie."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Member:
    """One zip member; the directory's account of it can be changed after it was written."""

    name: str
    data: bytes
    method: int = 0
    flags: int = 0
    crc: int = field(init=False)
    packed: int = field(init=False)
    unpacked: int = field(init=False)
    offset: int = 0

    def __post_init__(self) -> None:
        self.crc = zlib.crc32(self.data)
        self.packed = self.unpacked = len(self.data)

    def local_header(self) -> bytes:
        name = self.name.encode()
        sizes = (self.crc, self.packed, self.unpacked)
        return (
            struct.pack(
                "<4s5H3L2H", b"PK\3\4", 0, self.flags, self.method, 0, 0, *sizes, len(name), 0
            )
            + name
        )

    def entry(self) -> bytes:
        name = self.name.encode()
        sizes = (self.crc, self.packed, self.unpacked, len(name), 0, 0, 0, 0, 0, self.offset)
        return (
            struct.pack("<4s6H3L5H2L", b"PK\1\2", 0, 0, self.flags, self.method, 0, 0, *sizes)
            + name
        )


def zip_bytes(
    members: list[Member],
    *,
    forge: Callable[[list[Member]], None] | None = None,
    before_directory: bytes = b"",
    comment: bytes = b"",
) -> bytes:
    """A zip archive; ``forge`` may change what the directory says after the data is written."""
    out = io.BytesIO()
    for member in members:
        member.offset = out.tell()
        out.write(member.local_header() + member.data)
    if forge is not None:
        forge(members)
    out.write(before_directory)
    start = out.tell()
    for member in members:
        out.write(member.entry())
    size = out.tell() - start
    count = len(members)
    out.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, start, len(comment)))
    out.write(comment)
    return out.getvalue()


def torch_members(pickle_bytes: bytes, storages: dict[str, bytes] | None = None) -> list[Member]:
    """The members of a file as ``torch.save`` would write it around a given pickle."""
    return [
        Member("archive/data.pkl", pickle_bytes),
        Member("archive/byteorder", b"little"),
        *(Member(f"archive/data/{key}", data) for key, data in (storages or {}).items()),
        Member("archive/version", b"3\n"),
    ]


def zip64_bytes(members: list[Member], cut: int = 0) -> bytes:
    out = io.BytesIO()
    entries = []
    for member in members:
        sizes = struct.pack("<3Q", member.unpacked, member.packed, out.tell())
        extra = struct.pack("<2H", 9, 0) + struct.pack("<2H", 1, 24 - cut) + sizes[: 24 - cut]
        out.write(member.local_header() + member.data)
        fields = (member.crc, 0xFFFFFFFF, 0xFFFFFFFF, len(member.name), len(extra), 0, 0, 0, 0)
        head = struct.pack("<4s6H3L5H2L", b"PK\1\2", 0, 0, 0, 0, 0, 0, *fields, 0xFFFFFFFF)
        entries.append(head + member.name.encode() + extra)
    start = out.tell()
    out.write(b"".join(entries))
    end64 = out.tell()
    count, size = len(members), end64 - start
    out.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 0, 0, 0, 0, count, count, size, start))
    out.write(struct.pack("<4sLQL", b"PK\6\7", 0, end64, 1))
    out.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, 0xFFFFFFFF, 0))
    return out.getvalue()
