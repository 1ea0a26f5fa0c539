"""The process in which hostile files are indexed: its limits, and what becomes of its death."""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pydetox.checkpoints import load_checkpoint, sandbox, sandbox_server, save_weights
from pydetox.checkpoints.index import FileIndex, Finding, WeightsFile
from pydetox.checkpoints.index_json import from_json, to_json
from pydetox.checkpoints.sandbox import Sandbox, index_in_sandbox
from pydetox.checkpoints.weights import index_file
from pydetox.errors import CheckpointError, UnsafeCheckpointError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    base = torch.arange(6.0).reshape(2, 3)
    state = {"a": base, "b": base.t(), "c": torch.ones(3).bfloat16(), "d\n": torch.ones(0)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


@pytest.fixture
def own_sandbox() -> Iterator[Sandbox]:
    made = Sandbox()
    yield made
    made.close()


def index_both(path: Path) -> tuple[FileIndex, FileIndex]:
    with WeightsFile(path) as file:
        return index_in_sandbox(file), index_file(file)


def test_the_same_index_as_in_this_process(path: Path, tmp_path: Path) -> None:
    there, here = index_both(path)
    assert there == here
    assert [finding.rule for finding in here.findings] == ["overlapping-storage", "suspicious-name"]
    other = save_weights(tmp_path / "b.safetensors", {"ä": torch.ones(2, 0)}, metadata={"ö": "\n"})
    there, here = index_both(other)
    assert there == here


@pytest.mark.parametrize("content", [b"", b"garbage, nothing else", b"PK\3\4", b"\x1b[31m\n" * 20])
def test_the_same_error_as_in_this_process(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with WeightsFile(tmp_path / "a.pt") as file:
        with pytest.raises(CheckpointError) as here:
            index_file(file)
        with pytest.raises(CheckpointError) as there:
            index_in_sandbox(file)
    assert (type(there.value), str(there.value)) == (type(here.value), str(here.value))


def test_one_descriptor(path: Path, tmp_path: Path) -> None:
    """What is indexed is the open file, not whatever has its name by then."""
    with WeightsFile(path) as file:
        path.unlink()
        assert set(index_in_sandbox(file).tensors) == {"a", "b", "c", "d\n"}


def test_the_server_has_no_torch_and_little_else() -> None:
    code = """
import json, sys
sys.path.append(sys.argv[1])
import pydetox.checkpoints.sandbox_server
third_party = {n for n in sys.modules if n.partition(".")[0] not in sys.stdlib_module_names}
print(json.dumps(sorted(third_party)))
"""
    command = [sys.executable, "-I", "-S", "-c", code, str(sandbox._ROOT)]
    modules = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    own = ["index", "index_json", "formats", "sandbox_server", "safetensors_index", "torch_index"]
    own += ["zip_index", "pickle_index", "pickle_globals", "pickle_calls", "pickle_values"]
    own += ["pickle_literals", "weight_sets", "legacy_index"]
    expected = {"pydetox", "pydetox.errors", "pydetox.lazy", "pydetox.checkpoints"}
    assert set(modules) - {"__main__"} == expected | {f"pydetox.checkpoints.{name}" for name in own}


LONG_ANSWER = b"+" + b" " * (1 << 20)


def in_child(monkeypatch: pytest.MonkeyPatch, body: Callable[[], object]) -> Callable[[Path], None]:
    """A child as the server forks it, except that it runs ``body`` in place of the index."""

    def run(path: Path) -> None:
        def answer(*_: object) -> bytes:
            # Made before the fork: this process is larger than what its child may have.
            return LONG_ANSWER if body == LONG_ANSWER.decode else str(body()).encode()

        monkeypatch.setattr(sandbox_server, "_answer", answer)
        monkeypatch.setattr(Sandbox, "__init__", _without_server)
        monkeypatch.setattr(sandbox, "MAX_ANSWER", 1 << 19)
        monkeypatch.setattr(sandbox_server.gc, "collect", lambda: 0)  # takes long with torch loaded
        with WeightsFile(path) as file:
            fake = Sandbox()
            try:
                fake.index(file)
            finally:
                fake.close()

    return run


def _without_server(self: Any) -> None:
    import socket

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server = os.fork()
    if server == 0:
        try:
            os.setsid()
            ours.close()
            sandbox_server.serve(theirs.fileno())
        finally:
            os._exit(0)
    theirs.close()
    self.owner, self.peak_kib, self._control = os.getpid(), 0, ours
    self._process = Forked(server)


class Forked:
    """As much of `subprocess.Popen` as a sandbox needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.ended = False

    def poll(self) -> int | None:
        return 0 if self.ended else None

    def wait(self) -> None:
        if not self.ended:
            os.waitpid(self.pid, 0)
        self.ended = True


def crash() -> None:
    faulthandler.disable()  # pytest's would print this process's stack
    os.kill(os.getpid(), signal.SIGSEGV)


def exhaust_memory() -> None:
    bytearray(sandbox_server.MEMORY)


def open_a_file() -> str:
    try:
        os.open(os.devnull, os.O_RDONLY)
    except OSError as error:
        return f"-{error.strerror}"
    return "-it could"


def limits() -> str:
    names = ("AS", "CORE", "FSIZE", "NOFILE", "CPU")
    found = {n: resource.getrlimit(getattr(resource, f"RLIMIT_{n}")) for n in names}
    return f"-{json.dumps(found)}"


@pytest.mark.parametrize(
    ("body", "message", "error"),
    [
        (crash, r"crashed the .* \(SIGSEGV\)", True),
        (lambda: os.kill(os.getpid(), signal.SIGXCPU), "more than 5 s of processor time", True),
        (lambda: os._exit(3), "crashed the process that indexed it", True),
        (lambda: 1 // 0, "crashed the process that indexed it", True),
        (exhaust_memory, "crashed the process that indexed it", True),
        (lambda: "", "crashed the process that indexed it", True),
        (lambda: "x" * 20, "crashed the process that indexed it", True),
        (LONG_ANSWER.decode, "took over the process", True),
        (lambda: "+{}", "senseless answer", False),
        (lambda: "!\x1b[31mred\nlines", r"^\?\[31mred\?lines$", True),
        (open_a_file, "Too many open files", False),
        (limits, r'{"AS": \[402653184, 402653184\], "CORE": \[0, 0\], "FSIZE": \[0, 0\], ', False),
        (limits, r'"NOFILE": \[0, 0\], "CPU": \[5, 6\]}', False),
    ],
)
def test_what_a_child_may_do(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    body: Callable[[], object],
    message: str,
    error: bool,
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        in_child(monkeypatch, body)(path)
    assert isinstance(caught.value, UnsafeCheckpointError) == error


def test_a_real_memory_error_is_explained(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_server, "index_file", lambda *_: bytearray(1 << 62))
    with WeightsFile(path) as file:
        answer = sandbox_server._answer("a.pt", os.dup(file.descriptor), None)
    assert answer == b"!needs more than 384 MiB of memory only to be indexed"


def test_hang(path: Path, monkeypatch: pytest.MonkeyPatch, own_sandbox: Sandbox) -> None:
    """A file system that does not answer: here the server is stopped."""
    monkeypatch.setattr(sandbox, "WALL_SECONDS", 0.3)
    os.kill(own_sandbox._process.pid, signal.SIGSTOP)
    start = time.monotonic()
    with WeightsFile(path) as file, pytest.raises(UnsafeCheckpointError, match="could not be inde"):
        own_sandbox.index(file)
    assert time.monotonic() - start < 5
    assert not own_sandbox.usable()


def test_a_dead_server_is_replaced(path: Path) -> None:
    index_both(path)
    first = sandbox._sandbox
    assert first is not None
    os.kill(first._process.pid, signal.SIGKILL)
    first._process.wait()
    index_both(path)
    assert sandbox._sandbox is not first
    assert sandbox._sandbox is not None
    kept = sandbox._sandbox
    (path.parent / "b.pt").write_bytes(b"garbage, nothing else")
    with pytest.raises(CheckpointError):
        load_checkpoint(path.parent / "b.pt")
    index_both(path)
    assert sandbox._sandbox is kept  # a refused file costs nothing


def test_threads(path: Path) -> None:
    found: list[FileIndex] = []
    threads = [threading.Thread(target=lambda: found.append(index_both(path)[0])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(index == found[0] for index in found)


def test_a_forked_process_gets_a_sandbox_of_its_own(path: Path) -> None:
    index_both(path)
    child = os.fork()
    if child == 0:
        try:
            with WeightsFile(path) as file, sandbox._lock:
                made = sandbox._running()
                made.index(file)
                made.close()
                os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    index_both(path)


def test_server_ends_with_its_process(path: Path) -> None:
    code = """
import sys
from pydetox.checkpoints import sandbox
from pydetox.checkpoints.index import WeightsFile
with WeightsFile(sys.argv[1]) as file:
    sandbox.index_in_sandbox(file)
print(sandbox._sandbox._process.pid, flush=True)
import os; os.kill(os.getpid(), 9)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], check=False, capture_output=True, text=True
    )
    server = int(done.stdout)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _alive(server):
        time.sleep(0.01)
    assert not _alive(server)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def changed(content: Any, where: tuple[Any, ...], value: object) -> bytes:
    copy = json.loads(json.dumps(content))
    inner = copy
    for key in where[:-1]:
        inner = inner[key]
    if value is KeyError:
        del inner[where[-1]]
    else:
        inner[where[-1]] = value
    return json.dumps(copy).encode()


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ((0,), "pickle"),
        ((1, 0, 0), 3),
        ((1, 0, 1), -1),
        ((1, 0, 1), 1 << 60),
        ((1, 0, 1), 1.0),
        ((1, 0, 1), True),
        ((1, 0, 1), 0),  # into the header of the zip archive
        ((1, 0, 2), 25),
        ((1, 0, 2), 23),
        ((1, 0, 3), 1 << 32),
        ((1, 1, 0), "0"),
        ((2, 0, 0), None),
        ((2, 0, 0), "b"),
        ((2, 0, 1), "object"),
        ((2, 0, 1), []),
        ((2, 0, 1), "float64"),
        ((2, 0, 2), [3, 3]),
        ((2, 0, 2), [-2, 3]),
        ((2, 0, 2), [2]),
        ((2, 0, 2), 6),
        ((2, 0, 3), [1 << 30, 1]),
        ((2, 0, 4), 7),
        ((2, 0, 4), -1),
        ((2, 0, 5), 1),
        ((2,), []),
        ((3, 0), [0]),
        ((3, 0, 0), 1 << 60),
        ((4,), []),
        ((4,), {"a": 1}),
        ((5, 0, 0), "evil"),
        ((5, 0, 1), "\x1b[31m"),
        ((5, 0, 1), "x" * 1001),
        ((5, 0, 1), 1),
        ((7, 0, 1), 1 << 60),
        ((7,), "00"),
        ((7,), "x" * 64),
        ((7,), KeyError),
    ],
)
def test_answers_are_not_trusted(path: Path, where: tuple[Any, ...], value: object) -> None:
    with WeightsFile(path) as file:
        index = index_file(file)
        content = json.loads(to_json(index))
        assert from_json(json.dumps(content).encode(), file.size) == index
        with pytest.raises(CheckpointError, match="senseless answer"):
            from_json(changed(content, where, value), file.size)


@pytest.mark.parametrize("data", [b"", b"[", b"{}", b"\xff", b"[" * 100_000, b"null", b"[1]"])
def test_answers_without_sense(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="senseless answer"):
        from_json(data, 100)


def test_findings_are_part_of_the_checkpoint(path: Path) -> None:
    checkpoint = load_checkpoint(path, model="ViT-B-32")
    assert checkpoint.findings == (
        Finding("overlapping-storage", "tensors 'a' and 'b': their storages overlap"),
        Finding("suspicious-name", "tensor 'd\\n': control characters in its name"),
    )
    assert dataclasses.replace(checkpoint, findings=()).findings == ()
