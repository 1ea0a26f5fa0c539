"""``.pt`` files that are built to do harm. Each must be refused fast, in little memory, with its
reason.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pydetox.checkpoints import Finding, load_checkpoint
from pydetox.checkpoints.index import WeightsFile
from pydetox.checkpoints.pickle_index import (
    MAX_INSTRUCTIONS,
    MAX_PICKLE_BYTES,
    read_pickle,
)
from pydetox.checkpoints.weights import index_file
from pydetox.checkpoints.zip_index import MAX_DIRECTORY_BYTES
from pydetox.errors import CheckpointError, UnsafeCheckpointError
from tests.checkpoints.zip_writer import zip64_bytes


def refuse(
    path: Path, message: str, error: type[CheckpointError] = UnsafeCheckpointError
) -> CheckpointError:
    """Load ``path``; assert that this fails with ``message`` in one line, quickly and in little
    memory.
    """
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(error, match=message) as caught:
            load_checkpoint(path, model="ViT-B-32")
        seconds = time.process_time() - start
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert seconds < 10  # of the processor; tracing makes it many times slower than it is
    assert peak < 200 << 20
    return caught.value


class Touch:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(6))
def test_code_is_named_and_not_run(
    tmp_path: Path, protocol: int, write_pt: Callable[..., Path]
) -> None:
    marker = tmp_path / "it ran"
    payload = pickle.dumps({"a": Touch(marker)}, protocol=protocol)
    pickle.loads(payload)  # it is a working attack
    marker.rmdir()
    refuse(write_pt(payload), r"asks for 'posix\.mkdir'")
    assert not marker.exists()


def test_code_in_a_file_of_torch(tmp_path: Path) -> None:
    marker = tmp_path / "it ran"
    path = tmp_path / "a.pt"
    torch.save({"state_dict": {"a": torch.ones(1)}, "epoch": Touch(marker)}, path)
    refuse(path, r"asks for 'posix\.mkdir', which is not on the list")
    assert not marker.exists()


def test_protocol_0_names_its_global_first(write_pt: Callable[..., Path]) -> None:
    refuse(write_pt(b"cos\nsystem\n(S'id'\ntR."), r"asks for 'os\.system'")
    refuse(write_pt(b"(S'id'\nios\nsystem\n."), r"asks for 'os\.system'")
    refuse(write_pt(b"(ios\nsystem\n."), r"asks for 'os\.system'")
    refuse(write_pt(b"(icollections\nOrderedDict\n."), "by the instruction INST")


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval",
        "builtins getattr",
        "__builtin__ exec",
        "builtins __import__",
        "operator attrgetter",
        "functools partial",
        "torch load",
        "torch.hub load",
        "torch.serialization load",
        "torch._utils _import_dotted_name",
        "torch.storage _load_from_bytes",
        "torch.jit load",
        "numpy load",
        "os.path join",
        "collections.OrderedDict update",
        "torch nn.Linear",
        "torch\x1b[31m evil",
    ],
)
def test_names_outside_the_list(write_pt: Callable[..., Path], name: str) -> None:
    module, attribute = name.split(" ")
    error = refuse(write_pt(f"\x80\x02c{module}\n{attribute}\n.".encode("latin1")), "asks for")
    assert str(error).isprintable()
    text = [b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, attribute)]
    refuse(write_pt(b"\x80\x04" + b"".join(text) + b"\x93."), "asks for")


@pytest.mark.parametrize("code", sorted(set(range(256)) - {0x2E}))
def test_every_other_instruction_alone(code: int) -> None:
    """No instruction does anything but describe or fail when it has nothing to work on."""
    with pytest.raises(CheckpointError) as caught:
        read_pickle(bytes([0x80, 2, code]) + b"\0" * 8)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "code", [b"\x82\x01", b"\x83\x01\0", b"o", b"P1\n", b"\x98", b"\x97", b"2", b"\xff"]
)
def test_instructions_that_no_checkpoint_needs(write_pt: Callable[..., Path], code: bytes) -> None:
    refuse(
        write_pt(b"\x80\x02" + code + b"."),
        "uses the instruction .*, which no checkpoint needs|not exist",
    )


ORDERED_DICT = b"ccollections\nOrderedDict\n"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (ORDERED_DICT + b"K\1\x85R.", "a dictionary of something else"),
        (ORDERED_DICT + b"]K\1a\x85R.", "a dictionary of something else"),
        (b"K\1)R.", "no function"),
        (b"K\1)\x81.", "no class"),
        (b"K\1Nb.", "sets the state"),
        (b"K\1Na.", "no list"),
        (b"NNNs.", "no dictionary"),
        (b"}(Nu.", "key without a value"),
        (b"(Q.", "a value is missing"),
        (b"(q\0.", "a value is missing"),
        (b"t.", "a mark is missing"),
        (b"h\0.", "never stored"),
        (b"NQ.", "no storage"),
        (b"NN\x93.", "a global without a name"),
        (b"cx", "a name without an end"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNtR.", "without a storage"),
        (b"\x80\x06.", "protocol 6"),
        (b".", "truncated or damaged"),
        (b"", "truncated or damaged"),
        (b"X\1\0\0\0", "truncated or damaged"),
        (b"c\xff\n\xff\n.", "truncated or damaged"),
    ],
)
def test_programs_without_sense(program: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_pickle(b"\x80\x02" + program)


def storage(kind: bytes = b"ctorch\nFloatStorage\n", count: bytes = b"K\1") -> bytes:
    return b"(X\7\0\0\0storage" + kind + b"X\1\0\0\x000X\3\0\0\0cpu" + count + b"tQ"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (storage(kind=b"ctorch\nSize\n"), "unsupported type 'torch.Size'"),
        (storage(kind=b"N"), "unsupported type something else"),
        (
            b"ctorch._utils\n_rebuild_tensor_v3\n("
            + storage(kind=b"ctorch.storage\nUntypedStorage\n", count=b"K\7")
            + b"K\0K\1\x85K\1\x85\x89Nctorch\nfloat32\ntR",
            "7 bytes are no whole number of float32",
        ),
        (storage(count=b"J\xff\xff\xff\xff"), "storage without a key or size"),
        (
            b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage() + b"K\0K\1\x85)\x89NtR",
            "1 dimensions, but 0 strides",
        ),
        (
            b"ctorch._utils\n_rebuild_tensor_v3\n(" + storage() + b"K\0))NNNtR",
            "a tensor of an unsupported dtype",
        ),
    ],
)
def test_tensors_without_sense(program: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_pickle(b"\x80\x02" + program + b".")


@pytest.mark.parametrize("value", [storage(), b"ctorch\nfloat32\n"])
def test_parts_of_a_tensor_alone(write_pt: Callable[..., Path], value: bytes) -> None:
    path = write_pt(b"\x80\x02}X\1\0\0\0a" + value + b"s.", {"0": bytes(4)})
    refuse(path, "its entry 'a' is (a storage|the name .*), expected a tensor", CheckpointError)


def test_hidden_second_pickle(write_pt: Callable[..., Path]) -> None:
    refuse(write_pt(b"\x80\x02}." + b"cos\nsystem\n."), "followed by 12 hidden bytes")


def test_memo_bomb(write_pt: Callable[..., Path]) -> None:
    refuse(write_pt(b"\x80\x02}r" + struct.pack("<I", 250_000_000) + b"."), "memo bomb")


def test_too_many_instructions(write_pt: Callable[..., Path]) -> None:
    path = write_pt(b"\x80\x02" + b"]" * MAX_INSTRUCTIONS + b".")
    with pytest.raises(UnsafeCheckpointError, match="more than 500000 instructions"):
        load_checkpoint(path, model="ViT-B-32")


def test_too_large_pickle(write_pt: Callable[..., Path]) -> None:
    refuse(write_pt(b"N" * (MAX_PICKLE_BYTES + 1)), "at most 16777216 are accepted")


def test_deep_nesting(write_pt: Callable[..., Path]) -> None:
    count = 100_000
    refuse(write_pt(b"\x80\x02)" + b"\x85" * count + b"."), "holds a tuple", CheckpointError)
    # As a key it would have to be hashed, recursively and in C.
    refuse(write_pt(b"\x80\x02})" + b"\x85" * count + b"Ns."), "name is a tuple", CheckpointError)


def test_quadratic_growth_stays_linear(write_pt: Callable[..., Path]) -> None:
    # A list of two references to a list of two references to … is 2^N long once somebody walks it.
    refuse(write_pt(b"\x80\x02]q\0" + b"(h\0h\0e" * 1000 + b"."), "holds a list", CheckpointError)


def test_zip_bomb(tmp_path: Path, make_members: Callable[..., list[Any]]) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in make_members(b"\x80\x02}."):
            archive.writestr(entry.name, entry.data, zipfile.ZIP_STORED)
        archive.writestr("archive/data/0", bytes(64 << 20))
    assert path.stat().st_size < 1 << 20
    refuse(path, r"'archive/data/0' is compressed \(\d+ bytes claim to be 67108864\).*zip bomb")


def _saved(state: dict[str, torch.Tensor]) -> tuple[bytes, dict[str, bytes]]:
    """Pickle and storages that ``torch.save`` makes of a state dict."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as archive:
        records = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    storages = {name[5:]: data for name, data in records.items() if name.startswith("data/")}
    return records["data.pkl"], storages


def test_forged_storage_size(write_pt: Callable[..., Path]) -> None:
    pickle_bytes, storages = _saved({"a": torch.ones(200)})
    forged = pickle_bytes.replace(b"K\xc8", b"J\0\0\0\x40")  # 200 becomes 2^30, everywhere
    assert forged != pickle_bytes
    refuse(
        write_pt(forged, storages), "claims a storage of 4294967296 bytes, but its record has 800"
    )
    refuse(
        write_pt(pickle_bytes, {"0": bytes(799)}),
        "claims a storage of 800 bytes, but its record has 799",
    )
    refuse(
        write_pt(pickle_bytes, {"0": bytes(801)}),
        "claims a storage of 800 bytes, but its record has 801",
    )


def test_view_beyond_its_storage(write_pt: Callable[..., Path]) -> None:
    pickle_bytes, storages = _saved({"a": torch.ones(200)[:150]})
    forged = pickle_bytes.replace(b"K\x96", b"K\xc9")
    assert forged != pickle_bytes
    refuse(
        write_pt(forged, storages), r"shape \[201\] reaches beyond the 200 elements of its storage"
    )


def test_view_that_repeats_its_storage(write_pt: Callable[..., Path]) -> None:
    pickle_bytes, storages = _saved({"a": torch.ones(100).as_strided((50, 50), (1, 1))})
    refuse(write_pt(pickle_bytes, storages), r"shape \[50, 50\] repeats a storage of 100 elements")


def test_expanded_tensors_are_read_up_to_a_size(write_pt: Callable[..., Path]) -> None:
    state = {"a": torch.ones(1).expand(200), "b": torch.arange(3.0)[:, None].expand(3, 500)}
    found = load_checkpoint(write_pt(*_saved(state)), model="ViT-B-32")
    assert found.findings == ()
    for name, tensor in state.items():
        assert torch.equal(found.state_dict[name], tensor)
        found.state_dict[name].view(-1)[0] += 1  # the others stay as they are
        assert found.state_dict[name].view(-1)[1] == tensor.reshape(-1)[1]
    large = {"a": torch.ones(1).expand(1 << 20, 5)}
    refuse(write_pt(*_saved(large)), "have 20971520 bytes together, but are all views of 4")


@pytest.mark.parametrize(
    "forged", [b"J\xff\xff\xff\xff", b"\x89", b"G" + bytes(8), b"N", b"\x8a\x10" + b"\x7f" * 16]
)
def test_sizes_that_are_no_sizes(write_pt: Callable[..., Path], forged: bytes) -> None:
    pickle_bytes, storages = _saved({"a": torch.ones(200)[:150]})
    changed = pickle_bytes.replace(b"K\x96", forged)
    refuse(
        write_pt(changed, storages),
        "its shape holds something that is not an integer",
        CheckpointError,
    )


def test_one_storage_for_many_tensors(write_pt: Callable[..., Path]) -> None:
    """Each is harmless; looking at all of them takes as long as for a file a thousand times as
    large.
    """
    big = torch.zeros(1000)
    pickle_bytes, storages = _saved({str(i): big for i in range(16)})
    assert len(load_checkpoint(write_pt(pickle_bytes, storages), model="ViT-B-32").state_dict) == 16
    pickle_bytes, storages = _saved({str(i): big for i in range(17)})
    refuse(write_pt(pickle_bytes, storages), "have 68000 bytes together, but are all views of 4000")


def test_long_names(write_pt: Callable[..., Path]) -> None:
    key = b"module." * 200_000
    text = b"X" + struct.pack("<I", len(key)) + key
    refuse(
        write_pt(b"\x80\x02}" + text + b"Ns."),
        r"entry 'module\..*\.\.\.' is None",
        CheckpointError,
    )
    pickle_bytes, storages = _saved({"a": torch.ones(1)})
    path = write_pt(pickle_bytes.replace(b"X\1\0\0\0a", text), storages)
    refuse(path, "its name has 1400000 characters, at most 4096 are accepted")
    long = "module." * 585
    torch.save({long: torch.ones(1)}, path)
    assert list(load_checkpoint(path, model="ViT-B-32").state_dict) == ["module." * 584]


def test_same_name_twice(write_pt: Callable[..., Path]) -> None:
    pickle_bytes, storages = _saved({"a": torch.ones(1), "b": torch.zeros(1)})
    forged = pickle_bytes.replace(b"X\1\0\0\0b", b"X\1\0\0\0a")
    path = write_pt(forged, storages)
    checkpoint = load_checkpoint(path, model="ViT-B-32")
    assert checkpoint.findings == (
        Finding("duplicate-key", "tensor 'a': is there twice; the last one counts"),
    )
    expected = torch.load(path, weights_only=True)
    assert checkpoint.state_dict == expected == {"a": torch.zeros(1)}


def _forge_second(**changes: Any) -> Callable[[list[Any]], None]:
    def forge(members: list[Any]) -> None:
        for name, value in changes.items():
            setattr(members[1], name, value(members) if callable(value) else value)

    return forge


@pytest.mark.parametrize(
    ("changes", "message", "error"),
    [
        ({"unpacked": 1 << 31, "packed": 1 << 31}, "described differently", UnsafeCheckpointError),
        ({"unpacked": 1 << 31}, "is compressed", UnsafeCheckpointError),
        ({"method": 8}, "is compressed", UnsafeCheckpointError),
        ({"crc": 1}, "described differently", UnsafeCheckpointError),
        ({"flags": 1}, "is encrypted", CheckpointError),
        ({"offset": 1}, "not where the zip directory says", CheckpointError),
        ({"offset": lambda m: m[0].offset}, "not where the zip directory says", CheckpointError),
        ({"offset": 1 << 30}, "truncated or damaged", CheckpointError),
        ({"offset": 0xFFFFFFFF}, "lacks its zip64 sizes", CheckpointError),
        (
            {"name": "archive/data.pkl", "offset": 0},
            "is in the zip archive twice",
            UnsafeCheckpointError,
        ),
    ],
    ids=lambda value: str(value).partition(" at 0x")[0][:40],
)
def test_lies_in_the_zip_directory(
    write_pt: Callable[..., Path],
    changes: dict[str, Any],
    message: str,
    error: type[CheckpointError],
) -> None:
    refuse(write_pt(b"\x80\x02}.", forge=_forge_second(**changes)), message, error)


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "/etc/passwd",
        "archive/../../evil",
        "archive//x",
        "archive\\..\\evil",
        "archive/./x",
        "a\0b",
        "",
    ],
)
def test_member_names_cannot_escape(
    tmp_path: Path,
    member: type,
    make_zip: Callable[..., bytes],
    make_members: Callable[..., list[Any]],
    name: str,
) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(make_zip([*make_members(b"\x80\x02}."), member(name, b"")]))
    refuse(path, "not a plain path inside the archive")


def test_overlapping_members(
    tmp_path: Path,
    member: type,
    make_zip: Callable[..., bytes],
    make_members: Callable[..., list[Any]],
) -> None:
    """A member inside another one: many storages could share the same bytes."""
    members = make_members(b"\x80\x02}.")
    inner = member("archive/data/1", b"data")
    outer = member("archive/data/0", inner.local_header() + inner.data)

    def forge(written: list[Any]) -> None:
        inner.offset = outer.offset + len(outer.local_header())
        written.append(inner)

    path = tmp_path / "a.pt"
    path.write_bytes(make_zip([*members, outer], forge=forge))
    refuse(path, "'archive/data/0' and record 'archive/data/1' overlap")


def test_member_that_reaches_into_the_directory(
    tmp_path: Path,
    member: type,
    make_zip: Callable[..., bytes],
    make_members: Callable[..., list[Any]],
) -> None:
    # With flag 8 the sizes at the data are zero, so that only the directory tells them.
    last = member("archive/data/0", b"data", flags=8)

    def forge(written: list[Any]) -> None:
        last.packed = last.unpacked = 1000

    path = tmp_path / "a.pt"
    path.write_bytes(make_zip([*make_members(b"\x80\x02}."), last], forge=forge))
    refuse(path, "claims 1000 bytes, more than the file has")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"comment": b"x"}, "a comment of 1 bytes behind the end"),
        ({"comment": b"PK\5\6" + bytes(18)}, "zip directory|zip archive"),
    ],
)
def test_odd_ends_of_the_archive(
    write_pt: Callable[..., Path], options: dict[str, Any], message: str
) -> None:
    refuse(write_pt(b"\x80\x02}.", **options), message, CheckpointError)


def test_huge_zip_directory(tmp_path: Path, member: type, make_zip: Callable[..., bytes]) -> None:
    path = tmp_path / "a.pt"
    names = [f"archive/{number:065000d}" for number in range(MAX_DIRECTORY_BYTES // 65000 + 1)]
    path.write_bytes(make_zip([member(name, b"") for name in names]))
    refuse(path, "zip directory of .* bytes, at most 8388608")


def test_wrong_checksum(write_pt: Callable[..., Path]) -> None:
    pickle_bytes, storages = _saved({"a": torch.ones(200)})
    path = write_pt(pickle_bytes, storages)
    raw = bytearray(path.read_bytes())
    raw[raw.index(storages["0"])] ^= 1
    path.write_bytes(raw)
    refuse(path, r"the record at byte \d+ has a wrong checksum", CheckpointError)
    raw = bytearray(write_pt(pickle_bytes, storages).read_bytes())
    raw[raw.index(pickle_bytes)] ^= 1
    path.write_bytes(raw)
    refuse(path, "record 'archive/data.pkl' has a wrong checksum", CheckpointError)


def test_truncation_at_every_place(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    raw = (tmp_path / "a.pt").read_bytes()
    path = tmp_path / "b.pt"
    for length in range(0, len(raw), 7):
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError), WeightsFile(path) as file:
            index_file(file)


def test_refusal_takes_milliseconds(write_pt: Callable[..., Path]) -> None:
    path = write_pt(b"\x80\x02}r" + struct.pack("<I", 250_000_000) + b".")
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        with pytest.raises(UnsafeCheckpointError), WeightsFile(path) as file:
            index_file(file)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.02


def test_zip64_sizes(tmp_path: Path, make_members: Callable[..., list[Any]]) -> None:
    """Archives beyond 4 GB keep their sizes in an extra field; here a small one does."""
    pickle_bytes, storages = _saved({"a": torch.ones(200)})
    members = make_members(pickle_bytes, storages)
    path = tmp_path / "a.pt"
    path.write_bytes(zip64_bytes(members))
    assert load_checkpoint(path, model="ViT-B-32").state_dict["a"].sum().item() == 200
    path.write_bytes(zip64_bytes(members, cut=8))
    refuse(path, "lacks its zip64 sizes", CheckpointError)
