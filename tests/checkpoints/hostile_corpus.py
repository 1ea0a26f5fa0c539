"""Files that are built to do harm, each with what has to become of it.

`CORPUS` is the list; `measure` reads one of them as a user would and says how long it took and how
much memory. From the command line, all of them, as one JSON object:

    python -m tests.checkpoints.hostile_corpus
"""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import struct
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from pydetox.checkpoints import load_checkpoint, sandbox
from pydetox.checkpoints.pickle_index import MAX_INSTRUCTIONS, MAX_PICKLE_BYTES
from pydetox.checkpoints.safetensors_index import MAX_HEADER_BYTES
from pydetox.checkpoints.shards import MAX_INDEX_BYTES
from pydetox.checkpoints.zip_index import MAX_DIRECTORY_BYTES
from pydetox.errors import CheckpointError, UnsafeCheckpointError
from tests.checkpoints.zip_writer import Member, torch_members, zip64_bytes, zip_bytes

#: A folder in; the path to be read out.
Builder = Callable[[Path], Path]

REFUSED, UNSAFE = CheckpointError, UnsafeCheckpointError

#: What reading a file may cost, hostile or not: memory above the process as it was, and processor
#: time.
MAX_PEAK_MIB = 300
MAX_SECONDS = 2


@dataclass(frozen=True)
class Hostile:
    """A hostile file.

    Attributes:
        name: What it tries, in a few words.
        build: Writes it into an empty folder.
        error: The exact class of the error that refuses it; None if it is read with a finding.
        expected: Regular expression for the message, or the rule of the finding.
    """

    name: str
    build: Builder
    error: type[CheckpointError] | None
    expected: str


CORPUS: list[Hostile] = []


def hostile(
    name: str, error: type[CheckpointError] | None, expected: str
) -> Callable[[Builder], Builder]:
    def add(build: Builder) -> Builder:
        CORPUS.append(Hostile(name, build, error, expected))
        return build

    return add


def content(
    name: str, error: type[CheckpointError] | None, expected: str, file: str = "a.pt"
) -> Callable[[Callable[[], bytes]], Callable[[], bytes]]:
    """Like `hostile`, for a function that returns the content of one file."""

    def add(make: Callable[[], bytes]) -> Callable[[], bytes]:
        def build(folder: Path) -> Path:
            (folder / file).write_bytes(make())
            return folder / file

        CORPUS.append(Hostile(name, build, error, expected))
        return make

    return add


def pt(pickled: bytes, storages: dict[str, bytes] | None = None, **options: Any) -> bytes:
    return zip_bytes(torch_members(pickled, storages), **options)


def saved(state: object) -> tuple[bytes, dict[str, bytes]]:
    """Pickle and storages of what `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as archive:
        records = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    return records["data.pkl"], {n[5:]: d for n, d in records.items() if n.startswith("data/")}


def plain() -> bytes:
    return pt(*saved({"a": torch.ones(200)}))


class Calls:
    """Unpickling this calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def named(module: str, name: str, arguments: bytes = b")") -> bytes:
    """A pickle that calls `module.name`."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + arguments + b"R."


# ---- pickles that run code ----------------------------------------------------------------------

TEXT = b"X\x02\0\0\0id"

for module, name in [
    ("os", "system"),
    ("posix", "system"),
    ("builtins", "eval"),
    ("__builtin__", "exec"),
    ("builtins", "getattr"),
    ("subprocess", "Popen"),
    ("importlib", "import_module"),
    ("runpy", "run_path"),
    ("operator", "attrgetter"),
    ("torch", "load"),
    ("torch.hub", "load"),
    ("torch.storage", "_load_from_bytes"),
    ("torch._utils", "_import_dotted_name"),
    ("numpy", "load"),
    ("pip._internal.cli.main", "main"),
    ("joblib", "load"),
    ("harmless.os", "system"),
    ("harmless", "logging.sys.modules"),
    ("harmless", "Thing.__class__"),
    ("bdb", "Bdb"),
    ("torch\x1b[2J", "load"),
]:
    content(f"calls {module}.{name}", UNSAFE, "asks for")(
        lambda m=module, n=name: pt(named(m, n, TEXT + b"\x85"))  # type: ignore[misc]
    )


@content("os.system by protocol 4 and STACK_GLOBAL", UNSAFE, r"asks for '(posix|nt)\.system'")
def _() -> bytes:
    return pt(pickle.dumps(Calls(os.system, "true"), protocol=4))


@content("code in a checkpoint that torch wrote", UNSAFE, r"asks for '(posix|nt)\.mkdir'")
def _() -> bytes:
    state = {"state_dict": {"a": torch.ones(2)}, "epoch": Calls(os.mkdir, "pwned")}
    return pt(*saved(state))


@content("instruction INST", UNSAFE, r"asks for 'os\.system'")
def _() -> bytes:
    return pt(b"(S'id'\nios\nsystem\n.".replace(b"S'id'\n", TEXT))


@content("instruction OBJ", UNSAFE, "instruction OBJ")
def _() -> bytes:
    return pt(b"\x80\x02(ccollections\nOrderedDict\no.")


@content("extension registry", UNSAFE, "instruction EXT1")
def _() -> bytes:
    return pt(b"\x80\x02\x82\x01.")


@content("next buffer", UNSAFE, "instruction NEXT_BUFFER")
def _() -> bytes:
    return pt(b"\x80\x05\x97.")


@content("a second pickle behind the first", UNSAFE, "hidden bytes")
def _() -> bytes:
    return pt(b"\x80\x02}." + named("os", "system", TEXT + b"\x85"))


@content("a chain of calls to reach a function", REFUSED, "no function")
def _() -> bytes:
    inner = b"ccollections\nOrderedDict\n)R"
    return pt(b"\x80\x02" + inner + b")R" * 1000 + b".")


# ---- pickles that use up memory or time ---------------------------------------------------------


@content("memo bomb", UNSAFE, "memo bomb")
def _() -> bytes:
    return pt(b"\x80\x02}r" + struct.pack("<I", 250_000_000) + b".")


@content("flood of instructions", UNSAFE, "more than 500000 instructions")
def _() -> bytes:
    return pt(b"\x80\x02" + b"]" * MAX_INSTRUCTIONS + b".")


@content("flood of memo entries", UNSAFE, "more than 500000 instructions")
def _() -> bytes:
    return pt(b"\x80\x04}" + b"\x94" * MAX_INSTRUCTIONS + b".")


@content("oversized pickle", UNSAFE, "at most 16777216 are accepted")
def _() -> bytes:
    return pt(b"N" * (MAX_PICKLE_BYTES + 1))


@content("deep nesting", REFUSED, "holds a tuple")
def _() -> bytes:
    return pt(b"\x80\x02)" + b"\x85" * 450_000 + b".")


@content("deep nesting as a key", REFUSED, "name is a tuple")
def _() -> bytes:
    return pt(b"\x80\x02})" + b"\x85" * 450_000 + b"Ns.")


@content("a list of itself twice, and so on", REFUSED, "holds a list")
def _() -> bytes:
    return pt(b"\x80\x02]q\0" + b"(h\0h\0e" * 100_000 + b".")


@content("a text that is longer than the file", REFUSED, "truncated or damaged")
def _() -> bytes:
    return pt(b"\x80\x02X\xff\xff\xff\x7fabc.")


@content("a name of a million characters", UNSAFE, "at most 4096 are accepted")
def _() -> bytes:
    pickled, storages = saved({"a": torch.ones(1)})
    long = b"X" + struct.pack("<I", 1_000_000) + b"n" * 1_000_000
    return pt(pickled.replace(b"X\1\0\0\0a", long), storages)


@content("a million names by reference", UNSAFE, "more than 500000 instructions")
def _() -> bytes:
    return pt(b"\x80\x02}(X\4\0\0\0nameq\0" + b"h\0h\0" * 500_000 + b"u.")


# ---- tensors that lie about their storage -------------------------------------------------------


@content("forged storage size", UNSAFE, "claims a storage of 4294967296 bytes")
def _() -> bytes:
    pickled, storages = saved({"a": torch.ones(200)})
    return pt(pickled.replace(b"K\xc8", b"J\0\0\0\x40"), storages)


@content("view beyond its storage", UNSAFE, "reaches beyond the 200 elements")
def _() -> bytes:
    pickled, storages = saved({"a": torch.ones(200)[:150]})
    return pt(pickled.replace(b"K\x96", b"K\xc9"), storages)


@content("negative size", REFUSED, "not an integer")
def _() -> bytes:
    pickled, storages = saved({"a": torch.ones(200)[:150]})
    return pt(pickled.replace(b"K\x96", b"J\xff\xff\xff\xff"), storages)


@content("stride 0: a few bytes become gigabytes", UNSAFE, "but are all views of 4 bytes")
def _() -> bytes:
    return pt(*saved({"a": torch.ones(1).expand(1 << 31)}))


@content("overlapping strides: a few bytes become gigabytes", UNSAFE, "repeats a storage")
def _() -> bytes:
    return pt(*saved({"a": torch.ones(100).as_strided((50, 50), (1, 1))}))


@content("one storage in a thousand tensors", UNSAFE, "are all views of")
def _() -> bytes:
    big = torch.zeros(1000)
    return pt(*saved({str(i): big for i in range(1000)}))


@content("product of sizes beyond 64 bits", UNSAFE, "reaches beyond|repeats")
def _() -> bytes:
    pickled, storages = saved({"a": torch.ones(1).expand(200, 200, 200)})
    return pt(pickled.replace(b"K\xc8", b"\x8a\x05\0\0\0\0\x10"), storages)


@content("storage that is not there", REFUSED, "is missing")
def _() -> bytes:
    return pt(saved({"a": torch.ones(200)})[0])


@content("overlapping views of one storage", None, "overlapping-storage")
def _() -> bytes:
    base = torch.arange(100.0)
    return pt(*saved({"a": base[:60], "b": base[40:]}))


@content("view that overlaps itself", None, "overlapping-storage")
def _() -> bytes:
    return pt(*saved({"a": torch.arange(100.0).as_strided((5, 5), (1, 1))}))


@content("a name twice in a .pt", None, "duplicate-key")
def _() -> bytes:
    pickled, storages = saved({"a": torch.ones(1), "b": torch.zeros(1)})
    return pt(pickled.replace(b"X\1\0\0\0b", b"X\1\0\0\0a"), storages)


@content("class of an unknown package", None, "unknown-global")
def _() -> bytes:
    pickled, storages = saved({"state_dict": {"a": torch.ones(1)}, "epoch": 3})
    return pt(pickled.replace(b"K\x03", named("someproject.options", "Options")[2:-1]), storages)


@content("NaN in the weights", None, "non-finite")
def _() -> bytes:
    return pt(*saved({"a": torch.tensor([1.0, float("nan")])}))


@content("infinity in the weights", None, "non-finite")
def _() -> bytes:
    return pt(*saved({"a": torch.tensor([1.0, float("-inf")])}))


@content("escape sequences in a name", None, "suspicious-name")
def _() -> bytes:
    return pt(*saved({"\x1b[2J\x1b[31m\r\n": torch.ones(1)}))


# ---- zip archives -------------------------------------------------------------------------------


@content("zip bomb", UNSAFE, "zip bomb")
def _() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member in torch_members(b"\x80\x02}."):
            archive.writestr(member.name, member.data)
        archive.writestr("archive/data/0", bytes(256 << 20), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


@content("compressed pickle", UNSAFE, "is compressed")
def _() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in torch_members(b"\x80\x02}." + bytes(1000)):
            archive.writestr(member.name, member.data)
    return buffer.getvalue()


@content("zip64 sizes that are cut off", REFUSED, "lacks its zip64 sizes")
def _() -> bytes:
    return zip64_bytes(torch_members(*saved({"a": torch.ones(200)})), cut=8)


@content("zip64 end record that points to itself", REFUSED, "zip64 end record|zip directory")
def _() -> bytes:
    raw = bytearray(zip64_bytes(torch_members(*saved({"a": torch.ones(2)}))))
    locator = raw.rindex(b"PK\6\7")
    raw[locator + 8 : locator + 16] = struct.pack("<Q", locator)
    return bytes(raw)


def forged(what: str, error: type[CheckpointError], expected: str, **changes: Any) -> None:
    """An archive whose directory says something else of its second member than its data."""

    def forge(members: list[Member]) -> None:
        for key, value in changes.items():
            setattr(members[1], key, value)

    content(what, error, expected)(lambda: pt(b"\x80\x02}.", forge=forge))


forged(
    "directory and data disagree in size", UNSAFE, "differently", packed=1 << 30, unpacked=1 << 30
)
forged("directory and data disagree in checksum", UNSAFE, "described differently", crc=1)
forged("directory names a member that is not there", REFUSED, "not where", offset=1)
forged("member beyond the file", REFUSED, "truncated or damaged", offset=1 << 30)
forged("encrypted member", REFUSED, "encrypted", flags=1)
forged("a member twice", UNSAFE, "twice", name="archive/data.pkl", offset=0)

for path in (
    "../evil",
    "/etc/cron.d/evil",
    "archive/../../evil",
    "archive\\..\\evil",
    "//host/evil",
):
    content(f"member named {path}", UNSAFE, "not a plain path")(
        lambda p=path: zip_bytes([*torch_members(b"\x80\x02}."), Member(p, b"x")])  # type: ignore[misc]
    )


@content("overlapping members", UNSAFE, "overlap in the zip archive")
def _() -> bytes:
    inner = Member("archive/data/1", b"x" * 100)
    outer = Member("archive/data/0", inner.local_header() + inner.data)

    def forge(written: list[Member]) -> None:
        inner.offset = outer.offset + len(outer.local_header())
        written.append(inner)

    return zip_bytes([*torch_members(b"\x80\x02}."), outer], forge=forge)


@content("bytes hidden before the directory", UNSAFE, "hidden bytes")
def _() -> bytes:
    return pt(b"\x80\x02}.", before_directory=b"#!/bin/sh\nid\n" * 100)


@content("oversized zip directory", UNSAFE, "zip directory of .* bytes, at most 8388608")
def _() -> bytes:
    count = MAX_DIRECTORY_BYTES // 65000 + 1
    return zip_bytes([Member(f"archive/{number:065000d}", b"") for number in range(count)])


@content("wrong checksum of the pickle", REFUSED, "wrong checksum")
def _() -> bytes:
    pickled, storages = saved({"a": torch.ones(200)})
    raw = bytearray(pt(pickled, storages))
    raw[raw.index(pickled)] ^= 1
    return bytes(raw)


@content("wrong checksum of the weights", REFUSED, "wrong checksum")
def _() -> bytes:
    pickled, storages = saved({"a": torch.ones(200)})
    raw = bytearray(pt(pickled, storages))
    raw[raw.index(storages["0"])] ^= 1
    return bytes(raw)


@content("other byte order", REFUSED, "byte order")
def _() -> bytes:
    members = torch_members(*saved({"a": torch.ones(2)}))
    members[1] = Member("archive/byteorder", b"big")
    return zip_bytes(members)


@content("format version of the future", REFUSED, "format version")
def _() -> bytes:
    members = torch_members(*saved({"a": torch.ones(2)}))
    members[-1] = Member("archive/version", b"9" * 60)
    return zip_bytes(members)


@content("code of TorchScript", REFUSED, "TorchScript")
def _() -> bytes:
    return zip_bytes([*torch_members(b"\x80\x02}."), Member("archive/code/__torch__.py", b"x")])


@content("a record that torch never writes", None, "unknown-record")
def _() -> bytes:
    members = torch_members(*saved({"a": torch.ones(2)}))
    return zip_bytes([*members, Member("archive/install.sh", b"#!/bin/sh\n")])


# ---- files of another kind ----------------------------------------------------------------------


@content("truncated archive", REFUSED, "truncated or damaged")
def _() -> bytes:
    return plain()[:-30]


@content("truncated in its weights", REFUSED, "truncated or damaged")
def _() -> bytes:
    return plain()[:400]


@content("empty file", REFUSED, "is empty")
def _() -> bytes:
    return b""


@content("pickle of torch before 1.6", UNSAFE, r"asks for '(posix|nt)\.system'")
def _() -> bytes:
    buffer = io.BytesIO()
    torch.save(Calls(os.system, "true"), buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@content("tar of torch before 0.1.10", REFUSED, "tar archive")
def _() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"), io.BytesIO())
    return buffer.getvalue()


@content("bare pickle", REFUSED, "bare pickle")
def _() -> bytes:
    return pickle.dumps(Calls(os.system, "true"), protocol=2)


@content("pointer of Git LFS", REFUSED, "Git LFS pointer")
def _() -> bytes:
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 605157884\n"


@content("pickle under the name .safetensors", REFUSED, "named .safetensors", "a.safetensors")
def _() -> bytes:
    return plain()


@hostile("FIFO", REFUSED, "not a regular file")
def _(folder: Path) -> Path:
    os.mkfifo(folder / "a.pt")
    return folder / "a.pt"


@hostile("device", REFUSED, "not a regular file")
def _(folder: Path) -> Path:
    (folder / "a.pt").symlink_to("/dev/zero")
    return folder / "a.pt"


@hostile("socket", REFUSED, "cannot be opened|not a regular file")
def _(folder: Path) -> Path:
    descriptor = os.open(folder, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{descriptor}/a.pt")  # a socket's path may have 107 bytes
    os.close(descriptor)
    return folder / "a.pt"


@hostile("symbolic link to itself", REFUSED, "cannot be opened|no such file")
def _(folder: Path) -> Path:
    (folder / "a.pt").symlink_to("a.pt")
    return folder / "a.pt"


@hostile("folder under the name of a file", REFUSED, "holds no weights")
def _(folder: Path) -> Path:
    (folder / "a.pt").mkdir()
    return folder / "a.pt"


@hostile("sparse file of a terabyte", REFUSED, "more than the .* of memory")
def _(folder: Path) -> Path:
    size = 1 << 39
    header = json.dumps({"a": entry(0, size, [size // 4])}).encode()
    with (folder / "a.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    return folder / "a.safetensors"


# ---- safetensors --------------------------------------------------------------------------------


def entry(begin: int = 0, end: int = 4, shape: Any = (1,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def st(header: bytes | dict[str, Any], data: bytes = bytes(4)) -> bytes:
    raw = json.dumps(header).encode() if isinstance(header, dict) else header
    return len(raw).to_bytes(8, "little") + raw + data


def safe(
    name: str, error: type[CheckpointError] | None, expected: str, make: Callable[[], bytes]
) -> None:
    content(name, error, expected, "a.safetensors")(make)


E4 = json.dumps(entry()).encode()
safe("claimed header of exabytes", UNSAFE, "claims a header", lambda: b"\xff" * 8 + b"{")
safe(
    "header of 60 MB",
    UNSAFE,
    "claims a header of 60000000",
    lambda: st(b'{"a":' + E4 + b"}" + b" " * (60_000_000 - len(E4) - 6)),
)
safe(
    "header full of empty lists",
    REFUSED,
    "expected dtype, shape",
    lambda: st(b'{"a":[' + b"[]," * ((MAX_HEADER_BYTES - 20) // 3) + b"[]]}"),
)
safe(
    "header full of empty objects",
    REFUSED,
    "shape holds something",
    lambda: st(
        b'{"a":{"dtype":"F32","data_offsets":[0,4],"shape":['
        + b"{}," * 60
        + b'{}]},"b":['
        + b"{}," * ((MAX_HEADER_BYTES - 400) // 3)
        + b"{}]}"
    ),
)
safe("header of nested lists", REFUSED, "not valid JSON", lambda: st(b'{"a":' + b"[" * 1_000_000))
safe("NaN as JSON", REFUSED, "not valid JSON", lambda: st(b'{"a":NaN}'))
safe(
    "a number of a million digits", REFUSED, "JSON", lambda: st(b'{"a":' + b"9" * 1_000_000 + b"}")
)
safe("a name twice", None, "duplicate-key", lambda: st(b'{"a":%b,"a":%b}' % (E4, E4)))
safe(
    "a field twice",
    REFUSED,
    "each once",
    lambda: st(b'{"a":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}'),
)
safe("metadata twice", REFUSED, "metadata", lambda: st(b'{"__metadata__":{},"__metadata__":{}}'))
safe("overlapping offsets", REFUSED, "no overlap", lambda: st({"a": entry(), "b": entry()}))
safe("gap in the offsets", REFUSED, "no gaps", lambda: st({"a": entry(4, 8)}, bytes(8)))
safe("bytes behind the last tensor", REFUSED, "describes", lambda: st({"a": entry()}, bytes(9)))
safe("truncated weights", REFUSED, "truncated", lambda: st({"a": entry()}, bytes(3)))
safe("negative shape", REFUSED, "not an integer", lambda: st({"a": entry(shape=[-1])}))
safe("huge shape", REFUSED, "not an integer", lambda: st({"a": entry(shape=[1 << 62])}))
safe(
    "product of a shape beyond 64 bits",
    REFUSED,
    "data_offsets",
    lambda: st({"a": entry(0, 0, [1 << 32, 1 << 32])}, b""),
)
safe("a thousand dimensions", REFUSED, "dimensions", lambda: st({"a": entry(shape=[1] * 1000)}))
safe("offsets as fractions", REFUSED, "integer", lambda: st({"a": entry(0.0, 4.0)}))  # type: ignore[arg-type]
safe("name of a lone surrogate", REFUSED, "not text", lambda: st(b'{"\\ud800":%b}' % E4))
safe("escape sequences in a name ", None, "suspicious-name", lambda: st({"\x1b[2Ja\n": entry()}))
safe("name that is a path", None, "suspicious-name", lambda: st({"../../etc/passwd": entry()}))
safe("name that is a share", None, "suspicious-name", lambda: st({"\\\\host\\share": entry()}))
safe("zip appended to safetensors", REFUSED, "describes", lambda: st({"a": entry()}) + plain())
safe(
    "page of HTML",
    REFUSED,
    "not a safetensors file",
    lambda: b"<!DOCTYPE html><script>alert(1)</script>",
)


# ---- shards -------------------------------------------------------------------------------------


def sharded(name: str, error: type[CheckpointError], expected: str, raw: object) -> None:
    """An index of shards, beside one good shard `good.safetensors` with the tensor `a`."""

    def build(folder: Path) -> Path:
        inside = folder / "inside"
        inside.mkdir()
        for place in (inside / "good.safetensors", folder / "outside.safetensors"):
            safetensors.torch.save_file({"a": torch.ones(1)}, place)
        (inside / "link.safetensors").symlink_to("../outside.safetensors")
        (inside / "loop.safetensors").symlink_to("loop.safetensors")
        text = raw if isinstance(raw, bytes) else json.dumps({"weight_map": raw}).encode()
        (inside / "model.safetensors.index.json").write_bytes(text)
        return inside / "model.safetensors.index.json"

    CORPUS.append(Hostile(f"shards: {name}", build, error, expected))


sharded("parent folder", UNSAFE, "plain name", {"a": "../outside.safetensors"})
sharded("absolute path", UNSAFE, "plain name", {"a": "/etc/shadow.safetensors"})
sharded("share", UNSAFE, "plain name", {"a": "\\\\host\\share\\x.safetensors"})
sharded("drive", UNSAFE, "plain name", {"a": "C:x.safetensors"})
sharded("a pickle", UNSAFE, "plain name", {"a": "pytorch_model.bin"})
sharded("link out of the folder", UNSAFE, "symbolic link", {"a": "link.safetensors"})
sharded("link to itself", REFUSED, "is missing", {"a": "loop.safetensors"})
sharded("missing shard", REFUSED, "'none.safetensors': is missing", {"a": "none.safetensors"})
sharded("missing tensor", REFUSED, r"lacks .* \('b'\)", dict.fromkeys("ab", "good.safetensors"))
sharded("another tensor", REFUSED, "lacks", {"b": "good.safetensors"})
sharded(
    "thousands of shards", UNSAFE, "at most 256", {str(i): f"{i}.safetensors" for i in range(9999)}
)
sharded(
    "a name twice", UNSAFE, "twice", b'{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}'
)
sharded("nested lists", REFUSED, "JSON", b"[" * 1_000_000)
sharded("oversized", UNSAFE, "at most 4194304", b" " * (MAX_INDEX_BYTES + 1))
sharded("no map", REFUSED, "weight_map", b"[]")


# ---- measuring ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of a file.

    Attributes:
        error: What refused it.
        rules: Of its findings.
        seconds: Wall time.
        cpu_seconds: Processor time of this process and of the child.
        peak_mib: Memory above what the process had before.
    """

    error: CheckpointError | None
    rules: tuple[str, ...]
    seconds: float
    cpu_seconds: float
    peak_mib: float


def measure(path: Path) -> Outcome:
    """Read a file as a user would.

    The peak is that of this process or that of the child that indexed the file, whichever grew more
    (Linux: the high-water mark of the resident set is set back before).
    """
    _start_sandbox()
    assert sandbox._sandbox is not None
    sandbox._sandbox.peak_kib, sandbox._sandbox.cpu_seconds = 0, 0.0
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kib("VmRSS")
    start, cpu_start = time.perf_counter(), time.process_time()
    error, rules = None, ()
    try:
        checkpoint = load_checkpoint(path, model="ViT-B-32", allow_nonfinite=True)
        rules = tuple(finding.rule for finding in checkpoint.findings)
    except CheckpointError as caught:
        error = caught
    seconds = time.perf_counter() - start
    cpu_seconds = time.process_time() - cpu_start + sandbox._sandbox.cpu_seconds
    own = _status_kib("VmHWM") - before
    child = sandbox._sandbox.peak_kib - _child_baseline_kib()
    return Outcome(error, rules, seconds, cpu_seconds, max(own, child, 0) / 1024)


def _start_sandbox() -> None:
    _child_baseline_kib()
    with sandbox._lock:
        sandbox._running()


_baseline: list[int] = []


def _child_baseline_kib() -> int:
    """Resident set of a child that indexes a harmless file."""
    if not _baseline:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "a.pt")
            path.write_bytes(plain())
            load_checkpoint(path, model="ViT-B-32")
        assert sandbox._sandbox is not None
        _baseline.append(sandbox._sandbox.peak_kib)
    return _baseline[0]


def _status_kib(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise KeyError(key)


def summary() -> dict[str, float]:
    """Read all of them; the figures of the corpus as a whole."""
    from tests.checkpoints.deceptive_corpus import DECEPTIVE  # which imports this module

    refused, peak, slowest, busiest = 0, 0.0, 0.0, 0.0
    every = [*CORPUS, *DECEPTIVE]
    for case in every:
        with tempfile.TemporaryDirectory() as folder:
            outcome = measure(case.build(Path(folder)))
        refused += outcome.error is not None
        peak, slowest = max(peak, outcome.peak_mib), max(slowest, outcome.seconds)
        busiest = max(busiest, outcome.cpu_seconds)
    return {
        "hostile_total": len(every),
        "hostile_to_refuse": sum(case.error is not None for case in every),
        "hostile_refused": refused,
        "hostile_peak_mib": round(peak, 1),
        "hostile_max_s": round(slowest, 3),
        "hostile_max_cpu_s": round(busiest, 3),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(summary(), indent=2) + "\n")
