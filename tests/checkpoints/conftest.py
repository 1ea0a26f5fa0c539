"""What the checkpoint tests share: a mini CLIP, and a zip writer that can lie."""

from __future__ import annotations

import copy
import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

MINI_CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 32,
        "layers": 1,
        "width": 32,
        "head_width": 16,
        "patch_size": 16,
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 64,
        "width": 16,
        "heads": 2,
        "layers": 1,
    },
}


@pytest.fixture
def mini_config() -> dict[str, Any]:
    """The configuration of :func:`mini_clip`."""
    return copy.deepcopy(MINI_CONFIG)


@pytest.fixture(scope="session")
def mini_clip() -> torch.nn.Module:
    """A CLIP of open_clip with a few thousand weights."""
    torch.manual_seed(0)
    return open_clip.CLIP(**copy.deepcopy(MINI_CONFIG))


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


@pytest.fixture
def write_pt(tmp_path: Path) -> Callable[..., Path]:
    """Write a ``.pt`` around a pickle: ``write_pt(pickle_bytes, {"0": storage},
    **zip_options)``.
    """

    def write(
        pickle_bytes: bytes, storages: dict[str, bytes] | None = None, **options: Any
    ) -> Path:
        path = tmp_path / "file.pt"
        path.write_bytes(zip_bytes(torch_members(pickle_bytes, storages), **options))
        return path

    return write


@pytest.fixture
def make_zip() -> Callable[..., bytes]:
    """The function :func:`zip_bytes`."""
    return zip_bytes


@pytest.fixture
def make_members() -> Callable[..., list[Member]]:
    """The function :func:`torch_members`."""
    return torch_members


@pytest.fixture
def member() -> type[Member]:
    """The class :class:`Member`."""
    return Member
